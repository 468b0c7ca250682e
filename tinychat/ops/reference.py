"""The reference executor: walks a program with NumPy, one operation after another, in float32.

What each operation means stands in `meaning.py` and `mixers.py`. It is the specification, the
oracle of the tests, and the fallback where no kernel could be built.
"""
import numpy as np

from tinychat.errors import KernelError, ModelLoadError
from tinychat.ops import meaning, mixers, sampling
from tinychat.ops.batch import Batch, Limits
from tinychat.ops.meaning import dequantize
from tinychat.ops.program import PAGE_TOKENS, Heads, Op, Program, check_kv_type, plan_slots

LOOKED_UP = ("embed", "embed_positions")  # their weights stay as they are stored


class KVLayer:
    """One attention layer's keys and values, each as arrays (n_pages * PAGE_TOKENS, Hkv, ...): what
    meaning.as_kv makes of them."""

    def __init__(self, heads: Heads, limits: Limits, kv_type: str):
        self.has_reach, self.kv_type = heads.reach > 0, kv_type
        n_slots = (limits.n_window_pages if self.has_reach else limits.n_pages) * PAGE_TOKENS
        self.k, self.v = (
            tuple(np.zeros((n_slots, *one.shape[1:]), one.dtype) for one in meaning.as_kv(
                np.zeros((1, heads.n_head_kv, n), np.float32), kv_type))
            for n in (heads.key_length, heads.value_length))

    def store(self, k: np.ndarray, v: np.ndarray, batch: Batch) -> None:
        slots = self._slots(batch, batch.sequences, batch.positions)
        for x, arrays in ((k, self.k), (v, self.v)):
            x = x.reshape(len(x), *arrays[0].shape[1:])
            for array, stored in zip(arrays, meaning.as_kv(x, self.kv_type)):
                array[slots] = stored

    def attend(self, q: np.ndarray, batch: Batch, heads: Heads,
               sinks: np.ndarray | None = None) -> np.ndarray:
        out = np.empty((len(q), heads.n_head * heads.value_length), np.float32)
        for sequence in np.unique(batch.sequences):
            rows = np.flatnonzero(batch.sequences == sequence)
            spans = None if batch.spans is None else batch.spans[rows]
            first, last = meaning.seen_range(batch.positions[rows], spans, heads)
            begin = first.min()
            slots = self._slots(batch, sequence, np.arange(begin, last.max() + 1))
            k, v = (meaning.of_kv(*(array[slots] for array in arrays))
                    for arrays in (self.k, self.v))
            out[rows] = meaning.attend(q[rows], k, v, first - begin, last - begin, heads, sinks)
        return out

    def _slots(self, batch: Batch, sequence, position: np.ndarray) -> np.ndarray:
        """Where in this layer each position of its sequence lives."""
        pages = batch.window_pages if self.has_reach else batch.pages
        return pages[sequence, position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS


class ReferenceExecutor:
    """Runs a program in float32.

    Every matrix is held dequantised: 4 bytes a weight, so a Q4 model takes seven times its file.
    BLAS may round a batch otherwise than a single token: bit-identical results whatever the batch
    are the native executor's promise, not this one's.
    limits: as `Limits` has them. kv_type: a key of KV_BYTES.
    Raises: ModelFileError when a weight's type cannot be dequantised, ModelLoadError when there
    is no memory for it.
    """

    name = "reference"

    def __init__(self, program: Program, *, kv_type: str = "f16", threads: int | None = None,
                 isa: str | None = None, **limits):
        """threads, isa: for the native executor; NumPy decides here."""
        check_kv_type(kv_type)
        self.program, self.limits = program, Limits(**limits).of(program)
        self._slot_of, widths = plan_slots(program)
        self._slots: list[np.ndarray | None] = [None] * len(widths)
        try:
            self._weights = {id(w): dequantize(w) for op in program.ops
                             if op.name not in LOOKED_UP for w in op.weights}
            self._kv = [KVLayer(heads, self.limits, kv_type) for heads in program.kv]
            self._states = [np.zeros((self.limits.n_states, n), np.float32)
                            for n in program.states]
        except MemoryError as error:
            raise ModelLoadError("no memory for the weights in float32 and "
                                 f"{self.limits.n_pages} KV pages: {error}") from None

    @property
    def kv_bytes(self) -> int:
        return sum(array.nbytes for layer in self._kv for array in (*layer.k, *layer.v))

    @property
    def state_bytes(self) -> int:
        return sum(state.nbytes for state in self._states)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())

    def step(self, batch: Batch) -> np.ndarray:
        """The program's result, float32 (n_outputs, width), valid until the next step.

        Raises: KernelError for a batch that this executor cannot run; the cache is then unchanged.
        """
        if not self._slots:
            raise KernelError("the executor is closed")
        batch = batch.whole(self.program)
        batch.check(self.program, self.limits)
        # exp(-gate) and float16 may overflow to infinity, and a row of zeros may be normed with an
        # eps of 0: what the formulas then mean is what comes out
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for op in self.program.ops:
                inputs = (self._slots[self._slot_of[b.id]] for b in op.inputs)
                out = RUN[op.name](self, op, batch, *inputs)
                if op.out:
                    self._slots[self._slot_of[op.out.id]] = out
        return self._slots[self._slot_of[self.program.result.id]]

    def copy_state(self, source: int, target: int) -> None:
        """What recurrent state place `source` holds, to `target`. Not while a step runs."""
        for state in self._states:
            state[target] = state[source]

    def sample(self, logits_row: np.ndarray, params, recent_ids, coin: float) -> int:
        return sampling.sample(logits_row, params, recent_ids, coin)

    def close(self) -> None:
        self._weights, self._kv, self._states, self._slots = {}, [], [], []

    def weights_of(self, op: Op) -> list[np.ndarray]:
        return [self._weights[id(weight)] for weight in op.weights]

    def vectors_of(self, op: Op) -> list[np.ndarray]:
        return [weight.reshape(-1) for weight in self.weights_of(op)]

    def kv_of(self, op: Op) -> KVLayer:
        return self._kv[op.params["layer"]]

    def recur(self, op: Op, batch: Batch, inputs, run) -> np.ndarray:
        """run(state, *inputs) on each sequence's tokens; the state is zeros before position 0."""
        states = self._states[op.params["state"]]
        out = np.empty((len(inputs[0]), op.out.width), np.float32)
        for sequence in np.unique(batch.sequences):
            rows = np.flatnonzero(batch.sequences == sequence)
            state = states[batch.states[sequence]]
            if batch.positions[rows[0]] == 0:
                state[:] = 0
            out[rows] = run(state, *(x[rows] for x in inputs))
        return out


def _conv(e: ReferenceExecutor, op: Op, batch: Batch, x: np.ndarray) -> np.ndarray:
    weight, *bias = e.weights_of(op)
    return e.recur(op, batch, (x,), lambda state, x: mixers.conv(
        state.reshape(weight.shape[1] - 1, x.shape[1]), x, weight, *bias))


def _mamba2(e: ReferenceExecutor, op: Op, batch: Batch, *inputs) -> np.ndarray:
    shape = op.params["shape"]
    return e.recur(op, batch, inputs, lambda state, *inputs: mixers.mamba2(
        state.reshape(shape.n_head, shape.head_dim, shape.n_state), *inputs, *e.vectors_of(op),
        shape=shape))


def _delta_net(e: ReferenceExecutor, op: Op, batch: Batch, *inputs) -> np.ndarray:
    shape = op.params["shape"]
    return e.recur(op, batch, inputs, lambda state, *inputs: mixers.delta_net(
        state.reshape(shape.n_value_head, shape.key_length, shape.value_length), *inputs,
        *e.vectors_of(op), shape=shape))


def _rope(e: ReferenceExecutor, op: Op, batch: Batch, x: np.ndarray) -> np.ndarray:
    turns = batch.positions if op.params["rope"].axes is None else batch.axes
    return meaning.rope(x, turns, **op.params)


def _given(e: ReferenceExecutor, op: Op, batch: Batch, x: np.ndarray | None = None) -> np.ndarray:
    if x is None:
        x = np.zeros((len(batch.tokens), op.out.width), np.float32)
    return meaning.place(x, batch.inputs, batch.input_rows, op.params["column"])


# One row an operation: (executor, op, batch, *inputs) -> out
RUN = {
    "embed": lambda e, op, batch: meaning.embed(op.weights[0], batch.tokens),
    "embed_positions": lambda e, op, batch: meaning.embed_positions(op.weights[0], batch.positions),
    "given": _given,
    "place": _given,
    "rmsnorm": lambda e, op, batch, x: meaning.rmsnorm(x, *e.weights_of(op), **op.params),
    "layernorm": lambda e, op, batch, x: meaning.layernorm(x, *e.weights_of(op), **op.params),
    "linear": lambda e, op, batch, x: meaning.linear(x, *e.weights_of(op)),
    "head_linear": lambda e, op, batch, x: meaning.head_linear(x, *e.weights_of(op)),
    "activate": lambda e, op, batch, x: meaning.ACTIVATE[op.params["fn"]](x),
    "gate": lambda e, op, batch, gate, up: meaning.gate(op.params["fn"], gate, up),
    "add": lambda e, op, batch, a, b: a + np.float32(op.params["scale"]) * b,
    "scale": lambda e, op, batch, x: x * np.float32(op.params["scale"]),
    "softcap": lambda e, op, batch, x: meaning.softcap(x, op.params["scale"]),
    "add_vector": lambda e, op, batch, x: x + e.vectors_of(op)[0],
    "mul_vector": lambda e, op, batch, x: x * e.vectors_of(op)[0],
    "mul_column": lambda e, op, batch, x, column: x * column,
    "columns": lambda e, op, batch, x: x[:, op.params["begin"]:op.params["begin"] + op.out.width],
    "join": lambda e, op, batch, a, b: meaning.join(a, b, **op.params),
    "outputs": lambda e, op, batch, x: x[batch.outputs],
    "rope": _rope,
    "temper": lambda e, op, batch, x: meaning.temper(x, batch.positions, **op.params),
    "store_kv": lambda e, op, batch, k, v: e.kv_of(op).store(k, v, batch),
    "attend": lambda e, op, batch, q: e.kv_of(op).attend(q, batch, op.params["heads"],
                                                         *e.vectors_of(op)),
    "route": lambda e, op, batch, logits: mixers.route(logits, *e.vectors_of(op), **op.params),
    "experts": lambda e, op, batch, x, routes: mixers.experts(x, routes, *e.weights_of(op)),
    "weigh": lambda e, op, batch, x, routes: mixers.weigh(x, routes),
    "mix": lambda e, op, batch, x, routes: mixers.mix(x, routes, **op.params),
    "conv": _conv,
    "mamba2": _mamba2,
    "delta_net": _delta_net,
}
