"""From metadata and tensors to a program: what is read, and what is refused and how."""
import dataclasses
import math

import numpy as np
import pytest

from helpers_golden import FOLDERS
from helpers_program import weight
from tinychat.errors import ModelFileError
from tinychat.gguf_file import GGMLQuantizationType, GGUFFile, QTensor, open_gguf
from tinychat.models import ARCHITECTURES, ModelConfig, build_program, rope
from tinychat.models.config import RopeConfig
from tinychat.models.weights import Weights, gathered, part, reshaped


@pytest.fixture(scope="module")
def smollm2() -> GGUFFile:
    return open_gguf(FOLDERS[0] / "smollm2-a.gguf")


@pytest.fixture(scope="module")
def granite() -> GGUFFile:
    return open_gguf(FOLDERS[0] / "granite4-micro-a.Q2_K.gguf")


def changed(file: GGUFFile, metadata: dict = {}, tensors: dict = {}) -> GGUFFile:
    """The file with some metadata or tensors replaced, or left out where the value is None."""
    def merge(old, new):
        return {key: value for key, value in {**old, **new}.items() if value is not None}

    return dataclasses.replace(file, metadata=merge(file.metadata, metadata),
                               tensors=merge(file.tensors, tensors))


def test_config_takes_its_numbers_from_the_metadata(smollm2):
    config = ModelConfig.from_metadata(smollm2.metadata)
    assert (config.n_layer, config.n_embd, config.n_ctx) == (2, 144, 8192)
    assert (config.n_head, config.n_head_kv, config.n_ff) == ((9, 9), (3, 3), (384, 384))
    assert (config.key_length, config.value_length, config.attention_scale) == (16, 16, 0.25)
    assert (config.rope.n_rot, config.rope.freq_base, config.rope.factor) == (16, 100000.0, 1.0)
    assert config.embedding_scale == config.residual_scale == config.logit_scale == 1.0


def test_config_defaults_follow_from_the_other_numbers(smollm2):
    absent = dict.fromkeys(("llama.attention.head_count_kv", "llama.attention.key_length",
                            "llama.attention.value_length", "llama.rope.dimension_count",
                            "llama.rope.freq_base"))
    config = ModelConfig.from_metadata(changed(smollm2, absent).metadata)
    assert (config.n_head_kv, config.key_length, config.value_length) == ((9, 9), 16, 16)
    assert (config.rope.n_rot, config.rope.freq_base) == (16, 10000.0)


def test_granite_brings_its_scales(granite):
    config = ModelConfig.from_metadata(granite.metadata)
    assert (config.attention_scale, config.embedding_scale) == (0.0625, 12.0)
    assert (config.n_head_kv, config.n_expert) == ((2, 2), 0)
    assert config.residual_scale == pytest.approx(0.22) and config.logit_scale == 2.0
    text = str(build_program(granite))
    assert "scale=12)" in text and "scale=0.22)" in text and text.endswith("scale=0.5)")


def test_granite_can_say_that_it_has_no_rope(granite):
    assert " = rope(" in str(build_program(granite))
    assert " = rope(" not in str(build_program(changed(
        granite, {"granite.rope.scaling.finetuned": False})))


@pytest.mark.parametrize("key, value, complaint", [
    ("block_count", None, "metadata key llama.block_count is missing"),
    ("block_count", 0, "llama.block_count: expected an integer from 1 to 4096, got 0"),
    ("block_count", 10**9, "from 1 to 4096, got 1000000000"),
    ("block_count", "two", "llama.block_count: expected an integer from 1 to 4096, got 'two'"),
    ("block_count", True, "llama.block_count: expected an integer .* got True"),
    ("block_count", 3, "tensor 'blk.2.attn_norm.weight' is missing"),
    ("block_count", 1, "has no use for tensor 'blk.1.attn_k.weight', .* and 6 more"),
    ("embedding_length", -1, "llama.embedding_length: expected an integer"),
    ("embedding_length", 128, r"'token_embd.weight': expected shape \(any, 128\), found \(512,"),
    ("attention.head_count", 0, "llama.attention.head_count: expected an integer from 1 to 144"),
    ("attention.head_count", [9], "llama.attention.head_count: expected one number or 2, .* got 1"),
    ("attention.head_count_kv", 2, "expected a divisor of the 9 heads of layer 0, got 2"),
    ("attention.head_count_kv", np.array([3, 0]), "layer 1 has 0 KV heads"),
    ("attention.head_count_kv", np.array([3, 3.5]), "head_count_kv: expected an integer .* 3.0"),
    ("attention.key_length", 32, r"'blk.0.attn_q.weight': expected shape \(288, 144\)"),
    ("attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon is missing"),
    ("attention.layer_norm_rms_epsilon", math.nan, "expected a number from 0 to 1, got nan"),
    ("attention.scale", -1.0, "attention.scale: expected a number from 0"),
    ("context_length", 0, "llama.context_length: expected an integer from 1"),
    ("feed_forward_length", 100, r"'blk.0.ffn_gate.weight': expected shape \(100, 144\)"),
    ("rope.dimension_count", 15, "rope.dimension_count: expected an even number, got 15"),
    ("rope.dimension_count", 18, "rope.dimension_count: expected an integer from 2 to 16"),
    ("rope.freq_base", 0.0, "rope.freq_base: expected a number from"),
    ("rope.freq_base", math.inf, "rope.freq_base: expected a number from"),
    ("rope.scaling.factor", 1e-300, "rope.scaling.factor: expected 0 or a number from 1e-06"),
    ("rope.scale_linear", 5e-324, "rope.scale_linear: expected 0 or a number from 1e-06"),
    ("logit_scale", 1e-45, "logit_scale: expected 0 or a number from 1e-06, got 1e-45"),
    ("rope.scaling.type", "warp", "expected one of none, linear, yarn, longrope, got 'warp'"),
    ("rope.scaling.type", np.arange(3), "rope.scaling.type: expected one of"),
    ("rope.scaling.type", "longrope", "'rope_factors_short.weight' is missing"),
    ("rope.scaling.finetuned", 1, "rope.scaling.finetuned: expected a boolean, got 1"),
])
def test_metadata_that_makes_no_model_is_refused_by_its_key(smollm2, key, value, complaint):
    with pytest.raises(ModelFileError, match=complaint):
        build_program(changed(smollm2, {f"llama.{key}": value}))


def test_heads_that_do_not_share_out_the_embedding_need_a_length(smollm2):
    odd = {"llama.attention.key_length": None, "llama.attention.head_count": 10,
           "llama.attention.head_count_kv": 5}
    with pytest.raises(ModelFileError, match="expected a multiple of the 10 heads, got 144"):
        build_program(changed(smollm2, odd))


JUNK = (0, -1, 1, 2, 2**63, 2**64 - 1, 1e300, math.nan, -0.5, True, "", "yarn", [], [[1]], ["a", 2],
        np.zeros(0, np.int32), np.full(2, -1, np.int64), np.array([np.nan, 1], np.float32))


@pytest.mark.parametrize("name", ["smollm2-a", "qwen3-yarn-a", "granite4-micro-a.Q2_K"])
def test_no_metadata_value_gets_past_as_another_error(name):
    with open_gguf(FOLDERS[0] / f"{name}.gguf") as file:
        keys = {key for key in file.metadata if key.startswith(file.architecture)}
        keys |= {f"{file.architecture}.rope.scaling.{key}" for key in (
            "type", "factor", "original_context_length", "yarn_beta_fast", "yarn_log_multiplier")}
        for key in keys | {"general.architecture"}:
            for value in JUNK:
                try:
                    build_program(changed(file, {key: value}))
                except ModelFileError:
                    pass


def test_an_unknown_architecture_is_refused_with_the_known(smollm2):
    with pytest.raises(ModelFileError, match="'mamba9' is not supported; known are .*llama.*qwen3"):
        build_program(changed(smollm2, {"general.architecture": "mamba9"}))


def test_golden_models_of_other_families_are_refused_by_name(shared):
    for path in sorted((shared / "golden").glob("*-a.gguf")):
        with open_gguf(path) as file:
            if file.architecture not in ARCHITECTURES:
                with pytest.raises(ModelFileError, match=f"'{file.architecture}' is not supported"):
                    build_program(file)


def test_a_missing_tensor_is_named_with_its_shape(smollm2):
    with pytest.raises(ModelFileError, match=r"'blk.1.ffn_up.weight' is missing; .* \(384, 144\)"):
        build_program(changed(smollm2, tensors={"blk.1.ffn_up.weight": None}))


@pytest.mark.parametrize("shape", [(144,), (0, 144), (144, 384), (1, 384, 144)])
def test_a_misshapen_tensor_is_named_with_both_shapes(smollm2, shape):
    tensor = weight("blk.1.ffn_up.weight", np.zeros(shape))
    with pytest.raises(ModelFileError, match=r"'blk.1.ffn_up.weight': expected shape \(384, 144\)"):
        build_program(changed(smollm2, tensors={tensor.name: tensor}))


@pytest.mark.parametrize("of", [lambda t: part(t, 0, 32), lambda t: reshaped(t, 64, 1, 1),
                                lambda t: gathered(t, np.arange(9), "nine")])
def test_a_vector_in_blocks_that_cannot_be_taken_apart_is_named(of):
    vector = QTensor("blk.0.fused.bias", GGMLQuantizationType.Q8_0, (64,), np.zeros(68, np.uint8))
    with pytest.raises(ModelFileError, match=r"'blk.0.fused.bias': .* found Q8_0 of shape \(64\)"):
        of(vector)


def test_an_empty_vocabulary_is_refused(smollm2):
    table = weight("token_embd.weight", np.zeros((0, 144)))
    with pytest.raises(ModelFileError, match=r"expected shape \(any, 144\), found \(0, 144\)"):
        build_program(changed(smollm2, tensors={table.name: table}))


def test_a_tensor_without_a_use_is_refused(smollm2):
    sinks = weight("blk.0.attn_whatever.weight", np.zeros(9))
    with pytest.raises(ModelFileError, match="no use for tensor 'blk.0.attn_whatever.weight'"):
        build_program(changed(smollm2, tensors={sinks.name: sinks}))


def test_a_bias_is_applied_where_there_is_one(smollm2):
    bias = weight("blk.1.ffn_down.bias", np.ones(144))
    program = build_program(changed(smollm2, tensors={bias.name: bias}))
    assert "ffn_down.bias<F32 144>" in str(program)


def test_logits_come_from_the_embedding_only_without_an_output(smollm2):
    output = weight("output.weight", np.ones((512, 144)))
    untied = build_program(changed(smollm2, tensors={output.name: output}))
    assert "linear(b32, token_embd.weight<" in str(build_program(smollm2))
    assert "linear(b32, output.weight<" in str(untied)


# Rope

PLAIN = dict(n_rot=32, freq_base=10000.0, scaling="linear", factor=1.0, n_ctx_orig=4096,
             beta_fast=32.0, beta_slow=1.0, log_multiplier=0.0, attn_factor=1.0, finetuned=True,
             freq_base_swa=None, sections=None)


def make_rope(tensors: dict = {}, n_ctx: int = 0, **fields):
    return rope.make_rope(RopeConfig(**{**PLAIN, **fields}), "halves", Weights(tensors),
                          n_ctx=n_ctx)


def test_plain_rope_is_a_geometric_row():
    made = make_rope()
    expected = [10000.0 ** (-i / 16) for i in range(16)]
    np.testing.assert_allclose(made.inv_freq, expected, rtol=1e-7)
    assert made.layout == "halves" and made.magnitude == 1.0 and made.inv_freq.dtype == np.float32


def test_linear_scaling_slows_every_pair():
    np.testing.assert_allclose(make_rope(factor=4.0).inv_freq, make_rope().inv_freq / 4)


def test_scaling_none_ignores_the_factor():
    made = make_rope(scaling="none", factor=4.0)
    np.testing.assert_array_equal(made.inv_freq, make_rope().inv_freq)


def test_rope_freqs_divide_pair_by_pair():
    factors = np.linspace(1, 8, 16)
    made = make_rope({"rope_freqs.weight": weight("rope_freqs.weight", factors)})
    np.testing.assert_allclose(made.inv_freq, make_rope().inv_freq / factors, rtol=1e-6)


@pytest.mark.parametrize("values, complaint", [
    (np.ones(15), r"expected shape \(16\), found \(15\)"),
    (np.zeros(16), "'rope_freqs.weight': expected positive numbers only"),
    (np.full(16, np.nan), "expected positive numbers only"),
    (np.full(16, 1e-38), "expected positive numbers only, from 1e-06 on"),
])
def test_bad_rope_freqs_are_refused(values, complaint):
    with pytest.raises(ModelFileError, match=complaint):
        make_rope({"rope_freqs.weight": weight("rope_freqs.weight", values)})


def test_yarn_keeps_fast_pairs_stretches_slow_ones_and_ramps_between():
    plain, yarn = make_rope().inv_freq, make_rope(scaling="yarn", factor=16.0)
    turns = 4096 * plain / (2 * math.pi)                  # over the original context
    ratio = yarn.inv_freq / plain
    np.testing.assert_allclose(ratio[turns > 64], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.5], 1 / 16, rtol=1e-6)
    assert (np.diff(ratio) <= 1e-6).all() and ((ratio > 0.07) & (ratio < 0.99)).any()
    assert yarn.magnitude == pytest.approx(0.1 * math.log(16) + 1)


def test_yarn_magnitude_is_undone_by_mscale_all_dim():
    made = make_rope(scaling="yarn", factor=16.0, log_multiplier=1.0, attn_factor=1.25)
    assert made.magnitude == pytest.approx(1.25)
