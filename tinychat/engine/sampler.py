"""The random state of one sequence. `ops/sampling.py` says what sampling means; executors do it."""
import logging
import random
from typing import Protocol

import numpy as np

from tinychat.ops.sampling import SamplingParams

__all__ = ["Guide", "Sampler", "SamplingParams"]

log = logging.getLogger(__name__)

MAX_REFUSALS = 4  # single tokens, before all that may come are looked up


class Guide(Protocol):
    """Judges tokens while it is active; knows what they mean, which nobody here does.

    decided: after one refused token nothing but the mask is worth a look.
    """

    active: bool
    decided: bool

    def allows(self, id: int) -> bool: ...

    def mask(self) -> np.ndarray | None:
        """bool (V,): what may come next; None: anything."""

    def accept(self, id: int) -> None:
        """Takes note of the token that was chosen, active or not."""


class Sampler:
    """Draws one sequence's tokens: one coin each, whatever the settings, so a seed fixes them all.

    seed: any integer; None takes the operating system's randomness. guide: refuses tokens, each of
    which takes one more coin.
    """

    def __init__(self, params: SamplingParams, seed: int | None, guide: Guide | None = None):
        self.params = params
        self._coin = random.Random(seed).random
        self._guide = guide

    def next(self, executor, logits: np.ndarray, recent_ids: np.ndarray) -> int:
        """logits: float32 (V,); recent_ids: int32, the last tokens of prompt and answer."""
        id = executor.sample(logits, self.params, recent_ids, self._coin())
        if self._guide is None:
            return id
        try:
            if self._guide.active and not self._guide.allows(id):
                id = self._allowed(id, executor, logits, recent_ids)
            self._guide.accept(id)
        except Exception:  # a fault of the guide is not the sequence's, nor the other ones'
            log.exception("a guide failed: its sequence goes on without it")
            self._guide = None
        return id

    def _allowed(self, id: int, executor, logits: np.ndarray, recent_ids: np.ndarray) -> int:
        """What is refused has no probability, and the draw is made again: mostly that is cheaper
        than to look at every token."""
        logits = logits.copy()
        for _ in range(0 if self._guide.decided else MAX_REFUSALS):
            logits[id] = -np.inf
            id = executor.sample(logits, self.params, recent_ids, self._coin())
            if self._guide.allows(id):
                return id
        mask = self._guide.mask()
        if mask is None:
            return id
        logits[~mask] = -np.inf
        return executor.sample(logits, self.params, recent_ids, self._coin())
