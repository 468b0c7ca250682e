"""MCP over the pipes of a process: messages, hostile output, how it starts, how it ends."""
import json
import os
import signal
import sys
import threading
import time
import tracemalloc

import pytest
from helpers_mcp_stdio import (
    ECHO, QUICK, Script, at_once, call, connected, is_alive, mcp_threads, n_descriptors,
    transport_of, wait_until, wait_until_gone, watch)

from tinychat.mcp import jsonrpc
from tinychat.mcp.command import Command, environment
from tinychat.mcp.errors import (
    CalledOff, McpError, NotConnected, ProtocolError, ServerError, SessionLost, TimedOut,
    Unreachable)
from tinychat.mcp.limits import Limits
from tinychat.mcp.lines import Lines
from tinychat.mcp.process import ProcessLimits
from tinychat.mcp.stdio import StdioTransport

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and groups of POSIX")


@pytest.fixture
def script(tmp_path):
    return lambda body=ECHO: Script(tmp_path, body)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """M-056: no process, thread or descriptor after each test here."""
    n_before = n_descriptors()
    yield
    assert mcp_threads() == []
    assert n_descriptors() == n_before
    pids = tmp_path / "pids"
    for pid in pids.read_text().split() if pids.exists() else []:
        assert not is_alive(int(pid))


# ---- messages

def test_a_batch_with_notifications_and_the_answer_yields_the_answer(script):
    """M-001 M-002"""
    server = script('''
for m in calls():
    answer = {"jsonrpc": "2.0", "id": m["id"], "result": {"content": [{"type": "text", "text": "yes"}]}}
    send([{"jsonrpc": "2.0", "method": "notifications/message", "params": {}}, answer])
''')
    with connected(server.command()) as client:
        assert call(client) == call(client) == "yes"
    seen = server.seen()
    assert all(isinstance(m, dict) and m["jsonrpc"] == "2.0" for m in seen)
    assert all(isinstance(m["params"], dict) for m in seen if "method" in m)
    ids = [m["id"] for m in seen if "id" in m]
    assert ids == sorted(set(ids)) and all(type(id) is int for id in ids)


def test_an_answer_with_another_id_satisfies_nobody(script):
    """M-003"""
    server = script('''
for m in calls():
    for id in (m["id"] + 1, True, float(m["id"]), None, str(m["id"]), [m["id"]], {}):
        send({"jsonrpc": "2.0", "id": id, "result": {"content": [{"type": "text", "text": "wrong"}]}})
    send({"jsonrpc": "2.0", "result": {}})
    text(m, "right")
''')
    with connected(server.command()) as client:
        assert call(client) == "right"


@pytest.mark.parametrize("answer", ["{}", '{"result": 3}', '{"result": null}', '{"error": 3}',
                                    '{"result": []}', '{"error": null}'])
def test_an_answer_without_a_usable_result_is_an_error(script, answer):
    """M-005"""
    server = script(f'''
for m in calls():
    send({{"jsonrpc": "2.0", "id": m["id"], **json.loads({answer!r})}})
''')
    with connected(server.command()) as client, pytest.raises(ProtocolError, match="expected a"):
        call(client)


def test_requests_of_the_server_are_answered_while_a_call_waits(script):
    """M-006 M-007: the server here waits for each answer before it goes on."""
    server = script('''
it = messages()
for m in it:
    if usual(m):
        continue
    got = []
    for id, method in ((7, "ping"), ("a", "roots/list"), (8, "sampling/createMessage"),
                       (9, "elicitation/create"), (10, "x/y")):
        send({"jsonrpc": "2.0", "id": id, "method": method, "params": {}})
        got.append(next(it))
    text(m, json.dumps(got))
''')
    with connected(server.command()) as client:
        ping, *others = json.loads(call(client))
    assert ping == {"jsonrpc": "2.0", "id": 7, "result": {}}
    assert [other["id"] for other in others] == ["a", 8, 9, 10]
    assert {other["error"]["code"] for other in others} == {-32601}


UNREADABLE = {
    "nested deeply": '"[" * 200_000 + "]" * 200_000',
    "a huge integer": '"9" * 20_000',
    "NaN": '"NaN"',
    "cut off": '"[1, "',
}


@pytest.mark.parametrize("value", UNREADABLE.values(), ids=UNREADABLE)
def test_an_answer_that_cannot_be_read_fails_its_call_at_once(script, value):
    """M-008"""
    server = script(f'''
for m in calls():
    if "text" in arguments(m):
        text(m, "fine")
    else:
        write(('{{"jsonrpc":"2.0","id":%d,"result":{{"content":[' % m["id"] + {value} + ']}}}}\\n').encode())
''')
    with connected(server.command()) as client:
        with pytest.raises(ProtocolError, match="scripted"):
            call(client)
        assert call(client, text="x") == "fine"


def test_bytes_and_halves_of_characters_become_text(script):
    """M-008"""
    server = script('''
for m in calls():
    write(b'{"jsonrpc":"2.0","id":%d,"result":{"content":[{"type":"text","text":"a\\xffb\\\\ud800c"}]}}\\n' % m["id"])
''')
    with connected(server.command()) as client:
        assert call(client) == "a\ufffdb\ufffdc"


def test_notifications_that_nobody_knows_change_nothing(script):
    """M-009"""
    server = script('''
for m in calls():
    for method, params in (("x/y", {}), ("notifications/progress", {"progressToken": 999}),
                           ("notifications/progress", {"progressToken": [1]}),
                           ("notifications/progress", 3), ("notifications/cancelled", {"requestId": m["id"]})):
        send({"jsonrpc": "2.0", "method": method, "params": params})
    text(m, "yes")
''')
    with connected(server.command()) as client:
        assert call(client) == "yes"


def test_a_flood_of_notifications_ends_the_call_and_not_the_connection(script):
    """M-080"""
    server = script('''
for m in calls():
    if "flood" in arguments(m):
        write(b'{"jsonrpc":"2.0","method":"x","params":{}}\\n' * 300_000)
    text(m, "yes")
''')
    with connected(server.command()) as client:
        def works(**flood):
            try:
                return call(client, **flood) == "yes"
            except ProtocolError as error:
                assert "too many messages" in str(error)
                return False
        assert not works(flood=True)
        wait_until(works, "the end of the flood")


def test_a_changed_list_is_listed_again(script):
    """M-068"""
    server = script('''
for m in calls():
    TOOLS.append({"name": "new", "inputSchema": {}})
    send({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
    text(m, "yes")
''')
    with connected(server.command()) as client:
        assert [tool.name for tool in client.tools(watch())] == ["echo"]
        client.tools(watch())
        assert len(server.seen("tools/list")) == 1
        call(client)
        assert [tool.name for tool in client.tools(watch())] == ["echo", "new"]


# ---- eras

PICKY = {
    "exits": "sys.exit(3)",
    "ignores": "pass",
}


@pytest.mark.parametrize("then", PICKY.values(), ids=PICKY)
def test_a_server_that_wants_initialize_first_works_without_delay(script, then):
    """M-015 M-018"""
    server = script(f'''
is_greeted = False
for m in messages():
    is_greeted = is_greeted or m.get("method") == "initialize"
    if not is_greeted:
        {then}
    elif not usual(m):
        text(m, "yes")
''')
    began = time.monotonic()
    with connected(server.command()) as client:
        assert call(client) == "yes"
    assert time.monotonic() - began < 2
    assert len(server.pids) == 1
    methods = [m["method"] for m in server.seen()]
    assert methods == ["initialize", "notifications/initialized", "tools/call"]
    assert server.seen("initialize")[0]["params"]["protocolVersion"] == "2025-11-25"


STATELESS = '''
for m in messages():
    method, meta = m.get("method"), m["params"].get("_meta", {})
    if method == "initialize":
        error(m, -32601, "no such method")
        THEN
    elif meta.get("io.modelcontextprotocol/protocolVersion") != "2026-07-28":
        error(m, -32022, "which version?")
    elif method == "server/discover":
        result(m, {"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}, "resultType": "complete"})
    elif method == "tools/list":
        result(m, {"tools": TOOLS, "resultType": "complete", "ttlMs": 0, "cacheScope": "private"})
    elif method == "tools/call":
        send({"jsonrpc": "2.0", "id": 1, "method": "ping"})
        result(m, {"content": [{"type": "text", "text": "yes"}], "resultType": "complete"})
'''


@pytest.mark.parametrize("then, n_starts", [("pass", 1), ("sys.exit(1)", 2),
                                            ("os.close(1); time.sleep(0.2); sys.exit(1)", 2)])
def test_a_server_of_the_stateless_era_alone_works(script, then, n_starts):
    """M-019: also one that leaves when it is asked for the handshake."""
    server = script(STATELESS.replace("THEN", then))
    with connected(server.command()) as client:
        assert client.version == "2026-07-28"
        assert [tool.name for tool in client.tools(watch())] == ["echo"]
        assert call(client) == call(client) == "yes"
    assert len(server.pids) == n_starts
    assert all("method" in m for m in server.seen()), "its requests are a fault, and not answered"


def test_a_process_of_the_stateless_era_that_died_needs_no_greeting(script):
    """M-019 M-051"""
    server = script(STATELESS.replace("THEN", "pass"))
    with connected(server.command()) as client:
        os.kill(server.pids[0], signal.SIGKILL)
        wait_until(lambda: not client._transport.is_running, "the news of its death")
        assert call(client) == "yes"
    assert [m["method"] for m in server.seen()] == ["initialize", "server/discover", "tools/call"]


def test_a_server_that_refuses_both_eras_is_an_error(script):
    server = script('for m in messages(): error(m, -32000, "go away")')
    with pytest.raises(ServerError, match=r"scripted \(.*\): go away"), connected(server.command()):
        pass


# ---- what else is on the pipes

def test_banners_and_noise_on_stdout_do_not_disturb(script):
    """M-046"""
    server = script('''
print("Welcome to my server!\\n\\n[INFO] ready {on} stdio", flush=True)
for m in calls():
    for noise in ("", "   ", "3", "null", '"text"', "[]", "[1, 2]", "{}", '{"a": 1}', "INFO: [done]",
                  '{"level": "info", "id": 3', "\\x1b[1mbold\\x1b[0m", '{"jsonrpc": "2.0"}'):
        print(noise, flush=True)
    text(m, "yes")
''')
    with connected(server.command()) as client:
        assert call(client) == call(client) == "yes"


def test_megabytes_on_stderr_do_not_disturb_and_its_last_line_explains_a_death(script):
    """M-047"""
    server = script('''
for m in calls():
    sys.stderr.write("noise\\n" * 700_000)
    if "die" in arguments(m):
        sys.stderr.write("Error: the disk is \\x1b[31mfull\\n\\n")
        sys.exit(3)
    text(m, "yes")
''')
    with connected(server.command()) as client:
        assert call(client) == "yes"
        with pytest.raises(Unreachable, match=r"exited with code 3; it said: Error: the disk is \[31mfull"):
            call(client, die=True)


def test_secrets_of_the_environment_are_not_repeated_in_errors(script):
    """M-089"""
    server = script('''
sys.stderr.write("bad key " + os.environ["KEY"] + "\\n")
sys.exit(1)
''')
    with pytest.raises(Unreachable, match=r"it said: bad key \*\*\*") as caught:
        with connected(server.command(env={"KEY": "sk-12345678"})):
            pass
    assert "sk-1" not in str(caught.value)
    assert "sk-1" not in repr(server.command(env={"KEY": "sk-12345678"}))


def test_lines_are_cut_at_line_feeds_alone(script):
    """M-048"""
    server = script('''
TEXT = "a\\u2028b\\u0085c\\u2029d\\x0be \\U0001f600"
for m in calls():
    line = json.dumps({"jsonrpc": "2.0", "id": m["id"], "result": {"content": [
        {"type": "text", "text": TEXT}]}}, ensure_ascii=False).encode()
    how = arguments(m)["text"]
    if how == "crlf":
        write(line + b"\\r\\n")
    elif how == "bom":
        write(b"\\xef\\xbb\\xbf" + line + b"\\n")
    elif how == "bytes":
        for byte in line + b"\\n":
            write(bytes([byte]))
    elif how == "ten":
        write(b"".join(b'{"jsonrpc":"2.0","method":"x%d"}\\n' % i for i in range(9)) + line + b"\\n")
    elif how == "megabyte":
        TEXT = "x" * (1 << 20)
        text(m, TEXT)
''')
    with connected(server.command()) as client:
        for how in ("crlf", "bom", "bytes", "ten"):
            assert call(client, text=how) == "a\u2028b\x85c\u2029d\x0be \U0001f600"
        assert call(client, text="megabyte") == "x" * (1 << 20)


def test_what_is_sent_is_one_line_of_ascii(script):
    """M-048"""
    server = script()
    odd = "a\nb\r\u2028\u0085 \U0001f600 \"quoted\""
    with connected(server.command()) as client:
        assert call(client, text=odd) == odd


def test_pieces_become_lines_and_a_long_one_is_refused_before_it_is_kept():
    """M-048 M-049"""
    lines = Lines(5)
    assert [*lines.feed(b"ab\ncd"), *lines.feed(b"e\n\nf"), *lines.feed(b"\n")] == [b"ab", b"cde", b"", b"f"]
    assert [*lines.feed(b"12345\n")] == [b"12345"]
    with pytest.raises(ProtocolError, match="at most 5 bytes"):
        [*lines.feed(b"123456")]


def test_a_line_without_end_ends_the_connection_in_bounded_memory(script):
    """M-049"""
    server = script('''
for m in calls():
    if "text" in arguments(m):
        text(m, "yes")
    while True:
        write(b"x" * 65536)
''')
    tracemalloc.start()
    try:
        with connected(server.command()) as client:
            with pytest.raises(ProtocolError, match="expected lines of at most 8388608 bytes"):
                call(client)
            assert tracemalloc.get_traced_memory()[1] < 40 << 20
            assert call(client, text="x") == "yes"
    finally:
        tracemalloc.stop()


def test_noise_without_end_ends_on_time(script):
    """M-077"""
    server = script('''
for m in calls():
    while True:
        write(b"working ...\\n" * 100)
''')
    with connected(server.command()) as client:
        began = time.monotonic()
        with pytest.raises(TimedOut):
            call(client, 0.5)
        assert 0.5 <= time.monotonic() - began < 1.5


# ---- sharing

def test_two_calls_get_their_own_answers_in_any_order(script):
    """M-050"""
    server = script('''
waiting = []
for m in calls():
    waiting.append(m)
    if len(waiting) == 2:
        for m in reversed(waiting):
            text(m, arguments(m)["text"])
''')
    with connected(server.command()) as client:
        assert at_once(lambda: call(client, text="a"), lambda: call(client, text="b")) == ["a", "b"]


def test_progress_keeps_the_right_call_alive_and_not_for_ever(script):
    """M-078"""
    server = script('''
def work(m):
    for i in range(10_000):
        send({"jsonrpc": "2.0", "method": "notifications/progress",
              "params": {"progressToken": m["params"]["_meta"]["progressToken"], "progress": i}})
        if arguments(m)["text"] == "long" and i == 30:
            text(m, "done")
        time.sleep(0.02)
for m in calls():
    if arguments(m)["text"] != "quiet":
        threading.Thread(target=work, args=(m,), daemon=True).start()
''')
    with connected(server.command()) as client:
        def echo(text, total):
            return client.call("echo", {"text": text}, watch(total, patience_s=0.3)).content[0]["text"]
        began = time.monotonic()
        done, endless, quiet = at_once(lambda: echo("long", 10), lambda: echo("endless", 1),
                                       lambda: echo("quiet", 10))
        took = time.monotonic() - began
        server.wait_for("notifications/cancelled", 2)
    assert done == "done"
    assert isinstance(endless, TimedOut) and isinstance(quiet, TimedOut)
    assert 1 <= took < 2.5


def test_a_call_that_is_called_off_ends_soon_and_the_connection_stays(script):
    """M-081"""
    server = script('''
for m in calls():
    if "text" in arguments(m):
        text(m, arguments(m)["text"])
    else:
        late = m
        threading.Timer(0.6, lambda: text(late, "late")).start()
''')
    off = threading.Event()
    with connected(server.command()) as client:
        def patient():
            with pytest.raises(CalledOff):
                client.call("echo", {}, watch(called_off=off))
            return time.monotonic()

        def hasty():
            server.wait_for("tools/call")
            off.set()
            return time.monotonic()
        ended, called_off = at_once(patient, hasty)
        assert ended - called_off < 0.5
        cancelled = server.wait_for("notifications/cancelled")[0]
        assert cancelled["params"]["requestId"] == server.seen("tools/call")[0]["id"]
        assert call(client, text="still here") == "still here"
    assert len(server.pids) == 1


def test_a_greeting_without_an_answer_is_not_cancelled(script):
    server = script("for m in messages(): pass")
    with transport_of(server.command()) as transport:
        with pytest.raises(TimedOut):
            transport.exchange(jsonrpc.request(1, "initialize"), watch(0.3))
        server.wait_for("initialize")
    assert len(server.seen()) == 1


# ---- death in mid-call

@pytest.mark.parametrize("death, said", [
    ("sys.stderr.write('out of memory\\n'); sys.exit(7)", "exited with code 7; it said: out of memory"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
    ("os.close(1); time.sleep(60)", "closed its output"),
])
def test_a_death_fails_the_call_soon_and_the_next_call_starts_it_again(script, death, said):
    """M-051"""
    server = script(f'''
for m in calls():
    if "die" in arguments(m):
        {death}
    text(m, "yes")
''')
    with connected(server.command()) as client:
        client.tools(watch())
        began = time.monotonic()
        with pytest.raises(Unreachable, match=said) as caught:
            call(client, die=True)
        assert time.monotonic() - began < 1
        assert "scripted (" in str(caught.value) and "\n" not in str(caught.value)
        assert call(client) == "yes"
        assert len(client.tools(watch())) == 1
    assert len(server.pids) == 2 and len(server.seen("tools/list")) == 2
    assert len(server.seen("initialize")) == len(server.seen("notifications/initialized")) == 2


def test_all_who_wait_hear_of_a_death_and_it_starts_once_for_all(script):
    """M-050 M-051"""
    server = script('''
n = 0
for m in calls():
    n += 1
    if "die" not in arguments(m):
        text(m, "yes")
    elif n == 3:
        sys.exit(1)
''')
    with connected(server.command()) as client:
        errors = at_once(*[lambda: call(client, die=True)] * 3)
        assert all(isinstance(error, Unreachable) for error in errors)
        assert len({id(error) for error in errors}) == 3
        assert at_once(*[lambda: call(client)] * 5) == ["yes"] * 5
    assert len(server.pids) == 2


def test_an_answer_before_the_exit_counts(script):
    server = script('''
for m in calls():
    text(m, "x" * 300_000)
    sys.exit(0)
''')
    with connected(server.command()) as client:
        for _ in range(3):
            assert len(call(client)) == 300_000
            wait_until(lambda: not client._transport.is_running, "the news of its exit")


def test_a_child_that_holds_the_pipes_of_a_dead_server_does_not_hide_its_death(script):
    """M-051 M-055"""
    server = script('''
for m in calls():
    child = subprocess.Popen(["sleep", "60"])
    note("pids", child.pid)
    os.kill(os.getpid(), signal.SIGKILL)
''')
    with connected(server.command()) as client:
        began = time.monotonic()
        with pytest.raises(Unreachable, match="was ended by SIGKILL"):
            call(client)
        assert time.monotonic() - began < 1
        wait_until_gone(server.pids)


def test_a_request_to_a_process_that_was_started_again_is_not_sent_before_a_greeting(script):
    server = script()
    with transport_of(server.command()) as transport:
        with pytest.raises(SessionLost, match="started again"):
            transport.exchange(jsonrpc.request(1, "tools/list"), watch())
    assert server.seen() == []


def test_a_process_that_does_not_stay_is_not_started_over_and_over(script):
    server = script('sys.exit("no licence")')
    limits = ProcessLimits(step_s=0.4, starts=3, starts_s=1.0)
    with transport_of(server.command(), process=limits) as transport:
        def attempt():
            with pytest.raises(Unreachable) as caught:
                transport.exchange(jsonrpc.request(1, "initialize"), watch())
            return str(caught.value)
        for _ in range(3):
            assert "no licence" in attempt()
        began = time.monotonic()
        said = attempt()
        assert "3 times" in said and "no licence" in said
        wait_until(lambda: "3 times" not in attempt(), "another start")
        assert 0.5 < time.monotonic() - began < 3
    assert len(server.pids) == 4


# ---- a process that does not read

def test_a_process_that_stops_reading_blocks_nobody(script):
    """M-052"""
    server = script('''
m = next(messages()); usual(m)
next(messages())
time.sleep(60)
''')
    with connected(server.command()) as client:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(TimedOut, match="does not read"):
                call(client, text="x" * 1_000_000)
            assert time.monotonic() - began < QUICK.write_s + 1
        off = threading.Event()
        threading.Timer(0.1, off.set).start()
        with pytest.raises(CalledOff):
            client.call("echo", {}, watch(called_off=off))


def test_requests_to_a_process_that_reads_late_arrive_whole(script):
    """M-052: what was begun is finished, what was given up before is not sent."""
    server = script('''
it = messages()
for m in it:
    if usual(m):
        if m["method"] == "notifications/initialized":
            while not os.path.exists(os.path.join(FOLDER, "go")):
                time.sleep(0.01)
        continue
    text(m, arguments(m)["text"][:3])
''')
    with connected(server.command()) as client:
        for text in ("a" * 200_000, "b" * 200_000):
            with pytest.raises(TimedOut):
                call(client, text=text)
        (server.folder / "go").touch()
        assert call(client, text="see") == "see"
    assert [m["params"]["arguments"]["text"][:1] for m in server.seen("tools/call")] == ["a", "s"]


def test_pings_of_a_server_that_reads_none_of_the_answers_do_no_harm(script):
    """M-006 M-052"""
    server = script('''
for m in calls():
    write(b"".join(b'{"jsonrpc":"2.0","id":%d,"method":"ping"}\\n' % i for i in range(9_000)))
    text(m, "yes")
''')
    with connected(server.command()) as client:
        assert call(client) == "yes"


# ---- the end

SIGNALS = '''
def record(number, frame):
    note("signals", signal.Signals(number).name)
    LEAVE
signal.signal(signal.SIGTERM, record)
'''


def test_a_process_that_leaves_at_the_end_of_input_gets_no_signal(script):
    """M-053"""
    server = script(SIGNALS.replace("LEAVE", "") + ECHO + 'note("signals", "left")')
    with connected(server.command()) as client:
        call(client, text="x")
    assert server.lines("signals") == ["left"]


@pytest.mark.parametrize("leave, got", [("os._exit(0)", 2), ("pass", 3)], ids=["SIGTERM", "SIGKILL"])
def test_a_process_that_ignores_the_end_of_input_is_ended_by_signals(script, leave, got):
    """M-054"""
    server = script(SIGNALS.replace("LEAVE", leave) + ECHO + "while True: time.sleep(1)")
    with connected(server.command()) as client:
        call(client, text="x")
        began = time.monotonic()
        client.close()
        took = time.monotonic() - began
        assert not is_alive(server.pids[0])
        assert (got - 1) * QUICK.step_s <= took < got * QUICK.step_s + 1
    assert server.lines("signals") == ["SIGTERM"]


def test_the_usual_steps_take_at_most_seven_seconds():
    """M-054"""
    limits = ProcessLimits()
    assert 3 * limits.step_s + 0.5 <= 7


def test_a_grandchild_that_ignores_everything_is_gone_too(script):
    """M-055: its parent leaves at once and in order."""
    server = script('''
child = subprocess.Popen([sys.executable, "-S", "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('{}', flush=True); time.sleep(60)"])
note("pids", child.pid)
''' + ECHO)
    with connected(server.command()) as client:
        call(client, text="x")
    wait_until_gone(server.pids)
    assert len(server.pids) == 2


def test_a_descendant_that_left_the_group_holds_up_nobody(script):
    """M-056: it keeps the pipes open for ever, and is out of our reach."""
    server = script('''
child = subprocess.Popen(["sleep", "5"], start_new_session=True)
note("strays", child.pid)
''' + ECHO)
    began = time.monotonic()
    with connected(server.command()) as client:
        call(client, text="x")
    assert time.monotonic() - began < 4
    for stray in server.lines("strays"):
        os.kill(int(stray), signal.SIGKILL)


def test_closing_while_calls_wait_fails_them_at_once(script):
    """M-056"""
    server = script("for m in calls(): pass")
    with connected(server.command()) as client:
        def close():
            server.wait_for("tools/call")
            client.close()
        error, _ = at_once(lambda: call(client), close)
        assert isinstance(error, Unreachable) and "stopped" in str(error)
        with pytest.raises(Unreachable, match="closed"):
            call(client)
        client.close()


def test_a_transport_that_was_never_used_closes():
    transport = StdioTransport(Command("x", "no-such-command"))
    transport.close()
    transport.close()


# ---- the start

def test_the_child_sees_the_short_list_and_its_own_variables(script, monkeypatch):
    """M-057"""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("TERM", "() { :; }; echo shellshock")
    server = script('for m in calls(): text(m, json.dumps(dict(os.environ)))')
    with connected(server.command(env={"MINE": "1", "LANG": "C"})) as client:
        seen = json.loads(call(client))
    assert "secret" not in seen.values() and "TERM" not in seen
    assert seen["MINE"] == "1" and seen["LANG"] == "C" and seen["PATH"] == os.environ["PATH"]
    assert seen.keys() <= set("HOME LOGNAME PATH SHELL TERM USER LANG LC_ALL LC_CTYPE TMPDIR TZ MINE".split())
    assert environment({}).keys() <= set(os.environ)


def test_arguments_reach_the_child_unchanged(script):
    """M-058"""
    server = script('for m in calls(): text(m, json.dumps(sys.argv[1:]))')
    odd = ["two words", '"quoted"', "it's", "$HOME `id` $(id)", "a\nb", "*", "~", "ü\U0001f600", "", "%PATH%"]
    first, *args = server.argv
    with connected(Command("odd", first, (*args, *odd))) as client:
        assert json.loads(call(client)) == odd


def test_what_cannot_start_gives_one_line_that_names_it(tmp_path):
    """M-058"""
    (tmp_path / "plain.txt").write_text("hello")
    (tmp_path / "odd").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "odd").chmod(0o755)
    cases = [
        (Command("a", "no-such-command"), "a (no-such-command): cannot start: no command 'no-such-command'"),
        (Command("a", "npx", env={"PATH": str(tmp_path)}), "no command 'npx'; install Node.js"),
        (Command("a", "uvx", env={"PATH": ""}), "no command 'uvx'; install uv"),
        (Command("a", str(tmp_path / "plain.txt")), "plain.txt' is not executable"),
        (Command("a", str(tmp_path / "none")), "no command"),
        (Command("a", str(tmp_path)), "no command"),
        (Command("a", str(tmp_path / "odd")), "cannot start"),
        (Command("a", sys.executable, cwd=tmp_path / "gone"), "no folder"),
        (Command("a", sys.executable, ("a\0b",)), "a NUL in it"),
    ]
    for command, said in cases:
        with transport_of(command) as transport, pytest.raises(NotConnected) as caught:
            transport.exchange(jsonrpc.request(1, "initialize"), watch())
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_command_with_a_path_is_looked_for_where_the_process_starts(script, tmp_path):
    script()
    (tmp_path / "run").write_text(f"#!/bin/sh\nexec {sys.executable} -S server.py\n")
    (tmp_path / "run").chmod(0o755)
    with connected(Command("here", "./run", cwd=tmp_path)) as client:
        assert call(client, text="x") == "x"


def test_a_slow_start_that_says_something_is_waited_for(script):
    """The first start by npx downloads; silence is not waited for as long."""
    server = script('''
if not os.path.exists(os.path.join(FOLDER, "silent")):
    for _ in range(12):
        sys.stderr.write("."); sys.stderr.flush()
        time.sleep(0.05)
else:
    time.sleep(0.6)
''' + ECHO)
    with transport_of(server.command()) as transport:
        greeting = jsonrpc.request(1, "initialize")
        assert transport.exchange(greeting, watch(patience_s=0.4))["id"] == 1
        transport.drop()
        (server.folder / "silent").touch()
        with pytest.raises(TimedOut):
            transport.exchange(jsonrpc.request(2, "initialize"), watch(patience_s=0.4))


def test_nothing_but_mcp_errors_comes_out(script):
    """Whatever a server does with its answers."""
    bodies = ['{"jsonrpc":"2.0","id":%d,"method":3}', '{"id":%d,"error":{"code":"x","message":3}}',
              '[[[{"id":%d}]]]', '{"id":%d,"result":{"protocolVersion":[]}}',
              '{"id":%d,"result":{"protocolVersion":"1999-01-01"}}', '{"id":%d,"error":[]}']
    server = script('''
bodies = json.load(open(os.path.join(FOLDER, "bodies")))
for m in messages():
    write((bodies[0] % m["id"] + "\\n").encode()) if "id" in m else None
''')
    for body in bodies:
        (server.folder / "bodies").write_text(json.dumps([body]))
        with transport_of(server.command()) as transport, pytest.raises(McpError):
            from tinychat.mcp.client import Client
            Client(transport, limits=Limits()).connect(watch(0.4))
