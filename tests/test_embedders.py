"""Families of embedding models without golden files: tiny ones beside llama.cpp's vectors.

llama.cpp takes GELU from a table of 16-bit numbers, so families with it agree less closely.
"""
import numpy as np
import pytest

from helpers_embedders import EMBEDDERS, VECTORS, also
from helpers_golden import EXECUTORS, open_model
from helpers_relatives import TOKENS, E, write_relative
from tinychat.engine.embedder import POOLINGS, Embedder
from tinychat.errors import ModelFileError
from tinychat.gguf_file import open_gguf
from tinychat.models import build_program

EXACT, TABLE_GELU = 1e-4, 5e-3  # of the standard deviation
WITHOUT_GELU = ("eurobert", "modern-bert-silu", "neo-bert", "nomic-bert")


def embedded(path, name: str, kind: str, texts: list[list[int]]) -> np.ndarray:
    executor = open_model(path, kind, hidden=True)
    pooling = EMBEDDERS[name][1]["pooling_type"]
    try:
        return Embedder(executor, POOLINGS[pooling]).embed(texts)
    finally:
        executor.close()


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", EMBEDDERS)
def test_vectors_agree_with_those_of_llama_cpp(name, kind, tmp_path):
    path, tokens = write_relative(tmp_path / "e.gguf", name, EMBEDDERS[name]), TOKENS.tolist()
    beside, found = embedded(path, name, kind, [tokens[:9], tokens])
    with np.load(VECTORS) as vectors:
        expected = vectors[name]
    limit = EXACT if name in WITHOUT_GELU else TABLE_GELU
    assert np.abs(found - expected).max() <= limit * expected.std()
    assert np.abs(found - beside).max() > 0.1 * expected.std()


def refused(path, family: tuple[str, dict, dict]) -> str:
    write_relative(path, "refused", family)
    with open_gguf(path) as file, pytest.raises(ModelFileError) as error:
        build_program(file, hidden=True)
    return str(error.value)


def test_an_unknown_activation_is_refused_by_its_key(tmp_path):
    told = refused(tmp_path / "e.gguf", also("modern-bert", {"hidden_activation": "mish"}))
    assert "modern-bert.hidden_activation" in told and "mish" in told


@pytest.mark.parametrize("name, tensor, shape", [
    ("gemma-embedding", "dense_2.weight", (E, E + 1)),
    ("nomic-bert", "cls.weight", (E, E))], ids=["misshapen", "not of this family"])
def test_a_tensor_that_fits_nowhere_is_refused_by_its_name(name, tensor, shape, tmp_path):
    assert tensor in refused(tmp_path / "e.gguf", also(name, {}, {tensor: shape}))
