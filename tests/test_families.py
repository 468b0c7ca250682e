"""Dense families without golden files: tiny models of each, beside what llama.cpp makes of them.

llama.cpp takes GELU from a table of 16-bit numbers, so families with it agree less closely.
"""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from helpers_families import ENCODERS, EXPECTED, FAMILIES, ROWS, TOKENS, write_family
from helpers_golden import EXECUTORS, PAGES, open_golden, prefill, step
from tinychat.errors import ModelFileError
from tinychat.gguf_file import open_gguf
from tinychat.models import build_program
from tinychat.ops.batch import Batch
from tinychat.ops.reference import ReferenceExecutor

EXACT, TABLE_GELU = 2e-4, 0.02  # of the standard deviation
WITH_GELU = ("bert", "falcon", "gemma", "gpt", "modern-bert", "phi2", "starcoder")

every_family = pytest.mark.parametrize("name", FAMILIES)
every_executor = pytest.mark.parametrize("kind", EXECUTORS)


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    """name -> the file, made once."""
    folder, made = tmp_path_factory.mktemp("families"), {}

    def path(name: str):
        if name not in made:
            made[name] = write_family(folder / f"{name}.gguf", name)
        return made[name]
    return path


def assert_expected(name: str, found: np.ndarray) -> None:
    with np.load(EXPECTED) as expected:
        limit = TABLE_GELU if name.startswith(WITH_GELU) else EXACT
        assert np.abs(found[ROWS] - expected[name]).max() <= limit * expected[name].std()


@every_executor
@every_family
def test_logits_agree_with_those_of_llama_cpp(name, kind, path_of):
    executor = open_golden(SimpleNamespace(path=path_of(name)), kind)
    assert_expected(name, step(executor, (0, 0, TOKENS)))
    executor.close()


@every_executor
@every_family
def test_a_prompt_in_chunks_beside_another_gives_the_same_logits(name, kind, path_of):
    executor, half = open_golden(SimpleNamespace(path=path_of(name)), kind), len(TOKENS) // 2
    whole = step(executor, (0, 0, TOKENS))

    def assert_same(logits: np.ndarray, expected: np.ndarray) -> None:
        if kind == "reference":
            assert np.abs(logits - expected).max() <= EXACT * whole.std()
        else:
            np.testing.assert_array_equal(logits, expected)
    assert_same(prefill(executor, TOKENS, 11), whole)
    step(executor, (1, 0, TOKENS[:half]))
    mixed = step(executor, (0, 0, TOKENS), (1, half, TOKENS[half:]))
    assert_same(mixed, np.concatenate([whole, whole[half:]]))
    executor.close()


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_of_encoders_agree_with_those_of_llama_cpp(name, path_of):
    with open_gguf(path_of(name)) as file:
        program = build_program(file, hidden=True)
    executor = ReferenceExecutor(program, n_pages=PAGES.size, max_tokens=128, max_outputs=128,
                                 max_sequences=2, kv_type="f32")
    n = len(TOKENS)
    positions = np.arange(n, dtype=np.int32)
    spans = np.tile(np.array([0, n - 1], np.int32), (n, 1, 1))
    assert_expected(name, executor.step(
        Batch(TOKENS, positions, 0 * positions, PAGES[:1], positions, spans=spans)))


def opened(path) -> SimpleNamespace:
    """What build_program reads of a file, to be changed."""
    with open_gguf(path) as file:
        return SimpleNamespace(architecture=file.architecture, metadata=dict(file.metadata),
                               tensors=dict(file.tensors))


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
def test_a_misshapen_tensor_is_refused_by_name(name, path_of):
    file = opened(path_of(name))
    for wrong, tensor in list(file.tensors.items()):
        if wrong.startswith("rope_f"):  # of use in some contexts only
            continue
        file.tensors[wrong] = replace(tensor, shape=(*tensor.shape[:-1], tensor.shape[-1] + 1))
        with pytest.raises(ModelFileError, match="tensor "):
            build_program(file)
        file.tensors[wrong] = tensor


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
def test_absurd_numbers_are_refused_in_one_line(name, path_of):
    file, (arch, keys, _) = opened(path_of(name)), (FAMILIES | ENCODERS)[name]
    for key in keys:
        full = f"{arch}.{key}"
        right = file.metadata[full]
        for wrong in (0, 1, 3, -1, 2**31, 0.5, float("nan"), True, "x", [], [1, 2], None):
            file.metadata[full] = wrong
            try:
                build_program(file)
            except ModelFileError as error:
                assert "\n" not in str(error)
        file.metadata[full] = right


@pytest.mark.parametrize("name", ["gpt2", "starcoder"])
def test_learned_positions_are_required_where_a_family_has_them(name, path_of):
    file = opened(path_of(name))
    del file.tensors["position_embd.weight"]
    with pytest.raises(ModelFileError, match="'position_embd.weight' is missing"):
        build_program(file)


def test_clamped_keys_are_refused_by_the_key(path_of):
    file = opened(path_of("olmo"))
    file.metadata["olmo.attention.clamp_kqv"] = 8.0
    with pytest.raises(ModelFileError, match="olmo.attention.clamp_kqv"):
        build_program(file)


def test_old_minicpm_files_get_the_scales_of_their_size(path_of):
    """Beside a file that says them."""
    old, new = opened(path_of("minicpm")), opened(path_of("minicpm"))
    for key, value in (("embedding_scale", 12.0), ("residual_scale", 0.7),
                       ("logit_scale", 48 / 256)):
        del old.metadata[f"minicpm.{key}"]
        new.metadata[f"minicpm.{key}"] = value
    results = []
    for file in (old, new):
        executor = ReferenceExecutor(build_program(file), n_pages=PAGES.size, max_tokens=128,
                                     max_outputs=128, max_sequences=2, kv_type="f32")
        results.append(step(executor, (0, 0, TOKENS)))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-4)
