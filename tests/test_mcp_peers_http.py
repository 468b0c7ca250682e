"""Servers that others wrote, over HTTP: of the TypeScript and the Python SDK, FastMCP, Playwright with a browser."""
import base64
import http.client
import io
import json
import os
import select
import shutil
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import peers
import pytest
from helpers_mcp import raw_server, read_request, wait_until, watch
from helpers_mcp_stdio import at_once, mcp_threads
from helpers_peers_http import free_port, listening
from PIL import Image

from tinychat.mcp.client import Client, connect_http
from tinychat.mcp.era import Memory
from tinychat.mcp.errors import CalledOff, NotConnected, ServerError, TimedOut, Unreachable
from tinychat.mcp.plugins import Plugins
from tinychat.mcp.tools import definition, expose, output_of, text_for_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
LOTS = 1 << 20

PYTHON_SDK = '''
import asyncio
import sys
from typing import Annotated

import mcp_types as types
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.streamable_http import EventMessage, EventStore
from mcp.shared.message import ServerMessageMetadata
from pydantic import Field

server = MCPServer("ours")

@server.tool()
def say(text: str) -> str:
    """Says it again."""
    return text

@server.tool()
def fail() -> str:
    raise ValueError("it is broken")

@server.tool()
async def count(n: int, ctx: Context) -> int:
    """Counts, and reports it."""
    for i in range(n):
        await ctx.report_progress(i, n)
        await asyncio.sleep(0.1)
    return n

n_broken_off = 0

@server.tool()
async def sleep(seconds: float) -> str:
    global n_broken_off
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        n_broken_off += 1
        raise
    return "rested"

@server.tool()
def broken_off() -> int:
    """How many sleeps did not come to their end."""
    return n_broken_off

@server.tool()
async def cut(ctx: Context) -> str:
    """Its answer comes on another stream than the one that began."""
    await ctx.close_sse_stream()
    await asyncio.sleep(0.3)
    return "after the cut"

@server.tool()
def resumed() -> int:
    """How many streams were."""
    return store.n_resumed

@server.tool()
async def ask(ctx: Context) -> str:
    """Asks its client back."""
    beside = ServerMessageMetadata(related_request_id=ctx.request_id)
    await ctx.session.send_request(types.PingRequest(), types.EmptyResult, metadata=beside)
    try:
        await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult, metadata=beside)
    except Exception as error:
        return f"answers pings; {error}"

@server.tool()
def later(ctx: Context) -> str | types.InputRequiredResult:
    """Has its result at the second attempt."""
    if ctx.request_state is None:
        return types.InputRequiredResult(request_state="st\\u00e4te 1")
    return f"went on with {ctx.request_state}"

@server.tool()
def place(region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})], ctx: Context) -> str:
    return f"{region} {ctx.headers.get('mcp-param-region')}"

class Store(EventStore):
    def __init__(self):
        self.events, self.n_resumed = [], 0

    async def store_event(self, stream_id, message):
        self.events.append((stream_id, message))
        return str(len(self.events))

    async def replay_events_after(self, last_event_id, send_callback):
        self.n_resumed += 1
        stream_id = self.events[int(last_event_id) - 1][0]
        for position, (stream, message) in enumerate(self.events, 1):
            if stream == stream_id and position > int(last_event_id) and message is not None:
                await send_callback(EventMessage(message, str(position)))
        return stream_id

store = Store()
server.run("streamable-http", port=int(sys.argv[1]), json_response=sys.argv[2] == "json", event_store=store,
           retry_interval=100)
'''

TYPESCRIPT_SDK = '''
import { createServer } from "node:http";
import { McpServer, createMcpHandler, inputRequired } from "@modelcontextprotocol/server";
import { toNodeHandler } from "@modelcontextprotocol/node";
import * as z from "zod";

let brokenOff = 0;
const text = (text) => ({ content: [{ type: "text", text }] });
const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

function made() {
  const server = new McpServer({ name: "ours", version: "1" });
  const tool = (name, inputs, run) =>
    server.registerTool(name, { inputSchema: z.object(inputs) }, async (args, ctx) => run(args, ctx));
  tool("say", { text: z.string() }, ({ text: it }) => text(it));
  tool("fail", {}, () => { throw new Error("fail is broken"); });
  tool("count", { n: z.number() }, async ({ n }, ctx) => {
    const progressToken = ctx.mcpReq._meta?.progressToken;
    for (let i = 0; i < n; i++) {
      await ctx.mcpReq.notify({ method: "notifications/progress", params: { progress: i, total: n, progressToken } });
      await pause(0.1);
    }
    return text(`${n}`);
  });
  tool("sleep", { seconds: z.number() }, async ({ seconds }, ctx) => {
    ctx.mcpReq.signal.addEventListener("abort", () => { brokenOff++; });
    await pause(seconds);
    return text("rested");
  });
  tool("broken_off", {}, () => text(`${brokenOff}`));
  tool("later", {}, (args, ctx) => {
    const state = ctx.mcpReq.requestState();
    return state ? text(`went on with ${state}`) : inputRequired({ requestState: "st\\u00e4te 1" });
  });
  tool("place", { region: z.string().meta({ "x-mcp-header": "Region" }) },
    ({ region }, ctx) => text(`${region} ${ctx.http?.req?.headers.get("mcp-param-region")}`));
  return server;
}

createServer(toNodeHandler(createMcpHandler(made))).listen(Number(process.argv[2]), "127.0.0.1");
'''
TYPESCRIPT_PACKAGES = ("@modelcontextprotocol/server@2.4.0", "@modelcontextprotocol/node@2.1.2", "zod@4.6.7")

# What FastMCP is now, and what it was while a part of the SDK.
FAST_4, FAST_1 = """
from fastmcp import Context, FastMCP
server = FastMCP("fast")
options = {"transport": sys.argv[2], "host": "127.0.0.1", "port": int(sys.argv[1]), "show_banner": False}
""", """
from mcp.server.fastmcp import Context, FastMCP
server = FastMCP("fast", host="127.0.0.1", port=int(sys.argv[1]))
options = {"transport": sys.argv[2]}
"""
FAST = """
import asyncio
import sys
{head}

@server.tool()
def add(a: int, b: int) -> int:
    return a + b

@server.tool()
def fail() -> str:
    raise ValueError("it is broken")

@server.tool()
async def count(n: int, ctx: Context) -> int:
    for i in range(n):
        await ctx.report_progress(i, n)
        await asyncio.sleep(0.1)
    return n

server.run(**options)
"""
FAST_4_PACKAGES = ("fastmcp==4.2.3",)
FAST_1_PACKAGES = ("mcp==1.9.4", "pydantic==2.11.7", "starlette==0.46.2", "uvicorn==0.34.3", "anyio==4.9.0",
                   "sse-starlette==2.3.6")  # it bounds none of them


@dataclass
class Talk:
    """A connected client, and short ways to use it."""

    client: Client

    def __post_init__(self):
        self.tools = {tool.name: tool for tool in self.client.tools(watch(10))}

    def call(self, name: str, **arguments):
        return self.client.call(name, arguments, watch(30))

    def text(self, name: str, **arguments) -> str:
        return text_for_model(self.call(name, **arguments), LOTS)

    def complaint(self, name: str, **arguments) -> str:
        """Of a call that fails: a result that says so, or a JSON-RPC error for wrong arguments."""
        try:
            result = self.call(name, **arguments)
        except ServerError as error:
            assert error.rpc_code == -32602
            return str(error)
        assert result.is_error
        return text_for_model(result, LOTS)


@contextmanager
def talking(url: str, mode: str = "auto"):
    """With the limits that chats have. Nothing of it is left afterwards."""
    with closing(connect_http(url, mode=mode, memory=Memory())) as client:
        yield Talk(client)
    wait_until(lambda: mcp_threads() == [], "the client's threads to end")


def is_called_off(talk: Talk, name: str, **arguments) -> None:
    """A call that would take long ends within half a second after nobody waits any more."""
    off, times = threading.Event(), []
    timer = threading.Timer(0.3, lambda: (times.append(time.monotonic()), off.set()))
    timer.start()
    with pytest.raises(CalledOff):
        talk.client.call(name, arguments, watch(30, called_off=off))
    assert time.monotonic() - times[0] < 0.5
    timer.join()


def status_of_session(url: str, session: str) -> int:
    """What a request gets that belongs to a session."""
    to = urlsplit(url)
    with closing(http.client.HTTPConnection(to.hostname, to.port, timeout=10)) as connection:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"})
        connection.request("POST", to.path, body, {
            "Content-Type": "application/json", "Accept": "application/json, text/event-stream",
            "Mcp-Session-Id": session, "MCP-Protocol-Version": "2025-11-25"})
        return connection.getresponse().status


# ---- the TypeScript SDK: sessions, or the two endpoints of 2024-11-05

@pytest.fixture(scope="module", params=["streamableHttp", "sse"])
def everything(request, test_cache):
    """The URL of server-everything."""
    with serving_everything(test_cache, request.param) as (_, url):
        yield url


@contextmanager
def serving_everything(cache: Path, transport: str, port: int | None = None):
    port = port or free_port()
    command = peers.npm_peer(cache, "mcp-server-everything")
    with listening(port, command, transport, env={"PORT": str(port)}) as process:
        yield process, f"http://127.0.0.1:{port}/{'sse' if transport == 'sse' else 'mcp'}"


def test_everything_is_listed_and_called(everything):
    """M-012 M-043 M-069"""
    with talking(everything) as talk:
        assert talk.client.version == "2025-11-25"
        assert {"echo", "get-sum", "trigger-long-running-operation"} <= talk.tools.keys()
        assert "simulate-research-query" not in talk.tools, "it can run as a task only"
        for one in expose([("everything", list(talk.tools.values()))]):
            assert definition(one)["function"]["description"]
        assert talk.text("echo", message="grüße \u2028 \U0001f600") == "Echo: grüße \u2028 \U0001f600"
        assert "5" in talk.text("get-sum", a=2, b=3)
        assert talk.text("echo", message="x" * 90_000).count("x") == 90_000, "it takes 100 kB at most"


def test_everything_answers_with_every_kind_of_block(everything):
    """M-070 M-072"""
    with talking(everything) as talk:
        image = talk.call("get-tiny-image")
        assert "[image image/png, " in text_for_model(image, LOTS)
        assert json.loads(output_of(image)) == image.content
        assert talk.text("get-resource-links", count=2).count("[resource ") == 2
        structured = talk.call("get-structured-content", location="New York")
        assert structured.structured and "temperature" in text_for_model(structured, LOTS)


def test_everything_complains_and_goes_on(everything):
    """M-071"""
    with talking(everything) as talk:
        for name, arguments in (("get-sum", {"a": "x"}), ("no-such-tool", {})):
            assert name in talk.complaint(name, **arguments)
        assert talk.text("echo", message="fine") == "Echo: fine"


def test_everything_shows_progress_that_keeps_a_call_alive(everything):
    """M-078"""
    with talking(everything) as talk:
        patient = talk.client.call("trigger-long-running-operation", {"duration": 2, "steps": 10},
                                   watch(20, patience_s=1.0))
        assert "completed" in text_for_model(patient, LOTS)
        with pytest.raises(TimedOut):
            talk.client.call("trigger-long-running-operation", {"duration": 5, "steps": 1},
                             watch(20, patience_s=0.3))
        assert talk.text("echo", message="still here") == "Echo: still here"


def test_everything_is_called_off_and_stays(everything):
    """M-081"""
    with talking(everything) as talk:
        is_called_off(talk, "trigger-long-running-operation", duration=20, steps=2)
        assert talk.text("echo", message="still here") == "Echo: still here"


def test_calls_of_everything_run_side_by_side(everything):
    with talking(everything) as talk:
        began = time.monotonic()
        said = at_once(*[lambda i=i: talk.text("trigger-long-running-operation", duration=1, steps=i + 1)
                         for i in range(8)])
        assert [f"Steps: {i + 1}." in text for i, text in enumerate(said)] == [True] * 8
        assert time.monotonic() - began < 5, "one after the other would take longer"


def test_everything_forgets_a_session_that_was_closed(everything):
    """M-027 M-029"""
    if everything.endswith("/sse"):
        pytest.skip("has no such sessions")
    with talking(everything) as talk:
        session = talk.client._transport._session
        assert status_of_session(everything, session) == 200
    assert status_of_session(everything, session) == 400, "is what it says of unknown ones"


@pytest.fixture
def own_everything(test_cache, transport):
    """The process and the URL of one that the test may end."""
    with serving_everything(test_cache, transport) as found:
        yield found


@pytest.mark.parametrize("transport", ["streamableHttp", "sse"])
def test_a_call_fails_soon_when_everything_dies(own_everything):
    process, url = own_everything
    with talking(url) as talk:
        timer = threading.Timer(0.5, process.kill)
        timer.start()
        began = time.monotonic()
        with pytest.raises(Unreachable):
            talk.call("trigger-long-running-operation", duration=20, steps=2)
        assert time.monotonic() - began < 5, "a second of it passes before the stream is resumed"
        timer.join()


@pytest.mark.parametrize("transport, n_fail", [("streamableHttp", 1), ("sse", 0)])
def test_a_plugin_is_used_again_when_everything_was_restarted(test_cache, tmp_path, transport, n_fail):
    """M-028 M-043: it says 400 to sessions that it does not know, which one call has to bear."""
    port, path = free_port(), "sse" if transport == "sse" else "mcp"
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {
        "it": {"url": f"http://127.0.0.1:{port}/{path}"}}}))

    def chat() -> str:
        with plugins.acquire("it", watch(30)) as client:
            client.tools(watch(10))
            return text_for_model(client.call("echo", {"message": "hi"}, watch(10)), LOTS)
    with closing(Plugins(tmp_path / "mcp.json")) as plugins:
        with serving_everything(test_cache, transport, port):
            assert chat() == "Echo: hi"
        with serving_everything(test_cache, transport, port):
            for _ in range(n_fail):
                with pytest.raises(ServerError, match="session"):
                    chat()
            assert [chat(), chat()] == ["Echo: hi"] * 2


@pytest.mark.parametrize("transport", ["streamableHttp"])
def test_a_connection_that_broke_is_resumed_where_it_was(own_everything):
    """M-030"""
    process, url = own_everything
    seen = []

    def between(connection, closing):
        """Cuts the stream of a call behind its first message."""
        request = read_request(connection)
        head, _, body = request.partition(b"\r\n\r\n")
        seen.append(head.decode())
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), 10) as server:
            server.sendall(request)
            said = b""
            while not (b"long-running" in body and said.count(b"event: message") == 1):
                ready, _, _ = select.select([server, connection], [], [], 10)
                piece = server.recv(1 << 16) if server in ready else b""
                if not piece:  # one of the two is gone
                    return
                said += piece
                connection.sendall(piece)

    with raw_server(between) as proxy, talking(proxy) as talk:
        # NOTE: it may take no longer than we wait until we come again: what this server has to say
        # after that goes nowhere.
        said = talk.text("trigger-long-running-operation", duration=0.2, steps=2)
        assert "completed" in said
    again = [head for head in seen if head.startswith("GET")]
    assert len(again) == 1 and "last-event-id:" in again[0].lower()


# ---- the Python SDK, and the second TypeScript SDK: both eras

STREAMING = ["python", "typescript"]
ALL = [*STREAMING, "python-json"]


@pytest.fixture(scope="module")
def url(request, test_cache, tmp_path_factory):
    """Of a server of the SDK that the test names."""
    with serving(request.param, test_cache, tmp_path_factory.mktemp("server")) as url:
        yield url


@contextmanager
def serving(sdk: str, cache: Path, folder: Path, port: int | None = None):
    port = port or free_port()
    if sdk == "typescript":
        with suppress(FileExistsError):
            (folder / "node_modules").symlink_to(peers.npm_packages(cache, "typescript", *TYPESCRIPT_PACKAGES))
        (folder / "server.mjs").write_text(TYPESCRIPT_SDK)
        argv = ("node", str(folder / "server.mjs"), str(port))
    else:
        (folder / "server.py").write_text(PYTHON_SDK)
        answers = "json" if sdk == "python-json" else "stream"
        argv = (peers.python_peer(cache), str(folder / "server.py"), str(port), answers)
    with listening(port, *argv):
        yield f"http://127.0.0.1:{port}/mcp"


@pytest.mark.parametrize("mode, version", [("auto", "2026-07-28"), ("legacy", "2025-11-25")])
@pytest.mark.parametrize("url", ALL, indirect=True)
def test_a_server_of_an_sdk_is_listed_and_called(url, mode, version):
    """M-011 M-015 M-021"""
    with talking(url, mode) as talk:
        assert talk.client.version == version
        assert {"say", "fail", "count"} <= talk.tools.keys()
        assert talk.text("say", text="grüße \u2028 \U0001f600") == "grüße \u2028 \U0001f600"
        assert talk.text("count", n=2) == "2"
        assert talk.text("say", text="x" * 900_000).count("x") == 900_000


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("url", ALL, indirect=True)
def test_a_server_of_an_sdk_complains_and_goes_on(url, mode):
    """M-023 M-071"""
    with talking(url, mode) as talk:
        for name, arguments in (("fail", {}), ("say", {"text": 5}), ("no_such_tool", {})):
            assert name in talk.complaint(name, **arguments)
        assert talk.text("say", text="fine") == "fine"


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("url", STREAMING, indirect=True)
def test_progress_keeps_a_call_alive(url, mode):
    """M-078"""
    with talking(url, mode) as talk:
        counted = talk.client.call("count", {"n": 15}, watch(20, patience_s=0.8))
        assert text_for_model(counted, LOTS) == "15"


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("url", STREAMING, indirect=True)
def test_a_call_that_was_called_off_ends_at_the_server(url, mode):
    """M-035 M-081"""
    with talking(url, mode) as talk:
        before = int(talk.text("broken_off"))
        is_called_off(talk, "sleep", seconds=60)
        with pytest.raises(TimedOut):
            talk.client.call("sleep", {"seconds": 60}, watch(0.3))
        wait_until(lambda: int(talk.text("broken_off")) == before + 2, "both calls to end at the server")


@pytest.mark.parametrize("url", ALL, indirect=True)
def test_a_tool_that_has_its_result_later_gets_its_state_back(url):
    """M-075"""
    with talking(url) as talk:
        assert talk.text("later") == "went on with st\u00e4te 1"


@pytest.mark.parametrize("url", ALL, indirect=True)
def test_a_mirrored_argument_is_taken(url):
    """M-036"""
    with talking(url) as talk:
        assert talk.text("place", region="west 1") == "west 1 west 1"
        assert talk.text("place", region="Z\u00fcrich") == "Z\u00fcrich =?base64?WsO8cmljaA==?="


@pytest.mark.parametrize("url", ["python"], indirect=True)
def test_a_stream_that_its_server_ends_too_early_is_resumed(url):
    """M-030"""
    with talking(url, "legacy") as talk:
        before = int(talk.text("resumed"))
        assert talk.text("cut") == "after the cut"
        assert int(talk.text("resumed")) == before + 1


@pytest.mark.parametrize("url", ["python"], indirect=True)
def test_requests_of_a_server_are_answered_while_a_call_waits(url):
    """M-006 M-007"""
    with talking(url, "legacy") as talk:
        assert talk.text("ask") == "answers pings; roots/list is not supported"


@pytest.mark.parametrize("url", ["python", "python-json"], indirect=True)
def test_a_server_forgets_a_session_that_was_closed(url):
    """M-027 M-029"""
    with talking(url, "legacy") as talk:
        session = talk.client._transport._session
        assert status_of_session(url, session) == 200
    assert status_of_session(url, session) == 404


@pytest.mark.parametrize("sdk, mode", [("python", "auto"), ("python", "legacy"), ("typescript", "legacy")])
def test_a_server_that_was_restarted_is_used_again(test_cache, tmp_path, sdk, mode):
    """M-028"""
    port = free_port()
    with serving(sdk, test_cache, tmp_path, port) as url:
        client = connect_http(url, mode=mode, memory=Memory())
        talk = Talk(client)
        assert talk.text("say", text="before") == "before"
    with closing(client):
        with pytest.raises(NotConnected):
            talk.call("say", text="to nobody")
        with serving(sdk, test_cache, tmp_path, port):
            said = at_once(*[lambda i=i: talk.text("say", text=str(i)) for i in range(8)])
            assert said == [str(i) for i in range(8)]


# ---- FastMCP, new and old

@pytest.mark.parametrize("packages, head, transport, mode, version", [
    pytest.param(FAST_4_PACKAGES, FAST_4, "http", "auto", "2026-07-28", id="new-stateless"),
    pytest.param(FAST_4_PACKAGES, FAST_4, "http", "legacy", "2025-11-25", id="new-legacy"),
    pytest.param(FAST_4_PACKAGES, FAST_4, "sse", "auto", "2025-11-25", id="new-sse"),
    pytest.param(FAST_1_PACKAGES, FAST_1, "streamable-http", "auto", "2025-03-26", id="old"),
    pytest.param(FAST_1_PACKAGES, FAST_1, "sse", "auto", "2025-03-26", id="old-sse")])
def test_fastmcp_is_used_at_its_revision(test_cache, tmp_path, packages, head, transport, mode, version):
    """M-011 M-012 M-016 M-033 M-043: the old one redirects within its origin"""
    port = free_port()
    (tmp_path / "server.py").write_text(FAST.format(head=head))
    python = peers.python_with(test_cache, "fastmcp", *packages)
    with listening(port, python, str(tmp_path / "server.py"), str(port), transport):
        path = "sse" if transport == "sse" else "mcp"
        with talking(f"http://127.0.0.1:{port}/{path}", mode) as talk:
            assert talk.client.version == version
            assert list(talk.tools) == ["add", "fail", "count"]
            assert talk.text("add", a=2, b=3) == "5"
            assert "fail" in talk.complaint("fail")
            if head is FAST_1:  # its progress goes elsewhere, and its session dies of a call that is called off
                return
            patient = talk.client.call("count", {"n": 15}, watch(20, patience_s=0.8))
            assert text_for_model(patient, LOTS) == "15"
            is_called_off(talk, "count", n=300)
            assert talk.text("add", a=2, b=4) == "6"


# ---- Playwright, which drives a browser

PAGE = b"<!doctype html><title>A page of ours</title><h1>Hello</h1>"


@pytest.mark.parametrize("path", ["mcp", "sse"])
def test_playwright_opens_a_page_in_a_browser(test_cache, tmp_path, path):
    """M-043 M-070 M-071 M-081"""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs a Chromium")
    modules = peers.npm_packages(test_cache, "playwright", "@playwright/mcp@0.0.83")
    port = free_port()
    argv = (str(modules / ".bin" / "playwright-mcp"), "--port", str(port), "--host", "127.0.0.1", "--headless",
            "--no-sandbox", "--isolated", "--executable-path", browser, "--output-dir", str(tmp_path))
    with raw_server(serve_page) as page, listening(port, *argv):
        with talking(f"http://localhost:{port}/{path}") as talk:  # it refuses other names of the host
            assert {"browser_navigate", "browser_take_screenshot"} <= talk.tools.keys()
            assert "Page Title: A page of ours" in talk.text("browser_navigate", url=page)
            shot = talk.call("browser_take_screenshot")
            images = [block for block in shot.content if block["type"] == "image"]
            with Image.open(io.BytesIO(base64.b64decode(images[0]["data"]))) as image:
                assert image.width > 100
            missing = talk.call("browser_click")
            assert missing.is_error and "target" in text_for_model(missing, LOTS)
            is_called_off(talk, "browser_wait_for", time=30)
            assert "A page of ours" in talk.text("browser_navigate", url=page)
            assert not talk.call("browser_close").is_error


def serve_page(connection, closing) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(PAGE) + PAGE)
