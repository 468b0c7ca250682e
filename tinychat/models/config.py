"""A model's numbers, from GGUF metadata: `ModelConfig.from_metadata`.

Metadata comes from strangers: every number has a type and a range, and what breaks them is a
ModelFileError naming the key. The names are llama.cpp's (style: n_layer, n_embd, n_head_kv ...).
"""
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinychat.errors import ModelFileError

MAX_LAYERS, MAX_WIDTH, MAX_CONTEXT = 4096, 1 << 24, 1 << 31
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
NORM_EPS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}


class Keys:
    """Metadata under one prefix: "llama" reads llama.block_count by integer("block_count", ...).

    Every reader takes a default, used when the key is absent; without one the key is required.
    Raises: ModelFileError naming the key, what was expected and what came.
    """

    _REQUIRED = object()

    def __init__(self, metadata: dict[str, Any], prefix: str):
        self.metadata, self.prefix = metadata, prefix

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.metadata

    def integer(self, key: str, low: int, high: int, default=_REQUIRED) -> int:
        value = self._get(key, default)
        return value if value is default else self._integer(key, value, low, high)

    def integers(self, key: str, n: int, low: int, high: int, default=_REQUIRED) -> tuple[int, ...]:
        """n integers, one a layer: an array of n, or one number for all."""
        value = self._get(key, default)
        if not isinstance(value, (list, np.ndarray)):
            return (value if value is default else self._integer(key, value, low, high),) * n
        if len(value) != n:
            self._fail(key, f"one number or {n}, one a layer", f"{len(value)}")
        items = value.tolist() if isinstance(value, np.ndarray) else value
        return tuple(self._integer(key, item, low, high) for item in items)

    def number(self, key: str, low: float, high: float, default=_REQUIRED) -> float:
        value = self._get(key, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not (math.isfinite(value) and low <= value <= high):
            self._fail(key, f"a number from {low:g} to {high:g}", repr(value))
        return float(value)

    def factor(self, key: str, default: float = 1.0) -> float:
        """A factor that neither it nor its inverse leaves float32 with; 0 stands for none."""
        value = self.number(key, 0, 1e6, 0.0)
        if 0 < value < 1e-6:
            self._fail(key, "0 or a number from 1e-06", repr(value))
        return value or default

    def flags(self, key: str, n: int) -> tuple[bool, ...] | None:
        """n booleans, one a layer; None where the key is absent."""
        value = self._get(key, None)
        if value is None:
            return None
        items = value.tolist() if isinstance(value, np.ndarray) else value
        if type(items) is not list or len(items) != n or not all(i in (0, 1) for i in items):
            self._fail(key, f"{n} booleans, one a layer", repr(items))
        return tuple(map(bool, items))

    def is_array(self, key: str) -> bool:
        return isinstance(self._get(key, None), (list, np.ndarray))

    def text(self, key: str, allowed: tuple[str, ...], default=_REQUIRED) -> str:
        value = self._get(key, default)
        if value is not default and (type(value) is not str or value not in allowed):
            self._fail(key, f"one of {', '.join(allowed)}", repr(value))
        return value

    def boolean(self, key: str, default=_REQUIRED) -> bool:
        value = self._get(key, default)
        if value is not default and type(value) is not bool:
            self._fail(key, "a boolean", repr(value))
        return value

    def _get(self, key: str, default):
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if value is self._REQUIRED:
            raise ModelFileError(f"metadata key {self.prefix}.{key} is missing")
        return value

    def _integer(self, key: str, value, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            self._fail(key, f"an integer from {low} to {high}", repr(value))
        return value

    def _fail(self, key: str, expected: str, got: str):
        raise ModelFileError(f"metadata key {self.prefix}.{key}: "
                             f"expected {expected}, got {' '.join(got.split())[:80]}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding as the file describes it; see `layers.make_rope`."""

    n_rot: int                # rotated values of a head, even
    freq_base: float
    scaling: str              # none | linear | yarn | longrope
    factor: float             # how far the context was stretched; 1: not at all
    n_ctx_orig: int           # the context length before stretching
    beta_fast: float          # yarn: turns over n_ctx_orig above which a pair keeps its frequency
    beta_slow: float          # yarn: turns below which it is stretched by the whole factor
    log_multiplier: float     # yarn: mscale_all_dim; 0: none
    attn_factor: float        # factor on sine and cosine beside yarn's own
    finetuned: bool           # as stored; granite's way to say whether there is rope at all
    freq_base_swa: float | None          # of layers with a window, where it is another
    sections: tuple[int, ...] | None     # pairs that turn by time, row, column of an image

    @staticmethod
    def from_keys(keys: Keys, key_length: int, n_ctx: int) -> "RopeConfig":
        n_rot = keys.integer("rope.dimension_count", 2, key_length, default=key_length)
        if n_rot % 2:
            raise ModelFileError(f"metadata key {keys.prefix}.rope.dimension_count: "
                                 f"expected an even number, got {n_rot}")
        # a factor without a type is linear, and 0 stands for none, as llama.cpp reads them
        factor = keys.factor("rope.scaling.factor") if keys.has("rope.scaling.factor") else \
            keys.factor("rope.scale_linear")
        return RopeConfig(
            n_rot=n_rot,
            freq_base=keys.number("rope.freq_base", 1.01, 1e30, 10000.0),
            scaling=keys.text("rope.scaling.type", ROPE_SCALINGS, "linear"),
            factor=factor,
            n_ctx_orig=keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, n_ctx),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 1e-6, 1e6, 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1e-6, 1e6, 1.0),
            log_multiplier=keys.number("rope.scaling.yarn_log_multiplier", 0, 1e3, 0.0),
            attn_factor=keys.number("rope.scaling.attn_factor", 1e-6, 1e6, 1.0),
            finetuned=keys.boolean("rope.scaling.finetuned", True),
            freq_base_swa=keys.number("rope.freq_base_swa", 1.01, 1e30, None),
            sections=_sections(keys, n_rot))


def _sections(keys: Keys, n_rot: int) -> tuple[int, ...] | None:
    if not keys.has("rope.dimension_sections"):
        return None
    found = keys.integers("rope.dimension_sections", 4, 0, n_rot // 2)
    if sum(found[:3]) != n_rot // 2:
        raise ModelFileError(f"metadata key {keys.prefix}.rope.dimension_sections: expected "
                             f"numbers of pairs that make {n_rot // 2}, got {list(found)}")
    return found[:3]


@dataclass(frozen=True)
class Use:
    """What a program is made for.

    n_ctx: the context it will be used with, 0: the trained length. hidden: its result is the last
    hidden state, not logits, as an encoder's always is. sees: images may stand in its prompts.
    """

    n_ctx: int = 0
    hidden: bool = False
    sees: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """What most families share. A family reads keys of its own through `Keys`."""

    architecture: str
    n_layer: int
    n_embd: int
    n_ctx: int                     # positions the model was trained for, rope scaling included
    n_head: tuple[int, ...]        # one a layer
    n_head_kv: tuple[int, ...]     # one a layer; 0: the layer has no attention
    n_ff: tuple[int, ...]          # one a layer
    n_expert: int                  # 0: dense
    key_length: int                # width of one head of q and k
    value_length: int
    norm: str                      # "rms", or "layer": with the mean taken off
    norm_eps: float
    causal: bool                   # False: an encoder, whose tokens see the whole text
    rope: RopeConfig
    attention_scale: float         # on q·k
    embedding_scale: float
    residual_scale: float
    logit_scale: float             # as stored; whether it divides or multiplies is the family's
    window: int                    # positions that layers with a window see; 0: the family's
    window_layers: tuple[bool, ...] | None  # which these are, where the file says so
    window_period: int             # or every how many layers there is one without; 0: not said
    attn_softcap: float            # 0: none
    final_softcap: float
    temperature_scale: float       # growth of the queries with the position; 0: none
    parallel_residual: bool        # the file says: attention and feed-forward part side by side
    n_deepstack: int               # layers that have features of an image of their own
    use: Use
    n_ahead: int                   # layers behind these, which only guess at further tokens
    keys: Keys                     # for what only some families have

    @staticmethod
    def from_metadata(metadata: dict[str, Any], use: Use = Use(), *,
                      is_encoder: bool = False) -> "ModelConfig":
        """Raises: ModelFileError naming the key that is missing, of the wrong type or absurd."""
        architecture = metadata.get("general.architecture")
        if type(architecture) is not str:
            raise ModelFileError("metadata key general.architecture: expected a string, "
                                 f"got {architecture!r}")
        keys = Keys(metadata, architecture)
        n_blocks = keys.integer("block_count", 1, MAX_LAYERS)
        n_ahead = keys.integer("nextn_predict_layers", 0, n_blocks - 1, 0)
        n_layer = n_blocks - n_ahead
        n_embd = keys.integer("embedding_length", 1, MAX_WIDTH)
        n_ctx = keys.integer("context_length", 1, MAX_CONTEXT)
        least = 0 if keys.has("ssm.inner_size") else 1  # there may be recurrent layers only
        n_head = keys.integers("attention.head_count", n_blocks, least, n_embd)
        key_length, value_length = head_lengths(keys, n_embd, max(n_head) or 1)
        attention_scale = keys.number("attention.scale", 0, 1e6, 0.0)
        causal = keys.boolean("attention.causal", True) and not is_encoder
        norm = "layer" if keys.has(NORM_EPS["layer"]) and not keys.has(NORM_EPS["rms"]) else "rms"
        pattern = "attention.sliding_window_pattern"
        window_layers = keys.flags(pattern, n_blocks) if keys.is_array(pattern) else None
        return ModelConfig(
            architecture=architecture, n_layer=n_layer, n_embd=n_embd, n_ctx=n_ctx,
            n_head=n_head[:n_layer], n_head_kv=kv_heads(keys, n_head)[:n_layer],
            n_ff=keys.integers("feed_forward_length", n_blocks, 0, MAX_WIDTH)[:n_layer],
            n_expert=keys.integer("expert_count", 0, 1 << 16, 0),
            key_length=key_length, value_length=value_length,
            norm=norm, norm_eps=keys.number(NORM_EPS[norm], 0, 1),
            causal=causal,
            rope=RopeConfig.from_keys(keys, key_length, n_ctx),
            attention_scale=attention_scale or 1 / math.sqrt(key_length),
            embedding_scale=keys.factor("embedding_scale"),
            residual_scale=keys.factor("residual_scale"),
            logit_scale=keys.factor("logit_scale"),
            window=keys.integer("attention.sliding_window", 0, MAX_CONTEXT, 0),
            window_layers=window_layers,
            window_period=0 if keys.is_array(pattern) else keys.integer(pattern, 0, MAX_LAYERS, 0),
            attn_softcap=keys.number("attn_logit_softcapping", 0, 1e6, 0.0),
            final_softcap=keys.number("final_logit_softcapping", 0, 1e6, 0.0),
            temperature_scale=keys.number("attention.temperature_scale", 0, 1e3, 0.0),
            parallel_residual=keys.boolean("use_parallel_residual", False),
            n_deepstack=keys.integer("n_deepstack_layers", 0, n_layer, 0),
            use=replace(use, n_ctx=use.n_ctx or n_ctx, hidden=use.hidden or not causal),
            n_ahead=n_ahead, keys=keys)


def head_lengths(keys: Keys, n_embd: int, n_head: int) -> tuple[int, int]:
    """(key_length, value_length): from their keys, or the embedding shared out among the heads."""
    lengths = [keys.integer(key, 1, MAX_WIDTH, None)
               for key in ("attention.key_length", "attention.value_length")]
    if None in lengths and n_embd % n_head:
        raise ModelFileError(f"metadata key {keys.prefix}.embedding_length: expected a multiple "
                             f"of the {n_head} heads, got {n_embd}")
    return tuple(length or n_embd // n_head for length in lengths)


def kv_heads(keys: Keys, n_head: tuple[int, ...]) -> tuple[int, ...]:
    """KV heads of each layer, a divisor of its query heads; as many as those by default."""
    if not keys.has("attention.head_count_kv"):
        return n_head
    found = keys.integers("attention.head_count_kv", len(n_head), 0, max(n_head))
    for layer, (n, n_kv) in enumerate(zip(n_head, found)):
        if n_kv and (n % n_kv or not n):
            raise ModelFileError(f"metadata key {keys.prefix}.attention.head_count_kv: expected a "
                                 f"divisor of the {n} heads of layer {layer}, got {n_kv}")
    return found
