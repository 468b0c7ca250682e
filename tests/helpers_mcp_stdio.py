"""Scripted MCP servers that are processes: a few lines of Python after a prelude that knows the protocol."""
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from tinychat.mcp.client import Client
from tinychat.mcp.command import Command
from tinychat.mcp.limits import Limits
from tinychat.mcp.process import ProcessLimits
from tinychat.mcp.stdio import StdioTransport
from tinychat.mcp.watch import Watch

WAIT_S = 20.0  # bound of every wait; a test that needs it has failed
QUICK = ProcessLimits(step_s=0.4, last_words_s=0.3, write_s=0.5)

PRELUDE = '''
import json, os, signal, subprocess, sys, threading, time
FOLDER = os.path.dirname(os.path.abspath(__file__))

def note(name, text):
    with open(os.path.join(FOLDER, name), "a") as file:
        file.write(str(text) + "\\n")

def write(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()

def send(message):
    write(json.dumps(message).encode() + b"\\n")

def result(m, value):
    send({"jsonrpc": "2.0", "id": m["id"], "result": value})

def text(m, text):
    result(m, {"content": [{"type": "text", "text": text}]})

def error(m, code=-32601, message="no"):
    send({"jsonrpc": "2.0", "id": m["id"], "error": {"code": code, "message": message}})

def messages():
    for line in sys.stdin.buffer:
        note("seen", line.decode().strip())
        yield json.loads(line)

TOOLS = [{"name": "echo", "inputSchema": {"type": "object"}}]

def usual(m):
    """Answers what is no call; was it one?"""
    method = m.get("method")
    if method == "initialize":
        result(m, {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                   "serverInfo": {"name": "s", "version": "1"}})
    elif method == "tools/list":
        result(m, {"tools": TOOLS})
    return method != "tools/call"

def calls():
    for m in messages():
        if not usual(m):
            yield m

def arguments(m):
    return m["params"]["arguments"]

note("pids", os.getpid())
'''

ECHO = '''
for m in calls():
    text(m, arguments(m)["text"])
'''


class Script:
    """A server's program in a folder of its own, and what it left there."""

    def __init__(self, folder: Path, body: str):
        self.folder = folder
        self.path = folder / "server.py"
        self.rewrite(body)

    def rewrite(self, body: str) -> None:
        self.path.write_text(PRELUDE + body, encoding="utf-8")

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-S", "-X", "utf8", str(self.path)]

    def command(self, label: str = "scripted", **fields) -> Command:
        first, *args = self.argv
        return Command(label, first, tuple(args), **fields)

    def entry(self, **fields) -> dict:
        """As mcp.json has it."""
        first, *args = self.argv
        return {"command": first, "args": args, **fields}

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    @property
    def pids(self) -> list[int]:
        """Of all its processes, in the order of their starts."""
        return [int(line) for line in self.lines("pids")]

    def seen(self, method: str | None = None) -> list:
        """The messages it read, or those of one method."""
        found = [json.loads(line) for line in self.lines("seen")]
        return [m for m in found if isinstance(m, dict) and m.get("method") == method] if method else found

    def wait_for(self, method: str, n: int = 1) -> list[dict]:
        wait_until(lambda: len(self.seen(method)) >= n, f"{n} of {method}")
        return self.seen(method)


@contextmanager
def connected(command: Command, *, limits: Limits = Limits(), process: ProcessLimits = QUICK):
    """A client that has greeted its process."""
    with transport_of(command, limits=limits, process=process) as transport:
        client = Client(transport, limits=limits)
        client.connect(watch())
        yield client


@contextmanager
def transport_of(command: Command, *, limits: Limits = Limits(), process: ProcessLimits = QUICK):
    transport = StdioTransport(command, limits=limits, process_limits=process)
    try:
        yield transport
    finally:
        transport.close()


def watch(seconds: float = WAIT_S, **options) -> Watch:
    return Watch(seconds, what="the test's call", **options)


def call(client: Client, seconds: float = WAIT_S, **arguments) -> str:
    """The text that a call of `echo` brings."""
    return client.call("echo", arguments, watch(seconds)).content[0]["text"]


def at_once(*runs) -> list:
    """Runs all in threads; their results or exceptions, in order."""
    results = [None] * len(runs)

    def one(i):
        try:
            results[i] = runs[i]()
        except BaseException as error:
            results[i] = error
    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads)
    return results


def wait_until(is_so, what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Does it run? A zombie that its new parent has not reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(pid, 0)
        return True
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    for pid in pids:
        wait_until(lambda: not is_alive(pid), f"the end of process {pid}")


def mcp_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mcp-")]


def n_descriptors() -> int:
    """How many are open; 0 where that cannot be told."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
