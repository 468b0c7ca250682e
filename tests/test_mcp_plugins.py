"""The plugins: started once for all who ask, shared, replaced, and gone at the end."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
from helpers_mcp import ECHO as ECHO_TOOL
from helpers_mcp import McpServer
from helpers_mcp_stdio import (
    ECHO, QUICK, WAIT_S, Script, at_once, call, is_alive, mcp_threads, n_descriptors, wait_until,
    wait_until_gone, watch)

from tinychat.mcp.errors import CalledOff, McpError, NotConnected, Refused, TimedOut, Unreachable
from tinychat.mcp.plugin import PluginLimits
from tinychat.mcp.plugins import Plugins, UnknownPlugin

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and groups of POSIX")


class House:
    """An mcp.json, the scripts that it names, and its plugins."""

    def __init__(self, folder):
        self.folder, self._n = folder, 0
        self.plugins: Plugins | None = None

    def script(self, body: str = ECHO, name: str = "a") -> Script:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return Script(folder, body)

    def write(self, **entries) -> None:
        path = self.folder / "mcp.json"
        path.write_text(json.dumps({"mcpServers": entries}))
        self._n += 1
        os.utime(path, ns=(self._n * 10**9, self._n * 10**9))

    def open(self, **limits) -> Plugins:
        self.plugins = Plugins(self.folder / "mcp.json", PluginLimits(process=QUICK, **limits))
        return self.plugins


@pytest.fixture
def house(tmp_path):
    n_before = n_descriptors()
    house = House(tmp_path)
    yield house
    if house.plugins:
        house.plugins.close()
    assert mcp_threads() == []
    assert n_descriptors() == n_before
    for path in tmp_path.glob("*/pids"):
        assert not any(is_alive(int(pid)) for pid in path.read_text().split())


def test_a_plugin_is_started_for_the_first_and_shared_by_all(house):
    server = house.script()
    house.write(a=server.entry())
    plugins = house.open()
    assert server.pids == [], "not before it is needed"
    with plugins.acquire("a", watch()) as one, plugins.acquire("a", watch()) as other:
        assert one is other
        assert call(one, text="x") == "x"
    with plugins.acquire("a", watch()) as client:
        assert call(client, text="y") == "y"
    assert len(server.pids) == 1


def test_ten_chats_that_ask_at_once_start_one_process(house):
    """M-059"""
    server = house.script('time.sleep(0.2)\n' + ECHO)
    house.write(a=server.entry())
    plugins = house.open()

    def chat(i):
        with plugins.acquire("a", watch()) as client:
            return call(client, text=str(i))
    assert at_once(*[lambda i=i: chat(i) for i in range(10)]) == [str(i) for i in range(10)]
    assert len(server.pids) == 1 and len(server.seen("initialize")) == 1


def test_ten_chats_that_find_it_dead_start_it_once(house):
    """M-051 M-059"""
    server = house.script()
    house.write(a=server.entry())
    plugins = house.open()

    def chat():
        with plugins.acquire("a", watch()) as client:
            return [tool.name for tool in client.tools(watch())] and call(client, text="x")
    assert chat() == "x"
    os.kill(server.pids[0], signal.SIGKILL)
    wait_until(lambda: not any("stdin" in name for name in mcp_threads()), "the end of its threads")
    server.rewrite('TOOLS.append({"name": "new", "inputSchema": {}})\n' + ECHO)
    assert at_once(*[chat] * 10) == ["x"] * 10
    assert len(server.pids) == 2 and len(server.seen("initialize")) == 2
    with plugins.acquire("a", watch()) as client:
        assert [tool.name for tool in client.tools(watch())] == ["echo", "new"]


def test_who_asked_first_may_go_away_and_the_others_stay(house):
    server = house.script('time.sleep(0.5)\n' + ECHO)
    house.write(a=server.entry())
    plugins, off, began = house.open(), threading.Event(), threading.Event()

    def first():
        threading.Timer(0.1, off.set).start()
        began.set()
        with plugins.acquire("a", watch(called_off=off)):
            pass

    def second():
        began.wait(WAIT_S)
        with plugins.acquire("a", watch()) as client:
            return call(client, text="x")
    left, stayed = at_once(first, second)
    assert isinstance(left, CalledOff) and stayed == "x"
    assert len(server.pids) == 1


def test_a_plugin_that_cannot_start_is_an_error_with_its_label_and_is_tried_again(house):
    """M-058 M-090"""
    house.write(a={"command": "no-such-command"})
    plugins = house.open()
    errors = at_once(*[lambda: plugins.acquire("a", watch()).__enter__()] * 3)
    for error in errors:
        assert isinstance(error, NotConnected)
        assert (error.type, error.code) == ("plugin_connection_error", "connection_failed")
        assert error.message == "a (no-such-command): cannot start: no command 'no-such-command'"
    assert len({id(error) for error in errors}) == 3
    server = house.script()
    house.write(a=server.entry())
    with plugins.acquire("a", watch()) as client:
        assert call(client, text="x") == "x"


def test_a_plugin_that_dies_at_its_start_says_why(house):
    """M-051 M-090"""
    house.write(a=house.script('sys.exit("no key given")').entry())
    plugins = house.open()
    for _ in range(3):
        with pytest.raises(Unreachable, match="exited with code 1; it said: no key given") as caught:
            plugins.acquire("a", watch()).__enter__()
        assert caught.value.type == "plugin_connection_error"
    with pytest.raises(Unreachable, match="3 times in a short while.*no key given"):
        plugins.acquire("a", watch()).__enter__()


def test_a_plugin_that_is_silent_at_its_start_is_given_up_and_ended(house):
    server = house.script("for m in messages(): pass")
    house.write(a=server.entry())
    plugins = house.open(start_quiet_s=0.3)
    with pytest.raises(TimedOut, match="the start of a"):
        plugins.acquire("a", watch()).__enter__()
    wait_until_gone(server.pids)


def test_a_timeout_of_mcp_json_is_known_and_does_not_cut_a_start_short(house):
    """M-088"""
    server = house.script('time.sleep(0.4)\n' + ECHO)
    house.write(a=server.entry(timeout=100), b={"url": "http://127.0.0.1:9", "timeout": 7}, c={"command": "x"})
    plugins = house.open()
    assert [plugins.timeout_ms(label) for label in "abc"] == [100, 7, None]
    with plugins.acquire("a", watch()) as client:
        assert call(client, text="x") == "x"


def test_an_unknown_plugin_lists_the_known_ones(house):
    house.write(**{"My_Files": {"command": "x"}, "web": {"url": "http://h"}})
    plugins = house.open()
    assert plugins.labels() == ["My_Files", "web"]
    for ask in (lambda: plugins.find("mcp/nope"), lambda: plugins.find("web"), lambda: plugins.timeout_ms("nope"),
                lambda: plugins.acquire("nope", watch()).__enter__()):
        with pytest.raises(UnknownPlugin, match="known: mcp/My_Files, mcp/web") as caught:
            ask()
        assert (caught.value.type, caught.value.code) == ("plugin_connection_error", "plugin_not_found")
    assert plugins.find("mcp/My_Files") == plugins.find("mcp/my-files") == "My_Files"
    (house.folder / "mcp.json").write_text("{")
    assert plugins.find("mcp/web") == "web"
    with pytest.raises(UnknownPlugin, match="line 1, column 2"):
        plugins.find("mcp/nope")


def test_a_broken_entry_explains_itself_when_it_is_used(house):
    """M-087"""
    server = house.script()
    house.write(bad={"command": "x", "env": {"K": "${env:NO_SUCH_VARIABLE}"}}, a=server.entry())
    plugins = house.open()
    with pytest.raises(Refused, match="bad in mcp.json: env.K: the variable NO_SUCH_VARIABLE") as caught:
        plugins.acquire("bad", watch()).__enter__()
    assert (caught.value.type, caught.value.code) == ("plugin_connection_error", "connection_failed")
    with plugins.acquire("a", watch()) as client:
        assert call(client, text="x") == "x"


def test_a_changed_entry_counts_for_the_next_chat_and_the_old_one_ends_with_its_last(house):
    """M-087"""
    old, new = house.script(name="a"), house.script("for m in calls(): text(m, 'new')", name="b")
    house.write(a=old.entry())
    plugins = house.open()
    with plugins.acquire("a", watch()) as before:
        assert call(before, text="old") == "old"
        house.write(a=new.entry())
        with plugins.acquire("a", watch()) as after:
            assert call(after, text="x") == "new"
            assert call(before, text="still") == "still"
    wait_until_gone(old.pids)
    with plugins.acquire("a", watch()) as client:
        assert call(client) == "new"
    house.write()
    with pytest.raises(UnknownPlugin):
        plugins.find("mcp/a")
    assert len(old.pids) == len(new.pids) == 1


def test_a_plugin_that_nobody_uses_is_stopped_after_a_while(house):
    server = house.script()
    house.write(a=server.entry())
    plugins = house.open(idle_s=0.3)
    with plugins.acquire("a", watch()) as client:
        time.sleep(0.5)  # longer than idle_s: it is in use
        assert call(client, text="x") == "x"
    wait_until_gone(server.pids)
    with plugins.acquire("a", watch()) as client:
        assert call(client, text="y") == "y"
    assert len(server.pids) == 2


def test_all_are_stopped_at_the_same_time(house):
    """M-054 M-056"""
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ECHO + "while True: time.sleep(1)"
    servers = [house.script(stubborn, name) for name in "abcd"]
    house.write(**{server.folder.name: server.entry() for server in servers})
    plugins = house.open()
    with ExitStack() as chats:
        for label in "abcd":
            chats.enter_context(plugins.acquire(label, watch()))
        began = time.monotonic()
        plugins.close()
        assert time.monotonic() - began < 3 * QUICK.step_s + 1
        assert not any(is_alive(pid) for server in servers for pid in server.pids)
        with pytest.raises(Unreachable, match="closed"):
            plugins.acquire("a", watch()).__enter__()
    plugins.close()


def test_all_are_stopped_where_no_thread_can_be_started(house, monkeypatch):
    """M-056: as at the end of the interpreter, since Python 3.12."""
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ECHO + "while True: time.sleep(1)"
    servers = [house.script(stubborn, name) for name in "abc"]
    with McpServer() as web:
        house.write(web={"url": web.url}, **{server.folder.name: server.entry() for server in servers})
        plugins = house.open()
        for label in plugins.labels():
            with plugins.acquire(label, watch()):
                pass

        def refuse(thread):
            raise RuntimeError("can't create new thread at interpreter shutdown")
        began = time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            plugins.close()
        assert time.monotonic() - began < 3 * QUICK.step_s + 1
    assert not any(is_alive(pid) for server in servers for pid in server.pids)


def test_closing_calls_a_start_off(house):
    server = house.script("for m in messages(): pass")
    house.write(a=server.entry())
    plugins = house.open()

    def close():
        server.wait_for("initialize")
        began = time.monotonic()
        plugins.close()
        return time.monotonic() - began
    error, took = at_once(lambda: plugins.acquire("a", watch()).__enter__(), close)
    assert isinstance(error, McpError) and took < 2


def test_a_url_in_mcp_json_may_be_on_this_machine_and_is_shared(house):
    with McpServer(versions=["2025-11-25"], sessions=True) as server:
        house.write(web={"url": server.url, "headers": {"X-Key": "k"}})
        plugins = house.open()
        for _ in range(2):
            with plugins.acquire("web", watch()) as client:
                assert [tool.name for tool in client.tools(watch())] == [ECHO_TOOL["name"]]
        assert len(server.of("initialize")) == 1
        assert all(seen.headers["x-key"] == "k" for seen in server.seen)
        plugins.close()
        assert len(server.of("DELETE")) == 1


def test_a_url_that_cannot_be_reached_is_an_error_of_the_plugin(house):
    """M-090"""
    house.write(t={"url": "http://127.0.0.1:9/mcp?key=secret"})
    plugins = house.open()
    with pytest.raises(NotConnected, match="mcp/t: http://127.0.0.1:9/mcp: cannot connect") as caught:
        plugins.acquire("t", watch()).__enter__()
    assert caught.value.type == "plugin_connection_error" and "secret" not in str(caught.value)


# ---- the end of the program

PROGRAM = '''
import signal, sys, time
from pathlib import Path
from tinychat.mcp.plugin import PluginLimits
from tinychat.mcp.plugins import Plugins
from tinychat.mcp.process import ProcessLimits
from tinychat.mcp.watch import Watch

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)  # as `tinychat serve` does
plugins = Plugins(Path(sys.argv[1]), PluginLimits(process=ProcessLimits(step_s=0.4)))
for label in plugins.labels():
    plugins.acquire(label, Watch(20, what="it")).__enter__()
print("ready", flush=True)
if sys.argv[2] == "error":
    raise SystemError("an error of the program")
if sys.argv[2] != "exit":
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
'''


@pytest.mark.parametrize("how", ["exit", "error", "SIGINT", "SIGTERM", "SIGKILL"])
def test_no_plugin_outlives_the_program(house, how):
    """M-056. After SIGKILL the end of their input is all that plugins get to know."""
    stubborn = "" if how == "SIGKILL" else "while True: time.sleep(1)"
    servers = [house.script(ECHO + stubborn, name) for name in "ab"]
    house.write(**{server.folder.name: server.entry() for server in servers})
    (house.folder / "program.py").write_text(PROGRAM)
    began = time.monotonic()
    program = subprocess.Popen([sys.executable, house.folder / "program.py", house.folder / "mcp.json", how],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert program.stdout.readline() == b"ready\n"
        pids = [pid for server in servers for pid in server.pids]
        assert len(pids) == 2
        if how.startswith("SIG"):
            program.send_signal(getattr(signal, how))
        _, said = program.communicate(timeout=WAIT_S)
        assert time.monotonic() - began < 8
        if how == "SIGKILL":
            wait_until_gone(pids)
        assert not any(is_alive(pid) for pid in pids)
    finally:
        program.kill()
        program.communicate()
        for pid in (pid for server in servers for pid in server.pids if is_alive(pid)):
            os.kill(pid, signal.SIGKILL)
    assert said.count(b"Error") == (2 if how == "error" else 0), said.decode()
