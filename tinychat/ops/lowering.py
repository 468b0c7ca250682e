"""A recorded program -> the flat arrays that the native executor hands to tinychat._kernels.

Lowering adds what only the kernels need: rows quantised to int8 for the block formats, shared by
all products that read them; a table of sines and cosines per rope; and the barriers between
operations whose work is divided in different ways.
"""
import math
import mmap
from dataclasses import asdict, replace

import numpy as np

from tinychat import _kernels
from tinychat.errors import KernelError
from tinychat.gguf_file import GGMLQuantizationType as Type, QTensor
from tinychat.ops.meaning import dequantize, dequantize_rows
from tinychat.ops.batch import Limits
from tinychat.ops.program import (
    Buffer, DeltaNet, Heads, Mamba2, Op, Program, Rope, Routing, plan_slots)

# How an operation's weights are read where not all are vectors: "rows" of a matrix are looked up,
# a "packed" one is multiplied with, of a small one the "columns" are read.
WEIGHTS = {
    "embed": ("rows",),
    "embed_positions": ("rows",),
    "linear": ("packed", "vector"),
    "head_linear": ("packed",),
    "experts": ("packed", "vector"),
    "conv": ("columns", "vector"),
}

SLICE_WEIGHTS = 1 << 20  # that are float32 at a time, where a matrix is converted

PRODUCTS = ("linear", "head_linear", "experts")

# Threads claim pieces of these; of all others each takes its range of the rows.
CLAIMED = ("linear", "head_linear", "experts", "attend", "conv", "mamba2", "delta_net")

# Parameters that have another name in program_op
FIELDS = {"eps": "scalar", "scale": "scalar", "beta": "scalar", "column": "begin",
          "head_dim": "group"}

# Parameters that are structs: the field tells which row of their table, see `Tables`
STRUCTS = ("rope", "heads", "routing", "shape")


# Weights

class Weights:
    """The tensors of a program as the kernels take them, each once.

    matrices: [qtype, n_parts, n_rows, n_cols, bytes, pack, is_mapped]; vectors: float32 arrays.
    """

    def __init__(self):
        self.matrices: list[list] = []
        self.vectors: list[np.ndarray] = []
        self._index: dict[tuple[str, int], int] = {}

    def vector(self, tensor: QTensor) -> int:
        return self._once("vector", tensor, self.vectors, lambda: np.require(
            dequantize(tensor).reshape(-1), np.float32, ["C", "A"]))

    def index(self, tensor: QTensor, how: str) -> int:
        """how: "vector", a matrix as a vector of its "columns", or a matrix, see WEIGHTS."""
        if how == "vector":
            return self.vector(tensor)
        if how == "columns":
            return self._once("columns", tensor, self.vectors, lambda: np.require(
                dequantize(tensor).T.reshape(-1), np.float32, ["C", "A"]))
        return self.matrix(tensor, pack=how == "packed")

    def matrix(self, tensor: QTensor, *, pack: bool) -> int:
        i = self._once("matrix", tensor, self.matrices, lambda: _matrix(tensor))
        self.matrices[i][5] |= pack
        return i

    def _once(self, kind: str, tensor: QTensor, entries: list, make) -> int:
        key = kind, id(tensor)
        if key not in self._index:
            self._index[key] = len(entries)
            entries.append(make())
        return self._index[key]


def _matrix(tensor: QTensor) -> list:
    *parts, n_rows, n_cols = tensor.shape
    data, kind = tensor.data, multiplied_as(tensor)
    if kind != tensor.qtype:
        data = _as_q8_0(tensor) if kind == Type.Q8_0 else _as_float16(tensor)
    return [int(kind), math.prod(parts), n_rows, n_cols, data, False, _is_mapped(data)]


def multiplied_as(tensor: QTensor) -> Type:
    """The format that the kernels read these weights in; another than the file's is made at load.
    """
    if _kernels.activation_floats(int(tensor.qtype), *tensor.shape[-2:]) is not None:
        return tensor.qtype
    return Type.Q8_0 if _kernels.is_rare(int(tensor.qtype)) else Type.F16


def _as_q8_0(tensor: QTensor) -> np.ndarray:
    """rare.c says how exact this is. Some 3 s for a thousand million weights."""
    return _kernels.rare_to_q8_0_blocks(int(tensor.qtype), _grid(tensor.qtype),
                                        tensor.data.reshape(-1))


def _grid(qtype: Type) -> np.ndarray:
    """The values that codes of this format index, int8, flat; empty where they are values."""
    from gguf import quants  # takes longer than a small model to load, and few models need it

    format_ = getattr(quants, qtype.name)
    if not format_.grid_hex:
        return np.empty(0, np.int8)
    format_.init_grid()
    return np.ascontiguousarray(format_.grid, np.float32).astype(np.int8).reshape(-1)


def _as_float16(tensor: QTensor) -> np.ndarray:
    """What has neither kernel nor conversion, a slice at a time: 11 bits of each value."""
    rows = tensor.data.reshape(-1, tensor.row_bytes)
    out = np.empty((len(rows), tensor.shape[-1]), np.float16)
    step = max(1, SLICE_WEIGHTS // tensor.shape[-1])
    for at in range(0, len(rows), step):
        with np.errstate(over="ignore"):  # beyond 65504: infinity, as float16 means it
            out[at:at + step] = dequantize_rows(tensor, rows[at:at + step])
    return out.reshape(-1).view(np.uint8)


def _activation_floats(weight: QTensor) -> int:
    """float32s that a quantised row takes for this product; 0: it reads plain float32."""
    return _kernels.activation_floats(int(multiplied_as(weight)), *weight.shape[-2:]) or 0


def _is_mapped(data: np.ndarray) -> bool:
    """Whether these bytes are a file's: then their pages can be given back once they are packed."""
    base = data
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return isinstance(base, mmap.mmap)


# New operations

def lower(program: Program) -> Program:
    """The same with `quantize` (x -> int8 row) and `rope_table` (-> cosines, sines) written out."""
    lowering = _Lowering(program)
    for op in program.ops:
        lowering.ops.append(lowering.prepared(op))
    return replace(program, ops=tuple(lowering.ops), buffers=tuple(lowering.buffers))


class _Lowering:
    def __init__(self, program: Program):
        self.ops: list[Op] = []
        self.buffers = list(program.buffers)
        self._made: dict[tuple, Buffer] = {}

    def prepared(self, op: Op) -> Op:
        if op.name in PRODUCTS:
            x, *others = op.inputs
            group = op.weights[0].shape[-1]  # what one of its matrices multiplies with
            width = _activation_floats(op.weights[0]) * (x.width // group)
            if width == 0:
                return op
            quantized = self._once("quantize", (x.id, group), width, x.rows, (x,), group=group)
            return replace(op, inputs=(quantized, *others))
        if op.name == "rope":
            (x,), rope = op.inputs, op.params["rope"]
            width = 4 * len(rope.inv_freq)
            return replace(op, inputs=(x, self._once("rope_table", id(rope), width, x.rows, (),
                                                     rope=rope)))
        return op

    def _once(self, name: str, key, width: int, rows: str, inputs: tuple, **params) -> Buffer:
        """The buffer of this operation, recorded where it is first needed."""
        if (name, key) not in self._made:
            out = Buffer(len(self.buffers), width, f"b{len(self.buffers)}", rows)
            self.buffers.append(out)
            self.ops.append(Op(name, out, inputs, (), params))
            self._made[name, key] = out
        return self._made[name, key]


# Barriers

def barriers(ops: list[Op], slot_of: list[int]) -> list[bool]:
    """Which operations must wait until all threads have finished those before.

    Operations that give each thread the same rows pass them on without waiting. All others may not
    touch memory that an operation since the last barrier writes, nor write what one reads.
    """
    since: dict[object, list[tuple[str | None, bool]]] = {}  # place: accesses (division, written)
    out = []
    for op in ops:
        division = _division(op)
        accesses = list(_accesses(op, slot_of))
        wait = any((written or written_before) and not (division and division == before)
                   for place, written in accesses
                   for before, written_before in since.get(place, ()))
        if wait:
            since.clear()
        for place, written in accesses:
            since.setdefault(place, []).append((division, written))
        out.append(wait)
    return out


def _division(op: Op) -> str | None:
    """"tokens" or "outputs" when each thread takes its range of these rows; None: another way."""
    if op.name in CLAIMED or op.name == "outputs":
        return None
    return op.out.rows if op.out else op.inputs[0].rows


def _accesses(op: Op, slot_of: list[int]):
    """(place, is it written) of each slot and KV layer that an operation touches."""
    for buffer in op.inputs:
        yield slot_of[buffer.id], False
    if op.out:
        yield slot_of[op.out.id], True
    if op.name in ("store_kv", "attend"):
        yield ("kv", op.params["layer"]), op.name == "store_kv"


# Arrays

class Tables:
    """The structs that operations share, each once: kernels.h says what is in them."""

    def __init__(self):
        self.ropes: list[tuple] = []
        self.attentions: list[dict] = []
        self.routings: list[dict] = []
        self.mamba2s: list[dict] = []
        self.delta_nets: list[dict] = []
        self._index: dict[int, int] = {}

    def index(self, params) -> int:
        """Which row of its table these are."""
        if id(params) not in self._index:
            rows, make = self._of(params)
            self._index[id(params)] = len(rows)
            rows.append(make(params))
        return self._index[id(params)]

    def _of(self, params):
        return {Rope: (self.ropes, _rope), Heads: (self.attentions, _attention),
                Routing: (self.routings, _routing), Mamba2: (self.mamba2s, asdict),
                DeltaNet: (self.delta_nets, asdict)}[type(params)]

    def arrays(self) -> dict:
        return {
            "ropes": self.ropes,
            "attentions": _table(self.attentions, _kernels.attention_fields),
            "routings": _table(self.routings, _kernels.routing_fields),
            "mamba2s": _table(self.mamba2s, _kernels.mamba2_fields),
            "delta_nets": _table(self.delta_nets, _kernels.delta_net_fields),
        }


def _rope(rope: Rope) -> tuple:
    axes = None if rope.axes is None else np.array(rope.axes, np.int32)
    return rope.layout, np.require(rope.inv_freq, np.float32, ["C", "A"]), rope.magnitude, axes


def _attention(heads: Heads) -> dict:
    return {**asdict(heads), "span": -1 if heads.span is None else heads.span}


def _routing(routing: Routing) -> dict:
    return {**asdict(routing), "gating": _kernels.gatings[routing.gating]}


def _op_row(op: Op, barrier: bool, slot_of: list[int], weights: Weights, tables: Tables) -> dict:
    """The fields of program_op in kernels.h."""
    if op.name not in _kernels.op_kinds:
        raise KernelError(f"no kernel for {op.name}")
    first = op.out or op.inputs[0]
    slots, indices = [-1] * 5, [-1] * 3
    slots[:len(op.inputs)] = (slot_of[buffer.id] for buffer in op.inputs)
    reading = WEIGHTS.get(op.name, ("vector",) * len(op.weights))
    indices[:len(op.weights)] = map(weights.index, op.weights, reading)
    row = {"kind": _kernels.op_kinds[op.name], "barrier": barrier,
           "outputs": first.rows == "outputs", "out": slot_of[op.out.id] if op.out else -1,
           "in": slots, "weights": indices, "group": op.inputs[0].width if op.inputs else 0,
           "width": op.inputs[0].width if op.name == "quantize" else first.width}
    for name, value in op.params.items():
        if name in STRUCTS:
            row["params"] = tables.index(value)
        else:
            row[FIELDS.get(name, name)] = _kernels.activations[value] if name == "fn" else value
    return row


def _table(rows: list[dict], fields: list) -> np.ndarray:
    table = np.zeros(len(rows), fields)
    for i, row in enumerate(rows):
        for name, value in row.items():
            try:
                table[name][i] = value
            except OverflowError:
                raise KernelError(f"{name} is {value}, more than the kernels can count") from None
    return table


def lowered_arrays(program: Program, limits: Limits) -> dict:
    """Keyword arguments of _kernels.Runner that follow from the program and the limits.

    Raises: KernelError for an operation without a kernel.
    """
    lowered = lower(program)
    slot_of, widths = plan_slots(lowered)
    rows_of = {slot_of[buffer.id]: buffer.rows for buffer in lowered.buffers}
    weights, tables = Weights(), Tables()
    waits = barriers(lowered.ops, slot_of)
    ops = [_op_row(op, wait, slot_of, weights, tables) for op, wait in zip(lowered.ops, waits)]
    return {
        "ops": _table(ops, _kernels.op_fields),
        "slots": [(-width % _kernels.row_floats + width, rows_of[slot] == "outputs")
                  for slot, width in enumerate(widths)],
        "result_slot": slot_of[lowered.result.id],
        "vectors": weights.vectors,
        "matrices": [tuple(matrix) for matrix in weights.matrices],
        **tables.arrays(),
        "kv": [(h.n_head_kv, h.key_length, h.value_length, h.reach > 0) for h in program.kv],
        "states": list(program.states),
        "n_vocab": program.n_vocab,
        "sizes": {
            "n_ids": program.n_ids, "window": program.window, "input_width": program.input_width,
            "n_axes": program.n_axes, "n_spans": program.n_spans, **asdict(limits)},
    }
