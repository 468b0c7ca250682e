"""The parts that families are built from: weights by name, and the layers most of them share.

Each function records operations on a `Recorder` g. Shapes: T tokens, E n_embd, H n_head, Hkv
n_head_kv, D head width, F n_ff, V n_vocab. The presence of a tensor is the flag: a bias or a norm
of the heads is applied when the file has it.
"""
import math

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.gguf_file import QTensor
from tinychat.models.config import ModelConfig, RopeConfig
from tinychat.ops.program import Buffer, Heads, Rope
from tinychat.ops.recorder import Recorder
from tinychat.ops.meaning import dequantize


class Weights:
    """A file's tensors by name, checked for their shapes; remembers which were asked for."""

    def __init__(self, tensors: dict[str, QTensor], prefix: str = "",
                 asked: set[str] | None = None):
        self._tensors, self._prefix = tensors, prefix
        self._asked = set() if asked is None else asked

    def layer(self, i: int) -> "Weights":
        """The tensors of transformer block i, by their names within it."""
        return Weights(self._tensors, f"blk.{i}.", self._asked)

    def has(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def tensor(self, name: str, *shape: int | None) -> QTensor:
        """The tensor of that shape, none of it 0; None stands for any size.

        Raises: ModelFileError naming the tensor, and the expected and found shape.
        """
        name = self._prefix + name
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"tensor {name!r} is missing; expected shape {_shape(shape)}")
        fits = len(shape) == len(tensor.shape) and all(
            found > 0 and size in (None, found) for size, found in zip(shape, tensor.shape))
        if not fits:
            raise ModelFileError(f"tensor {name!r}: expected shape {_shape(shape)}, "
                                 f"found {_shape(tensor.shape)}")
        self._asked.add(name)
        return tensor

    def optional(self, name: str, *shape: int | None) -> QTensor | None:
        return self.tensor(name, *shape) if self.has(name) else None

    def check_all_asked(self, architecture: str) -> None:
        """A tensor that the description never asked for means a model other than the one described.

        Raises: ModelFileError naming the first few of them.
        """
        left = sorted(self._tensors.keys() - self._asked)
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ModelFileError(f"architecture {architecture!r} has no use for tensor "
                                 f"{', '.join(map(repr, left[:3]))}{more}, "
                                 "so this build would not compute what the file means")


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def linear(g: Recorder, w: Weights, name: str, x: Buffer, n_out: int) -> Buffer:
    """x (T, K) by NAME.weight (n_out, K), plus NAME.bias (n_out,) if it is there -> (T, n_out)."""
    weight, bias = w.tensor(f"{name}.weight", n_out, x.width), w.optional(f"{name}.bias", n_out)
    return g.linear(x, weight, bias)


def rmsnorm(g: Recorder, w: Weights, name: str, x: Buffer, eps: float) -> Buffer:
    return g.rmsnorm(x, w.tensor(f"{name}.weight", x.width), eps)


def head_norm(g: Recorder, w: Weights, name: str, x: Buffer, head_dim: int, eps: float) -> Buffer:
    """Each head of x (T, n * head_dim) normed by itself, when the file has the weight; else x."""
    weight = w.optional(f"{name}.weight", head_dim)
    return g.rmsnorm(x, weight, eps) if weight else x


def embed(g: Recorder, w: Weights, config: ModelConfig) -> Buffer:
    """The tokens' embeddings, scaled -> (T, E)."""
    x = g.embed(w.tensor("token_embd.weight", None, config.n_embd))
    return scaled(g, x, config.embedding_scale)


def unembed(g: Recorder, w: Weights, config: ModelConfig, x: Buffer) -> Buffer:
    """Logits of the rows asked for: norm, then `output`, or the embedding where both are tied."""
    x = rmsnorm(g, w, "output_norm", g.outputs(x), config.norm_eps)
    n_vocab = w.tensor("token_embd.weight", None, config.n_embd).shape[0]
    return linear(g, w, "output" if w.has("output.weight") else "token_embd", x, n_vocab)


def scaled(g: Recorder, x: Buffer, scale: float) -> Buffer:
    return x if scale == 1 else g.scale(x, scale)


def attention(g: Recorder, w: Weights, x: Buffer, heads: Heads, rope: Rope | None,
              eps: float) -> Buffer:
    """Self-attention of x (T, E) -> (T, E); rope None: the layer knows no positions."""
    q = linear(g, w, "attn_q", x, heads.n_head * heads.key_length)            # (T, H*D)
    k = linear(g, w, "attn_k", x, heads.n_head_kv * heads.key_length)         # (T, Hkv*D)
    v = linear(g, w, "attn_v", x, heads.n_head_kv * heads.value_length)       # (T, Hkv*Dv)
    q = head_norm(g, w, "attn_q_norm", q, heads.key_length, eps)
    k = head_norm(g, w, "attn_k_norm", k, heads.key_length, eps)
    if rope:
        q, k = g.rope(q, heads.key_length, rope), g.rope(k, heads.key_length, rope)
    return linear(g, w, "attn_output", g.attend(q, k, v, heads), x.width)


def swiglu_ffn(g: Recorder, w: Weights, x: Buffer, n_ff: int) -> Buffer:
    """down(silu(gate(x)) * up(x)), through width F -> (T, E)."""
    gate, up = linear(g, w, "ffn_gate", x, n_ff), linear(g, w, "ffn_up", x, n_ff)
    return linear(g, w, "ffn_down", g.gate("silu", gate, up), x.width)


def layer_heads(config: ModelConfig, i: int) -> Heads:
    """The attention shape of layer i. Raises: ModelFileError when the layer has no KV heads."""
    if not config.n_head_kv[i]:
        raise ModelFileError(f"metadata key {config.architecture}.attention.head_count_kv: layer "
                             f"{i} has 0 KV heads, which this architecture gives no meaning")
    return Heads(config.n_head[i], config.n_head_kv[i], config.key_length, config.value_length,
                 config.attention_scale)


# Rotary position embedding

def make_rope(config: RopeConfig, layout: str, w: Weights) -> Rope:
    """Frequencies with the file's scaling worked in.

    `rope_freqs.weight (R/2,)`, where present, divides them: llama3's scaling, by the converter.
    Source: llama.cpp: ggml_rope_ext; transformers: modeling_rope_utils.py.
    """
    pair = np.arange(config.n_rot // 2)
    inv_freq = config.freq_base ** (-2.0 * pair / config.n_rot)               # float64 till the end
    factors = w.optional("rope_freqs.weight", config.n_rot // 2)
    if factors:
        inv_freq = inv_freq / positive(factors)
    if config.scaling == "longrope":
        raise ModelFileError("rope scaling 'longrope' is not supported by this build")
    if config.scaling == "linear":
        inv_freq = inv_freq / config.factor
    if config.scaling == "yarn":
        inv_freq = inv_freq * yarn_stretch(config)
    return Rope(layout, inv_freq.astype(np.float32), rope_magnitude(config))


def positive(tensor: QTensor) -> np.ndarray:
    values = dequantize(tensor)
    if not (values >= 1e-6).all():  # below, a frequency could leave float32
        raise ModelFileError(f"tensor {tensor.name!r}: expected positive numbers only, "
                             "from 1e-06 on")
    return values


def yarn_stretch(config: RopeConfig) -> np.ndarray:
    """Factor on each frequency (R/2,): 1 for fast pairs, 1/factor for slow ones, a ramp between.

    Source: Peng et al., YaRN, section 3.2.
    """
    def pair_with(n_turns: float) -> float:
        """The pair that makes so many turns over the original context."""
        return (config.n_rot * math.log(config.n_ctx_orig / (n_turns * 2 * math.pi))
                / (2 * math.log(config.freq_base)))

    low = max(math.floor(pair_with(config.beta_fast)), 0)
    high = min(math.ceil(pair_with(config.beta_slow)), config.n_rot - 1)
    ramp = (np.arange(config.n_rot // 2) - low) / max(high - low, 0.001)
    slow = np.clip(ramp, 0, 1)
    return slow / config.factor + (1 - slow)


def rope_magnitude(config: RopeConfig) -> float:
    """Factor on sine and cosine; yarn's grows with the logarithm of the stretch."""
    if config.scaling != "yarn":
        return config.attn_factor

    def mscale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(config.factor) + 1 if config.factor > 1 else 1.0

    # with mscale_all_dim the converter assumes mscale 1: transformers divides the two
    return config.attn_factor * mscale(1) / mscale(config.log_multiplier)
