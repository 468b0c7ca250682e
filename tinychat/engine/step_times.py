"""What a step takes by its number of tokens, learnt from the steps themselves."""
from collections import OrderedDict
from dataclasses import dataclass

PRIOR_FIXED = 7     # tokens that cost as much as a step does at all, as long as nothing is known
PACE = 1 / 8        # of what is learnt of the machine from one step
FORGET_AFTER = 500  # steps without one of that size: perhaps it is cheaper now


@dataclass
class Size:
    """Steps of one number of tokens: how long they take, how many there were, when the last was."""

    units: float
    n_seen: int = 0
    last: int = 0


class StepTimes:
    """How long a step takes by its number of tokens, in units that mean nothing: only their ratios
    count.

    Kernels work in tiles, so a token more may cost nothing or a lot: each size has its own figure.
    One level for all follows what makes steps of any size slower, such as longer texts.
    """

    def __init__(self):
        self._level = 0.0                                    # seconds of a unit
        self._sizes: OrderedDict[int, Size] = OrderedDict()  # the one seen longest ago first
        self._n_steps = 0

    def add(self, n_tokens: int, seconds: float) -> None:
        self._n_steps += 1
        self._level = self._level or max(seconds, 1e-9) / _prior(n_tokens)
        size = self._sizes.setdefault(n_tokens, Size(self.of(n_tokens)))
        error = min(max(seconds / self._level / size.units, 0.5), 2) - 1  # it may be interrupted
        pace = max(1 / (size.n_seen + 1), PACE / 4)
        size.units *= 1 + error * pace
        self._level *= 1 + error * PACE * (1 - pace)
        size.n_seen, size.last = size.n_seen + 1, self._n_steps
        self._sizes.move_to_end(n_tokens)
        oldest = next(iter(self._sizes))
        if self._sizes[oldest].last < self._n_steps - FORGET_AFTER:
            del self._sizes[oldest]

    def of(self, n_tokens: int) -> float:
        """What a step of that size takes, or would take between those nearest to it."""
        if size := self._sizes.get(n_tokens):
            return size.units
        below = max((n for n in self._sizes if n < n_tokens), default=None)
        above = min((n for n in self._sizes if n > n_tokens), default=None)
        if below and above:
            low, high = self._sizes[below].units, self._sizes[above].units
            return low + (high - low) * (n_tokens - below) / (above - below)
        if near := below or above:
            return self._sizes[near].units * _prior(n_tokens) / _prior(near)
        return _prior(n_tokens)


def _prior(n_tokens: int) -> float:
    return PRIOR_FIXED + n_tokens
