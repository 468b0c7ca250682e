"""Mixers that keep a state instead of keys and values: Mamba-2, gated delta net, short convolution.

Each is a `mixer` of a `llama.Family`: (g, w, h, config, i, heads, rope) -> (T, E), or None where
layer i is one of ordinary attention. Their fused products are taken apart by rows, so that each
part is convolved, normed and read by itself.
"""
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.models import layers
from tinychat.models.config import MAX_WIDTH, ModelConfig
from tinychat.models.weights import Weights, gathered, part, reshaped
from tinychat.ops.program import Buffer, DeltaNet, Heads, Mamba2, Rope
from tinychat.ops.recorder import Recorder

L2_EPS = 1e-6


@dataclass(frozen=True)
class StateSizes:
    """`ssm.*` of a file. inner: values of all heads; n_head of them; group: of b and c, or keys."""

    kernel: int
    inner: int
    n_state: int
    n_head: int
    n_group: int

    @property
    def head_dim(self) -> int:
        return self.inner // self.n_head

    @staticmethod
    def of(config: ModelConfig) -> "StateSizes":
        keys = config.keys
        n_head = keys.integer("ssm.time_step_rank", 1, MAX_WIDTH)
        inner = keys.integer("ssm.inner_size", 1, MAX_WIDTH)
        n_group = keys.integer("ssm.group_count", 1, n_head)
        if inner % n_head or n_head % n_group:
            raise ModelFileError(f"metadata key {keys.prefix}.ssm.time_step_rank: {n_head} heads "
                                 f"do not share {inner} values and {n_group} groups")
        return StateSizes(keys.integer("ssm.conv_kernel", 1, 1024), inner,
                          keys.integer("ssm.state_size", 1, MAX_WIDTH), n_head, n_group)


def _check_causal(config: ModelConfig) -> None:
    if not config.causal:
        raise ModelFileError(f"metadata key {config.architecture}.attention.causal is false, but "
                             "a recurrent layer cannot see what comes later")


def convolved(g: Recorder, w: Weights, parts: list[Buffer], kernel: int) -> list[Buffer]:
    """silu of each part's share of `ssm_conv1d`, whose rows are theirs in this order."""
    n = sum(x.width for x in parts)
    weight, bias = w.tensor("ssm_conv1d.weight", n, kernel), w.optional("ssm_conv1d.bias", n)
    out, begin = [], 0
    for x in parts:
        end = begin + x.width
        own = g.conv(x, part(weight, begin, end), bias and part(bias, begin, end))
        out.append(g.activate("silu", own))
        begin = end
    return out


def mamba2(g: Recorder, w: Weights, h: Buffer, config: ModelConfig, *,
           grouped_norm: bool = True) -> Buffer:
    """A Mamba-2 layer: h (T, E) -> (T, E). Source: Dao and Gu, "Transformers are SSMs".

    grouped_norm: the gated norm is of each group's share of a row by itself.
    """
    _check_causal(config)
    sizes = StateSizes.of(config)
    n, n_bc = sizes.inner, sizes.n_group * sizes.n_state
    z, x, b, c, dt = layers.linear_parts(g, w, "ssm_in", h, n, n, n_bc, n_bc, sizes.n_head)
    x, b, c = convolved(g, w, [x, b, c], sizes.kernel)
    shape = Mamba2(sizes.n_head, sizes.head_dim, sizes.n_group, sizes.n_state)
    vectors = [_vector(w, name, sizes.n_head) for name in ("ssm_a", "ssm_d", "ssm_dt.bias")]
    y = g.gate("silu", z, g.mamba2(x, b, c, dt, *vectors, shape))
    if w.has("ssm_norm.weight"):
        weight = _vector(w, "ssm_norm.weight", n)
        y = g.rmsnorm(y, weight, config.norm_eps, n // sizes.n_group if grouped_norm else n)
    return layers.linear(g, w, "ssm_out", y, h.width)


def _vector(w: Weights, name: str, n: int):
    """A tensor of n values, whatever axes of length 1 it has."""
    if w.has(name) and prod(w.shape(name)) == n:
        return reshaped(w.tensor(name, *w.shape(name)), n)
    return w.tensor(name, n)


def short_conv(g: Recorder, w: Weights, h: Buffer, config: ModelConfig) -> Buffer:
    """LFM2's gated convolution: out(c * conv(b * x)): h (T, E) -> (T, E)."""
    _check_causal(config)
    n = h.width
    kernel = config.keys.integer("shortconv.l_cache", 1, 1024)
    b, c, x = layers.linear_parts(g, w, "shortconv.in_proj", h, n, n, n)
    x = g.conv(g.gate("identity", b, x), w.tensor("shortconv.conv.weight", n, kernel),
               w.optional("shortconv.conv.bias", n))
    return layers.linear(g, w, "shortconv.out_proj", g.gate("identity", c, x), n)


def delta_net(g: Recorder, w: Weights, h: Buffer, config: ModelConfig, *, tiled: bool) -> Buffer:
    """A gated delta net layer: h (T, E) -> (T, E); tiled: see ops.program.DeltaNet."""
    _check_causal(config)
    sizes = StateSizes.of(config)
    shape = DeltaNet(sizes.n_group, sizes.n_head, sizes.n_state, sizes.head_dim, tiled)
    q, k, v, z = _delta_inputs(g, w, h, sizes)
    q, k, v = convolved(g, w, [q, k, v], sizes.kernel)
    alpha, beta = _alpha_beta(g, w, h, sizes)
    vectors = [_vector(w, name, sizes.n_head) for name in ("ssm_a", "ssm_dt.bias")]
    q = g.scale(_unit_heads(g, q, sizes.n_state), 1 / sqrt(sizes.n_state))
    y = g.delta_net(q, _unit_heads(g, k, sizes.n_state), v, alpha, beta, *vectors, shape)
    y = g.rmsnorm(y, w.tensor("ssm_norm.weight", sizes.head_dim), config.norm_eps)
    return layers.linear(g, w, "ssm_out", g.gate("silu", z, y), h.width)


def _delta_inputs(g: Recorder, w: Weights, h: Buffer, sizes: StateSizes) -> list[Buffer]:
    """q, k, v and what gates the output. Older files have, key head by key head, the rows of all
    four in one matrix."""
    n_keys, n = sizes.n_group * sizes.n_state, sizes.inner
    if not w.has("ssm_in.weight"):
        qkv = layers.linear_parts(g, w, "attn_qkv", h, n_keys, n_keys, n)
        return [*qkv, layers.linear(g, w, "attn_gate", h, n)]
    fused = w.tensor("ssm_in.weight", 2 * n_keys + 2 * n, h.width)
    rows = np.arange(fused.shape[0]).reshape(sizes.n_group, -1)
    ends = np.cumsum([sizes.n_state, sizes.n_state, n // sizes.n_group])
    return [g.linear(h, gathered(fused, part.reshape(-1), name))
            for part, name in zip(np.split(rows, ends, axis=1), ("query", "key", "value", "gate"))]


def _unit_heads(g: Recorder, x: Buffer, head_dim: int) -> Buffer:
    """Each head by its length, x / sqrt(sum(x²) + eps): a norm without its factor sqrt(D)."""
    return g.scale(g.rmsnorm(x, None, L2_EPS / head_dim, head_dim), 1 / sqrt(head_dim))


def _alpha_beta(g: Recorder, w: Weights, h: Buffer, sizes: StateSizes) -> tuple[Buffer, Buffer]:
    """(T, Hv) each: of matrices of their own, or of one that has, group by group, beta's rows and
    then alpha's."""
    n = sizes.n_head
    if not w.has("ssm_ba.weight"):
        return layers.linear(g, w, "ssm_alpha", h, n), layers.linear(g, w, "ssm_beta", h, n)
    fused = w.tensor("ssm_ba.weight", 2 * n, h.width)
    rows = np.arange(2 * n).reshape(sizes.n_group, 2, -1)
    beta, alpha = (gathered(fused, rows[:, j].reshape(-1), name)
                   for j, name in enumerate(("beta", "alpha")))
    return g.linear(h, alpha), g.linear(h, beta)


def gated_attention(g: Recorder, w: Weights, h: Buffer, config: ModelConfig, heads: Heads,
                    rope: Rope | None) -> Buffer:
    """Attention whose output is gated: each head of `attn_q` has its query, then its gate."""
    n, d = heads.n_head, heads.key_length
    fused = w.tensor("attn_q.weight", 2 * n * d, h.width)
    rows = np.arange(2 * n * d).reshape(n, 2, d)
    q, gate = (g.linear(h, gathered(fused, rows[:, j].reshape(-1), name))
               for j, name in enumerate(("query", "gate")))
    k = layers.linear(g, w, "attn_k", h, heads.n_head_kv * d)
    v = layers.linear(g, w, "attn_v", h, heads.n_head_kv * heads.value_length)
    q = layers.head_norm(g, w, "attn_q_norm", q, d, config)
    k = layers.head_norm(g, w, "attn_k_norm", k, d, config)
    if rope:
        q, k = g.rope(q, d, rope), g.rope(k, d, rope)
    out = g.gate("sigmoid", gate, g.attend(q, k, v, heads))
    return layers.linear(g, w, "attn_output", out, h.width)


# Mixers of families

def falcon_h1(g, w, h, config, i, heads, rope) -> Buffer:
    """Both side by side."""
    attended = layers.attention(g, w, h, heads(), rope, config)
    return g.add(attended, mamba2(g, w, h, config))


def granite_hybrid(g, w, h, config, i, heads, rope) -> Buffer | None:
    return None if config.n_head_kv[i] else mamba2(g, w, h, config, grouped_norm=False)


def lfm2(g, w, h, config, i, heads, rope) -> Buffer | None:
    return None if config.n_head_kv[i] else short_conv(g, w, h, config)


def qwen3_next(g, w, h, config, i, heads, rope, *, tiled: bool = False) -> Buffer:
    """Which layers are recurrent is in the file, or all but each so-manieth."""
    recurrent = config.keys.flags("attention.recurrent_layers", config.n_layer + config.n_ahead)
    every = config.keys.integer("full_attention_interval", 1, 4096, 4)
    if recurrent[i] if recurrent else (i + 1) % every:
        return delta_net(g, w, h, config, tiled=tiled)
    return gated_attention(g, w, h, config, heads(), rope)


def qwen35(g, w, h, config, i, heads, rope) -> Buffer:
    return qwen3_next(g, w, h, config, i, heads, rope, tiled=True)
