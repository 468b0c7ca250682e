"""The reference against formulas written another way, in float64; and its executor."""
import logging
import math
import sys
from contextlib import closing

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from helpers_program import batch, close, normal, tiny_program, weight
from tinychat.errors import KernelError, ModelFileError, ModelLoadError
from tinychat.gguf_file import QTensor
from tinychat.ops import meaning, open_executor
from tinychat.ops.program import PAGE_TOKENS, Heads, Rope
from tinychat.ops.recorder import Recorder
from tinychat.ops.reference import ReferenceExecutor
from tinychat.ops.sampling import SamplingParams


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_embed_takes_the_rows_of_the_tokens(rng):
    table, tokens = normal(rng, 6, 4), np.array([5, 0, 5])
    np.testing.assert_array_equal(meaning.embed(weight("e", table), tokens), table[tokens])


def test_embed_dequantises_rows_as_the_whole_table_is(rng):
    rows = gguf.quants.quantize(normal(rng, 6, 64), GGMLQuantizationType.Q8_0)
    table = QTensor("e", GGMLQuantizationType.Q8_0, (6, 64), rows.reshape(-1))
    tokens = np.array([3, 1])
    whole = meaning.dequantize(table)
    np.testing.assert_array_equal(meaning.embed(table, tokens), whole[tokens])


@pytest.mark.parametrize("group", [12, 4])
def test_rmsnorm_divides_each_group_by_its_root_mean_square(rng, group):
    x, w = normal(rng, 5, 12), normal(rng, group)
    expected = np.empty((5, 12))
    for t in range(5):
        for at in range(0, 12, group):
            values = x[t, at:at + group].astype(float)
            expected[t, at:at + group] = values / math.sqrt(sum(values ** 2) / group + 0.1) * w
    close(meaning.rmsnorm(x, w, eps=0.1, group=len(w)), expected)


def test_linear_multiplies_by_rows_and_adds_the_bias(rng):
    x, w, bias = normal(rng, 3, 5), normal(rng, 4, 5), normal(rng, 4)
    expected = np.einsum("tk,nk->tn", x.astype(float), w) + bias
    close(meaning.linear(x, w, bias), expected)
    close(meaning.linear(x, w), expected - bias)


@pytest.mark.parametrize("layout", ["adjacent", "halves"])
def test_rope_turns_pairs_as_complex_numbers(rng, layout):
    n_head, head_dim, n_rot, positions = 3, 10, 6, np.array([0, 1, 1000], np.int32)
    inv_freq = np.array([1.0, 0.125, 0.01], np.float32)
    x = normal(rng, 3, n_head * head_dim)
    heads = x.reshape(3, n_head, head_dim)
    expected = heads.astype(float)
    first = [0, 2, 4] if layout == "adjacent" else [0, 1, 2]
    second = [1, 3, 5] if layout == "adjacent" else [3, 4, 5]
    turned = ((heads[..., first] + 1j * heads[..., second])
              * 1.5 * np.exp(1j * positions[:, None, None] * inv_freq.astype(float)))
    expected[..., first], expected[..., second] = turned.real, turned.imag
    got = meaning.rope(x, positions, head_dim, Rope(layout, inv_freq, 1.5))
    close(got, expected.reshape(x.shape), 1e-4)  # half an ulp of the angle 1000 is 3e-5
    np.testing.assert_array_equal(got.reshape(heads.shape)[..., n_rot:], heads[..., n_rot:])


def test_rope_at_position_0_changes_nothing(rng):
    x = normal(rng, 1, 8)
    rope = Rope("halves", np.array([1.0, 0.5], np.float32))
    np.testing.assert_array_equal(meaning.rope(x, np.array([0], np.int32), 4, rope), x)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_is_a_weighted_mean_of_the_values_seen(rng, window):
    heads = Heads(n_head=4, n_head_kv=2, key_length=5, value_length=3, scale=0.7, window=window)
    positions = np.array([2, 6], np.int32)
    q, k, v = normal(rng, 2, 4 * 5), normal(rng, 7, 2, 5), normal(rng, 7, 2, 3)
    expected = np.zeros((2, 4, 3))
    for t, position in enumerate(positions):
        for h in range(4):
            seen = range(max(0, position - window + 1) if window else 0, position + 1)
            e = [math.exp(0.7 * float(q[t, h * 5:h * 5 + 5] @ k[s, h // 2])) for s in seen]
            expected[t, h] = sum(p * v[s, h // 2].astype(float) for p, s in zip(e, seen)) / sum(e)
    seen = meaning.seen_range(positions, None, heads)
    close(meaning.attend(q, k, v, *seen, heads), expected.reshape(2, 12), 1e-5)


def test_softmax_of_far_apart_numbers_stays_finite():
    got = meaning.softmax(np.array([[1e30, -1e30, 1e30], [-np.inf, 0, -np.inf]], np.float32))
    np.testing.assert_array_equal(got, [[0.5, 0, 0.5], [0, 1, 0]])


def test_swiglu_at_its_ends():
    ends = np.array([0.0, 30.0, -30.0, 1.0], np.float32)
    got = meaning.gate("silu", ends, np.full(4, 2, np.float32))
    close(got, np.array([0.0, 60.0, 0.0, 2 / (1 + math.exp(-1))]))


BLOCKS = [kind for kind in GGMLQuantizationType
          if kind in gguf.quants._type_traits or kind.name in ("F32", "F16")]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_dequantize_gives_the_shape_of_the_tensor(kind):
    block, n_bytes = GGML_QUANT_SIZES[kind]
    tensor = QTensor("w", kind, (2, 3, 2 * block), np.zeros(2 * 3 * 2 * n_bytes, np.uint8))
    values = meaning.dequantize(tensor)
    assert values.shape == tensor.shape and values.dtype == np.float32


def test_a_scale_that_is_no_number_makes_such_weights_without_a_warning():
    block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_0]
    data = np.zeros(n_bytes, np.uint8)
    data[:2] = np.array([np.inf], np.float16).view(np.uint8)
    data[2] = 8  # a code of 0, and infinity times 0 is no number
    values = meaning.dequantize(QTensor("w", GGMLQuantizationType.Q4_0, (1, block), data))
    assert np.isnan(values[0, 0]) and np.isinf(values[0, 1:]).all()


def test_a_row_too_small_to_square_is_normed_without_a_warning():
    x, norm = weight("x", np.full((2, 4), 1e-30)), weight("norm", np.ones(4))
    g = Recorder()
    program = g.finish("small", g.outputs(g.rmsnorm(g.embed(x), norm, 0.0)))
    with closing(ReferenceExecutor(program, n_pages=2)) as executor:
        assert np.isinf(executor.step(batch([1]))).all()


def test_a_type_that_holds_no_weights_is_a_file_error():
    tensor = QTensor("w", GGMLQuantizationType.I32, (2, 2), np.zeros(16, np.uint8))
    with pytest.raises(ModelFileError, match="'w' has the type I32"):
        meaning.dequantize(tensor)


# The executor

def run(executor, *batches):
    return [executor.step(b).copy() for b in batches][-1]


def tiny(**limits) -> ReferenceExecutor:
    return ReferenceExecutor(tiny_program(), **{"n_pages": 4, "kv_type": "f32", **limits})


TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3] * 4  # two pages


def test_a_prompt_in_two_steps_ends_in_the_same_logits():
    whole = run(tiny(), batch(TOKENS))
    split = run(tiny(), batch(TOKENS[:33], outputs=[]), batch(TOKENS[33:], range(33, 40)))
    close(split, whole, 1e-5)


def test_it_does_not_matter_which_pages_hold_a_sequence():
    there = run(tiny(), batch(TOKENS, pages=[[3, 1]]))
    np.testing.assert_array_equal(there, run(tiny(), batch(TOKENS)))


def test_pages_of_other_sequences_are_left_alone():
    executor = tiny()
    run(executor, batch(TOKENS[:32], pages=[[2]]))
    run(executor, batch(TOKENS[:32], range(32, 64), pages=[[0, 1]]))
    got = run(executor, batch([7], [32], pages=[[2, 3]]))
    close(got, run(tiny(), batch([*TOKENS[:32], 7])), 1e-5)


def test_sequences_mix_in_one_step_in_any_order():
    mixed = batch([3, 8, 1, 9], [0, 0, 1, 1], [1, 0, 1, 0], [[0], [3]], [2, 3])
    got = run(tiny(), mixed)
    close(got, np.concatenate([run(tiny(), batch([3, 1])), run(tiny(), batch([8, 9]))]), 1e-5)


def test_a_step_may_ask_for_no_logits():
    assert run(tiny(), batch([1, 2], outputs=[])).shape == (0, 11)


def test_a_window_forgets_what_lies_before_it():
    def last(first_token):
        executor = ReferenceExecutor(tiny_program(window=3), n_pages=4, kv_type="f32")
        return run(executor, batch([first_token, 1, 2, 3]))

    np.testing.assert_array_equal(last(5), last(6))


def test_a_refused_batch_leaves_the_cache_as_it_was():
    executor = tiny()
    run(executor, batch(TOKENS[:4], outputs=[]))
    with pytest.raises(KernelError, match="tokens"):
        executor.step(batch([1, 99]))
    close(run(executor, batch([7], [4])), run(tiny(), batch([*TOKENS[:4], 7])), 1e-5)


def test_limits_are_the_executors_own():
    with pytest.raises(KernelError, match="number of tokens is 3, expected 1 to 2"):
        tiny(max_tokens=2).step(batch([1, 2, 3]))


def test_float16_keys_take_half_the_memory_and_little_of_the_precision():
    half = tiny(kv_type="f16")
    assert half.kv_bytes * 2 == tiny().kv_bytes == 4 * PAGE_TOKENS * (4 + 6) * 4
    close(run(half, batch(TOKENS)), run(tiny(), batch(TOKENS)), 1e-2)


def test_weights_are_counted_in_float32():
    program = tiny_program()
    embedding, *others = program.weights()
    assert tiny().weight_bytes == sum(4 * math.prod(w.shape) for w in others)


def test_an_unknown_cache_type_is_refused():
    with pytest.raises(KernelError, match="expected kv_type f32, f16, q8_0, got 'q8'"):
        tiny(kv_type="q8")


def test_a_cache_larger_than_memory_is_a_load_error():
    with pytest.raises(ModelLoadError, match="no memory"):
        tiny(n_pages=1 << 50)


def test_a_closed_executor_says_so():
    executor = tiny()
    executor.close()
    with pytest.raises(KernelError, match="closed"):
        executor.step(batch([1]))


def test_it_samples_like_the_pure_function():
    logits = np.array([0.0, 3.0, 1.0], np.float32)
    assert tiny().sample(logits, SamplingParams(temperature=0.0), [], 0.5) == 1


# open_executor

def test_pure_mode_takes_the_reference_and_warns_once(monkeypatch, caplog):
    monkeypatch.setenv("TINYCHAT_PURE", "1")
    with caplog.at_level(logging.WARNING, "tinychat"):
        assert open_executor(tiny_program(), n_pages=1).name == "reference"
    assert [record.message for record in caplog.records] == [
        "running on NumPy, many times slower and in float32 (TINYCHAT_PURE=1)"]


def test_the_reference_can_be_asked_for_without_a_warning(caplog):
    assert open_executor(tiny_program(), kind="reference", n_pages=1).name == "reference"
    assert not caplog.records


def test_an_unknown_kind_is_refused():
    with pytest.raises(KernelError, match="expected executor native or reference, got 'cuda'"):
        open_executor(tiny_program(), kind="cuda", n_pages=1)


def test_the_native_executor_is_asked_for_by_name_or_not_at_all(monkeypatch):
    monkeypatch.setenv("TINYCHAT_PURE", "1")
    monkeypatch.setitem(sys.modules, "tinychat.ops.native", None)  # as if nothing had been compiled
    with pytest.raises(KernelError, match="the native executor is not available"):
        open_executor(tiny_program(), kind="native", n_pages=1)


def test_missing_kernels_are_told_in_one_line(monkeypatch, caplog):
    monkeypatch.delenv("TINYCHAT_PURE", raising=False)
    monkeypatch.setitem(sys.modules, "tinychat.ops.native", None)
    assert open_executor(tiny_program(), n_pages=1).name == "reference"
    assert len(caplog.records) == 1 and "no compiled kernels" in caplog.records[0].message
