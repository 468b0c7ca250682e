"""Operations that make a row of a row, on each SIMD level against the reference; see
helpers_native for the tolerances."""
import math
from dataclasses import replace

import gguf
import numpy as np
import pytest

pytest.importorskip("tinychat._kernels", reason="no compiled kernels", exc_type=ImportError)

from helpers_native import (  # noqa: E402
    PAGES, U, all_outputs, both, every_level, executor_of, normal)
from helpers_program import batch, weight  # noqa: E402
from tinychat.errors import KernelError  # noqa: E402
from tinychat.gguf_file import GGMLQuantizationType, QTensor  # noqa: E402
from tinychat.ops.program import Rope  # noqa: E402
from tinychat.ops.recorder import ACTIVATIONS, Recorder  # noqa: E402

WIDTHS = pytest.mark.parametrize("width", [1, 15, 16, 33, 130])


def rows_of(seed: int, *widths: int, n: int = 5) -> list[QTensor]:
    """A table of n rows for each width."""
    rng = np.random.default_rng(seed)
    return [weight(f"x{i}", normal(rng, n, width)) for i, width in enumerate(widths)]


# Rows in

def with_inputs(step, width: int, rows, seed: int = 0):
    inputs = normal(np.random.default_rng(seed), max(rows) + 1, width)
    return replace(step, inputs=inputs, input_rows=np.array(rows, np.int32))


@every_level
@WIDTHS
def test_given_rows_take_the_place_of_tokens(isa, width):
    e, = rows_of(width, width)
    for build, n in ((lambda g: g.place(g.embed(e), 2), width + 2),
                     (lambda g: g.given(width, 3), width + 3),
                     (lambda g: g.add(g.place(g.embed(e)), g.given(width, 3)), width + 3)):
        step = with_inputs(all_outputs(5), n, [-1, 2, 0, -1, 2])
        got, expected = both(build, isa, step)
        np.testing.assert_array_equal(got, expected)


@every_level
def test_without_inputs_no_token_is_given_any(isa):
    e, = rows_of(0, 20)
    got, expected = both(lambda g: g.add(g.place(g.embed(e)), g.given(20, 5)), isa, all_outputs(5))
    np.testing.assert_array_equal(got, expected)


@every_level
@WIDTHS
def test_rows_at_positions_end_with_the_last(isa, width):
    table, = rows_of(width, width)
    step = all_outputs(4, positions=[0, 3, 4, 90], pages=[[0, 1, 2]])
    got, expected = both(lambda g: g.embed_positions(table), isa, step)
    np.testing.assert_array_equal(got, expected)


# Norms

NORMS = [(1, 1), (1, 3), (3, 20), (2, 64), (1, 576), (5, 17)]  # groups, group


@every_level
@pytest.mark.parametrize("groups, group", NORMS)
@pytest.mark.parametrize("weights", ["none", "group", "row", "group and row"])
def test_norms_agree(isa, groups, group, weights):
    rng, width = np.random.default_rng(group), groups * group
    x = normal(rng, 5, width, scale=3)
    length = group if weights.startswith("group") else width
    w = None if weights == "none" else weight("w", normal(rng, length))
    bias = w and weight("b", normal(rng, width if weights.endswith("row") else group))
    largest = 1 if w is None else np.abs(w.data.view(np.float32)).max()

    got, expected = both(lambda g: g.rmsnorm(g.embed(weight("e", x)), w, 1e-5, group), isa,
                         all_outputs(5))
    np.testing.assert_allclose(got, expected, rtol=(group + 8) * U, atol=0)

    got, expected = both(lambda g: g.layernorm(g.embed(weight("e", x)), w, bias, 1e-5, group), isa,
                         all_outputs(5))
    # The mean is off by group * u of the largest value, which the division by the deviation, at
    # least sqrt(eps), makes larger
    deviation = np.sqrt(x.reshape(5, groups, group).var(axis=2) + 1e-5).min()
    off = (group + 8) * U * (np.abs(x).max() / deviation + 1) * 2
    np.testing.assert_allclose(got, expected, rtol=(group + 8) * U, atol=off * largest)


@every_level
def test_a_layer_norm_has_a_weight_without_a_bias(isa):
    e, = rows_of(3, 50)
    w = weight("w", np.arange(50))
    got, expected = both(lambda g: g.layernorm(g.embed(e), w, None, 1e-5), isa, all_outputs(5))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


# Elementwise

EXTREMES = [0, -0.0, 1e-30, -1e-30, 7, -7, 88.5, -87, -104, 1e4, -1e4, 1e13, -1e13]


def spread(seed: int, width: int) -> np.ndarray:
    """Rows of values small and large, and the extremes."""
    x = normal(np.random.default_rng(seed), 16, width, scale=4)
    x[:len(EXTREMES), 0] = EXTREMES
    return x


def bound(fn: str, x: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How far two ways to compute fn(x) may be apart: exp and a division, and for the gelus, whose
    1 + tanh or 1 + erf is rounded before it is multiplied, x * u."""
    if fn in ("identity", "relu", "relu2"):
        return np.zeros_like(x)
    if fn.startswith("gelu_quick"):
        return (12 + 4 * np.abs(x)) * U * np.abs(expected) + 1e-37
    return 12 * U * (np.abs(x) if fn.startswith("gelu") else np.abs(expected)) + 1e-37


@every_level
@WIDTHS
@pytest.mark.parametrize("fn", ACTIVATIONS[:-1])
def test_activations_agree(isa, fn, width):
    x = spread(width, width)
    got, expected = both(lambda g: g.activate(fn, g.embed(weight("x", x))), isa, all_outputs(16))
    assert (np.abs(got - expected) <= bound(fn, x, expected)).all()


@every_level
@WIDTHS
@pytest.mark.parametrize("fn", ACTIVATIONS)
def test_gates_agree(isa, fn, width):
    x, up = spread(width, width), normal(np.random.default_rng(0), 16, width, scale=9)
    got, expected = both(lambda g: g.gate(fn, g.embed(weight("x", x)), g.embed(weight("u", up))),
                         isa, all_outputs(16))
    if fn == "silu_clamped":
        wide = (40 + 4 * np.abs(x)) * U * (np.abs(expected) + np.abs(x)) + 1e-37
    else:
        wide = bound(fn, x, expected / up) * np.abs(up) + 2 * U * np.abs(expected)
    assert (np.abs(got - expected) <= wide).all()


@every_level
@pytest.mark.parametrize("fn", ACTIVATIONS)
def test_what_is_not_a_number_stays_none(isa, fn):
    x, one = weight("x", np.full((1, 3), np.nan)), weight("one", np.ones((1, 3)))
    got, _ = both(lambda g: g.gate(fn, g.embed(x), g.embed(one)), isa, all_outputs(1))
    assert np.isnan(got).all()


@every_level
@WIDTHS
def test_soft_caps_agree(isa, width):
    x = spread(width, width)
    for cap in (1.0, 30.0):
        got, expected = both(lambda g: g.softcap(g.embed(weight("x", x)), cap), isa,
                             all_outputs(16))
        np.testing.assert_allclose(got, expected, rtol=12 * U, atol=1e-37)


@every_level
def test_tanh_and_erf_are_accurate_everywhere(isa):
    x = np.concatenate([np.linspace(-12, 12, 20011), np.logspace(-30, 2, 5000)]).astype(np.float32)
    exact, row = x.astype(np.float64), weight("x", x[None])
    got, _ = both(lambda g: g.softcap(g.embed(row), 1.0), isa, all_outputs(1))
    np.testing.assert_allclose(got[0], np.tanh(exact), rtol=4 * U)
    got, _ = both(lambda g: g.activate("gelu_erf", g.embed(row)), isa, all_outputs(1))
    erfc = np.array([math.erfc(-value * math.sqrt(0.5)) for value in exact])
    assert (np.abs(got[0] - 0.5 * exact * erfc) <= 3 * U * np.abs(exact)).all()


@every_level
@WIDTHS
def test_products_and_sums_with_vectors_and_columns_are_exact(isa, width):
    e, v, c = rows_of(width, width, width, 1)
    vector = QTensor("v", v.qtype, (width,), v.data[:4 * width])
    for build in (lambda g: g.add_vector(g.embed(e), vector),
                  lambda g: g.mul_vector(g.embed(e), vector),
                  lambda g: g.mul_column(g.embed(e), g.embed(c))):
        got, expected = both(build, isa, all_outputs(5))
        np.testing.assert_array_equal(got, expected)


@every_level
@pytest.mark.parametrize("n_head, a, b", [(1, 1, 1), (1, 16, 3), (3, 5, 2), (7, 16, 32)])
def test_columns_and_joined_heads_are_exact(isa, n_head, a, b):
    x, y = rows_of(a, n_head * a, n_head * b)
    for build in (lambda g: g.join(g.embed(x), g.embed(y), n_head),
                  lambda g: g.columns(g.embed(x), a // 2, n_head * a - a // 2),
                  lambda g: g.columns(g.join(g.embed(x), g.embed(y), n_head), 1, 1)):
        got, expected = both(build, isa, all_outputs(5))
        np.testing.assert_array_equal(got, expected)


@every_level
@pytest.mark.parametrize("beta, length, offset", [(0.1, 4, 0), (0.25, 8192, 1), (-0.5, 3, -2)])
def test_tempering_agrees(isa, beta, length, offset):
    e, = rows_of(1, 33)
    step = all_outputs(5, positions=[0, 3, 4, 8191, 131071], pages=[[0] * 4096])
    with np.errstate(divide="ignore"):
        got, expected = both(lambda g: g.temper(g.embed(e), beta, length, offset), isa, step)
    np.testing.assert_allclose(got, expected, rtol=4 * U)


@every_level
@pytest.mark.parametrize("layout", ["adjacent", "halves"])
def test_ropes_turn_by_their_axes(isa, layout):
    rng, axes = np.random.default_rng(0), (0, 2, 1, 1, 0)
    rope = Rope(layout, (0.3 ** np.arange(5)).astype(np.float32), 1.1, axes)
    plain = Rope(layout, rope.inv_freq)
    rows = normal(rng, 6, 3 * 12)
    step = all_outputs(6)
    given = replace(step, axes=rng.integers(-3, 500, (6, 3), dtype=np.int32))
    for step in (step, given):
        got, expected = both(lambda g: g.rope(g.rope(g.embed(weight("e", rows)), 12, rope), 12,
                                              plain), isa, step)
        assert np.abs(got - expected).max() <= 24 * U * 2 * 1.1 * np.abs(rows).max()


# The same bits, whatever else is in the step

def mixed_program(seed: int):
    """All row operations, one after another, over 50 tokens and input rows of 40."""
    rng = np.random.default_rng(seed)
    width = 3 * int(rng.integers(2, 30))

    def table(n, *shape):
        return weight("w", normal(rng, n, *shape, scale=0.5))

    g = Recorder()
    x = g.add(g.place(g.embed(table(50, width))), g.embed_positions(table(30, width)))
    x = g.layernorm(x, table(width), table(width), 1e-5)
    x = g.add(g.rmsnorm(x, table(width // 3), 1e-5), g.given(width, 1))
    for fn in ACTIVATIONS:
        x = g.add(x, g.gate(fn, g.mul_vector(x, table(width)), g.add_vector(x, table(width))), 0.1)
    for fn in ACTIVATIONS[:-1]:
        x = g.add(g.layernorm(x, None, None, 1e-5), g.activate(fn, x), 0.2)
    rope = Rope("halves", np.float32([1.0]), 1.0, (1,))
    x = g.softcap(g.temper(g.rope(x, 3, rope), 0.3, 7), 2.0)
    x = g.mul_column(x, g.columns(x, width // 2, 1))
    x = g.join(g.columns(x, 0, width // 3), g.columns(x, width // 3, 2 * (width // 3)), width // 3)
    q8 = gguf.quants.quantize(normal(rng, 20, 32), GGMLQuantizationType.Q8_0)
    q8 = QTensor("q8", GGMLQuantizationType.Q8_0, (20, 32), q8.reshape(-1))
    wide = g.linear(x, table(32, width))
    return g.finish("mixed", g.linear(g.outputs(g.add(wide, wide, 0.5)), q8))


@every_level
@pytest.mark.parametrize("seed", range(3))
def test_bits_are_the_same_in_chunks_in_a_crowd_and_with_any_number_of_threads(isa, seed):
    program, rng = mixed_program(seed), np.random.default_rng(seed)
    n, inputs = 70, normal(rng, 4, program.input_width)
    tokens, rows = rng.integers(0, 50, n), rng.integers(-1, 4, n, dtype=np.int32)
    axes = rng.integers(0, 90, (n, 2), dtype=np.int32)

    def results(threads, chunk):
        executor = executor_of(program, isa, threads=threads, max_outputs=128)
        parts = []
        for at in range(0, n, chunk):
            some = slice(at, min(at + chunk, n))
            step = batch(tokens[some], range(some.start, some.stop), pages=PAGES,
                         outputs=range(some.stop - some.start))
            parts.append(executor.step(replace(step, inputs=inputs, input_rows=rows[some],
                                               axes=axes[some])).copy())
        executor.close()
        return np.concatenate(parts)

    whole = results(1, n)
    assert np.isfinite(whole).all() and whole.std() > 0
    for threads in (1, 2, 3):
        for chunk in (n, 9, 1):
            np.testing.assert_array_equal(results(threads, chunk), whole)
    order = rng.permutation(40)  # of another sequence's tokens between these
    crowd = batch([*order, *tokens], [*range(40), *range(n)], [1] * 40 + [0] * n, PAGES,
                  range(40, 40 + n))
    crowd = replace(crowd, inputs=inputs, axes=np.concatenate([axes[:40] * 3, axes]),
                    input_rows=np.concatenate([rows[:40], rows]))
    np.testing.assert_array_equal(
        executor_of(program, isa, max_outputs=128).step(crowd), whole)


# Refusals

def test_a_bad_batch_of_inputs_or_axes_is_refused_and_does_no_harm():
    executor = executor_of(mixed_program(1), max_tokens=16)
    width = executor.program.input_width
    good = with_inputs(batch([1, 2, 3]), width, [0, -1, 1])
    good = replace(good, axes=np.zeros((3, 2), np.int32))
    expected = executor.step(good).copy()
    bad = [{"input_rows": np.array(rows, np.int32)} for rows in ([0, -2, 0], [0, 2, 0], [0, 0])]
    bad += [{"inputs": np.zeros((0, width), np.float32)}, {"inputs": good.inputs[:, 1:]},
            {"inputs": good.inputs.astype(np.float64)}, {"inputs": good.inputs[0]},
            {"axes": np.zeros((3, 1), np.int32)}, {"axes": np.zeros((2, 2), np.int32)},
            {"axes": np.zeros((3, 2), np.int64)}, {"axes": np.zeros(3, np.int32)}]
    for fields in bad:
        with pytest.raises(KernelError, match="batch"):
            executor.step(replace(good, **fields))
        np.testing.assert_array_equal(executor.step(good), expected)


def test_an_operation_without_a_kernel_is_refused_by_name(monkeypatch):
    from tinychat import _kernels
    monkeypatch.delitem(_kernels.op_kinds, "softcap")
    with pytest.raises(KernelError, match="no kernel for softcap"):
        executor_of(mixed_program(0))


def test_what_the_kernels_cannot_count_is_refused():
    g = Recorder()
    x = g.temper(g.embed(weight("e", np.ones((2, 4)))), 0.1, 1 << 40)
    with pytest.raises(KernelError, match="length is 1099511627776"):
        executor_of(g.finish("large", g.outputs(x)))
