"""The NEON kernels on qemu, where the processor is not an AArch64 (there the other tests run them).

Products have the bits of portable C on this machine. The other operations pass the tests of every
level, with fewer shapes: an emulated float costs as much as a hundred real ones.
"""
import platform

import numpy as np
import pytest

_kernels = pytest.importorskip("tinychat._kernels", reason="the native kernels are not built")

import test_golden as golden  # noqa: E402
import test_native as native  # noqa: E402
import test_native_attention as attention  # noqa: E402
import test_native_mixers as mixers  # noqa: E402
import test_native_rows as rows  # noqa: E402
from gguf import GGMLQuantizationType  # noqa: E402
from helpers_neon import ISA, linear  # noqa: E402
from test_linear_kernels import (  # noqa: E402
    BLOCKS, FLOATS, MIN_AT, SCALE_AT, n_cols_of, random_weights, with_field)
from tinychat.ops.recorder import ACTIVATIONS  # noqa: E402

pytestmark = pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"),
                                reason="every other test of the kernels runs them here")
KV_TYPES = pytest.mark.parametrize("kv_type", ["q8_0", "f16", "f32"])
U32 = np.uint32


def same_bits(name: str, raw: np.ndarray, x: np.ndarray, bias=None, tiles=None) -> None:
    """Products and quantized activations of NEON, of portable C there, and of portable C here."""
    qtype, raw, x = GGMLQuantizationType[name], np.ascontiguousarray(raw), np.float32(x)
    args = (qtype, raw.reshape(-1), len(raw), x.shape[1], np.ascontiguousarray(x), bias, tiles)
    got, act = linear(*args)
    there, act_there = linear(*args, isa="scalar")
    here = _kernels.linear("scalar", *args)
    assert act == act_there
    numbers = ~np.isnan(here)
    assert np.array_equal(got, there, equal_nan=True)
    assert np.array_equal(got, here, equal_nan=True)
    assert np.array_equal(got.view(U32)[numbers], here.view(U32)[numbers])  # -0 is not 0


# Products

@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_products_have_the_bits_of_portable_c(name):
    rng, n_cols = np.random.default_rng(1), n_cols_of(name, 77 if name in FLOATS else 544)
    raw, bias = random_weights(name, 117, n_cols, rng), np.float32(rng.standard_normal(117))
    x = rng.standard_normal((27, n_cols)) * 10.0 ** rng.integers(-3, 4, (27, n_cols))
    for n_tokens in (1, 2, 3, 4, 7, 8, 13, 27):
        same_bits(name, raw, x[:n_tokens], bias if n_tokens % 2 else None)
    same_bits(name, raw, x[:9], bias, (1, 4))
    same_bits(name, raw[:1], x[:2, :])
    same_bits(name, raw[:37], x[:5, :])


@pytest.mark.parametrize("name", BLOCKS)
def test_extreme_codes_scales_and_activations_have_the_bits_of_portable_c(name):
    rng, n_cols = np.random.default_rng(2), n_cols_of(name, 256)
    raw = random_weights(name, 16, n_cols, rng)
    x = np.full((5, n_cols), 127, np.float32)
    x[1], x[2, ::2], x[3, 16:] = -127, -127, -127
    x[4] = rng.standard_normal(n_cols)
    for byte in (0x00, 0x7f, 0x80, 0xff):
        filled = np.full_like(raw, byte)
        if name == "MXFP4":
            filled.reshape(16, -1, 17)[..., 0] = rng.integers(0, 250, 16)[:, None]
        else:
            scales = np.resize(np.float16([6e-8, -3e-5, 1, 65504]), (16, 1))
            filled = with_field(name, filled, SCALE_AT.get(name, 0), scales)
            if name in MIN_AT:
                filled = with_field(name, filled, MIN_AT[name], -scales[::-1])
        same_bits(name, filled, x)


def test_activations_of_any_kind_have_the_bits_of_portable_c():
    rng = np.random.default_rng(3)
    raw = random_weights("Q4_1", 16, 96, rng)
    x = np.float32(rng.standard_normal((9, 96)))
    x[0], x[1, 32:64], x[2, 40] = 0, x[1, 32:64] * np.float32(1e-38), np.inf
    x[3, 7], x[4, 95] = np.nan, -np.inf
    x[5, :32] = np.arange(-16, 16) / 2  # ties, where d is 1
    x[5, 0] = 127
    x[6] *= np.float32(1e-44)
    x[7] *= np.float32(1e38)
    with np.errstate(over="ignore", invalid="ignore"):
        same_bits("Q4_1", raw, x)


# Operations, against the reference

@pytest.mark.parametrize("width", [1, 33])
def test_row_operations_agree(width):
    native.test_embed_outputs_and_scale_are_exact(ISA, width)
    native.test_add_is_exact(ISA, width)
    rows.test_given_rows_take_the_place_of_tokens(ISA, width)
    rows.test_products_and_sums_with_vectors_and_columns_are_exact(ISA, width)
    rows.test_soft_caps_agree(ISA, width)


@pytest.mark.parametrize("groups, group", rows.NORMS)
def test_norms_agree(groups, group):
    for weights in ("none", "group and row"):
        rows.test_norms_agree(ISA, groups, group, weights)


@pytest.mark.parametrize("fn", ACTIVATIONS)
def test_activations_and_gates_agree(fn):
    if fn in ACTIVATIONS[:-1]:
        rows.test_activations_agree(ISA, fn, 130)
    rows.test_gates_agree(ISA, fn, 33)
    rows.test_what_is_not_a_number_stays_none(ISA, fn)


def test_tanh_and_erf_are_accurate_everywhere():
    rows.test_tanh_and_erf_are_accurate_everywhere(ISA)


@pytest.mark.parametrize("layout", ["adjacent", "halves"])
def test_ropes_agree(layout):
    for head_dim, n_rot in ((2, 2), (10, 6), (64, 64), (80, 20)):
        native.test_rope_agrees(ISA, layout, head_dim, n_rot)
    rows.test_ropes_turn_by_their_axes(ISA, layout)


@KV_TYPES
@pytest.mark.parametrize("shape", attention.SHAPES, ids=str)
def test_attention_agrees_in_every_shape(shape, kv_type):
    attention.test_attention_agrees(ISA, kv_type, shape, {}, None)


@pytest.mark.parametrize("fields, runs", attention.SEEN[1:], ids=str)
def test_attention_agrees_on_what_is_seen(fields, runs):
    attention.test_attention_agrees(ISA, "f16", (6, 3, 20, 24), fields, runs)


@KV_TYPES
def test_attention_is_not_harmed_by_what_is_not_seen_or_extreme(kv_type):
    attention.test_what_a_token_does_not_see_may_be_anything(ISA, kv_type)
    attention.test_sinks_and_scores_may_be_extreme(ISA)


def test_float16_keys_and_values_round_as_numpy_does():
    native.test_float16_keys_and_values_round_as_numpy_does(ISA)


@pytest.mark.parametrize("name", mixers.MIXERS)
def test_mixers_agree(name):
    mixers.test_mixers_agree(ISA, name)


@pytest.mark.parametrize("qtype", ["F16", "Q4_0"])
def test_experts_agree(qtype):
    mixers.test_experts_agree(ISA, 7, 2, 160, 64, qtype)


@pytest.mark.parametrize("n_vocab", [1, 65, 1000])
def test_sampling_takes_the_token_that_numpy_takes(n_vocab):
    native.test_sampling_takes_the_token_that_numpy_takes(ISA, n_vocab)
    native.test_sampling_never_takes_what_is_not_finite(ISA)


# Whole programs

@pytest.mark.parametrize("name", ["smollm2-a", "llama3-a.Q4_K", "qwen3-a.Q2_K", "lfm2moe-a"])
def test_golden_models_agree_and_chunks_do_not_change_their_bits(name):
    golden.test_logits_and_greedy_tokens_agree(name, f"native {ISA}")
    golden.test_logits_agree_when_the_prompt_comes_in_chunks(name, f"native {ISA}")


def test_company_does_not_change_the_bits():
    rows.test_bits_are_the_same_in_chunks_in_a_crowd_and_with_any_number_of_threads(ISA, 0)
    golden.test_two_sequences_in_a_step_do_not_see_each_other("llama3-a.Q4_K", f"native {ISA}")
