import os
import random
import subprocess
import sys
import threading
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
from helpers_engine import (
    GREEDY, WAIT_S, FakeExecutor, answer_after, check_pages, logits_after, read)
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.engine import Engine, PlacedImage, PromptStarted, SamplingParams, Sequence, Token
from tinychat.engine.sampler import Sampler
from tinychat.errors import ContextOverflow, InvalidRequest, KernelError, Overloaded, TinychatError
from tinychat.ops.program import PAGE_TOKENS


@pytest.fixture
def start():
    """start(n_ctx=..., executor=..., pages=..., **engine settings) -> engine, closed at the end.

    Without prompt lookup: whether guesses take part depends on time, and here steps are counted.
    """
    engines = []

    def start(*, n_ctx=512, executor=None, n_pages=64, **settings):
        executor = executor or FakeExecutor(n_pages=n_pages)
        engine = Engine(executor, n_ctx=n_ctx, prompt_lookup=False, **settings)
        engines.append(engine)
        engine.fake = executor
        return engine

    yield start
    for engine in engines:
        assert engine.close()
        assert engine.stats.running == engine.stats.waiting == 0
        assert engine.stats.free_pages == engine.stats.n_pages
        check_pages(engine._stepper.cache, [])


def prompt(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(97), k=n)


def generate(engine, ids, n, **fields):
    return read(engine.submit(ids, params=GREEDY, max_tokens=n, **fields))


class Gate:
    """Holds the engine inside a step until the test lets it go; from then on calls `later`."""

    def __init__(self, executor, at_step=0, later=lambda batch: None):
        self.executor, self.at_step, self.later = executor, at_step, later
        self.entered, self.go = threading.Event(), threading.Event()
        executor.before_step = self

    def __call__(self, batch):
        if len(self.executor.steps) - 1 == self.at_step:
            self.entered.set()
            assert self.go.wait(WAIT_S)
        self.later(batch)

    def wait(self):
        assert self.entered.wait(WAIT_S)


# Answers and how they end

@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 100])
def test_answer_continues_the_prompt(start, n):
    result = generate(start(), prompt(n), 40)
    assert result.ids == answer_after(prompt(n), 40)
    assert result.reason == "length" and result.error is None


@pytest.mark.parametrize("chunk", [1, 7, 32, 512])
def test_answer_is_the_same_whatever_the_chunk(start, chunk):
    result = generate(start(chunk=chunk), prompt(150), 10)
    assert result.ids == answer_after(prompt(150), 10)
    assert result.progress == [(done, 150) for done in range(chunk, 150, chunk)]


def test_stop_token_is_delivered_and_ends_the_answer(start):
    expected = answer_after(prompt(5), 20)
    at = next(i for i in range(4, 20) if expected[i] not in expected[:i])
    result = generate(start(), prompt(5), 20, stop_ids=frozenset({expected[at], 1000}))
    assert (result.ids, result.reason) == (expected[:at + 1], "stop")


def test_answer_ends_where_the_context_does(start):
    engine = start(n_ctx=50)
    for n_prompt, n, n_ctx, expected in (
            (10, None, None, (40, "context")), (49, 7, None, (1, "context")),
            (10, 15, 20, (10, "context")), (10, 40, 4096, (40, "length"))):
        result = generate(engine, prompt(n_prompt), n, n_ctx=n_ctx)
        assert (len(result.ids), result.reason) == expected


def test_prompt_as_long_as_the_context_is_refused_with_both_figures(start):
    engine = start(n_ctx=50)
    for n, limit, n_ctx in ((50, None, 50), (20, 20, 20), (51, None, 50)):
        with pytest.raises(ContextOverflow, match=f"{n} .*{n_ctx}") as error:
            engine.submit(prompt(n), params=GREEDY, n_ctx=limit)
        assert error.value.param == "input"


@pytest.mark.parametrize("ids", [[], [97], [-1], [1, 2**40], ["a"], [[1, 2]], [0.5], [True]])
def test_bad_ids_are_refused(start, ids):
    engine = start()
    for call in (lambda: engine.submit(ids, params=GREEDY), lambda: engine.logits(ids)):
        with pytest.raises(InvalidRequest) as error:
            call()
        assert error.value.param == "input"


def test_max_tokens_below_one_is_refused(start):
    with pytest.raises(InvalidRequest):
        start().submit([1], params=GREEDY, max_tokens=0)


@pytest.mark.parametrize("settings", [
    {"n_ctx": 64 * PAGE_TOKENS + 1}, {"n_ctx": 1}, {"parallel": 0}, {"parallel": 64}, {"chunk": 0}])
def test_engine_refuses_what_its_executor_cannot_hold(settings):
    with pytest.raises(InvalidRequest):
        Engine(FakeExecutor(n_pages=64), **{"n_ctx": 64, **settings})


# Many at once

def test_each_of_many_gets_its_own_answer(start):
    executor = FakeExecutor(n_pages=200)
    gate = Gate(executor)
    engine = start(executor=executor, parallel=4, chunk=40)
    lengths = [1, 200, 3, 77, 64, 300, 31, 5, 128, 10]
    sequences = [engine.submit(prompt(n, seed=n), params=GREEDY, max_tokens=20 + n % 7)
                 for n in lengths]
    gate.go.set()
    for n, seq in zip(lengths, sequences):
        assert read(seq).ids == answer_after(prompt(n, seed=n), 20 + n % 7)
    assert max(len(step) for step in engine.fake.steps) == 4


def test_seed_fixes_the_answer_alone_and_in_a_crowd(start):
    params = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.1)
    alone = read(start().submit(prompt(9), params=params, max_tokens=30, seed=5)).ids
    engine = start()
    others = [engine.submit(prompt(20 + i, seed=i), params=params, max_tokens=40) for i in range(3)]
    crowded = engine.submit(prompt(9), params=params, max_tokens=30, seed=5)
    assert read(crowded).ids == alone
    assert alone != answer_after(prompt(9), 30)
    assert {tuple(read(other).ids) for other in others}


def test_without_a_seed_answers_differ(start):
    params = SamplingParams(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0)
    engine = start()
    assert read(engine.submit([1], params=params, max_tokens=30)).ids != read(
        engine.submit([1], params=params, max_tokens=30)).ids


def test_long_prompt_does_not_stall_an_answer_under_way(start):
    executor = FakeExecutor()
    gate = Gate(executor, at_step=3)
    engine = start(executor=executor, chunk=16)
    talking = engine.submit(prompt(4), params=GREEDY, max_tokens=60)
    gate.wait()
    long = engine.submit(prompt(400, seed=1), params=GREEDY, max_tokens=2)
    gate.go.set()
    assert read(talking).ids == answer_after(prompt(4), 60)
    assert read(long).ids == answer_after(prompt(400, seed=1), 2)
    both = [dict(step) for step in executor.steps if len(step) == 2]
    assert len(both) == 400 // 16 + 1
    assert all(1 in counts.values() for counts in both)


def test_waiting_requests_run_in_order_of_arrival(start):
    executor = FakeExecutor()
    gate = Gate(executor)
    engine = start(executor=executor, parallel=1)
    sequences = [engine.submit(prompt(3, seed=i), params=GREEDY, max_tokens=2) for i in range(5)]
    gate.wait()
    assert (engine.stats.running, engine.stats.waiting) == (1, 4)
    gate.go.set()
    ends = [read(seq).updates[-2].t for seq in sequences]
    assert ends == sorted(ends)


def test_full_queue_refuses_and_recovers(start):
    executor = FakeExecutor()
    gate = Gate(executor)
    engine = start(executor=executor, parallel=1, queue_limit=2)
    sequences = [engine.submit([i], params=GREEDY, max_tokens=2) for i in range(3)]
    gate.wait()
    with pytest.raises(Overloaded):
        engine.submit([9], params=GREEDY)
    engine.cancel(sequences[2])
    sequences.append(engine.submit([9], params=GREEDY, max_tokens=2))
    gate.go.set()
    assert [read(seq).reason for seq in sequences] == ["length", "length", "cancelled", "length"]


def test_requests_wait_for_pages_and_nothing_running_is_dropped(start):
    engine = start(n_ctx=128, n_pages=4, parallel=4)  # one of four pages, or four of one
    sequences = [engine.submit(prompt(20, seed=i), params=GREEDY, max_tokens=n)
                 for i, n in enumerate([100, 10, 10, 100, 44, 10])]
    for i, (seq, n) in enumerate(zip(sequences, [100, 10, 10, 100, 44, 10])):
        assert read(seq).ids == answer_after(prompt(20, seed=i), n)


def test_when_pages_run_out_the_youngest_waits_and_goes_on_unchanged(start):
    """Three promises of 300 tokens fit into 1024 positions, three answers of 700 do not."""
    executor = FakeExecutor(n_pages=32)
    gate = Gate(executor)
    engine = start(n_ctx=1024, executor=executor, parallel=4, chunk=64)
    sequences = [engine.submit(prompt(44, seed=i), params=GREEDY, max_tokens=700) for i in range(3)]
    gate.go.set()
    results = [read(seq) for seq in sequences]
    for i, result in enumerate(results):
        assert result.ids == answer_after(prompt(44, seed=i), 700)
    assert engine.stats.n_preempted >= 2
    assert [r.updates[-2].t for r in results] == sorted(r.updates[-2].t for r in results)


def test_a_preempted_sequence_can_be_cancelled(start):
    executor = FakeExecutor(n_pages=32)

    def cancel_when_it_waits(batch):
        if engine.stats.n_preempted and not sequences[1].cancelled:
            engine.cancel(sequences[1])

    gate = Gate(executor, later=cancel_when_it_waits)
    engine = start(n_ctx=1024, executor=executor, parallel=2)
    sequences = [engine.submit(prompt(44, seed=i), params=GREEDY, max_tokens=900) for i in range(2)]
    gate.go.set()
    first, second = read(sequences[0]), read(sequences[1])
    assert first.ids == answer_after(prompt(44), 900) and second.reason == "cancelled"
    assert second.ids == answer_after(prompt(44, seed=1), 900)[:len(second.ids)]


def test_cancelling_at_the_moment_of_preemption_is_not_lost(start):
    executor = FakeExecutor(n_pages=32)
    gate = Gate(executor)
    engine = start(n_ctx=1024, executor=executor, parallel=2)
    sequences = [engine.submit(prompt(44, seed=i), params=GREEDY, max_tokens=900) for i in range(2)]
    gate.wait()
    preempt = engine._stepper._preempt

    def cancel_then_preempt():
        engine.cancel(engine._stepper.running[-1])
        return preempt()

    engine._stepper._preempt = cancel_then_preempt
    gate.go.set()
    second = read(sequences[1])
    assert second.reason == "cancelled" and sequences[0].finished is None
    assert read(sequences[0]).ids == answer_after(prompt(44), 900)


def test_many_threads_submit_read_and_cancel_at_once(start):
    engine = start(parallel=3, n_pages=40, chunk=50)
    wrong, done = [], []

    def client(me):
        rng = random.Random(me)
        for i in range(12):
            ids = prompt(rng.randrange(1, 90), seed=rng.randrange(6))
            seq = engine.submit(ids, params=GREEDY, max_tokens=30)
            updates, got = seq.updates(WAIT_S), []
            for update in updates:
                if isinstance(update, Token):
                    got.append(update.id)
                if len(got) == 5 and i % 3 == 0:
                    engine.cancel(seq)
            if got != answer_after(ids, 30)[:len(got)] or (len(got) < 30 and i % 3):
                wrong.append((me, i))
        done.append(me)

    clients = [threading.Thread(target=client, args=(me,)) for me in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(WAIT_S)
    assert len(done) == 8 and not wrong


# Prefix reuse

def test_second_turn_prefills_only_what_is_new(start):
    engine = start()
    first = prompt(100)
    answer = generate(engine, first, 20).ids
    assert engine.stats.n_prefilled_tokens == 100
    other = prompt(70, seed=9)
    generate(engine, other, 20)                             # another chat in between
    assert engine.stats.n_prefilled_tokens == 170
    second = [*first, *answer, *prompt(30, seed=1)]
    seq = engine.submit(second, params=GREEDY, max_tokens=20)
    assert read(seq).ids == answer_after(second, 20)
    assert seq.n_cached == 119  # the last sampled token was never computed
    assert engine.stats.n_prefilled_tokens == 170 + 31
    assert engine.stats.n_reused_tokens == 119


def test_branches_of_one_chat_share_its_full_pages(start):
    engine = start()
    first = prompt(100)
    answer = generate(engine, first, 20).ids
    for seed in (1, 2, 3):
        branch = [*first, *answer, *prompt(30, seed=seed)]
        seq = engine.submit(branch, params=GREEDY, max_tokens=5)
        assert read(seq).ids == answer_after(branch, 5)
        assert seq.n_cached >= 96


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65])
def test_equal_prompt_computes_at_least_its_last_token(start, n):
    engine = start()
    for _ in range(3):
        seq = engine.submit(prompt(n), params=GREEDY, max_tokens=3)
        assert read(seq).ids == answer_after(prompt(n), 3)
        assert seq.n_cached <= n - 1
    assert seq.n_cached >= (n - 1) // PAGE_TOKENS * PAGE_TOKENS


@pytest.mark.parametrize("chunk, computed_again", [(128, 0), (50, 32)])
def test_requests_of_the_same_moment_share_their_beginning(start, chunk, computed_again):
    """Whoever comes to its turn finds the full pages of those before it."""
    executor = FakeExecutor()
    gate = Gate(executor)
    engine = start(executor=executor, chunk=chunk)
    sequences = [engine.submit([*prompt(128), i], params=GREEDY, max_tokens=3) for i in range(4)]
    gate.wait()
    gate.go.set()
    for i, seq in enumerate(sequences):
        assert read(seq).ids == answer_after([*prompt(128), i], 3)
    assert engine.stats.n_prefilled_tokens == 128 + 4 + computed_again
    assert [seq.n_cached for seq in sequences] == [0, 128 - computed_again, 128, 128]


def test_least_recently_used_chat_is_forgotten_first(start):
    engine = start(n_ctx=128, n_pages=8, parallel=1)
    old, kept, new = prompt(70, seed=1), prompt(70, seed=2), prompt(70, seed=3)
    for ids in (old, kept, new):
        generate(engine, ids, 2)
    cached = {}
    for name, ids in (("new", new), ("kept", kept), ("old", old)):
        seq = engine.submit(ids, params=GREEDY, max_tokens=2)
        assert read(seq).ids == answer_after(ids, 2)
        cached[name] = seq.n_cached
    assert cached["new"] == cached["kept"] == 64 and cached["old"] < 64


# Cancelling

def test_cancelling_while_queued_prefilling_or_decoding_returns_everything(start):
    executor = FakeExecutor(n_pages=64)
    gate = Gate(executor, later=lambda batch: at_step_ten())
    engine = start(executor=executor, parallel=2, chunk=8)
    decoding = engine.submit(prompt(6), params=GREEDY, max_tokens=400)
    prefilling = engine.submit(prompt(400, seed=1), params=GREEDY, max_tokens=5)
    queued = engine.submit(prompt(9, seed=2), params=GREEDY)

    def at_step_ten():
        if len(executor.steps) == 10:
            for seq in (queued, prefilling, decoding, decoding):
                engine.cancel(seq)

    gate.go.set()
    results = [read(seq) for seq in (decoding, prefilling, queued)]
    assert [r.reason for r in results] == ["cancelled"] * 3
    assert len(results[0].ids) == 10 and results[1].ids == results[2].ids == []
    after = generate(engine, prompt(30, seed=4), 30)  # slots and pages are there again
    assert after.ids == answer_after(prompt(30, seed=4), 30)
    assert engine.stats.free_pages == 64
    engine.cancel(decoding)


def test_cancelled_chat_leaves_its_prefix_for_the_next(start):
    executor = FakeExecutor()
    gate = Gate(executor, later=lambda batch: len(executor.steps) == 3 and engine.cancel(seq))
    engine = start(executor=executor, chunk=32)
    seq = engine.submit(prompt(200), params=GREEDY)
    gate.go.set()
    assert read(seq).reason == "cancelled"
    again = engine.submit(prompt(200), params=GREEDY, max_tokens=5)
    assert read(again).ids == answer_after(prompt(200), 5)
    assert again.n_cached == 96


def test_cancelling_a_finished_sequence_does_nothing(start):
    engine = start()
    seq = engine.submit([1], params=GREEDY, max_tokens=1)
    assert read(seq).reason == "length"
    engine.cancel(seq)
    assert generate(engine, [2], 3).ids == answer_after([2], 3)


# Faults

def test_failing_step_ends_the_running_and_the_engine_lives_on(start, caplog):
    executor = FakeExecutor()
    engine = start(executor=executor, parallel=2)

    def fail_once(batch):
        if len(executor.steps) == 5:
            raise ZeroDivisionError("in the kernel")

    executor.before_step = fail_once
    sequences = [engine.submit(prompt(40, seed=i), params=GREEDY, max_tokens=20) for i in range(3)]
    results = [read(seq) for seq in sequences]
    assert [r.reason for r in results].count("error") in (1, 2)
    for i, result in enumerate(results):
        assert result.ids == answer_after(prompt(40, seed=i), 20)[:len(result.ids)]
        if result.reason == "error":
            assert isinstance(result.error, KernelError) and "in the kernel" in str(result.error)
    assert results[2].reason == "length"
    assert "ZeroDivisionError" in caplog.text


def test_fault_before_a_sequence_runs_ends_that_one(start):
    engine = start()
    begin = engine._stepper.start

    def fail(seq):
        if seq.n_prompt == 13:
            raise RuntimeError("cannot start")
        return begin(seq)

    engine._stepper.start = fail
    bad = engine.submit(prompt(13), params=GREEDY)
    good = engine.submit(prompt(14), params=GREEDY, max_tokens=5)
    assert "cannot start" in str(read(bad).error)
    assert read(good).ids == answer_after(prompt(14), 5)


def test_error_of_our_own_arrives_as_it_is(start):
    executor = FakeExecutor()
    engine = start(executor=executor)
    error = KernelError("no such page")

    def fail(batch):
        raise error

    executor.before_step = fail
    assert generate(engine, [1], 5).error is error


def test_broken_logits_of_one_sequence_leave_the_others_alone(start):
    executor = FakeExecutor()
    row, step = executor._row, executor.step
    executor._row = lambda batch, i: (np.full(97, np.nan, np.float32)
                                      if batch.positions[i] == 44 else row(batch, i))
    engine = start(executor=executor)
    broken = engine.submit(prompt(45), params=GREEDY, max_tokens=20)
    fine = engine.submit(prompt(3), params=GREEDY, max_tokens=20)
    assert read(fine).ids == answer_after(prompt(3), 20)
    assert read(broken).reason == "error"
    executor._row = row
    assert generate(engine, prompt(45), 5).ids == answer_after(prompt(45), 5)
    assert executor.step == step


def test_nothing_computed_before_a_fault_is_reused(start):
    executor = FakeExecutor()
    engine = start(executor=executor)
    generate(engine, prompt(100), 5)

    def fail(batch):
        executor.before_step = None
        raise MemoryError

    executor.before_step = fail
    assert generate(engine, prompt(3, seed=1), 5).reason == "error"
    seq = engine.submit(prompt(100), params=GREEDY, max_tokens=5)
    assert read(seq).ids == answer_after(prompt(100), 5)
    assert seq.n_cached == 0


# Closing

def test_close_ends_running_waiting_and_late_ones_with_the_error():
    executor = FakeExecutor()
    gate = Gate(executor, at_step=2)
    engine = Engine(executor, n_ctx=512, parallel=1)
    sequences = [engine.submit([i], params=GREEDY) for i in range(3)]
    gate.wait()
    error = TinychatError("unloaded", code="model_unloaded")
    closer = threading.Thread(target=engine.close, args=(error,))
    closer.start()
    with engine._wake:
        assert engine._wake.wait_for(lambda: engine._closing, WAIT_S)
    gate.go.set()
    assert [read(seq).error for seq in sequences] == [error] * 3
    closer.join(WAIT_S)
    assert not engine._thread.is_alive() and engine.close()
    assert engine.stats.free_pages == engine.stats.n_pages
    for late in (lambda: engine.submit([1], params=GREEDY), lambda: engine.logits([1])):
        with pytest.raises(TinychatError) as caught:
            late()
        assert caught.value.code == "model_unloaded"


def test_close_does_not_wait_for_ever_for_a_step(monkeypatch, caplog):
    monkeypatch.setattr("tinychat.engine.engine.CLOSE_TIMEOUT_S", 0.01)
    executor = FakeExecutor()
    gate = Gate(executor)
    engine = Engine(executor, n_ctx=512, parallel=1)
    sequences = [engine.submit([i], params=GREEDY) for i in range(2)]
    gate.wait()
    assert engine.close() is False
    assert [read(seq).reason for seq in sequences] == ["error", "error"]
    gate.go.set()
    monkeypatch.undo()
    assert engine.close() is True
    assert engine.stats.free_pages == engine.stats.n_pages


def test_interpreter_exits_with_an_open_engine():
    code = ("from helpers_engine import *; from tinychat.engine import Engine\n"
            "engine = Engine(FakeExecutor(), n_ctx=2048)\n"
            "seq = engine.submit([1], params=GREEDY)\n"
            "print(next(seq.updates(20)))\n")
    import helpers_engine
    import tinychat
    roots = [str(Path(p).parent) for p in (*tinychat.__path__, helpers_engine.__file__)]
    script = "import sys\n" + "".join(f"sys.path.insert(0, {root!r})\n" for root in roots) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "PromptStarted()\n", "")


# Reading updates

def test_updates_time_out_and_may_be_asked_again(start):
    executor = FakeExecutor()
    gate = Gate(executor)
    engine = start(executor=executor)
    updates = engine.submit([1], params=GREEDY, max_tokens=2).updates(0.01)
    gate.wait()
    assert next(updates) == PromptStarted()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            next(updates)
    gate.go.set()
    rest = []
    while len(rest) < 4:
        try:
            rest.append(next(updates))
        except TimeoutError:
            pass
    assert [u.id for u in rest if isinstance(u, Token)] == answer_after([1], 2)
    with pytest.raises(StopIteration):
        next(updates)


def test_times_are_in_order(start):
    updates = generate(start(), prompt(5), 5).updates
    times = [u.t for u in updates if hasattr(u, "t")]
    assert times == sorted(times) and len(times) == 6


def test_one_line_per_sequence_is_logged_without_contents(start, caplog):
    caplog.set_level("DEBUG", "tinychat.engine")
    generate(start(), prompt(40), 5)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and "40 tokens in, 0 cached" in lines[0] and lines[0].endswith("length")


# logits()

def test_logits_of_every_token_while_others_run(start):
    executor = FakeExecutor(max_outputs=16)
    engine = start(executor=executor, chunk=24)
    talking = engine.submit(prompt(5), params=GREEDY, max_tokens=100)
    rows = engine.logits(prompt(100, seed=3))
    assert read(talking).ids == answer_after(prompt(5), 100)
    assert rows.shape == (100, 97) and rows.dtype == np.float32
    for i in (0, 15, 16, 50, 99):
        assert (rows[i] == logits_after(prompt(100, seed=3)[:i + 1])).all()


def test_logits_wait_for_pages(start):
    engine = start(n_ctx=128, n_pages=4)
    talking = engine.submit(prompt(5), params=GREEDY)
    rows = engine.logits(prompt(128, seed=3))
    assert (rows[-1] == logits_after(prompt(128, seed=3))).all()
    assert read(talking).reason == "context"


def test_requests_do_not_overtake_logits_that_wait_for_pages(start):
    executor = FakeExecutor(n_pages=4)
    gate = Gate(executor)
    engine = start(n_ctx=128, executor=executor, parallel=2)
    talking = engine.submit(prompt(5), params=GREEDY, max_tokens=40)
    gate.wait()
    caller = threading.Thread(target=engine.logits, args=(prompt(128, seed=3),))
    caller.start()
    with engine._wake:
        assert engine._wake.wait_for(lambda: engine._jobs, WAIT_S)
    later = engine.submit(prompt(7), params=GREEDY, max_tokens=3)
    gate.go.set()
    assert read(talking).reason == read(later).reason == "length"
    caller.join(WAIT_S)
    counts = [step[-1][1] for step in executor.steps]
    assert [n for n in counts if n > 1] == [5, 64, 64, 7]


def test_closing_ends_logits_at_the_next_step():
    executor = FakeExecutor(max_outputs=16)
    gate = Gate(executor)
    engine = Engine(executor, n_ctx=512)
    errors = []

    def call():
        with pytest.raises(Overloaded) as error:
            engine.logits(prompt(400))
        errors.append(error.value)

    caller, closer = threading.Thread(target=call), threading.Thread(target=engine.close)
    caller.start()
    gate.wait()
    closer.start()
    with engine._wake:
        assert engine._wake.wait_for(lambda: engine._closing, WAIT_S)
    gate.go.set()
    caller.join(WAIT_S)
    closer.join(WAIT_S)
    assert len(errors) == len(executor.steps) == 1 and not engine._thread.is_alive()


def test_fault_in_logits_is_the_callers_alone(start):
    executor = FakeExecutor()
    engine = start(executor=executor)

    def fail(batch):
        if len(batch.outputs) > 1:
            raise RuntimeError("boom")

    executor.before_step = fail
    talking = engine.submit([5], params=GREEDY, max_tokens=50)
    with pytest.raises(KernelError, match="boom"):
        engine.logits([1, 2, 3])
    assert read(talking).ids == answer_after([5], 50)


def test_logits_longer_than_the_context_are_refused(start):
    engine = start(n_ctx=64)
    assert engine.logits(prompt(64)).shape == (64, 97)
    with pytest.raises(ContextOverflow):
        engine.logits(prompt(65))


# Any order of things

ACTION = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 3), st.integers(1, 120), st.integers(1, 150)),
    st.tuples(st.just("continue"), st.integers(0, 30), st.integers(0, 40), st.integers(1, 60)),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0), st.just(0)),
    st.tuples(st.just("fail"), st.just(0), st.just(0), st.just(0)))


@settings(max_examples=60, deadline=None)
@given(script=st.lists(st.tuples(st.integers(0, 6), ACTION), max_size=25),
       n_pages=st.integers(6, 20), parallel=st.integers(1, 5),
       chunk=st.sampled_from([1, 7, 32, 50, 512]), max_tokens=st.sampled_from([8, 64]),
       promised=st.sampled_from([0, 20, 256]))
def test_any_schedule_gives_right_answers_and_returns_all_pages(
        script, n_pages, parallel, chunk, max_tokens, promised):
    """Each action comes so many steps after the last, on the engine's thread, inside a step."""
    with unittest.mock.patch("tinychat.engine.stepper.PROMISED_TOKENS", promised):
        run_script(script, n_pages, parallel, chunk, max_tokens)


def run_script(script, n_pages, parallel, chunk, max_tokens):
    executor = FakeExecutor(n_pages=n_pages, max_tokens=max_tokens)
    n_ctx = 6 * PAGE_TOKENS
    engine = Engine(executor, n_ctx=n_ctx, parallel=parallel, chunk=chunk, queue_limit=1000)
    prompts, sequences, todo = [[1, 2, 3]], [], list(reversed(script))

    def submit(ids, n):
        prompts.append(ids)
        sequences.append((engine.submit(ids, params=GREEDY, max_tokens=n), ids, n))

    def act(kind, a, b, n):
        if kind == "submit":
            submit(prompt(b, seed=a), n)
        elif kind == "continue":
            ids = prompts[a % len(prompts)]
            submit([*ids, *answer_after(ids, b // 2), *prompt(b // 2, seed=b)][:n_ctx - 1], n)
        elif kind == "cancel" and sequences:
            engine.cancel(sequences[a % len(sequences)][0])
        elif kind == "fail":
            raise RuntimeError("scripted")

    due = [todo[-1][0] if todo else 0]

    def before_step(batch):
        check_pages(engine._stepper.cache, [seq.lease for seq in engine._stepper.running])
        due[0] -= 1
        while todo and due[0] <= 0:
            _, action = todo.pop()
            due[0] += todo[-1][0] if todo else 0
            act(*action)

    executor.before_step = before_step
    try:
        submit([1, 2, 3], 40)
        n_read = 0
        while n_read < len(sequences):
            seq, ids, n = sequences[n_read]
            result = read(seq)
            expected = answer_after(ids, n)
            assert result.ids == expected[:len(result.ids)]
            assert result.reason in ("length", "context", "cancelled", "error")
            if result.reason in ("length", "context"):
                assert len(result.ids) == min(n, n_ctx - len(ids))
            n_read += 1
    finally:
        assert engine.close()
    assert engine.stats.free_pages == n_pages
    check_pages(engine._stepper.cache, [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_told_that_nobody_would_answer():
    code = """
import os, sys, warnings
from helpers_engine import FakeExecutor
from tinychat.engine import Engine
from tinychat.errors import KernelError
warnings.simplefilter("ignore")
engine = Engine(FakeExecutor(), n_ctx=64)
if os.fork():
    status = os.wait()[1]
    engine.close()
    sys.exit(os.waitstatus_to_exitcode(status))
for call in (engine.submit, engine.logits):
    try:
        call([1])
    except KernelError as error:
        assert "forked" in str(error)
    else:
        os._exit(1)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          timeout=WAIT_S,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr


# Layers with a reach, recurrent states, images

KINDS = {"window": dict(window=40, n_window_pages=60), "states": dict(states=(1,), n_states=9),
         "both": dict(window=70, n_window_pages=80, states=(1,), n_states=8)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [7, 50, 512])
def test_turns_and_branches_answer_as_they_would_alone(start, kind, chunk):
    """The executor itself checks windows and states at every step."""
    engine = start(executor=FakeExecutor(n_pages=96, **KINDS[kind]), n_ctx=1024, chunk=chunk)
    first = prompt(200)
    one = first + (answer := generate(engine, first, 30).ids) + prompt(20, seed=1)
    other = first + answer + prompt(20, seed=2)
    for ids in (one, other, one + generate(engine, one, 5).ids + prompt(9, seed=3), first):
        assert generate(engine, ids, 12).ids == answer_after(ids, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_follow_up_turn_computes_only_what_is_new(start, kind):
    engine = start(executor=FakeExecutor(n_pages=96, **KINDS[kind]), n_ctx=1024)
    ids = prompt(200) + generate(engine, prompt(200), 30).ids
    before = engine.stats.n_prefilled_tokens
    generate(engine, ids + prompt(20, seed=1), 3)
    assert engine.stats.n_prefilled_tokens - before <= 21


def test_what_prompts_begin_with_in_common_is_found_by_a_recurrent_model(start):
    engine = start(executor=FakeExecutor(n_pages=96, states=(1,), n_states=12), n_ctx=1024)
    common = prompt(600)
    generate(engine, common + prompt(40, seed=1), 3)
    before = engine.stats.n_prefilled_tokens
    generate(engine, common + prompt(40, seed=2), 3)
    assert engine.stats.n_prefilled_tokens - before == 640 - 512


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_answer_can_be_gone_on_from(start, kind):
    engine = start(executor=FakeExecutor(n_pages=96, **KINDS[kind]), n_ctx=1024)
    seq = engine.submit(prompt(100), params=GREEDY, max_tokens=900)
    updates = seq.updates(WAIT_S)
    got = []
    while len(got) < 40:
        update = next(updates)
        got += [update.id] if type(update) is Token else []
    engine.cancel(seq)
    assert list(updates)[-1].reason == "cancelled"
    ids = prompt(100) + got[:10] + prompt(5, seed=9)
    assert generate(engine, ids, 8).ids == answer_after(ids, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_many_chats_at_once_keep_apart(start, kind):
    limits = {**KINDS[kind], "n_window_pages": 90, "n_states": 7} if kind != "states" else \
        KINDS[kind]
    engine = start(executor=FakeExecutor(n_pages=50, **limits), n_ctx=512, parallel=4, chunk=60)
    prompts = [prompt(30 + 40 * i, seed=i % 3) for i in range(9)]
    sequences = [engine.submit(ids, params=GREEDY, max_tokens=50) for ids in prompts]
    for ids, seq in zip(prompts, sequences):
        assert read(seq).ids == answer_after(ids, 50)


def test_logits_of_a_long_prompt_need_its_window_only(start):
    executor = FakeExecutor(n_pages=96, window=32, n_window_pages=40, max_outputs=64)
    ids = prompt(1000)
    rows = start(executor=executor, n_ctx=1024, chunk=64, parallel=2).logits(ids)
    assert rows[-1].argmax() == answer_after(ids, 1)[0]


def test_too_few_window_pages_are_refused():
    with pytest.raises(InvalidRequest, match="window pages are too few"):
        Engine(FakeExecutor(n_pages=64, window=100, n_window_pages=10), n_ctx=64)


SEES = dict(input_width=6, n_axes=3, n_spans=1)


def image(first, n, *, digest=b"an image of a cat", both_ways=False, width=6, side=None):
    rows = np.arange(n * width, dtype=np.float32).reshape(n, width)
    axes, n_positions = None, n
    if side:
        axes = np.array([(0, i // side, i % side) for i in range(n)], np.int32)
        n_positions = axes.max() + 1
    return PlacedImage(first, rows, axes, n_positions, digest, both_ways)


def test_an_image_stands_at_its_tokens_whatever_the_chunks(start):
    executor = FakeExecutor(n_pages=64, **SEES)
    seen = image(10, 12, side=4)
    engine = start(executor=executor, chunk=7)
    read(engine.submit(prompt(30), params=GREEDY, max_tokens=3, images=(seen,)))
    rows = {int(p): batch.inputs[r].tolist() for batch in executor.batches
            for p, r in zip(batch.positions, batch.input_rows) if r >= 0}
    assert rows == {10 + i: seen.rows[i].tolist() for i in range(12)}


def test_positions_after_an_image_go_on_behind_what_it_took():
    seq = Sequence(np.arange(20, dtype=np.int32), sampler=Sampler(SamplingParams(), 0),
                   max_tokens=None, stop_ids=frozenset(), n_ctx=64, images=(image(5, 8, side=4),))
    turns = seq.turns(0, 20, 3)
    assert turns[:5].tolist() == [[i] * 3 for i in range(5)]
    assert turns[5:13].tolist() == [[5, 5 + i // 4, 5 + i % 4] for i in range(8)]
    assert turns[13:].tolist() == [[9 + i] * 3 for i in range(7)]        # 5 + 4 columns
    seq.append(7)
    assert seq.turns(20, 1, 3).tolist() == [[16] * 3]


def test_an_image_whose_tokens_see_one_another_is_never_cut(start):
    executor = FakeExecutor(n_pages=64, **SEES)
    engine = start(executor=executor, chunk=8)
    seen = image(5, 20, both_ways=True)
    read(engine.submit(prompt(40), params=GREEDY, max_tokens=3, images=(seen,)))
    batch, = executor.batches
    at = batch.input_rows >= 0
    assert batch.positions[at].tolist() == list(range(5, 25))
    assert (batch.spans[at, 0] == [5, 24]).all()
    assert (batch.spans[~at, 0] == batch.positions[~at, None]).all()


def test_the_same_image_again_is_not_computed_again_and_another_is(start):
    executor = FakeExecutor(n_pages=64, **SEES)
    engine = start(executor=executor)

    def prefilled(seen):
        before = engine.stats.n_prefilled_tokens
        read(engine.submit(prompt(100), params=GREEDY, max_tokens=3, images=(seen,)))
        return engine.stats.n_prefilled_tokens - before
    assert prefilled(image(10, 50)) == 100
    assert prefilled(image(10, 50)) == 4   # of the page that the answer went on with
    assert prefilled(image(10, 50, digest=b"an image of a dog")) > 80


@pytest.mark.parametrize("images, says", [
    ((image(10, 5, width=7),), "does not take these images"),
    ((image(28, 5),), "outside the prompt"),
    ((image(1, 5), image(3, 5)), "overlap"),
    ((image(0, 25, both_ways=True),), "does not fit into one step of 20"),
])
def test_images_that_do_not_fit_are_refused(start, images, says):
    engine = start(executor=FakeExecutor(n_pages=64, max_tokens=24, **SEES), chunk=16)
    with pytest.raises(InvalidRequest, match=says):
        engine.submit(prompt(30), images=images)
