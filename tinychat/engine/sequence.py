"""One request as the engine sees it: its tokens, where it stands, what its submitter is told."""
import itertools
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tinychat.engine.images import PlacedImage, axes_of, both_ways, keys_of
from tinychat.engine.kv_cache import Lease
from tinychat.engine.lookup import Lookup
from tinychat.engine.sampler import Sampler
from tinychat.errors import TinychatError


@dataclass(frozen=True)
class PromptStarted:
    """The sequence left the queue."""


@dataclass(frozen=True)
class PromptProgress:
    """`done` of the prompt's `total` tokens are in the cache, those reused included."""

    done: int
    total: int


@dataclass(frozen=True)
class PromptDone:
    t: float  # time.perf_counter() at the end of the step


@dataclass(frozen=True)
class Token:
    """One sampled token; the one that ends the turn comes too."""

    id: int
    t: float


@dataclass(frozen=True)
class Finished:
    """The last update. reason: stop, length (max_tokens), context (n_ctx), cancelled, error."""

    reason: str
    error: TinychatError | None = None


Update = PromptStarted | PromptProgress | PromptDone | Token | Finished

_ids = itertools.count(1)


class Sequence:
    """The submitter reads `id`, `n_prompt`, `n_cached` (final at PromptDone) and `updates()`.

    The rest belongs to the engine. The tokens are `ids[:n_tokens]`, prompt first; keys and values
    of the first `n_done` are computed. There will never be more than len(ids) tokens; what stands
    behind n_tokens are guesses at most. In `keys` the tokens of images are told apart by what was
    seen.
    """

    def __init__(self, prompt: np.ndarray, *, sampler: Sampler, max_tokens: int | None,
                 stop_ids: frozenset[int], n_ctx: int, images: tuple[PlacedImage, ...] = (),
                 on_finish: Callable[[], None] = lambda: None):
        self.id = next(_ids)
        self.n_prompt = len(prompt)
        self.n_cached = 0
        self.sampler = sampler
        self.stop_ids = stop_ids
        self._on_finish = on_finish
        limit, self.full_reason = n_ctx, "context"
        if max_tokens is not None and self.n_prompt + max_tokens <= n_ctx:
            limit, self.full_reason = self.n_prompt + max_tokens, "length"
        self.ids = np.empty(limit, np.int32)
        self.ids[:self.n_prompt] = prompt
        self.images = images
        self.whole = both_ways(images)   # runs of tokens that no step may cut
        self.keys = self.ids             # what prompts are compared by
        self._axes: np.ndarray | None = None
        self._next_turn = 0
        if images:
            self.keys = np.empty(limit, np.int32)
            self.keys[:self.n_prompt] = keys_of(prompt, images)
        self.n_tokens = self.n_prompt
        self.n_done = 0
        self.cancelled = False
        self.preempted = False           # it has run before
        self.finished: Finished | None = None
        self.lease: Lease | None = None  # while it runs
        self.slot = -1                   # its row of the page table, while it runs
        self.lookup: Lookup | None = None  # once it is worth guessing
        self.t_submitted = self.t_started = self.t_prompt_done = time.perf_counter()
        self._updates: queue.SimpleQueue[Update] = queue.SimpleQueue()

    @property
    def n_generated(self) -> int:
        return self.n_tokens - self.n_prompt

    @property
    def n_pending(self) -> int:
        """Tokens known and not computed."""
        return self.n_tokens - self.n_done

    @property
    def generating(self) -> bool:
        """Only the token sampled last is pending."""
        return self.n_tokens > self.n_prompt and self.n_tokens - self.n_done == 1

    def turns(self, begin: int, n: int, n_axes: int) -> np.ndarray:
        """What ropes turn tokens begin … begin+n-1 by: int32 (n, n_axes)."""
        if self._axes is None:
            self._axes, self._next_turn = axes_of(self.n_prompt, self.images, n_axes)
        behind = begin + np.arange(n, dtype=np.int32) - self.n_prompt + self._next_turn
        out = np.repeat(behind[:, None], n_axes, 1)
        of_prompt = self._axes[begin:begin + n]
        out[:len(of_prompt)] = of_prompt
        return out

    def recent_ids(self) -> np.ndarray:
        return self.ids[max(0, self.n_tokens - self.sampler.params.repeat_last_n):self.n_tokens]

    def append(self, id: int) -> str | None:
        """Add a sampled token; returns the reason when it is the last."""
        self.ids[self.n_tokens] = self.keys[self.n_tokens] = id
        self.n_tokens += 1
        if self.lookup:
            self.lookup.add(id)
        if id in self.stop_ids:
            return "stop"
        return self.full_reason if self.n_tokens == len(self.ids) else None

    def put(self, update: Update) -> None:
        self._updates.put(update)

    def finish(self, finished: Finished) -> None:
        """Send the last update, once."""
        if self.finished is None:
            self.finished = finished
            self._on_finish()  # first: who reads the last update may rely on it
            self._updates.put(finished)

    def updates(self, timeout: float | None = None) -> "Updates":
        """What happens to the sequence, in order, for one reader; ends after Finished.

        timeout: seconds to wait for each update. When none came in time the iterator raises
        TimeoutError and may be asked again.
        """
        return Updates(self._updates, timeout)


class Updates(Iterator[Update]):
    """Not a generator, because a generator is over once it has raised."""

    def __init__(self, source: "queue.SimpleQueue[Update]", timeout: float | None):
        self._source = source
        self._timeout = timeout
        self._over = False

    def __next__(self) -> Update:
        if self._over:
            raise StopIteration
        try:
            update = self._source.get(timeout=self._timeout)
        except queue.Empty:
            raise TimeoutError(f"no update within {self._timeout} s") from None
        self._over = type(update) is Finished
        return update
