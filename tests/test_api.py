"""The door for programs: load, chat, tokens and logits, a server inside the process."""
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from contract_checker import check_models, check_response, check_stream
from gguf import GGUFWriter
from helpers_doors import WAIT_S, environment, golden, offer_toy, put

import tinychat
from tinychat.errors import (ContextOverflow, InvalidRequest, ModelFileError, ModelNotFound,
                             TemplateError, TinychatError)
from tinychat.gguf_file import open_gguf
from tinychat.store import Store

MESSAGES = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model(home):
    with tinychat.load(golden("qwen2-a"), home=home, parallel=2, threads=1) as model:
        yield model


def text_of(response):
    return response["output"][0]["content"]


def test_importing_tinychat_imports_nothing_heavy(tmp_path):
    code = ("import sys, tinychat; tinychat.load, tinychat.__version__;"
            "heavy = {'numpy', 'gguf', 'jinja2', 'PIL'} & set(sys.modules)")
    light = code.replace("tinychat.load, ", "")
    for text, expected in ((light, "set()"), (code, "{'")):
        done = subprocess.run([sys.executable, "-c", text + "; print(heavy)"], capture_output=True,
                              text=True, timeout=WAIT_S, cwd=tmp_path, env=environment(tmp_path))
        assert done.stdout.startswith(expected), done.stderr


def test_the_version_is_the_packages():
    from importlib.metadata import PackageNotFoundError, version
    try:
        assert tinychat.__version__ == version("tinychat")
    except PackageNotFoundError:
        pytest.skip("tinychat runs from its tree, not installed")


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    assert {"Model", "load", "load_tokenizer", "serve", "errors"} <= set(dir(tinychat))
    with pytest.raises(AttributeError, match="no_such_name"):
        tinychat.no_such_name


def test_chat_gives_the_wires_response(model):
    response = model.chat("hello", **GREEDY)
    assert check_response(response) == []
    assert response["model_instance_id"] == model.key == "qwen2-a"
    assert response["stats"]["total_output_tokens"] <= 12


def test_stream_gives_the_wires_events_and_the_same_answer(model):
    events = list(model.chat("hello", stream=True, **GREEDY))
    assert check_stream(events) == []
    whole = model.chat("hello", **GREEDY)
    assert events[-1]["result"]["output"] == whole["output"]
    assert "".join(e["content"] for e in events if e["type"] == "message.delta") == text_of(whole)


def test_a_chat_continues_a_stored_one(model):
    first = model.chat("hello", **GREEDY)
    second = model.chat("and now?", previous_response_id=first["response_id"], **GREEDY)
    alone = model.chat("and now?", store=False, **GREEDY)
    assert second["stats"]["input_tokens"] > alone["stats"]["input_tokens"]
    assert "response_id" not in alone
    with pytest.raises(InvalidRequest) as error:
        model.chat("x", previous_response_id="resp_" + 48 * "0")
    assert error.value.code == "previous_response_not_found"


@pytest.mark.parametrize("fields, param", [
    ({"temperature": 3}, "temperature"), ({"top_k": -1}, "top_k"),
    ({"reasoning": "on"}, "reasoning"),
    ({"context_length": 10**6}, "context_length"), ({"max_output_tokens": 0}, "max_output_tokens"),
])
def test_a_bad_field_is_named(model, fields, param):
    with pytest.raises(InvalidRequest) as error:
        model.chat("hello", **fields)
    assert error.value.param == param


def test_text_that_is_no_text_is_an_error_not_a_crash(model):
    answers = [text_of(model.chat(f"lone {c} surrogate", **GREEDY)) for c in ("\udc80", "\ufffd")]
    assert answers[0] == answers[1], "as on the wire"
    for input in (5, b"bytes", [{"type": "text"}], float("nan")):
        with pytest.raises(InvalidRequest):
            model.chat(input)


def test_closing_a_stream_stops_the_answer(model):
    events = model.chat("hello", stream=True, temperature=0)
    while next(events)["type"] != "prompt_processing.end":
        pass
    events.close()
    with model.library.use(model.key) as loaded:
        step = loaded.engine.submit([1], max_tokens=1)
        next(step.updates(timeout=WAIT_S))
        assert loaded.engine.stats.waiting == 0


def test_render_is_the_models_template(model):
    assert model.render(MESSAGES) == model.render(MESSAGES, add_generation_prompt=True)
    assert "hello" in model.render(MESSAGES)
    assert model.render(MESSAGES, add_generation_prompt=False) != model.render(MESSAGES)


def test_tokenize_and_detokenize_undo_each_other(model):
    ids = model.tokenize("Hello, wörld")
    assert model.detokenize(ids) == "Hello, wörld" and all(type(id) is int for id in ids)
    assert len(model.tokenize("<|im_end|>", special=True)) == 1 < len(model.tokenize("<|im_end|>"))
    assert model.detokenize(iter(ids)) == "Hello, wörld"


def test_logits_are_the_golden_ones(model):
    expected = np.load(golden("qwen2-a").with_suffix(".npz"))
    logits = model.logits(expected["tokens"].tolist())
    assert logits.dtype == np.float32 and logits.shape == expected["logits"].shape
    assert np.abs(logits - expected["logits"]).max() < 0.3 * expected["logits"].std()


def test_generate_gives_ids_up_to_the_limit_or_a_stop(model):
    ids = np.load(golden("qwen2-a").with_suffix(".npz"))["tokens"].tolist()
    first = list(model.generate(ids, temperature=0, max_tokens=8, stop_ids=()))
    assert len(first) == 8 and first == list(model.generate(ids, temperature=0, max_tokens=8,
                                                            stop_ids=()))
    assert list(model.generate(ids, temperature=0, max_tokens=8, stop_ids=[first[0]])) == first[:1]
    drawn = [list(model.generate(ids, temperature=2.0, top_k=0, top_p=1.0, max_tokens=8,
                                 seed=3)) for _ in "ab"]
    assert drawn[0] == drawn[1]
    best = model.logits(ids)[-1].argmax()
    assert first[0] == best


def test_generate_refuses_what_cannot_be(model):
    for ids, error in (([], InvalidRequest), ([10**6], InvalidRequest),
                       ([1] * 10**4, ContextOverflow)):
        with pytest.raises(error):
            next(model.generate(ids))
    with pytest.raises(InvalidRequest):
        next(model.generate([1], temperature=-1))


def test_many_threads_get_their_own_answers(model):
    alone = [text_of(model.chat(f"question {i}", **GREEDY)) for i in range(4)]
    answers = [None] * 4

    def ask(i):
        answers[i] = text_of(model.chat(f"question {i}", **GREEDY))
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    if model.library.load(model.key).executor.name == "reference":
        pytest.skip("the same bits alone and in a crowd are the kernels' promise")
    assert answers == alone


def test_a_larger_context_grows_the_model(home):
    with tinychat.load(golden("qwen2-a"), home=home, context_length=64, threads=1) as model:
        assert model.context_length == 64
        with pytest.raises(ContextOverflow):
            model.chat("word " * 100, **GREEDY)
        answer = model.chat("word " * 100, context_length=2048, **GREEDY)
        assert answer["stats"]["model_load_time_seconds"] > 0


def test_a_closed_model_says_so(home):
    model = tinychat.load(golden("qwen2-a"), home=home, context_length=64, threads=1)
    model.close()
    model.close()
    for call in (lambda: model.chat("x"), lambda: model.logits([1]),
                 lambda: next(model.generate([1]))):
        with pytest.raises(TinychatError, match="closed"):
            call()
    assert model.detokenize(model.tokenize("still here")) == "still here"


def test_load_says_what_is_wrong(home, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for name, error in (("nobody/nothing", ModelNotFound),
                        (tmp_path / "absent.gguf", ModelNotFound),
                        (tmp_path / "bad.gguf", ModelFileError)):
        with pytest.raises(error):
            tinychat.load(name, home=home)


def test_load_fetches_what_the_catalogue_has_and_says_so(tmp_path, monkeypatch, caplog):
    data = golden("qwen2-a").read_bytes()
    offer_toy(monkeypatch, tmp_path, data)
    with tinychat.load("toy", home=tmp_path, context_length=64, threads=1) as model:
        assert model.key == "toy"
    assert "toy is not on this machine yet: fetching it" in caplog.text


def test_a_vocabulary_alone_tokenizes(tmp_path, model):
    with open_gguf(golden("qwen2-a")) as file:
        fields = {key: value for key,
                  value in file.metadata.items() if key.startswith("tokenizer.ggml.")}
    writer = GGUFWriter(tmp_path / "vocab.gguf", "qwen2")
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"])
    writer.add_token_list(fields["tokenizer.ggml.tokens"])
    writer.add_token_types([int(kind) for kind in fields["tokenizer.ggml.token_type"]])
    writer.add_token_merges(fields["tokenizer.ggml.merges"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    vocabulary = tinychat.load_tokenizer(tmp_path / "vocab.gguf")
    assert vocabulary.tokenize("Hello, wörld") == model.tokenize("Hello, wörld")
    assert vocabulary.detokenize(vocabulary.tokenize("Hello")) == "Hello"


def test_render_without_a_template_is_a_template_error(home, tmp_path):
    plain = tmp_path / "plain.gguf"
    data = golden("qwen2-a").read_bytes()
    plain.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX"))
    with tinychat.load(plain, home=home, context_length=64, threads=1) as model:
        assert len(list(model.generate([1, 2], max_tokens=3, stop_ids=()))) == 3
        with pytest.raises(TemplateError, match="no chat template"):
            model.render(MESSAGES)


# ---- a server inside the program

def post(url, body):
    request = urllib.request.Request(url + "/api/v1/chat", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        return json.load(answer)


def test_a_server_shares_a_loaded_model(model):
    with tinychat.serve(model, port=0) as server:
        body = {"model": model.key, "input": "hello", **GREEDY}
        response = post(server.url, body)
        assert check_response(response) == []
        assert text_of(response) == text_of(model.chat("hello", **GREEDY))
        followed = model.chat("more", previous_response_id=response["response_id"], **GREEDY)
        assert followed["response_id"], "the store is shared too"
    assert text_of(model.chat("hello", **GREEDY)) == text_of(response), "the model stays"
    with pytest.raises(urllib.error.URLError):
        post(server.url, body)
    server.close()


def test_a_server_loads_the_models_named(tmp_path):
    put(tmp_path / "models" / "other.gguf", golden("llama3-a.Q4_0"))
    with tinychat.serve([golden("qwen2-a")], port=0, home=tmp_path, threads=1,
                        max_body_bytes=1000) as server:
        with urllib.request.urlopen(server.url + "/api/v1/models", timeout=WAIT_S) as answer:
            body = json.load(answer)
        assert check_models(body) == []
        assert {m["key"]: len(m["loaded_instances"]) for m in body["models"]} == {"qwen2-a": 1,
                                                                                  "other": 0}
        id = post(server.url, {"model": "other", "input": "hi", **GREEDY})["response_id"]
    with tinychat.serve(port=0, home=tmp_path, threads=1) as server:
        assert post(server.url,
                    {"model": "other", "input": "hi", "previous_response_id": id, **GREEDY})


def test_a_server_that_cannot_start_frees_what_it_had(tmp_path):
    with pytest.raises(ModelNotFound):
        tinychat.serve("nothing", port=0, home=tmp_path)
    with tinychat.serve(port=0, home=tmp_path) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(TinychatError):
            tinychat.serve(port=port, home=tmp_path)
    with pytest.raises(TypeError):
        tinychat.serve(port=0, home=tmp_path, no_such_setting=1)


def test_a_load_that_fails_closes_its_store(home, monkeypatch):
    closed = []
    close = Store.close
    monkeypatch.setattr(Store, "close", lambda self: closed.append(self.path) or close(self))
    path = home / "unused.sqlite3"
    with pytest.raises(InvalidRequest):
        tinychat.load(golden("qwen2-a"), home=home, context_length=10**9, store=path)
    assert closed == [str(path)]


def test_lists_of_different_lengths_are_no_ids(model):
    with pytest.raises(InvalidRequest, match="list of token ids"):
        model.logits([[1], [1, 2]])
