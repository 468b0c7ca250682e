"""Attention on each SIMD level against the reference: who sees what, shared layers, pages of
layers with a reach, refusals; see helpers_native for the tolerances."""
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tinychat._kernels", reason="no compiled kernels", exc_type=ImportError)

from helpers_native import (  # noqa: E402
    PAGES, U, all_outputs, both, every_level, executor_of, normal)
from helpers_program import batch, weight  # noqa: E402
from tinychat.errors import KernelError  # noqa: E402
from tinychat.ops.lowering import barriers, lower  # noqa: E402
from tinychat.ops.program import Heads, plan_slots  # noqa: E402
from tinychat.ops.recorder import Recorder  # noqa: E402
from tinychat.ops.reference import ReferenceExecutor  # noqa: E402


def heads_of(n_head, n_head_kv, n_key, n_value, **fields) -> Heads:
    return Heads(n_head, n_head_kv, n_key, n_value, n_key ** -0.5, **fields)


def inputs_of(rng, heads: Heads, n: int) -> list[np.ndarray]:
    """q, k, v of n tokens."""
    return [normal(rng, n, heads.n_head * heads.key_length),
            normal(rng, n, heads.n_head_kv * heads.key_length),
            normal(rng, n, heads.n_head_kv * heads.value_length)]


def attended(g: Recorder, qkv, heads: Heads, sinks=None):
    return g.attend(*(g.embed(weight(name, x)) for name, x in zip("qkv", qkv)), heads,
                    None if sinks is None else weight("sinks", sinks))


def spans_of(*runs: int, n_spans: int = 1) -> np.ndarray:
    """Runs of so many tokens that see one another, in every column."""
    ends = np.cumsum(runs)
    spans = [[end - n, end - 1] for n, end in zip(runs, ends) for _ in range(n)]
    return np.repeat(np.array(spans, np.int32)[:, None], n_spans, 1)


def bound(heads: Heads, qkv, n: int) -> float:
    """A score is off by n_key roundings of |q||k| * scale, a weight by that and exp, the mean by n.
    """
    q, k, v = qkv
    score = (np.linalg.norm(q.reshape(-1, heads.key_length), axis=1).max()
             * np.linalg.norm(k.reshape(-1, heads.key_length), axis=1).max())
    return (2 * heads.key_length * score * heads.scale + n + 16) * U * np.abs(v).max()


SHAPES = [(1, 1, 4, 4), (9, 3, 64, 64), (5, 1, 33, 80), (16, 2, 128, 17), (4, 4, 20, 12),
          (70, 2, 8, 8), (12, 12, 72, 72)]
SEEN = [  # fields of Heads, runs of spans
    ({}, None),
    ({"window": 40}, None),
    ({"window": 1}, None),
    ({"chunk": 32}, None),
    ({"chunk": 7}, None),
    ({"chunk": 1}, None),
    ({"softcap": 3.0}, None),
    ({"causal": False, "span": 0}, (100,)),
    ({"causal": False, "span": 0}, (1, 31, 33, 35)),
    ({"causal": False, "span": 0, "window": 10}, (60, 40)),
    ({"causal": False, "span": 0, "window": 1}, (100,)),
    ({"span": 0}, (20, 50, 30)),
    ({"span": 0, "window": 9}, (20, 50, 30)),
    ({"span": 0, "chunk": 16, "softcap": 5.0}, (20, 50, 30)),
]


@every_level
@pytest.mark.parametrize("kv_type", ["q8_0", "f16", "f32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fields, runs", SEEN, ids=str)
def test_attention_agrees(isa, kv_type, shape, fields, runs):
    rng, n, heads = np.random.default_rng(len(fields)), 100, heads_of(*shape, **fields)
    qkv = inputs_of(rng, heads, n)
    step = all_outputs(n, pages=[[6, 0, 3, 5]])
    step = replace(step, spans=None if runs is None else spans_of(*runs))
    for sinks in (None, normal(rng, heads.n_head, scale=3)):
        got, expected = both(lambda g: attended(g, qkv, heads, sinks), isa, step, kv_type=kv_type)
        assert np.abs(got - expected).max() <= bound(heads, qkv, n)


@every_level
def test_without_spans_a_token_sees_itself(isa):
    heads = heads_of(2, 1, 8, 8, causal=False, span=1)
    qkv = inputs_of(np.random.default_rng(0), heads, 5)
    got, expected = both(lambda g: attended(g, qkv, heads), isa, all_outputs(5))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got, np.tile(qkv[2], 2))


@every_level
def test_a_window_beside_its_span_sees_nothing_and_does_no_harm(isa):
    """Nothing forbids a span that its token does not stand in."""
    heads = heads_of(1, 1, 4, 4, causal=False, span=0, window=4)
    qkv = inputs_of(np.random.default_rng(0), heads, 90)
    spans = np.zeros((90, 1, 2), np.int32)
    with np.errstate(invalid="ignore"):
        got, _ = both(lambda g: attended(g, qkv, heads), isa,
                      replace(all_outputs(90, pages=[[0, 1, 2]]), spans=spans))
    assert np.isfinite(got[:3]).all() and np.isnan(got[3:]).all()


@every_level
def test_sinks_and_scores_may_be_extreme(isa):
    heads = heads_of(4, 1, 4, 4)
    qkv = [30 * x for x in inputs_of(np.random.default_rng(0), heads, 40)]
    sinks = np.float32([-np.inf, 3e38, -3e38, 900])
    got, expected = both(lambda g: attended(g, qkv, heads, sinks), isa,
                         all_outputs(40), max_outputs=40)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert (got[:, 4:8] == 0).all()


@every_level
@pytest.mark.parametrize("kv_type", ["q8_0", "f16", "f32"])
def test_what_a_token_does_not_see_may_be_anything(isa, kv_type):
    """NaN in keys and values of other runs, of later tokens, and outside a window."""
    rng, n = np.random.default_rng(1), 96
    for fields, runs, seen in (({"causal": False, "span": 0}, (40, 56), range(40)),
                               ({}, None, range(40)), ({"chunk": 40}, None, range(40)),
                               ({"window": 8}, None, [*range(40), *range(55, 96)])):
        heads = heads_of(3, 1, 16, 16, **fields)
        q, k, v = inputs_of(rng, heads, n)
        step = replace(all_outputs(n, pages=[[6, 0, 3]]), outputs=np.array(seen, np.int32),
                       spans=None if runs is None else spans_of(*runs))
        expected, _ = both(lambda g: attended(g, (q, k, v), heads), isa, step, kv_type=kv_type)
        k[40:48], v[40:48] = np.nan, np.inf
        with np.errstate(invalid="ignore"):
            got, _ = both(lambda g: attended(g, (q, k, v), heads), isa, step, kv_type=kv_type)
        np.testing.assert_array_equal(got, expected)


# Layers that share keys and values

@every_level
@pytest.mark.parametrize("keeps_kv", [True, False])
def test_encoder_layers_take_turns_in_one_kv_layer(isa, keeps_kv):
    rng, n = np.random.default_rng(0), 70
    heads = heads_of(4, 2, 16, 16, causal=False, span=0)
    wide = heads_of(4, 2, 16, 24, causal=False, span=0)
    layers = [inputs_of(rng, h, n) for h in (heads, wide, heads, heads)]

    def build(g):
        x = attended(g, layers[0], heads)
        wider = g.columns(attended(g, layers[1], wide), 3, x.width)
        return g.add(g.add(g.add(x, wider), attended(g, layers[2], heads)),
                     attended(g, layers[3], heads))

    step = replace(all_outputs(n, pages=[[6, 0, 3]]), spans=spans_of(50, 20))
    for threads in (1, 3):
        got, expected = both(build, isa, step, keeps_kv=keeps_kv, threads=threads)
        assert np.abs(got - expected).max() <= 4 * max(bound(heads, qkv, n) for qkv in layers)


@every_level
def test_later_layers_attend_to_what_an_earlier_one_stored(isa):
    rng, n = np.random.default_rng(0), 50
    heads, more = heads_of(2, 1, 16, 8, window=20), heads_of(6, 1, 16, 8, window=20)
    qkv, q = inputs_of(rng, heads, n), normal(rng, n, 6 * 16)

    def build(g):
        x = attended(g, qkv, heads)
        again = g.attend_again(g.embed(weight("q", q)), g.last_kv_layer, more)
        return g.join(x, again)

    got, expected = both(build, isa, all_outputs(n))
    assert np.abs(got - expected).max() <= bound(more, [q, *qkv[1:]], n)


def test_a_shared_kv_layer_is_not_stored_to_while_others_still_read_it():
    rng, heads = np.random.default_rng(0), heads_of(2, 1, 16, 16, causal=False, span=0)
    g = Recorder(keeps_kv=False)
    x = attended(g, inputs_of(rng, heads, 4), heads)
    for _ in range(2):
        x = g.attend(x, g.columns(x, 0, 16), g.columns(x, 16, 16), heads)
    lowered = lower(g.finish("encoder", g.outputs(x)))
    waits = barriers(lowered.ops, plan_slots(lowered)[0])
    touching = [i for i, op in enumerate(lowered.ops) if op.name in ("store_kv", "attend")]
    assert [lowered.ops[i].name for i in touching] == ["store_kv", "attend"] * 3
    for before, after in zip(touching, touching[1:]):
        assert any(waits[before + 1:after + 1])


# Pages, steps, threads

def layered_program(seed: int):
    """A layer that sees all, one with a window, one with chunks, with sinks and caps."""
    rng, g = np.random.default_rng(seed), Recorder()
    width = 4 * int(rng.integers(3, 20))
    x = g.embed(weight("e", normal(rng, 50, width)))
    for fields in ({"softcap": 4.0}, {"window": 21}, {"chunk": 24}):
        n_head_kv, head_dim = int(rng.integers(1, 4)), int(rng.integers(2, 40))
        heads = heads_of(n_head_kv * int(rng.integers(1, 12)), n_head_kv, head_dim, head_dim + 1,
                         **fields)
        q, k, v = (g.linear(x, weight("w", normal(rng, n, width, scale=width ** -0.5)))
                   for n in (heads.n_head * head_dim, n_head_kv * head_dim,
                             n_head_kv * (head_dim + 1)))
        out = g.attend(q, k, v, heads, weight("sinks", normal(rng, heads.n_head)))
        x = g.rmsnorm(g.add(x, g.linear(out, weight("o", normal(rng, width, out.width)))), None,
                      1e-5)
    return g.finish("layered", g.outputs(x))


def run_in_chunks(executor, tokens, chunk: int, window_pages=None) -> np.ndarray:
    parts = []
    for at in range(0, len(tokens), chunk):
        end = min(at + chunk, len(tokens))
        step = batch(tokens[at:end], range(at, end), pages=PAGES, outputs=range(end - at))
        if window_pages is not None:
            step = replace(step, window_pages=window_pages(at, end))
        parts.append(executor.step(step).copy())
    return np.concatenate(parts)


@every_level
@pytest.mark.parametrize("kv_type", ["q8_0", "f16", "f32"])
@pytest.mark.parametrize("seed", range(4))
def test_bits_are_the_same_in_chunks_in_a_crowd_and_with_any_number_of_threads(isa, kv_type, seed):
    program, rng = layered_program(seed), np.random.default_rng(seed)
    tokens, others = rng.integers(0, 50, 90), rng.integers(0, 50, 40)
    limits = {"max_outputs": 200, "kv_type": kv_type}
    whole = run_in_chunks(executor_of(program, isa, threads=1, **limits), tokens, 512)
    assert np.isfinite(whole).all() and whole.std() > 0
    expected = run_in_chunks(ReferenceExecutor(program, n_pages=8, **limits), tokens, 512)
    np.testing.assert_allclose(whole, expected, rtol=0.02, atol=0.02)
    for threads in (1, 2, 3):
        executor = executor_of(program, isa, threads=threads, **limits)
        for chunk in (512, 11, 1):
            np.testing.assert_array_equal(run_in_chunks(executor, tokens, chunk), whole)
        mixed, sequence = np.concatenate([tokens, others]), np.repeat([0, 1], [90, 40])
        position = np.concatenate([np.arange(90), np.arange(40)])
        order = np.lexsort([rng.random(130), position])  # one of each in turn
        got = executor.step(batch(mixed[order], position[order], sequence[order], PAGES,
                                  np.flatnonzero(sequence[order] == 0)))
        np.testing.assert_array_equal(got, whole)
        executor.close()


@every_level
def test_the_same_bits_with_spans_alone_and_in_a_crowd(isa):
    rng, n = np.random.default_rng(0), 90
    heads = heads_of(6, 3, 20, 20, causal=False, span=0, window=50)
    qkv = inputs_of(rng, heads, n)
    g = Recorder(keeps_kv=False)
    program = g.finish("spans", g.outputs(attended(g, qkv, heads)))
    spans = spans_of(9, 41, 40)
    step = replace(all_outputs(n, pages=PAGES), spans=spans)
    whole = executor_of(program, isa, threads=1, max_outputs=n).step(step).copy()
    tokens = rng.integers(0, 90, 40)
    crowd = batch([*tokens, *range(n)], [*range(40), *range(n)], [1] * 40 + [0] * n, PAGES,
                  range(40, 40 + n))
    crowd = replace(crowd, spans=np.concatenate([spans_of(3, 37), spans]))
    for threads in (1, 3):
        got = executor_of(program, isa, threads=threads, max_outputs=n).step(crowd)
        np.testing.assert_array_equal(got, whole)
    alone = executor_of(program, isa, max_outputs=n).step(
        replace(batch(range(9), outputs=range(9)), spans=spans_of(9)))
    np.testing.assert_array_equal(alone, whole[:9])


@every_level
def test_layers_with_a_reach_keep_pages_of_their_own_and_only_the_last(isa):
    program, tokens = layered_program(7), np.random.default_rng(0).integers(0, 50, 90)
    assert program.window == 24
    whole = run_in_chunks(executor_of(program, isa, max_outputs=90), tokens, 90)

    def window_pages(first, end):
        """Two pages in turn; what is not needed any more is nonsense."""
        pages = np.full((2, 3), -7, np.int32)
        for page in range(max(first - 23, 0) // 32, (end - 1) // 32 + 1):
            pages[0, page] = page % 2
        return pages

    executor = executor_of(program, isa, n_window_pages=2)
    assert executor.kv_bytes < executor_of(program, isa).kv_bytes
    np.testing.assert_array_equal(run_in_chunks(executor, tokens, 8, window_pages), whole)


# Refusals

def spanned_program():
    heads = heads_of(2, 1, 8, 8, window=5, span=1)
    g = Recorder()
    return g.finish("spanned", g.outputs(
        attended(g, inputs_of(np.random.default_rng(0), heads, 4), heads)))


@pytest.mark.parametrize("fields", [
    {"spans": np.zeros((3, 2, 2), np.int32) - 1},
    {"spans": np.int32([[[0, 0], [30, 30]]] * 3)},
    {"spans": np.int32([[[0, 0], [33, 32]]] * 3)},
    {"spans": np.int32([[[0, 0], [32, 35]]] * 3)},
    {"spans": np.zeros((3, 1, 2), np.int32) + 32},
    {"spans": np.zeros((2, 2, 2), np.int32) + 32},
    {"spans": np.zeros((3, 2), np.int32) + 32},
    {"spans": np.zeros((3, 2, 2), np.int64) + 32},
    {"window_pages": np.int32([[0, -1]])},
    {"window_pages": np.int32([[0, 2]])},
    {"window_pages": np.int32([[-1, 0]])},  # position 31 - 4 is still needed
    {"window_pages": np.int32([[0]])},
    {"window_pages": np.int32([[0, 0], [0, 0]])},
    {"window_pages": np.int32([0, 0])},
], ids=str)
def test_bad_spans_and_window_pages_are_refused_and_do_no_harm(fields):
    executor = executor_of(spanned_program(), n_window_pages=2, max_tokens=8)
    good = batch([1, 2, 3], [31, 32, 33])
    good = replace(good, spans=np.int32([[[31, 33], [31, 33]]] * 3),
                   window_pages=np.int32([[1, 0]]))
    expected = executor.step(good).copy()
    with pytest.raises(KernelError, match="batch"):
        executor.step(replace(good, **fields))
    np.testing.assert_array_equal(executor.step(good), expected)


@pytest.mark.parametrize("seed", range(3))
def test_random_batches_are_accepted_as_the_reference_accepts_them(seed):
    """Numbers near the edges of what is allowed; neither crashes, and both judge alike."""
    rng, program = np.random.default_rng(seed), spanned_program()
    limits = {"n_pages": 2, "n_window_pages": 2, "max_tokens": 4, "max_sequences": 2,
              "max_outputs": 4, "kv_type": "f32"}
    executor, reference = executor_of(program, **limits), ReferenceExecutor(program, **limits)
    accepted = 0
    for _ in range(3000):
        n, position = int(rng.integers(1, 6)), int(rng.choice([0, 30, 62]))
        edge = (lambda low, high, *shape: rng.choice(
            [low - 1, low, high, high + 1], shape, p=[0.01, 0.49, 0.49, 0.01]).astype(np.int32))
        step = replace(
            batch(edge(0, 3, n), position + np.cumsum(rng.integers(0, 8, n) > 0), edge(0, 1, n),
                  edge(0, 1, 2, 2), edge(0, n - 1, 2)),
            window_pages=edge(0, 1, 2, 2),
            spans=(position + rng.integers(-1, 3, (n, 2, 2)).clip(0 if n < 3 else -1)
                   ).astype(np.int32))
        if rng.random() < 0.5:
            step = replace(step, spans=np.repeat(step.positions[:, None, None], 2, 1).repeat(2, 2))
        judged = []
        for one in (executor, reference):
            try:
                one.step(step)
                judged.append("accepted")
            except KernelError as error:
                judged.append(str(error))
        assert judged[0] == judged[1]
        accepted += judged[0] == "accepted"
    assert 100 < accepted < 2900
