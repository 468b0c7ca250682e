"""The contract's "request with MCP": a hub's search and a browser, used by the small real model."""
import json
import shutil

import pytest
from contract_checker import check_stream, parse_sse
from helpers_chat import Client
from helpers_mcp import McpServer, raw_server, read_request
from helpers_tools import ephemeral, text_result, write_mcp_json
from peers import npm_packages

from tinychat.library import Library
from tinychat.server import make_server
from tinychat.server.auth import TOKENS_NAME, Tokens
from tinychat.store import Store

HUB_SEARCH = {"name": "model_search", "description": "Find models on the hub", "inputSchema": {
    "type": "object", "required": ["query"], "additionalProperties": False,
    "properties": {"query": {"type": "string"}}}}
FIRST = 'Repeat: <tool_call>{"name": "model_search", "arguments": {"query": "trending"}}</tool_call>'
PAGE = b"<!doctype html><title>A page of ours</title><h1>Trending</h1>"


def serve_page(connection, closing) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(PAGE) + PAGE)


def stream(client: Client, token: str, **fields) -> list[dict]:
    """The events, each held against the contract."""
    body = {"stream": True, "temperature": 0, "max_output_tokens": 160, **fields}
    status, _, data = client.request("POST", "/api/v1/chat", json.dumps(body).encode(), {
        "Content-Type": "application/json", "Authorization": f"Bearer {token}"})
    assert status == 200, data
    assert check_stream(data, request=body) == []
    return [event for _, event in parse_sse(data)[0]]


def test_a_search_on_a_hub_and_a_page_in_a_browser(smollm2_path, test_cache, tmp_path, capsys):
    """C-117, C-124: streamed, with both servers offered in each of two chats."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("needs a Chromium")
    modules = npm_packages(test_cache, "playwright", "@playwright/mcp@0.0.83")
    mcp_json = write_mcp_json(tmp_path, playwright={
        "command": str(modules / ".bin" / "playwright-mcp"),
        "args": ["--headless", "--no-sandbox", "--isolated", "--executable-path", browser]})
    library = Library(home=tmp_path)
    key = library.ensure(smollm2_path).key
    with library, McpServer(tools=[HUB_SEARCH], on={"tools/call": lambda reply: reply.result(
            text_result("1. tiny/story-model, 2. tiny/code-model"))}) as hub, \
            raw_server(serve_page) as page:
        store = Store()
        server = make_server(library, store, port=0, mcp_json=mcp_json, max_tool_rounds=1).start()
        try:
            token = Tokens(tmp_path / TOKENS_NAME).create("bob", ["chat", "mcp", "ephemeral_mcp"])
            offered = [ephemeral(hub, "huggingface", allowed_tools=["model_search"]),
                       {"type": "plugin", "id": "mcp/playwright", "allowed_tools": ["browser_navigate"]}]
            first = stream(Client(server), token, model=key, integrations=offered,
                           input=FIRST)
            second = stream(Client(server), token, model=key, integrations=offered, input=(
                'Repeat: <tool_call>{"name": "browser_navigate", '
                f'"arguments": {{"url": "{page}"}}}}</tool_call>'))
        finally:
            server.close()
            store.close()
    with capsys.disabled():
        for events in (first, second):
            print("\n", *(event["type"] for event in events if "delta" not in event["type"]))
    search, visit = first[-1]["result"]["output"][0], second[-1]["result"]["output"][0]
    assert (search["tool"], search["provider_info"]["server_label"]) == ("model_search", "huggingface")
    assert (visit["tool"], visit["provider_info"]["plugin_id"]) == ("browser_navigate", "mcp/playwright")
    assert isinstance(visit["arguments"]["url"], str)
