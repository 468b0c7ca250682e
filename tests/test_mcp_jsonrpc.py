"""JSON-RPC: the pure layer, and what it comes to in a conversation over HTTP."""
import json
import sys

import pytest
from helpers_mcp import ECHO, McpServer, connected, echo, watch
from hypothesis import given
from hypothesis import strategies as st

from tinychat.mcp import jsonrpc
from tinychat.mcp.era import HANDSHAKE
from tinychat.mcp.errors import McpError, ProtocolError, ServerError


def answer(id, **fields):
    return {"jsonrpc": "2.0", "id": id, **(fields or {"result": {}})}


DONE = {"content": [{"type": "text", "text": "hello"}], "resultType": "complete"}


def answering(*messages):
    """A script that answers with these on an event stream; OURS stands for the request's id."""
    def script(reply):
        reply.stream()
        for message in messages:
            text = json.dumps(message) if not isinstance(message, str) else message
            reply.event(text.replace('"OURS"', str(reply.seen.message["id"])))
    return script


# ---- pure

def test_ids_rise_and_never_come_again():
    """M-001"""
    ids = jsonrpc.Ids()
    assert [ids.next() for _ in range(3)] == [1, 2, 3]


def test_params_are_an_object_even_when_there_are_none():
    """M-001"""
    assert jsonrpc.request(1, "ping")["params"] == {}
    assert jsonrpc.notification("notifications/initialized")["params"] == {}


@pytest.mark.parametrize("id", [2, True, 1.0, "1", None, [1]])
def test_only_the_same_integer_answers_a_request(id):
    """M-003"""
    assert jsonrpc.answers(answer(1), 1)
    assert not jsonrpc.answers(answer(id), 1)


@pytest.mark.parametrize("noise", [1, "text", None, True, {}, {"jsonrpc": "2.0"}, {"id": "x"}, [[]]])
def test_noise_is_no_message(noise):
    assert jsonrpc.members(noise) == []
    assert jsonrpc.members([noise, answer(1)]) == [answer(1)]


@pytest.mark.parametrize("broken", [answer(1, result=None), answer(1, result=[1]), answer(1, result="x"),
                                    {"jsonrpc": "2.0", "id": 1}, answer(1, error="no"),
                                    answer(1, error=7)])
def test_an_answer_without_a_result_object_is_an_error(broken):
    """M-005"""
    assert jsonrpc.answers(broken, 1)
    with pytest.raises(ProtocolError, match="expected an? (result|error) object"):
        jsonrpc.result_of(broken)


@pytest.mark.parametrize("error", [{}, {"code": "x", "message": 3}, {"code": True}, {"message": ""}])
def test_an_error_object_of_any_shape_is_an_error(error):
    with pytest.raises(ServerError) as caught:
        jsonrpc.result_of(answer(1, error=error))
    assert caught.value.rpc_code is None


def test_what_servers_ask_is_answered_politely():
    """M-006, M-007"""
    assert jsonrpc.reply_to({"id": "a", "method": "ping"}) == answer("a")
    for method in ("roots/list", "sampling/createMessage", "elicitation/create", "x"):
        assert jsonrpc.reply_to({"id": 7, "method": method})["error"]["code"] == -32601


HOSTILE = [b"[" * 200_000, b'{"a":' * 200_000, b"9" * 20_000, b"NaN", b"[Infinity]", b"1e999", b"\xff\xfe",
           b"", b"{", b"\x00", b'"\xff', "\ufeff".encode() * 3]


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:12]))
def test_text_that_is_no_json_is_one_clear_error(data):
    """M-008"""
    with pytest.raises(ProtocolError, match="expected JSON"):
        jsonrpc.loads(data)


@pytest.mark.parametrize("data", [rb'"\ud800"', rb'"\udc00\ud83d"', rb'"\uD83D\ud83d\ude00"', b'"\xed\xa0\x80"'])
def test_lone_surrogates_never_get_in(data):
    """M-008"""
    jsonrpc.loads(data).encode()


def test_escapes_that_are_no_surrogates_stay():
    """M-008"""
    for text in ("😀", "\\ud800", "\\\\ud83d", "\ud7ff", "\ue000"):
        assert jsonrpc.loads(json.dumps(text)) == text


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_what_was_read_can_be_written(value):
    """M-008"""
    assert jsonrpc.loads(jsonrpc.dumps(value)) == value


@given(st.binary(max_size=100))
def test_no_bytes_make_another_exception(data):
    """M-008"""
    try:
        jsonrpc.dumps(jsonrpc.loads(data))
    except ProtocolError:
        pass


def test_nesting_that_later_code_could_stumble_over_is_refused():
    """M-008"""
    deep = []
    for _ in range(jsonrpc.MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ProtocolError, match="levels of nesting"):
        jsonrpc.check_depth(deep)
    jsonrpc.check_depth({"a": [{"b": 1}] * 10_000})


def test_a_number_that_json_cannot_say_is_an_error_before_it_is_sent():
    """M-008"""
    deep = []
    for _ in range(sys.getrecursionlimit() * 200):
        deep = [deep]
    for value in (float("nan"), {1, 2}, deep):
        with pytest.raises(ProtocolError, match="cannot be written"):
            jsonrpc.dumps({"a": value})


def test_messages_are_one_short_line():
    """M-010"""
    message = McpError("a\r\nb\x1b[31m\u2028c" + "x" * 9_000).message
    assert len(message) == 2_000 and message.startswith("a b [31m cxx") and message.isprintable()


# ---- over HTTP

def test_every_request_is_a_single_object_with_its_own_integer_id():
    """M-001, M-002"""
    for versions in (HANDSHAKE, ("2026-07-28",)):
        with McpServer(versions=versions) as server, connected(server) as client:
            client.tools(watch())
            echo(client)
        sent = [seen.message for seen in server.seen if seen.body]
        assert all(m["jsonrpc"] == "2.0" and isinstance(m["params"], dict) for m in sent)
        ids = [m["id"] for m in sent if "id" in m]
        assert all(type(id) is int for id in ids) and len(set(ids)) == len(ids)


BATCH = [{"jsonrpc": "2.0", "method": "notifications/message", "params": {}}, 7, None,
         answer("OURS", result=DONE)]


def test_the_answer_is_found_in_a_batch_on_a_stream():
    """M-002"""
    with McpServer(on={"tools/call": answering(BATCH)}) as server, connected(server) as client:
        assert echo(client) == "hello"


def test_the_answer_is_found_in_a_batch_in_a_body():
    """M-002"""
    def batch(reply):
        reply.json([*BATCH[:-1], answer(reply.seen.message["id"], result=DONE)])
    with McpServer(on={"tools/call": batch}) as server, connected(server) as client:
        assert echo(client) == "hello"


WRONG = {"content": [{"type": "text", "text": "wrong"}]}


def test_answers_to_nobody_are_passed_over():
    """M-003"""
    others = [answer(id, result=WRONG) for id in (999, True, 3.0, None, "3")]
    script = answering(*others, answer("OURS", result=DONE))
    with McpServer(on={"tools/call": script}) as server, connected(server) as client:
        assert echo(client) == "hello"


@pytest.mark.parametrize("id", [999, True, 3.0, None])
def test_a_body_with_an_answer_to_nobody_is_an_error(id):
    """M-003"""
    with McpServer(on={"tools/call": lambda reply: reply.json(answer(id, result=WRONG))}) as server:
        with connected(server) as client, pytest.raises(ProtocolError, match="expected the answer"):
            echo(client)


def test_an_error_that_names_no_request_is_that_of_the_request():
    """M-004"""
    script = {"tools/call": lambda reply: reply.json(
        answer(None, error={"code": -32600, "message": "bad\nday", "data": [1]}))}
    with McpServer(on=script) as server, connected(server) as client:
        with pytest.raises(ServerError, match="^bad day$") as caught:
            echo(client)
    assert (caught.value.rpc_code, caught.value.data) == (-32600, [1])


@pytest.mark.parametrize("fields", [{"result": None}, {"result": []}, {"x": 1}])
@pytest.mark.parametrize("kind", ["stream", "body"])
def test_a_reply_without_a_result_fails_the_call_at_once(fields, kind):
    """M-005"""
    def script(reply):
        broken = answer(reply.seen.message["id"], **fields)
        if kind == "body":
            return reply.json(broken)
        reply.stream()
        reply.event(broken)
        reply.hang()
    with McpServer(on={"tools/call": script}) as server, connected(server) as client:
        with pytest.raises(ProtocolError, match="result object"):
            echo(client)


def test_requests_of_the_server_are_answered_while_the_stream_stays_open():
    """M-006, M-007"""
    asked = ["ping", "roots/list", "sampling/createMessage", "elicitation/create", "made/up"]

    def script(reply):
        reply.stream()
        for i, method in enumerate(asked):
            reply.event({"jsonrpc": "2.0", "id": f"q{i}", "method": method, "params": {}})
            reply.server.wait_for("", i + 1)
        reply.event(answer(reply.seen.message["id"], result=DONE))

    with McpServer(versions=HANDSHAKE, on={"tools/call": script}) as server, connected(server) as client:
        assert echo(client) == "hello"
    replies = [seen.message for seen in server.of("")]
    assert replies[0] == answer("q0")
    assert [reply["error"]["code"] for reply in replies[1:]] == [-32601] * 4
    assert [reply["id"] for reply in replies] == [f"q{i}" for i in range(5)]


def test_a_reply_that_cannot_be_delivered_is_let_go():
    """M-006"""
    script = answering({"jsonrpc": "2.0", "id": 1, "method": "ping"}, answer("OURS", result=DONE))
    on = {"tools/call": script, "": lambda reply: reply.status(500)}
    with McpServer(versions=HANDSHAKE, on=on) as server, connected(server) as client:
        assert echo(client) == "hello"


def test_requests_of_a_stateless_server_are_passed_over():
    script = answering({"jsonrpc": "2.0", "id": 1, "method": "ping"}, answer("OURS", result=DONE))
    with McpServer(on={"tools/call": script}) as server, connected(server) as client:
        assert echo(client) == "hello"
    assert server.of("") == []


def test_unknown_notifications_and_progress_change_nothing():
    """M-009"""
    others = [{"jsonrpc": "2.0", "method": "notifications/progress", "params": params}
              for params in ({"progressToken": 999, "progress": 1}, {"progressToken": True}, {}, [], None)]
    others += [{"jsonrpc": "2.0", "method": method} for method in ("notifications/x", "", "\x00")]
    others += [{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "OURS"}}]
    script = answering(*others, answer("OURS", result=DONE))
    with McpServer(on={"tools/call": script}) as server, connected(server) as client:
        assert echo(client) == "hello"


@pytest.mark.parametrize("data", HOSTILE[:8], ids=lambda data: repr(data[:12]))
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_hostile_json_fails_the_call_alone(data, kind):
    """M-008"""
    body = data if kind == "application/json" else b"data: " + data + b"\n\n"
    on = {"tools/call": [lambda reply: reply.status(200, body, kind)]}
    with McpServer(on=on) as server, connected(server) as client:
        with pytest.raises(McpError):
            echo(client)
        assert echo(client) == "hello"


def test_lone_surrogates_in_names_and_results_do_no_harm():
    """M-008"""
    tool = {**ECHO, "name": "\ud800", "description": "\udfff"}
    with McpServer(tools=[tool]) as server, connected(server) as client:
        assert [t.name for t in client.tools(watch())] == ["\ufffd"]
        result = client.call("\ufffd", {"text": "\ud83d"}, watch())
    assert result.content[0]["text"] == "\ufffd"


def test_long_words_of_a_server_are_cut():
    """M-010"""
    on = {"tools/call": lambda reply: reply.error(-32000, "line\n" * 5_000)}
    with McpServer(on=on) as server, connected(server) as client:
        with pytest.raises(ServerError) as caught:
            echo(client)
    assert len(caught.value.message) <= 2_000 and "\n" not in caught.value.message
