"""The promise: a chat's tokens and logits are the same bit for bit alone, in a crowd, prefilled in
chunks of any size, continued from cached pages, and after having made room for others.

It is the native executor's promise; NumPy's matrix products may round a batch in another way.
"""
import random
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from helpers_engine import read
from helpers_golden import ISA_LEVELS, load_golden

from tinychat.engine import Engine, SamplingParams
from tinychat.gguf_file import open_gguf
from tinychat.models import build_program
from tinychat.ops.program import PAGE_TOKENS

MODELS = ("llama3-a.Q4_0", "llama3-a.Q4_K", "llama3-a.Q8_0", "llama3-a.MXFP4", "qwen3-a.Q2_K",
          "smollm2-a", "granite3-a", "qwen2-a", "gemma3-vision-a", "cohere2-a", "glm4-a",
          "deepseek3-a", "gpt-oss-a.MXFP4", "granite4-h-tiny-a", "lfm2moe-a", "qwen3.5-a")


class Recorder:
    """The executor, keeping the bits of each row it sampled from, by the identity of `params`."""

    def __init__(self, executor):
        self._executor = executor
        self.rows: dict[int, list[bytes]] = {}

    def __getattr__(self, name):
        return getattr(self._executor, name)

    def sample(self, logits, params, recent_ids, coin):
        self.rows.setdefault(id(params), []).append(logits.tobytes())
        return self._executor.sample(logits, params, recent_ids, coin)


def answers(executor, prompts, n, *, n_ctx, seed=None, **settings):
    """[(ids, rows)] of prompts that run together, and the engine's stats at their end."""
    recorder = Recorder(executor)
    fields = {"temperature": 0} if seed is None else {"temperature": 1.3, "repeat_penalty": 1.1}
    params = [SamplingParams(**fields) for _ in prompts]
    engine = Engine(recorder, n_ctx=n_ctx, **settings)
    try:
        sequences = [engine.submit(ids, params=p, max_tokens=n, seed=seed)
                     for ids, p in zip(prompts, params)]
        results = [read(seq) for seq in sequences]
        assert [result.reason for result in results] == ["length"] * len(prompts)
        stats = engine.stats
    finally:
        assert engine.close()
    return [(r.ids, recorder.rows[id(p)]) for r, p in zip(results, params)], stats


def native(path, isa="best", **limits):
    if find_spec("tinychat._kernels") is None:
        pytest.skip("no compiled kernels")
    from tinychat.ops.native import NativeExecutor, isa_levels
    if isa != "best" and isa not in isa_levels():
        pytest.skip(f"this machine has no {isa}")
    with open_gguf(path) as file:
        return NativeExecutor(build_program(file), isa=None if isa == "best" else isa, **limits)


def prompts_of(executor, lengths) -> list[list[int]]:
    return [random.Random(n).choices(range(executor.program.n_vocab), k=n) for n in lengths]


@pytest.fixture(scope="module", params=[(name, isa) for name in MODELS for isa in ISA_LEVELS],
                ids=" ".join)
def golden(request):
    """Executors of one golden model with 1 and 3 threads, prompts, and each one's answer alone."""
    name, isa = request.param
    path = load_golden(name).path
    limits = dict(n_pages=24, n_window_pages=64, max_tokens=128)
    one, three = (native(path, isa, threads=threads, **limits) for threads in (1, 3))
    prompts = prompts_of(one, (1, 9, 33, 70, 100))
    alone = [answers(one, [ids], 12, n_ctx=160)[0][0] for ids in prompts]
    one.close()
    yield SimpleNamespace(executor=three, prompts=prompts, alone=alone)
    three.close()


@pytest.mark.parametrize("settings", [
    dict(parallel=1, chunk=1), dict(parallel=5), dict(parallel=5, chunk=7),
    dict(parallel=3, chunk=50)], ids=str)
def test_answers_are_the_same_bit_for_bit_however_they_are_batched(golden, settings):
    assert answers(golden.executor, golden.prompts, 12, n_ctx=160, **settings)[0] == golden.alone


def test_answers_are_the_same_from_cached_pages(golden):
    twice, stats = answers(golden.executor, golden.prompts * 2, 12, n_ctx=160, parallel=1)
    assert twice == golden.alone * 2
    assert stats.n_reused_tokens >= (1 + 2 + 3) * PAGE_TOKENS


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    executor = native(smollm2_path, n_pages=96, max_tokens=512)
    yield executor
    executor.close()


def test_real_model_answers_the_same_alone_in_a_crowd_and_in_chunks(smollm2):
    prompts = prompts_of(smollm2, (5, 60, 600))
    alone = [answers(smollm2, [ids], 24, n_ctx=1024)[0][0] for ids in prompts]
    for settings in (dict(parallel=3, chunk=512), dict(parallel=3, chunk=7)):
        assert answers(smollm2, prompts, 24, n_ctx=1024, **settings)[0] == alone
    assert answers(smollm2, prompts[:2], 24, n_ctx=1024, parallel=2, chunk=1)[0] == alone[:2]


def test_real_model_answers_the_second_turn_the_same_from_the_first_ones_pages(smollm2):
    first, other, new = prompts_of(smollm2, (90, 70, 25))
    (ids, _), = answers(smollm2, [first], 24, n_ctx=1024)[0]
    second = [*first, *ids, *new]
    alone = [answers(smollm2, [ids], 24, n_ctx=1024)[0][0] for ids in (first, other, second)]
    together, stats = answers(smollm2, [first, other, second], 24, n_ctx=1024, parallel=1)
    assert together == alone
    assert stats.n_prefilled_tokens == 90 + 70 + 1 + 25


def test_real_model_draws_the_same_with_a_seed(smollm2):
    prompts = prompts_of(smollm2, (5, 60, 90))
    alone = [answers(smollm2, [ids], 24, n_ctx=1024, seed=7)[0][0] for ids in prompts]
    assert answers(smollm2, prompts, 24, n_ctx=1024, seed=7, chunk=32)[0] == alone


def test_real_model_goes_on_unchanged_after_making_room(smollm2_path, monkeypatch):
    monkeypatch.setattr("tinychat.engine.stepper.PROMISED_TOKENS", 0)
    executor = native(smollm2_path, n_pages=8, max_tokens=64)
    prompts = prompts_of(executor, (40, 50, 60))
    alone = [answers(executor, [ids], 100, n_ctx=256)[0][0] for ids in prompts]
    together, stats = answers(executor, prompts, 100, n_ctx=256, parallel=3)
    executor.close()
    assert together == alone
    assert stats.n_preempted > 0
