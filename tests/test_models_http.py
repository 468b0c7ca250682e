"""Load, unload, JIT, growth and the queue over HTTP, with a real (tiny) model behind."""
import json
import random
import threading

import pytest
from contract_checker import check_load, check_models, check_stream, check_unload, parse_sse
from helpers_chat import Client
from helpers_doors import WAIT_S, golden, joined, put, started, wait_until

from tinychat.library import Library, residents
from tinychat.server import make_server
from tinychat.server.connection import Connection
from tinychat.store import Store

CHAT, MODELS = "/api/v1/chat", "/api/v1/models"
LOAD, UNLOAD = f"{MODELS}/load", f"{MODELS}/unload"
LONG = {"temperature": 0, "context_length": 4096, "store": False}  # the tiny model never ends its turn


class ModelsClient(Client):
    """Every answer of the models' endpoints is held against the contract."""

    def ask(self, path, **body):
        """(status, parsed body)."""
        status, _, data = self.request("POST", path, json.dumps(body).encode(),
                                       {"Content-Type": "application/json"})
        return status, json.loads(data)

    def load(self, model, **fields):
        status, body = self.ask(LOAD, model=model, **fields)
        assert status == 200, body
        assert check_load(body, echo=fields.get("echo_load_config", False)) == []
        return body

    def unload(self, name):
        status, body = self.ask(UNLOAD, instance_id=name)
        assert status == 200 and check_unload(body) == []
        return body["instance_id"]

    def refused(self, path, **body):
        """(status, code, param)."""
        status, answer = self.ask(path, **body)
        assert status != 200
        error = answer["error"]
        return status, error["code"], error.get("param")

    def instances(self):
        """By key, the configuration of its instance."""
        body = json.loads(self.request("GET", MODELS)[2])
        assert check_models(body) == []
        found = {model["key"]: model["loaded_instances"] for model in body["models"]}
        assert all(len(instances) <= 1 for instances in found.values())
        assert all(instances[0]["id"] == key for key, instances in found.items() if instances)
        return {key: instances[0]["config"] for key, instances in found.items() if instances}


@pytest.fixture
def serve(tmp_path):
    """serve(**library options): a client of a server with the models qwen and llama."""
    put(tmp_path / "models" / "qwen.gguf", golden("qwen2-a"))
    put(tmp_path / "models" / "llama.gguf", golden("llama3-a.Q4_0"))
    running = []

    def start(**options):
        library = Library(home=tmp_path, **{"default_context_length": 256, **options})
        store = Store()
        server = make_server(library, store, port=0, shutdown_s=0.2, heartbeat_s=0.02).start()
        running.append((server, library, store))
        client = ModelsClient(server)
        client.library = library
        return client
    yield start
    for server, library, store in running:
        server.close()
        library.close()
        store.close()


def running(client, key="qwen"):
    model = client.library.instance(key)
    return model.engine.stats.running if model else 0


# ---- load

def test_a_load_passes_the_contract_and_its_instance_is_listed(serve):
    """C-129, C-128, C-045."""
    client = serve()
    body = client.load("qwen")
    assert (body["type"], body["instance_id"], body["status"]) == ("llm", "qwen", "loaded")
    assert body["load_time_seconds"] > 0
    assert client.instances() == {"qwen": {"context_length": 256, "eval_batch_size": 256,
                                           "parallel": 4}}
    assert client.chat(model="qwen", max_output_tokens=1)["model_instance_id"] == "qwen"


def test_the_configuration_is_echoed_exactly_on_request(serve):
    """C-129."""
    client = serve()
    fields = {"context_length": 128, "eval_batch_size": 32, "flash_attention": True,
              "num_experts": 4, "offload_kv_cache_to_gpu": False}
    body = client.load("qwen", echo_load_config=True, **fields)
    assert body["load_config"] == {"context_length": 128, "eval_batch_size": 32}
    assert "load_config" not in client.load("qwen", echo_load_config=False)


def test_loading_twice_gives_one_instance_and_takes_no_time(serve):
    """C-130."""
    client = serve()
    client.load("qwen", context_length=100)
    assert client.load("qwen", context_length=100)["load_time_seconds"] == 0
    assert client.load("qwen")["load_time_seconds"] == 0
    assert client.load("qwen", context_length=120)["load_time_seconds"] > 0
    assert client.instances()["qwen"]["context_length"] == 120


@pytest.mark.parametrize("body, expected", [
    ({}, (400, "missing_required_parameter", "model")),
    ({"model": "nope"}, (404, "model_not_found", "model")),                        # C-131
    ({"model": 5}, (400, "invalid_type", "model")),
    ({"model": "qwen", "context_length": 0}, (400, "invalid_value", "context_length")),
    ({"model": "qwen", "context_length": 4097}, (400, "invalid_value", "context_length")),
    ({"model": "qwen", "eval_batch_size": 0}, (400, "invalid_value", "eval_batch_size")),
    ({"model": "qwen", "num_experts": 1.5}, (400, "invalid_type", "num_experts")),
    ({"model": "qwen", "flash_attention": 1}, (400, "invalid_type", "flash_attention")),
    ({"model": "qwen", "echo_load_config": "yes"}, (400, "invalid_type", "echo_load_config")),
    ({"model": "qwen", "ttl": 0}, (400, "invalid_value", "ttl")),
    ({"model": "qwen", "gpu": 1}, (400, "unrecognized_keys", "gpu")),
])
def test_a_senseless_load_is_refused(serve, body, expected):
    client = serve()
    assert client.refused(LOAD, **body) == expected
    assert client.instances() == {}


def test_a_load_that_cannot_fit_is_refused_with_both_figures(serve, monkeypatch):
    client = serve()
    monkeypatch.setattr("tinychat.library.loaded.available_memory", lambda: 1_000_000)
    status, body = client.ask(LOAD, model="qwen")
    assert (status, body["error"]["code"], body["error"]["param"]) == (500, "model_load_failed",
                                                                       "model")
    assert "needs" in body["error"]["message"] and "1.0 MB are available" in body["error"]["message"]


def test_a_load_with_ttl_goes_when_it_was_idle_for_so_long(serve):
    """C-140."""
    client = serve()
    client.load("qwen", ttl=1)
    client.load("llama")
    wait_until(lambda: list(client.instances()) == ["llama"])


# ---- unload

def test_unload_answers_the_id_and_the_list_shows_no_instance(serve):
    """C-132, C-133."""
    client = serve()
    client.load("qwen")
    assert client.unload("qwen") == "qwen" and client.instances() == {}
    assert client.refused(UNLOAD, instance_id="qwen") == (404, "model_not_found", "instance_id")
    assert client.refused(UNLOAD, instance_id="") == (400, "invalid_value", "instance_id")
    assert client.refused(UNLOAD) == (400, "missing_required_parameter", "instance_id")
    assert client.refused(UNLOAD, instance_id="qwen", x=1) == (400, "unrecognized_keys", "x")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_runs_while_its_instance_is_unloaded_ends_with_model_unloaded(serve, stream):
    """C-134, C-071, C-072."""
    client = serve(default_context_length=4096)
    client.load("qwen")
    if stream:
        request = started(client.stream, model="qwen", **LONG)
    else:
        request = started(client.error, model="qwen", **LONG)
    wait_until(lambda: running(client))
    assert client.unload("qwen") == "qwen"
    result = joined(*request)
    if not stream:
        assert result == (500, "model_unloaded", "model")
    else:
        names = [name for name, _ in result]
        assert names[-2:] == ["error", "chat.end"]
        assert result[-2][1]["error"]["code"] == "model_unloaded"
        assert "response_id" not in result[-1][1]["result"]


def test_stored_chats_outlive_their_model(serve):
    """C-096: unload and reload."""
    client = serve()
    first = client.chat(model="qwen", max_output_tokens=2)["response_id"]
    client.unload("qwen")
    assert client.chat(model="qwen", max_output_tokens=2, previous_response_id=first)


# ---- on demand

def test_with_jit_off_only_loaded_models_chat(serve):
    """C-139."""
    client = serve(jit=False)
    assert client.error(model="qwen") == (400, "model_not_loaded", "model")
    client.load("qwen")
    assert client.chat(model="qwen", max_output_tokens=1)


def test_with_jit_off_another_variant_than_the_loaded_one_is_not_loaded(serve, tmp_path):
    """C-139."""
    for quant in ("Q8_0", "Q4_0"):
        put(tmp_path / "models" / "pub" / "Two" / f"two-{quant}.gguf", golden(f"llama3-a.{quant}"))
    client = serve(jit=False)
    client.load("two@q4_0")
    assert client.error(model="two@q8_0") == (400, "model_not_loaded", "model")
    assert client.chat(model="two@q4_0", max_output_tokens=1)


def test_concurrent_first_requests_cause_one_load(serve, monkeypatch):
    """C-142, C-057, C-058, C-081."""
    client, loads, gate = serve(), [], threading.Event()
    original = residents.open_model

    def slow(*args):
        loads.append(1)
        gate.wait(WAIT_S)
        return original(*args)
    monkeypatch.setattr(residents, "open_model", slow)
    requests = [started(client.stream, model="qwen", max_output_tokens=2) for _ in range(4)]
    wait_until(lambda: loads)
    gate.set()
    for request in requests:
        events = joined(*request)
        assert [name for name, _ in events].count("model_load.start") == 1
        assert events[-1][1]["result"]["stats"]["model_load_time_seconds"] > 0
    assert loads == [1]
    assert "model_load.start" not in [n for n, _ in client.stream(model="qwen", max_output_tokens=1)]


def test_a_request_on_demand_evicts_the_last_one_and_not_an_explicit_load(serve):
    """C-141."""
    client = serve()
    client.chat(model="qwen", max_output_tokens=1)
    assert list(client.instances()) == ["qwen"]
    client.chat(model="llama", max_output_tokens=1)
    assert list(client.instances()) == ["llama"]
    client.load("llama")
    client.chat(model="qwen", max_output_tokens=1)
    assert set(client.instances()) == {"llama", "qwen"}


def test_an_idle_model_of_a_request_goes_after_its_ttl(serve):
    """C-140."""
    client = serve()
    client.chat(model="qwen", max_output_tokens=1, ttl=1)
    assert client.library.loaded("qwen").ttl_s == 1
    wait_until(lambda: client.instances() == {})


# ---- context

def test_a_larger_context_grows_the_one_instance(serve):
    """C-108."""
    client = serve()
    client.load("qwen", context_length=64)
    events = client.stream(model="qwen", context_length=512, max_output_tokens=2)
    names = [name for name, _ in events]
    assert names[:2] == ["chat.start", "model_load.start"] and "model_load.end" in names
    assert client.instances()["qwen"]["context_length"] == 512


def test_a_smaller_context_limits_the_request_and_leaves_the_instance(serve):
    """C-107."""
    client = serve()
    client.load("qwen", context_length=512)
    answer = client.chat(model="qwen", context_length=40, temperature=0)
    stats = answer["stats"]
    assert stats["input_tokens"] + stats["total_output_tokens"] <= 40
    assert client.instances()["qwen"]["context_length"] == 512
    assert client.error("word " * 100, model="qwen", context_length=40) \
        == (400, "context_length_exceeded", "input")


# ---- many at once

def test_more_requests_than_parallel_all_get_their_own_answers(serve):
    """C-143."""
    client = serve(parallel=2)
    texts = [f"request number {n}" for n in range(10)]
    alone = {text: client.chat(text, model="qwen", temperature=0, max_output_tokens=12)["output"]
             for text in texts}
    requests = {text: started(client.chat, input=text, model="qwen", temperature=0,
                                max_output_tokens=12) for text in texts}
    assert {text: joined(*request)["output"] for text, request in requests.items()} == alone


def test_beyond_the_queue_limit_a_request_is_503_with_retry_after(serve):
    """C-143."""
    client = serve(parallel=1, queue_limit=1, default_context_length=4096)
    client.load("qwen")
    first = started(client.error, model="qwen", **LONG)
    wait_until(lambda: running(client) == 1)
    second = started(client.error, model="qwen", **LONG)
    wait_until(lambda: client.library.loaded("qwen").engine.stats.waiting == 1)
    status, headers, data = client.request(
        "POST", CHAT, json.dumps({"model": "qwen", "input": "hi", "stream": True}).encode(),
        {"Content-Type": "application/json"})
    assert status == 503 and int(headers["Retry-After"]) >= 1
    assert json.loads(data)["error"]["code"] == "server_overloaded"
    client.unload("qwen")
    assert {joined(*first)[1], joined(*second)[1]} == {"model_unloaded"}


def test_a_client_that_reads_nothing_keeps_no_model_from_making_room(serve, monkeypatch):
    """C-076, C-141: the model is free once the engine has done with the answer."""
    sent, read_on = threading.Event(), threading.Event()
    original = Connection.send_head

    def stuck(self, *args, **options):
        original(self, *args, **options)
        if not sent.is_set():  # the first stream is stuck in its first event
            sent.set()
            read_on.wait(WAIT_S)
    monkeypatch.setattr(Connection, "send_head", stuck)
    client = serve()
    client.library.release(client.library.acquire("qwen"))
    slow = started(client.stream, model="qwen", max_output_tokens=5)
    assert sent.wait(WAIT_S)
    assert client.chat(model="llama", max_output_tokens=2)["output"]
    assert list(client.instances()) == ["llama"]
    read_on.set()
    assert joined(*slow)[-1][1]["result"]["stats"]["total_output_tokens"] == 5


# ---- pages

def test_a_continued_chat_reuses_its_parents_pages_though_another_ran_in_between(serve, caplog):
    """C-086; the log says how many tokens came from the cache."""
    caplog.set_level("INFO", "tinychat.chat")
    client = serve(default_context_length=2048, parallel=2)
    long = {"model": "qwen", "temperature": 0, "max_output_tokens": 4}
    first = client.chat("one two three four five " * 20, **long)
    for n in range(3):
        client.chat(f"{n} something quite different " * 20, **long)
    before = client.library.loaded("qwen").engine.stats
    second = client.chat("and now?", previous_response_id=first["response_id"], **long)
    after = client.library.loaded("qwen").engine.stats
    prefilled = after.n_prefilled_tokens - before.n_prefilled_tokens
    cached = after.n_reused_tokens - before.n_reused_tokens
    assert prefilled + cached == second["stats"]["input_tokens"]
    assert cached >= first["stats"]["input_tokens"] - 16 and prefilled < 64
    told = [record.getMessage() for record in caplog.records if record.name == "tinychat.chat"]
    assert f"{second['stats']['input_tokens']} tokens in, {cached} cached" in told[-1]


def test_the_stream_of_a_failed_load_has_no_end_of_the_load(serve, monkeypatch):
    """C-073."""
    client = serve()
    monkeypatch.setattr("tinychat.library.loaded.available_memory", lambda: 1000)
    body = {"model": "qwen", "input": "hi", "stream": True}
    status, _, data = client.request("POST", CHAT, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    assert status == 200 and check_stream(data, request=body) == []
    names = [name for name, _ in parse_sse(data)[0] if name != "model_load.progress"]
    assert names == ["chat.start", "model_load.start", "error", "chat.end"]


def test_racing_chats_loads_and_unloads_all_get_answers_and_leave_nothing_held(serve):
    """C-134, C-141, C-142: whatever meets, each answer is one that the contract has for it."""
    client, failures = serve(parallel=2), []

    def work(seed):
        draw = random.Random(seed)
        try:
            for _ in range(40):
                model = draw.choice(["qwen", "llama"])
                act = draw.randrange(6)
                if act == 0:
                    status, body = client.ask(UNLOAD, instance_id=model)
                    assert status == 200 or body["error"]["code"] == "model_not_found", body
                elif act == 1:
                    status, body = client.ask(LOAD, model=model,
                                              context_length=draw.choice([64, 128, 256]))
                    assert status == 200 or body["error"]["code"] == "model_unloaded", body
                elif act == 2:
                    body = {"model": model, "input": "hi", "max_output_tokens": 3, "ttl": 1,
                            "stream": True}
                    status, _, data = client.request("POST", CHAT, json.dumps(body).encode(),
                                                     {"Content-Type": "application/json"})
                    if status == 200:
                        assert check_stream(data, request=body) == []
                        errors = {data["error"]["code"] for name, data in parse_sse(data)[0]
                                  if name == "error"}
                    else:                             # unloaded before the stream began
                        errors = {json.loads(data)["error"]["code"]}
                    assert errors <= {"model_unloaded"}, errors
                else:
                    status, body = client.post({"model": model, "input": "hi", "max_output_tokens": 5,
                                                "context_length": draw.choice([64, 300])})
                    assert status == 200 or body["error"]["code"] == "model_unloaded", body
        except BaseException as error:
            failures.append(error)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
        assert not thread.is_alive()
    assert failures == []
    wait_until(lambda: all(model.n_users == 0 for model in client.library.instances()))
