"""The step loop of one loaded model, and its one thread: token ids in, token ids out; no text.

Any thread may submit, cancel and close. The engine's thread alone touches the executor, the KV
pages and the sequences that run; what passes between threads is under one lock, or goes through a
sequence's queue.
"""
import atexit
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from tinychat.engine.kv_cache import KVCache
from tinychat.engine.sampler import Sampler, SamplingParams
from tinychat.engine.scheduler import StepArrays, Work, plan_step
from tinychat.engine.sequence import (
    Finished, PromptDone, PromptProgress, PromptStarted, Sequence, Token)
from tinychat.errors import (
    ContextOverflow, InvalidRequest, KernelError, Overloaded, TinychatError)
from tinychat.ops.program import PAGE_TOKENS

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0  # how long close() waits for a step that is under way
PROMISED_TOKENS = 256   # a sequence starts when there are pages for its prompt and this much answer


@dataclass(frozen=True)
class Stats:
    """Counters since the start, then the state of now. Reused tokens do not count as prefilled."""

    n_prefilled_tokens: int
    n_reused_tokens: int
    n_generated_tokens: int
    n_steps: int
    n_preempted: int
    running: int
    waiting: int
    free_pages: int
    n_pages: int


class Engine:
    """Runs many sequences at once on one executor.

    n_ctx: tokens a sequence may have, prompt and answer; parallel: sequences at once; queue_limit:
    how many more may wait; chunk: prompt tokens in one step.

    Pages are promised for the prompt and the first PROMISED_TOKENS of the answer, and taken as they
    come after that. When none is left, the youngest sequence waits again: it loses its pages, not
    its tokens, and its answer goes on as if nothing had happened once they are computed anew.

    Raises: InvalidRequest when the executor is too small for that.
    """

    def __init__(self, executor, *, n_ctx: int, parallel: int = 4, queue_limit: int = 64,
                 chunk: int = 512):
        _check_limits(executor, n_ctx=n_ctx, parallel=parallel, chunk=chunk)
        self.n_ctx = n_ctx
        self.parallel = parallel
        self._executor = executor
        self._queue_limit = queue_limit
        self._chunk = min(chunk, executor.max_tokens)
        self._cache = KVCache(executor.n_pages)
        self._arrays = StepArrays(max_tokens=executor.max_tokens, n_slots=parallel + 1, n_ctx=n_ctx)
        self._free_slots = list(range(parallel))  # the last row is for logits()
        self._running: list[Sequence] = []        # in order of arrival; changed under the lock
        self._wake = threading.Condition()        # guards what the threads share
        self._waiting: deque[Sequence] = deque()  # in order of arrival
        self._jobs: deque[tuple[Sequence, Future]] = deque()  # calls of logits()
        self._any_cancelled = False
        self._closing = False
        self._close_error: TinychatError | None = None
        self._n_prefilled = self._n_reused = self._n_generated = 0
        self._n_steps = self._n_preempted = 0
        self._thread = threading.Thread(target=self._run, name="tinychat-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the process must not go down round a thread inside a kernel

    # For any thread

    def submit(self, ids: list[int], *, params: SamplingParams = SamplingParams(),
               max_tokens: int | None = None, stop_ids: frozenset[int] = frozenset(),
               n_ctx: int | None = None, seed: int | None = None) -> Sequence:
        """Queue a prompt. n_ctx limits this sequence further; max_tokens None: to the end of n_ctx.

        Raises: ContextOverflow when the prompt leaves no room for a token; InvalidRequest when it
        is empty or has ids outside the vocabulary, or max_tokens is below 1; Overloaded when the
        queue is full or the engine closing.
        """
        n_ctx = min(n_ctx or self.n_ctx, self.n_ctx)
        ids = self._checked(ids, n_ctx - 1, n_ctx)
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequest(f"expected max_tokens of at least 1, got {max_tokens}",
                                 param="max_tokens")
        seq = Sequence(ids, sampler=Sampler(params, seed), max_tokens=max_tokens,
                       stop_ids=stop_ids, n_ctx=n_ctx)
        with self._wake:
            self._check_open()
            if len(self._waiting) + len(self._running) >= self._queue_limit + self.parallel:
                raise Overloaded(f"{len(self._waiting)} requests are waiting already, "
                                 "as many as may: try again later")
            self._waiting.append(seq)
            self._wake.notify()
        return seq

    def cancel(self, seq: Sequence) -> None:
        """End a sequence with Finished("cancelled"), a running one at the next step.

        May be called at any time and again.
        """
        with self._wake:
            if seq in self._waiting:
                self._waiting.remove(seq)
                seq.finish(Finished("cancelled"))
                return
            seq.cancelled = self._any_cancelled = True
            self._wake.notify()

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 (len(ids), n_vocab): after each token, computed anew between steps of the others.

        Raises: as submit, apart from the queue; KernelError.
        """
        ids = self._checked(ids, self.n_ctx, self.n_ctx)
        seq = Sequence(ids, sampler=Sampler(SamplingParams(), None), max_tokens=None,
                       stop_ids=frozenset(), n_ctx=len(ids))
        seq.slot = self.parallel
        answer: Future = Future()
        with self._wake:
            self._check_open()
            self._jobs.append((seq, answer))
            self._wake.notify()
        return answer.result()

    @property
    def stats(self) -> Stats:
        return Stats(self._n_prefilled, self._n_reused, self._n_generated, self._n_steps,
                     self._n_preempted, len(self._running), len(self._waiting),
                     self._cache.free_pages, self._cache.n_pages)

    def close(self, error: TinychatError | None = None) -> bool:
        """End every sequence with Finished("error", error), and the thread after its step.

        Returns whether the thread has ended: only then may the executor be closed. May be called
        again.
        """
        atexit.unregister(self.close)
        with self._wake:
            if not self._closing:
                self._closing = True
                self._close_error = error or Overloaded("the engine is shutting down")
            self._wake.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("the engine is still in a step after %.0f s", CLOSE_TIMEOUT_S)
            self._tell_all(self._close_error)
        return not self._thread.is_alive()

    def _checked(self, ids, n_most: int, n_ctx: int) -> np.ndarray:
        """ids as int32 (n,), 1 <= n <= n_most, all in the vocabulary: a bad one fails its step."""
        ids = np.asarray(ids)
        if ids.size == 0:
            raise InvalidRequest("expected a prompt of at least one token, got none", param="input")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InvalidRequest(f"expected a list of token ids, got {ids.ndim} dimensions "
                                 f"of {ids.dtype}", param="input")
        if len(ids) > n_most:
            raise ContextOverflow(f"the prompt has {len(ids)} tokens, more than the context length "
                                  f"of {n_ctx} has room for", param="input")
        n_vocab = self._executor.program.n_vocab
        if ids.min() < 0 or ids.max() >= n_vocab:
            raise InvalidRequest(f"expected token ids from 0 to {n_vocab - 1}, got {ids.min()} "
                                 f"to {ids.max()}", param="input")
        return ids.astype(np.int32)

    def _check_open(self) -> None:
        if self._closing:
            raise Overloaded("the engine is shutting down")

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
        finally:  # whatever happened, nobody waits for an engine that is gone
            with self._wake:
                self._closing = True
                self._close_error = self._close_error or KernelError("the engine's thread died")
            for seq in list(self._running):
                self._finish(seq, "error", self._close_error)
            self._tell_all(self._close_error)

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; False once the engine is closing."""
        with self._wake:
            while not (self._closing or self._running or self._waiting or self._jobs):
                self._wake.wait()
            return not self._closing

    def _turn(self) -> None:
        try:
            self._drop_cancelled()
            self._run_jobs()
            self._admit()
            self._step()
        except Exception as error:  # a fault in one step must not end the engine
            log.exception("a step failed")
            self._fail(_as_tinychat_error(error))

    def _drop_cancelled(self) -> None:
        if self._any_cancelled:
            self._any_cancelled = False
            for seq in [seq for seq in self._running if seq.cancelled]:
                self._finish(seq, "cancelled")
            with self._wake:  # one that was cancelled while it was preempted
                for seq in [seq for seq in self._waiting if seq.cancelled]:
                    self.cancel(seq)

    def _admit(self) -> None:
        """Start what waits, in order of arrival, while there are slots and pages."""
        with self._wake:
            while self._waiting and self._free_slots and not self._jobs:
                if not self._start(self._waiting[0]):
                    return
                self._running.append(self._waiting.popleft())

    def _start(self, seq: Sequence) -> bool:
        """Give a sequence a slot and a lease; False while there are not enough pages."""
        n_positions = min(seq.n_tokens + PROMISED_TOKENS, len(seq.ids) - 1)  # the last has no keys
        opened = self._cache.open(self._arrays.pages[self._free_slots[-1]],
                                  seq.ids[:seq.n_tokens], n_positions)
        if opened is None:
            return False
        seq.lease, seq.n_done = opened
        seq.slot = self._free_slots.pop()
        if not seq.preempted:
            seq.n_cached = seq.n_done
            seq.t_started = time.perf_counter()
            seq.put(PromptStarted())
        return True

    def _step(self) -> None:
        for seq in self._running:
            if not seq.generating:
                self._reuse_more(seq)
        work = plan_step(self._running, max_tokens=self._executor.max_tokens, chunk=self._chunk)
        work = self._make_room(work)
        if work:
            logits = self._executor.step(self._arrays.fill(work))
            self._n_steps += 1
            self._deliver(work, logits, time.perf_counter())

    def _reuse_more(self, seq: Sequence) -> None:
        """Skip what a sequence with the same beginning has computed since this one was started."""
        n_done = self._cache.extend(seq.lease, seq.ids[:seq.n_tokens], seq.n_done)
        if not seq.preempted:
            seq.n_cached += n_done - seq.n_done
        seq.n_done = n_done

    def _make_room(self, work: Work) -> Work:
        """Take the pages that `work` fills; returns what remains of it if one had to make room.

        The oldest sequence always gets its pages: alone it fits.
        """
        for seq, n in work:
            while seq.lease and not self._cache.grow(seq.lease, seq.n_done + n):
                self._preempt(self._running[-1])
        return [(seq, n) for seq, n in work if seq.lease]

    def _preempt(self, seq: Sequence) -> None:
        log.debug("sequence %d waits for pages", seq.id)
        self._n_preempted += 1
        seq.preempted = True
        self._stop(seq, keep=True)
        with self._wake:
            self._waiting.appendleft(seq)

    def _deliver(self, work: Work, logits: np.ndarray, now: float) -> None:
        """logits: a row for each sequence in `work` of which nothing remains pending, in order."""
        row = 0
        for seq, n in work:
            was_generating = seq.generating
            seq.n_done += n
            if seq.n_done % PAGE_TOKENS < n:
                self._cache.file(seq.lease, seq.ids, seq.n_done)
            if not was_generating and not self._prefilled(seq, n, now):
                continue
            self._sample(seq, logits[row], now)
            row += 1

    def _prefilled(self, seq: Sequence, n: int, now: float) -> bool:
        """Account for `n` prompt tokens, or tokens computed anew; whether they were the last."""
        self._n_prefilled += n
        if seq.n_generated:
            return seq.n_pending == 0
        if seq.n_pending:
            seq.put(PromptProgress(seq.n_done, seq.n_prompt))
            return False
        self._n_reused += seq.n_cached
        seq.t_prompt_done = now
        seq.put(PromptDone(now))
        return True

    def _sample(self, seq: Sequence, logits: np.ndarray, now: float) -> None:
        try:
            id = seq.sampler.next(self._executor, logits, seq.recent_ids())
        except TinychatError as error:  # its own numbers are broken, the others' are not
            self._finish(seq, "error", error)
            return
        self._n_generated += 1
        reason = seq.append(id)
        seq.put(Token(id, now))
        if reason:
            self._finish(seq, reason)

    def _finish(self, seq: Sequence, reason: str, error: TinychatError | None = None) -> None:
        """End a running sequence. What it computed stays for whoever goes on, unless it failed."""
        self._stop(seq, keep=error is None)
        if error is not None:
            self._cache.clear()
        _log_finished(seq, reason)
        seq.finish(Finished(reason, error))

    def _stop(self, seq: Sequence, *, keep: bool) -> None:
        with self._wake:
            self._running.remove(seq)
        self._cache.close(seq.lease, seq.ids, seq.n_done, keep=keep)
        self._free_slots.append(seq.slot)
        seq.lease, seq.slot = None, -1

    def _fail(self, error: TinychatError) -> None:
        """End what runs; where nothing does, the fault lies with the next that waits: end that."""
        failed = list(self._running)
        for seq in failed:
            self._finish(seq, "error", error)
        with self._wake:
            if not failed and self._waiting:
                self._waiting.popleft().finish(Finished("error", error))

    def _run_jobs(self) -> None:
        """Answer calls of logits(). While one waits for pages, nothing is started."""
        while self._jobs:
            seq, answer = self._jobs[0]
            row = self._arrays.pages[seq.slot]
            opened = self._cache.open(row, seq.ids, seq.n_prompt, reuse=False)
            if opened is None:
                return
            seq.lease, seq.n_done = opened
            try:
                self._settle(answer, self._all_logits(seq))
            except Exception as error:  # belongs to the caller alone
                self._settle(answer, error=_as_tinychat_error(error))
            finally:
                self._cache.close(seq.lease, seq.ids, seq.n_done, keep=False)
                self._jobs.popleft()

    def _all_logits(self, seq: Sequence) -> np.ndarray:
        out = np.empty((seq.n_prompt, self._executor.program.n_vocab), np.float32)
        self._cache.grow(seq.lease, seq.n_prompt)
        while seq.n_pending:
            self._check_open()
            n = min(seq.n_pending, self._chunk, self._executor.max_outputs)
            batch = self._arrays.fill([(seq, n)], all_rows=True)
            out[seq.n_done:seq.n_done + n] = self._executor.step(batch)
            seq.n_done += n
        return out

    def _settle(self, answer: Future, result: np.ndarray | None = None,
                error: TinychatError | None = None) -> None:
        with self._wake:
            if not answer.done():
                answer.set_exception(error) if error else answer.set_result(result)

    def _tell_all(self, error: TinychatError) -> None:
        """Send whoever still waits for something the error."""
        with self._wake:
            for seq in [*self._running, *self._waiting]:
                seq.finish(Finished("error", error))
            self._waiting.clear()
            for _, answer in list(self._jobs):
                self._settle(answer, error=error)


def _check_limits(executor, *, n_ctx: int, parallel: int, chunk: int) -> None:
    n_positions = executor.n_pages * PAGE_TOKENS
    if not 1 < n_ctx <= n_positions:
        raise InvalidRequest(f"expected a context length from 2 to {n_positions}, which the KV "
                             f"pages hold, got {n_ctx}", param="context_length")
    most = min(executor.max_tokens, executor.max_outputs, executor.max_sequences - 1)
    if not 1 <= parallel <= most:
        raise InvalidRequest(f"expected from 1 to {most} parallel requests, got {parallel}",
                             param="parallel")
    if chunk < 1:
        raise InvalidRequest(f"expected a chunk of at least 1 token, got {chunk}", param="chunk")


def _as_tinychat_error(error: Exception) -> TinychatError:
    if isinstance(error, TinychatError):
        return error
    wrapped = KernelError(f"the engine's step failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _log_finished(seq: Sequence, reason: str) -> None:
    """One line per sequence, without its contents."""
    end = time.perf_counter()
    prompt_s, answer_s = seq.t_prompt_done - seq.t_started, end - seq.t_prompt_done
    log.info("sequence %d: %d tokens in, %d cached, prefill %.1f tok/s, %d out, decode %.1f tok/s, "
             "%.2f s, %s", seq.id, seq.n_prompt, seq.n_cached,
             _rate(seq.n_prompt - seq.n_cached, prompt_s), seq.n_generated,
             _rate(seq.n_generated, answer_s), end - seq.t_submitted, reason)


def _rate(n: int, seconds: float) -> float:
    return n / seconds if n and seconds > 0 else 0.0
