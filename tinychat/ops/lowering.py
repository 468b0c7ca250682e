"""A recorded program -> the flat arrays that the native executor hands to tinychat._kernels.

Lowering adds what only the kernels need: rows quantised to int8 for the block formats, shared by
all products that read them; a table of sines and cosines per rope; and the barriers between
operations whose work is divided in different ways.
"""
import mmap
from dataclasses import replace

import numpy as np

from tinychat import _kernels
from tinychat.gguf_file import GGMLQuantizationType, QTensor
from tinychat.ops.meaning import dequantize
from tinychat.ops.program import Buffer, Op, Program, Rope, plan_slots

OP_DTYPE = np.dtype([*((name, "<i4") for name in _kernels.op_fields), ("scalar", "<f4")])


# Weights

class Weights:
    """The tensors of a program as the kernels take them, each once.

    matrices: [qtype, n_rows, n_cols, bytes, pack, is_mapped]; vectors: float32 arrays.
    """

    def __init__(self):
        self.matrices: list[list] = []
        self.vectors: list[np.ndarray] = []
        self._index: dict[tuple[str, int], int] = {}

    def vector(self, tensor: QTensor) -> int:
        return self._once("vector", tensor, self.vectors, lambda: np.require(
            dequantize(tensor).reshape(-1), np.float32, ["C", "A"]))

    def matrix(self, tensor: QTensor, *, pack: bool) -> int:
        i = self._once("matrix", tensor, self.matrices, lambda: _matrix(tensor))
        self.matrices[i][4] |= pack
        return i

    def _once(self, kind: str, tensor: QTensor, entries: list, make) -> int:
        key = kind, id(tensor)
        if key not in self._index:
            self._index[key] = len(entries)
            entries.append(make())
        return self._index[key]


def _matrix(tensor: QTensor) -> list:
    n_rows, n_cols = tensor.shape
    if _has_kernel(tensor):
        return [int(tensor.qtype), n_rows, n_cols, tensor.data, False, _is_mapped(tensor.data)]
    # The rare formats have no kernel: float16 holds their values to 11 bits
    with np.errstate(over="ignore"):  # beyond 65504: infinity, as float16 means it
        data = dequantize(tensor).astype(np.float16).reshape(-1).view(np.uint8)
    return [int(GGMLQuantizationType.F16), n_rows, n_cols, data, False, False]


def _has_kernel(tensor: QTensor) -> bool:
    return _kernels.activation_floats(int(tensor.qtype), *tensor.shape) is not None


def _activation_floats(weight: QTensor) -> int:
    """float32s that a quantised row takes for this product; 0: it reads plain float32."""
    return _kernels.activation_floats(int(weight.qtype), *weight.shape) or 0


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
        self._made: dict[tuple[str, int], Buffer] = {}

    def prepared(self, op: Op) -> Op:
        if op.name == "linear":
            (x,), weight = op.inputs, op.weights[0]
            width = _activation_floats(weight)
            if width == 0:
                return op
            return replace(op, inputs=(self._once("quantize", x.id, width, x.rows, (x,)),))
        if op.name == "rope":
            (x,), rope = op.inputs, op.params["rope"]
            width = 4 * len(rope.inv_freq)
            return replace(op, inputs=(x, self._once("rope_table", id(rope), width, x.rows, (),
                                                     rope=rope)))
        return op

    def _once(self, name: str, key: int, width: int, rows: str, inputs: tuple, **params) -> Buffer:
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
    if op.name in ("linear", "attend", "outputs"):
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

def _kernel_name(op: Op) -> str:
    return "swiglu" if op.name == "gate" and op.params["fn"] == "silu" else op.name


def _op_row(op: Op, barrier: bool, slot_of: list[int], weights: Weights, ropes: list[Rope]) -> dict:
    """The fields of program_op in kernels.h."""
    first = op.out or op.inputs[0]
    row = {"kind": _kernels.op_kinds[_kernel_name(op)], "barrier": barrier,
           "outputs": first.rows == "outputs", "out": slot_of[op.out.id] if op.out else -1,
           "a": -1, "b": -1, "weight": -1, "bias": -1, "width": first.width,
           "layer": op.params.get("layer", 0), "head_dim": op.params.get("head_dim", 0),
           "scalar": op.params.get("eps", op.params.get("scale", 0.0))}
    row.update(zip(("a", "b"), (slot_of[b.id] for b in op.inputs)))
    if op.name == "rmsnorm":
        row.update(weight=weights.vector(op.weights[0]), head_dim=op.weights[0].shape[0])
    elif op.name in ("embed", "linear"):
        row["weight"] = weights.matrix(op.weights[0], pack=op.name == "linear")
        row["bias"] = weights.vector(op.weights[1]) if len(op.weights) > 1 else -1
    elif op.name in ("rope", "rope_table"):
        row["layer"] = _rope_index(op.params["rope"], ropes)
    elif op.name == "attend":
        row.update(window=op.params["heads"].window, scalar=op.params["heads"].scale)
    if op.name == "quantize":
        row["width"] = op.inputs[0].width
    return row


def _rope_index(rope: Rope, ropes: list[Rope]) -> int:
    for i, known in enumerate(ropes):
        if known is rope:
            return i
    ropes.append(rope)
    return len(ropes) - 1


def _table(rows: list[dict]) -> np.ndarray:
    table = np.zeros(len(rows), OP_DTYPE)
    for i, row in enumerate(rows):
        for name, value in row.items():
            table[name][i] = value
    return table


def lowered_arrays(program: Program) -> dict:
    """Keyword arguments of _kernels.Runner that follow from the program alone."""
    lowered = lower(program)
    slot_of, widths = plan_slots(lowered)
    rows_of = {slot_of[buffer.id]: buffer.rows for buffer in lowered.buffers}
    weights, ropes = Weights(), []
    waits = barriers(lowered.ops, slot_of)
    ops = _table([_op_row(op, wait, slot_of, weights, ropes)
                  for op, wait in zip(lowered.ops, waits)])
    return {
        "ops": ops,
        "slots": [(-width % _kernels.row_floats + width, rows_of[slot] == "outputs")
                  for slot, width in enumerate(widths)],
        "logits_slot": slot_of[lowered.result.id],
        "vectors": weights.vectors,
        "matrices": [tuple(matrix) for matrix in weights.matrices],
        "ropes": [(rope.layout, np.require(rope.inv_freq, np.float32, ["C", "A"]), rope.magnitude)
                  for rope in ropes],
        "kv": [(h.n_head, h.n_head_kv, h.key_length, h.value_length) for h in lowered.kv],
        "n_ids": program.n_ids,
    }
