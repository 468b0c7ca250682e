"""The block most families share: norm, attention, add; norm, gated feed-forward, add.

llama (SmolLM2, Llama 3, Mistral), qwen2 (biases), qwen3 (head norms), granite (four scales).
"""
from tinychat.errors import ModelFileError
from tinychat.models import layers
from tinychat.models.config import ModelConfig
from tinychat.models.layers import Weights
from tinychat.ops.program import Buffer, Rope
from tinychat.ops.recorder import Recorder


def describe(g: Recorder, w: Weights, config: ModelConfig, *, rope_layout: str,
             rope_switch: bool = False) -> Buffer:
    """One step for the batch's tokens -> logits (n_outputs, V).

    rope_switch: `rope.scaling.finetuned` says whether there is rope at all.
    """
    if config.n_expert:
        raise ModelFileError(f"architecture {config.architecture!r} with {config.n_expert} experts "
                             "is not supported by this build")
    has_rope = config.rope.finetuned or not rope_switch
    rope = layers.make_rope(config.rope, rope_layout, w) if has_rope else None
    x = layers.embed(g, w, config)                                            # (T, E)
    for i in range(config.n_layer):
        x = block(g, w.layer(i), config, x, i, rope)
    return layers.scaled(g, layers.unembed(g, w, config, x), 1 / config.logit_scale)


def block(g: Recorder, w: Weights, config: ModelConfig, x: Buffer, i: int,
          rope: Rope | None) -> Buffer:
    """Transformer block i: x (T, E) -> (T, E)."""
    eps, residual = config.norm_eps, config.residual_scale
    h = layers.rmsnorm(g, w, "attn_norm", x, eps)
    x = g.add(x, layers.attention(g, w, h, layers.layer_heads(config, i), rope, eps), residual)
    h = layers.rmsnorm(g, w, "ffn_norm", x, eps)
    return g.add(x, layers.swiglu_ffn(g, w, h, config.n_ff[i]), residual)
