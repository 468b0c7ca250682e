"""The vocabulary of operations, and the recorder that a model description writes to.

A model is plain Python that describes one step for a batch of T tokens. It is called once, at load,
with a `Recorder`, and yields a `Program`: a flat list of operations over named buffers and weights.
The number of tokens stays symbolic. `reference.py` says what each operation means.
"""
from dataclasses import dataclass, field

import numpy as np

from tinychat.errors import KernelError
from tinychat.gguf_file import QTensor

PAGE_TOKENS = 32  # positions in one KV page; part of the promise that results ignore batching


@dataclass(frozen=True)
class Buffer:
    """Activations, float32 `(T, width)`; `rows` is "outputs" where only wanted rows are left."""

    id: int
    width: int
    name: str
    rows: str = "tokens"


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding, scaling already worked into the frequencies.

    layout: "adjacent" turns pairs (x0,x1),(x2,x3)…; "halves" turns (x0,x[R/2]),(x1,x[R/2+1])…
    inv_freq: float32 (R/2,), R being the rotated width; the rest of the head is copied.
    The angle is float32(position) * inv_freq, rounded to float32 before sine and cosine are taken.
    magnitude: factor on both sine and cosine (yarn's attention factor).
    """

    layout: str
    inv_freq: np.ndarray
    magnitude: float = 1.0


@dataclass(frozen=True)
class Heads:
    """The shape of one attention layer: causal, scores `q·k * scale`.

    A token sees the last `window` positions, its own included; 0: all.
    """

    n_head: int
    n_head_kv: int
    key_length: int
    value_length: int
    scale: float
    window: int = 0


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: `out` from `inputs`, `weights` and `params`; a store has no `out`."""

    name: str
    out: Buffer | None
    inputs: tuple[Buffer, ...]
    weights: tuple[QTensor, ...] = ()
    params: dict = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Program:
    """ops in order; `kv[i]` is the shape of KV layer i; `logits` is `(n_outputs, n_vocab)`."""

    name: str
    ops: tuple[Op, ...]
    buffers: tuple[Buffer, ...]
    kv: tuple[Heads, ...]
    logits: Buffer

    @property
    def n_vocab(self) -> int:
        return self.logits.width

    def weights(self) -> list[QTensor]:
        """Each weight once, in the order of first use."""
        return list({id(w): w for op in self.ops for w in op.weights}.values())

    def __str__(self) -> str:
        title = f"program {self.name}: {len(self.ops)} operations, {len(self.kv)} KV layers"
        return "\n".join([title, *map(_line, self.ops)])


def _line(op: Op) -> str:
    out = f"{op.out.name}:{op.out.width} = " if op.out else ""
    words = [b.name for b in op.inputs]
    words += [f"{w.name}<{w.qtype.name} {'x'.join(map(str, w.shape))}>" for w in op.weights]
    words += [f"{k}={_short(v)}" for k, v in op.params.items()]
    return f"  {out}{op.name}({', '.join(words)})"


def _short(value) -> str:
    if isinstance(value, Rope):
        return f"{value.layout}/{2 * len(value.inv_freq)}"
    if isinstance(value, Heads):
        window = f" window {value.window}" if value.window else ""
        return f"{value.n_head}/{value.n_head_kv} heads of {value.key_length}{window}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Recorder:
    """Each method records one operation and returns the buffer it fills.

    T is the step's tokens, E n_embd, V n_vocab.
    """

    def __init__(self):
        self._ops: list[Op] = []
        self._buffers: list[Buffer] = []
        self._kv: list[Heads] = []

    def _record(self, name, width, inputs, weights=(), rows=None, **params) -> Buffer:
        rows = rows or (inputs[0].rows if inputs else "tokens")
        out = Buffer(len(self._buffers), width, f"b{len(self._buffers)}", rows)
        self._buffers.append(out)
        self._ops.append(Op(name, out, tuple(inputs), tuple(weights), params))
        return out

    def embed(self, weight: QTensor) -> Buffer:
        """Rows of `weight (V, E)` at the batch's token ids -> (T, E)."""
        return self._record("embed", weight.shape[1], (), (weight,))

    def rmsnorm(self, x: Buffer, weight: QTensor, eps: float) -> Buffer:
        """x / sqrt(mean(x²) + eps) * weight, over groups of len(weight): a row, or its heads."""
        assert x.width % weight.shape[0] == 0, (x, weight)
        return self._record("rmsnorm", x.width, (x,), (weight,), eps=eps)

    def linear(self, x: Buffer, weight: QTensor, bias: QTensor | None = None) -> Buffer:
        """x (T, K) @ weight (N, K)ᵀ + bias (N,) -> (T, N)."""
        assert weight.shape[1] == x.width, (x, weight)
        return self._record("linear", weight.shape[0], (x,), (weight, *([bias] if bias else ())))

    def rope(self, x: Buffer, head_dim: int, rope: Rope) -> Buffer:
        """Turn each head of `x (T, n_head * head_dim)` by its token's position."""
        return self._record("rope", x.width, (x,), head_dim=head_dim, rope=rope)

    def attend(self, q: Buffer, k: Buffer, v: Buffer, heads: Heads) -> Buffer:
        """Store k and v in a new KV layer at each token's position, then attend from q.

        q (T, n_head * key_length), k (T, n_head_kv * key_length), v (T, n_head_kv * value_length)
        -> (T, n_head * value_length). Head h reads KV head h // (n_head / n_head_kv).
        """
        layer, width = len(self._kv), heads.n_head * heads.value_length
        self._kv.append(heads)
        self._ops.append(Op("store_kv", None, (k, v), (), {"layer": layer}))
        return self._record("attend", width, (q,), layer=layer, heads=heads)

    def swiglu(self, gate: Buffer, up: Buffer) -> Buffer:
        """silu(gate) * up, silu(x) = x / (1 + exp(-x))."""
        return self._record("swiglu", gate.width, (gate, up))

    def add(self, a: Buffer, b: Buffer, scale: float = 1.0) -> Buffer:
        """a + scale * b."""
        return self._record("add", a.width, (a, b), scale=float(scale))

    def scale(self, x: Buffer, scale: float) -> Buffer:
        """x * scale."""
        return self._record("scale", x.width, (x,), scale=float(scale))

    def outputs(self, x: Buffer) -> Buffer:
        """The rows of x whose logits the batch asks for: (T, E) -> (n_outputs, E)."""
        return self._record("outputs", x.width, (x,), rows="outputs")

    def finish(self, name: str, logits: Buffer) -> Program:
        return Program(name, tuple(self._ops), tuple(self._buffers), tuple(self._kv), logits)


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's tokens, of any mix of sequences; each one's tokens stand in order of position.

    tokens, positions, sequences: int32 (T,); sequences[t] is token t's row of `pages`.
    pages: int32 (n_sequences, max_pages); position p of sequence s lives in slot p % PAGE_TOKENS
    of page pages[s, p // PAGE_TOKENS]. Every position below a token's own must have been stored
    by this or an earlier step. Entries behind a sequence's last position are not looked at.
    outputs: int32 (n_outputs,), indices of the tokens whose logits are wanted; may be empty.
    """

    tokens: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    pages: np.ndarray
    outputs: np.ndarray

    def check(self, *, n_vocab: int, n_pages: int, max_tokens: int, max_outputs: int,
              max_sequences: int) -> None:
        """Raises KernelError naming the first thing an executor of these limits could not run."""
        self._check_shapes()
        n_tokens, n_sequences = len(self.tokens), len(self.pages)
        _check_between("the number of tokens", n_tokens, 1, max_tokens)
        _check_between("the number of sequences", n_sequences, 1, max_sequences)
        _check_between("the number of outputs", len(self.outputs), 0, max_outputs)
        _check_range("tokens", self.tokens, n_vocab)
        _check_range("sequences", self.sequences, n_sequences)
        _check_range("outputs", self.outputs, n_tokens)
        _check_range("positions", self.positions, self.pages.shape[1] * PAGE_TOKENS)
        self._check_pages(n_pages)
        self._check_order()

    def _check_shapes(self) -> None:
        dims = {"tokens": 1, "positions": 1, "sequences": 1, "pages": 2, "outputs": 1}
        for name, n_dims in dims.items():
            array = getattr(self, name)
            if array.dtype != np.int32 or array.ndim != n_dims:
                raise KernelError(f"batch: expected {name} as int32 of {n_dims} dimensions, "
                                  f"got {array.dtype} of {array.ndim}")
        if not len(self.tokens) == len(self.positions) == len(self.sequences):
            raise KernelError(f"batch: {len(self.tokens)} tokens, {len(self.positions)} positions "
                              f"and {len(self.sequences)} sequences; expected equally many")

    def _check_pages(self, n_pages: int) -> None:
        """Only the pages up to a sequence's last position are read."""
        last = np.full(len(self.pages), -1, np.int32)
        np.maximum.at(last, self.sequences, self.positions // PAGE_TOKENS)
        used = np.arange(self.pages.shape[1], dtype=np.int32) <= last[:, None]
        _check_range("pages", self.pages[used], n_pages)

    def _check_order(self) -> None:
        order = np.argsort(self.sequences, kind="stable")
        same = np.diff(self.sequences[order]) == 0
        wrong = np.flatnonzero(same & (np.diff(self.positions[order]) <= 0))
        if len(wrong):
            before, at = order[wrong[0]], order[wrong[0] + 1]
            raise KernelError(f"batch: positions[{at}] is {self.positions[at]}, expected above "
                              f"{self.positions[before]}, which comes before it in its sequence")


def _check_between(what: str, n: int, low: int, high: int) -> None:
    if not low <= n <= high:
        raise KernelError(f"batch: {what} is {n}, expected {low} to {high}")


def _check_range(name: str, values: np.ndarray, end: int) -> None:
    wrong = np.flatnonzero((values < 0) | (values >= end))
    if len(wrong):
        at = wrong[0]
        raise KernelError(f"batch: {name}[{at}] is {values[at]}, expected 0 to {end - 1}")


def plan_slots(program: Program) -> tuple[list[int], list[int]]:
    """Give buffers that never live at the same time the same memory.

    Returns the slot of each buffer and the width of each slot. Buffers of "tokens" and of
    "outputs" rows never share one, nor do an operation's inputs and its output.
    """
    last = {b.id: i for i, op in enumerate(program.ops) for b in (*op.inputs, op.out) if b}
    last[program.logits.id] = len(program.ops)
    slot_of, widths, kinds, free_at = [0] * len(program.buffers), [], [], []
    for i, op in enumerate(program.ops):
        if op.out is None:
            continue
        fit = [s for s, end in enumerate(free_at) if end < i and kinds[s] == op.out.rows]
        if fit:
            slot = min(fit, key=lambda s: abs(widths[s] - op.out.width))
        else:
            slot = len(widths)
            widths.append(0)
            kinds.append(op.out.rows)
            free_at.append(-1)
        slot_of[op.out.id], free_at[slot] = slot, last[op.out.id]
        widths[slot] = max(widths[slot], op.out.width)
    return slot_of, widths
