"""Tools over HTTP: statuses, comments while a tool is slow, clients that go away, mcp.json."""
import json
import socket
import subprocess
import sys
import threading

import pytest
from helpers_chat import KEY, Client, ScriptedLibrary
from helpers_doors import environment, tinychat_command
from helpers_mcp import wait_until
from helpers_tools import (
    ephemeral, held_open, in_rounds, call, stdio_entry, text_result, weather_server, write_mcp_json)

from tinychat.errors import TinychatError
from tinychat.server import check_settings, make_server
from tinychat.server.auth import TOKENS_NAME, Tokens
from tinychat.store import Store

PARIS = call("weather", city="Paris")
CHAT = "/api/v1/chat"


@pytest.fixture
def serve(tmp_path):
    """serve(**settings) -> Client of a server whose model calls a tool and then answers."""
    running = []

    def start(*texts, **settings):
        library = ScriptedLibrary(in_rounds(*(texts or (PARIS, "Sunny."))))
        library.home = tmp_path
        store = Store(tmp_path / "responses.sqlite3")
        server = make_server(library, store, port=0, **{"shutdown_s": 2.0, **settings}).start()
        running.append((server, store))
        client = Client(server)
        client.library = library
        return client
    yield start
    for server, store in running:
        server.close()
        store.close()


def test_a_tool_is_used_streaming_or_not(serve):
    """C-117, C-061."""
    client = serve()
    with weather_server() as server:
        whole = client.chat(integrations=[ephemeral(server)])
        events = client.stream(integrations=[ephemeral(server)])
    assert [item["type"] for item in whole["output"]] == ["tool_call", "message"]
    assert events[-1][1]["result"]["output"] == whole["output"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_server_is_a_502_streaming_or_not(serve, stream):
    """C-115, C-016."""
    client = serve()
    assert client.error(integrations=[ephemeral("http://127.0.0.1:9/mcp")], stream=stream) == (
        502, "connection_failed", "integrations.0")


def test_a_private_address_is_a_403_where_only_public_ones_are_allowed(serve):
    """C-122."""
    assert serve(ephemeral_mcp="public").error(integrations=[ephemeral("http://localhost:9/")]) == (
        403, "private_address_refused", "integrations.0.server_url")


def test_comments_keep_a_stream_alive_while_a_tool_is_slow(serve):
    """C-074."""
    client = serve(sse_keepalive_seconds=0.05, heartbeat_s=0.01)

    def slow(reply):
        threading.Event().wait(0.4)
        reply.result(text_result("sunny"))
    with weather_server(on={"tools/call": slow}) as server:
        body = json.dumps({"model": KEY, "input": "hi", "stream": True,
                           "integrations": [ephemeral(server)]}).encode()
        _, _, data = client.request("POST", CHAT, body, {"Content-Type": "application/json"})
    between = data[data.index(b"tool_call.arguments"):data.index(b"tool_call.success")]
    assert between.count(b"\n: ") >= 2


def test_a_client_that_goes_away_ends_the_running_call(serve):
    """M-081, C-075."""
    client = serve(heartbeat_s=0.02)
    with held_open() as (hang, come), weather_server(on={"tools/call": hang}) as server:
        body = json.dumps({"model": KEY, "input": "hi", "stream": True,
                           "integrations": [ephemeral(server)]}).encode()
        sock = socket.create_connection(("127.0.0.1", client.server.port), 10)
        with sock:
            sock.sendall(b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
            assert come.wait(10)
        wait_until(lambda: server.gone, "the call's connection was never closed")
        assert client.library.wait_idle()


def test_header_values_are_in_no_answer_and_no_store(serve, tmp_path):
    """C-119, C-015."""
    client = serve()
    with weather_server() as server:
        good = ephemeral(server, headers={"X-Key": "top-secret-value"})
        client.chat(integrations=[good])
        assert all(seen.headers["x-key"] == "top-secret-value" for seen in server.seen)
    _, answer = client.post({"model": KEY, "input": "hi", "integrations": [
        {**good, "server_url": "http://127.0.0.1:9/"}]})
    assert "top-secret" not in json.dumps(answer)
    assert all(b"top-secret" not in path.read_bytes() for path in tmp_path.glob("responses*"))


def test_a_plugin_of_mcp_json_needs_a_token_and_works_with_one(serve, tmp_path):
    """C-110, C-111, C-116, C-112."""
    path = write_mcp_json(tmp_path, files=stdio_entry(tmp_path), broken=stdio_entry(
        tmp_path, source="import sys; sys.exit(3)"))
    client = serve(mcp_json=path)
    token = Tokens(tmp_path / TOKENS_NAME).create("bob", ["chat", "mcp"])

    def ask(plugin, token):
        status, _, data = client.request(
            "POST", CHAT, json.dumps({"model": KEY, "input": "hi", "integrations": [plugin]}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {token}"})
        return status, json.loads(data)

    assert ask("mcp/files", "wrong")[0] == 401
    status, answer = ask("mcp/files", token)
    assert status == 200 and answer["output"][0]["provider_info"]["plugin_id"] == "mcp/files"
    status, answer = ask("mcp/broken", token)
    assert (status, answer["error"]["type"]) == (502, "plugin_connection_error")
    status, answer = ask("mcp/none", token)
    assert (status, answer["error"]["code"]) == (400, "plugin_not_found")


def test_a_file_turns_on_what_it_needs_and_contradictions_are_refused():
    """C-110."""
    decided = check_settings(mcp_json="mcp.json")
    assert decided.require_auth and decided.allow_mcp_json
    with pytest.raises(TinychatError, match="auth"):
        check_settings(mcp_json="mcp.json", require_auth=False)
    with pytest.raises(TinychatError, match="auth"):
        check_settings(allow_mcp_json=True)
    plain = check_settings()
    assert not plain.require_auth and not plain.allow_mcp_json


def test_the_command_refuses_mcp_json_without_auth(tmp_path):
    done = tinychat_command("serve", "--mcp-json", "x.json", "--no-require-auth", home=tmp_path)
    assert done.returncode == 1 and "auth" in done.stderr and done.stderr.count("\n") == 1


def test_the_command_makes_the_first_token_and_prints_it_once(tmp_path, smollm2_path):
    path = write_mcp_json(tmp_path, files=stdio_entry(tmp_path))
    command = [sys.executable, "-m", "tinychat", "serve", str(smollm2_path), "--port", "0",
               "--mcp-json", str(path)]
    tokens = []
    for _ in range(2):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                 env=environment(tmp_path), cwd=tmp_path)
        try:
            for line in child.stderr:
                if "is ready" in line:
                    break
        finally:
            child.terminate()
            tokens.append(child.communicate(timeout=30)[0].split())
    assert [len(found) for found in tokens] == [1, 0]
    assert Tokens(tmp_path / TOKENS_NAME).check(f"Bearer {tokens[0][0]}").permissions
