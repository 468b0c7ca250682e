"""Sessions, streams that break and go on, calls that are given up, and rounds of input_required."""
import threading
import time

import pytest
from helpers_mcp import McpServer, connect, connected, echo, frame, quick, wait_until, watch
from helpers_mcp_stdio import at_once

from tinychat.mcp.era import HANDSHAKE
from tinychat.mcp.errors import (
    CalledOff, McpError, ProtocolError, ServerError, SessionLost, TimedOut, Unreachable)

DONE = {"content": [{"type": "text", "text": "hello"}]}


def done(reply, id=None):
    """The answer as an event. id: of the request, where it is not the one that is answered."""
    reply.event({"jsonrpc": "2.0", "id": id or reply.seen.message["id"], "result": DONE})


def progress(reply, token):
    reply.event({"jsonrpc": "2.0", "method": "notifications/progress",
                 "params": {"progressToken": token, "progress": 1}})


def old(**options):
    return McpServer(versions=HANDSHAKE, **options)


# ---- sessions

def test_the_session_goes_out_with_every_request_after_initialize():
    """M-027, M-029"""
    with old(sessions=True) as server:
        with connected(server) as client:
            client.tools(watch())
            echo(client)
        assert all("mcp-session-id" not in seen.headers for seen in server.seen[:2])
        assert {seen.headers["mcp-session-id"] for seen in server.seen[2:]} == {"session-1-secret"}
        assert server.rpcs()[-2:] == ["tools/call", "DELETE"]


@pytest.mark.parametrize("session", ["with blank", "x" * 1025, "a\tb", "ü", "\x7f"])
def test_a_session_id_of_other_letters_ends_the_connection(session):
    """M-027"""
    def script(reply):
        reply.result({"protocolVersion": HANDSHAKE[-1], "capabilities": {}}, Mcp_Session_Id=session)
    with old(on={"initialize": script}) as server, pytest.raises(ProtocolError, match="session id") as caught:
        connect(server)
    assert session not in caught.value.message and server.rpcs()[-1] == "initialize"


def test_a_lost_session_is_replaced_and_the_call_repeated_once():
    """M-028"""
    with old(sessions=True) as server, connected(server) as client:
        client.tools(watch())
        server.session_ids[:] = []  # as after a restart
        assert echo(client) == "hello"
        assert server.rpcs()[-4:] == ["tools/call", "initialize", "notifications/initialized", "tools/call"]
        assert "mcp-session-id" not in server.of("initialize")[-1].headers
        first, second = server.of("tools/call")
        assert first.message["params"]["arguments"] == second.message["params"]["arguments"]
        assert first.message["id"] != second.message["id"]
        n = len(server.seen)
        client.tools(watch())  # another process may have other tools
        assert server.rpcs()[n:] == ["tools/list"]


@pytest.mark.parametrize("n_failed", [0, 1])
def test_a_session_that_many_miss_at_once_is_replaced_once(n_failed):
    """M-028"""
    def gone(reply):
        reply.server.wait_for("tools/call", 8)  # all find out at once
        reply.status(404)
    with old(sessions=True) as server, connected(server) as client:
        server.on["tools/call"] = [gone] * 8
        server.on["initialize"] = [lambda reply: reply.status(500)] * n_failed
        said = at_once(*[lambda i=i: echo(client, str(i)) for i in range(8)])
        assert sum(isinstance(one, ServerError) for one in said) == n_failed, "only who tried it"
        assert sum(one == str(i) for i, one in enumerate(said)) == 8 - n_failed
        assert len(server.of("initialize")) == 2 + n_failed
        assert len(server.of("notifications/initialized")) == 2


def test_a_request_waits_for_a_greeting_that_is_under_way():
    """M-015 M-028"""
    begun, go_on = threading.Event(), threading.Event()

    def late(reply):
        begun.set()
        go_on.wait(10)
        reply.server.usual(reply)

    def early():
        begun.wait(10)
        threading.Timer(0.2, go_on.set).start()
        return echo(client, "early")
    with old(sessions=True) as server, connected(server) as client:
        server.session_ids[:] = []
        server.on["initialize"] = late
        assert at_once(lambda: echo(client, "first"), early) == ["first", "early"]
        n = server.rpcs().index("initialize", 4)
        assert server.rpcs()[n + 1] == "notifications/initialized"


def unknown_session(reply):
    """How many servers say it instead of 404."""
    reply.error(-32000, "Bad Request: No valid session ID provided", status=400)


def test_a_session_that_a_400_calls_unknown_is_replaced_by_the_next_request():
    """M-023 M-028"""
    with old(sessions=True, on={"tools/call": [unknown_session]}) as server, connected(server) as client:
        client.tools(watch())
        with pytest.raises(ServerError, match="No valid session ID") as caught:
            echo(client)
        assert (caught.value.rpc_code, caught.value.http_status) == (-32000, 400)
        assert len(server.of("tools/call")) == len(server.of("initialize")) == 1, "it is not repeated"
        n = len(server.seen)
        assert echo(client) == "hello" == echo(client)
    assert server.rpcs()[n:] == ["initialize", "notifications/initialized", "tools/call", "tools/call", "DELETE"]
    assert {seen.headers["mcp-session-id"] for seen in server.seen[n + 1:]} == {"session-2-secret"}


def test_a_400_for_another_reason_leaves_the_session():
    """M-023"""
    with old(sessions=True, on={"tools/call": [lambda reply: reply.error(-32602, "bad", status=400)]}
             ) as server, connected(server) as client:
        with pytest.raises(ServerError, match="bad"):
            echo(client)
        assert echo(client) == "hello"
    assert len(server.of("initialize")) == 1


def test_tools_are_listed_again_when_the_server_was_gone_in_between():
    """M-068"""
    with old(on={"tools/call": [lambda reply: reply.stream()]}) as server, connected(server) as client:
        client.tools(watch())
        with pytest.raises(Unreachable):
            echo(client)
        client.tools(watch())
        client.tools(watch())
    assert len(server.of("tools/list")) == 2


def test_a_session_that_is_lost_again_at_once_is_an_error():
    """M-028"""
    with old(sessions=True, on={"tools/call": lambda reply: reply.status(404)}) as server:
        with connected(server) as client, pytest.raises(SessionLost, match="forgotten our session"):
            echo(client)
    assert len(server.of("tools/call")) == 2 and len(server.of("initialize")) == 2


@pytest.mark.parametrize("status", [400, 404])
def test_other_refusals_are_no_lost_session(status):
    """M-028"""
    with old(sessions=status == 400, on={"tools/call": lambda reply: reply.status(status, "no session")}) as server:
        with connected(server) as client, pytest.raises(ServerError, match="no session"):
            echo(client)
    assert len(server.of("tools/call")) == 1


@pytest.mark.parametrize("goodbye", [lambda reply: reply.status(405), lambda reply: reply.hang(),
                                     lambda reply: None])
def test_a_session_that_cannot_be_ended_delays_nobody(goodbye):
    """M-029"""
    with old(sessions=True, on={"DELETE": goodbye}) as server:
        client = connect(server, limits=quick(goodbye_s=0.3))
        start = time.monotonic()
        client.close()
        client.close()
        assert time.monotonic() - start < 1
    assert len(server.of("DELETE")) == 1


# ---- streams that go on

def test_a_stream_that_is_cut_goes_on_where_it_stopped():
    """M-030"""
    def call(reply):
        reply.stream()
        reply.event(id="e/1", retry=150)

    def get(reply):
        reply.stream()
        done(reply, reply.server.of("tools/call")[0].message["id"])

    with old(sessions=True, on={"tools/call": call, "GET": get}) as server, connected(server) as client:
        assert echo(client) == "hello"
    get, post = server.of("GET")[0], server.of("tools/call")[0]
    assert get.headers["last-event-id"] == "e/1" and get.headers["accept"] == "text/event-stream"
    assert get.headers["mcp-session-id"] == "session-1-secret"
    assert get.headers["mcp-protocol-version"] == "2025-11-25"
    assert get.at - post.at >= 0.15


def test_what_came_before_the_cut_counts_and_a_broken_chunk_is_a_cut():
    """M-030"""
    def call(reply):
        reply.stream(Transfer_Encoding="chunked")
        event = b'id: 7\ndata: {"jsonrpc":"2.0","method":"notifications/message"}\n\n'
        reply.write(b"%x\r\n%s\r\n" % (len(event), event) + b"ffff\r\ndata: cut o")

    def get(reply):
        reply.stream()
        done(reply, reply.server.of("tools/call")[0].message["id"])

    with old(on={"tools/call": call, "GET": get}) as server, connected(server) as client:
        assert echo(client) == "hello"
    assert [seen.headers["last-event-id"] for seen in server.of("GET")] == ["7"]


def test_an_initialize_may_go_on_too():
    """M-030"""
    def init(reply):
        reply.stream(Mcp_Session_Id="s1")
        reply.event(id="1")

    def get(reply):
        reply.stream()
        reply.event({"jsonrpc": "2.0", "id": reply.server.of("initialize")[0].message["id"], "result": {
            "protocolVersion": HANDSHAKE[-1], "capabilities": {}}})

    with old(on={"initialize": init, "GET": get}) as server, connected(server):
        assert server.of("GET")[0].headers["mcp-session-id"] == "s1"


@pytest.mark.parametrize("versions", [HANDSHAKE, ("2026-07-28",)])
def test_a_stream_without_an_id_that_ends_is_an_error_and_nothing_is_sent_again(versions):
    """M-031, M-032"""
    def call(reply):
        reply.stream()
        reply.event({"jsonrpc": "2.0", "method": "notifications/message"})
    with McpServer(versions=versions, on={"tools/call": call}) as server, connected(server) as client:
        with pytest.raises(Unreachable, match="stream ended without an answer"):
            echo(client)
    assert len(server.of("tools/call")) == 1 and server.of("GET") == []


def test_the_stateless_era_resumes_nothing():
    """M-032"""
    def call(reply):
        reply.stream()
        reply.event(id="1")
    with McpServer(on={"tools/call": call}) as server, connected(server) as client:
        with pytest.raises(Unreachable):
            echo(client)
    assert server.of("GET") == []


def test_a_server_that_closes_every_stream_sees_three_gets():
    """M-032"""
    def call(reply):
        reply.stream()
        reply.event(id="1")
    with old(on={"tools/call": call, "GET": call}) as server, connected(server) as client:
        with pytest.raises(Unreachable, match="3 times more"):
            echo(client)
    assert len(server.of("GET")) == 3 and len(server.of("tools/call")) == 1


def test_messages_in_between_allow_more_resumptions():
    """M-030"""
    def call(reply):
        reply.stream()
        reply.event({"jsonrpc": "2.0", "method": "notifications/message"}, id=str(len(reply.server.seen)))
        if len(reply.server.of("GET")) == 6:
            done(reply, reply.server.of("tools/call")[0].message["id"])
    with old(on={"tools/call": call, "GET": call}) as server, connected(server) as client:
        assert echo(client) == "hello"


@pytest.mark.parametrize("id", ["\x01", "€", "x" * 5_000])
def test_an_id_that_no_header_can_hold_is_none(id):
    """M-032"""
    def call(reply):
        reply.stream()
        reply.event(id=id)
    with old(on={"tools/call": call}) as server, connected(server) as client:
        with pytest.raises(Unreachable):
            echo(client)
    assert server.of("GET") == []


@pytest.mark.parametrize("status", [404, 405, 500])
def test_a_resumption_that_is_refused_is_reported_and_the_call_not_repeated(status):
    """M-031"""
    def call(reply):
        reply.stream()
        reply.event(id="1")
    on = {"tools/call": call, "GET": lambda reply: reply.status(status)}
    with old(sessions=True, on=on) as server, connected(server) as client:
        with pytest.raises(ServerError, match=str(status)):
            echo(client)
    assert len(server.of("tools/call")) == 1 and len(server.of("GET")) == 1


def test_a_long_retry_ends_with_the_call():
    """M-030, M-077"""
    def call(reply):
        reply.stream()
        reply.event(id="1", retry=999_999_999)
    with old(on={"tools/call": call}) as server, connected(server) as client:
        start = time.monotonic()
        with pytest.raises(TimedOut):
            echo(client, seconds=0.3)
        assert time.monotonic() - start < 1


# ---- event streams

def test_everything_but_messages_and_after_the_answer_is_skipped():
    """M-041"""
    def call(reply):
        reply.stream()
        reply.event("not json", event="other")
        reply.event("/x", event="endpoint")
        reply.write(b": comment\n\ndata:\n\nevent: message\n\nnonsense\nretry: soon\n\n")
        answer = {"jsonrpc": "2.0", "id": reply.seen.message["id"], "result": DONE}
        reply.write(frame(answer) + frame("not json"))
        reply.hang()
    with McpServer(on={"tools/call": call}) as server, connected(server) as client:
        assert echo(client) == "hello"
        wait_until(lambda: server.gone, "the connection to be closed")


def test_a_message_that_is_no_json_is_an_error_of_that_call():
    """M-041"""
    def call(reply):
        reply.stream()
        reply.event("not json")
        reply.hang()
    with McpServer(on={"tools/call": [call]}) as server, connected(server) as client:
        with pytest.raises(ProtocolError, match="expected JSON"):
            echo(client)
        assert echo(client) == "hello"


# ---- giving up

def test_a_stateless_call_given_up_closes_its_connection():
    """M-035"""
    with McpServer(on={"tools/call": lambda reply: reply.hang()}) as server, connected(server) as client:
        with pytest.raises(TimedOut, match="took too long"):
            echo(client, seconds=0.2)
        wait_until(lambda: server.gone, "the connection to be closed")
    assert server.of("notifications/cancelled") == []


@pytest.mark.parametrize("streams", [True, False])
def test_a_call_of_the_handshake_era_given_up_is_cancelled_by_its_id(streams):
    """M-035"""
    def call(reply):
        if streams:
            reply.stream()
        reply.hang()
    with old(sessions=True, on={"tools/call": [call]}) as server, connected(server) as client:
        with pytest.raises(TimedOut):
            echo(client, seconds=0.2)
        cancelled = server.wait_for("notifications/cancelled")[0]
        assert cancelled.message["params"]["requestId"] == server.of("tools/call")[0].message["id"]
        assert cancelled.headers["mcp-session-id"] == "session-1-secret"
        wait_until(lambda: server.gone, "the connection to be closed")
        assert echo(client) == "hello"


def test_an_initialize_given_up_is_not_cancelled():
    """M-035"""
    with old(on={"initialize": lambda reply: reply.hang()}) as server:
        with pytest.raises(TimedOut):
            connect(server, limits=quick(initialize_s=0.2))
        wait_until(lambda: server.gone, "the connection to be closed")
    assert server.rpcs() == ["server/discover", "initialize"]


@pytest.mark.parametrize("versions", [HANDSHAKE, ("2026-07-28",)])
def test_a_call_is_called_off_within_half_a_second(versions):
    """M-081"""
    called_off = threading.Event()
    on = {"tools/call": lambda reply: reply.hang(), "notifications/cancelled": lambda reply: reply.hang()}
    with McpServer(versions=versions, on=on) as server, connected(server, limits=quick(goodbye_s=0.2)) as client:
        failed = []

        def call():
            with pytest.raises(CalledOff):
                client.call("echo", {}, watch(called_off=called_off))
            failed.append(time.monotonic())

        thread = threading.Thread(target=call)
        thread.start()
        server.wait_for("tools/call")
        start = time.monotonic()
        called_off.set()
        thread.join(10)
        assert failed[0] - start < 0.5
        wait_until(lambda: server.gone, "the connection to be closed")


def test_connecting_is_called_off_too():
    """M-081"""
    called_off = threading.Event()
    with McpServer(on={"server/discover": lambda reply: called_off.set() or reply.hang()}) as server:
        with pytest.raises(CalledOff):
            connect(server, called_off=called_off)
    assert server.rpcs() == ["server/discover"]


# ---- time

@pytest.mark.parametrize("versions", [HANDSHAKE, ("2026-07-28",)])
def test_progress_keeps_a_call_alive_but_not_beyond_its_total(versions):
    """M-078"""
    def call(reply, n=None):
        reply.stream()
        token = reply.seen.message["params"]["_meta"]["progressToken"]
        assert token == reply.seen.message["id"]
        for _ in range(n or 10_000):
            progress(reply, token)
            if reply.server.closing.wait(0.1):
                return
        done(reply)
    on = {"tools/call": [lambda reply: call(reply, 8), call]}
    with McpServer(versions=versions, on=on) as server, connected(server) as client:
        assert client.call("echo", {}, watch(20, patience_s=0.4)).content == DONE["content"]
        start = time.monotonic()
        with pytest.raises(TimedOut):
            client.call("echo", {}, watch(0.8, patience_s=0.4))
        assert 0.7 < time.monotonic() - start < 1.8


@pytest.mark.parametrize("sign", [lambda reply: reply.write(b": alive\n\n"),
                                  lambda reply: progress(reply, 999), lambda reply: progress(reply, True)])
def test_comments_and_the_progress_of_others_are_no_signs_of_life(sign):
    """M-077, M-078"""
    def call(reply):
        reply.stream()
        while not reply.server.closing.wait(0.05):
            sign(reply)
    with McpServer(on={"tools/call": call}) as server, connected(server) as client:
        start = time.monotonic()
        with pytest.raises(TimedOut):
            client.call("echo", {}, watch(20, patience_s=0.3))
        assert time.monotonic() - start < 1.3


# ---- input_required

def asks(**result):
    return lambda reply: reply.result({"resultType": "input_required", **result})


def test_a_call_that_wants_input_fails_with_what_was_asked():
    """M-075"""
    asked = {"a": {"method": "elicitation/create", "params": {}}, "b": {"method": "sampling/createMessage"}}
    for requests, words in ((asked, "elicitation/create, sampling/createMessage"), (["x"], "not know")):
        on = {"tools/call": asks(inputRequests=requests, requestState="s")}
        with McpServer(on=on) as server, connected(server) as client:
            with pytest.raises(ProtocolError, match=words):
                echo(client)
        assert len(server.of("tools/call")) == 1


def test_a_call_with_state_alone_is_repeated_with_that_state():
    """M-075"""
    states = ["ä\u2028 \"state\"", "", "x" * 10_000]
    with McpServer(on={"tools/call": [asks(requestState=state) for state in states]}) as server:
        with connected(server) as client:
            assert echo(client) == "hello"
            assert echo(client) == "hello"  # state belongs to one call only
    sent = [seen.message for seen in server.of("tools/call")]
    assert [m["params"].get("requestState") for m in sent] == [None, *states, None]
    assert len({m["id"] for m in sent}) == 5
    assert all(m["params"]["arguments"] == {"text": "hello"} for m in sent)


def test_rounds_without_end_are_an_error():
    """M-075"""
    with McpServer(on={"tools/call": asks(requestState="s")}) as server, connected(server) as client:
        with pytest.raises(ProtocolError, match="after 10 rounds"):
            echo(client)
    assert len(server.of("tools/call")) == 10


@pytest.mark.parametrize("kind", ["partial", "task", None, 7])
def test_a_result_of_an_unknown_type_fails_the_call(kind):
    """M-076"""
    on = {"tools/call": lambda reply: reply.result({"resultType": kind, "content": []}),
          "tools/list": lambda reply: reply.result({"resultType": kind, "tools": []})}
    with McpServer(on=on) as server, connected(server) as client:
        for work in (lambda: echo(client), lambda: client.tools(watch())):
            with pytest.raises(ProtocolError, match="expected a complete result"):
                work()


@pytest.mark.parametrize("result, expected", [
    ({}, ([], None, False)), ({"content": None, "isError": "yes"}, ([], None, False)),
    ({"content": [1, None, {"type": "x"}], "isError": True}, ([1, None, {"type": "x"}], None, True)),
    ({"structuredContent": {"a": 1}}, ([], {"a": 1}, False)), ({"structuredContent": [1]}, ([], [1], False))])
def test_results_of_any_shape_come_as_they_are(result, expected):
    with McpServer(on={"tools/call": lambda reply: reply.result(result)}) as server, connected(server) as client:
        found = client.call("echo", {}, watch())
    assert (found.content, found.structured, found.is_error) == expected


@pytest.mark.parametrize("content", ["text", 5, {"type": "text"}, True])
def test_content_that_is_no_list_is_an_error(content):
    on = {"tools/call": lambda reply: reply.result({"content": content})}
    with McpServer(on=on) as server, connected(server) as client:
        with pytest.raises(McpError, match="expected a list as content"):
            echo(client)
