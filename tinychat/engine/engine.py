"""The step loop of one loaded model, and its one thread: token ids in, token ids out; no text.

Any thread may submit, cancel and close. The engine's thread alone touches the stepper: executor, KV
pages, sequences that run. What passes between threads is under one lock or in a sequence's queue.
"""
import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from tinychat.engine.images import PlacedImage, check_images
from tinychat.engine.sampler import Guide, Sampler, SamplingParams
from tinychat.engine.sequence import Finished, Sequence
from tinychat.engine.stepper import Stepper
from tinychat.errors import (
    ContextOverflow, InvalidRequest, KernelError, Overloaded, TinychatError)

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0  # how long close() waits for a step that is under way


@dataclass(frozen=True)
class Stats:
    """Counters since the start, then the state of now. Reused tokens do not count as prefilled.

    n_drafted: guesses that steps computed; n_accepted: those that were right.
    """

    n_prefilled_tokens: int
    n_reused_tokens: int
    n_generated_tokens: int
    n_steps: int
    n_preempted: int
    n_drafted: int
    n_accepted: int
    running: int
    waiting: int
    free_pages: int
    n_pages: int


class Engine:
    """Runs many sequences at once on one executor.

    n_ctx: tokens a sequence may have, prompt and answer; parallel: sequences at once; queue_limit:
    how many more may wait; chunk: prompt tokens in one step; prompt_lookup: compute guesses at how
    texts go on besides where that pays, which makes them faster and changes none.

    Raises: InvalidRequest when the executor is too small for that.
    """

    def __init__(self, executor, *, n_ctx: int, parallel: int = 4, queue_limit: int = 64,
                 chunk: int = 512, prompt_lookup: bool = True):
        self.n_ctx = n_ctx
        self.parallel = parallel
        self._n_vocab = executor.program.n_vocab
        self._queue_limit = queue_limit
        self._stepper = Stepper(executor, n_ctx=n_ctx, parallel=parallel, chunk=chunk,
                                prompt_lookup=prompt_lookup)
        self._most_whole = executor.limits.max_tokens - parallel  # what each step has room for
        self._wake = threading.Condition()        # guards what follows
        self._waiting: deque[Sequence] = deque()  # in order of arrival
        self._jobs: deque[tuple[Sequence, Future]] = deque()  # calls of logits()
        self._any_cancelled = False
        self._closing = False
        self._close_error: TinychatError | None = None
        self._thread = threading.Thread(target=self._run, name="tinychat-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the process must not go down round a thread inside a kernel

    # For any thread

    def submit(self, ids: list[int], *, params: SamplingParams = SamplingParams(),
               max_tokens: int | None = None, stop_ids: frozenset[int] = frozenset(),
               n_ctx: int | None = None, seed: int | None = None, guide: Guide | None = None,
               images: tuple[PlacedImage, ...] = (),
               on_finish: Callable[[], None] = lambda: None) -> Sequence:
        """Queue a prompt. n_ctx limits this sequence further; max_tokens None: to the end of n_ctx.

        guide: judges each token on the engine's thread. images: what is seen in the prompt, in
        order; the ids in their places are only counted.
        on_finish: called once, when the engine has done with it, however slowly its updates are
        read; by any thread, with locks held: it must be short.
        Raises: ContextOverflow when the prompt leaves no room for a token; InvalidRequest when it
        is empty or has ids outside the vocabulary, or max_tokens is below 1; Overloaded when the
        queue is full or the engine closing; KernelError in a forked process.
        """
        n_ctx = min(n_ctx or self.n_ctx, self.n_ctx)
        ids = self._checked(ids, n_ctx - 1, n_ctx)
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequest(f"expected max_tokens of at least 1, got {max_tokens}",
                                 param="max_tokens")
        check_images(images, len(ids), self._stepper.executor.program, self._most_whole)
        seq = Sequence(ids, sampler=Sampler(params, seed, guide), max_tokens=max_tokens,
                       stop_ids=stop_ids, n_ctx=n_ctx, images=images, on_finish=on_finish)
        with self._wake:
            self._check_open()
            n_present = len(self._waiting) + len(self._stepper.running)
            if n_present >= self._queue_limit + self.parallel:
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
        answer: Future = Future()
        with self._wake:
            self._check_open()
            self._jobs.append((seq, answer))
            self._wake.notify()
        return answer.result()

    @property
    def stats(self) -> Stats:
        now = self._stepper
        return Stats(now.n_prefilled, now.n_reused, now.n_generated, now.n_steps, now.n_preempted,
                     now.n_drafted, now.n_accepted, len(now.running), len(self._waiting),
                     now.cache.free_pages, now.cache.n_pages)

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
        try:
            ids = np.asarray(ids)
        except ValueError as error:  # lists of different lengths
            raise InvalidRequest(f"expected a list of token ids: {error}", param="input") from None
        if ids.size == 0:
            raise InvalidRequest("expected a prompt of at least one token, got none", param="input")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InvalidRequest(f"expected a list of token ids, got {ids.ndim} dimensions "
                                 f"of {ids.dtype}", param="input")
        if len(ids) > n_most:
            raise ContextOverflow(f"the prompt has {len(ids)} tokens, more than the context length "
                                  f"of {n_ctx} has room for", param="input")
        if ids.min() < 0 or ids.max() >= self._n_vocab:
            raise InvalidRequest(f"expected token ids from 0 to {self._n_vocab - 1}, "
                                 f"got {ids.min()} to {ids.max()}", param="input")
        return ids.astype(np.int32)

    def _check_open(self) -> None:
        if self._closing:
            raise self._close_error or Overloaded("the engine is shutting down")
        if not self._thread.is_alive():  # it runs in the parent: nobody here would ever answer
            raise KernelError("the model was loaded before this process was forked: load it here")

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
        finally:  # whatever happened, nobody waits for an engine that is gone
            with self._wake:
                self._closing = True
                self._close_error = self._close_error or KernelError("the engine's thread died")
            for seq in list(self._stepper.running):
                self._stepper.end(seq, "error", self._close_error)
            self._tell_all(self._close_error)

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; False once the engine is closing."""
        with self._wake:
            while not (self._closing or self._stepper.running or self._waiting or self._jobs):
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
        if not self._any_cancelled:
            return
        self._any_cancelled = False
        for seq in [seq for seq in self._stepper.running if seq.cancelled]:
            self._stepper.end(seq, "cancelled")
        with self._wake:  # one that was cancelled while it made room for others
            for seq in [seq for seq in self._waiting if seq.cancelled]:
                self.cancel(seq)

    def _run_jobs(self) -> None:
        """Answer calls of logits() while there are pages for them."""
        while self._jobs:
            seq, answer = self._jobs[0]
            try:
                result = self._stepper.logits(seq, between_steps=self._check_open)
                if result is None:
                    return
                self._settle(answer, result)
            except Exception as error:  # belongs to the caller alone
                self._settle(answer, error=_as_tinychat_error(error))
            self._jobs.popleft()

    def _admit(self) -> None:
        """Start what waits, in order of arrival; nothing while logits() waits for pages."""
        with self._wake:
            while self._waiting and not self._jobs and self._stepper.start(self._waiting[0]):
                self._waiting.popleft()

    def _step(self) -> None:
        work, preempted = self._stepper.plan()
        if preempted:
            with self._wake:
                self._waiting.extendleft(preempted)  # they are older than all that wait
        if work:
            self._stepper.run(work)

    def _fail(self, error: TinychatError) -> None:
        """End what runs; where nothing does, the fault lies with the next that waits: end that."""
        failed = list(self._stepper.running)
        for seq in failed:
            self._stepper.end(seq, "error", error)
        with self._wake:
            if not failed and self._waiting:
                self._waiting.popleft().finish(Finished("error", error))

    def _settle(self, answer: Future, result: np.ndarray | None = None,
                error: TinychatError | None = None) -> None:
        with self._wake:
            if not answer.done():
                answer.set_exception(error) if error else answer.set_result(result)

    def _tell_all(self, error: TinychatError) -> None:
        """Send whoever still waits for something the error."""
        with self._wake:
            for seq in [*self._stepper.running, *self._waiting]:
                seq.finish(Finished("error", error))
            self._waiting.clear()
            for _, answer in list(self._jobs):
                self._settle(answer, error=error)


def _as_tinychat_error(error: Exception) -> TinychatError:
    if isinstance(error, TinychatError):
        return error
    wrapped = KernelError(f"the engine's step failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
