"""The native executor: a program is lowered once to flat arrays, and each step is one call into tinychat._kernels.

Lowering adds what only the kernels need: rows quantised to int8 for the block formats, shared by all
products that read them; a table of sines and cosines per rope; and the barriers between operations
whose work is divided in different ways. Importing this module fails where no kernels were built.

NOTE: the worker threads do not survive a fork; an executor belongs to the process that made it.
"""
import mmap
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinychat import _kernels
from tinychat.errors import KernelError, ModelLoadError
from tinychat.gguf_file import GGMLQuantizationType, QTensor
from tinychat.ops.program import PAGE_TOKENS, Batch, Buffer, Heads, Op, Program, Rope, plan_slots
from tinychat.ops.reference import dequantize

assert _kernels.page_tokens == PAGE_TOKENS, "the kernels were built for another size of page"

OP_DTYPE = np.dtype([*((name, "<i4") for name in _kernels.op_fields), ("scalar", "<f4")])
NO_IDS = np.empty(0, np.int64)


def isa_levels() -> list[str]:
    """Instruction sets that this machine has, slowest first."""
    return _kernels.isa_levels()


def choose_isa(isa: str | None) -> str:
    """The asked instruction set, that of TINYCHAT_ISA, or the best. Raises: KernelError when it is not there."""
    levels = isa_levels()
    isa = isa or os.environ.get("TINYCHAT_ISA") or levels[-1]
    if isa not in levels:
        raise KernelError(f"expected an instruction set of this machine, {', '.join(levels)}, got {isa!r}")
    return isa


# Threads

def default_threads() -> int:
    """Processors that this process may use: its affinity, or its control group's quota where that is less."""
    try:
        n = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        n = os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(n, int(quota))) if quota else n


def _cgroup_quota(root: Path) -> float | None:
    """Processors' worth of time that the control group allows; None: no limit, or none that can be read."""
    try:
        if (root / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000"
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):
        return None


# Lowering

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
    data = dequantize(tensor).astype(np.float16).reshape(-1).view(np.uint8)
    return [int(GGMLQuantizationType.F16), n_rows, n_cols, data, False, False]


def _has_kernel(tensor: QTensor) -> bool:
    try:
        _kernels.activation_floats(int(tensor.qtype), *tensor.shape)
    except ValueError:
        return False
    return True


def _is_mapped(data: np.ndarray) -> bool:
    """Whether these bytes are a file's: then their pages can be given back once they are packed."""
    base = data
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return isinstance(base, mmap.mmap)


def lower(program: Program) -> Program:
    """The same program with the operations `quantize` (x -> int8 row) and `rope_table` (-> cosines, sines) written out."""
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
            width = _kernels.activation_floats(int(weight.qtype), *weight.shape) if _has_kernel(weight) else 0
            return replace(op, inputs=(self._once("quantize", x.id, width, x.rows, (x,)),)) if width else op
        if op.name == "rope":
            (x,), rope = op.inputs, op.params["rope"]
            table = self._once("rope_table", id(rope), 4 * len(rope.inv_freq), x.rows, (), rope=rope)
            return replace(op, inputs=(x, table))
        return op

    def _once(self, name: str, key: int, width: int, rows: str, inputs: tuple, **params) -> Buffer:
        """The buffer of this operation, recorded where it is first needed. A buffer is written once, so it stays true."""
        if (name, key) not in self._made:
            out = Buffer(len(self.buffers), width, f"b{len(self.buffers)}", rows)
            self.buffers.append(out)
            self.ops.append(Op(name, out, inputs, (), params))
            self._made[name, key] = out
        return self._made[name, key]


def barriers(ops: list[Op], slot_of: list[int]) -> list[bool]:
    """Which operations must wait until all threads have finished those before.

    Operations that give each thread the same rows pass them on without waiting. All others may not touch memory that
    an operation since the last barrier writes, nor write what one reads.
    """
    since: dict[object, list[tuple[str | None, bool]]] = {}  # place: (division, was written) of each access
    out = []
    for op in ops:
        division = _division(op)
        accesses = list(_accesses(op, slot_of))
        wait = any((written or earlier_written) and not (division and division == earlier)
                   for place, written in accesses for earlier, earlier_written in since.get(place, ()))
        if wait:
            since.clear()
        for place, written in accesses:
            since.setdefault(place, []).append((division, written))
        out.append(wait)
    return out


def _division(op: Op) -> str | None:
    """"tokens" or "outputs" when each thread takes its range of these rows; None: divided in another way."""
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


def _op_row(op: Op, barrier: bool, slot_of: list[int], weights: Weights, ropes: list[Rope]) -> dict:
    """The fields of program_op in kernels.h."""
    first = op.out or op.inputs[0]
    row = {"kind": _kernels.op_kinds[op.name], "barrier": barrier, "outputs": first.rows == "outputs",
           "out": slot_of[op.out.id] if op.out else -1, "a": -1, "b": -1, "weight": -1, "bias": -1,
           "width": first.width, "layer": op.params.get("layer", 0), "head_dim": op.params.get("head_dim", 0),
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


def _aligned(n_rows: int, stride: int) -> np.ndarray:
    """Zeroed float32 (n_rows, stride) on a 64-byte boundary; the operating system gives the pages when they are used."""
    memory = np.zeros(n_rows * stride + 16, np.float32)
    begin = -memory.ctypes.data % 64 // 4
    return memory[begin:begin + n_rows * stride].reshape(n_rows, stride)


def _check_size(kv: tuple[Heads, ...], n_pages: int, slots: list[tuple[int, bool]], n_rows: int) -> None:
    """Raises MemoryError where the kernels' own arithmetic could overflow."""
    page = sum(h.n_head_kv * (h.key_length + h.value_length + _kernels.row_floats) for h in kv) * PAGE_TOKENS
    if 4 * max(n_pages * page, n_rows * sum(stride for stride, _ in slots)) >= 1 << 47:
        raise MemoryError("more than any machine has")


# The executor

class NativeExecutor:
    """Runs a program on the CPU kernels. One step at a time; other Python threads go on meanwhile.

    All memory is taken here. A token's results are the same bit for bit, whatever else is in its step and
    however many threads there are. threads, isa: None for all processors, and for TINYCHAT_ISA or the best.
    Raises: KernelError for limits or an instruction set that this machine does not have, and when memory runs out.
    """

    def __init__(self, program: Program, *, n_pages: int, max_tokens: int = 512, max_outputs: int = 64,
                 max_sequences: int = 64, kv_type: str = "f16", threads: int | None = None,
                 isa: str | None = None):
        if kv_type not in ("f16", "f32"):
            raise KernelError(f"expected kv_type f16 or f32, got {kv_type!r}")
        self.program, self.n_pages = program, n_pages
        self.max_tokens, self.max_outputs, self.max_sequences = max_tokens, max_outputs, max_sequences
        self.isa = choose_isa(isa)
        self.name = f"native {self.isa}"
        self.threads = default_threads() if threads is None else threads
        self._stepping, self._sampling = threading.Lock(), threading.Lock()
        self._runner = self._make_runner(kv_type)

    def _make_runner(self, kv_type: str):
        lowered = lower(self.program)
        slot_of, widths = plan_slots(lowered)
        weights, ropes = Weights(), []
        waits = barriers(lowered.ops, slot_of)
        ops = _table([_op_row(op, wait, slot_of, weights, ropes) for op, wait in zip(lowered.ops, waits)])
        rows_of = {slot_of[b.id]: b.rows for b in lowered.buffers}
        slots = [(-width % _kernels.row_floats + width, rows_of[i] == "outputs") for i, width in enumerate(widths)]
        logits_slot = slot_of[lowered.logits.id]
        n_ids = min([w.shape[0] for op in lowered.ops if op.name == "embed" for w in op.weights],
                    default=self.program.n_vocab)
        try:
            _check_size(lowered.kv, self.n_pages, slots, max(self.max_tokens, self.max_outputs))
            self._logits = _aligned(max(self.max_outputs, 1), slots[logits_slot][0])
            return _kernels.Runner(
                self.isa, self.threads, ops=ops, slots=slots, logits=self._logits, logits_slot=logits_slot,
                vectors=weights.vectors, matrices=[tuple(m) for m in weights.matrices],
                ropes=[(r.layout, np.require(r.inv_freq, np.float32, ["C", "A"]), r.magnitude) for r in ropes],
                kv=[(h.n_head, h.n_head_kv, h.key_length, h.value_length) for h in lowered.kv],
                kv_is_f16=kv_type == "f16", n_vocab=self.program.n_vocab, n_ids=min(n_ids, self.program.n_vocab),
                n_pages=self.n_pages, max_tokens=self.max_tokens, max_outputs=self.max_outputs,
                max_sequences=self.max_sequences)
        except ValueError as error:
            raise KernelError(f"{self.program.name}: {error}") from None
        except (MemoryError, OverflowError) as error:
            raise ModelLoadError(f"{self.program.name}: no memory for the weights, {self.n_pages} KV pages and steps of "
                                 f"{self.max_tokens} tokens: {error}") from None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed matrices."""
        return self._runner.weight_bytes

    @property
    def kv_bytes(self) -> int:
        return self._runner.kv_bytes

    def step(self, batch: Batch) -> np.ndarray:
        """Logits float32 (n_outputs, n_vocab), a view that is valid until the next step.

        Raises: KernelError for a batch that this executor cannot run, or while another thread runs a step.
        """
        if not self._stepping.acquire(blocking=False):
            raise KernelError("a step is already running on this executor")
        try:
            self._run(batch)
        finally:
            self._stepping.release()
        return self._logits[:len(batch.outputs), :self.program.n_vocab]

    def _run(self, batch: Batch) -> None:
        try:
            accepted = self._runner.step(batch.tokens, batch.positions, batch.sequences, batch.pages, batch.outputs)
            reason = "this executor is closed"
        except (TypeError, ValueError) as error:
            accepted, reason = False, str(error)
        if not accepted:
            batch.check(n_vocab=self.program.n_vocab, n_pages=self.n_pages, max_tokens=self.max_tokens,
                        max_outputs=self.max_outputs, max_sequences=self.max_sequences)
            raise KernelError(f"the kernels refused the batch: {reason}")

    def sample(self, logits_row: np.ndarray, params, recent_ids, coin: float) -> int:
        """A token id, as tinychat.ops.sampling.sample means it. Raises: KernelError when no logit is finite."""
        penalized = params.repeat_penalty != 1 and params.repeat_last_n > 0 and len(recent_ids) > 0
        recent = np.asarray(recent_ids[-params.repeat_last_n:], np.int64) if penalized else NO_IDS
        with self._sampling:
            try:
                token = self._runner.sample(
                    logits_row, recent, coin, temperature=params.temperature, top_p=params.top_p,
                    top_k=params.top_k, min_p=params.min_p, repeat_penalty=params.repeat_penalty)
            except ValueError as error:
                raise KernelError(str(error)) from None
        if token < 0:
            raise KernelError(f"expected finite logits, got none among {len(logits_row)}")
        return token

    def close(self) -> None:
        """Ends the threads and frees the memory, after the step that runs. A second time does nothing."""
        with self._stepping, self._sampling:
            self._runner.close()
