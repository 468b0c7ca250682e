"""The random state of one sequence. `ops/sampling.py` says what sampling means; executors do it."""
import random

import numpy as np

from tinychat.ops.sampling import SamplingParams

__all__ = ["Sampler", "SamplingParams"]


class Sampler:
    """Draws one sequence's tokens: one coin each, whatever the settings, so a seed fixes them all.

    seed: any integer; None takes the operating system's randomness.
    """

    def __init__(self, params: SamplingParams, seed: int | None):
        self.params = params
        self._coin = random.Random(seed).random

    def next(self, executor, logits: np.ndarray, recent_ids: np.ndarray) -> int:
        """logits: float32 (V,); recent_ids: int32, the last tokens of prompt and answer."""
        return executor.sample(logits, self.params, recent_ids, self._coin())
