"""How long something may take: a moment, not a timeout of one read, and a way to be called off."""
import threading
import time

from tinychat.mcp.errors import CalledOff, TimedOut

SLICE_S = 0.1  # how soon a wait notices that it was called off


class Watch:
    """Limits one piece of work with a server.

    total_s: seconds from now in all. patience_s: seconds without a sign of life, total_s when None.
    called_off: set by another thread when nobody waits any more. what: for the error's text.
    """

    def __init__(self, total_s: float, *, what: str, patience_s: float | None = None,
                 called_off: threading.Event | None = None):
        self.what, self.called_off = what, called_off
        self._patience_s = total_s if patience_s is None else patience_s
        self._end = time.monotonic() + total_s
        self._quiet_end = time.monotonic() + self._patience_s

    def within(self, seconds: float, what: str | None = None) -> "Watch":
        """A watch on a part of this work: it ends no later, and is called off with it."""
        return Watch(min(seconds, self._until() - time.monotonic()), what=what or self.what,
                     called_off=self.called_off)

    def alive(self) -> None:
        """A sign of life restarts the patience, never the total."""
        self._quiet_end = time.monotonic() + self._patience_s

    def left(self) -> float:
        """Seconds left, more than 0. Raises: TimedOut, CalledOff."""
        if self.called_off is not None and self.called_off.is_set():
            raise CalledOff(f"{self.what} was called off")
        left = self._until() - time.monotonic()
        if left <= 0:
            raise TimedOut(f"{self.what} took too long")
        return left

    def slice(self) -> float:
        """Seconds to wait before looking again, more than 0. Raises: TimedOut, CalledOff."""
        left = self.left()
        return left if self.called_off is None else min(left, SLICE_S)

    def pause(self, seconds: float) -> None:
        """Waits so long. Raises: TimedOut, CalledOff."""
        end = time.monotonic() + seconds
        while (rest := end - time.monotonic()) > 0:
            wait = min(self.slice(), rest)
            (self.called_off or threading.Event()).wait(wait)
        self.left()

    def _until(self) -> float:
        return min(self._end, self._quiet_end)
