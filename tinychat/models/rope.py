"""Rotary position embedding from a file's numbers: frequencies with the scaling worked in."""
import math
from dataclasses import replace

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.gguf_file import QTensor
from tinychat.models.config import ModelConfig, RopeConfig
from tinychat.models.weights import Weights
from tinychat.ops.meaning import dequantize
from tinychat.ops.program import Rope


def make_rope(config: RopeConfig, layout: str, w: Weights, *, n_ctx: int = 0,
              axes: tuple[int, ...] | None = None) -> Rope:
    """Frequencies with the file's scaling worked in.

    `rope_freqs.weight (R/2,)`, where present, divides them: llama3's scaling, by the converter.
    So does longrope's tensor for contexts up to the original length, or the one for longer ones.
    n_ctx: the context in use. Source: llama.cpp: ggml_rope_ext; transformers: modeling_rope_utils.
    """
    pair = np.arange(config.n_rot // 2)
    inv_freq = config.freq_base ** (-2.0 * pair / config.n_rot)               # float64 till the end
    for name in ("rope_freqs.weight", _longrope_name(config, w, n_ctx)):
        factors = w.optional(name, config.n_rot // 2) if name else None
        if factors:
            inv_freq = inv_freq / positive(factors)
    if config.scaling == "linear":
        inv_freq = inv_freq / config.factor
    if config.scaling == "yarn":
        inv_freq = inv_freq * yarn_stretch(config)
    return Rope(layout, inv_freq.astype(np.float32), rope_magnitude(config), axes)


def _longrope_name(config: RopeConfig, w: Weights, n_ctx: int) -> str | None:
    name = f"rope_factors_{'long' if n_ctx > config.n_ctx_orig else 'short'}.weight"
    if config.scaling == "longrope" and not w.has(name):
        raise ModelFileError(f"tensor {name!r} is missing, which rope scaling 'longrope' needs")
    return name if w.has(name) else None


def local_rope(config: RopeConfig, freq_base: float | None, is_scaled: bool) -> RopeConfig:
    """Of layers with a window: with a base of their own; scaled or not as the others are."""
    base = config.freq_base_swa or freq_base or config.freq_base
    own = replace(config, freq_base=base)
    return own if is_scaled else replace(own, scaling="none", factor=1.0, attn_factor=1.0)


def axes_of(config: ModelConfig, order: str | None) -> tuple[int, ...] | None:
    """What each pair turns by, 0 time, 1 row, 2 column; None where no images come.

    order: "blocks", the file's sections one after another; "interleaved": row and column in turn
    with time, as far as their sections go.
    """
    sections = config.rope.sections
    if order is None or not config.use.sees:
        return None
    if sections is None:
        raise ModelFileError(f"metadata key {config.architecture}.rope.dimension_sections is "
                             "missing, which images need")
    n = config.rope.n_rot // 2
    if order == "blocks":
        return tuple(axis for axis, width in enumerate(sections) for _ in range(width))
    return tuple(i % 3 if i % 3 and i < 3 * sections[i % 3] else 0 for i in range(n))


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
