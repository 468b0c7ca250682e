"""Gemma 4: heads of two lengths, layers that look into the keys and values of earlier ones, rows of
the tokens for each layer, experts beside a dense part.

Layers with a window have heads, and a rope, of their own. The last layers have queries only: they
read what the last layer before them with a window, or without one, has stored.
Source: transformers: modeling_gemma4.py; llama.cpp: src/models/gemma4.cpp.
"""
from dataclasses import dataclass, replace

from tinychat.errors import ModelFileError
from tinychat.models import experts, layers
from tinychat.models.config import MAX_WIDTH, ModelConfig
from tinychat.models.experts import Experts
from tinychat.models.layers import norm
from tinychat.models.rope import make_rope
from tinychat.models.weights import Weights
from tinychat.ops.meaning import dequantize
from tinychat.ops.program import Buffer, Heads, Rope
from tinychat.ops.recorder import Recorder

ACTIVATION = "gelu"
DEFAULT_SOFTCAP = 30.0


@dataclass(frozen=True)
class Kind:
    """What layers with a window, or those without one, have in common."""

    head_dim: int
    window: int
    rope: Rope
    span: int | None


def describe(g: Recorder, w: Weights, config: ModelConfig) -> Buffer:
    """One step for the batch's tokens -> logits (n_outputs, V), or the hidden state."""
    keys = config.keys
    n_row = keys.integer("embedding_length_per_layer_input", 0, MAX_WIDTH, 0)
    kinds = [_kind(w, config, local=local, causal=n_row > 0) for local in (False, True)]
    is_local = _windows(config)
    n_own = config.n_layer - keys.integer("attention.shared_kv_layers", 0, config.n_layer - 1, 0)
    x = layers.embed(g, w, config, layers.root(config.n_embd))                # (T, E)
    rows = _rows(g, w, config, x, n_row) if n_row else None
    stored: dict[bool, int] = {}  # the KV layer that was last filled, without and with a window
    for i in range(config.n_layer):
        own, kind = w.layer(i), kinds[is_local[i]]
        h = norm(g, own, "attn_norm", x, config)
        if i < n_own:
            out = _attention(g, own, h, config, i, kind)
            stored[is_local[i]] = g.last_kv_layer
        elif is_local[i] in stored:
            out = _attention_again(g, own, h, config, i, kind, stored[is_local[i]])
        else:
            raise ModelFileError(f"metadata key {keys.prefix}.attention.shared_kv_layers: layer "
                                 f"{i} has no layer of its kind before it that stores keys")
        x = g.add(x, norm(g, own, "post_attention_norm", out, config))
        x = g.add(x, norm(g, own, "post_ffw_norm", _ffn(g, own, x, config, i), config))
        if rows:
            x = _with_row(g, own, x, g.columns(rows, i * n_row, n_row), config)
        x = layers.scaled(g, x, _factor(own))
    cap = keys.number("final_logit_softcapping", 0, 1e6, DEFAULT_SOFTCAP)
    return layers.finish(g, w, replace(config, final_softcap=cap), x)


def _windows(config: ModelConfig) -> tuple[bool, ...]:
    if not config.window_layers or not config.window:
        raise ModelFileError(f"metadata keys {config.architecture}.attention.sliding_window and "
                             "sliding_window_pattern: expected a window, and which layers have it")
    return config.window_layers


def _kind(w: Weights, config: ModelConfig, *, local: bool, causal: bool) -> Kind:
    if not local:
        w.tensor("rope_freqs.weight", config.rope.n_rot // 2)  # which pairs turn at all
        return Kind(config.key_length, 0, make_rope(config.rope, "halves", w), None)
    keys = config.keys
    head_dim = keys.integer("attention.key_length_swa", 1, MAX_WIDTH, config.key_length)
    n_rot = keys.integer("rope.dimension_count_swa", 2, head_dim, head_dim) // 2 * 2
    rope = replace(config.rope, n_rot=n_rot,
                   freq_base=config.rope.freq_base_swa or config.rope.freq_base)
    without_factors = Weights({})
    span = 0 if config.use.sees and not causal else None
    return Kind(head_dim, config.window, make_rope(rope, "halves", without_factors), span)


def _heads(config: ModelConfig, i: int, kind: Kind) -> Heads:
    shape = layers.layer_heads(config, i, window=kind.window, span=kind.span, scale=1.0)
    return replace(shape, key_length=kind.head_dim, value_length=kind.head_dim)


def _attention(g: Recorder, w: Weights, h: Buffer, config: ModelConfig, i: int,
               kind: Kind) -> Buffer:
    """h (T, E) -> (T, E). Values are normed; without `attn_v` they are the keys as they come."""
    shape, d = _heads(config, i, kind), kind.head_dim
    if w.has("attn_qkv.weight") or w.has("attn_v.weight"):
        q, k, v = layers.qkv(g, w, h, shape)
    else:
        q = layers.linear(g, w, "attn_q", h, shape.n_head * d)
        k = v = layers.linear(g, w, "attn_k", h, shape.n_head_kv * d)
    k = _norm_heads(g, w, "attn_k_norm", k, d, config)
    k, v = g.rope(k, d, kind.rope), g.rmsnorm(v, None, config.norm_eps, d)
    q = g.rope(_norm_heads(g, w, "attn_q_norm", q, d, config), d, kind.rope)
    return layers.linear(g, w, "attn_output", g.attend(q, k, v, shape), h.width)


def _attention_again(g: Recorder, w: Weights, h: Buffer, config: ModelConfig, i: int, kind: Kind,
                     kv_layer: int) -> Buffer:
    """Queries only, to what KV layer `kv_layer` holds."""
    shape, d = _heads(config, i, kind), kind.head_dim
    w.ignore("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
    q = layers.linear(g, w, "attn_q", h, shape.n_head * d)
    q = g.rope(_norm_heads(g, w, "attn_q_norm", q, d, config), d, kind.rope)
    return layers.linear(g, w, "attn_output", g.attend_again(q, kv_layer, shape), h.width)


def _norm_heads(g: Recorder, w: Weights, name: str, x: Buffer, d: int,
               config: ModelConfig) -> Buffer:
    return g.rmsnorm(x, w.tensor(f"{name}.weight", d), config.norm_eps)


def _ffn(g: Recorder, w: Weights, x: Buffer, config: ModelConfig, i: int) -> Buffer:
    """The dense part, and what the experts give beside it: each normed before and after."""
    dense = layers.ffn(g, w, norm(g, w, "ffn_norm", x, config), config.n_ff[i], ACTIVATION)
    if not w.has("ffn_gate_inp.weight"):
        return dense
    dense = norm(g, w, "post_ffw_norm_1", dense, config)
    judged = g.scale(g.rmsnorm(x, None, config.norm_eps), 1 / layers.root(config.n_embd))
    judged = g.mul_vector(judged, w.tensor("ffn_gate_inp.scale", config.n_embd))
    logits = layers.linear(g, w, "ffn_gate_inp", judged, config.n_expert)
    out = experts.mixed(g, w, norm(g, w, "pre_ffw_norm_2", x, config), logits, config, i,
                        Experts(), ACTIVATION)
    return g.add(dense, norm(g, w, "post_ffw_norm_2", out, config))


def _rows(g: Recorder, w: Weights, config: ModelConfig, x: Buffer, n_row: int) -> Buffer:
    """Each token's rows for the layers, side by side: its own, and what its embedding x gives."""
    n = n_row * config.n_layer
    own = g.scale(g.embed(w.tensor("per_layer_token_embd.weight", None, n)), layers.root(n_row))
    given = g.scale(layers.linear(g, w, "per_layer_model_proj", x, n),
                    1 / layers.root(config.n_embd))
    given = g.rmsnorm(given, w.tensor("per_layer_proj_norm.weight", n_row), config.norm_eps)
    return g.scale(g.add(given, own), 1 / layers.root(2))                     # (T, L * n_row)


def _with_row(g: Recorder, w: Weights, x: Buffer, row: Buffer, config: ModelConfig) -> Buffer:
    """x plus what it lets through of its row for this layer."""
    through = g.gate(ACTIVATION, layers.linear(g, w, "inp_gate", x, row.width), row)
    return g.add(x, norm(g, w, "post_norm", layers.linear(g, w, "proj", through, x.width), config))


def _factor(w: Weights) -> float:
    """What a layer's output is multiplied by."""
    if not w.has("layer_output_scale.weight"):
        return 1.0
    return float(dequantize(w.tensor("layer_output_scale.weight", 1))[0])
