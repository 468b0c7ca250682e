"""From one row of logits to a token id: the meaning of sampling, in NumPy. The kernels have a twin.

Order: repeat penalty, rank and top_k, top_p, min_p, temperature, draw. The three filters look at
the probabilities before temperature. What a twin must agree on:

- A logit that is NaN or infinite is never chosen; a row without a finite logit is a KernelError.
- The penalty is computed in float64, clamped to the finite float32 range, rounded to float32.
- Greedy (temperature 0, top_k 1 or top_p 0): the highest logit after the penalty, the lowest id of
  equals.
- Otherwise candidates are ranked by logit descending, then id ascending, so that every filter keeps
  the first so many of them, and never none.
- From there on x = float64(logit) - float64(highest), and all sums are float64 in order of rank. A
  twin may round exp and the sums in another way, to a relative 1e-6: it may then differ only where
  `coin` or `top_p` lies that close to a cumulative sum.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinychat.errors import InvalidRequest, KernelError

FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_TOP_K = 2**31 - 1  # what the kernels take; any vocabulary is smaller


@dataclass(frozen=True)
class SamplingParams:
    """The contract's five fields, and how many of the last tokens the penalty looks at.

    Raises: InvalidRequest naming the field that is out of range.
    """

    temperature: float = 0.8     # 0: greedy
    top_p: float = 0.95          # 1: off, 0: only the most probable
    top_k: int = 40              # 0: off
    min_p: float = 0.05          # 0: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64      # prompt tokens count

    def __post_init__(self):
        self._check("temperature", 0 <= self.temperature < math.inf, "a number of at least 0")
        self._check("top_p", 0 <= self.top_p <= 1, "a number from 0 to 1")
        self._check("top_k", 0 <= self.top_k <= MAX_TOP_K, f"an integer from 0 to {MAX_TOP_K}")
        self._check("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1")
        self._check("repeat_penalty", 0 < self.repeat_penalty < math.inf, "a number above 0")
        self._check("repeat_last_n", self.repeat_last_n >= 0, "an integer of at least 0")

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise InvalidRequest(f"expected {expected}, got {getattr(self, name)}", param=name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0


def sample(logits: np.ndarray, params: SamplingParams, recent_ids: Sequence[int],
           coin: float) -> int:
    """One token id from `logits` float32 (V,), which is left as it is.

    recent_ids: the sequence's tokens, prompt and answer, oldest first; the last `repeat_last_n`
    count.
    coin: uniform in [0, 1); it alone decides the draw, so the function is pure.
    Raises: KernelError when no logit is finite.
    """
    logits = penalize(only_finite(logits), recent_ids, params)
    if params.greedy:
        return int(np.argmax(logits))
    ids = rank(logits, params.top_k)
    x = logits[ids].astype(np.float64)
    x -= x[0]
    x = x[:keep_top_p(x, params.top_p)]
    x = x[:keep_min_p(x, params.min_p)]
    return int(ids[draw(x, params.temperature, coin)])


def only_finite(logits: np.ndarray) -> np.ndarray:
    """logits (V,) with -inf in place of NaN and infinities; the same array when all are finite."""
    finite = np.isfinite(logits)
    if finite.all():
        return logits
    if not finite.any():
        raise KernelError(f"expected finite logits, got none among {len(logits)}")
    return np.where(finite, logits, np.float32(-np.inf))


def penalize(logits: np.ndarray, recent_ids: Sequence[int], params: SamplingParams) -> np.ndarray:
    """Each id of the last `repeat_last_n`, once: a positive logit / penalty, another * penalty.

    Ids outside the vocabulary are ignored. Source: llama.cpp, llama_sampler_penalties_apply.
    """
    if params.repeat_penalty == 1 or params.repeat_last_n == 0 or len(recent_ids) == 0:
        return logits
    ids = np.unique(np.asarray(recent_ids[-params.repeat_last_n:], np.int64))
    ids = ids[(ids >= 0) & (ids < len(logits))]
    ids = ids[logits[ids] > -np.inf]
    old = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # a penalty may be as far out as 1e300: clamped below
        new = np.where(old > 0, old / params.repeat_penalty, old * params.repeat_penalty)
    logits = logits.copy()
    logits[ids] = np.clip(new, -FLOAT32_MAX, FLOAT32_MAX)
    return logits


def rank(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Ids by logit descending, then id ascending: the first `top_k` (0: all), without -inf."""
    if 0 < top_k < len(logits):
        floor = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
        ids = np.flatnonzero((logits >= floor) & (logits > -np.inf))
    else:
        top_k, ids = len(logits), np.flatnonzero(logits > -np.inf)
    return ids[np.argsort(-logits[ids], kind="stable")][:top_k]


def keep_top_p(x: np.ndarray, top_p: float) -> int:
    """How many of the ranked x (K,) it takes until their probabilities sum to at least `top_p`."""
    if top_p >= 1:
        return len(x)
    sums = np.cumsum(np.exp(x))
    return min(int(np.searchsorted(sums, top_p * sums[-1], side="left")) + 1, len(x))


def keep_min_p(x: np.ndarray, min_p: float) -> int:
    """How many of the ranked x (K,) are `min_p` times as probable as the first: x >= ln(min_p)."""
    if min_p <= 0:
        return len(x)
    return int(np.count_nonzero(x >= math.log(min_p)))


def draw(x: np.ndarray, temperature: float, coin: float) -> int:
    """The first index whose cumulative exp(x / temperature) exceeds `coin` times their sum."""
    with np.errstate(over="ignore"):  # x / 1e-300 is -inf, whose exp is 0
        sums = np.cumsum(np.exp(x / temperature))
    return min(int(np.searchsorted(sums, coin * sums[-1], side="right")), len(x) - 1)
