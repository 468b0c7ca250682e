"""A program: a flat list of operations over named buffers and weights, one step for T tokens.

A model is plain Python that writes to a `Recorder` (recorder.py), once, at load; the number of
tokens stays symbolic. `meaning.py` and `mixers.py` say what each operation computes.
"""
from dataclasses import dataclass, field

import numpy as np

from tinychat.errors import KernelError
from tinychat.gguf_file import QTensor

PAGE_TOKENS = 32  # positions in one KV page; part of the promise that results ignore batching
KV_BYTES = {"f32": 4, "f16": 2, "q8_0": 34 / 32}  # kinds of keys and values: bytes of each


def check_kv_type(kv_type: str) -> None:
    if kv_type not in KV_BYTES:
        raise KernelError(f"expected kv_type {', '.join(KV_BYTES)}, got {kv_type!r}")


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
    axes: which column of Batch.axes each pair turns by, ints (R/2,); None: all by the position.
    """

    layout: str
    inv_freq: np.ndarray
    magnitude: float = 1.0
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Heads:
    """The shape of one attention layer; scores `q·k * scale`.

    Which positions a token at p sees, S being its pair in column `span` of Batch.spans:
      causal      0 … p, only the last `window` of them, or only those of p's own run of `chunk`
                  positions; and, where `span` is set, the whole of S besides
      not causal  S, and of that only p - window//2 … p + window//2 where there is a window
    A window or chunk that is causal lets go of the positions that have fallen out of it: such a
    layer's pages are `Batch.window_pages`.
    softcap: c > 0 makes each score c * tanh(score / c).
    """

    n_head: int
    n_head_kv: int
    key_length: int
    value_length: int
    scale: float
    window: int = 0
    chunk: int = 0
    causal: bool = True
    span: int | None = None
    softcap: float = 0.0

    def __post_init__(self):
        assert self.causal or self.span is not None, "who is not causal sees a span"
        assert not (self.window and self.chunk), "a window or a chunk"

    @property
    def reach(self) -> int:
        """How many of the last positions it may still need, 0 for all: the pages that it keeps."""
        return (self.window or self.chunk) if self.causal else 0


@dataclass(frozen=True)
class Routing:
    """How a token's experts are chosen from its router logits (n_expert,).

    gating: "softmax" and "sigmoid" make scores of all logits and choose by score (plus the bias,
    if there is one); "chosen" chooses by logit and takes the softmax over those chosen.
    n_group: experts stand in so many equal groups; only the `n_group_used` groups whose two best
    experts have the highest sum of score may be chosen from.
    normalise: the chosen scores are divided by their sum. scale: a factor on them in the end.
    """

    n_expert: int
    n_used: int
    gating: str = "softmax"
    n_group: int = 1
    n_group_used: int = 1
    normalise: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Mamba2:
    """H heads of P values, G groups of N states: x (T, H*P), b and c (T, G*N), dt (T, H)."""

    n_head: int
    head_dim: int
    n_group: int
    n_state: int


@dataclass(frozen=True)
class DeltaNet:
    """q and k (T, n_key_head * key_length), v (T, n_value_head * value_length).

    tiled: value head h goes with key head h % n_key_head; else with h // (n_value_head/n_key_head).
    """

    n_key_head: int
    n_value_head: int
    key_length: int
    value_length: int
    tiled: bool = False


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
    """ops in order; `kv[i]` is the shape of KV layer i; `result` is `(n_outputs, width)`: logits,
    or the last hidden state of a model without a vocabulary to choose from.

    states[i]: floats that a sequence keeps in recurrent state i.
    input_width: that of the rows of Batch.inputs, 0: it takes none. n_axes, n_spans: columns of
    Batch.axes and Batch.spans that are read.
    """

    name: str
    ops: tuple[Op, ...]
    buffers: tuple[Buffer, ...]
    kv: tuple[Heads, ...]
    result: Buffer
    states: tuple[int, ...] = ()
    input_width: int = 0
    n_axes: int = 0
    n_spans: int = 0

    @property
    def n_vocab(self) -> int:
        """Width of the result."""
        return self.result.width

    @property
    def n_ids(self) -> int:
        """Token ids that it can look up."""
        return min((op.weights[0].shape[0] for op in self.ops if op.name == "embed"),
                   default=1 << 31)

    @property
    def window(self) -> int:
        """Positions that must stay in `Batch.window_pages`: the longest reach; 0: it has none."""
        return max((heads.reach for heads in self.kv), default=0)

    def weights(self) -> list[QTensor]:
        """Each weight once, in the order of first use."""
        return list({id(w): w for op in self.ops for w in op.weights}.values())

    def __str__(self) -> str:
        states = f", {len(self.states)} recurrent states" if self.states else ""
        title = f"program {self.name}: {len(self.ops)} operations, {len(self.kv)} KV layers{states}"
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
    if isinstance(value, Routing):
        return f"{value.n_used} of {value.n_expert} by {value.gating}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def plan_slots(program: Program) -> tuple[list[int], list[int]]:
    """Give buffers that never live at the same time the same memory.

    Returns the slot of each buffer and the width of each slot. Buffers of "tokens" and of
    "outputs" rows never share one, nor do an operation's inputs and its output.
    """
    last = {b.id: i for i, op in enumerate(program.ops) for b in (*op.inputs, op.out) if b}
    last[program.result.id] = len(program.ops)
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
