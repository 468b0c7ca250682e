"""Which era a server belongs to, and the two greetings; HTTP with two endpoints as the last resort."""
import json
import queue
import time
from contextlib import contextmanager

import pytest
from helpers_mcp import (
    QUICK, McpServer, connect, connected, echo, quick, raw_server, read_request, wait_until, watch)

import tinychat
from tinychat.mcp import era
from tinychat.mcp.client import Client
from tinychat.mcp.errors import (
    McpError, NotConnected, ProtocolError, Refused, ServerError, SessionLost, TimedOut, Unreachable)

OLD = era.HANDSHAKE


# ---- the stateless era

def test_a_server_of_both_eras_is_never_asked_to_initialize():
    """M-011"""
    with McpServer() as server, connected(server) as client:
        client.tools(watch())
        assert echo(client, "grüße") == "grüße"
    assert server.rpcs() == ["server/discover", "tools/list", "tools/call"]
    for seen in server.seen:
        meta = seen.message["params"]["_meta"]
        assert meta["io.modelcontextprotocol/protocolVersion"] == "2026-07-28"
        assert meta["io.modelcontextprotocol/clientInfo"] == {
            "name": "tinychat", "version": tinychat.__version__}
        assert meta["io.modelcontextprotocol/clientCapabilities"] == {}
        assert seen.headers["mcp-protocol-version"] == "2026-07-28"
        assert seen.headers["mcp-method"] == seen.rpc
        assert seen.headers.get("mcp-name") == ("echo" if seen.rpc == "tools/call" else None)


# ---- from the probe to the handshake

PROBES = {
    "-32000": lambda reply: reply.error(-32000, "Server not initialized"),
    "-32600": lambda reply: reply.error(-32600, status=400),
    "-32601": lambda reply: reply.error(-32601, status=404),
    "-32602": lambda reply: reply.error(-32602),
    "-32022 of old ones": lambda reply: reply.error(-32022, status=400, data={"supported": list(OLD)}),
    "-32022 without a list": lambda reply: reply.error(-32022, status=400),
    "an empty 400": lambda reply: reply.status(400),
    "a 404 page": lambda reply: reply.status(404, "<h1>no</h1>", "text/html"),
    "a 500": lambda reply: reply.status(500, "oops"),
    "a 202": lambda reply: reply.status(202),
    "an empty body": lambda reply: reply.status(200, "", "application/json"),
    "a page": lambda reply: reply.status(200, "<h1>hi</h1>", "text/html"),
    "a result of something else": lambda reply: reply.result({}),
    "old revisions": lambda reply: reply.result({"supportedVersions": ["1999-01-01", OLD[0]]}),
    "silence": lambda reply: reply.hang(),
    "a broken connection": lambda reply: None,
}


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_a_server_that_does_not_know_the_probe_gets_the_handshake(probe):
    """M-012"""
    with McpServer(versions=OLD, on={"server/discover": probe}) as server, connected(server) as client:
        assert echo(client) == "hello"
    assert server.rpcs() == ["server/discover", "initialize", "notifications/initialized", "tools/call"]


def test_a_server_that_refuses_what_it_offers_is_asked_once_more():
    """M-013"""
    def refuse(reply):
        reply.error(-32022, "not now", 400, {"supported": [era.STATELESS]})
    with McpServer(on={"server/discover": [refuse]}) as server, connected(server) as client:
        assert echo(client) == "hello"
    assert server.rpcs() == ["server/discover", "server/discover", "tools/call"]
    with McpServer(on={"server/discover": refuse}) as server, pytest.raises(ServerError, match="not now"):
        connect(server)
    assert server.rpcs() == ["server/discover", "server/discover"]


@pytest.mark.parametrize("answer", [
    lambda reply: reply.error(-32022, "no", 400, {"supported": ["2031-01-01"]}),
    lambda reply: reply.result({"supportedVersions": ["2031-01-01"]})])
def test_without_a_revision_in_common_the_error_lists_both_sides(answer):
    """M-013"""
    with McpServer(on={"server/discover": answer}) as server, pytest.raises(ProtocolError) as caught:
        connect(server)
    assert server.rpcs() == ["server/discover"]
    assert all(version in caught.value.message for version in ("2031-01-01", era.STATELESS, *OLD))


@pytest.mark.parametrize("status", [401, 403, 407, 429])
def test_statuses_that_another_era_would_meet_too_are_reported(status):
    """M-014"""
    on = {"server/discover": lambda reply: reply.status(status, "go away")}
    with McpServer(on=on) as server, pytest.raises(ServerError, match=f"{status}.*go away") as caught:
        connect(server)
    assert caught.value.http_status == status and server.rpcs() == ["server/discover"]


@pytest.mark.parametrize("code", [-32020, -32021])
def test_faults_of_a_stateless_server_are_reported(code):
    """M-014"""
    on = {"server/discover": lambda reply: reply.error(code, "mismatch", 400)}
    with McpServer(on=on) as server, pytest.raises(ServerError, match="mismatch"):
        connect(server)
    assert server.rpcs() == ["server/discover"]


def test_a_foreign_redirect_is_reported():
    """M-014"""
    on = {"server/discover": lambda reply: reply.status(307, Location="https://example.org/x?key=1")}
    with McpServer(on=on) as server, pytest.raises(Refused, match="to https://example.org, which"):
        connect(server)
    assert server.rpcs() == ["server/discover"]


# ---- the handshake

def test_the_handshake_offers_the_newest_revision_and_nothing_else():
    """M-015, M-017"""
    with McpServer(versions=OLD) as server, connected(server) as client:
        client.tools(watch())
        echo(client)
    assert server.rpcs()[1:] == ["initialize", "notifications/initialized", "tools/list", "tools/call"]
    first, *later = server.seen[1:]
    assert first.message["params"] == {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {
        "name": "tinychat", "version": tinychat.__version__}}
    assert "mcp-protocol-version" not in first.headers
    assert {seen.headers["mcp-protocol-version"] for seen in later} == {"2025-11-25"}
    assert not any("mcp-method" in seen.headers for seen in server.seen[1:])


@pytest.mark.parametrize("version", OLD[:3])
def test_an_older_server_is_used_at_its_revision(version):
    """M-016, M-017"""
    with McpServer(versions=(version,), sessions=True) as server, connected(server) as client:
        assert client.version == version and echo(client) == "hello"
    assert {seen.headers.get("mcp-protocol-version") for seen in server.seen[2:]} == {version}
    assert server.rpcs()[-1] == "DELETE"


@pytest.mark.parametrize("version", ["1999-01-01", "2026-07-28", "draft", None, 5, ["2025-11-25"]])
def test_an_unknown_revision_is_refused_with_both_names(version):
    """M-016"""
    on = {"initialize": lambda reply: reply.result({"protocolVersion": version, "capabilities": {}})}
    with McpServer(versions=OLD, on=on) as server, pytest.raises(ProtocolError) as caught:
        connect(server)
    assert str(version)[:20] in caught.value.message and "2025-11-25" in caught.value.message
    assert "notifications/initialized" not in server.rpcs()


@pytest.mark.parametrize("versions", [OLD, (era.STATELESS,)])
@pytest.mark.parametrize("capabilities", [{}, {"prompts": {}}, {"tools": None}, None, []])
def test_a_server_without_tools_has_none_and_is_not_asked(versions, capabilities):
    """M-020"""
    with McpServer(versions=versions) as server:
        server.capabilities = capabilities
        with connected(server) as client:
            assert client.tools(watch()) == []
    assert "tools/list" not in server.rpcs()


@pytest.mark.parametrize("mode, rpcs", [
    ("legacy", ["initialize", "notifications/initialized"]), ("modern", ["server/discover"])])
def test_an_era_can_be_pinned(mode, rpcs):
    with McpServer() as server, connected(server, mode=mode):
        assert server.rpcs() == rpcs


def test_a_pinned_era_that_the_server_lacks_is_an_error():
    with McpServer(versions=OLD) as server, pytest.raises(ServerError):
        connect(server, mode="modern")
    with McpServer(versions=(era.STATELESS,)) as server, pytest.raises(ServerError):
        connect(server, mode="legacy")


def test_the_era_of_a_server_is_remembered_and_may_change():
    memory = era.Memory()
    with McpServer(versions=OLD) as server:
        for _ in range(2):
            with connected(server, memory=memory):
                pass
        assert server.rpcs().count("server/discover") == 1
        server.versions = (era.STATELESS,)
        with connected(server, memory=memory) as client:
            assert client.version == era.STATELESS
        assert server.rpcs()[-3:] == ["initialize", "GET", "server/discover"]


def test_the_memory_is_bounded():
    memory = era.Memory(2)
    for i in range(4):
        memory.put(str(i), "handshake")
    assert [memory.get(str(i)) for i in range(4)] == [None, None, "handshake", "handshake"]


def test_nobody_at_the_address_is_reported_at_once():
    with raw_server(lambda connection, closing: None) as url:
        pass
    with pytest.raises(NotConnected, match="cannot connect"):
        connect(url)


# ---- over stdio, or whatever is not HTTP

class Pipe:
    """A transport without HTTP: a function from a message to a result, or an exception."""

    where = "a process"

    def __init__(self, script):
        self.script, self.sent, self.on_notification = script, [], None

    def exchange(self, message, watch, headers={}):
        self.sent.append(message["method"])
        assert not headers
        result = self.script(self, message)
        return {"jsonrpc": "2.0", "id": message["id"], **result}

    def notify(self, message, watch):
        self.sent.append(message["method"])

    def close(self):
        pass


INITIALIZED = {"result": {"protocolVersion": OLD[-1], "capabilities": {"tools": {}}}}
DISCOVERED = {"result": {"supportedVersions": [era.STATELESS], "capabilities": {"tools": {}}}}
UNKNOWN = {"error": {"code": -32601, "message": "unknown"}}


def greeted(script) -> tuple[Client, Pipe]:
    pipe = Pipe(script)
    client = Client(pipe, limits=QUICK, memory=era.Memory())
    client.connect(watch())
    return client, pipe


def test_without_http_initialize_comes_first():
    """M-018"""
    client, pipe = greeted(lambda pipe, message: INITIALIZED)
    assert pipe.sent == ["initialize", "notifications/initialized"]


def test_without_http_a_stateless_server_is_found_by_its_refusal():
    """M-019"""
    client, pipe = greeted(lambda pipe, message: UNKNOWN if message["method"] == "initialize" else DISCOVERED)
    assert pipe.sent == ["initialize", "server/discover"] and client.version == era.STATELESS


def test_a_stateless_process_that_left_at_initialize_is_asked_again():
    """M-019"""
    def script(pipe, message):
        if len(pipe.sent) == 2:
            raise SessionLost("started again")
        return UNKNOWN if message["method"] == "initialize" else DISCOVERED
    assert greeted(script)[1].sent == ["initialize", "server/discover", "server/discover"]


def test_a_server_of_neither_era_is_reported_by_its_first_refusal():
    def script(pipe, message):
        return {"error": {"code": -32000, "message": f"no {message['method']}"}}
    with pytest.raises(ServerError, match="^a process: no initialize$"):
        greeted(script)


def test_a_process_that_was_started_again_is_greeted_again():
    """M-028"""
    def script(pipe, message):
        if message["method"] == "tools/call" and pipe.sent.count("tools/call") == 1:
            raise SessionLost("started again")
        return INITIALIZED if message["method"] == "initialize" else {"result": {"content": []}}
    client, pipe = greeted(script)
    assert client.call("x", {}, watch()).content == []
    assert pipe.sent == ["initialize", "notifications/initialized", "tools/call"] * 2


# ---- HTTP+SSE

@contextmanager
def old_server(endpoint="/messages?session=1"):
    """405 for a POST to its address; GET is a stream that names the endpoint and carries answers."""
    def get(reply):
        answers = server.answers = queue.Queue()
        reply.stream()
        if endpoint:
            reply.event(endpoint, event="endpoint")
        while not reply.server.closing.is_set():
            try:
                message = answers.get(timeout=0.02)
            except queue.Empty:
                continue
            if message is None:
                return
            reply.event(message)

    def post(reply):
        if reply.seen.path == "/mcp":
            return reply.status(405, "use GET")
        sent = reply.seen.message
        reply.status(202, "Accepted")
        results = {"initialize": {"protocolVersion": OLD[0], "capabilities": {"tools": {}}},
                   "tools/list": {"tools": server.tools},
                   "tools/call": {"content": [{"type": "text", "text": "hello"}]}}
        if sent["method"] in results:
            server.answers.put({"jsonrpc": "2.0", "method": "notifications/message", "params": {}})
            server.answers.put({"jsonrpc": "2.0", "id": sent["id"], "result": results[sent["method"]]})

    with McpServer(versions=OLD) as server:
        server.usual = post
        server.on["GET"] = get
        yield server


def test_a_server_with_two_endpoints_is_found_and_used():
    """M-043, M-025"""
    with old_server() as server, connected(server, headers={"X-Key": "k"}) as client:
        assert [tool.name for tool in client.tools(watch())] == ["echo"]
        assert echo(client) == "hello" and client.version == OLD[0]
    assert server.rpcs() == ["server/discover", "initialize", "GET", "initialize",
                             "notifications/initialized", "tools/list", "tools/call"]
    assert {seen.path for seen in server.seen[3:]} == {"/messages?session=1"}
    assert all(seen.headers["x-key"] == "k" for seen in server.seen)


def test_it_is_remembered_that_a_server_has_two_endpoints():
    """M-043"""
    memory = era.Memory()
    with old_server() as server:
        for _ in range(2):
            with connected(server, memory=memory) as client:
                assert echo(client) == "hello"
    assert server.rpcs().count("server/discover") == 1


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9/x", "https://example.org/", "//example.org/",
                                      "http://user@127.0.0.1/", "ftp://x/"])
def test_an_endpoint_of_another_origin_is_refused(endpoint):
    """M-044"""
    with old_server(endpoint) as server, pytest.raises(ServerError, match="405"):
        connect(server)
    assert server.rpcs() == ["server/discover", "initialize", "GET"]


def test_a_stream_without_an_endpoint_ends_in_time_with_the_first_error():
    """M-045"""
    limits = quick(connect_s=0.5)
    with old_server(endpoint=None) as server:
        start = time.monotonic()
        with pytest.raises(ServerError, match="405.*use GET"):
            connect(server, limits=limits)
        assert time.monotonic() - start < 2
    assert server.rpcs() == ["server/discover", "initialize", "GET"]


def test_a_call_on_two_endpoints_ends_on_time_and_is_cancelled():
    """M-077, M-035"""
    with old_server() as server, connected(server) as client:
        server.usual, usual = (lambda reply: reply.status(202)), server.usual
        with pytest.raises(TimedOut):
            echo(client, seconds=0.3)
        cancelled = server.wait_for("notifications/cancelled")[0].message["params"]["requestId"]
        assert cancelled == server.of("tools/call")[0].message["id"]
        server.usual = usual
        assert echo(client) == "hello"


def test_a_stream_that_ends_fails_its_calls_at_once():
    """M-043"""
    with old_server() as server, connected(server) as client:
        server.usual = lambda reply: (reply.status(202), server.answers.put(None))
        for _ in range(2):
            with pytest.raises(McpError, match="stream ended"):
                echo(client)


def test_the_next_request_after_the_end_of_a_stream_opens_another_and_greets_anew():
    """M-043"""
    with old_server() as server, connected(server) as client:
        client.tools(watch())
        server.answers.put(None)
        wait_until(lambda: client._transport._stream.fault, "the stream to end")
        n = len(server.seen)
        assert echo(client) == "hello"
        assert [tool.name for tool in client.tools(watch())] == ["echo"]
        assert echo(client) == "hello"
    assert server.rpcs()[n:] == ["GET", "initialize", "notifications/initialized", "tools/call",
                                 "tools/list", "tools/call"]


def test_a_closed_connection_opens_no_stream():
    """M-043"""
    with old_server() as server, connected(server) as client:
        client.close()
        with pytest.raises(Unreachable):
            echo(client)
    assert server.rpcs().count("GET") == 1


def test_a_stream_that_floods_is_given_up():
    """M-079"""
    def flood(connection, closing):
        request = read_request(connection)
        if not request.startswith(b"GET"):
            return connection.sendall(b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n")
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
                           b"event: endpoint\ndata: /mcp\n\n")
        connection.settimeout(0.5)  # a client that shut a full connection leaves it full
        while True:
            connection.sendall(b"data: " + json.dumps({"method": "x" * 1000}).encode() + b"\n\n")
    limits = quick(exchange_bytes=1 << 20)
    with raw_server(flood) as url, pytest.raises(ServerError, match="405"):
        connect(url, limits=limits)
