import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.errors import InvalidRequest, KernelError
from tinychat.ops.sampling import (
    SamplingParams, draw, keep_min_p, keep_top_p, penalize, rank, sample)

OFF = dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)


def logits(*values) -> np.ndarray:
    return np.array(values, np.float32)


def chances(*values) -> np.ndarray:
    return np.log(np.array(values, np.float32))


def drawn(row, n=400, **fields) -> set[int]:
    params = SamplingParams(**{**OFF, **fields})
    return {sample(row, params, [], coin) for coin in np.arange(n) / n}


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0}])
@pytest.mark.parametrize("coin", [0.0, 0.5, 1 - 2**-53])
def test_greedy_settings_take_the_highest_and_the_lowest_id_of_equals(fields, coin):
    params = SamplingParams(**{**OFF, **fields})
    assert sample(logits(0, 3, 1, 3, 2), params, [], coin) == 1


def test_greedy_sees_the_penalty():
    params = SamplingParams(temperature=0, repeat_penalty=2.0)
    assert sample(logits(3, 2, 1), params, [0], 0.0) == 1


def test_draw_follows_the_probabilities_in_order_of_rank():
    row = chances(0.2, 0.5, 0.3)
    params = SamplingParams(**OFF)
    ids = [sample(row, params, [], coin) for coin in (0.0, 0.49, 0.51, 0.79, 0.81, 0.9999)]
    assert ids == [1, 1, 2, 2, 0, 0]


def test_temperature_sharpens_and_flattens():
    x = np.array([0.0, -1.0])
    assert draw(x, 1.0, 0.75) == 1 and draw(x, 0.5, 0.75) == 0
    assert draw(x, 100.0, 0.51) == 1


def test_tiny_temperature_is_the_highest_logit():
    for temperature in (1e-3, 1e-30, 5e-324):
        assert drawn(logits(1, 5, 4.5), temperature=temperature) == {1}


def test_top_k_keeps_the_first_k_and_lower_ids_of_equals():
    assert list(rank(logits(1, 2, 2, 2, 0), 2)) == [1, 2]
    assert list(rank(logits(1, 2, 2, 2, 0), 0)) == [1, 2, 3, 0, 4]
    assert list(rank(logits(1, 2), 9)) == [1, 0]
    assert drawn(logits(1, 2, 2, 2, 0), top_k=2) == {1, 2}


def test_top_p_keeps_the_fewest_that_reach_it():
    x = np.log(np.array([0.5, 0.25, 0.25]))
    assert [keep_top_p(x, p) for p in (0.0, 0.5, 0.51, 0.75, 0.76, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert drawn(chances(0.1, 0.6, 0.3), top_p=0.7) == {1, 2}


def test_min_p_is_relative_to_the_most_probable():
    x = np.log(np.array([0.5, 0.25, 0.1]) / 0.5)
    assert [keep_min_p(x, p) for p in (0.0, 0.19, 0.21, 0.51, 1.0)] == [3, 3, 2, 1, 1]
    assert drawn(logits(2, 2, 1), min_p=1.0) == {0, 1}


def test_filters_look_at_probabilities_before_temperature():
    row = chances(0.90, 0.06, 0.04)
    assert drawn(row, top_p=0.89, temperature=100.0) == {0}
    assert drawn(row, min_p=0.1, temperature=100.0) == {0}


def test_filters_apply_in_the_stated_order():
    """top_p after top_k sees the renormalised probabilities: 0.4 of 0.7 is more than 0.55."""
    row = chances(0.4, 0.3, 0.2, 0.1)
    assert drawn(row, top_p=0.55, top_k=2) == {0}
    assert drawn(row, top_p=0.55) == {0, 1}


def test_penalty_divides_positive_and_multiplies_other_logits_once():
    params = SamplingParams(repeat_penalty=2.0)
    row = logits(4, -4, 0, 4)
    assert list(penalize(row, [0, 1, 2, 0, 0], params)) == [2, -8, 0, 4]
    assert list(row) == [4, -4, 0, 4]


def test_penalty_looks_at_the_last_tokens_only():
    params = SamplingParams(repeat_penalty=2.0, repeat_last_n=2)
    assert list(penalize(logits(4, 4, 4), [0, 1, 2], params)) == [4, 2, 2]


def test_penalty_of_one_changes_nothing():
    row = logits(4, -4)
    assert penalize(row, [0, 1], SamplingParams()) is row


def test_extreme_penalty_stays_finite():
    for penalty in (1e300, 5e-324):
        params = SamplingParams(repeat_penalty=penalty, **OFF)
        assert sample(logits(4, -4, 0), params, [0, 1, 2], 0.5) in (0, 1, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_never_chosen(bad):
    assert drawn(logits(bad, 1, bad, 2)) == {1, 3}
    assert drawn(logits(bad, 1, bad, 2), temperature=0) == {3}
    assert drawn(logits(bad, 1, bad, 2), top_k=3) == {1, 3}


def test_no_finite_logit_is_a_kernel_error():
    with pytest.raises(KernelError, match="finite"):
        sample(logits(np.nan, np.inf), SamplingParams(), [], 0.5)


@pytest.mark.parametrize("name, value", [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 1.01),
    ("top_p", -0.01), ("min_p", 2), ("top_k", -1), ("top_k", 2**31), ("repeat_penalty", 0),
    ("repeat_penalty", math.inf), ("repeat_last_n", -1)])
def test_value_out_of_range_names_its_field(name, value):
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**{name: value})
    assert error.value.param == name


def plainly(row, p: SamplingParams, recent, coin) -> int:
    """The same chain with Python's own lists and floats."""
    scores = {i: float(v) for i, v in enumerate(row) if math.isfinite(v)}
    for i in set(recent[-p.repeat_last_n:]) & scores.keys():
        scores[i] = scores[i] / p.repeat_penalty if scores[i] > 0 else scores[i] * p.repeat_penalty
    ranked = sorted(scores, key=lambda i: (-np.float32(scores[i]), i))[:p.top_k or None]
    if p.greedy:
        return ranked[0]
    top = float(np.float32(scores[ranked[0]]))
    weight = {i: math.exp(float(np.float32(scores[i])) - top) for i in ranked}
    kept, total = [], sum(weight.values())
    for i in ranked:
        kept.append(i)
        if sum(weight[j] for j in kept) >= p.top_p * total and p.top_p < 1:
            break
    kept = [i for i in kept if weight[i] >= p.min_p * (1 - 1e-12)]
    tempered = [weight[i] ** (1 / p.temperature) for i in kept]
    seen = 0.0
    for i, w in zip(kept, tempered):
        seen += w
        if seen > coin * sum(tempered):
            return i
    return kept[-1]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-80, 80).map(lambda v: v / 8), min_size=1, max_size=40),
       st.builds(SamplingParams, temperature=st.sampled_from([0, 0.5, 1.0, 1.7]),
                 top_p=st.sampled_from([0, 0.53, 0.917, 1]),
                 top_k=st.sampled_from([0, 1, 3, 40]), min_p=st.sampled_from([0, 0.0513, 0.37]),
                 repeat_penalty=st.sampled_from([1.0, 1.1, 2.0]),
                 repeat_last_n=st.sampled_from([1, 4, 64])),
       st.lists(st.integers(0, 39), max_size=10), st.floats(0, 1, exclude_max=True))
def test_agrees_with_the_plain_chain(row, params, recent, coin):
    row = np.array(row, np.float32)
    got, want = sample(row, params, recent, coin), plainly(row, params, recent, coin)
    near = {plainly(row, params, recent, min(max(coin + d, 0.0), 1.0)) for d in (-1e-9, 1e-9)}
    assert got == want or got in near
