"""The meaning of the plain operations, in NumPy, on float32 arrays; `mixers.py` has the others.

Shapes: T tokens, S positions in the cache, H heads, Hkv KV heads, D head width, K and N the columns
and rows of a matrix. Written in the plainest way: this is the specification.
"""
import math

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.gguf_file import QTensor
from tinychat.ops.program import Heads, Rope

CLAMP, CLAMPED_SLOPE = 7.0, 1.702  # gpt-oss: swiglu_limit, alpha
KV_GROUP = 32                      # dimensions of a key or value that share a scale
TINY = np.float32(1e-30)           # a group below it counts as zeros: 127 / it must be finite


def dequantize(tensor: QTensor) -> np.ndarray:
    """float32 array of tensor.shape; a view of the file where that is what it holds.

    Raises: ModelFileError for a type that gguf has no values for.
    """
    return dequantize_rows(tensor, tensor.data.reshape(-1, tensor.row_bytes)).reshape(tensor.shape)


def dequantize_rows(tensor: QTensor, rows: np.ndarray) -> np.ndarray:
    from gguf import quants  # takes longer than a small model to load, and few models need it

    try:
        with np.errstate(all="ignore"):  # a scale that is NaN or infinite makes such weights
            return quants.dequantize(rows, tensor.qtype)
    except NotImplementedError:
        raise ModelFileError(f"tensor {tensor.name!r} has the type {tensor.qtype.name}, "
                             "which cannot be read as weights") from None


# Rows in

def embed(weight: QTensor, ids: np.ndarray) -> np.ndarray:
    """Rows of weight (V, E) at ids (T,) -> (T, E); only these rows are dequantised."""
    return dequantize_rows(weight, weight.data.reshape(-1, weight.row_bytes)[ids])


def embed_positions(weight: QTensor, positions: np.ndarray) -> np.ndarray:
    """Rows of weight (n, E) at positions, the last one for any beyond."""
    return embed(weight, np.minimum(positions, weight.shape[0] - 1))


def place(x: np.ndarray, inputs: np.ndarray, rows: np.ndarray, column: int) -> np.ndarray:
    """x (T, W) with row t replaced by columns of inputs[rows[t]] where rows[t] >= 0."""
    out = x.copy()
    has = rows >= 0
    out[has] = inputs[rows[has], column:column + x.shape[1]]
    return out


# Norms

def rmsnorm(x: np.ndarray, weight: np.ndarray | None = None, *, eps: float,
            group: int) -> np.ndarray:
    """x / sqrt(mean(x²) + eps) * weight over each group of values of a row."""
    groups = x.reshape(len(x), x.shape[1] // group, group)
    mean = np.mean(groups * groups, axis=-1, keepdims=True)
    return _weighted(groups / np.sqrt(mean + np.float32(eps)), x.shape, weight)


def layernorm(x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None, *,
              eps: float, group: int) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias over each group of values of a row."""
    groups = x.reshape(len(x), x.shape[1] // group, group)
    groups = groups - np.mean(groups, axis=-1, keepdims=True)
    variance = np.mean(groups * groups, axis=-1, keepdims=True)
    return _weighted(groups / np.sqrt(variance + np.float32(eps)), x.shape, weight, bias)


def _weighted(groups: np.ndarray, shape, weight, bias=None) -> np.ndarray:
    """A weight as long as a group is for each of them, one as long as a row for the row."""
    for vector, apply in ((weight, np.multiply), (bias, np.add)):
        if vector is not None:
            vector = vector.reshape(-1, groups.shape[-1])                     # (1 or n, group)
            groups = apply(groups, vector)
    return groups.reshape(shape)


# Products

def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x (T, K) @ weight (N, K)ᵀ + bias (N,) -> (T, N)."""
    out = x @ weight.T
    return out if bias is None else out + bias


def head_linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (T, H*K), weight (H, N, K) -> (T, H*N)."""
    heads = x.reshape(len(x), weight.shape[0], weight.shape[2]).transpose(1, 0, 2)  # (H, T, K)
    return (heads @ weight.transpose(0, 2, 1)).transpose(1, 0, 2).reshape(len(x), -1)


# Elementwise

def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x³)))."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, each value by the C library's."""
    return np.frompyfunc(math.erf, 1, 1)(x).astype(np.float32)


ACTIVATE = {
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": gelu,
    "gelu_erf": lambda x: np.float32(0.5) * x * (1 + erf(x * np.float32(math.sqrt(0.5)))),
    "gelu_quick": lambda x: x / (1 + np.exp(np.float32(-1.702) * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
    "sigmoid": sigmoid,
}


def gate(fn: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """fn(gate) * up. "silu_clamped", gpt-oss's: gate at most CLAMP, up within ±CLAMP,
    gate * sigmoid(CLAMPED_SLOPE * gate) * (up + 1)."""
    if fn == "silu_clamped":
        gate = np.minimum(gate, np.float32(CLAMP))
        up = np.clip(up, np.float32(-CLAMP), np.float32(CLAMP))
        return gate / (1 + np.exp(np.float32(-CLAMPED_SLOPE) * gate)) * (up + 1)
    return ACTIVATE[fn](gate) * up


def softcap(x: np.ndarray, cap: float) -> np.ndarray:
    """cap * tanh(x / cap)."""
    return np.float32(cap) * np.tanh(x / np.float32(cap))


# Layout

def join(a: np.ndarray, b: np.ndarray, n_head: int) -> np.ndarray:
    """Head by head a's columns, then b's."""
    heads = [x.reshape(len(x), n_head, x.shape[1] // n_head) for x in (a, b)]
    return np.concatenate(heads, axis=2).reshape(len(a), -1)


# Attention

def rope(x: np.ndarray, turns: np.ndarray, head_dim: int, rope: Rope) -> np.ndarray:
    """Turn pair i of each head of x (T, H * head_dim) by turns * inv_freq[i].

    turns: the positions int32 (T,), or for a rope with axes Batch.axes (T, n_axes).
    """
    n_pairs = len(rope.inv_freq)
    heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
    turns = turns[:, None] if rope.axes is None else turns[:, list(rope.axes)]
    angle = (turns.astype(np.float32) * rope.inv_freq)[:, None, :]            # (T, 1, R/2)
    magnitude = np.float32(rope.magnitude)
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    first, second = rope_pairs(rope.layout, n_pairs)
    a, b = heads[..., first], heads[..., second]
    out = heads.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out.reshape(x.shape)


def rope_pairs(layout: str, n_pairs: int) -> tuple[slice, slice]:
    """Where a head's first and second halves of the pairs stand."""
    if layout == "adjacent":
        return slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    assert layout == "halves", layout
    return slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)


def temper(x: np.ndarray, positions: np.ndarray, beta: float, length: int,
           offset: int) -> np.ndarray:
    """x * (1 + beta * log(1 + floor((position + offset) / length)))."""
    factor = 1 + beta * np.log1p((positions.astype(np.int64) + offset) // length)
    return x * factor.astype(np.float32)[:, None]


def seen_range(positions: np.ndarray, spans: np.ndarray | None,
               heads: Heads) -> tuple[np.ndarray, np.ndarray]:
    """First and last position that tokens at `positions` (T,) see; see Heads. spans (T, n, 2)."""
    if not heads.causal:
        first, last = spans[:, heads.span, 0], spans[:, heads.span, 1]
        if heads.window:
            first = np.maximum(first, positions - heads.window // 2)
            last = np.minimum(last, positions + heads.window // 2)
        return first, last
    first, last = np.zeros_like(positions), positions
    if heads.window:
        first = np.maximum(positions - heads.window + 1, 0)
    if heads.chunk:
        first = positions - positions % heads.chunk
    if heads.span is not None:
        first = np.minimum(first, spans[:, heads.span, 0])
        last = np.maximum(last, spans[:, heads.span, 1])
    return first, last


def as_kv(x: np.ndarray, kv_type: str) -> tuple[np.ndarray, ...]:
    """Keys or values x (..., D) as they are kept: (x,), or for q8_0 int8 codes and float16 scales
    (..., ceil(D / 32)), x = scale * code with scale = max|x| / 127 of each 32."""
    if kv_type != "q8_0":
        return (x.astype(np.float16 if kv_type == "f16" else np.float32),)
    n = x.shape[-1]
    groups = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % KV_GROUP)])
    groups = groups.reshape(*x.shape[:-1], -1, KV_GROUP)
    high = np.abs(groups).max(axis=-1)
    inverse = np.where(high <= TINY, np.float32(0), np.float32(127) / np.maximum(high, TINY))
    codes = np.rint(np.clip(groups * inverse[..., None], -127, 127)).astype(np.int8)
    return (codes.reshape(*x.shape[:-1], -1)[..., :n],
            (high / np.float32(127)).astype(np.float16))


def of_kv(x: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """What as_kv kept, as float32."""
    if scales is None:
        return x.astype(np.float32)
    return x * np.repeat(scales.astype(np.float32), KV_GROUP, axis=-1)[..., :x.shape[-1]]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: np.ndarray, last: np.ndarray,
           heads: Heads, sinks: np.ndarray | None = None) -> np.ndarray:
    """One sequence: q (T, H * D), k (S, Hkv, D), v (S, Hkv, Dv) -> (T, H * Dv).

    softmax(q·k * scale) over the positions first … last (T,) of each token; head h reads KV head
    h // (H / Hkv). sinks (H,): a score whose weight goes nowhere.
    """
    n_tokens, n_group = len(q), heads.n_head // heads.n_head_kv
    q = q.reshape(n_tokens, heads.n_head_kv, n_group, heads.key_length).transpose(1, 2, 0, 3)
    q = q.reshape(heads.n_head_kv, n_group * n_tokens, heads.key_length)
    scores = q @ k.transpose(1, 2, 0) * np.float32(heads.scale)               # (Hkv, group*T, S)
    if heads.softcap:
        scores = softcap(scores, heads.softcap)
    at = np.arange(len(k))
    seen = (at >= first[:, None]) & (at <= last[:, None])                     # (T, S)
    scores = np.where(np.tile(seen, (n_group, 1)), scores, np.float32(-np.inf))
    if sinks is not None:
        sinks = np.repeat(sinks.reshape(heads.n_head_kv, n_group), n_tokens, axis=1)
    out = softmax(scores, sinks) @ v.transpose(1, 0, 2)                       # (Hkv, group*T, Dv)
    out = out.reshape(heads.n_head, n_tokens, heads.value_length)
    return out.transpose(1, 0, 2).reshape(n_tokens, heads.n_head * heads.value_length)


def softmax(x: np.ndarray, sinks: np.ndarray | None = None) -> np.ndarray:
    """exp(x - max) / sum, along the last axis; sinks: one more score in max and sum."""
    high = x.max(axis=-1, keepdims=True)
    if sinks is not None:
        high = np.maximum(high, sinks[..., None])
    e = np.exp(x - high)
    total = e.sum(axis=-1, keepdims=True)
    return e / (total if sinks is None else total + np.exp(sinks[..., None] - high))
