"""Families without golden files: tiny models of each, beside what llama.cpp makes of them."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from helpers_embedders import EMBEDDERS
from helpers_engine import GREEDY, read
from helpers_golden import EXECUTORS, FOLDERS, open_model, prefill, step
from helpers_relatives import BASE, L, PEER, ROWS, TOKENS, write_relative
from helpers_relatives_dense import DENSE
from helpers_relatives_encoders import ENCODERS
from helpers_relatives_mixed import MIXED
from tinychat.engine import Engine
from tinychat.errors import ModelFileError
from tinychat.gguf_file import open_gguf
from tinychat.models import ARCHITECTURES, build_program

RELATIVES = MIXED | DENSE
ALL = RELATIVES | ENCODERS
WITH_GELU = {name for name, (arch, _, _) in RELATIVES.items() if arch in (
    "falcon", "gemma", "gemma2", "gemma3", "gemma4", "gpt2", "gptneox", "phi2", "starcoder",
    "starcoder2")}
OPTIONAL = (".bias", "norm.weight", "output.weight", "shexp.weight", "gate.weight",
            "gate_exps.weight", "scale.weight", "exps.scale")  # what these have a meaning without

every_relative = pytest.mark.parametrize("name", RELATIVES)
every_file = pytest.mark.parametrize("name", ALL)
every_executor = pytest.mark.parametrize("kind", EXECUTORS)


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    """name -> the file, made once."""
    folder, made = tmp_path_factory.mktemp("relatives"), {}

    def path(name: str):
        if name not in made:
            made[name] = write_relative(folder / f"{name}.gguf", name,
                                        ALL[name])
        return made[name]
    return path


def assert_close(logits: np.ndarray, expected: np.ndarray, tolerance: float = 2e-4) -> None:
    assert np.abs(logits - expected).max() <= tolerance * expected.std()


@every_executor
@every_relative
def test_logits_agree_with_those_of_llama_cpp(name, kind, path_of):
    executor = open_model(path_of(name), kind)
    with np.load(PEER) as expected:
        tolerance = 5e-3 if name in WITH_GELU else 2e-4  # llama.cpp's is from a 16-bit table
        assert_close(step(executor, (0, 0, TOKENS))[ROWS], expected[name], tolerance)
    executor.close()


@every_executor
@every_relative
def test_a_prompt_in_chunks_beside_another_gives_the_same_logits(name, kind, path_of):
    executor, half = open_model(path_of(name), kind), len(TOKENS) // 2
    same = assert_close if kind == "reference" else np.testing.assert_array_equal
    whole = step(executor, (0, 0, TOKENS))
    same(prefill(executor, TOKENS, 11), whole)
    first = step(executor, (1, 0, TOKENS[:half]))
    mixed = step(executor, (0, 0, TOKENS), (1, half, TOKENS[half:]))
    same(np.concatenate([first, mixed[len(TOKENS):]]), whole)
    same(mixed[:len(TOKENS)], whole)
    executor.close()


def test_every_architecture_is_tested_by_a_golden_file_or_a_relative():
    """In the folder of the developers are more golden files than here."""
    tested = {arch for arch, _, _ in (RELATIVES | EMBEDDERS).values()}
    for path in (path for folder in FOLDERS for path in folder.glob("*-a*.gguf")):
        with open_gguf(path) as file:
            tested.add(file.architecture)
    assert ARCHITECTURES.keys() - tested <= {"granite", "granitemoe", "qwen2", "qwen3", "qwen3moe"}


def greedy(executor, prompt: list[int], n: int) -> list[int]:
    """By the plainest loop: the whole text again for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(step(executor, (0, 0, ids))[-1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("name", ["mamba2", "falcon-h1", "lfm2", "qwen35", "exaone-moe",
                                  "deepseek2-yarn", "gemma4-rows"])
def test_turns_and_branches_through_the_engine_answer_as_the_whole_text_does(name, path_of):
    plain, executor = (open_model(path_of(name), "native avx2", max_sequences=3, n_states=9,
                                   n_window_pages=20)
                       for _ in range(2))
    prompt = TOKENS.tolist()
    engine = Engine(executor, n_ctx=64, parallel=2, chunk=32)

    def answer(ids: list[int]) -> list[int]:
        return read(engine.submit(ids, params=GREEDY, max_tokens=5)).ids
    first = answer(prompt)
    assert first == greedy(plain, prompt, 5)
    turn = prompt + first + [3, 1]
    both = [engine.submit(ids, params=GREEDY, max_tokens=5)
            for ids in (turn, prompt[:40] + [9, 9, 9])]
    assert read(both[0]).ids == greedy(plain, turn, 5)
    assert read(both[1]).ids == greedy(plain, prompt[:40] + [9, 9, 9], 5)
    engine.close()
    plain.close()


def opened(path) -> SimpleNamespace:
    """What build_program reads of a file, to be changed."""
    with open_gguf(path) as file:
        return SimpleNamespace(architecture=file.architecture, metadata=dict(file.metadata),
                               tensors=dict(file.tensors))


def is_ahead(name: str, tensor: str) -> bool:
    """Of a layer that guesses at the token after the next, which is not run."""
    return "nextn_predict_layers" in ALL[name][1] and tensor.startswith(f"blk.{L}.")


@every_file
def test_a_misshapen_tensor_is_refused_by_name(name, path_of):
    file = opened(path_of(name))
    for wrong, tensor in list(file.tensors.items()):
        if is_ahead(name, wrong) or wrong.startswith("rope_factors"):  # of use in some contexts
            continue
        file.tensors[wrong] = replace(tensor, shape=(*tensor.shape[:-1], tensor.shape[-1] + 1))
        with pytest.raises(ModelFileError, match="tensor "):
            build_program(file)
        file.tensors[wrong] = tensor


@every_relative
def test_without_a_tensor_the_file_is_refused_or_means_another_model(name, path_of):
    file = opened(path_of(name))
    for missing, tensor in list(file.tensors.items()):
        del file.tensors[missing]
        try:
            build_program(file)
        except ModelFileError as error:
            assert "tensor" in str(error) and "\n" not in str(error)
        else:
            has_another_meaning = missing.endswith(OPTIONAL) or is_ahead(name, missing) or \
                missing.startswith("rope_factors")
            assert has_another_meaning or name.startswith("gemma4") and "attn_v" in missing
        file.tensors[missing] = tensor


@every_file
def test_absurd_numbers_are_refused_in_one_line(name, path_of):
    arch, own, _ = ALL[name]
    file = opened(path_of(name))
    for key in BASE | own:
        full = f"{arch}.{key}"
        if full not in file.metadata:
            continue
        right = file.metadata[full]
        for wrong in (0, 1, 3, -1, 2**31, 0.5, float("nan"), True, "x", [], [1, 2], None,
                      np.arange(99)):
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
    for key, value in (("embedding_scale", 12.0), ("residual_scale", 1.4 / L ** 0.5),
                       ("logit_scale", 48 / 256)):
        del old.metadata[f"minicpm.{key}"]
        new.metadata[f"minicpm.{key}"] = value
    scales = [[(op.name, op.params["scale"]) for op in build_program(file).ops
               if "scale" in op.params] for file in (old, new)]
    assert scales[0] == scales[1] and ("scale", 12.0) in scales[0]
