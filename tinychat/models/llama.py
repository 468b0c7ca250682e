"""The block most families share: norm, attention, add; norm, feed-forward, add.

What differs between them is in the file: which tensors there are, and its numbers. What the file
does not say is a family's traits.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tinychat.errors import ModelFileError
from tinychat.models import experts, layers
from tinychat.models.config import ModelConfig
from tinychat.models.experts import Experts
from tinychat.models.layers import norm
from tinychat.models.rope import axes_of, local_rope, make_rope
from tinychat.models.weights import Weights
from tinychat.ops.program import Buffer, Heads, Rope
from tinychat.ops.recorder import Recorder

TOLD_ACTIVATIONS = {"gelu": "gelu_erf", "geglu": "gelu_erf",  # by their names in a file
                    "silu": "silu", "swish": "silu", "swiglu": "silu"}
# (g, w, h, config, i, heads, rope) -> (T, E); heads() is the shape of layer i's attention, asked
# for only where there is one
Mixer = Callable[..., Buffer | None]


@dataclass(frozen=True)
class Family:
    """What a family is, beyond what its files say.

    norms: where they stand:
      before  each of both branches, attention and feed-forward part
      around  before and after each branch
      after   each branch
      beside  before both branches, which are added side by side; `ffn_norm` or `attn_norm_2`
              where one of them has a norm of its own
      found   before, or beside where the file lacks `ffn_norm`
      told    before, or beside where the file's `use_parallel_residual` says so
      added   after each addition
    ffn_norm: its name. bare_first: the first layer has no norm before its attention.
    rope: which values make a pair, see ops.program.Rope; or "learned": positions are embedded.
    axes: how pairs are shared out between time, row and column, see rope.axes_of.
    rope_switch: `rope.scaling.finetuned` says whether there is rope at all. no_rope_every: each
    so-manieth layer has none. local_rope_only: nor has one without a window, where some have one.
    norm_after_rope: of the heads.
    window_period: each so-manieth layer has no window, 1: all have one, 0: none has;
    global_first: counted from the first layer, not the last. default_window: if not in the file.
    local_base: the rope's base in layers with a window, unless the file has one; local_is_scaled:
    whether rope scaling holds there too.
    root_scaled: embeddings times sqrt(E). multiplied_logits: by the file's scale, else divided.
    wide_head_layers: a model of so many layers scales its scores by E / H, not by the head.
    both_ways: the tokens of an image attend to one another in both directions.
    mixer: what a layer has in the place of attention, None from it where it has attention.
    experts: of layers with a router. output_norm: the name of the last norm; empty: no norm has a
    weight. n_ff_parts: of feed_forward_length, each as wide as the feed-forward part.
    scales_by_size: embedding, residual and logit scale follow from the size where not in the file.
    told_activation: the file's `hidden_activation` goes before this one.
    ignored: tensors that a file may have for another use, such as the head of a classifier.
    """

    norms: str = "before"
    ffn_norm: str = "ffn_norm"
    bare_first: bool = False
    rope: str = "halves"
    activation: str = "silu"
    axes: str | None = None
    rope_switch: bool = False
    no_rope_every: int = 0
    local_rope_only: bool = False
    norm_after_rope: bool = False
    window_period: int = 0
    global_first: bool = False
    default_window: int = 0
    local_base: float | None = None
    local_is_scaled: bool = True
    root_scaled: bool = False
    multiplied_logits: bool = False
    wide_head_layers: int = 0
    both_ways: bool = False
    mixer: Mixer | None = None
    experts: Experts = Experts()
    output_norm: str = "output_norm"
    n_ff_parts: int = 1
    scales_by_size: bool = False
    told_activation: bool = False
    ignored: tuple[str, ...] = ()

    def window(self, config: ModelConfig, i: int) -> int:
        """Of layer i; 0: it sees everything."""
        n = config.window or self.default_window
        period = config.window_period or self.window_period
        if config.window_layers:
            return n if config.window_layers[i] else 0
        if period < 2:
            return n if period == 1 else 0
        is_global = i % period == (0 if self.global_first else period - 1)
        return 0 if is_global else n

    def scale(self, config: ModelConfig) -> float:
        if config.n_layer == self.wide_head_layers:
            return 1 / layers.root(config.n_embd / config.n_head[0])
        return config.attention_scale


def describe(g: Recorder, w: Weights, config: ModelConfig, family: Family) -> Buffer:
    """One step for the batch's tokens -> logits (n_outputs, V), or the hidden state."""
    if family.scales_by_size:
        config = _scaled_by_size(config)
    if family.told_activation:
        family = _with_told_activation(config, family)
    w.ignore(*family.ignored)
    _refuse_clamp(config)
    ropes = _ropes(w, config, family)
    x = layers.embed(g, w, config, layers.root(config.n_embd) if family.root_scaled else 1.0)
    if family.output_norm != "token_embd_norm":
        x = layers.optional_norm(g, w, "token_embd_norm", x, config)          # (T, E)
    for i in range(config.n_layer):
        heads = partial(_heads, config, family, i)
        x = block(g, w.layer(i), config, family, x, i, heads, ropes[i])
        x = add_deep_features(g, config, x, i)
    x = layers.finish(g, w, config, x, family.output_norm)
    if config.use.hidden:
        return x
    scale = config.logit_scale if family.multiplied_logits else 1 / config.logit_scale
    return layers.scaled(g, x, scale)


def _scaled_by_size(config: ModelConfig) -> ModelConfig:
    """Older files of MiniCPM have none of these. Source: its model card's configuration."""
    by_size = {"embedding_scale": 12.0, "residual_scale": 1.4 / layers.root(config.n_layer),
               "logit_scale": config.n_embd / 256}
    return replace(config, **{name: value for name, value in by_size.items()
                              if not config.keys.has(name)})


def _with_told_activation(config: ModelConfig, family: Family) -> Family:
    told = config.keys.text("hidden_activation", tuple(TOLD_ACTIVATIONS), None)
    return replace(family, activation=TOLD_ACTIVATIONS[told]) if told else family


def _refuse_clamp(config: ModelConfig) -> None:
    if config.keys.number("attention.clamp_kqv", 0, 1e6, 0.0):
        raise ModelFileError(f"metadata key {config.architecture}.attention.clamp_kqv: clamped "
                             "queries, keys and values are not supported")


def _heads(config: ModelConfig, family: Family, i: int) -> Heads:
    span = 0 if family.both_ways and config.use.sees else None
    return layers.layer_heads(config, i, window=family.window(config, i), span=span,
                              scale=family.scale(config))


def _ropes(w: Weights, config: ModelConfig, family: Family) -> list[Rope | None]:
    """Of each layer: one for those with a window, one for the others, or none."""
    windows = [family.window(config, i) for i in range(config.n_layer)]
    made: dict[bool, Rope] = {}

    def of_layer(i: int) -> Rope | None:
        is_local = windows[i] > 0
        if family.no_rope_every and (i + 1) % family.no_rope_every == 0:
            return None
        if family.local_rope_only and any(windows) and not is_local:
            return None
        if is_local not in made:
            rope = config.rope
            if is_local:
                rope = local_rope(rope, family.local_base, family.local_is_scaled)
            made[is_local] = make_rope(rope, family.rope, w, n_ctx=config.use.n_ctx,
                                       axes=axes_of(config, family.axes))
        return made[is_local]
    has_rope = config.rope.finetuned or not family.rope_switch
    if family.rope == "learned":
        w.tensor("position_embd.weight", None, config.n_embd)
    if not has_rope or family.rope == "learned":
        return [None] * config.n_layer
    return [of_layer(i) for i in range(config.n_layer)]


def block(g: Recorder, w: Weights, config: ModelConfig, family: Family, x: Buffer, i: int,
          heads: Callable[[], Heads], rope: Rope | None) -> Buffer:
    """Transformer block i: x (T, E) -> (T, E); the family says where its norms stand."""
    def attention(h: Buffer) -> Buffer:
        if family.mixer:
            out = family.mixer(g, w, h, config, i, heads, rope)
            if out is not None:
                return out
        return layers.attention(g, w, h, heads(), rope, config,
                                norm_after_rope=family.norm_after_rope)

    def ffn(h: Buffer) -> Buffer:
        if w.has("ffn_gate_inp.weight"):
            return experts.ffn(g, w, h, config, i, family.experts, family.activation)
        return layers.ffn(g, w, h, config.n_ff[i] // family.n_ff_parts, family.activation)

    def normed(name: str, h: Buffer) -> Buffer:
        return norm(g, w, name if family.output_norm else "", h, config)

    residual, norms = config.residual_scale, family.norms
    if norms == "found":
        norms = "before" if w.has("ffn_norm.weight") else "beside"
    if norms == "told":
        norms = "beside" if config.parallel_residual else "before"
    if norms == "added":
        x = normed("attn_output_norm", g.add(x, attention(x)))
        return normed("layer_output_norm", g.add(x, ffn(x)))
    if norms == "beside":
        h = beside = normed("attn_norm", x)
        if w.has("attn_norm_2.weight"):
            h = normed("attn_norm_2", x)
        elif w.has("ffn_norm.weight"):
            beside = normed("ffn_norm", x)
        return g.add(g.add(x, attention(h), residual), ffn(beside), residual)
    if norms == "after":
        x = g.add(x, normed("post_attention_norm", attention(x)), residual)
        return g.add(x, normed("post_ffw_norm", ffn(x)), residual)
    h = x if family.bare_first and i == 0 else normed("attn_norm", x)
    out = attention(h)
    if norms == "around":
        out = normed("post_attention_norm", out)
    x = g.add(x, out, residual)
    out = ffn(normed(family.ffn_norm, x))
    if norms == "around":
        out = normed("post_ffw_norm", out)
    return g.add(x, out, residual)


def add_deep_features(g: Recorder, config: ModelConfig, x: Buffer, i: int) -> Buffer:
    """After layer i < n_deepstack, what the image's row has for it, behind its embedding."""
    if not config.use.sees or i >= config.n_deepstack:
        return x
    return g.add(x, g.given(config.n_embd, (1 + i) * config.n_embd))
