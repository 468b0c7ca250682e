"""Model.embed: texts to vectors, by golden embedding models."""
import json
import threading
from contextlib import closing

import numpy as np
import pytest
from contract_checker import check_models
from helpers_chat import Client
from helpers_doors import golden, put

import tinychat
from tinychat.engine.embedder import Embedder
from tinychat.errors import ContextOverflow, InvalidRequest, ModelFileError, TinychatError
from tinychat.gguf_file import open_gguf
from tinychat.library import Library
from tinychat.models import build_program
from tinychat.ops import open_executor, why_reference
from tinychat.server import make_server
from tinychat.store import Store

MODELS = ("bert-a", "qwen3-embedding-a")
TEXTS = ["Tell me about the weather", "a", "one two three four five six seven", "Größe: 12 kg!"]


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    with tinychat.load(golden(request.param), home=tmp_path_factory.mktemp("home"),
                       context_length=128) as model:
        yield model


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit; NumPy's products may round otherwise with other rows beside them."""
    if why_reference():
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, expected)


def test_a_golden_text_has_its_golden_vector(model):
    with np.load(model.path.with_suffix(".npz")) as data:
        expected = dict(data)
    text = str(expected["text"])
    for normalize, name in ((True, "embedding_normalised"), (False, "embedding")):
        found = model.embed([text], normalize=normalize)
        assert found.dtype == np.float32 and found.shape == (1, expected[name].size)
        np.testing.assert_allclose(found[0], expected[name].reshape(-1),
                                   atol=0.02 * expected[name].std())


def test_a_text_has_the_same_vector_alone_and_beside_others(model):
    together = model.embed(TEXTS)
    for i, text in enumerate(TEXTS):
        assert_same(model.embed([text])[0], together[i])
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)


def test_more_texts_than_a_step_takes_are_taken_in_turn(model):
    many = model.embed(TEXTS * 40)
    assert_same(many, np.tile(model.embed(TEXTS), (40, 1)))


def test_no_texts_make_no_vectors(model):
    assert model.embed([]).shape == (0, model.embed(["a"]).shape[1])


def test_a_text_that_is_too_long_is_refused_and_nothing_else_is_lost(model):
    with pytest.raises(ContextOverflow, match="more than the context length of 128"):
        model.embed(["fine", "word " * 300])
    assert model.embed(["fine"]).shape[0] == 1


def test_one_text_instead_of_a_list_is_refused(model):
    with pytest.raises(InvalidRequest, match="expected a list of texts"):
        model.embed("not a list")


def test_an_embedding_model_cannot_chat_or_write(model):
    for ask in (lambda: model.chat("hi"), lambda: model.logits([1, 2]),
                lambda: next(model.generate([1, 2]))):
        with pytest.raises(InvalidRequest):
            ask()


def test_many_threads_may_embed_at_once(model):
    expected, failures = model.embed(TEXTS), []

    def work():
        for _ in range(20):
            if not np.allclose(model.embed(TEXTS), expected, atol=1e-5):
                failures.append("another vector")
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []


def test_a_chat_model_makes_no_vectors(tmp_path):
    with tinychat.load(golden("qwen2-a"), home=tmp_path, context_length=64) as model:
        with pytest.raises(InvalidRequest, match="no embedding model"):
            model.embed(["a"])


@pytest.mark.parametrize("number, name", [(1, "mean"), (2, "cls"), (3, "last")])
def test_each_pooling_takes_its_rows(number, name):
    with open_gguf(golden("bert-a")) as file:
        program = build_program(file)
    executor = open_executor(program, kind="reference", n_pages=8, max_tokens=64, max_outputs=64,
                             max_sequences=4, kv_type="f32")
    texts = [[2, 5, 6, 7, 3], [2, 9, 3]]
    rows = {pooling: Embedder(executor, pooling).embed(texts)
            for pooling in ("mean", "cls", "last")}
    alone = Embedder(executor, name).embed(texts[1:])
    np.testing.assert_allclose(alone[0], rows[name][1], atol=1e-5)
    assert not np.allclose(rows["mean"], rows["cls"]) and not np.allclose(rows["cls"], rows["last"])
    executor.close()


def test_a_pooling_that_makes_no_vector_is_refused_at_load(tmp_path):
    data = golden("bert-a").read_bytes()
    key = b"bert.pooling_type"
    at = data.index(key) + len(key) + 4                         # u32 type, then the number
    assert data.count(key) == 1 and data[at] == 1
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "odd.gguf").write_bytes(data[:at] + b"\4" + data[at + 1:])
    with Library(home=tmp_path) as library:
        with pytest.raises(ModelFileError, match="bert.pooling_type.*mean, cls, last, got rank"):
            library.load("odd")


def test_closing_ends_what_embeds_with_an_error(tmp_path):
    model = tinychat.load(golden("bert-a"), home=tmp_path, context_length=64)
    model.close()
    with pytest.raises(TinychatError, match="closed"):
        model.embed(["a"])


def test_embedding_models_are_listed_loaded_and_refused_for_chats(tmp_path):
    put(tmp_path / "models" / "bert.gguf", golden("bert-a"))
    with Library(home=tmp_path, default_context_length=64) as library, closing(Store()) as store:
        server = make_server(library, store, port=0).start()
        try:
            client = Client(server)
            library.load("bert")
            status, _, data = client.request("GET", "/api/v1/models")
            listed = json.loads(data)
            assert status == 200 and check_models(listed) == []
            (entry,) = listed["models"]
            assert entry["type"] == "embedding" and len(entry["loaded_instances"]) == 1
            assert client.error(model="bert") == (400, "invalid_value", "model")
        finally:
            server.close()
