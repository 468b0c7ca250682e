"""Random engines and prompts: few pages, windows, states, images, cancellations.

Every answer is the one its tokens decide, and all is given back. The executor checks windows and
states at each step.
"""
import random

import numpy as np
import pytest
from helpers_engine import GREEDY, FakeExecutor, answer_after, check_pages, read

from tinychat.engine import Engine, PlacedImage
from tinychat.engine.window_pages import n_window_pages_for

N_RUNS_EACH, SEEDS = 12, range(8)


def random_engine(rng: random.Random) -> Engine:
    parallel, n_ctx = rng.choice([1, 2, 4]), rng.choice([128, 256])
    max_tokens, kind, more = rng.choice([64, 96, 256]), rng.choice(["", "w", "s", "ws"]), {}
    if "w" in kind:
        window = rng.choice([1, 5, 33, 70])
        least = n_window_pages_for(window, n_sequences=parallel + 1, max_tokens=max_tokens)
        more.update(window=window, n_window_pages=least + rng.choice([0, 5]))
    if "s" in kind:
        more.update(states=(1,), n_states=parallel + 1 + rng.choice([0, 1, 4]))
    if rng.random() < 0.4:
        more.update(input_width=6, n_axes=rng.choice([0, 3]), n_spans=1)
    n_pages = rng.choice([n_ctx // 32, n_ctx // 32 + 3, 20])
    return Engine(FakeExecutor(n_pages=n_pages, max_tokens=max_tokens, **more), n_ctx=n_ctx,
                  parallel=parallel, chunk=rng.choice([7, 40, 64, 200]))


def random_prompt(rng: random.Random, engine: Engine, base: list[int]) -> tuple[list[int], tuple]:
    """Tokens that begin as others do, and sometimes an image among them."""
    n = rng.randrange(1, engine.n_ctx - 40)
    n_shared = rng.randrange(min(n, len(base)) + 1)
    ids = base[:n_shared] + [rng.randrange(97) for _ in range(n - n_shared)]
    executor = engine._stepper.executor
    if not executor.program.input_width or n <= 20 or rng.random() < 0.4:
        return ids, ()
    first = rng.randrange(n - 10)
    n_rows = min(rng.randrange(1, n - first), executor.limits.max_tokens - engine.parallel)
    ids[first:first + n_rows] = [0] * n_rows                    # as a placeholder is the same
    rows = np.zeros((n_rows, executor.program.input_width), np.float32)
    return ids, (PlacedImage(first, rows, None, n_rows, bytes([rng.randrange(3)]) * 16,
                             rng.random() < 0.5),)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_meets_each_answer_is_its_own_and_everything_returns(seed):
    rng = random.Random(seed)
    for _ in range(N_RUNS_EACH):
        engine, asked = random_engine(rng), []
        base = [rng.randrange(97) for _ in range(100)]
        for _ in range(rng.randrange(2, 14)):
            ids, images = random_prompt(rng, engine, base)
            asked.append((ids, engine.submit(ids, params=GREEDY, images=images,
                                             max_tokens=rng.randrange(1, 60))))
            if rng.random() < 0.2:
                engine.cancel(rng.choice(asked)[1])
            if rng.random() < 0.1:
                engine.logits(ids[:30])
        for ids, sequence in asked:
            result = read(sequence)
            assert result.error is None
            assert result.ids == answer_after(ids, len(result.ids))
        assert engine.close()
        check_pages(engine._stepper.cache, [])
