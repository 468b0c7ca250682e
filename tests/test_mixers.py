"""Routing, experts and the recurrent mixers against plain loops in float64; their states."""
import math

import numpy as np
import pytest

from helpers_golden import PAGES, step
from helpers_program import weight
from tinychat.ops import mixers
from tinychat.ops.program import DeltaNet, Mamba2, Routing
from tinychat.ops.recorder import Recorder
from tinychat.ops.reference import ReferenceExecutor


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def close(got, expected, tolerance=3e-6):
    assert got.dtype == np.float32
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=atol)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(x))


# Routing

def chosen(row, routing, bias):
    """(ids, weights) of one token, best first."""
    e = [math.exp(x) for x in row]
    scores = {"softmax": [x / sum(e) for x in e], "sigmoid": [sigmoid(x) for x in row],
              "chosen": list(row)}[routing.gating]
    judged = {i: scores[i] + bias[i] for i in range(len(row))}
    size = len(row) // routing.n_group

    def group_score(group):
        best = sorted((judged[i] for i in range(group * size, (group + 1) * size)), reverse=True)
        return sum(best[:2])
    if routing.n_group > 1:
        groups = sorted(range(routing.n_group), key=group_score, reverse=True)
        kept = groups[:routing.n_group_used]
        judged = {i: score for i, score in judged.items() if i // size in kept}
    ids = sorted(judged, key=judged.get, reverse=True)[:routing.n_used]
    weights = [scores[i] for i in ids]
    if routing.gating == "chosen":
        weights = [math.exp(x) / sum(map(math.exp, weights)) for x in weights]
    if routing.normalise:
        weights = [x / sum(weights) for x in weights]
    return ids, [x * routing.scale for x in weights]


@pytest.mark.parametrize("routing", [
    Routing(12, 3), Routing(12, 3, normalise=True, scale=2.5), Routing(12, 1, "sigmoid"),
    Routing(12, 4, "sigmoid", n_group=4, n_group_used=2, normalise=True),
    Routing(12, 5, "softmax", n_group=3, n_group_used=2), Routing(12, 3, "chosen")], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_token_goes_to_its_best_experts_with_their_weights(rng, routing, biased):
    logits, bias = normal(rng, 20, 12), normal(rng, 12) if biased else None
    got = mixers.route(logits, bias, routing=routing)
    assert got.dtype == np.float32
    for row, routes in zip(logits.astype(float), got):
        ids, weights = chosen(row, routing, np.zeros(12) if bias is None else bias.astype(float))
        assert routes[:routing.n_used].tolist() == ids
        np.testing.assert_allclose(routes[routing.n_used:], weights, rtol=3e-6)


def test_of_equal_experts_the_first_are_chosen():
    got = mixers.route(np.ones((2, 6), np.float32), routing=Routing(6, 3, normalise=True))
    assert got[:, :3].tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(got[:, 3:], 1 / 3, rtol=1e-6)


def test_scores_that_vanish_are_not_divided_by_nothing():
    got = mixers.route(np.full((1, 4), -80, np.float32),
                       routing=Routing(4, 2, "sigmoid", normalise=True))
    assert np.isfinite(got).all()


# Experts

def some_routes(rng, n_tokens, n_used, n_expert):
    ids = np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_tokens)])
    return np.concatenate([ids.astype(np.float32), normal(rng, n_tokens, n_used)], axis=1)


@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_each_route_goes_through_its_own_matrix(rng, own_inputs, biased):
    n_used, n_out, n_in = 3, 5, 4
    routes, matrices = some_routes(rng, 7, n_used, 6), normal(rng, 6, n_out, n_in)
    x = normal(rng, 7, n_used * n_in if own_inputs else n_in)
    bias = normal(rng, 6, n_out) if biased else None
    expected = np.empty((7, n_used, n_out))
    for t in range(7):
        for u in range(n_used):
            given = x[t, u * n_in:(u + 1) * n_in] if own_inputs else x[t]
            expert = int(routes[t, u])
            expected[t, u] = matrices[expert].astype(float) @ given.astype(float)
            if biased:
                expected[t, u] += bias[expert]
    close(mixers.experts(x, routes, matrices, bias), expected.reshape(7, -1))


def test_outputs_are_mixed_by_the_routes_weights(rng):
    routes, x = some_routes(rng, 4, 2, 5), normal(rng, 4, 6)
    expected = x[:, :3] * routes[:, 2:3] + x[:, 3:] * routes[:, 3:4]
    close(mixers.mix(x, routes, True), expected)
    close(mixers.mix(x, routes, False), x[:, :3] + x[:, 3:])


def test_inputs_are_weighed_once_for_each_route(rng):
    routes, x = some_routes(rng, 4, 2, 5), normal(rng, 4, 3)
    close(mixers.weigh(x, routes), np.concatenate([x * routes[:, 2:3], x * routes[:, 3:4]], 1))


# Recurrent mixers

@pytest.mark.parametrize("length", [1, 2, 4])
def test_conv_sees_the_tokens_before_and_none_after(rng, length):
    x, w, bias = normal(rng, 9, 3), normal(rng, 3, length), normal(rng, 3)
    expected = np.empty((9, 3))
    for t in range(9):
        for c in range(3):
            past = [float(w[c, length - 1 - j]) * float(x[t - j, c]) for j in range(length)
                    if t - j >= 0]
            expected[t, c] = sum(past) + bias[c]
    close(mixers.conv(np.zeros((length - 1, 3), np.float32), x, w, bias), expected)


MAMBA = Mamba2(n_head=6, head_dim=3, n_group=2, n_state=4)


def mamba_inputs(rng, n):
    shapes = [(n, 18), (n, 8), (n, 8), (n, 6)]
    a, d, dt_bias = -np.exp(normal(rng, 6)), normal(rng, 6), normal(rng, 6)
    return [normal(rng, *shape) for shape in shapes], (a, d, dt_bias)


def test_mamba2_is_a_decaying_sum_of_outer_products(rng):
    (x, b, c, dt), (a, d, dt_bias) = mamba_inputs(rng, 8)
    expected = np.empty((8, 18))
    for h in range(6):
        group, state = h // 3, np.zeros((3, 4))
        for t in range(8):
            step_size = softplus(float(dt[t, h]) + float(dt_bias[h]))
            value = x[t, 3 * h:3 * h + 3].astype(float)
            state = math.exp(step_size * float(a[h])) * state + step_size * np.outer(
                value, b[t, 4 * group:4 * group + 4])
            expected[t, 3 * h:3 * h + 3] = state @ c[t, 4 * group:4 * group + 4] + d[h] * value
    state = np.zeros((6, 3, 4), np.float32)
    close(mixers.mamba2(state, x, b, c, dt, a, d, dt_bias, shape=MAMBA), expected)


def delta_inputs(rng, n):
    shapes = [(n, 8), (n, 8), (n, 30), (n, 6), (n, 6)]
    return [normal(rng, *shape) for shape in shapes], (-np.exp(normal(rng, 6)), normal(rng, 6))


@pytest.mark.parametrize("tiled", [False, True])
def test_delta_net_replaces_what_it_knows_of_a_key(rng, tiled):
    (q, k, v, alpha, beta), (a, dt_bias) = delta_inputs(rng, 8)
    expected = np.empty((8, 30))
    for h in range(6):
        at, state = 4 * (h % 2 if tiled else h // 3), np.zeros((4, 5))
        for t in range(8):
            key, query = (m[t, at:at + 4].astype(float) for m in (k, q))
            state = state * math.exp(float(a[h]) * softplus(float(alpha[t, h] + dt_bias[h])))
            news = v[t, 5 * h:5 * h + 5] - key @ state
            state = state + np.outer(key, news) * sigmoid(float(beta[t, h]))
            expected[t, 5 * h:5 * h + 5] = query @ state
    shape, state = DeltaNet(2, 6, 4, 5, tiled), np.zeros((6, 4, 5), np.float32)
    got = mixers.delta_net(state, q, k, v, alpha, beta, a, dt_bias, shape=shape)
    close(got, expected, 2e-5)


# States

def recurrent_program():
    """One of each mixer after another, over embeddings of 8 values."""
    rng, g = np.random.default_rng(5), Recorder()

    def w(*shape):
        return weight("w", normal(rng, *shape) / np.float32(math.sqrt(shape[-1])))

    def negative(n):
        return weight("a", -np.exp(normal(rng, n)))
    x = g.conv(g.embed(weight("e", normal(rng, 64, 8))), w(8, 4), w(8))
    dt, b, c = (g.linear(x, w(n, 8)) for n in (2, 4, 4))
    x = g.mamba2(x, b, c, dt, negative(2), w(2), w(2), Mamba2(2, 4, 1, 4))
    q, k, alpha, beta = (g.linear(x, w(n, 8)) for n in (4, 4, 2, 2))
    x = g.delta_net(q, k, x, alpha, beta, negative(2), w(2), DeltaNet(1, 2, 4, 4))
    return g.finish("recurrent", g.outputs(x))


def executor():
    return ReferenceExecutor(recurrent_program(), n_pages=PAGES.size, max_tokens=64,
                             max_outputs=64, max_sequences=2)


TOKENS = np.random.default_rng(3).integers(0, 64, 24).astype(np.int32)


def test_a_sequence_goes_on_where_an_earlier_step_left_it():
    e = executor()
    whole = step(e, (0, 0, TOKENS))
    parts = [step(e, (0, at, TOKENS[at:at + 5])) for at in range(0, 24, 5)]
    close(np.concatenate(parts), whole)


def test_sequences_of_one_step_keep_states_of_their_own():
    e = executor()
    whole, other = step(e, (0, 0, TOKENS)), step(e, (0, 0, TOKENS[::-1]))
    first = step(e, (0, 0, TOKENS[:7]), (1, 0, TOKENS[:14:-1]))
    second = step(e, (1, 9, TOKENS[14::-1]), (0, 7, TOKENS[7:]))
    close(np.concatenate([first[:7], second[15:]]), whole)
    close(np.concatenate([first[7:], second[:15]]), other)


def test_a_copied_state_is_a_branch_of_its_sequence():
    e = executor()
    whole = step(e, (0, 0, TOKENS))
    step(e, (0, 0, TOKENS[:10]))
    e.copy_state(0, 1)
    step(e, (0, 10, TOKENS[:5]))
    close(step(e, (1, 10, TOKENS[10:])), whole[10:])


def test_a_new_sequence_finds_nothing_of_the_one_before():
    e = executor()
    whole = step(e, (0, 0, TOKENS))
    step(e, (0, 24, TOKENS))
    close(step(e, (0, 0, TOKENS)), whole)
