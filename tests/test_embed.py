"""Texts to vectors through the door for programs, and what embedding models do not do."""
import json
import re
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from contract_checker import check_load, check_models
from helpers_doors import GOLDEN, all_at_once, golden, joined, put, started, wait_until
from test_models_http import CHAT, LOAD, ModelsClient

import tinychat
from tinychat.engine.embedder import STEP_TOKENS, Embedder
from tinychat.errors import (
    ContextOverflow, InvalidRequest, ModelFileError, ModelLoadError, TinychatError)
from tinychat.gguf_file import open_gguf
from tinychat.library import Library
from tinychat.models import build_program
from tinychat.ops import why_reference
from tinychat.server import make_server
from tinychat.store import Store

NAMES = ("bert-a", "qwen3-embedding-a")
TEXTS = ["a cat", "The sun rises in the east, and sets in the west.", "x", "two words " * 12]
POOLED = {"mean": lambda rows: rows.mean(axis=0), "cls": lambda rows: rows[0],
          "last": lambda rows: rows[-1]}
NUMBERS = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}

every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """name -> the loaded model, loaded once."""
    home, models = tmp_path_factory.mktemp("home"), {}

    def model(name: str) -> tinychat.Model:
        if name not in models:
            models[name] = tinychat.load(golden(name), home=home, threads=2)
        return models[name]
    yield model
    for one in models.values():
        one.close()


def loaded(model):
    return model.library.loaded(model.key)


def changed(path: Path, name: str, key: str, value: int) -> Path:
    """A golden model with another value of a 32-bit number of its metadata."""
    data = bytearray(golden(name).read_bytes())
    at = data.index(key.encode()) + len(key) + 4  # behind the key: its type, its value
    struct.pack_into("<I", data, at, value)
    path.write_bytes(data)
    return path


def golden_of(name: str):
    with np.load(GOLDEN / f"{name}.npz") as data:
        return str(data["text"]), {key: data[key] for key in data.files}


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """To the bit where there are kernels."""
    if why_reference() is None:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-5 * expected.std())


# ---- vectors

@every_model
def test_the_golden_text_gives_the_golden_vector(name, model_of):
    text, data = golden_of(name)
    for normalize, key in ((True, "embedding_normalised"), (False, "embedding")):
        found, = model_of(name).embed([text], normalize=normalize)
        assert found.dtype == np.float32
        assert np.abs(found - data[key]).max() <= 1e-4 * data[key].std()
    assert np.array_equal(data["tokens"], model_of(name)._tokenizer.encode_prompt(text))


@every_model
def test_a_vector_is_the_same_alone_and_beside_others(name, model_of):
    model = model_of(name)
    alone = np.concatenate([model.embed([text]) for text in TEXTS])
    assert_same(model.embed(TEXTS), alone)
    assert_same(model.embed(tuple(reversed(TEXTS)))[::-1], alone)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)


@every_model
def test_many_texts_take_several_steps(name, model_of):
    model, texts = model_of(name), (TEXTS * 40)[:-1]
    embedder = loaded(model).engine
    before = embedder.stats.n_steps
    vectors = model.embed(iter(texts))
    n_steps = embedder.stats.n_steps - before
    assert 3 <= n_steps < len(texts) / 2
    assert_same(vectors, model.embed(TEXTS)[np.arange(len(texts)) % len(TEXTS)])


def test_a_text_as_long_as_the_context_is_one_step(model_of):
    model = model_of("qwen3-embedding-a")
    n = model.context_length - len(model._tokenizer.encode_prompt(""))
    text = next(text for size in range(n, 0, -1)
                if len(model._tokenizer.encode_prompt(text := "a b " * (size // 2))) <= n)
    assert len(model._tokenizer.encode_prompt(text)) > STEP_TOKENS
    assert_same(model.embed(["a cat", text, "x"])[[0, 2]], model.embed(["a cat", "x"]))


def test_no_texts_give_no_vectors(model_of):
    assert model_of("bert-a").embed([]).shape == (0, 64)


@pytest.mark.parametrize("pooling", POOLED)
def test_a_file_says_how_its_hidden_states_are_pooled(pooling, tmp_path):
    text, data = golden_of("bert-a")
    path = changed(tmp_path / "e.gguf", "bert-a", "bert.pooling_type", NUMBERS[pooling])
    with tinychat.load(path, home=tmp_path) as model:
        found, = model.embed([text], normalize=False)
    expected = POOLED[pooling](data["hidden"])
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("pooling, told", [(0, "none"), (4, "rank"), (77, "77")])
def test_another_pooling_is_refused_at_load_by_its_key(pooling, told, tmp_path):
    path = changed(tmp_path / "e.gguf", "bert-a", "bert.pooling_type", pooling)
    with pytest.raises(ModelFileError, match=f"bert.pooling_type: .*mean, cls, last, got {told}"):
        tinychat.load(path, home=tmp_path)


def test_an_encoder_that_does_not_name_its_pooling_is_no_chat_model(tmp_path):
    path = tmp_path / "e.gguf"
    path.write_bytes(golden("bert-a").read_bytes().replace(b"bert.pooling_type", b"bert.other_number"))
    with pytest.raises(ModelFileError, match="bert.pooling_type: expected .*got None"):
        tinychat.load(path, home=tmp_path)


# ---- what cannot be embedded

def test_an_empty_text_has_a_vector_if_it_has_tokens(model_of):
    vector, = model_of("bert-a").embed([""])  # CLS and SEP
    assert np.isfinite(vector).all()


def test_a_text_without_tokens_is_refused():
    with pytest.raises(InvalidRequest, match="at least one token"):
        Embedder(_FakeExecutor(), "mean").embed([[1], []])


class _FakeExecutor:
    class limits:
        max_tokens = 8


@every_model
def test_a_text_longer_than_the_context_is_refused(name, model_of):
    model = model_of(name)
    with pytest.raises(ContextOverflow, match=f"context length of {model.context_length}") as error:
        model.embed(["short", "word " * 2 * model.context_length])
    assert error.value.param == "input"
    assert len(model.embed(["short"])) == 1


@pytest.mark.parametrize("texts", ["one text", [b"bytes"], [None], [["nested"]], 5, None])
def test_only_texts_in_a_list_are_embedded(texts, model_of):
    with pytest.raises(InvalidRequest, match="expected a list of texts") as error:
        model_of("bert-a").embed(texts)
    assert error.value.param == "input"


def test_a_chat_model_makes_no_vectors(tmp_path):
    with tinychat.load(golden("qwen2-a"), home=tmp_path) as model:
        with pytest.raises(InvalidRequest, match="no embedding model") as error:
            model.embed(["a text"])
    assert error.value.param == "model"


@every_model
def test_an_embedding_model_writes_nothing(name, model_of):
    model = model_of(name)
    for ask in (lambda: model.chat("hi"), lambda: list(model.generate([5])),
                lambda: model.logits([5]), lambda: list(model.chat("hi", stream=True))):
        with pytest.raises(InvalidRequest) as error:
            ask()
        assert error.value.param == "model"


# ---- over HTTP

@every_model
def test_over_http_it_is_listed_and_loaded_as_what_it_is_but_does_not_chat(name, tmp_path):
    put(tmp_path / "models" / "m" / name / f"{name}.gguf", golden(name))
    library = Library(home=tmp_path, threads=1)
    server = make_server(library, Store(), port=0)
    server.start()
    client, key = ModelsClient(server), f"m/{name}"
    try:
        key, = (row["key"] for row in _listed(client))
        assert [row["type"] for row in _listed(client)] == ["embedding"]
        assert client.refused(CHAT, model=key, input="hi") == (400, "invalid_value", "model")
        assert not client.instances(), "it was not even loaded"
        status, body = client.ask(LOAD, model=key, context_length=64, echo_load_config=True)
        assert (status, body["type"]) == (200, "embedding"), body
        assert check_load(body, echo=True) == []
        assert body["load_config"] == {"context_length": 64}
        assert client.refused(CHAT, model=key, input="hi") == (400, "invalid_value", "model")
        assert client.instances()[key]["context_length"] == 64
        assert client.unload(key) == key and not client.instances()
    finally:
        server.close()
        library.close()


def _listed(client) -> list[dict]:
    body = json.loads(client.request("GET", "/api/v1/models")[2])
    assert check_models(body) == []
    return body["models"]


# ---- threads

@every_model
def test_threads_that_embed_at_once_get_their_own_vectors(name, model_of):
    model = model_of(name)
    expected = model.embed(TEXTS)
    found = all_at_once(*[lambda i=i: model.embed(TEXTS[i:] * 20) for i in range(len(TEXTS))])
    for i, vectors in enumerate(found):
        n = len(TEXTS) - i
        assert_same(vectors, expected[i + np.arange(20 * n) % n])


def test_closing_a_model_ends_what_it_embeds(tmp_path):
    model = tinychat.load(golden("bert-a"), home=tmp_path)
    embedder, begun = loaded(model).engine, threading.Event()
    step = embedder._executor.step

    def slowly(batch):
        begun.set()
        return step(batch)
    embedder._executor.step = slowly
    running = started(model.embed, TEXTS * 100_000)
    wait_until(begun.is_set)
    model.close()
    assert isinstance(joined(*running), TinychatError)
    with pytest.raises(TinychatError, match="closed"):
        model.embed(TEXTS)


# ---- memory

@every_model
def test_layers_take_turns_in_the_keys_and_values_of_one_step(name):
    with open_gguf(golden(name)) as file:
        assert len(build_program(file, hidden=True).kv) == 1


def test_a_long_trained_context_is_taken_only_when_asked_for(tmp_path):
    path = changed(tmp_path / "e.gguf", "qwen3-embedding-a", "qwen3.context_length", 32768)
    sizes = {}
    for n in (None, 256, 32768):
        with tinychat.load(path, home=tmp_path, context_length=n) as model:
            assert model.context_length == (n or 4096)
            sizes[n] = loaded(model).memory.total_bytes - loaded(model).memory.weight_bytes
            assert model.embed(["a cat"]).shape == (1, 64)
    assert sizes[256] < sizes[None] < sizes[32768]
    assert sizes[32768] < 9 * sizes[None]
    with pytest.raises(InvalidRequest, match="32768"):
        tinychat.load(path, home=tmp_path, context_length=32769)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("tinychat.library.loaded.available_memory", lambda: 4_000_000)
    with pytest.raises(ModelLoadError, match=re.escape("4096 tokens of context")):
        tinychat.load(golden("qwen3-embedding-a"), home=tmp_path)
    with tinychat.load(golden("bert-a"), home=tmp_path) as model:
        assert loaded(model).memory.total_bytes < 4_000_000
