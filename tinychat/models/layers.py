"""The parts that families are built from: weights by name, and the layers most of them share.

Each function records operations on a `Recorder` g. Shapes: T tokens, E n_embd, H n_head, Hkv
n_head_kv, D head width, F n_ff, V n_vocab. The presence of a tensor is the flag: a bias or a norm
of the heads is applied when the file has it, a fused matrix is taken apart by its rows.
"""
import math

from tinychat.errors import ModelFileError
from tinychat.models.config import ModelConfig
from tinychat.models.weights import Weights, part
from tinychat.ops.program import Buffer, Heads, Rope
from tinychat.ops.recorder import Recorder


def linear(g: Recorder, w: Weights, name: str, x: Buffer, n_out: int) -> Buffer:
    """x (T, K) by NAME.weight (n_out, K), plus NAME.bias (n_out,) if it is there -> (T, n_out)."""
    weight, bias = w.tensor(f"{name}.weight", n_out, x.width), w.optional(f"{name}.bias", n_out)
    return g.linear(x, weight, bias)


def linear_parts(g: Recorder, w: Weights, name: str, x: Buffer, *widths: int) -> list[Buffer]:
    """The columns of one fused product, as products of their own: [(T, width), …]."""
    weight = w.tensor(f"{name}.weight", sum(widths), x.width)
    bias = w.optional(f"{name}.bias", sum(widths))
    out, begin = [], 0
    for width in widths:
        end = begin + width
        out.append(g.linear(x, part(weight, begin, end), bias and part(bias, begin, end)))
        begin = end
    return out


def norm(g: Recorder, w: Weights, name: str, x: Buffer, config: ModelConfig) -> Buffer:
    """The file's kind of norm over a row, by NAME.weight, and NAME.bias if it is there.

    An empty name: the norm alone. Falcon-H1's files have one that is called NAME.
    """
    if not name:
        return _normed(g, x, None, None, config, x.width)
    own = f"{name}.weight" if w.has(f"{name}.weight") or not w.has(name) else name
    weight, bias = w.tensor(own, x.width), w.optional(f"{name}.bias", x.width)
    return _normed(g, x, weight, bias, config, x.width)


def _normed(g, x, weight, bias, config: ModelConfig, group: int) -> Buffer:
    if config.norm == "layer":
        return g.layernorm(x, weight, bias, config.norm_eps, group)
    x = g.rmsnorm(x, weight, config.norm_eps, group)
    return g.add_vector(x, bias) if bias else x


def optional_norm(g: Recorder, w: Weights, name: str, x: Buffer, config: ModelConfig) -> Buffer:
    """x itself where the file has no such norm."""
    return norm(g, w, name, x, config) if w.has(f"{name}.weight") else x


def head_norm(g: Recorder, w: Weights, name: str, x: Buffer, head_dim: int,
              config: ModelConfig) -> Buffer:
    """The heads of x (T, n * head_dim) normed, when the file has the weight; else x.

    The weight's shape says how: (head_dim,) each head by the same, (n, head_dim) each by its own,
    (n * head_dim,) the row as a whole.
    """
    if not w.has(f"{name}.weight"):
        return x
    n_head = x.width // head_dim
    shape = w.shape(f"{name}.weight")
    if shape not in ((head_dim,), (n_head, head_dim)):
        return norm(g, w, name, x, config)
    weight, bias = w.tensor(f"{name}.weight", *shape), w.optional(f"{name}.bias", *shape)
    return _normed(g, x, weight, bias, config, head_dim)


def embed(g: Recorder, w: Weights, config: ModelConfig, scale: float = 1.0) -> Buffer:
    """The tokens' embeddings, scaled, and images in the place of some -> (T, E)."""
    x = g.embed(w.tensor("token_embd.weight", None, config.n_embd))
    x = scaled(g, x, scale * config.embedding_scale)
    if config.use.sees:
        x = g.place(x)
    if w.has("token_types.weight"):  # a text is all of the first type
        types = w.tensor("token_types.weight", None, config.n_embd)
        x = g.add_vector(x, part(types, 0, 1))
    if w.has("position_embd.weight"):
        table = w.tensor("position_embd.weight", None, config.n_embd)
        if table.shape[0] < config.use.n_ctx:
            raise ModelFileError(f"tensor 'position_embd.weight' has {table.shape[0]} positions, "
                                 f"too few for a context of {config.use.n_ctx}")
        x = g.add(x, g.embed_positions(table))
    return x


def finish(g: Recorder, w: Weights, config: ModelConfig, x: Buffer,
           norm_name: str = "output_norm") -> Buffer:
    """The final norm where there is one, and logits of the rows asked for, or the hidden state.

    `output` makes the logits, or the embedding where both are tied.
    """
    x = g.outputs(x)
    if config.causal or w.has(f"{norm_name}.weight"):  # encoders may end without
        x = norm(g, w, norm_name, x, config)
    name = "output" if w.has("output.weight") else "token_embd"
    if config.use.hidden:
        w.ignore("output.weight", "output.bias")
        return _dense(g, w, x)
    n_vocab = w.tensor("token_embd.weight", None, config.n_embd).shape[0]
    x = linear(g, w, name, x, n_vocab)
    return g.softcap(x, config.final_softcap) if config.final_softcap else x


def _dense(g: Recorder, w: Weights, x: Buffer) -> Buffer:
    """The matrices that some embedding models have behind the pooling. They are linear, and so is
    each pooling with weights of sum 1: the other order means the same."""
    for name in ("dense_2", "dense_3"):
        if w.has(f"{name}.weight"):
            x = linear(g, w, name, x, w.shape(f"{name}.weight")[0])
    return x


def scaled(g: Recorder, x: Buffer, scale: float) -> Buffer:
    return x if scale == 1 else g.scale(x, scale)


def qkv(g: Recorder, w: Weights, x: Buffer, heads: Heads) -> list[Buffer]:
    """(T, H*D), (T, Hkv*D), (T, Hkv*Dv): of three matrices or of one."""
    widths = (heads.n_head * heads.key_length, heads.n_head_kv * heads.key_length,
              heads.n_head_kv * heads.value_length)
    if w.has("attn_qkv.weight"):
        return linear_parts(g, w, "attn_qkv", x, *widths)
    return [linear(g, w, f"attn_{name}", x, width) for name, width in zip("qkv", widths)]


def attention(g: Recorder, w: Weights, x: Buffer, heads: Heads, rope: Rope | None,
              config: ModelConfig, *, norm_after_rope: bool = False) -> Buffer:
    """Self-attention of x (T, E) -> (T, E); rope None: the layer knows no positions."""
    q, k, v = qkv(g, w, x, heads)

    def prepared(name: str, x: Buffer) -> Buffer:
        steps = [lambda x: head_norm(g, w, f"attn_{name}_norm", x, heads.key_length, config),
                 lambda x: g.rope(x, heads.key_length, rope) if rope else x]
        for step in reversed(steps) if norm_after_rope else steps:
            x = step(x)
        return x
    q, k = prepared("q", q), prepared("k", k)
    if config.temperature_scale:
        q = g.temper(q, config.temperature_scale, config.rope.n_ctx_orig)
    out = g.attend(q, k, v, heads, w.optional("attn_sinks.weight", heads.n_head))
    return linear(g, w, "attn_output", out, x.width)


def ffn(g: Recorder, w: Weights, x: Buffer, n_ff: int, activation: str = "silu", *,
        suffix: str = "") -> Buffer:
    """down(fn(gate(x)) * up(x)), or down(fn(up(x))) without a gate: x (T, E) -> (T, E).

    An `ffn_up` of twice the rows has the gate in its first half. suffix: of the tensors' names.
    """
    gate, up, down = (f"ffn_{name}{suffix}" for name in ("gate", "up", "down"))
    if w.has(f"{gate}.weight"):
        hidden = g.gate(activation, linear(g, w, gate, x, n_ff), linear(g, w, up, x, n_ff))
    elif w.has(f"{up}.weight") and w.shape(f"{up}.weight")[:1] == (2 * n_ff,):
        hidden = g.gate(activation, *linear_parts(g, w, up, x, n_ff, n_ff))
    else:
        hidden = g.activate(activation, linear(g, w, up, x, n_ff))
    return linear(g, w, down, hidden, x.width)


def layer_heads(config: ModelConfig, i: int, **fields) -> Heads:
    """The attention shape of layer i; fields: others of Heads.

    Raises: ModelFileError when the layer has no KV heads.
    """
    if not config.n_head_kv[i]:
        raise ModelFileError(f"metadata key {config.architecture}.attention.head_count_kv: layer "
                             f"{i} has 0 KV heads, which this architecture gives no meaning")
    fields = {"scale": config.attention_scale, "softcap": config.attn_softcap, **fields}
    if not config.causal:
        fields.update(causal=False, span=0)
    return Heads(config.n_head[i], config.n_head_kv[i], config.key_length, config.value_length,
                 **fields)


def root(n: float) -> float:
    return math.sqrt(n)
