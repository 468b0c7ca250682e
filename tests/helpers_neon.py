"""The kernels for AArch64 on this machine: cross-compiled, run by qemu, called through a pipe.

tests/neon_driver.c is the other end. Tests that ask for ISA get these kernels where the processor
is another; without the tools that the README names they are skipped.
"""
import atexit
import os
import select
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tinychat import _kernels
from tinychat.ops.lowering import lowered_arrays
from tinychat.ops.native import NativeExecutor

ISA = "neon_dotprod"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
KERNELS = Path(__file__).parents[1] / "kernels"
DRIVER = Path(__file__).with_name("neon_driver.c")
# As in setup.py, and warnings are errors
FLAGS = ["-O3", "-std=gnu11", "-pthread", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}"]
COMPILE_SECONDS, ANSWER_SECONDS = 300, 120
SIZES = ("n_ids", "window", "input_width", "n_axes", "n_spans", "n_pages", "n_window_pages",
         "n_states", "max_tokens", "max_outputs", "max_sequences")


# The driver

def build_driver(folder: Path) -> Path:
    """The driver as one static program of AArch64."""
    sources = sorted(path for path in KERNELS.glob("*.c") if path.name != "_kernels.c")
    objects = [folder / f"{source.stem}.o" for source in [*sources, DRIVER]]
    waiting = list(zip([*sources, DRIVER], objects))
    running = []
    deadline = time.monotonic() + COMPILE_SECONDS
    while waiting or running:  # as many at a time as there are processors
        while waiting and len(running) < (os.cpu_count() or 1):
            source, out = waiting.pop()
            running.append(subprocess.Popen([COMPILER, *FLAGS, "-c", source, "-o", out],
                                            stderr=subprocess.PIPE, text=True))
        first = running.pop(0)
        _, errors = first.communicate(timeout=max(deadline - time.monotonic(), 1))
        assert first.returncode == 0, errors
    program = folder / "neon_driver"
    subprocess.run([COMPILER, "-static", "-pthread", *objects, "-lm", "-o", program], check=True,
                   timeout=COMPILE_SECONDS)
    return program


class Driver:
    """A running driver; ask() sends one request and returns the arrays of its answer as bytes."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="tinychat-neon-")
        program = build_driver(Path(self.folder.name))
        command = [EMULATOR, "-cpu", "cortex-a76", program]  # that of a Raspberry Pi 5
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        bufsize=0)
        self.dead_handles = []  # of executors that were collected, maybe in the midst of a request
        atexit.register(self.close)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def ask(self, command: str, *arrays) -> list[bytes]:
        while self.dead_handles:
            self._exchange("free", np.int64([self.dead_handles.pop()]))
        return self._exchange(command, *arrays)

    def _exchange(self, command: str, *arrays) -> list[bytes]:
        message = [np.int64(len(arrays) + 1).tobytes()]
        for array in (command, *arrays):
            data = array.encode() + b"\0" if isinstance(array, str) else array.tobytes()
            message += [np.int64(len(data)).tobytes(), data]
        rest = memoryview(b"".join(message))
        while rest:
            rest = rest[self.process.stdin.write(rest):]
        return [self._read(self._read_int()) for _ in range(self._read_int())]

    def _read_int(self) -> int:
        return int.from_bytes(self._read(8), "little")

    def _read(self, n: int) -> bytes:
        parts = []
        while n:
            ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_SECONDS)
            part = self.process.stdout.read(n) if ready else b""
            assert part, "the driver said no more"
            parts.append(part)
            n -= len(part)
        return b"".join(parts)


@cache
def _driver() -> Driver | AssertionError:
    try:
        return Driver()
    except AssertionError as error:  # said by every test, but built once
        return error


def driver() -> Driver:
    """The one of this test run; skips where a tool is missing."""
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    made = _driver()
    if isinstance(made, AssertionError):
        raise made
    return made


# What _kernels offers

def linear(qtype: int, raw, n_rows: int, n_cols: int, x, bias=None, tiles=None, isa: str = ISA):
    """As _kernels.linear; also the quantized activations, bytes."""
    begin, end = tiles or (0, -(-n_rows // 16))
    sizes = np.int64([qtype, n_rows, n_cols, len(x), begin, end])
    out, act = driver().ask("linear", isa, sizes, raw, x, np.float32([]) if bias is None else bias)
    out = np.frombuffer(out, np.float32).reshape(len(x), n_rows)
    return out[:, begin * 16:end * 16], act


class EmulatedRunner:
    """As _kernels.Runner."""

    def __init__(self, isa: str, threads: int, *, ops, attentions, routings, mamba2s, delta_nets,
                 slots, result, result_slot, vectors, matrices, ropes, kv, kv_type, states,
                 n_vocab, sizes):
        self.handle = 0  # until it is built: close looks at it
        self.isa, self.result, self.driver = isa, result, driver()
        numbers = [sizes[name] for name in SIZES]
        numbers += [_kernels.kv_types[kv_type], result_slot, threads]
        numbers += [len(vectors), len(matrices), len(ropes)]
        weights = list(vectors)
        for *shape, source, pack, _ in matrices:
            weights += [np.int64([*shape, pack]), source]
        for layout, inv_freq, magnitude, axes in ropes:
            weights += [np.float64([_kernels.rope_layouts[layout], magnitude]), inv_freq,
                        np.int32([] if axes is None else axes)]
        made, = self.driver.ask(
            "build", isa, np.int64(numbers), ops, attentions, routings, mamba2s, delta_nets,
            np.int64(slots), np.int32(kv), np.int64(states), *weights)
        self.handle, self.weight_bytes, self.kv_bytes, self.state_bytes = np.frombuffer(
            made, np.int64).tolist()

    def step(self, tokens, positions, sequences, pages, outputs, window_pages=None, states=None,
             inputs=None, input_rows=None, axes=None, spans=None) -> bool:
        arrays = [tokens, positions, sequences, pages, outputs,
                  pages if window_pages is None else window_pages, states, inputs, input_rows,
                  axes, spans]
        answer = self.driver.ask(
            "step", np.int64([self.handle, self.result.shape[1], pages.shape[1]]),
            *(np.int32([]) if array is None else np.ascontiguousarray(array) for array in arrays))
        if len(answer) == 2:
            rows = np.frombuffer(answer[1], np.float32).reshape(-1, self.result.shape[1])
            self.result[:len(rows)] = rows
        return len(answer) == 2

    def copy_state(self, source: int, target: int) -> None:
        self.driver.ask("copy", np.int64([self.handle, source, target]))

    def sample(self, logits, recent, coin, *, temperature, top_p, top_k, min_p,
               repeat_penalty) -> int:
        numbers = np.float64([coin, temperature, top_p, min_p, repeat_penalty, top_k])
        answer, = self.driver.ask("sample", self.isa, numbers, logits, recent)
        return int.from_bytes(answer, "little", signed=True)

    def close(self) -> None:
        if self.handle:
            self.driver.dead_handles.append(self.handle)
        self.handle = 0

    __del__ = close


class EmulatedExecutor(NativeExecutor):
    """The native executor on AArch64; isa: ISA, or "scalar", the portable C there."""

    def __init__(self, program, *, isa: str = ISA, **more):
        self.emulated = isa
        super().__init__(program, **more)

    def _make_runner(self, kv_type: str):
        arrays = lowered_arrays(self.program, self.limits)
        stride = arrays["slots"][arrays["result_slot"]][0]
        self.isa, self.name = self.emulated, f"emulated {self.emulated}"
        self._result = np.zeros((self.limits.max_outputs, stride), np.float32)
        return EmulatedRunner(self.isa, self.threads, **arrays, result=self._result,
                              kv_type=kv_type)
