"""Matrix products with block-quantized weights, on every SIMD level, against NumPy and `gguf`.

The twin of a product is float64: `gguf.quants.dequantize(weights)` times activations rounded to
int8 as the kernels round them. The distance allowed between the two follows from the arithmetic,
with eps = 2^-24 and S the sum of |x| * (|scale * code| + |min|) over a row, the two kept apart
because they cancel in a weight:

- inside a block of 32 columns the sums are exact integers; turning one into a float32 costs eps,
  the product of the two scales another, a min's product with the activations' sum two;
- each block is added by one fma, with a min by two: eps of the partial sum each, and no partial
  sum exceeds S;
- the oracle's own float32 weights have been rounded at most three times.

Together (2 * blocks + 7) * eps * S; a bias is one more addition. The float formats add K products
by fma: K * eps * S.
"""
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

_kernels = pytest.importorskip("tinychat._kernels", reason="the native kernels are not built")

EPS = 2.0 ** -24
LEVELS = _kernels.isa_levels()
FLOATS = ["F32", "F16", "BF16"]
BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
          "IQ4_NL", "IQ4_XS", "MXFP4"]
SCALE_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}  # byte of the float16 d; 0 for the others
MIN_AT = {"Q4_1": 2, "Q5_1": 2, "Q2_K": 82, "Q4_K": 2, "Q5_K": 2}  # byte of the float16 m or dmin
SHAPES = [(1, 1), (2, 15), (3, 16), (4, 17), (5, 37), (6, 1), (7, 48), (8, 64), (9, 33), (15, 16),
          (16, 20), (33, 37), (31, 18), (47, 5)]  # tokens, rows


def n_cols_of(name: str, wanted: int) -> int:
    """`wanted` rounded up to whole blocks of the format."""
    block = GGML_QUANT_SIZES[GGMLQuantizationType[name]][0]
    return -(-wanted // block) * block


def random_weights(name: str, n_rows: int, n_cols: int, rng, scale: float = 0.02) -> np.ndarray:
    """uint8 (n_rows, row bytes): codes and sub-scales are random, the float16 scales finite."""
    if name in FLOATS:
        return quants.quantize(rng.standard_normal((n_rows, n_cols)).astype(np.float32),
                               GGMLQuantizationType[name]).view(np.uint8)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    raw = rng.integers(0, 256, (n_rows, n_cols // block, size), dtype=np.uint8)
    if name == "MXFP4":
        raw[..., 0] = rng.integers(110, 130, raw.shape[:2])
    else:
        for at in {SCALE_AT.get(name, 0), MIN_AT.get(name, SCALE_AT.get(name, 0))}:
            raw[..., at:at + 2] = halves(rng.standard_normal(raw.shape[:2]) * scale)
    return raw.reshape(n_rows, -1)


def halves(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)[..., None].view(np.uint8)


def with_field(name: str, raw: np.ndarray, at: int, value: np.ndarray) -> np.ndarray:
    """The same weights with a float16 field of every block replaced."""
    raw = raw.reshape(raw.shape[0], -1, GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]).copy()
    raw[..., at:at + 2] = halves(np.broadcast_to(value, raw.shape[:2]))
    return raw.reshape(raw.shape[0], -1)


def weights(name: str, raw: np.ndarray) -> np.ndarray:
    return quants.dequantize(raw, GGMLQuantizationType[name]).reshape(raw.shape[0], -1)


def weight_size(name: str, raw: np.ndarray) -> np.ndarray:
    """|scale * code| + |min|, float64."""
    w = weights(name, raw).astype(np.float64)
    if name not in MIN_AT:
        return abs(w)
    scaled = weights(name, with_field(name, raw, MIN_AT[name], np.zeros(1)))
    return abs(scaled) + abs(w - scaled)


def rounded(x: np.ndarray) -> np.ndarray:
    """Activations as the kernels take them: int8 times d = max|x| / 127 by blocks of 32. float64."""
    blocks = x.reshape(x.shape[0], -1, 32)
    amax = abs(blocks).max(-1, keepdims=True)
    d = np.where(amax <= 1e-30, 0, amax / np.float32(127))
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(amax <= 1e-30, 0, np.float32(127) / amax)
    q = np.rint(blocks * inverse).clip(-127, 127)
    return (d.astype(np.float64) * q).reshape(x.shape)


def linear(level, name, raw, x, bias=None, tiles=None):
    return _kernels.linear(level, GGMLQuantizationType[name],
                           np.ascontiguousarray(raw).reshape(-1), raw.shape[0], x.shape[1],
                           np.ascontiguousarray(x, np.float32), bias, tiles)


def check(level, name, raw, x, bias=None):
    """One product against its twin; returns it."""
    out = linear(level, name, raw, x, bias)
    seen = x.astype(np.float64) if name in FLOATS else rounded(x)
    expected = seen @ weights(name, raw).astype(np.float64).T
    size = abs(seen) @ weight_size(name, raw).T
    n_roundings = x.shape[1] if name in FLOATS else 2 * (x.shape[1] // 32) + 7
    if bias is not None:
        expected, size, n_roundings = expected + bias, size + abs(bias), n_roundings + 1
    assert out.shape == expected.shape
    assert np.all(abs(out - expected) <= n_roundings * EPS * size)
    return out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_products_agree_with_their_twin_over_shapes(level, name):
    rng = np.random.default_rng(1)
    for i, (n_tokens, n_rows) in enumerate(SHAPES):
        n_cols = n_cols_of(name, [1, 7, 32, 33, 96, 256, 512, 768][i % 8])
        raw = random_weights(name, n_rows, n_cols, rng)
        x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
        bias = rng.standard_normal(n_rows).astype(np.float32) if i % 2 else None
        check(level, name, raw, x, bias)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_one_token_or_many_and_any_tile_range_give_the_same_bits(level, name):
    rng = np.random.default_rng(2)
    n_cols = n_cols_of(name, 512 if name in BLOCKS else 77)
    raw = random_weights(name, 117, n_cols, rng)
    x = rng.standard_normal((47, n_cols)).astype(np.float32)
    bias = rng.standard_normal(117).astype(np.float32)
    together = linear(level, name, raw, x, bias)
    for begin, end in [(0, 1), (1, 3), (2, 40), (5, 12), (46, 47)]:
        assert np.array_equal(linear(level, name, raw, x[begin:end], bias), together[begin:end])
    ranges = [(0, 1), (1, 4), (4, 8)]
    parts = [linear(level, name, raw, x[:9], bias, tiles) for tiles in ranges]
    assert np.array_equal(np.concatenate(parts, axis=1), together[:9])


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "scalar"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_token_has_the_same_bits_wherever_a_long_prompt_is_cut(level, name):
    rng = np.random.default_rng(9)
    for n_tokens, n_rows, n_cols in [(263, 33, 1056), (300, 16, 256), (55, 17, 9728)]:
        n_cols = n_cols_of(name, n_cols)
        raw = random_weights(name, n_rows, n_cols, rng)
        x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
        parts = [linear(level, name, raw, x[t:t + 7]) for t in range(0, n_tokens, 7)]
        assert np.array_equal(linear(level, name, raw, x), np.concatenate(parts))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_level_gives_the_same_bits(name):
    rng = np.random.default_rng(3)
    raw = random_weights(name, 21, 512, rng)
    x = (rng.standard_normal((11, 512)) * 10.0 ** rng.integers(-3, 4, (11, 512))).astype(np.float32)
    first = linear(LEVELS[0], name, raw, x)
    assert all(np.array_equal(linear(level, name, raw, x), first) for level in LEVELS[1:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_dequantized_rows_are_exactly_those_of_gguf(level, name):
    rng = np.random.default_rng(4)
    raw = random_weights(name, 3, 1024, rng)
    if name == "MXFP4":
        raw.reshape(3, -1, 17)[..., 0] = rng.integers(0, 250, (3, 32))  # from 252 on: infinite
    out = _kernels.dequantize(level, GGMLQuantizationType[name], raw.reshape(-1), 3, 1024)
    assert np.array_equal(out, weights(name, raw))


def test_every_float16_becomes_the_same_float32():
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    for level in LEVELS:
        out = _kernels.dequantize(level, GGMLQuantizationType.F16, raw, 1, 65536)
        assert np.array_equal(out[0], raw.view(np.float16).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("byte", [0x00, 0xff, 0x80, 0x7f])
def test_extreme_codes_against_extreme_activations_do_not_saturate(level, name, byte):
    n_cols = n_cols_of(name, 256)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    raw = np.full((16, n_cols // block * size), byte, np.uint8)
    if name == "MXFP4":
        raw.reshape(16, -1, 17)[..., 0] = 128
    else:
        raw = with_field(name, raw, SCALE_AT.get(name, 0), np.ones(1))
        raw = with_field(name, raw, MIN_AT[name], np.ones(1)) if name in MIN_AT else raw
    x = np.full((5, n_cols), 127, np.float32)
    x[1] = -127
    x[2, ::2] = -127
    x[3, 16:] = -127
    x[4] *= np.sign(weights(name, raw)[0] + 0.5)
    check(level, name, raw, x)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", BLOCKS)
def test_scales_from_denormal_to_largest(level, name):
    rng = np.random.default_rng(5)
    raw = random_weights(name, 4, 512, rng)
    x = rng.standard_normal((3, 512)).astype(np.float32)
    if name == "MXFP4":
        raw.reshape(4, -1, 17)[..., 0] = np.array([40, 100, 160, 220])[:, None]
    else:
        scales = np.array([[6e-8], [3e-5], [1.0], [65504.0]])
        raw = with_field(name, raw, SCALE_AT.get(name, 0), scales)
    check(level, name, raw, x)


@pytest.mark.parametrize("level", LEVELS)
def test_blocks_of_zeros_and_of_next_to_nothing_count_as_zero(level):
    rng = np.random.default_rng(6)
    raw = random_weights("Q4_1", 17, 96, rng)
    x = rng.standard_normal((3, 96)).astype(np.float32)
    x[0] = 0
    x[1, 32:64] *= np.float32(1e-38)
    out = check(level, "Q4_1", raw, x)
    assert not out[0].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_stays_with_its_token(level, bad):
    rng = np.random.default_rng(7)
    raw = random_weights("Q4_K", 16, 256, rng)
    x = rng.standard_normal((4, 256)).astype(np.float32)
    good = linear(level, "Q4_K", raw, x)
    x[2, 77] = bad
    out = linear(level, "Q4_K", raw, x)
    assert not np.isfinite(out[2]).any()
    assert np.array_equal(out[[0, 1, 3]], good[[0, 1, 3]])


@pytest.mark.parametrize("level", LEVELS)
def test_activations_round_to_the_nearest_and_ties_to_even(level):
    """Weights that are the identity show the rounded activations themselves."""
    codes = np.eye(32, dtype=np.int8)
    raw = np.concatenate([halves(np.ones(32)), codes.view(np.uint8)], axis=1)
    x = np.arange(-16, 16, dtype=np.float32)[None] / 2  # d would be 8 / 127; make it 1:
    x[0, 0] = 127
    assert np.array_equal(linear(level, "Q8_0", raw, x), np.rint(x))


@pytest.mark.parametrize("level", LEVELS)
def test_a_million_columns_keep_their_sums(level):
    n_cols = 1 << 20
    raw = np.full((1, n_cols // 32, 18), 0x99, np.uint8)  # every weight is 1
    raw[..., :2] = halves(np.ones((1, n_cols // 32)))
    out = linear(level, "Q4_0", raw.reshape(1, -1), np.full((1, n_cols), 127, np.float32))
    assert out[0, 0] == 127 * n_cols  # 127 * 2^20, like each partial sum, is a float32


def test_wrong_sizes_and_formats_are_refused():
    x, raw = np.zeros((1, 32), np.float32), np.zeros(18, np.uint8)
    for qtype, rows, columns in [(2, 2, 32), (2, 1, 31), (2, 1, 64), (99, 1, 32), (2, 0, 32)]:
        with pytest.raises(ValueError):
            _kernels.linear(LEVELS[0], qtype, raw, rows, columns, x)
    with pytest.raises(ValueError):
        _kernels.linear("abacus", 2, raw, 1, 32, x)
