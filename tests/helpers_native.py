"""The native executor beside the reference, for tests of its operations.

Tolerances count roundings: u = 2**-24 is half a unit in the last place, and a sum of n products is
off by at most n * u times the sum of their magnitudes, in whatever order it is taken.
"""
from dataclasses import replace

import numpy as np
import pytest

from helpers_neon import ISA as NEON, EmulatedExecutor
from helpers_program import batch
from tinychat.ops import native
from tinychat.ops.batch import Batch
from tinychat.ops.native import NativeExecutor
from tinychat.ops.recorder import Recorder
from tinychat.ops.reference import ReferenceExecutor

U = 2.0 ** -24
ISA_LEVELS = ["scalar", "avx2", "avx512_vnni"]  # few machines have what comes after them
ISA_LEVELS += [level for level in native.isa_levels() if level not in ISA_LEVELS]
PAGES = [[5, 2, 7], [1, 6, 3]]
every_level = pytest.mark.parametrize("isa", ISA_LEVELS)


def executor_of(program, isa=None, **limits) -> NativeExecutor:
    limits = {"n_pages": 8, "threads": 2, "kv_type": "f32", **limits}
    if isa == NEON and isa not in native.isa_levels():
        return EmulatedExecutor(program, **limits)
    if isa is not None and isa not in native.isa_levels():
        pytest.skip(f"this machine has no {isa}")
    return NativeExecutor(program, isa=isa, **limits)


def normal(rng, *shape, scale=1.0):
    return (scale * rng.normal(size=shape)).astype(np.float32)


def both(build, isa, step: Batch, keeps_kv: bool = True, **limits):
    """What kernels and reference make of one step; build(recorder) -> the last buffer."""
    g = Recorder(keeps_kv=keeps_kv)
    program = g.finish("test", g.outputs(build(g)))
    limits = {"n_pages": 8, "kv_type": "f32", "max_outputs": max(len(step.outputs), 1), **limits}
    with_kernels = executor_of(program, isa, **limits)
    got = with_kernels.step(step).copy()
    with_kernels.close()
    return got, ReferenceExecutor(program, **limits).step(step)


def all_outputs(n: int, **fields) -> Batch:
    """Tokens 0..n-1, so that an embedding gives its rows in order."""
    return batch(range(n), outputs=range(n), **fields)


def prefill(executor, tokens, chunk: int, **arrays) -> np.ndarray:
    """The results of one sequence's tokens, `chunk` of them in a step; arrays: Batch's own, whose
    rows are the tokens'."""
    parts = []
    for at in range(0, len(tokens), chunk):
        some = slice(at, min(at + chunk, len(tokens)))
        step = batch(tokens[some], range(some.start, some.stop), pages=PAGES,
                     outputs=range(some.stop - some.start))
        step = replace(step, **{name: array[some] for name, array in arrays.items()})
        parts.append(executor.step(step).copy())
    return np.concatenate(parts)
