"""The native executor: a program is lowered once, and each step is one call into tinychat._kernels.

Importing this module fails where no kernels were built. NOTE: the worker threads do not survive a
fork; an executor belongs to the process that made it.
"""
import os
import threading
from pathlib import Path

import numpy as np

from tinychat import _kernels
from tinychat.errors import KernelError, ModelLoadError
from tinychat.ops.lowering import lowered_arrays
from tinychat.ops.batch import Batch, Limits
from tinychat.ops.program import PAGE_TOKENS, Program, check_kv_type

assert _kernels.page_tokens == PAGE_TOKENS, "the kernels were built for another size of page"

NO_IDS = np.empty(0, np.int64)


def isa_levels() -> list[str]:
    """Instruction sets that this machine has, slowest first."""
    return _kernels.isa_levels()


def choose_isa(isa: str | None) -> str:
    """The asked instruction set, that of TINYCHAT_ISA, or the best.

    Raises: KernelError when this machine does not have it.
    """
    levels = isa_levels()
    isa = isa or os.environ.get("TINYCHAT_ISA") or levels[-1]
    if isa not in levels:
        raise KernelError(f"expected an instruction set of this machine, {', '.join(levels)}, "
                          f"got {isa!r}")
    return isa


# Threads

def default_threads() -> int:
    """Processors that this process may use: its affinity, or its control group's quota if less."""
    try:
        n = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        n = os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(n, int(quota))) if quota else n


def _cgroup_quota(root: Path) -> float | None:
    """Processors' worth of time that the control group allows; None: no limit that can be read."""
    try:
        if (root / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000"
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):
        return None


def _aligned(n_rows: int, stride: int) -> np.ndarray:
    """Zeroed float32 (n_rows, stride) on a 64-byte boundary; its pages come when they are used."""
    memory = np.zeros(n_rows * stride + 16, np.float32)
    begin = -memory.ctypes.data % 64 // 4
    return memory[begin:begin + n_rows * stride].reshape(n_rows, stride)


def _check_size(arrays: dict, limits: Limits) -> None:
    """Raises MemoryError where the kernels' own arithmetic could overflow."""
    page_floats = PAGE_TOKENS * sum(n_head_kv * (n_key + n_value + _kernels.row_floats)
                                    for n_head_kv, n_key, n_value, _ in arrays["kv"])
    n_pages = max(limits.n_pages, limits.n_window_pages)
    row_floats = sum(stride for stride, _ in arrays["slots"])
    n_rows = max(limits.max_tokens, limits.max_outputs)
    state_floats = sum(arrays["states"])
    if 4 * max(n_pages * page_floats, n_rows * row_floats,
               limits.n_states * state_floats) >= 1 << 47:
        raise MemoryError("more than any machine has")


def _arrays_read(program: Program) -> list[str]:
    """The arrays of a batch that not every program reads, but this one."""
    return (["window_pages"] * bool(program.window) + ["states"] * bool(program.states)
            + ["inputs", "input_rows"] * bool(program.input_width)
            + ["axes"] * bool(program.n_axes) + ["spans"] * bool(program.n_spans))


# The executor

class NativeExecutor:
    """Runs a program on the CPU kernels. One step at a time; other Python threads go on meanwhile.

    All memory is taken here. A token's results are the same bit for bit, whatever else is in its
    step and however many threads there are. threads, isa: None for all processors, and for
    TINYCHAT_ISA or the best.
    Raises: KernelError for impossible limits, or an instruction set that this machine does not
    have; ModelLoadError when memory runs out.
    """

    def __init__(self, program: Program, *, kv_type: str = "f16", threads: int | None = None,
                 isa: str | None = None, **limits):
        check_kv_type(kv_type)
        self.program, self.limits = program, Limits(**limits).of(program)
        self.isa = choose_isa(isa)
        self.name = f"native {self.isa}"
        self.threads = default_threads() if threads is None else threads
        self._stepping, self._sampling = threading.Lock(), threading.Lock()
        self._reads = _arrays_read(program)
        self._runner = self._make_runner(kv_type)

    def _make_runner(self, kv_type: str):
        arrays = lowered_arrays(self.program, self.limits)
        stride = arrays["slots"][arrays["result_slot"]][0]
        try:
            _check_size(arrays, self.limits)
            self._result = _aligned(self.limits.max_outputs, stride)
            return _kernels.Runner(self.isa, self.threads, **arrays, result=self._result,
                                   kv_type=kv_type)
        except ValueError as error:
            raise KernelError(f"{self.program.name}: {error}") from None
        except (MemoryError, OverflowError) as error:
            raise ModelLoadError(f"{self.program.name}: no memory for the weights, "
                                 f"{self.limits.n_pages} KV pages and steps of "
                                 f"{self.limits.max_tokens} tokens: {error}") from None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed matrices."""
        return self._runner.weight_bytes

    @property
    def kv_bytes(self) -> int:
        return self._runner.kv_bytes

    @property
    def state_bytes(self) -> int:
        return self._runner.state_bytes

    def step(self, batch: Batch) -> np.ndarray:
        """The program's result float32 (n_outputs, width), a view, valid until the next step.

        Raises: KernelError for a batch that this executor cannot run, or while a step runs.
        """
        if not self._stepping.acquire(blocking=False):
            raise KernelError("a step is already running on this executor")
        try:
            self._run(batch)
        finally:
            self._stepping.release()
        return self._result[:len(batch.outputs), :self.program.n_vocab]

    def _run(self, batch: Batch) -> None:
        try:
            accepted = self._runner.step(batch.tokens, batch.positions, batch.sequences,
                                         batch.pages, batch.outputs, **self._read_besides(batch))
            reason = "this executor is closed"
        except (TypeError, ValueError) as error:
            accepted, reason = False, str(error)
        if not accepted:
            batch.whole(self.program).check(self.program, self.limits)
            raise KernelError(f"the kernels refused the batch: {reason}")

    def _read_besides(self, batch: Batch) -> dict:
        """The arrays that this program reads beside those of every batch, whole.

        NOTE: making a Batch whole costs as much as a step of a tiny model, so it is only done
        where something is missing; for window_pages the Runner knows what to take.
        """
        if any(getattr(batch, name) is None for name in self._reads if name != "window_pages"):
            batch = batch.whole(self.program)
        return {name: getattr(batch, name) for name in self._reads}

    def copy_state(self, source: int, target: int) -> None:
        """What recurrent state place `source` holds, to `target`; waits for a step that runs."""
        with self._stepping:
            try:
                self._runner.copy_state(source, target)
            except ValueError as error:
                raise KernelError(str(error)) from None

    def sample(self, logits_row: np.ndarray, params, recent_ids, coin: float) -> int:
        """A token id, as tinychat.ops.sampling.sample means it.

        Raises: KernelError when no logit is finite.
        """
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
        """Ends the threads and frees the memory, after the step that runs; twice is once."""
        with self._stepping, self._sampling:
            self._runner.close()
