"""Servers that others wrote, over stdio: of the TypeScript and the Python SDK, in both eras."""
import json
import os
import threading
import time

import peers
import pytest
from helpers_mcp_stdio import (
    at_once, is_alive, mcp_threads, transport_of, wait_until, wait_until_gone, watch)

from tinychat.mcp.client import Client
from tinychat.mcp.command import Command
from tinychat.mcp.errors import CalledOff, ServerError, TimedOut
from tinychat.mcp.limits import Limits
from tinychat.mcp.plugins import Plugins
from tinychat.mcp.tools import definition, expose, output_of, text_for_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
LOTS = 1 << 20

SERVER = '''
import asyncio
from mcp.server.mcpserver import Context, MCPServer

server = MCPServer("ours")

@server.tool()
async def sleep_and_say(text: str, seconds: float = 0.0) -> str:
    """Says it after a while."""
    await asyncio.sleep(seconds)
    return text

@server.tool()
async def count(n: int, ctx: Context) -> int:
    """Counts, and reports it."""
    for i in range(n):
        await ctx.report_progress(i, n)
        await asyncio.sleep(0.05)
    return n

@server.tool()
def fail() -> str:
    raise ValueError("it is broken")

server.run("stdio")
'''


@pytest.fixture
def everything(test_cache):
    return Command("everything", peers.npm_peer(test_cache, "mcp-server-everything"), ("stdio",))


@pytest.fixture
def ours(test_cache, tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    return Command("ours", peers.python_peer(test_cache), (str(tmp_path / "server.py"),))


class Talk:
    """A connected client, and short ways to use it."""

    def __init__(self, client: Client):
        self.client = client
        self.tools = {tool.name: tool for tool in client.tools(watch())}

    def call(self, name: str, **arguments):
        return self.client.call(name, arguments, watch())

    def text(self, name: str, **arguments) -> str:
        return text_for_model(self.call(name, **arguments), LOTS)


@pytest.fixture
def talk():
    """Connects to a command; nothing of it is left afterwards."""
    open_ones, pids = [], []

    def connect(command: Command, mode: str = "auto") -> Talk:
        context = transport_of(command)
        transport = context.__enter__()
        open_ones.append(context)
        client = Client(transport, mode=mode, limits=Limits())
        client.connect(watch())
        pids.append(transport._process.pid)
        return Talk(client)
    yield connect
    for context in open_ones:
        context.__exit__(None, None, None)
    assert mcp_threads() == []
    assert not any(is_alive(pid) for pid in pids)


# ---- the TypeScript SDK

def test_everything_offers_tools_that_a_model_can_be_shown(everything, talk):
    tools = talk(everything).tools
    assert {"echo", "get-sum", "get-tiny-image"} <= tools.keys()
    for one in expose([("everything", list(tools.values()))]):
        shown = definition(one)["function"]
        assert shown["name"] == one.tool.name and shown["description"]
        assert "$schema" not in shown["parameters"] and shown["parameters"]["type"] == "object"


def test_everything_is_called(everything, talk):
    with_it = talk(everything)
    assert with_it.client.version == "2025-11-25"
    assert with_it.text("echo", message="grüße \u2028 \U0001f600") == "Echo: grüße \u2028 \U0001f600"
    assert "5" in with_it.text("get-sum", a=2, b=3)


def test_everything_answers_with_every_kind_of_block(everything, talk):
    """M-070 M-072"""
    with_it = talk(everything)
    image = with_it.call("get-tiny-image")
    assert "[image image/png, " in text_for_model(image, LOTS)
    assert [block["type"] for block in json.loads(output_of(image))] == [block["type"] for block in image.content]
    links = with_it.text("get-resource-links", count=2)
    assert links.count("[resource ") == 2
    structured = with_it.call("get-structured-content", location="New York")
    assert structured.structured and "temperature" in text_for_model(structured, LOTS)


def test_everything_does_not_get_our_environment(everything, talk, monkeypatch):
    """M-057"""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    assert "sk-very-secret" not in talk(everything).text("get-env")


def test_everything_refuses_wrong_arguments_and_unknown_tools(everything, talk):
    """M-071"""
    with_it = talk(everything)
    for name, arguments in (("get-sum", {"a": "x"}), ("no-such-tool", {})):
        try:
            result = with_it.call(name, **arguments)
            assert result.is_error and text_for_model(result, LOTS)
        except ServerError as error:
            assert error.rpc_code == -32602
    assert with_it.text("echo", message="fine") == "Echo: fine"


def test_everything_shows_progress_that_keeps_a_call_alive(everything, talk):
    """M-078"""
    with_it = talk(everything)
    patient = with_it.client.call("trigger-long-running-operation", {"duration": 1.5, "steps": 5},
                                  watch(10, patience_s=0.8))
    assert "completed" in text_for_model(patient, LOTS).lower()
    with pytest.raises(TimedOut):
        with_it.client.call("trigger-long-running-operation", {"duration": 5, "steps": 1},
                            watch(10, patience_s=0.3))
    assert with_it.text("echo", message="still here") == "Echo: still here"


def test_everything_is_called_off_and_stays(everything, talk):
    """M-081"""
    with_it, off = talk(everything), threading.Event()
    timer = threading.Timer(0.2, off.set)
    timer.start()
    began = time.monotonic()
    with pytest.raises(CalledOff):
        with_it.client.call("trigger-long-running-operation", {"duration": 10, "steps": 2}, watch(called_off=off))
    assert time.monotonic() - began < 1
    timer.join()
    assert with_it.text("echo", message="still here") == "Echo: still here"


def test_filesystem_serves_a_folder_with_an_odd_name(test_cache, talk, tmp_path):
    """M-058"""
    folder = tmp_path / "my $files"
    folder.mkdir()
    (folder / "a.txt").write_text("hello")
    server = talk(Command("files", peers.npm_peer(test_cache, "mcp-server-filesystem"), (str(folder),)))
    assert server.text("read_text_file", path=str(folder / "a.txt")) == "hello"
    assert "a.txt" in server.text("list_directory", path=str(folder))
    outside = server.call("read_text_file", path="/etc/hostname")
    assert outside.is_error and "denied" in text_for_model(outside, LOTS)


def test_npx_and_all_that_it_started_are_gone_afterwards(test_cache, tmp_path):
    """M-055 M-056"""
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"it": {
        "command": "npx", "args": ["--prefix", str(peers.npm_folder(test_cache)), "mcp-server-everything"]}}}))
    plugins = Plugins(tmp_path / "mcp.json")
    try:
        with plugins.acquire("it", watch(60)) as client:
            said = text_for_model(client.call("echo", {"message": "hi"}, watch()), LOTS)
            assert said == "Echo: hi"
            leader = client._transport._process.pid
            group = group_of(leader)
            assert len(group) > 1, "npx starts a shell, which starts node"
    finally:
        began = time.monotonic()
        plugins.close()
    assert time.monotonic() - began < 7
    wait_until_gone(group)
    assert mcp_threads() == []


def group_of(leader: int) -> list[int]:
    """The processes of a group; Linux only."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getpgid(int(pid)) == leader:
                found.append(int(pid))
        except OSError:
            pass
    return found


# ---- the Python SDK

def test_time_converts_times(test_cache, talk):
    server = talk(Command("time", peers.python_peer(test_cache), ("-m", "mcp_server_time")))
    assert {"get_current_time", "convert_time"} <= server.tools.keys()
    said = server.text("convert_time", source_timezone="UTC", time="12:00", target_timezone="Asia/Tokyo")
    assert json.loads(said)["target"]["datetime"].partition("T")[2].startswith("21:00")
    wrong = server.call("get_current_time", timezone="Nowhere/Land")
    assert wrong.is_error and "Nowhere/Land" in text_for_model(wrong, LOTS)


@pytest.mark.parametrize("mode, version", [("auto", "2025-11-25"), ("modern", "2026-07-28")])
def test_a_server_of_the_python_sdk_speaks_both_eras(ours, talk, mode, version):
    """M-019"""
    server = talk(ours, mode)
    assert server.client.version == version
    assert server.tools.keys() == {"sleep_and_say", "count", "fail"}
    assert server.text("sleep_and_say", text="hello") == "hello"
    broken = server.call("fail")
    assert broken.is_error and "fail" in text_for_model(broken, LOTS)


@pytest.mark.parametrize("mode", ["auto", "modern"])
def test_many_calls_share_a_server_of_the_python_sdk(ours, talk, mode):
    """M-050"""
    server = talk(ours, mode)
    began = time.monotonic()
    said = at_once(*[lambda i=i: server.text("sleep_and_say", text=str(i), seconds=0.5 - i / 20)
                     for i in range(10)])
    assert said == [str(i) for i in range(10)]
    assert time.monotonic() - began < 3, "one after the other would take longer"


@pytest.mark.parametrize("mode", ["auto", "modern"])
def test_progress_and_calling_off_work_with_the_python_sdk(ours, talk, mode):
    """M-078 M-081"""
    server = talk(ours, mode)
    counted = server.client.call("count", {"n": 12}, watch(10, patience_s=0.5))
    assert "12" in text_for_model(counted, LOTS)
    with pytest.raises(TimedOut):
        server.client.call("sleep_and_say", {"text": "x", "seconds": 60}, watch(0.3))
    assert server.text("sleep_and_say", text="still here") == "still here"


def test_a_server_of_the_python_sdk_that_dies_is_started_again(ours, talk):
    """M-051"""
    server = talk(ours)
    transport = server.client._transport
    os.kill(transport._process.pid, 9)
    wait_until(lambda: not transport.is_running, "the news of its death")
    assert server.text("sleep_and_say", text="again") == "again"
