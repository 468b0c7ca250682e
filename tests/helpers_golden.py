"""Golden files: where they are, what is in them, and how an executor is run over their tokens."""
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tinychat.gguf_file import open_gguf
from tinychat.models import build_program
from tinychat.ops.batch import Batch

TESTS = Path(__file__).parent
FOLDERS = (TESTS / "golden", TESTS.parents[1] / "shared" / "golden")
ISA_LEVELS = ["scalar", "avx2", "avx512_vnni"]  # few machines have what comes after them
if find_spec("tinychat._kernels"):
    from tinychat._kernels import isa_levels
    ISA_LEVELS += [level for level in isa_levels() if level not in ISA_LEVELS]
EXECUTORS = ("reference", *(f"native {level}" for level in ISA_LEVELS))
QTYPES = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
          "IQ4_XS", "MXFP4"}
PAGES = np.array([[5, 2, 7, 0], [1, 6, 3, 4]], np.int32)  # of two sequences, in no order


@dataclass(frozen=True, eq=False)
class Golden:
    """tokens int32 (T,), logits float32 (T, V), greedy int32 (16,), margins in units of `std`."""

    path: Path
    tokens: np.ndarray
    logits: np.ndarray
    std: float
    greedy: np.ndarray
    margins: np.ndarray

    @property
    def is_quantised(self) -> bool:
        return self.path.stem.rpartition(".")[2] in QTYPES

    @property
    def has_experts(self) -> bool:
        with open_gguf(self.path) as file:
            return bool(file.metadata.get(f"{file.architecture}.expert_count"))

    def differences(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of logits (T, V): largest difference in units of std, and the cosine."""
        dots = (logits * self.logits).sum(axis=1, dtype=np.float64)
        norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(self.logits, axis=1)
        return np.abs(logits - self.logits).max(axis=1) / self.std, dots / norms

    def worst(self, logits: np.ndarray) -> tuple[float, float]:
        """(largest difference in units of std, smallest cosine of a row) of logits (T, V)."""
        differences, cosines = self.differences(logits)
        return float(differences.max()), float(cosines.min())


STRICT, FLOAT16, INT8 = (0.02, 0.9999, 0.05), (0.1, 0.999, 0.2), (0.3, 0.997, 0.5)
FLIPPED = 0.04  # share of the rows for which a router may choose another expert


def tolerance(golden: Golden, kind: str, kv_type: str = "f32") -> tuple[float, float, float]:
    """(largest difference, smallest cosine, margin of greedy tokens), see test_golden.py."""
    if kind != "reference" and golden.is_quantised:
        return INT8
    return STRICT if kv_type == "f32" else FLOAT16


def check(golden: Golden, logits: np.ndarray, limits: tuple) -> None:
    differences, cosines = golden.differences(logits)
    n_off = int(((differences > limits[0]) | (cosines < limits[1])).sum())
    n_flipped = FLIPPED * len(logits) if limits != STRICT and golden.has_experts else 0
    assert n_off <= n_flipped, (n_off, differences.max(), cosines.min())


def check_greedy(golden: Golden, executor, last: np.ndarray, margin: float) -> int:
    """Follow the most likely token until the expected lead is too small to count on; how many."""
    at = len(golden.tokens)
    for i, expected in enumerate(golden.greedy):
        if golden.margins[i] <= margin:
            return i
        assert int(last.argmax()) == expected, f"greedy token {i}"
        last = step(executor, (0, at + i, [expected]))[0]
    return len(golden.greedy)


def load_golden(name: str) -> Golden:
    """The golden model of that name; skips the test where this checkout does not have it."""
    for folder in FOLDERS:
        if (folder / f"{name}.gguf").is_file():
            break
    else:
        pytest.skip(f"{name} is neither in tests/golden nor in the developers' shared folder")
    with np.load(folder / f"{name}.npz") as data:
        std = float(data["logits"].std())
        return Golden(folder / f"{name}.gguf", data["tokens"], data["logits"], std, data["greedy"],
                      data["greedy_margin"] / std)


def open_golden(golden: Golden, kind: str, kv_type: str = "f32"):
    return open_model(golden.path, kind, kv_type)


def open_model(path: Path, kind: str, kv_type: str = "f32", max_sequences: int = 2,
               hidden: bool = False, **more):
    """An executor of a model's file: one of EXECUTORS; skips where this machine lacks it.
    hidden: its result is the hidden state."""
    limits = dict(n_pages=PAGES.size, max_tokens=128, max_outputs=128,
                  max_sequences=max_sequences, kv_type=kv_type, **more)
    with open_gguf(path) as file:
        program = build_program(file, hidden=hidden)
    if kind == "reference":
        from tinychat.ops.reference import ReferenceExecutor
        return ReferenceExecutor(program, **limits)
    if find_spec("tinychat._kernels") is None:
        pytest.skip("no compiled kernels")
    from tinychat.ops import native
    from helpers_neon import ISA as NEON, EmulatedExecutor
    isa = kind.removeprefix("native ")
    if isa == NEON and isa not in native.isa_levels():
        return EmulatedExecutor(program, **limits)
    if isa not in native.isa_levels():
        pytest.skip(f"this machine has no {isa}")
    return native.NativeExecutor(program, **limits, isa=isa, threads=2)


def step(executor, *parts: tuple[int, int, list[int]]) -> np.ndarray:
    """One step of parts (sequence, first position, tokens); the logits of all tokens, a copy."""
    tokens = np.concatenate([np.asarray(ids, np.int32) for _, _, ids in parts])
    positions = np.concatenate([np.arange(at, at + len(ids)) for _, at, ids in parts])
    sequences = np.concatenate([np.full(len(ids), s) for s, _, ids in parts])
    positions, sequences = positions.astype(np.int32), sequences.astype(np.int32)
    outputs = np.arange(len(tokens), dtype=np.int32)
    return executor.step(Batch(tokens, positions, sequences, PAGES, outputs)).copy()


def prefill(executor, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """Logits (T, V) of a prompt given in chunks."""
    return np.concatenate([step(executor, (0, at, tokens[at:at + chunk]))
                           for at in range(0, len(tokens), chunk)])
