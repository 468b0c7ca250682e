"""Latent attention: keys and values of all heads are made of one short row per token.

The row itself is kept in the cache, together with one rotated key that all heads share. A query is
taken into the row's space head by head (`attn_k_b`), and what attention gives is taken out of it
(`attn_v_b`): one KV head of R + D_rope values instead of H heads of keys and values.
Source: DeepSeek-V2 report, section 2.1 and appendix C. R: kv_lora_rank.
"""
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tinychat.gguf_file import GGMLQuantizationType, QTensor
from tinychat.models import layers, llama
from tinychat.models.config import MAX_CONTEXT, MAX_WIDTH, ModelConfig
from tinychat.models.weights import Weights, gathered
from tinychat.ops.meaning import dequantize
from tinychat.ops.program import Buffer, Heads, Rope
from tinychat.ops.recorder import Recorder

FILE_MULTIPLIER = 0.1  # the converter writes 0.1 * mscale_all_dim


def describe(g: Recorder, w: Weights, config: ModelConfig, family: llama.Family) -> Buffer:
    """As `llama.describe`, with ropes that are turned by yarn and not lengthened by it."""
    rope = replace(config.rope, log_multiplier=1.0)
    return llama.describe(g, w, replace(config, rope=rope), family)


def latent_attention(g: Recorder, w: Weights, h: Buffer, config: ModelConfig, i: int,
                     heads: Callable[[], Heads], rope: Rope | None) -> Buffer:
    """h (T, E) -> (T, E)."""
    keys, n_head, n_rot = config.keys, config.n_head[i], config.rope.n_rot
    rank = keys.integer("attention.kv_lora_rank", 1, MAX_WIDTH)
    key_length = keys.integer("attention.key_length_mla", n_rot + 1, MAX_WIDTH, config.key_length)
    value_length = keys.integer("attention.value_length_mla", 1, MAX_WIDTH, config.value_length)
    plain, turned = _queries(g, w, h, config, n_head, key_length, n_rot)
    row, key = layers.linear_parts(g, w, "attn_kv_a_mqa", h, rank, n_rot)
    row = layers.norm(g, w, "attn_kv_a_norm", row, config)                    # (T, R)
    into, out_of = _latent_maps(w, n_head, rank, key_length - n_rot, value_length)
    if rope:
        turned, key = g.rope(turned, n_rot, rope), g.rope(key, n_rot, rope)
    q = g.join(g.head_linear(plain, into), turned, n_head)
    k = g.join(row, key)                                                      # (T, R + D_rope)
    if config.temperature_scale:
        length = keys.integer("attention.temperature_length", 1, MAX_CONTEXT,
                              config.rope.n_ctx_orig)
        q = g.temper(q, config.temperature_scale, length)
    shape = replace(heads(), n_head_kv=1, key_length=rank + n_rot, value_length=rank,
                    scale=_scale(config, key_length))
    out = g.head_linear(g.attend(q, k, row, shape), out_of)                   # (T, H * Dv)
    return layers.linear(g, w, "attn_output", out, h.width)


def _queries(g, w, h, config, n_head: int, key_length: int, n_rot: int) -> tuple[Buffer, Buffer]:
    """(T, H * (D - D_rope)) and (T, H * D_rope): each head has its rotated part last."""
    name = "attn_q"
    if w.has("attn_q_a.weight"):
        rank = config.keys.integer("attention.q_lora_rank", 1, MAX_WIDTH)
        h = layers.norm(g, w, "attn_q_a_norm", layers.linear(g, w, "attn_q_a", h, rank), config)
        name = "attn_q_b"
    fused = w.tensor(f"{name}.weight", n_head * key_length, h.width)
    rows = np.arange(n_head * key_length).reshape(n_head, key_length)
    parts = {"plain": rows[:, :-n_rot], "turned": rows[:, -n_rot:]}
    return tuple(g.linear(h, gathered(fused, part.reshape(-1), what))
                 for what, part in parts.items())


def _latent_maps(w: Weights, n_head: int, rank: int, n_plain: int,
                 n_value: int) -> tuple[QTensor, QTensor]:
    """(H, R, D - D_rope) and (H, Dv, R). Older files have both in one matrix, of which the first
    must be turned: such a layer's two are float32 in memory."""
    if not w.has("attn_kv_b.weight"):
        return (w.tensor("attn_k_b.weight", n_head, rank, n_plain),
                w.tensor("attn_v_b.weight", n_head, n_value, rank))
    fused = w.tensor("attn_kv_b.weight", n_head * (n_plain + n_value), rank)
    both = dequantize(fused).reshape(n_head, n_plain + n_value, rank)
    return (_float32(both[:, :n_plain].transpose(0, 2, 1), f"{fused.name}[keys]"),
            _float32(both[:, n_plain:], f"{fused.name}[values]"))


def _float32(values: np.ndarray, name: str) -> QTensor:
    data = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
    return QTensor(name, GGMLQuantizationType.F32, values.shape, data)


def _scale(config: ModelConfig, key_length: int) -> float:
    """1/sqrt(D), times yarn's factor twice: here it is on the scores, not on sine and cosine."""
    stretch = 1.0
    if config.rope.scaling == "yarn" and config.rope.factor > 1:
        multiplier = config.keys.number("rope.scaling.yarn_log_multiplier", 0, 1e3, 0.0)
        stretch += 0.1 * multiplier / FILE_MULTIPLIER * math.log(config.rope.factor)
    return stretch * stretch / math.sqrt(key_length)
