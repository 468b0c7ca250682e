"""Running a server: health, metrics, the access log, shutdown, settings from four places."""
import json
import logging
import re
import threading

import pytest
from contract_checker import check_error, check_stream
from helpers_chat import KEY, Client, ScriptedLibrary, says
from helpers_doors import WAIT_S, golden, put, tinychat_command, wait_until

from tinychat.cli import settings as cli_settings
from tinychat.errors import TinychatError
from tinychat.library import Library
from tinychat.server import make_server
from tinychat.server.metrics import Metrics
from tinychat.store import Store

CHAT, MODELS = "/api/v1/chat", "/api/v1/models"
SAMPLE = re.compile(r'[a-z_]+(\{([a-z_]+="([^"\\\n]|\\.)*",?)*\})? [-+0-9.e]+')
LINE = re.compile(r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ client=127\.0\.0\.1 token=\S+ method=(\S+) "
                  r"path=(\S+) status=(\d+) bytes=(\d+) seconds=[\d.]+ end=(\w+)")


@pytest.fixture
def serve():
    """serve(library, **settings): a Client of a running server, closed in the end."""
    running = []

    def start(library, **settings):
        store = Store()
        server = make_server(library, store, port=0, **{"shutdown_s": 0.2, "heartbeat_s": 0.02,
                                                        **settings}).start()
        running.append((server, store))
        return Client(server)
    yield start
    for server, store in running:
        server.close()
        store.close()


def scraped(client):
    """Samples by name and labels; the format is checked line by line."""
    status, headers, data = client.request("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found, kinds = {}, {}
    for line in data.decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            assert SAMPLE.fullmatch(line), line
            name, _, value = line.rpartition(" ")
            assert name.partition("{")[0] in kinds
            found[name] = float(value)
    assert data.endswith(b"\n")
    return found


# ---- health and metrics

def test_health_is_a_short_yes(serve):
    client = serve(ScriptedLibrary(says("x")))
    status, headers, data = client.request("GET", "/healthz")
    assert (status, json.loads(data)) == (200, {"status": "ok"})
    status, headers, data = client.request("POST", "/healthz", b"{}")
    assert (status, headers["Allow"]) == (405, "GET") and check_error(json.loads(data), 405) == []


def test_metrics_count_requests_tokens_pages_and_loads(serve, tmp_path):
    put(tmp_path / "models" / "qwen.gguf", golden("qwen2-a"))
    with Library(home=tmp_path, default_context_length=256, parallel=2) as library:
        client = serve(library)
        answer = client.chat(model="qwen", max_output_tokens=5)
        client.error(model="nope")
        client.request("GET", "/some/path/nobody/has")
        client.request("GET", "/another")
        def is_settled():  # requests are counted, and connections forgotten, once they have ended
            now = scraped(client)
            return now.get('tinychat_http_requests_total{path="other",status="404"}') == 2 and \
                now['tinychat_http_connections'] == 1
        wait_until(is_settled)
        now = scraped(client)
    for sample, value in {
        'tinychat_http_requests_total{path="/api/v1/chat",status="200"}': 1,
        'tinychat_http_requests_total{path="/api/v1/chat",status="404"}': 1,
        'tinychat_tokens_total{model="qwen",kind="prefilled"}': answer["stats"]["input_tokens"],
        'tinychat_tokens_total{model="qwen",kind="generated"}': 5,
        'tinychat_model_loads_total{model="qwen"}': 1,
        'tinychat_model_load_failures_total{model="qwen"}': 0,
        'tinychat_requests_waiting{model="qwen"}': 0,
        'tinychat_kv_pages{model="qwen",state="used"}': 0,
    }.items():
        assert now[sample] == value, sample
    assert now['tinychat_kv_pages{model="qwen",state="free"}'] > 0
    drafted, accepted = (now[f'tinychat_draft_tokens_total{{model="qwen",kind="{kind}"}}']
                         for kind in ("drafted", "accepted"))
    assert drafted >= accepted >= 0
    assert now['tinychat_model_load_seconds_total{model="qwen"}'] > 0
    assert now['tinychat_model_memory_bytes{model="qwen"}'] > 100_000


def test_labels_are_escaped():
    metrics = Metrics(lambda path: path)
    metrics.request('a"b\\c\nd', 200, 0.1)
    line, = [line for line in metrics.text(ScriptedLibrary(says("x")), 0).splitlines()
             if line.startswith("tinychat_http_requests_total{")]
    assert SAMPLE.fullmatch(line)


# ---- the access log

def test_each_request_is_one_line_without_its_contents(serve, caplog):
    caplog.set_level(logging.INFO, "tinychat.access")
    client = serve(ScriptedLibrary(says("a secret answer")))
    client.chat("a secret question")
    client.stream("a secret question", system_prompt="a secret prompt")
    client.request("GET", MODELS + "?key=secret", headers={"Authorization": "Bearer secret"})
    client.request("GET", "/secretless/" + "x" * 3000)
    wait_until(lambda: len(lines(caplog)) == 4)
    assert [LINE.fullmatch(line).group(1, 2, 3, 5) for line in lines(caplog)[:3]] == [
        ("POST", CHAT, "200", "ok"), ("POST", CHAT, "200", "ok"), ("GET", MODELS, "200", "ok")]
    assert all(len(line) < 400 and "secret " not in line and "=secret" not in line
               for line in lines(caplog))


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "tinychat.access"]


def test_the_log_tells_who_left_early(serve, caplog):
    caplog.set_level(logging.INFO, "tinychat.access")
    gate = threading.Semaphore(1)
    library = ScriptedLibrary(says("x" * 100), gate=gate)
    client = serve(library)
    connection = client.connect()
    connection.request("POST", CHAT, json.dumps({"model": KEY, "input": "hi", "stream": True}),
                       {"Content-Type": "application/json"})
    connection.getresponse().read(10)
    connection.sock.close() if connection.sock else None
    connection.close()
    gate.release(5)
    wait_until(lambda: lines(caplog))
    assert LINE.fullmatch(lines(caplog)[0])[5] == "gone"


# ---- the end

def stream_to_its_end(client, results):
    body = {"model": KEY, "input": "hi", "stream": True}
    status, _, data = client.request("POST", CHAT, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    results.append((status, data))


@pytest.mark.parametrize("finishes", [True, False])
def test_at_shutdown_a_running_chat_finishes_or_gets_its_error_event(finishes):
    gate, store = threading.Semaphore(0), Store()
    library = ScriptedLibrary(says("abcdefgh"), gate=gate)
    server = make_server(library, store, port=0, heartbeat_s=0.02,
                         shutdown_s=WAIT_S if finishes else 0.1).start()
    client, results = Client(server), []
    thread = threading.Thread(target=stream_to_its_end, args=(client, results))
    thread.start()
    wait_until(lambda: library.engine.submitted)
    closing = threading.Thread(target=server.close)
    closing.start()
    wait_until(lambda: server.closing)
    if finishes:
        gate.release(20)
    for one in (thread, closing):
        one.join(WAIT_S)
        assert not one.is_alive()
    (status, data), = results
    assert status == 200 and check_stream(data) == []
    assert (b"event: error" in data) != finishes
    assert (b"response_id" in data) == finishes
    assert finishes or b"server_overloaded" in data
    assert library.wait_idle()
    store.close()


def test_at_shutdown_a_chat_that_does_not_stream_gets_a_503():
    library, store = ScriptedLibrary(says("abc"), gate=threading.Semaphore(0)), Store()
    server = make_server(library, store, port=0, heartbeat_s=0.02, shutdown_s=0.1).start()
    client, results = Client(server), []
    thread = threading.Thread(target=lambda: results.append(client.error()))
    thread.start()
    wait_until(lambda: library.engine.submitted)
    server.close()
    thread.join(WAIT_S)
    assert results == [(503, "server_overloaded", None)]
    store.close()


def test_at_shutdown_a_chat_that_waits_for_a_load_gets_its_error_event():
    gate, store = threading.Event(), Store()
    library = ScriptedLibrary(says("abc"), loaded=False, load_gate=gate)
    server = make_server(library, store, port=0, heartbeat_s=0.02, shutdown_s=0.1).start()
    client, results = Client(server), []
    thread = threading.Thread(target=stream_to_its_end, args=(client, results))
    thread.start()
    wait_until(lambda: server._connections and any(server._connections.values()))
    server.close()
    thread.join(WAIT_S)
    gate.set()
    (status, data), = results
    assert status == 200 and check_stream(data) == [] and b"server_overloaded" in data
    store.close()


# ---- settings

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    monkeypatch.delenv("TINYCHAT_CONFIG", raising=False)
    return tmp_path


def printed(home, *args, **variables):
    done = tinychat_command("serve", "--print-config", *args, home=home, **variables)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return cli_settings.tomllib.loads(done.stdout), done.stdout


def test_print_config_shows_flags_over_environment_over_file_over_defaults(home):
    (home / "config.toml").write_text("port = 1\nparallel = 2\ncors = true\nqueue_limit = 9\n"
                                      'models_folders = ["/a", "/b"]\n')
    values, text = printed(home, "--port", "3", TINYCHAT_PORT="2", TINYCHAT_PARALLEL="5")
    assert (values["port"], values["parallel"], values["queue_limit"]) == (3, 5, 9)
    assert values["cors"] is True and values["models_folders"] == ["/a", "/b"]
    assert values["default_ttl_seconds"] == 3600 and values["ephemeral_mcp"] == "local"
    for line in ("port = 3  # flag", "parallel = 5  # TINYCHAT_PARALLEL", "queue_limit = 9  # file",
                 "jit = true  # default"):
        assert line in text.splitlines()


def test_what_print_config_says_is_a_settings_file_that_means_the_same(home):
    values, text = printed(home, "--cors", "--store", 'odd "name" \\ ü.sqlite3', "--host", "::1",
                           "--default-ttl-seconds", "0.1234567", "--shutdown-seconds", "1234567",
                           "--require-auth", "--models-folders", "~/models")
    assert values["shutdown_seconds"] == 1234567 and values["default_ttl_seconds"] == 0.1234567
    assert not values["models_folders"][0].startswith("~")
    (home / "again.toml").write_text(text, encoding="utf-8")
    assert printed(home, "--config", home / "again.toml")[0] == values
    assert printed(home, TINYCHAT_CONFIG=str(home / "again.toml"))[0] == values


@pytest.mark.parametrize("text, said", [
    ("queue_limit = 'many'",
     "queue_limit in the settings file: expected a count of at least 1, got 'many'"),
    ("colour = 1", "no setting is called 'colour'"),
    ("port = ", "no settings file"),
    ("[server]\nport = 1", "no setting is called 'server'"),
    ("cors = [1]", "no kind of value"),
    ("parallel = 0", "parallel in the settings file: expected a count of at least 1"),
    ("allow_mcp_json = true", "auth"),
    ("ephemeral_mcp = 'everywhere'", "expected off, public or local"),
    ("idle_timeout_seconds = 0", "a number of seconds above 0"),
    ("host = true", "host in the settings file: expected an address, got true"),
    ("store = {a = 1}", "no kind of value"),
    ("\x00", "no settings file"), ("a = " + "[" * 5000, "no settings file"),
])
def test_a_wrong_settings_file_is_one_line(home, text, said):
    (home / "config.toml").write_text(text)
    done = tinychat_command("serve", "--port", "0", home=home)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_settings_file_that_is_named_must_be_there(home):
    with pytest.raises(TinychatError, match="absent.toml"):
        cli_settings.read_config(str(home / "absent.toml"))
    assert cli_settings.read_config(None) == {}


@pytest.mark.parametrize("flags", [["--allow-mcp-json"], ["--allow-mcp-json", "--no-require-auth"]])
def test_mcp_json_without_auth_refuses_to_start_in_one_line(home, flags):
    """C-110."""
    done = tinychat_command("serve", *flags, home=home)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "auth" in done.stderr


def test_every_setting_reaches_somebody():
    from inspect import signature
    from dataclasses import fields
    from tinychat.server.listener import ServerSettings
    rooms = {"server": {field.name for field in fields(ServerSettings)},
             "library": set(signature(Library).parameters),
             "store": set(signature(Store).parameters)}
    for setting in cli_settings.SETTINGS:
        room, _, name = setting.takes.partition(".")
        assert name in rooms[room] if room else setting.name == "access_log", setting.name
