"""Formats that no product reads: what they become at load, against gguf's own dequantisation."""
import gguf
import numpy as np
import pytest

pytest.importorskip("tinychat._kernels", reason="no compiled kernels", exc_type=ImportError)

from helpers_native import U, all_outputs, both, executor_of, normal  # noqa: E402
from helpers_program import batch, weight  # noqa: E402
from tinychat import _kernels  # noqa: E402
from tinychat.gguf_file import GGMLQuantizationType as Type, QTensor  # noqa: E402
from tinychat.ops import lowering  # noqa: E402
from tinychat.ops.recorder import Recorder  # noqa: E402

# Where the float16 of a block lies, or for IQ1_M the four bytes whose high nibbles it is
SCALE_AT = {Type.IQ2_XXS: 0, Type.IQ2_XS: 0, Type.IQ2_S: 0, Type.IQ3_XXS: 0, Type.IQ3_S: 0,
            Type.IQ1_S: 0, Type.IQ1_M: None, Type.TQ1_0: 52, Type.TQ2_0: 64}
TWO_SCALES = (Type.IQ2_XS, Type.IQ2_S, Type.IQ1_M)  # in 32 weights
rare = pytest.mark.parametrize("qtype", SCALE_AT, ids=lambda qtype: qtype.name)


def random_blocks(qtype: Type, n: int, scales, seed: int = 0) -> np.ndarray:
    """uint8 (n, bytes) of every index, sign and sub-scale, with these scales in turn."""
    n_bytes = gguf.GGML_QUANT_SIZES[qtype][1]
    blocks = np.random.default_rng(seed).integers(0, 256, (n, n_bytes), dtype=np.uint8)
    scale = np.resize(np.float16(scales), n).view(np.uint16)
    if SCALE_AT[qtype] is None:
        for i in range(4):
            high = blocks[:, 49 + 2 * i]
            blocks[:, 49 + 2 * i] = high & 15 | (scale >> 4 * i & 15).astype(np.uint8) << 4
    else:
        at = SCALE_AT[qtype]
        blocks[:, at:at + 2] = scale[:, None].view(np.uint8)
    return blocks


def tensor_of(qtype: Type, blocks: np.ndarray, *shape: int) -> QTensor:
    return QTensor("w", qtype, shape, blocks.reshape(-1))


@rare
def test_they_become_q8_0_with_the_same_codes_where_there_is_one_scale(qtype):
    blocks = random_blocks(qtype, 500, [0.01, -0.3, 5, 0.004, 0])
    exact = gguf.quants.dequantize(blocks, qtype).reshape(-1, 32)
    matrix = lowering._matrix(tensor_of(qtype, blocks, 500, 256))
    assert matrix[:4] == [int(Type.Q8_0), 1, 500, 256]
    got = gguf.quants.dequantize(matrix[4].reshape(-1, 34), Type.Q8_0).reshape(-1, 32)
    # a scale is rounded to float16, to 2^-25 where it is tiny, and a code is at most 62
    off = 2.0 ** -11 * np.abs(exact) + 62 * 2.0 ** -25
    if qtype in TWO_SCALES:
        off += np.abs(exact).max(axis=1, keepdims=True) / 253
    assert (np.abs(got - exact) <= off).all()
    if qtype in (Type.TQ1_0, Type.TQ2_0):
        np.testing.assert_array_equal(got, exact)


@rare
def test_scales_that_are_not_finite_do_no_harm(qtype):
    blocks = random_blocks(qtype, 12, [np.nan, np.inf, -np.inf, 65504, 6e-8, 1])
    data = lowering._matrix(tensor_of(qtype, blocks, 12, 256))[4]
    with np.errstate(all="ignore"):
        got = gguf.quants.dequantize(data.reshape(-1, 34), Type.Q8_0).reshape(12, 256)
    assert not np.isfinite(got[::6]).any() and np.isfinite(got[4:6]).all()


@rare
def test_products_lookups_and_tied_weights_agree(qtype):
    rng = np.random.default_rng(1)
    w = tensor_of(qtype, random_blocks(qtype, 20, [0.01]), 20, 256)
    values = gguf.quants.dequantize(w.data.reshape(20, -1), qtype)
    rows = normal(rng, 20, 256)
    got, expected = both(lambda g: g.linear(g.add(g.embed(weight("x", rows)), g.embed(w)), w),
                         None, all_outputs(20))
    rows = rows + values
    # activations are rounded to 1/254 of the largest of 32, weights at worst too
    step = np.abs(rows).reshape(20, 8, 32).max(axis=2, keepdims=True) / 253
    step = np.repeat(step, 32, 2).reshape(20, 256)
    off = step @ np.abs(values).T + np.abs(rows) @ np.abs(values).T / 100
    assert (np.abs(got - expected) <= off).all()
    assert np.abs(got - expected).mean() <= 0.01 * np.abs(expected).mean()


def test_experts_are_converted_too():
    blocks = random_blocks(Type.IQ2_XXS, 3 * 5, [0.01])
    matrix = lowering._matrix(tensor_of(Type.IQ2_XXS, blocks, 3, 5, 256))
    assert matrix[:4] == [int(Type.Q8_0), 3, 5, 256] and matrix[4].size == 3 * 5 * 8 * 34


def test_a_foreign_format_is_made_float16_a_slice_at_a_time(monkeypatch):
    """Of what gguf can read, nothing is left for this way; it is there for what comes."""
    monkeypatch.setattr(lowering, "SLICE_WEIGHTS", 256 * 7)
    blocks = random_blocks(Type.IQ3_S, 20, [0.01])
    got = lowering._as_float16(tensor_of(Type.IQ3_S, blocks, 20, 256)).view(np.float16)
    np.testing.assert_array_equal(
        got.reshape(20, 256), gguf.quants.dequantize(blocks, Type.IQ3_S).astype(np.float16))


def test_wrong_sizes_are_refused():
    blocks = random_blocks(Type.IQ2_XXS, 2, [1]).reshape(-1)
    grid = lowering._grid(Type.IQ2_XXS)
    for raw, values in ((blocks[:-1], grid), (blocks, grid[:-1]), (blocks, grid[:0])):
        with pytest.raises(ValueError, match="expected blocks of 66 bytes and a grid of 2048"):
            _kernels.rare_to_q8_0_blocks(int(Type.IQ2_XXS), values, raw)
    with pytest.raises(ValueError):
        _kernels.rare_to_q8_0_blocks(int(Type.F32), grid, blocks)


def test_the_same_bits_alone_and_in_a_crowd():
    w = tensor_of(Type.IQ2_S, random_blocks(Type.IQ2_S, 30, [0.01]), 30, 256)
    g = Recorder()
    executor = executor_of(g.finish("rare", g.linear(g.outputs(g.embed(w)), w)), max_outputs=30)
    whole = executor.step(all_outputs(30)).copy()
    alone = np.concatenate([executor.step(batch([t])).copy() for t in range(30)])
    np.testing.assert_array_equal(whole, alone)
    assert whole.std() > 100 * U
