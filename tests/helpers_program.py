"""Weights, batches and arrays of numbers, for tests of programs and executors."""
import numpy as np

from tinychat.gguf_file import GGMLQuantizationType, QTensor
from tinychat.ops.batch import Batch
from tinychat.ops.program import Heads, Program, Rope
from tinychat.ops.recorder import Recorder


def weight(name: str, values) -> QTensor:
    """A float32 tensor of these values."""
    values = np.ascontiguousarray(values, np.float32)
    return QTensor(name, GGMLQuantizationType.F32, values.shape, values.reshape(-1).view(np.uint8))


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32."""
    return rng.normal(size=shape).astype(np.float32)


def close(got: np.ndarray, expected, tolerance: float = 2e-6) -> None:
    """Asserts that float32 `got` is `expected`, to a part of each value and of the largest."""
    assert got.dtype == np.float32
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=atol)


def batch(tokens, positions=None, sequences=None, pages=((0, 1),), outputs=None) -> Batch:
    """By default one sequence from position 0, with the logits of its last token."""
    n = len(tokens)
    fields = (tokens, range(n) if positions is None else positions,
              [0] * n if sequences is None else sequences, pages,
              [n - 1] if outputs is None else outputs)
    return Batch(*(np.array(field, np.int32) for field in fields))


def tiny_program(seed: int = 0, n_vocab: int = 11, window: int = 0) -> Program:
    """One layer of width 8 with 2 query heads over 1 KV head: what a dense model is made of."""
    rng = np.random.default_rng(seed)

    def matrix(name, *shape):
        return weight(name, rng.normal(size=shape) / 3)

    g, heads = Recorder(), Heads(2, 1, 4, 6, 0.5, window)
    rope = Rope("halves", np.array([1.0, 0.1], np.float32))
    x = g.embed(matrix("token_embd", n_vocab, 8))
    h = g.rmsnorm(x, matrix("norm", 8), 1e-5)
    q = g.rope(g.linear(h, matrix("q", 8, 8), matrix("q.bias", 8)), 4, rope)
    k = g.rope(g.linear(h, matrix("k", 4, 8)), 4, rope)
    v = g.linear(h, matrix("v", 6, 8))
    x = g.add(x, g.linear(g.attend(q, k, v, heads), matrix("o", 8, 12)), 0.5)
    up = g.gate("silu", g.linear(x, matrix("gate", 16, 8)), g.linear(x, matrix("up", 16, 8)))
    x = g.outputs(g.add(x, g.linear(up, matrix("down", 8, 16))))
    return g.finish("tiny", g.scale(g.linear(x, matrix("output", n_vocab, 8)), 2.0))
