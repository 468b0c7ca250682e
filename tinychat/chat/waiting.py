"""Waiting for other threads without holding up the events of a chat."""
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError as FutureTimeout
from typing import Any


def away(work: Callable[[], Any], wait_s: float, check: Callable[[], None]) -> Iterator[None]:
    """Does it on a helper thread, yields None each `wait_s` while it waits, returns its result.

    check: called before each None; may raise to give up waiting.
    """
    done: Future = Future()

    def run():
        try:
            done.set_result(work())
        except BaseException as error:  # the other thread would wait for ever
            done.set_exception(error)

    threading.Thread(target=run, name="chat-helper", daemon=True).start()
    while True:
        try:
            return done.result(timeout=wait_s)
        except FutureTimeout:
            if done.done():  # it was the work's own
                raise
            check()
            yield None


def next_of(news: queue.SimpleQueue, wait_s: float) -> float | None:
    """The next progress of a load, None at its end; 0.0 when there was none in time."""
    try:
        return news.get(timeout=wait_s)
    except queue.Empty:
        return 0.0
