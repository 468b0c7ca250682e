"""Fuzzing the API over HTTP: whatever is asked, the answer is one of the contract's, never a 500.

TINYCHAT_TEST_FUZZ_BODIES: how many bodies in all, and others each time; else the same 20,000.
"""
import http.client
import json
import os
import random
import socket
from contextlib import closing

import pytest
from contract_checker import (
    check_download, check_error, check_load, check_response, check_stream, check_unload)
from helpers_chat import KEY, ScriptedEntry, ScriptedLibrary, reasoning_entry, says
from helpers_doors import WAIT_S, golden, put
from helpers_hub import HubStandIn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinychat.library import Library
from tinychat.server import make_server
from tinychat.store import Store

CHOSEN = os.environ.get("TINYCHAT_TEST_FUZZ_BODIES")
N_BODIES = int(CHOSEN or 20_000)
BATCH = 20  # bodies of one example
CHAT, MODELS = "/api/v1/chat", "/api/v1/models"
THINKER, EMBEDDER = "test/thinker", "test/embedder"
STATUSES = {200, 400, 403, 404, 501, 502}

FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None,
        "derandomize": CHOSEN is None}

# ---- the contract's table once more, independently of the code: valid values, and wrong ones

text = st.text(max_size=12)
whole = st.integers(1, 2**40)
finite = st.floats(allow_nan=False, allow_infinity=False)  # the others are no JSON
no_string = st.integers() | st.booleans() | finite | st.just([]) | st.just({})
no_number = text | st.booleans() | st.just([]) | st.just({})
no_boolean = text | st.integers(0, 1) | st.just([])
fraction = st.floats(0.1, 0.9)
item = st.fixed_dictionaries({"type": st.sampled_from(["text", "message"]), "content": text})
VALID = {
    "input": text | st.lists(item, min_size=1, max_size=3),
    "system_prompt": text,
    "stream": st.booleans(),
    "temperature": st.floats(0, 2) | st.integers(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 2**40),
    "min_p": st.floats(0, 1),
    "repeat_penalty": st.floats(0.01, 10),
    "max_output_tokens": whole | st.just(8.0),
    "context_length": st.integers(2000, 8192) | st.just(4000.0),
    "store": st.booleans(),
    "ttl": whole,
}
WRONG = {  # name: (values, code)
    "model": [(st.none(), "missing_required_parameter"), (no_string, "invalid_type"),
              (st.just(""), "invalid_value")],
    "input": [(st.none(), "missing_required_parameter"),
              (st.integers() | st.booleans() | st.just({}), "invalid_type"),
              (st.just([]), "invalid_value")],
    "system_prompt": [(no_string, "invalid_type")],
    "integrations": [(text | st.integers() | st.just({}), "invalid_type")],
    "stream": [(no_boolean, "invalid_type")],
    "temperature": [(no_number, "invalid_type"),
                    (st.sampled_from([2.001, 3, 1e300, -0.001, -5]), "invalid_value")],
    "top_p": [(no_number, "invalid_type"), (st.sampled_from([1.001, 2, -0.001, 1e9]), "invalid_value")],
    "top_k": [(no_number | fraction, "invalid_type"), (st.integers(-2**70, -1), "invalid_value")],
    "min_p": [(no_number, "invalid_type"), (st.sampled_from([1.001, 2, -0.001, -9]), "invalid_value")],
    "repeat_penalty": [(no_number, "invalid_type"),
                       (st.sampled_from([0, -1, 10.1, 10**400]), "invalid_value")],
    "max_output_tokens": [(no_number | fraction, "invalid_type"),
                          (st.integers(-2**70, 0), "invalid_value")],
    "reasoning": [(no_string, "invalid_type"), (st.just("xhigh"), "invalid_value")],
    "context_length": [(no_number | fraction, "invalid_type"),
                       (st.integers(8193, 2**80) | st.integers(-9, 0), "invalid_value")],
    "store": [(no_boolean, "invalid_type")],
    "previous_response_id": [(no_string, "invalid_type"), (text, "invalid_value")],
    "ttl": [(no_number | fraction, "invalid_type"), (st.integers(-9, 0), "invalid_value")],
}

valid_bodies = st.one_of(
    st.fixed_dictionaries({"model": st.just(KEY), "input": VALID["input"]},
                          optional={name: VALID[name] for name in VALID if name != "input"}),
    st.fixed_dictionaries({"model": st.just(THINKER), "input": text,
                           "reasoning": st.sampled_from(["off", "on"])}))


@st.composite
def wrong_bodies(draw):
    """(body, code, param): a valid body with exactly one violation."""
    body = draw(valid_bodies)
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(["messages", "tools", "stop", "seed", "max_tokens", "x", ""]))
        return {**body, name: 1}, "unrecognized_keys", name or "''"
    name = draw(st.sampled_from(list(WRONG)))
    values, code = draw(st.sampled_from(WRONG[name]))
    return {**body, name: draw(values)}, code, name


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | text | st.sampled_from(["text", "image", "plugin", "ephemeral_mcp", "on", "resp_0", KEY, THINKER,
                              EMBEDDER, "data:image/png;base64,AA", "http://h", "mcp/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "content", "data_url", "id", "server_label", "server_url", "headers",
                         "allowed_tools", "timeout", "x"]), inner, max_size=4), max_leaves=6)
odd_bodies = st.dictionaries(
    st.sampled_from([*VALID, *WRONG, "model", "x"]), anything, max_size=5).flatmap(
        lambda body: st.sampled_from([body, {"model": KEY, "input": "hi", **body}]))


@st.composite
def broken_bytes(draw):
    """A valid body's bytes with a piece cut out, doubled, or put in its place."""
    data = json.dumps(draw(valid_bodies), ensure_ascii=draw(st.booleans())).encode()
    at = draw(st.integers(0, len(data)))
    end = draw(st.integers(at, min(len(data), at + 6)))
    piece = draw(st.sampled_from([b"", data[at:end] * 2, b"\\ud800", b"NaN", b"[" * 200, b"1e999", b"-",
                                  b"\xff", b"\0", b"null", b'"', b"{", b"}", b'"model":5,']))
    return data[:at] + piece + data[end:]


class Asker:
    """One kept-alive connection; every answer is held against the contract."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        self.n_asked = 0

    def ask(self, path, body):
        """(status, parsed answer, None for a stream)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        answer = response.read()
        self.n_asked += 1
        assert response.status in STATUSES, (response.status, body, answer)
        if response.headers["Content-Type"] == "text/event-stream":
            assert check_stream(answer, request=body if isinstance(body, dict) else None) == []
            return 200, None
        value = json.loads(answer)
        if response.status != 200:
            assert check_error(value, response.status) == [], (body, value)
        return response.status, value

    def chat(self, body):
        status, value = self.ask(CHAT, body)
        if status == 200 and value is not None:
            assert check_response(value, request=body if isinstance(body, dict) else None) == []
        return status, value


@pytest.fixture(scope="module")
def chat():
    """A server with a plain model, one that reasons, and one for embeddings."""
    library = ScriptedLibrary(says("Hé!"), entries=[
        ScriptedEntry(), reasoning_entry(key=THINKER),
        ScriptedEntry(key=EMBEDDER, type="embedding", capabilities={})])
    with closing(Store(max_responses=50)) as store, make_server(library, store, port=0).start() as server:
        asker = Asker(server.port)
        yield asker
        asker.connection.close()


def examples(share):
    return max(1, round(N_BODIES * share / BATCH))


batches = {"min_size": BATCH, "max_size": BATCH}


@settings(max_examples=examples(0.3), **FUZZ)
@given(st.lists(valid_bodies, **batches))
def test_every_body_that_the_table_allows_is_answered(chat, bodies):
    """C-044, C-054."""
    for body in bodies:
        assert chat.chat(body)[0] == 200, body


@settings(max_examples=examples(0.3), **FUZZ)
@given(st.lists(wrong_bodies(), **batches))
def test_one_violation_gets_its_code_and_its_field(chat, cases):
    """C-012, C-017 to C-043."""
    for body, code, param in cases:
        status, value = chat.chat(body)
        assert (status, value["error"]["code"], value["error"]["param"]) == (400, code, param), body


@settings(max_examples=examples(0.25), **FUZZ)
@given(st.lists(odd_bodies | broken_bytes(), **batches))
def test_odd_and_broken_bodies_get_an_answer_of_the_contract(chat, bodies):
    """C-008, C-009, C-012."""
    for body in bodies:
        chat.chat(body)


# ---- the models' endpoints

MODEL_FIELDS = {
    "model": st.sampled_from(["qwen", "nope", "", "ibm/granite-4-micro", "https://huggingface.co/a/b",
                              "https://huggingface.co/a/b/c/../..", "https://h/x", "http://[", "../x"]) | text,
    "instance_id": st.sampled_from(["qwen", "nope", ""]) | text,
    "context_length": st.integers(-2, 5000) | finite,
    "eval_batch_size": st.integers(-1, 600), "num_experts": st.integers(-1, 9),
    "flash_attention": st.booleans(), "offload_kv_cache_to_gpu": st.booleans(),
    "echo_load_config": st.booleans(), "ttl": st.integers(-1, 9) | st.just(2**70),
    "quantization": st.sampled_from(["Q4_K_M", "q9", ""]) | text, "x": st.just(1),
}
model_bodies = st.fixed_dictionaries({}, optional=MODEL_FIELDS).flatmap(
    lambda body: st.sampled_from([body, {**body, "model": "qwen"}, {"instance_id": "qwen"}])) | \
    st.dictionaries(st.sampled_from(list(MODEL_FIELDS)), anything, max_size=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A server with a real tiny model, and a hub that has nothing."""
    home = tmp_path_factory.mktemp("home")
    put(home / "models" / "qwen.gguf", golden("qwen2-a"))
    patch = pytest.MonkeyPatch()
    with HubStandIn() as hub, Library(home=home, default_context_length=64) as library, \
            closing(Store()) as store, make_server(library, store, port=0).start() as server:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("no_proxy", "*")
        asker = Asker(server.port)
        yield asker
        asker.connection.close()
        patch.undo()


@settings(max_examples=examples(0.15), **FUZZ)
@given(st.lists(st.tuples(st.sampled_from(["load", "unload", "download"]), model_bodies), **batches))
def test_odd_loads_unloads_and_downloads_get_an_answer_of_the_contract(models, cases):
    """C-012, C-129, C-131, C-133."""
    for action, body in cases:
        status, value = models.ask(f"{MODELS}/{action}", body)
        if status == 200:
            check = {"load": check_load, "unload": check_unload, "download": check_download}[action]
            assert check(value) == [], (action, body, value)


def test_as_many_bodies_were_asked_as_were_promised(chat, models, request):
    asked = chat.n_asked + models.n_asked
    whole_file = len([item for item in request.session.items
                      if item.path == request.node.path]) > 5
    assert asked >= N_BODIES * 0.999 or not whole_file, asked


# ---- bytes of HTTP

SEEDS = [
    b"GET /api/v1/models HTTP/1.1\r\nHost: h\r\n\r\n",
    b"POST /api/v1/chat HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 40\r\n\r\n"
    b'{"model": "test/scripted", "input": "hi"}',
    b"POST /api/v1/chat HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    b'\r\n\r\n1d\r\n{"model": "test/scripted", "i\r\nc\r\nnput": "hi"}\r\n0\r\n\r\n',
    b"POST /api/v1/models/load HTTP/1.1\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    b"GET /metrics HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
]
PIECES = [b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"\xff", b"chunked", b"Content-Length: 5\r\n", b"0\r\n\r\n",
          b"ffffffffff\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1", b"//", b"%2e%2e/", b"-1"]


def mutated(draw):
    data = bytearray(b"".join(draw.choice(SEEDS) for _ in range(draw.randrange(1, 4))))
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            data[at:at] = draw.choice(PIECES)
        elif kind == 1:
            del data[at:at + draw.randrange(1, 30)]
        elif kind == 2 and at < len(data):
            data[at] = draw.randrange(256)
        else:
            data[at:at] = data[max(0, at - draw.randrange(1, 60)):at]
    return bytes(data)


def test_mutated_http_is_answered_or_hung_up_on_and_the_server_lives():
    """C-006, C-012."""
    draw, statuses = random.Random(11), {}
    with closing(Store()) as store, make_server(
            ScriptedLibrary(says("x")), store, port=0, head_timeout_s=1.0, read_timeout_s=1.0,
            body_timeout_s=1.0).start() as server:
        for _ in range(1500):
            with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as sock:
                sock.sendall(mutated(draw))
                sock.shutdown(socket.SHUT_WR)
                with sock.makefile("rb") as file:
                    for status in answered(file):
                        statuses[status] = statuses.get(status, 0) + 1
        asker = Asker(server.port)
        assert asker.chat({"model": KEY, "input": "hi"})[0] == 200
        asker.connection.close()
    assert {200, 400} <= set(statuses) <= {100, 200, 400, 404, 405, 413, 415}, statuses


def answered(file):
    """The statuses of the answers on a connection; each error is one of the contract."""
    while line := file.readline():
        assert line.startswith(b"HTTP/1.1 "), line
        status, headers = int(line.split()[1]), http.client.parse_headers(file)
        if status != 100:
            data = file.read(int(headers["Content-Length"]))
            assert status == 200 or check_error(json.loads(data), status) == [], data
        yield status
