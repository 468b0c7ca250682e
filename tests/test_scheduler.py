from types import SimpleNamespace

import numpy as np
import pytest

from tinychat.engine.sampler import Sampler, SamplingParams
from tinychat.engine.scheduler import StepArrays, plan_step
from tinychat.engine.sequence import Sequence


PROGRAM = SimpleNamespace(window=0, n_axes=0, n_spans=0, input_width=0)


def sequence(n_prompt: int, *, done: int = 0, generated: int = 0, slot: int = 0) -> Sequence:
    seq = Sequence(np.arange(n_prompt), sampler=Sampler(SamplingParams(), 0), max_tokens=None,
                   stop_ids=frozenset(), n_ctx=4096)
    for i in range(generated):
        seq.append(100 + i)
    seq.n_done, seq.slot = done, slot
    return seq


def plan(running, *, max_tokens=512, chunk=512):
    work = plan_step(running, max_tokens=max_tokens, chunk=chunk)
    return [(running.index(seq), n) for seq, n in work]


def test_generating_sequences_come_first_with_one_token_each():
    running = [sequence(100), sequence(5, done=5, generated=1), sequence(3, done=6, generated=4)]
    assert plan(running) == [(1, 1), (2, 1), (0, 100)]


def test_prompts_share_what_is_left_in_order_of_arrival():
    running = [sequence(100, done=40), sequence(5, done=5, generated=1), sequence(30), sequence(30)]
    assert plan(running, chunk=80) == [(1, 1), (0, 60), (2, 20)]
    assert plan(running, chunk=500, max_tokens=64) == [(1, 1), (0, 60), (2, 3)]


def test_there_is_room_for_a_prompt_whatever_generates():
    running = [sequence(1, done=1, generated=1) for _ in range(7)] + [sequence(50)]
    assert plan(running, max_tokens=8)[-1] == (7, 1)


def test_nothing_runs_nothing_is_planned():
    assert plan([]) == []


def test_arrays_describe_the_step():
    arrays = StepArrays(PROGRAM, max_tokens=16, n_slots=4, n_ctx=100)
    work = [(sequence(3, done=4, generated=2, slot=2), 1), (sequence(9, done=6, slot=0), 3),
            (sequence(20, slot=1), 5)]
    batch = arrays.fill(work)
    assert batch.tokens.tolist() == [101, 6, 7, 8, 0, 1, 2, 3, 4]
    assert batch.positions.tolist() == [4, 6, 7, 8, 0, 1, 2, 3, 4]
    assert batch.sequences.tolist() == [2, 0, 0, 0, 1, 1, 1, 1, 1]
    assert batch.outputs.tolist() == [0, 3]  # the last of the third prompt is still to come
    assert batch.pages.shape == (4, 4)
    assert all(a.dtype == np.int32 for a in vars(batch).values() if a is not None)


def test_arrays_ask_for_every_row_when_told():
    arrays = StepArrays(PROGRAM, max_tokens=16, n_slots=1, n_ctx=100)
    assert arrays.fill([(sequence(20), 5)], all_rows=True).outputs.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n_prompt, max_tokens, n_ctx, limit, reason", [
    (10, None, 50, 50, "context"), (10, 40, 50, 50, "length"), (10, 41, 50, 50, "context"),
    (10, 5, 50, 15, "length")])
def test_a_sequence_knows_its_limit_and_why(n_prompt, max_tokens, n_ctx, limit, reason):
    seq = Sequence(np.arange(n_prompt), sampler=Sampler(SamplingParams(), 0), max_tokens=max_tokens,
                   stop_ids=frozenset({7}), n_ctx=n_ctx)
    assert len(seq.ids) == limit
    reasons = [seq.append(1) for _ in range(limit - n_prompt)]
    assert reasons == [None] * (limit - n_prompt - 1) + [reason]


def test_stop_token_wins_over_the_limit():
    seq = Sequence(np.arange(3), sampler=Sampler(SamplingParams(), 0), max_tokens=1,
                   stop_ids=frozenset({7}), n_ctx=9)
    assert seq.append(7) == "stop"


def test_recent_ids_reach_back_into_the_prompt():
    seq = sequence(70, generated=2)
    assert seq.recent_ids().tolist() == [*range(8, 70), 100, 101]
    assert sequence(3, generated=1).recent_ids().tolist() == [0, 1, 2, 100]


def test_one_coin_per_token_whatever_the_settings():
    coins = []
    executor = SimpleNamespace(sample=lambda logits, params, recent, coin: coins.append(coin))
    for params in (SamplingParams(temperature=0), SamplingParams()):
        sampler = Sampler(params, seed=3)
        for _ in range(3):
            sampler.next(executor, None, None)
    assert coins[:3] == coins[3:] and len(set(coins)) == 3 and all(0 <= coin < 1 for coin in coins)
