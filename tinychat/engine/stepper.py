"""The sequences that run on one executor: their slots and pages, the steps, the tokens they get.

Belongs to one thread; nothing here locks.
"""
import logging
import time
from collections.abc import Callable

import numpy as np

from tinychat.engine.drafting import Drafter
from tinychat.engine.kv_cache import KVCache
from tinychat.engine.scheduler import StepArrays, Work, next_cut, plan_step
from tinychat.engine.sequence import (
    Finished, PromptDone, PromptProgress, PromptStarted, Sequence, Token)
from tinychat.engine.snapshots import Snapshots
from tinychat.engine.window_pages import WindowPages, n_window_pages_for
from tinychat.errors import InvalidRequest, TinychatError
from tinychat.ops.program import PAGE_TOKENS

log = logging.getLogger(__name__)

PROMISED_TOKENS = 256  # a sequence starts when there are pages for its prompt and this much answer


class Stepper:
    """Starts sequences, plans and runs steps, ends sequences.

    Pages are promised for the tokens that a sequence has and PROMISED_TOKENS more, and taken as
    they come after that. When none is left, the youngest makes room: it loses its pages, not its
    tokens, and started again it goes on as if nothing had happened.

    running: in order of arrival. The counters count since the start; tokens computed again count as
    prefilled, reused ones do not.
    Raises: InvalidRequest when the executor is too small.
    """

    def __init__(self, executor, *, n_ctx: int, parallel: int, chunk: int, prompt_lookup: bool):
        _check_limits(executor, n_ctx=n_ctx, parallel=parallel, chunk=chunk)
        self.executor = executor
        self.cache = _make_cache(executor, parallel + 1)
        self.running: list[Sequence] = []
        self.n_prefilled = self.n_reused = self.n_generated = self.n_steps = self.n_preempted = 0
        self.n_drafted = self.n_accepted = 0
        self._chunk = min(chunk, executor.limits.max_tokens)
        self._has_states = bool(executor.program.states)
        self.drafter = Drafter(min(executor.limits.max_tokens, executor.limits.max_outputs)) \
            if prompt_lookup and not self._has_states else None  # a state cannot be cut back
        self._arrays = StepArrays(executor.program, max_tokens=executor.limits.max_tokens,
                                  n_slots=parallel + 1, n_ctx=n_ctx)
        self._free_slots = list(range(parallel))
        self._spare_slot = parallel  # for logits()

    def start(self, seq: Sequence) -> bool:
        """Let a sequence run; False while there is no slot or there are not enough pages."""
        if not self._free_slots:
            return False
        n_positions = min(seq.n_tokens + PROMISED_TOKENS, len(seq.ids) - 1)  # the last has no keys
        lease = self._arrays.lease(self._free_slots[-1], seq.whole)
        n_done = self.cache.open(lease, seq.keys[:seq.n_tokens], n_positions)
        if n_done is None:
            return False
        seq.lease, seq.n_done = lease, n_done
        seq.slot = self._free_slots.pop()
        self.running.append(seq)
        if not seq.preempted:
            seq.n_cached = seq.n_done
            seq.t_started = time.perf_counter()
            seq.put(PromptStarted())
        return True

    def end(self, seq: Sequence, reason: str, error: TinychatError | None = None) -> None:
        """What the sequence computed stays for whoever goes on; after a fault nothing idle does."""
        self._stop(seq, keep=error is None)
        if error is not None:
            self.cache.clear()
        _log_end(seq, reason)
        seq.finish(Finished(reason, error))

    def plan(self) -> tuple[Work, list[Sequence]]:
        """The next step's work, its pages taken; and those that made room, youngest first."""
        for seq in self.running:
            if not seq.generating:
                self._reuse_more(seq)
        work = plan_step(self.running, max_tokens=self.executor.limits.max_tokens,
                         chunk=self._chunk, cuts=self._has_states)
        preempted = []
        for seq, n in work:
            while seq.lease and not self.cache.grow(seq.lease, seq.n_done + n):
                preempted.append(self._preempt())  # the oldest never: alone it fits
        work = [(seq, n) for seq, n in work if seq.lease]
        return self._with_guesses(work), preempted

    def run(self, work: Work) -> None:
        """One step of the executor, and all that follows. Raises: whatever the executor does."""
        start = time.perf_counter()
        logits = self.executor.step(self._arrays.fill(work))
        now = time.perf_counter()
        self.n_steps += 1
        if self.drafter and all(seq.generating for seq, _ in work):
            self.drafter.times.add(sum(n for _, n in work), now - start)
        row = 0
        for seq, n in work:
            n_guesses = max(0, n - seq.n_pending)
            if self._advance(seq, n - n_guesses, now):
                self._sample(seq, logits[row:row + 1 + n_guesses], now)
                row += 1 + n_guesses

    def logits(self, seq: Sequence, between_steps: Callable[[], None]) -> np.ndarray | None:
        """float32 (n_prompt, n_vocab) of a sequence that does not run; None for want of pages.

        between_steps: called before each step; may raise.
        """
        seq.slot = self._spare_slot
        lease = self._arrays.lease(seq.slot)
        if self.cache.open(lease, seq.keys, seq.n_prompt, reuse=False) is None:
            return None
        seq.lease = lease
        try:
            return self._all_logits(seq, between_steps)
        finally:
            self.cache.close(seq.lease, seq.keys, seq.n_done, keep=False)

    def _all_logits(self, seq: Sequence, between_steps: Callable[[], None]) -> np.ndarray:
        out = np.empty((seq.n_prompt, self.executor.program.n_vocab), np.float32)
        while seq.n_pending:
            between_steps()
            n = min(seq.n_pending, self._chunk, self.executor.limits.max_outputs)
            self.cache.grow(seq.lease, seq.n_done + n)
            batch = self._arrays.fill([(seq, n)], all_rows=True)
            out[seq.n_done:seq.n_done + n] = self.executor.step(batch)
            seq.n_done += n
            self.cache.file(seq.lease, seq.keys, seq.n_done)
        return out

    def _reuse_more(self, seq: Sequence) -> None:
        """Skip what a sequence with the same beginning has computed since this one was started."""
        n_done = self.cache.extend(seq.lease, seq.keys[:seq.n_tokens], seq.n_done)
        if not seq.preempted:
            seq.n_cached += n_done - seq.n_done
        seq.n_done = n_done

    def _with_guesses(self, work: Work) -> Work:
        """Guesses take part where they pay, unless they would delay a prompt that is under way."""
        if not (self.drafter and work and all(seq.generating for seq in self.running)):
            return work
        work = self.drafter.extend(work)
        for seq, n in work:
            self.cache.grow(seq.lease, seq.n_done + n)  # these pages are promised
            self.n_drafted += n - 1
        return work

    def _preempt(self) -> Sequence:
        seq = self.running[-1]
        log.debug("sequence %d makes room", seq.id)
        self.n_preempted += 1
        seq.preempted = True
        self._stop(seq, keep=True)
        return seq

    def _stop(self, seq: Sequence, *, keep: bool) -> None:
        self.running.remove(seq)
        self.cache.close(seq.lease, seq.keys, seq.n_done, keep=keep)
        self._free_slots.append(seq.slot)
        seq.lease, seq.slot = None, -1

    def _advance(self, seq: Sequence, n: int, now: float) -> bool:
        """Account for `n` tokens computed; whether the step has logits for the sequence."""
        was_generating = seq.generating
        seq.n_done += n
        if seq.n_done % PAGE_TOKENS < n:  # a page is full
            self.cache.file(seq.lease, seq.keys, seq.n_done)
        if was_generating:
            return True
        if self._has_states and seq.n_done == next_cut(seq.n_done - n, seq.n_tokens):
            self.cache.snapshot(seq.lease)
        self.n_prefilled += n
        if not seq.n_generated:
            self._tell_progress(seq, now)
        return seq.n_pending == 0

    def _tell_progress(self, seq: Sequence, now: float) -> None:
        if seq.n_pending:
            seq.put(PromptProgress(seq.n_done, seq.n_prompt))
            return
        self.n_reused += seq.n_cached
        seq.t_prompt_done = now
        seq.put(PromptDone(now))

    def _sample(self, seq: Sequence, rows: np.ndarray, now: float) -> None:
        """A token of each row, up to the first that is not the one guessed: what was computed
        behind a wrong guess means nothing, and is written over.

        rows: float32 (1 + guesses, n_vocab).
        """
        for i, logits in enumerate(rows):
            if i:  # as if a step of its own had computed the guess
                self.n_accepted += 1
                seq.lookup.credit += 1
                self._advance(seq, 1, now)
            guess = seq.ids[seq.n_tokens]
            if self._take(seq, logits) != guess or seq.finished or seq.cancelled:
                return

    def _take(self, seq: Sequence, logits: np.ndarray) -> int | None:
        """The sequence's next token; None where there is none to be had."""
        try:
            id = seq.sampler.next(self.executor, logits, seq.recent_ids())
        except TinychatError as error:  # its own numbers are broken, the others' are not
            self.end(seq, "error", error)
            return None
        self.n_generated += 1
        reason = seq.append(id)
        seq.put(Token(id, time.perf_counter()))  # choosing it is part of its time
        if reason:
            self.end(seq, reason)
        return id


def _make_cache(executor, n_slots: int) -> KVCache:
    """The states of running sequences are in the places of their slots, snapshots in the others."""
    program, limits = executor.program, executor.limits
    window = WindowPages(limits.n_window_pages, program.window) if program.window else None
    snapshots = Snapshots(range(n_slots, limits.n_states), executor.copy_state) \
        if program.states else None
    return KVCache(limits.n_pages, window, snapshots)


def _check_limits(executor, *, n_ctx: int, parallel: int, chunk: int) -> None:
    limits, window = executor.limits, executor.program.window
    n_positions = limits.n_pages * PAGE_TOKENS
    if not 1 < n_ctx <= n_positions:
        raise InvalidRequest(f"expected a context length from 2 to {n_positions}, which the KV "
                             f"pages hold, got {n_ctx}", param="context_length")
    most = min(limits.max_tokens, limits.max_outputs, limits.max_sequences - 1)
    if executor.program.states:
        most = min(most, limits.n_states - 1)
    if window and limits.n_window_pages < n_window_pages_for(
            window, n_sequences=parallel + 1, max_tokens=limits.max_tokens):
        raise InvalidRequest(f"{limits.n_window_pages} window pages are too few for windows of "
                             f"{window} tokens", param="parallel")
    if not 1 <= parallel <= most:
        raise InvalidRequest(f"expected from 1 to {most} parallel requests, got {parallel}",
                             param="parallel")
    if chunk < 1:
        raise InvalidRequest(f"expected a chunk of at least 1 token, got {chunk}", param="chunk")


def _log_end(seq: Sequence, reason: str) -> None:
    """One line per sequence, without its contents."""
    end = time.perf_counter()
    prompt_s, answer_s = seq.t_prompt_done - seq.t_started, end - seq.t_prompt_done
    log.debug("sequence %d: %d tokens in, %d cached, prefill %.1f tok/s, %d out, decode %.1f tok/s, "
              "%.2f s, %s", seq.id, seq.n_prompt, seq.n_cached,
              _rate(seq.n_prompt - seq.n_cached, prompt_s), seq.n_generated,
              _rate(seq.n_generated, answer_s), end - seq.t_submitted, reason)


def _rate(n: int, seconds: float) -> float:
    return n / seconds if n and seconds > 0 else 0.0
