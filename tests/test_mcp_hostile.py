"""Servers that mean harm or do it: whatever they send, one clear error comes of it, in time and in memory."""
import itertools
import socket
import time
import tracemalloc

import pytest
from helpers_mcp import McpServer, connect, connected, echo, quick, raw_server, read_request, watch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinychat.mcp.client import Client
from tinychat.mcp.era import HANDSHAKE, Memory
from tinychat.mcp.errors import McpError, ProtocolError, TimedOut
from tinychat.mcp.limits import Limits

OK = b"HTTP/1.1 200 OK\r\n"
EVENTS = OK + b"Content-Type: text/event-stream\r\n\r\n"
JSON = OK + b"Content-Type: application/json\r\n"
DEADLINE_S = 0.6


def saying(*pieces, endlessly=b"", pause_s=0.0):
    """A server that answers every request with these bytes, whatever it was."""
    def serve(connection, closing):
        read_request(connection)
        for piece in pieces:
            connection.sendall(piece)
        while endlessly and not closing.is_set():
            connection.sendall(endlessly)
            if pause_s and closing.wait(pause_s):
                break
    return serve


def silent(connection, closing):
    read_request(connection)
    closing.wait(20)


def call(url, seconds=DEADLINE_S, limits=None):
    """One handshake with a server, as a client of the stateless era that trusts nothing."""
    with connected(url, mode="modern", limits=limits or quick(initialize_s=seconds)):
        pass


# ---- time

@pytest.mark.parametrize("serve", [
    silent,
    lambda connection, closing: closing.wait(20),  # does not even read
    saying(endlessly=b"H", pause_s=0.05),
    saying(OK, endlessly=b"X: y\r\n", pause_s=0.05),
    saying(JSON, b"Content-Length: 100000\r\n\r\n", endlessly=b" ", pause_s=0.05),
    saying(JSON, b"Transfer-Encoding: chunked\r\n\r\n", endlessly=b"1\r\n \r\n", pause_s=0.05),
    saying(JSON, b"Transfer-Encoding: chunked\r\n\r\n", endlessly=b"0", pause_s=0.05),
    saying(endlessly=b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.01),
    saying(EVENTS, endlessly=b": alive\n\n", pause_s=0.01),
    saying(EVENTS, endlessly=b"\n", pause_s=0.01),
    saying(b"HTTP/1.1 500 No\r\nContent-Length: 60000\r\n\r\n", endlessly=b"x", pause_s=0.05),
], ids=["silence", "deaf", "a status by letters", "headers by lines", "a body by letters", "chunks by letters",
        "a chunk size by letters", "100 Continue", "comments", "blank lines", "an error by letters"])
def test_what_never_comes_ends_at_the_deadline(serve):
    """M-077"""
    with raw_server(serve) as url:
        start = time.monotonic()
        with pytest.raises(McpError):
            call(url)
        assert DEADLINE_S - 0.1 < time.monotonic() - start < DEADLINE_S + 1


def test_a_status_is_told_though_its_body_never_ends():
    """M-077"""
    with raw_server(saying(b"HTTP/1.1 401 No\r\n\r\n", endlessly=b"x", pause_s=0.05)) as url:
        with pytest.raises(McpError, match="HTTP 401.*credentials"):
            call(url)


def test_all_of_connecting_is_bounded():
    """M-077"""
    with raw_server(silent) as url:
        start = time.monotonic()
        with pytest.raises(TimedOut, match="initialize|connecting to"):
            connect(url, connect_s=1.0)
        assert time.monotonic() - start < 2


def test_a_call_ends_at_its_deadline_when_only_the_answer_is_missing():
    """M-077"""
    with McpServer(on={"tools/call": lambda reply: reply.hang()}) as server, connected(server) as client:
        start = time.monotonic()
        with pytest.raises(TimedOut):
            echo(client, seconds=0.5)
        assert 0.4 < time.monotonic() - start < 1.5


def test_a_server_that_fills_no_backlog_is_not_waited_for():
    """M-077"""
    with socket.socket() as listener:  # listens, but nobody accepts
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        crowd = [socket.socket() for _ in range(4)]
        for one in crowd:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        start = time.monotonic()
        with pytest.raises(McpError):
            connect(f"http://127.0.0.1:{port}/", limits=quick(connect_s=0.3, initialize_s=0.5), connect_s=1.0)
        assert time.monotonic() - start < 2
        for one in crowd:
            one.close()


# ---- size

BIG = b"x" * (1 << 20)


@pytest.mark.parametrize("serve", [
    saying(JSON, b"\r\n", endlessly=BIG),
    saying(JSON, b"Content-Length: 8589934592\r\n\r\n", endlessly=BIG),
    saying(JSON, b"Transfer-Encoding: chunked\r\n\r\n", endlessly=b"100000\r\n" + BIG + b"\r\n"),
    saying(JSON, b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n", endlessly=BIG),
    saying(JSON, b"Transfer-Encoding: chunked\r\n\r\n", b"1", endlessly=b"0" * 1000),
    saying(EVENTS, b"data: ", endlessly=BIG),
    saying(EVENTS, endlessly=b"data: " + BIG + b"\n"),
    saying(EVENTS, endlessly=b"x" * 999 + b"\n"),
    saying(EVENTS, endlessly=b": " + b"x" * 999 + b"\n"),
    saying(EVENTS, endlessly=b"event: other\ndata: " + BIG + b"\n\n"),
    saying(EVENTS, endlessly=b'data: {"method":"x"}\n\n' * 1000),
    saying(EVENTS, endlessly=b"data: [" + b'{"method":"x"},' * 50_000 + b"1]\n\n"),
    saying(OK + b"Content-Encoding: gzip\r\nContent-Type: application/json\r\n\r\n", endlessly=b"\0" * 9999),
    saying(OK, endlessly=b"X: " + b"y" * 60_000 + b"\r\n"),
    saying(endlessly=b"HTTP/1.1 100 Continue\r\n" + b"X: y\r\n" * 50 + b"\r\n"),
    saying(endlessly=BIG),
], ids=["a body", "8 GiB", "chunks", "one chunk", "a chunk size", "a line", "an event", "lines", "comments",
        "other events", "notifications", "batches", "gzip", "headers", "100 Continue", "no HTTP"])
def test_what_never_ends_ends_at_the_limit_with_little_memory(serve):
    """M-079, M-042"""
    with raw_server(serve) as url:
        tracemalloc.start()
        try:
            with pytest.raises(McpError) as caught:
                call(url, seconds=25)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert not isinstance(caught.value, TimedOut) and peak < 100 << 20


def test_a_list_of_endless_pages_ends_in_time_and_with_little_memory():
    """M-079, M-060"""
    def page(reply):
        n = len(reply.server.seen)
        tools = [{"name": f"t{n}-{i}", "inputSchema": {"type": "object", "x": "y" * 60_000}} for i in range(50)]
        reply.result({"tools": tools, "nextCursor": str(n)})
    with McpServer(on={"tools/list": page}) as server, connected(server, limits=quick(list_s=30)) as client:
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError, match="more than 50 pages"):
                client.tools(watch(60))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 100 << 20


def test_an_answer_of_nearly_8_mib_is_taken():
    """M-079"""
    text = "y" * (8 * (1 << 20) - 1_000)
    for streams in (False, True):
        with McpServer(streams=streams) as server, connected(server) as client:
            assert echo(client, text, seconds=20) == text


@pytest.mark.parametrize("n, ok", [(9_000, True), (300_000, False)])
def test_a_flood_of_notifications_ends_in_the_answer_or_an_error(n, ok):
    """M-080"""
    def flood(reply):
        reply.stream()
        event = b'data: {"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info"}}\n\n'
        for _ in range(n // 100):
            reply.write(event * 100)
        reply.event({"jsonrpc": "2.0", "id": reply.seen.message["id"], "result": {
            "content": [{"type": "text", "text": "hello"}]}})
    with McpServer(on={"tools/call": flood}) as server, connected(server) as client:
        if ok:
            assert echo(client, seconds=25) == "hello"
            return
        with pytest.raises(ProtocolError, match="too many messages"):
            echo(client, seconds=25)


# ---- no HTTP, or nearly

@pytest.mark.parametrize("serve", [
    lambda connection, closing: None,
    saying(),
    saying(b"220 mail.example ESMTP\r\n"),
    saying(b"SSH-2.0-x\r\n"),
    saying(b"\x16\x03\x01\x00\x00"),
    saying(b"HTTP/1.1 abc OK\r\n\r\n"), saying(b"HTTP/9.9 200 OK\r\n\r\n"), saying(b"HTTP/1.1 99999 OK\r\n\r\n"),
    saying(OK, b"X: y\r\n" * 3_000, b"\r\n"),
    saying(OK, b"X: " + b"y" * (1 << 20) + b"\r\n\r\n"),
    saying(OK, b"no colon\r\n\r\n"), saying(OK, b": x\r\n \r\n\t\r\n\r\n"),
    saying(JSON, b"Content-Length: 100\r\n\r\n{}"),
    saying(JSON, b"Content-Length: -5\r\n\r\n{}"), saying(JSON, b"Content-Length: x\r\n\r\n{}"),
    saying(JSON, b"Content-Length: " + b"9" * 5_000 + b"\r\n\r\n{}"),
    saying(JSON, b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
    saying(JSON, b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}\r\n0\r\n\r\n"),
    saying(JSON, b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}"),
    saying(JSON, b"Transfer-Encoding: gzip\r\n\r\nxx"),
    saying(OK, b"Content-Type: \xff\xfe\x00\r\n\r\n"), saying(b"HTTP/1.1 101 Switching\r\n\r\n"),
    saying(b"HTTP/1.1 103 Early\r\n\r\n"), saying(b"HTTP/1.0 200\r\n\r\n"),
    saying(b"HTTP/1.1 307 R\r\nLocation: \xff\xfe//\x01\r\n\r\n"),
    saying(b"HTTP/1.1 500 \xff\x00\r\nRetry-After: \x01\r\n\r\n\xff"),
    saying(JSON, b"Mcp-Session-Id: a\x01\r\n\r\n[]"),
], ids=itertools.count())
def test_a_server_that_hardly_speaks_http_is_one_clear_error(serve):
    """M-082"""
    with raw_server(serve) as url:
        for mode in ("auto", "legacy", "modern"):
            with pytest.raises(McpError) as caught:
                connect(url, mode=mode)
            message = caught.value.message
            assert "/mcp" in message and message.isprintable() and len(message) < 500


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from([
    OK, EVENTS, JSON, b"HTTP/1.1 404 No\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n",
    b"data: ", b'{"jsonrpc":"2.0","id":1,"result":', b"{}", b"}", b"\n\n", b"id: 1\n", b"[", b"]", b"null", b"2\r\n",
    b"0\r\n\r\n", b'"error":', b'{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}', b"\xff", b"\0",
    b"Mcp-Session-Id: x\r\n", b"Location: /\r\n", b"HTTP/1.1 307 x\r\n"]) | st.binary(max_size=20), max_size=12))
def test_nothing_but_our_errors_comes_of_any_bytes(pieces):
    """M-082, M-008"""
    data = b"".join(pieces)

    def serve(connection, closing):
        read_request(connection)
        connection.sendall(data)
    with raw_server(serve) as url:
        try:
            client: Client = connect(url, limits=quick(retry_ms=1, connect_s=0.5), connect_s=3.0, memory=Memory())
        except McpError:
            return
        try:
            client.tools(watch(2))
        except McpError:
            pass
        client.close()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
                        "tools", "name", "inputSchema", "type", "properties", "x-mcp-header", "content", "isError",
                        "nextCursor", "ttlMs", "resultType", "capabilities", "supportedVersions", "requestState",
                        "protocolVersion", "inputRequests", "execution", "structuredContent"]), inner, max_size=4)),
       st.sampled_from(["server/discover", "initialize", "tools/list", "tools/call"]), st.sampled_from(["result", "error"]))
def test_nothing_but_our_errors_comes_of_any_json(value, method, key):
    """M-005, M-008"""
    def script(reply):
        reply.json({"jsonrpc": "2.0", "id": reply.seen.message["id"], key: value})
    for versions in (HANDSHAKE, ("2026-07-28",)):
        with McpServer(versions=versions, on={method: script}) as server:
            try:
                with connected(server) as client:
                    client.tools(watch())
                    client.call("echo", {"text": "x"}, watch())
            except McpError:
                pass


def test_the_bounds_are_those_of_the_contract():
    limits = Limits()
    assert (limits.connect_s, limits.probe_s, limits.initialize_s, limits.list_s) == (10, 5, 30, 30)
    assert (limits.call_quiet_s, limits.call_s, limits.goodbye_s) == (120, 1800, 2)
    assert (limits.message_bytes, limits.exchange_bytes, limits.error_bytes) == (8 << 20, 32 << 20, 64 << 10)
    assert (limits.messages, limits.pages, limits.tools, limits.resumptions, limits.redirects,
            limits.input_rounds) == (10_000, 50, 256, 3, 3, 10)
