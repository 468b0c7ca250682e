"""Tokens and what they permit: the file, the header, the endpoints, the command line."""
import json
import os
import sqlite3
import stat
import threading

import pytest
from contract_checker import check_error
from helpers_chat import KEY, Client, ScriptedLibrary, says
from helpers_doors import WAIT_S, tinychat_command

from tinychat.contract import EphemeralServer, Plugin
from tinychat.errors import InvalidRequest, TinychatError
from tinychat.server import auth, make_server
from tinychat.server.auth import Token, Tokens
from tinychat.server.listener import ServerSettings
from tinychat.store import Store

CHAT, MODELS = "/api/v1/chat", "/api/v1/models"
ENDPOINTS = [("POST", CHAT), ("GET", MODELS), ("POST", f"{MODELS}/load"),
             ("POST", f"{MODELS}/unload"), ("POST", f"{MODELS}/download"),
             ("GET", f"{MODELS}/download/status/job_0123456789")]
EPHEMERAL = {"type": "ephemeral_mcp", "server_label": "x", "server_url": "http://127.0.0.1:9/mcp",
             "headers": {"X-Key": "header-secret"}}


@pytest.fixture
def tokens(tmp_path):
    return Tokens(tmp_path / "deep" / auth.TOKENS_NAME)


@pytest.fixture
def guarded(tmp_path):
    """guarded(**settings): a Client of a server that asks for tokens, and its Tokens."""
    running = []

    def start(**settings):
        library = ScriptedLibrary(says("Hello."))
        library.home = tmp_path
        store = Store()
        server = make_server(library, store, port=0, **{"require_auth": True, **settings}).start()
        running.append((server, store))
        return Client(server), Tokens(tmp_path / auth.TOKENS_NAME)
    yield start
    for server, store in running:
        server.close()
        store.close()


def ask(client, method, path, token=None, body=None, scheme="Bearer"):
    """(status, headers, parsed body), errors checked against the contract."""
    headers = {"Content-Type": "application/json"} if method == "POST" else {}
    if token is not None:
        headers["Authorization"] = f"{scheme} {token}"
    status, headers, data = client.request(
        method, path, json.dumps(body or {}).encode() if method == "POST" else None, headers)
    value = json.loads(data)
    assert status < 400 or check_error(value, status) == []
    return status, headers, value


def code_of(answer):
    status, _, value = answer
    return status, value["error"]["code"]


# ---- the file

def test_a_token_is_shown_once_and_kept_as_a_hash_with_mode_0600(tokens):
    token = tokens.create("bob", ["chat", "models"])
    assert len(token) > 40 and tokens.check(f"Bearer {token}").name == "bob"
    assert token.encode() not in tokens.path.read_bytes()
    assert token.removeprefix(auth.TOKEN_PREFIX).encode() not in tokens.path.read_bytes()
    if os.name == "posix":
        assert stat.S_IMODE(tokens.path.stat().st_mode) == 0o600
    known, = tokens.list()
    assert (known.name, known.permissions) == ("bob", ("chat", "models"))
    assert known.created_at.endswith("Z") and token not in repr(known)


def test_a_revoked_token_is_unknown_at_once(tokens):
    token = tokens.create("bob", ["chat"])
    tokens.revoke("bob")
    assert tokens.list() == []
    with pytest.raises(InvalidRequest):
        tokens.check(f"Bearer {token}")
    with pytest.raises(InvalidRequest, match="no token named bob"):
        tokens.revoke("bob")


@pytest.mark.parametrize("name, permissions, said", [
    ("bob", ["chat"], "already"), ("", ["chat"], "1 to 64"), ("a b", ["chat"], "1 to 64"),
    ("x" * 65, ["chat"], "1 to 64"), ("eve", [], "at least one"), ("eve", ["fly"], "'fly'"),
    ("eve", ["mcp:"], "mcp:LABEL"),
])
def test_a_senseless_token_is_refused(tokens, name, permissions, said):
    tokens.create("bob", ["chat"])
    with pytest.raises(InvalidRequest, match=said):
        tokens.create(name, permissions)
    assert [token.name for token in tokens.list()] == ["bob"]


def test_many_threads_create_tokens_at_once(tokens):
    made = []
    threads = [threading.Thread(target=lambda i=i: made.append(tokens.create(f"t{i}", ["chat"])))
               for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert {tokens.check(f"Bearer {token}").name for token in made} == {f"t{i}" for i in range(8)}


def test_a_file_that_is_no_database_is_one_clear_error_without_its_path(tokens):
    tokens.path.parent.mkdir(parents=True)
    tokens.path.write_bytes(b"no database at all, though quite long enough" * 100)
    with pytest.raises(TinychatError, match="cannot be read or written") as error:
        tokens.check("Bearer x")
    assert str(tokens.path.parent) not in error.value.message


# ---- the header

@pytest.mark.parametrize("method, path", ENDPOINTS)
def test_without_a_valid_token_every_endpoint_answers_the_same_401(guarded, method, path):
    """C-145."""
    client, tokens = guarded()
    tokens.create("bob", ["chat", "models"])
    bodies = set()
    for token, scheme in [(None, ""), ("tc-wrong", "Bearer"), ("", "Bearer"), ("x y", "Bearer"),
                          ("Ym9iOg==", "Basic"), ("tc-" + "0" * 48, "Bearer")]:
        status, headers, value = ask(client, method, path, token, scheme=scheme)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        bodies.add(json.dumps(value))
    assert len(bodies) == 1 and "invalid_api_key" in bodies.pop()


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_scheme_is_taken_in_any_case(guarded, scheme):
    """C-145."""
    client, tokens = guarded()
    token = tokens.create("bob", ["chat"])
    assert ask(client, "GET", MODELS, token, scheme=scheme)[0] == 200


def test_an_unknown_path_below_api_is_401_before_it_is_404(guarded):
    """C-146."""
    client, tokens = guarded()
    assert code_of(ask(client, "GET", "/api/v1/nothing")) == (401, "invalid_api_key")
    assert code_of(ask(client, "PUT", CHAT)) == (401, "invalid_api_key")
    token = tokens.create("bob", ["chat"])
    assert code_of(ask(client, "GET", "/api/v1/nothing", token)) == (404, "unknown_endpoint")
    assert code_of(ask(client, "GET", "/nothing")) == (404, "unknown_endpoint")


def test_health_and_metrics_need_no_token(guarded):
    client, _ = guarded()
    for path in ("/healthz", "/metrics"):
        assert client.request("GET", path)[0] == 200


def test_a_preflight_needs_no_token_and_a_401_allows_any_origin(guarded):
    """C-149."""
    client, _ = guarded(cors=True)
    assert client.request("OPTIONS", CHAT)[0] == 204
    status, headers, _ = ask(client, "GET", MODELS)
    assert (status, headers["Access-Control-Allow-Origin"]) == (401, "*")


def test_a_token_that_is_revoked_while_the_server_runs_stops_working(guarded):
    client, tokens = guarded()
    token = tokens.create("bob", ["chat"])
    body = {"model": KEY, "input": "hi"}
    assert ask(client, "POST", CHAT, token, body)[0] == 200
    tokens.revoke("bob")
    assert ask(client, "POST", CHAT, token, body)[0] == 401


# ---- permissions

def test_a_token_without_models_chats_and_lists_and_nothing_more(guarded):
    """C-147."""
    client, tokens = guarded()
    token = tokens.create("bob", ["chat"])
    assert ask(client, "POST", CHAT, token, {"model": KEY, "input": "hi"})[0] == 200
    assert ask(client, "GET", MODELS, token)[0] == 200
    for path in ("load", "unload", "download"):
        assert code_of(ask(client, "POST", f"{MODELS}/{path}", token)) == (403, "permission_denied")


def test_a_token_without_chat_may_not_chat(guarded):
    client, tokens = guarded()
    token = tokens.create("loader", ["models"])
    answer = ask(client, "POST", CHAT, token, {"model": KEY, "input": "hi"})
    assert code_of(answer) == (403, "permission_denied")


@pytest.mark.parametrize("permissions, integrations, expected", [
    (["chat"], [EPHEMERAL], (403, "integrations.0")),
    (["chat", "mcp"], [EPHEMERAL], (403, "integrations.0")),
    (["chat", "ephemeral_mcp"], [EPHEMERAL, "mcp/files"], (403, "integrations.1")),
    (["chat", "mcp:other"], ["mcp/files"], (403, "integrations.0")),
    (["chat", "mcp"], ["mcp/files"], (400, "integrations.0")),  # permitted, but there is none
    (["chat", "mcp:files"], [{"type": "plugin", "id": "mcp/files"}], (400, "integrations.0")),
    (["chat", "ephemeral_mcp"], [EPHEMERAL], (502, "integrations.0")),  # nobody listens there
])
def test_integrations_need_the_tokens_permission(guarded, permissions, integrations, expected):
    """C-015."""
    client, tokens = guarded(allow_mcp_json=True)
    token = tokens.create("bob", permissions)
    status, _, value = ask(client, "POST", CHAT, token,
                           {"model": KEY, "input": "hi", "integrations": integrations})
    assert (status, value["error"]["param"]) == expected
    assert "header-secret" not in json.dumps(value) and token not in json.dumps(value)


def test_a_switched_off_integration_is_403_whatever_the_token(guarded):
    """C-109, C-110."""
    client, tokens = guarded(ephemeral_mcp="off")
    token = tokens.create("bob", ["chat", "ephemeral_mcp", "mcp"])
    for integration, word in ((EPHEMERAL, "ephemeral_mcp"), ("mcp/x", "allow_mcp_json")):
        status, _, value = ask(client, "POST", CHAT, token, {
            "model": KEY, "input": "hi", "integrations": [integration]})
        assert (status, value["error"]["code"], value["error"]["param"]) \
            == (403, "permission_denied", "integrations.0")
        assert word in value["error"]["message"]


def test_mcp_json_without_auth_starts_no_server():
    """C-110."""
    with pytest.raises(TinychatError, match="auth"):
        make_server(ScriptedLibrary(says("x")), None, port=0, allow_mcp_json=True)


@pytest.mark.parametrize("host, expected", [
    ("127.0.0.1", "local"), ("localhost", "local"), ("::1", "local"), ("0.0.0.0", "off")])
def test_ephemeral_servers_are_local_only_where_the_server_is(host, expected):
    from tinychat.server import check_settings
    assert check_settings(host=host).ephemeral_mcp == expected
    assert check_settings(host=host, ephemeral_mcp="public").ephemeral_mcp == "public"


def test_without_auth_integrations_depend_on_the_settings_alone():
    server = EphemeralServer("x", "http://h")
    local = ServerSettings(ephemeral_mcp="local")
    assert auth.refusal(local, None, server) is None
    assert "off" in auth.refusal(ServerSettings(ephemeral_mcp="off"), None, server)
    assert "mcp.json" in auth.refusal(local, None, Plugin("mcp/x"))
    allowed = ServerSettings(ephemeral_mcp="local", allow_mcp_json=True)
    assert auth.refusal(allowed, Token("t", ("mcp:x",), ""), Plugin("mcp/x")) is None
    assert auth.refusal(allowed, Token("t", ("mcp:x",), ""), Plugin("mcp/y")) is not None


# ---- the command line

def test_the_command_prints_the_token_alone_and_lists_and_revokes(tmp_path):
    made = tinychat_command("token", "create", "bob", "--permissions", "chat,models,mcp:files",
                            home=tmp_path)
    token = made.stdout.strip()
    assert made.returncode == 0 and made.stdout == token + "\n" and token not in made.stderr
    tokens = Tokens(tmp_path / auth.TOKENS_NAME)
    assert tokens.check(f"Bearer {token}").permissions == ("chat", "models", "mcp:files")
    listed = tinychat_command("token", "list", home=tmp_path)
    assert "bob" in listed.stdout and "chat,models,mcp:files" in listed.stdout
    assert token not in listed.stdout
    again = tinychat_command("token", "create", "bob", home=tmp_path)
    assert again.returncode == 1 and again.stdout == "" and again.stderr.count("\n") == 1
    assert tinychat_command("token", "revoke", "bob", home=tmp_path).returncode == 0
    empty = tinychat_command("token", "list", home=tmp_path)
    assert empty.stdout == "" and "token create" in empty.stderr


def test_a_token_file_is_readable_by_sqlite(tokens):
    tokens.create("bob", ["chat"])
    db = sqlite3.connect(tokens.path)
    assert db.execute("SELECT name, length(hash) FROM tokens").fetchall() == [("bob", 32)]
    db.close()
