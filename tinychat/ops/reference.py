"""The meaning of every operation, in NumPy: specification, oracle of the tests, and fallback.

The functions say what an operation computes, on float32 arrays; the executor walks a program with
them, one operation after another. Shapes: T tokens, S positions in the cache, H heads, Hkv KV
heads, D head width, K and N the columns and rows of a matrix.
"""
import numpy as np
from gguf import quants

from tinychat.errors import KernelError, ModelFileError, ModelLoadError
from tinychat.gguf_file import QTensor
from tinychat.ops import sampling
from tinychat.ops.program import PAGE_TOKENS, Batch, Heads, Op, Program, Rope, plan_slots

KV_DTYPES = {"f16": np.float16, "f32": np.float32}


def dequantize(tensor: QTensor) -> np.ndarray:
    """float32 array of tensor.shape; a view of the file where that is what it holds.

    Raises: ModelFileError for a type that gguf has no values for.
    """
    return _dequantize_rows(tensor, tensor.data.reshape(-1, tensor.row_bytes)).reshape(tensor.shape)


def _dequantize_rows(tensor: QTensor, rows: np.ndarray) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):  # a scale that is NaN or infinite makes such weights
            return quants.dequantize(rows, tensor.qtype)
    except NotImplementedError:
        raise ModelFileError(f"tensor {tensor.name!r} has the type {tensor.qtype.name}, "
                             "which cannot be read as weights") from None


# Operations

def embed(weight: QTensor, tokens: np.ndarray) -> np.ndarray:
    """Rows of weight (V, E) at tokens (T,) -> (T, E); only these rows are dequantised."""
    return _dequantize_rows(weight, weight.data.reshape(-1, weight.row_bytes)[tokens])


def rmsnorm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x²) + eps) * weight over each group of len(weight) values of a row."""
    groups = x.reshape(len(x), x.shape[1] // len(weight), len(weight))
    mean = np.mean(groups * groups, axis=-1, keepdims=True)
    return (groups / np.sqrt(mean + np.float32(eps)) * weight).reshape(x.shape)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x (T, K) @ weight (N, K)ᵀ + bias (N,) -> (T, N)."""
    out = x @ weight.T
    return out if bias is None else out + bias


def rope(x: np.ndarray, positions: np.ndarray, head_dim: int, rope: Rope) -> np.ndarray:
    """Turn pair i of each head of x (T, H * head_dim) by position * inv_freq[i]."""
    n_pairs = len(rope.inv_freq)
    heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
    angle = (positions.astype(np.float32)[:, None] * rope.inv_freq)[:, None, :]     # (T, 1, R/2)
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


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray,
           heads: Heads) -> np.ndarray:
    """One sequence: q (T, H * D) at positions (T,), k (S, Hkv, D), v (S, Hkv, Dv) -> (T, H * Dv).

    softmax(q·k * scale) over the positions up to the token's own, only the last `window` of them
    if there is one; head h reads KV head h // (H / Hkv).
    """
    n_tokens, n_group = len(q), heads.n_head // heads.n_head_kv
    q = q.reshape(n_tokens, heads.n_head_kv, n_group, heads.key_length).transpose(1, 2, 0, 3)
    q = q.reshape(heads.n_head_kv, n_group * n_tokens, heads.key_length)
    scores = q @ k.transpose(1, 2, 0) * np.float32(heads.scale)               # (Hkv, group*T, S)
    back = positions[:, None] - np.arange(len(k))                             # (T, S)
    seen = (back >= 0) & (back < heads.window if heads.window else True)
    scores = np.where(np.tile(seen, (n_group, 1)), scores, np.float32(-np.inf))
    out = softmax(scores) @ v.transpose(1, 0, 2)                              # (Hkv, group*T, Dv)
    out = out.reshape(heads.n_head, n_tokens, heads.value_length)
    return out.transpose(1, 0, 2).reshape(n_tokens, heads.n_head * heads.value_length)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x - max) / sum, along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, silu(x) = x / (1 + exp(-x))."""
    return gate / (1 + np.exp(-gate)) * up


# The executor

class KVLayer:
    """One attention layer's keys and values: (n_pages * PAGE_TOKENS, Hkv, D) each."""

    def __init__(self, heads: Heads, n_pages: int, dtype):
        n_slots = n_pages * PAGE_TOKENS
        self.k = np.zeros((n_slots, heads.n_head_kv, heads.key_length), dtype)
        self.v = np.zeros((n_slots, heads.n_head_kv, heads.value_length), dtype)

    def store(self, k: np.ndarray, v: np.ndarray, batch: Batch) -> None:
        slots = kv_slots(batch.pages, batch.sequences, batch.positions)
        self.k[slots] = k.reshape(len(k), *self.k.shape[1:])
        self.v[slots] = v.reshape(len(v), *self.v.shape[1:])

    def attend(self, q: np.ndarray, batch: Batch, heads: Heads) -> np.ndarray:
        out = np.empty((len(q), heads.n_head * heads.value_length), np.float32)
        for sequence in np.unique(batch.sequences):
            rows = np.flatnonzero(batch.sequences == sequence)
            positions = batch.positions[rows]
            slots = kv_slots(batch.pages, sequence, np.arange(positions.max() + 1))
            k, v = self.k[slots].astype(np.float32), self.v[slots].astype(np.float32)
            out[rows] = attend(q[rows], k, v, positions, heads)
        return out


def kv_slots(pages: np.ndarray, sequence, position: np.ndarray) -> np.ndarray:
    """Where in a KV layer each position of its sequence lives."""
    return pages[sequence, position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS


class ReferenceExecutor:
    """Runs a program in float32.

    Every matrix is held dequantised: 4 bytes a weight, so a Q4 model takes seven times its file.
    BLAS may round a batch otherwise than a single token: bit-identical results whatever the batch
    are the native executor's promise, not this one's.
    Raises: ModelFileError when a weight's type cannot be dequantised, ModelLoadError when there
    is no memory for it.
    """

    name = "reference"

    def __init__(self, program: Program, *, n_pages: int, max_tokens: int = 512,
                 max_outputs: int = 64, max_sequences: int = 64, kv_type: str = "f16",
                 threads: int | None = None, isa: str | None = None):
        """kv_type: "f16" or "f32". threads, isa: for the native executor; NumPy decides here."""
        if kv_type not in KV_DTYPES:
            raise KernelError(f"expected kv_type {' or '.join(KV_DTYPES)}, got {kv_type!r}")
        self.program, self.n_pages = program, n_pages
        self.max_tokens, self.max_outputs = max_tokens, max_outputs
        self.max_sequences = max_sequences
        self._slot_of, widths = plan_slots(program)
        self._slots: list[np.ndarray | None] = [None] * len(widths)
        try:
            self._weights = {w.name: dequantize(w)
                             for op in program.ops if op.name != "embed" for w in op.weights}
            self._kv = [KVLayer(heads, n_pages, KV_DTYPES[kv_type]) for heads in program.kv]
        except MemoryError as error:
            raise ModelLoadError(f"no memory for the weights in float32 and {n_pages} KV pages: "
                                 f"{error}") from None

    @property
    def kv_bytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._kv)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())

    def step(self, batch: Batch) -> np.ndarray:
        """Logits float32 (n_outputs, n_vocab), valid until the next step.

        Raises: KernelError for a batch that this executor cannot run; the cache is then unchanged.
        """
        if not self._slots:
            raise KernelError("the executor is closed")
        batch.check(n_vocab=self.program.n_vocab, n_pages=self.n_pages, max_tokens=self.max_tokens,
                    max_outputs=self.max_outputs, max_sequences=self.max_sequences)
        # exp(-gate) and float16 may overflow to infinity, and a row of zeros may be normed with an
        # eps of 0: what the formulas then mean is what comes out
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for op in self.program.ops:
                inputs = (self._slots[self._slot_of[b.id]] for b in op.inputs)
                out = RUN[op.name](self, op, batch, *inputs)
                if op.out:
                    self._slots[self._slot_of[op.out.id]] = out
        return self._slots[self._slot_of[self.program.logits.id]]

    def sample(self, logits_row: np.ndarray, params, recent_ids, coin: float) -> int:
        return sampling.sample(logits_row, params, recent_ids, coin)

    def close(self) -> None:
        self._weights, self._kv, self._slots = {}, [], []


    def weights_of(self, op: Op) -> list[np.ndarray]:
        return [self._weights[weight.name] for weight in op.weights]

    def kv_of(self, op: Op) -> KVLayer:
        return self._kv[op.params["layer"]]


# One row an operation: (executor, op, batch, *inputs) -> out
RUN = {
    "embed": lambda e, op, batch: embed(op.weights[0], batch.tokens),
    "rmsnorm": lambda e, op, batch, x: rmsnorm(x, *e.weights_of(op), **op.params),
    "linear": lambda e, op, batch, x: linear(x, *e.weights_of(op)),
    "rope": lambda e, op, batch, x: rope(x, batch.positions, **op.params),
    "store_kv": lambda e, op, batch, k, v: e.kv_of(op).store(k, v, batch),
    "attend": lambda e, op, batch, q: e.kv_of(op).attend(q, batch, op.params["heads"]),
    "swiglu": lambda e, op, batch, gate, up: swiglu(gate, up),
    "add": lambda e, op, batch, a, b: a + np.float32(op.params["scale"]) * b,
    "scale": lambda e, op, batch, x: x * np.float32(op.params["scale"]),
    "outputs": lambda e, op, batch, x: x[batch.outputs],
}
