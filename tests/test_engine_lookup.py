"""Prompt lookup: guesses make texts that repeat themselves faster, and change none."""
import random
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from helpers_engine import (
    GREEDY, N_VOCAB, FakeExecutor, check_pages, digest, logits_after, read)
from helpers_golden import load_golden
from hypothesis import given
from hypothesis import strategies as st
from test_batch_invariance import answers, native

import tinychat
from tinychat.engine import Engine, PlacedImage, SamplingParams, Token
from tinychat.engine.drafting import draft_lengths
from tinychat.engine.kv_cache import n_pages_for
from tinychat.engine.lookup import N_LEAST, N_MOST, Lookup
from tinychat.engine.step_times import StepTimes
from tinychat.engine.window_pages import n_window_pages_for
from tinychat.errors import KernelError

WARM = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


class Line:
    """Times of steps that nobody measured."""

    def __init__(self, fixed: float, per_token: float):
        self.fixed, self.per_token = fixed, per_token

    def of(self, n_tokens):
        return self.fixed + n_tokens * self.per_token

    def add(self, n_tokens, seconds):
        pass


CHEAP = Line(1, 0.01)  # nearly every guess pays


def copying(ids) -> np.ndarray:
    """Mostly the token that followed the last one before, else one that all of `ids` decide."""
    logits = logits_after(ids)
    if digest(ids) % 9:
        for i in range(len(ids) - 2, -1, -1):
            if ids[i] == ids[-1]:
                logits[ids[i + 1]] = 3
                break
    return logits


def copied_after(ids, n: int) -> list[int]:
    """The n greedy tokens of `copying` after `ids`."""
    out = list(ids)
    for _ in range(n):
        out.append(int(copying(out).argmax()))
    return out[len(ids):]


def prompt(n: int, seed: int = 0) -> list[int]:
    """n tokens of which later parts repeat earlier ones."""
    rng, ids = random.Random(seed), []
    while len(ids) < n:
        begin = rng.randrange(len(ids) + 1)
        ids += ids[begin:begin + 30] if rng.random() < 0.5 else rng.choices(range(N_VOCAB), k=12)
    return ids[:n]


@contextmanager
def running(executor=None, *, times=CHEAP, n_ctx=512, prompt_lookup=True, **settings):
    """An engine that guesses as if steps took these times; all must be given back at its end."""
    executor = executor or FakeExecutor(after=copying)
    engine = Engine(executor, n_ctx=n_ctx, prompt_lookup=prompt_lookup, **settings)
    if times and engine._stepper.drafter:
        engine._stepper.drafter.times = times
    try:
        yield engine
    finally:
        assert engine.close()
        check_pages(engine._stepper.cache, [])
    assert engine.stats.n_accepted <= engine.stats.n_drafted


def generate(engine, ids, n, *, params=GREEDY, **fields):
    return read(engine.submit(ids, params=params, max_tokens=n, **fields))


# Guesses

def test_what_followed_the_last_tokens_before_is_guessed():
    assert Lookup([1, 2, 3, 4, 5, 9, 2, 3]).guesses(3) == [4, 5, 9]
    assert Lookup([1, 2, 3, 4, 5, 6]).guesses(3) == []
    assert Lookup([1]).guesses(3) == []


def test_the_longest_match_is_followed_and_the_latest_of_equals():
    assert Lookup([7, 1, 2, 30, 8, 1, 2, 40, 7, 1, 2]).guesses(1) == [30]
    assert Lookup([7, 1, 2, 30, 7, 1, 2, 40, 7, 1, 2]).guesses(1) == [40]


def test_what_repeats_itself_is_guessed_to_go_on():
    assert Lookup([5, 1, 2, 3, 1, 2, 3]).guesses(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert Lookup([4, 4, 4]).guesses(3) == [4, 4, 4]


def test_parts_of_images_are_never_guessed():
    lookup = Lookup([1, 2, -5, -6, 3, 1, 2])
    assert lookup.guesses(4) == []
    assert Lookup([1, 2, 3, -5, 1, 2]).guesses(4) == [3]


def test_guesses_that_were_wrong_seem_less_likely_and_right_ones_more():
    lookup = Lookup([1, 2, 3, 9, 1, 2])
    before = lookup.chance(0), lookup.chance(1)
    lookup.add(4)
    for token in (1, 2):
        lookup.add(token)
    assert lookup.guesses(1) == [4] and lookup.chance(0) < before[0]
    lookup.add(4)
    assert lookup.chance(0) == before[1]  # three that match: nothing was learnt of these
    assert Lookup([1, 2, 3]).chance(0) == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60),
       st.lists(st.integers(0, 3), max_size=40))
def test_where_something_is_guessed_the_tokens_before_it_are_the_last_ones(first, later):
    lookup = Lookup(first)
    for token in (None, *later):
        if token is not None:
            lookup.add(token)
        tokens = first + later[:len(lookup._tokens) - len(first)]
        assert lookup._tokens == tokens
        pairs = list(zip(tokens, tokens[1:]))
        assert bool(lookup.guesses(1)) == (pairs[-1:] != [] and pairs[-1] in pairs[:-1])
        if guess := lookup.guesses(1):
            n = min(lookup._n_matched, N_MOST)
            assert n >= N_LEAST and guess == [tokens[lookup._next]]
            assert tokens[lookup._next - n:lookup._next] == tokens[-n:]
            assert 0 < lookup.chance(0) < 1


# How many pay

def repeating() -> Lookup:
    return Lookup([*range(20), *range(15)], credit=100)


def test_guesses_are_computed_as_far_as_they_pay():
    lengths = [draft_lengths([repeating()], [15], Line(1, cost), 64)[0]
               for cost in (0, 0.01, 0.2, 0.5, 100)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 15 and 1 < lengths[2] < 15 and lengths[-1] == 0
    assert draft_lengths([Lookup([1, 2, 3])], [15], Line(1, 0), 64) == [0]


def test_guesses_keep_within_the_room_of_their_sequence_and_of_the_step():
    lookups = [repeating(), repeating(), repeating()]
    assert draft_lengths(lookups, [2, 0, 15], Line(1, 0), 64) == [2, 0, 15]
    assert sum(draft_lengths(lookups, [15, 15, 15], Line(1, 0), 9)) == 9 - 3
    assert draft_lengths(lookups, [15, 15, 15], Line(1, 0), 3) == [0, 0, 0]


def test_in_a_crowd_one_that_repeats_guesses_less_than_alone_or_among_its_like():
    times, others = Line(1, 0.05), [Lookup([i], credit=100) for i in range(7)]
    alone, = draft_lengths([repeating()], [15], times, 64)
    among_others = draft_lengths([repeating(), *others], [15] * 8, times, 64)[0]
    among_its_like = min(draft_lengths([repeating() for _ in range(8)], [15] * 8, times, 64))
    assert among_others < among_its_like <= alone


def test_one_without_credit_is_not_made_slower_for_the_sake_of_others():
    times = Line(1, 0.05)
    for credit, pays in ((0, False), (0.01, False), (1, True)):
        lengths = draft_lengths([repeating(), Lookup([1], credit=credit)], [15, 15], times, 64)
        assert bool(lengths[0]) == pays and lengths[1] == 0


def test_times_are_learnt_of_each_size_of_step():
    """Here eight tokens cost no more than five, as kernels with tiles have it."""
    def seconds(n):
        return 0.003 + 0.002 * -(-n // 4)

    times, rng = StepTimes(), random.Random(1)
    for n in [1] * 30 + rng.choices((1, 4, 5, 8, 16), k=400):
        times.add(n, seconds(n) * rng.uniform(0.95, 1.05))
    for n in (4, 5, 8, 16):
        assert times.of(n) / times.of(1) == pytest.approx(seconds(n) / seconds(1), rel=0.05)
    assert times.of(8) < times.of(12) < times.of(16)
    assert times.of(16) < times.of(20)


def test_a_machine_that_slows_down_changes_no_ratio():
    times = StepTimes()
    for n in (1, 8) * 40:
        times.add(n, 0.001 * n)
    for _ in range(50):
        times.add(1, 0.002)
    assert times.of(8) / times.of(1) == pytest.approx(8, rel=0.2)


def test_one_interrupted_step_teaches_little():
    times = StepTimes()
    for n in (1, 8) * 25:
        times.add(n, 0.001 * n)
    times.add(8, 5.0)
    assert times.of(8) / times.of(1) < 8 * 1.05


def test_a_size_that_was_dear_is_tried_again_when_that_is_long_past():
    times = StepTimes()
    for n in [1] * 20 + [4] * 10:
        times.add(n, 0.002 * n)  # a token costs as much as a step
    assert draft_lengths([repeating()], [3], times, 64) == [0]
    for _ in range(1000):
        times.add(1, 0.002)
    assert draft_lengths([repeating()], [3], times, 64) == [3]


# Speed

def test_text_that_repeats_takes_far_fewer_steps():
    ids = [*range(60), 1, 2, 3]
    steps = {}
    for lookup in (False, True):
        executor = FakeExecutor(after=lambda ids: np.eye(N_VOCAB, dtype=np.float32)[
            (ids[-1] + 1) % 60])
        with running(executor, prompt_lookup=lookup) as engine:
            assert generate(engine, ids, 200).ids == [(4 + i) % 60 for i in range(200)]
            steps[lookup] = engine.stats.n_steps
            assert engine.stats.n_generated_tokens == 200
    assert steps[False] == 200 and steps[True] < 200 / 8


def test_steps_and_right_guesses_together_make_the_answer():
    with running() as engine:
        assert generate(engine, prompt(100), 200).ids == copied_after(prompt(100), 200)
        stats = engine.stats
        assert stats.n_steps + stats.n_accepted == stats.n_generated_tokens == 200
        assert stats.n_drafted > stats.n_accepted > 50


def test_a_text_without_repeats_is_computed_token_by_token():
    with running(FakeExecutor(after=lambda ids: np.eye(N_VOCAB, dtype=np.float32)[len(ids)])) as e:
        assert generate(e, [0], 90).ids == list(range(1, 91))
        assert (e.stats.n_drafted, e.stats.n_steps) == (0, 90)


def test_guesses_that_never_come_true_are_given_up():
    """The text repeats pairs and goes on otherwise each time."""
    def after(ids):
        cycle, phase = divmod(len(ids), 3)
        return np.eye(N_VOCAB, dtype=np.float32)[phase if phase < 2 else 2 + cycle % 90]

    with running(FakeExecutor(after=after), times=Line(1, 0.1)) as engine:
        generate(engine, [0, 1], 300)
        assert 0 < engine.stats.n_drafted < 150


def test_without_prompt_lookup_nothing_is_guessed():
    with running(prompt_lookup=False) as engine:
        assert generate(engine, prompt(100), 50).ids == copied_after(prompt(100), 50)
        assert engine.stats.n_drafted == 0 and engine.stats.n_steps == 50


def test_recurrent_models_go_without():
    with running(FakeExecutor(after=copying, states=(1,), n_states=9)) as engine:
        assert generate(engine, prompt(100), 50).ids == copied_after(prompt(100), 50)
        assert engine.stats.n_drafted == 0


def test_after_words_that_stood_before_an_image_nothing_is_guessed():
    def after(ids):
        return np.eye(N_VOCAB, dtype=np.float32)[6 if ids[-1] == 5 else len(ids)]

    ids = [5, 6, 0, 0, 0, 0, 7, 5]
    seen = PlacedImage(2, np.zeros((4, 6), np.float32), None, 4, b"cat" * 6, False)
    for images, guessed in (((), True), ((seen,), False)):
        with running(FakeExecutor(after=after, input_width=6)) as engine:
            generate(engine, ids, 9, images=images)
            assert bool(engine.stats.n_drafted) == guessed


def test_beside_one_that_repeats_the_others_hardly_get_slower():
    def after(ids):
        return np.eye(N_VOCAB, dtype=np.float32)[ids[-1] ^ 1 if ids[0] == 0 else len(ids)]

    executor, times = FakeExecutor(after=after), Line(1, 0.1)
    with running(executor, times=times, parallel=2) as engine:
        with engine._wake:
            repeats = engine.submit([0, 1, 0], params=GREEDY, max_tokens=400)
            other = engine.submit([1], params=GREEDY, max_tokens=90)
        assert len(read(other).ids) == 90 and len(read(repeats).ids) == 400
        assert engine.stats.n_accepted > 200
    sizes = [sum(n for _, n in step) for step in executor.steps if len(step) == 2][1:]
    assert max(sizes) > 2
    assert sum(map(times.of, sizes)) <= times.of(2) * (len(sizes) * 1.02 + 2)


# The same text

def random_settings(rng: random.Random) -> tuple[dict, dict]:
    """Of an executor and of an engine."""
    parallel, n_ctx = rng.choice([1, 2, 4]), rng.choice([96, 200, 400])
    max_tokens, more = rng.choice([8, 64, 256]), {}
    if rng.random() < 0.5:
        window = rng.choice([1, 5, 33, 70])
        more = dict(window=window, n_window_pages=n_window_pages_for(
            window, n_sequences=parallel + 1, max_tokens=max_tokens))
    if rng.random() < 0.3:
        more.update(input_width=6, n_axes=rng.choice([0, 3]), n_spans=1)
    n_pages = n_pages_for(n_ctx) + rng.choice([0, 3, 30])
    return (dict(n_pages=n_pages, max_tokens=max_tokens, max_outputs=rng.choice([5, 64]), **more),
            dict(n_ctx=n_ctx, parallel=parallel, chunk=rng.choice([5, 40, 200])))


def random_requests(rng: random.Random, n_ctx: int, sees: bool) -> list[dict]:
    requests = []
    for _ in range(rng.randrange(2, 9)):
        ids, images = prompt(rng.randrange(1, n_ctx - 20), seed=rng.randrange(5)), ()
        if sees and len(ids) > 20 and rng.random() < 0.5:
            first, n = rng.randrange(len(ids) - 10), rng.randrange(1, 5)
            ids[first:first + n] = [0] * n
            images = (PlacedImage(first, np.zeros((n, 6), np.float32), None, n, b"cat" * 6, False),)
        params = rng.choice([GREEDY, WARM, replace(WARM, temperature=0.5, repeat_penalty=1.2),
                             replace(WARM, repeat_penalty=1.1, repeat_last_n=5, top_k=9)])
        requests.append(dict(
            ids=ids, images=images, params=params, seed=rng.randrange(99),
            max_tokens=rng.choice([None, 1, 30, 120]), n_ctx=rng.choice([None, n_ctx - 15]),
            stop_ids=frozenset(rng.sample(range(N_VOCAB), rng.choice([0, 1])))))
    return [one for one in requests if len(one["ids"]) < (one["n_ctx"] or n_ctx)]


@pytest.mark.parametrize("times", [CHEAP, Line(1, 0.2), None], ids=["cheap", "dear", "measured"])
@pytest.mark.parametrize("seed", range(12))
def test_texts_are_the_same_with_and_without_guesses(seed, times, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr("tinychat.engine.stepper.PROMISED_TOKENS", rng.choice([0, 30, 256]))
    limits, settings = random_settings(rng)
    requests = random_requests(rng, settings["n_ctx"], "input_width" in limits)
    results, drafted = {}, 0
    for lookup in (False, True):
        executor = FakeExecutor(after=copying, **limits)
        with running(executor, times=times, prompt_lookup=lookup, **settings) as engine:
            executor.before_step = lambda batch: check_pages(
                engine._stepper.cache, [seq.lease for seq in engine._stepper.running])
            sequences = [engine.submit(**one) for one in requests]
            results[lookup] = [(r.ids, r.reason) for r in map(read, sequences)]
            drafted = engine.stats.n_drafted
    assert results[True] == results[False]
    assert drafted or times is not CHEAP


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_follow_up_turn_finds_what_was_right_and_nothing_else(params):
    with running() as engine, running(prompt_lookup=False) as plain:
        ids = prompt(70)
        for turn in range(6):
            answer = generate(engine, ids, 25 + turn, params=params, seed=turn).ids
            assert answer == generate(plain, ids, 25 + turn, params=params, seed=turn).ids
            ids = ids + answer[:20] + prompt(15, seed=turn)
        assert engine.stats.n_accepted > 20
        assert engine.stats.n_prefilled_tokens == plain.stats.n_prefilled_tokens


@pytest.mark.parametrize("at", range(3, 24, 3))
def test_a_stop_token_among_right_guesses_ends_the_answer(at):
    ids = [*range(60), 1, 2, 3]
    executor = FakeExecutor(after=lambda ids: np.eye(N_VOCAB, dtype=np.float32)[ids[-1] + 1])
    with running(executor) as engine:
        result = generate(engine, ids, 50, stop_ids=frozenset({3 + at}))
        assert (result.ids, result.reason) == (list(range(4, 4 + at)), "stop")
        assert engine.stats.n_generated_tokens == at


@pytest.mark.parametrize("n", range(1, 22))
def test_an_answer_ends_at_its_limit_among_right_guesses(n):
    ids = [*range(60), 1, 2, 3]
    executor = FakeExecutor(after=lambda ids: np.eye(N_VOCAB, dtype=np.float32)[ids[-1] + 1])
    with running(executor) as engine:
        for limit, reason in (dict(max_tokens=n), "length"), (dict(n_ctx=len(ids) + n), "context"):
            result = read(engine.submit(ids, params=GREEDY, **limit))
            assert (result.ids, result.reason) == (list(range(4, 4 + n)), reason)


def test_a_cancelled_sequence_gets_no_further_token_of_its_step():
    executor = FakeExecutor(after=lambda ids: np.eye(N_VOCAB, dtype=np.float32)[ids[-1] + 1])
    drawn = []

    def sample(logits, params, recent_ids, coin):
        drawn.append(int(logits.argmax()))
        if len(drawn) == 20:
            assert engine.stats.n_accepted > 5
            engine.cancel(seq)
        return drawn[-1]

    executor.sample = sample
    with running(executor) as engine:
        with engine._wake:  # so that `seq` is known before its first token
            seq = engine.submit([*range(90), 1, 2, 3], params=GREEDY)
        result = read(seq)
    assert result.reason == "cancelled" and result.ids == drawn == list(range(4, 24))


def test_each_token_is_an_update_with_a_time_of_its_own():
    with running() as engine:
        updates = generate(engine, prompt(100), 150).updates
    tokens = [update for update in updates if isinstance(update, Token)]
    assert [update.t for update in tokens] == sorted(update.t for update in tokens)
    assert len(tokens) == 150


class Picky:
    """A guide that refuses every fifth token, and notes what it was asked and told, in order."""

    active, decided = True, False

    def __init__(self, masks=True):
        self.heard, self._masks = [], masks

    def allows(self, id):
        self.heard.append(("allows", id))
        return id % 5 != 0

    def mask(self):
        self.heard.append("mask")
        return np.arange(N_VOCAB) % 5 != 0 if self._masks else None

    def accept(self, id):
        self.heard.append(("accept", id))


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_guide_is_asked_and_told_the_same(params):
    heard = []
    for lookup in (False, True):
        guide = Picky()
        with running(prompt_lookup=lookup) as engine:
            ids = generate(engine, prompt(100), 150, params=params, seed=3, guide=guide).ids
            assert bool(engine.stats.n_accepted) == lookup
        heard.append((ids, guide.heard))
    assert heard[0] == heard[1]
    assert ids == [what[1] for what in guide.heard if what[0] == "accept"]


def test_broken_logits_behind_a_wrong_guess_harm_nobody():
    """Greedy answers never hold 96, guesses do."""
    def after(ids):
        logits = copying(ids)
        logits[96] = -100
        return np.full(N_VOCAB, np.nan, np.float32) if 96 in ids[100:] else logits

    broken = []
    with running(FakeExecutor(after=after)) as engine:
        ids = ([7, 8, 96, 5] * 25)[:100]
        executor = engine._stepper.executor
        step = executor.step

        def noting(batch):
            rows = step(batch)
            broken.append(np.isnan(rows).any())
            return rows

        executor.step = noting
        result = generate(engine, ids, 60)
    expected = list(ids)
    for _ in range(60):
        expected.append(int(after(expected).argmax()))
    assert result.ids == expected[100:] and result.reason == "length"
    assert any(broken)


def test_broken_logits_at_a_right_guess_end_that_sequence_alone():
    def after(ids):
        row = np.eye(N_VOCAB, dtype=np.float32)[(ids[-1] + 1) % 40]
        return row * np.nan if ids[0] == 0 and len(ids) == 100 else row

    with running(FakeExecutor(after=after)) as engine:
        bad, good = (engine.submit([first, *range(60)][:60], params=GREEDY, max_tokens=70)
                     for first in (0, 1))
        result = read(bad)
        assert result.reason == "error" and isinstance(result.error, KernelError)
        assert len(result.ids) == 40
        assert read(good).reason == "length"


# Pages and prompts come first

def test_no_page_is_taken_for_guesses_alone_unless_it_was_promised(monkeypatch):
    monkeypatch.setattr("tinychat.engine.stepper.PROMISED_TOKENS", 0)
    executor = FakeExecutor(after=copying, n_pages=16)
    with running(executor, n_ctx=256, parallel=4) as engine:
        def before_step(batch):
            for seq in engine._stepper.running:
                if seq.generating:
                    assert seq.lease.n_pages == n_pages_for(seq.n_tokens)

        executor.before_step = before_step
        asked = [prompt(20 + 9 * i, seed=i) for i in range(6)]
        for ids, seq in zip(asked, [engine.submit(ids, params=GREEDY) for ids in asked]):
            assert read(seq).ids == copied_after(ids, 256 - len(ids))
        assert engine.stats.n_preempted and engine.stats.n_accepted


def test_no_step_with_a_prompt_has_guesses():
    executor = FakeExecutor(after=copying)
    with running(executor, chunk=16, parallel=3) as engine:
        n_prompts = {1: prompt(90, seed=1), 2: prompt(200, seed=2), 3: prompt(150, seed=3)}
        sequences = [engine.submit(ids, params=GREEDY, max_tokens=60)
                     for ids in n_prompts.values()]
        wrong = []

        def before_step(batch):
            running = engine._stepper.running
            if not all(seq.generating for seq in running):
                counts = np.bincount(batch.sequences, minlength=4)
                wrong.extend(seq for seq in running if seq.generating and counts[seq.slot] > 1)

        executor.before_step = before_step
        for ids, seq in zip(n_prompts.values(), sequences):
            assert read(seq).ids == copied_after(ids, 60)
        assert not wrong and engine.stats.n_accepted


def test_many_at_once_share_the_rows_of_a_step():
    executor = FakeExecutor(after=copying, max_outputs=10, n_pages=200)
    with running(executor, parallel=4) as engine:
        asked = [prompt(60 + i, seed=i) for i in range(8)]
        for ids, seq in zip(asked, [engine.submit(ids, params=GREEDY, max_tokens=90)
                                    for ids in asked]):
            assert read(seq).ids == copied_after(ids, 90)
        assert engine.stats.n_accepted


# On the kernels

def half_right(texts: list[list[int]], n_vocab: int):
    """A Lookup that knows the texts to come, and has one of its guesses wrong."""
    rng = random.Random(2)

    class Knowing(Lookup):
        def chance(self, n_right):
            return 0.9

        def guesses(self, n):
            tokens = self._tokens
            text, = (text for text in texts if text[:len(tokens)] == tokens)
            guesses = text[len(tokens):len(tokens) + n]
            guesses[rng.randrange(n)] = rng.randrange(n_vocab)
            return guesses

    return Knowing


@pytest.mark.parametrize("name", ["llama3-a.Q4_K", "smollm2-a", "gemma3-vision-a", "cohere2-a",
                                  "deepseek3-a", "gpt-oss-a.MXFP4"])
@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "sampled"])
def test_the_kernels_answer_the_same_bit_for_bit(name, seed, monkeypatch):
    executor = native(load_golden(name).path, n_pages=60, n_window_pages=120, max_tokens=128)
    n_vocab = executor.program.n_vocab
    prompts = [random.Random(n).choices(range(n_vocab), k=n) for n in (2, 30, 60)]
    try:
        plain, _ = answers(executor, prompts, 90, n_ctx=160, seed=seed, prompt_lookup=False)
        texts = [ids + answer for ids, (answer, _) in zip(prompts, plain)]
        monkeypatch.setattr("tinychat.engine.drafting.StepTimes", lambda: CHEAP)
        monkeypatch.setattr("tinychat.engine.drafting.Lookup", half_right(texts, n_vocab))
        guessed, stats = answers(executor, prompts, 90, n_ctx=160, seed=seed)
    finally:
        executor.close()
    assert guessed == plain
    assert stats.n_drafted - 50 > stats.n_accepted > 50


VERSE = """The owl looked down upon the town, the town looked up and saw the owl, and in between the
night went by with nothing but a hat, a scarf, and seven small umbrellas made of tin."""


def test_a_real_model_repeats_a_text_in_fewer_steps(smollm2_path, monkeypatch):
    monkeypatch.setattr("tinychat.engine.drafting.StepTimes", lambda: CHEAP)
    said, steps = {}, {}
    for lookup in (False, True):
        with tinychat.load(smollm2_path, context_length=512, prompt_lookup=lookup) as model:
            answer = model.chat(f"Repeat this text word for word:\n\n{VERSE}", temperature=0,
                                max_output_tokens=60)
            said[lookup] = answer["output"], answer["stats"]["total_output_tokens"]
            loaded, = model.library.instances()
            steps[lookup] = loaded.engine.stats.n_steps
    assert said[True] == said[False]
    assert steps[True] < steps[False] / 2
