"""Models whose layers are one branch each, instead of attention and then a feed-forward part.

A layer is norm, branch, add; the branch is Mamba-2, attention without rope, or a feed-forward part,
as its tensors tell. Mamba-2 alone, and Nemotron-H.
"""
from tinychat.models import experts, layers, recurrent
from tinychat.models.config import ModelConfig
from tinychat.models.llama import Family
from tinychat.models.weights import Weights
from tinychat.ops.program import Buffer
from tinychat.ops.recorder import Recorder


def describe(g: Recorder, w: Weights, config: ModelConfig, family: Family) -> Buffer:
    """One step for the batch's tokens -> logits (n_outputs, V), or the hidden state."""
    x = layers.embed(g, w, config)                                            # (T, E)
    for i in range(config.n_layer):
        own = w.layer(i)
        h = layers.norm(g, own, "attn_norm", x, config)
        x = g.add(x, branch(g, own, h, config, i, family))
    return layers.finish(g, w, config, x, family.output_norm)


def branch(g: Recorder, w: Weights, h: Buffer, config: ModelConfig, i: int,
           family: Family) -> Buffer:
    """What layer i has: h (T, E) -> (T, E)."""
    if w.has("ssm_in.weight"):
        return recurrent.mamba2(g, w, h, config)
    if w.has("attn_output.weight"):
        return layers.attention(g, w, h, layers.layer_heads(config, i), None, config)
    if w.has("ffn_gate_inp.weight"):
        return experts.ffn(g, w, h, config, i, family.experts, family.activation)
    return layers.ffn(g, w, h, config.n_ff[i], family.activation)
