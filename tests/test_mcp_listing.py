"""The list of tools: what is kept, how it is fetched, how long it holds, what a call repeats of it."""
import logging
import time

import pytest
from helpers_mcp import ECHO, QUICK, McpServer, connected, echo, quick, watch

from tinychat.mcp import listing
from tinychat.mcp.era import HANDSHAKE
from tinychat.mcp.errors import McpError, ProtocolError, ServerError

OBJECT = {"type": "object"}


def tool(name, schema=OBJECT, **fields):
    return {"name": name, "inputSchema": schema, **fields}


def kept(values, over_http=False, limits=QUICK):
    found = listing.Listing(limits, "here", over_http)
    found.add({"tools": values})
    return list(found.tools)


# ---- what is kept

def test_bad_tools_cost_nobody_but_themselves(caplog):
    """M-061"""
    caplog.set_level(logging.INFO)
    bad = [None, 7, "x", [], {}, tool(""), tool(None), tool(5), tool("x" * 513), {"name": "no schema"},
           tool("null", None), tool("list", []), tool("text", {"type": "string"}), tool("n", {"type": None}),
           tool("two", {"type": ["object", "null"]}), tool("a"), tool("a", {"type": "object", "x": 1})]
    assert kept([tool("a"), *bad, tool("b", {}), tool("x" * 512)]) == ["a", "b", "x" * 512]
    assert len(caplog.records) == len(bad)


def test_a_tool_is_kept_as_its_server_wrote_it():
    """M-067"""
    schema = {"type": "object", "$schema": "x", "z": 1, "properties": {"b": {}, "a": {"$ref": "#/z"}}}
    found = listing.tool_of(tool("a.b/c", schema, description="does it", title="T"), False)
    assert (found.name, found.description, found.input_schema) == ("a.b/c", "does it", schema)
    assert list(found.input_schema["properties"]) == ["b", "a"]
    assert listing.tool_of(tool("a", description=7), False).description == ""


def test_tools_that_run_as_tasks_only_are_not_offered():
    """M-069"""
    supports = {"r": "required", "o": "optional", "f": "forbidden", "x": None}
    values = [tool(name, execution={"taskSupport": support}) for name, support in supports.items()]
    assert kept([*values, tool("e", execution="required")]) == ["o", "f", "x", "e"]


def test_tools_beyond_the_limits_are_dropped_with_a_warning(caplog):
    assert kept([tool(str(i)) for i in range(9)], limits=quick(tools=3)) == ["0", "1", "2"]
    big = [tool(str(i), {"type": "object", "x": "y" * 1000}) for i in range(9)]
    assert kept([*big, tool("small")], limits=quick(tools_bytes=2_200)) == ["0", "1", "small"]
    assert kept([None] * 5_000 + [tool("a")]) == []
    with McpServer(tools=[tool(str(i)) for i in range(300)]) as server, connected(server) as client:
        assert len(client.tools(watch())) == 256
    assert "left out 44 tools" in caplog.text


# ---- mirrored arguments

def annotated(name="Region", type="string", **more):
    return {"type": type, "x-mcp-header": name, **more}


def properties(**inner):
    return {"type": "object", "properties": inner}


SOUND = properties(region=annotated(), n=annotated("N", "integer"), flag=annotated("Flag", "boolean"),
                   deep=properties(er=properties(x=annotated("X-1"))), plain={"type": "string"})
UNSOUND = {
    "no token": properties(a=annotated("a b")), "empty": properties(a=annotated("")),
    "no text": properties(a=annotated(5)), "CRLF": properties(a=annotated("a\r\nb")),
    "a number": properties(a=annotated(type="number")), "two types": properties(a=annotated(type=["string"])),
    "no type": properties(a={"x-mcp-header": "A"}), "an object": properties(a=annotated(type="object")),
    "twice": properties(a=annotated("Region"), b=properties(c=annotated("REGION"))),
    "the root": {"type": "object", "x-mcp-header": "A"},
    "items": properties(a={"type": "array", "items": annotated()}),
    "anyOf": properties(a={"anyOf": [annotated()]}), "oneOf": {"type": "object", "oneOf": [properties(a=annotated())]},
    "$defs": {"type": "object", "$defs": {"d": annotated()}}, "if": {"type": "object", "if": properties(a=annotated())},
    "additional": {"type": "object", "additionalProperties": annotated()},
    "patterns": {"type": "object", "patternProperties": {"x": annotated()}},
    "nested items": properties(a={"type": "array", "items": properties(b=annotated())}),
}


@pytest.mark.parametrize("schema", UNSOUND.values(), ids=UNSOUND)
def test_a_tool_with_an_unsound_annotation_is_left_out_over_http_alone(schema):
    """M-037"""
    values = [tool("a"), tool("bad", schema), tool("z", SOUND)]
    assert kept(values, over_http=True) == ["a", "z"]
    assert kept(values, over_http=False) == ["a", "bad", "z"]


@pytest.mark.parametrize("versions, names", [(("2026-07-28",), ["echo"]), (HANDSHAKE, ["bad", "echo"])])
def test_annotations_count_in_the_stateless_era_alone(versions, names, caplog):
    """M-037"""
    caplog.set_level(logging.INFO)
    bad = tool("bad", UNSOUND["items"])
    with McpServer(versions=versions, tools=[bad, ECHO]) as server, connected(server) as client:
        assert [t.name for t in client.tools(watch())] == names
    assert ("'bad'" in caplog.text) == (names == ["echo"])


@pytest.mark.parametrize("schema", [
    properties(**{"x-mcp-header": {"type": "string"}}), {"type": "object", "default": {"x-mcp-header": 1}},
    {"type": "object", "enum": [{"x-mcp-header": 1}], "const": {"x-mcp-header": 1}}])
def test_values_and_names_that_look_like_annotations_are_none(schema):
    """M-037"""
    assert kept([tool("a", schema)], over_http=True) == ["a"]


def test_a_schema_of_any_depth_and_size_is_walked_in_no_time():
    """M-065"""
    deep = {}
    for _ in range(5_000):
        deep = {"properties": {"a": deep}}
    start = time.monotonic()
    assert list(listing.mirrors_of(deep)) == []
    assert list(listing.mirrors_of(properties(**{str(i): {"type": "string"} for i in range(20_000)}))) == []
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("arguments, headers", [
    ({"region": "us-west1", "n": 42, "flag": False}, {"region": "us-west1", "n": "42", "flag": "false"}),
    ({"region": "Zürich\r\n", "n": -1, "flag": True},
     {"region": "=?base64?WsO8cmljaA0K?=", "n": "-1", "flag": "true"}),
    ({"region": None, "n": None, "deep": None}, {}), ({}, {}),
    ({"deep": {"er": {"x": "y"}}, "plain": "p"}, {"x-1": "y"}),
    ({"deep": {"er": []}, "region": "", "n": 1.5}, {"region": ""})])
def test_annotated_arguments_are_repeated_in_headers(arguments, headers):
    """M-036"""
    with McpServer(tools=[tool("Größe", SOUND)]) as server, connected(server) as client:
        client.tools(watch())
        client.call("Größe", arguments, watch())
    seen = server.of("tools/call")[0]
    assert {name[10:]: value for name, value in seen.headers.items() if name.startswith("mcp-param-")} == headers
    assert seen.headers["mcp-name"] == "=?base64?R3LDtsOfZQ==?="


def test_arguments_are_not_repeated_in_the_handshake_era():
    """M-036"""
    with McpServer(versions=HANDSHAKE, tools=[tool("a", SOUND)]) as server, connected(server) as client:
        client.tools(watch())
        client.call("a", {"region": "x"}, watch())
    assert not any(name.startswith("mcp-param") for name in server.of("tools/call")[0].headers)


def test_a_header_mismatch_leads_to_a_new_list_and_one_more_try():
    """M-038"""
    def mismatch(reply):
        reply.server.tools = [tool("a", SOUND)]
        reply.error(-32020, "header mismatch", 400)
    with McpServer(tools=[tool("a")], on={"tools/call": [mismatch]}) as server, connected(server) as client:
        client.tools(watch())
        client.call("a", {"region": "x"}, watch())
        assert server.rpcs()[-3:] == ["tools/call", "tools/list", "tools/call"]
        assert [seen.headers.get("mcp-param-region") for seen in server.of("tools/call")] == [None, "x"]
        server.on["tools/call"] = mismatch
        with pytest.raises(ServerError, match="header mismatch"):
            client.call("a", {}, watch())
    assert server.rpcs()[-3:] == ["tools/call", "tools/list", "tools/call"]


def test_a_header_mismatch_means_nothing_in_the_handshake_era():
    """M-038"""
    on = {"tools/call": lambda reply: reply.error(-32020)}
    with McpServer(versions=HANDSHAKE, on=on) as server, connected(server) as client:
        with pytest.raises(ServerError):
            echo(client)
    assert len(server.of("tools/call")) == 1


# ---- pages

def paging(*cursors):
    """A script of pages; each has one tool and leads on by the next cursor."""
    def script(reply):
        n = len(reply.server.of("tools/list")) - 1
        page = {"tools": [tool(f"t{n}")]}
        if n < len(cursors):
            page["nextCursor"] = cursors[n]
        reply.result(page)
    return script


@pytest.mark.parametrize("versions", [HANDSHAKE, ("2026-07-28",)])
def test_pages_are_followed_to_the_end(versions):
    """M-060"""
    with McpServer(versions=versions, on={"tools/list": paging("a", "", "c", None)}) as server:
        with connected(server) as client:
            assert [t.name for t in client.tools(watch())] == ["t0", "t1", "t2", "t3"]
    cursors = [seen.message["params"].get("cursor") for seen in server.of("tools/list")]
    assert cursors == [None, "a", "", "c"]


@pytest.mark.parametrize("cursors, words, n", [
    (["a", "b", "a"], "twice", 3), (["", ""], "twice", 2), ([7], "no string", 1), ([{}], "no string", 1),
    ([str(i) for i in range(99)], "more than 50 pages", 50)])
def test_pages_without_end_are_an_error(cursors, words, n):
    """M-060"""
    with McpServer(on={"tools/list": paging(*cursors)}) as server, connected(server) as client:
        with pytest.raises(ProtocolError, match=words):
            client.tools(watch())
    assert len(server.of("tools/list")) == n


def test_the_time_for_a_list_is_for_all_its_pages():
    """M-060, M-077"""
    def slow(reply):
        reply.server.closing.wait(0.1)
        paging(*map(str, range(99)))(reply)
    with McpServer(on={"tools/list": slow}) as server, connected(server, limits=quick(list_s=0.5)) as client:
        with pytest.raises(McpError, match="tools/list at http.* took too long"):
            client.tools(watch(60))
    assert len(server.of("tools/list")) < 10


@pytest.mark.parametrize("tools", [None, {}, "x", 5])
def test_a_list_that_is_none_is_an_error(tools):
    """M-061"""
    with McpServer(on={"tools/list": lambda reply: reply.result({"tools": tools})}) as server:
        with connected(server) as client, pytest.raises(ProtocolError, match="expected a list of tools"):
            client.tools(watch())


# ---- how long it holds

def n_lists(client, server, n=1):
    for _ in range(n):
        client.tools(watch())
    return len(server.of("tools/list"))


def test_a_list_of_the_handshake_era_holds_until_the_server_says_otherwise():
    """M-068"""
    def call(reply):
        reply.stream()
        reply.event({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
        reply.event({"jsonrpc": "2.0", "id": reply.seen.message["id"], "result": {
            "content": [{"type": "text", "text": "hello"}]}})
    with McpServer(versions=HANDSHAKE, on={"tools/call": [call]}) as server, connected(server) as client:
        assert n_lists(client, server, 3) == 1
        echo(client)
        assert n_lists(client, server, 2) == 2
        server.on["tools/call"] = lambda reply: reply.error(-32602, "Unknown tool: echo")
        with pytest.raises(ServerError):
            echo(client)
        assert n_lists(client, server, 2) == 3
        for n, text in enumerate(("Unknown tool: 'echo'", "MCP error -32602: Tool echo not found"), 4):
            server.on["tools/call"] = lambda reply: reply.result(
                {"isError": True, "content": [{"type": "text", "text": text}]})
            assert client.call("echo", {}, watch()).is_error
            assert n_lists(client, server, 2) == n


def test_a_change_that_is_told_while_the_list_comes_counts():
    """M-068"""
    def list_(reply):
        reply.stream()
        reply.event({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
        reply.event({"jsonrpc": "2.0", "id": reply.seen.message["id"], "result": {"tools": []}})
    with McpServer(versions=HANDSHAKE, on={"tools/list": [list_]}) as server, connected(server) as client:
        assert client.tools(watch()) == []
        assert [t.name for t in client.tools(watch())] == ["echo"]
        assert n_lists(client, server) == 2


@pytest.mark.parametrize("ttl, n", [(60_000, 1), (0, 3), (-5, 3), (None, 3), ("60000", 3), (True, 3), (1e300, 1)])
def test_a_stateless_list_holds_as_long_as_it_says(ttl, n):
    """M-068"""
    on = {"tools/list": lambda reply: reply.result({"tools": [ECHO], "ttlMs": ttl})}
    with McpServer(on=on) as server, connected(server) as client:
        assert n_lists(client, server, 3) == n


def test_a_list_holds_for_five_minutes_at_most():
    """M-068"""
    assert listing.fresh_for({"ttlMs": 10**12}, QUICK) == 300
    assert listing.fresh_for({"ttlMs": 1_500}, QUICK) == 1.5
    assert listing.fresh_for({"ttlMs": float("nan")}, QUICK) in (0, 300)
