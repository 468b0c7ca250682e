"""A child process whose lines are read and written by threads, and which is seen off at the end.

Four threads, each waiting for one thing: its output, its stderr, a line to write, its exit. So a
pipe that nobody empties at the other end holds up no one else, and it is the same on every system.
Knows lines, not what they mean.
"""
import logging
import os
import queue
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from tinychat.mcp.command import WINDOWS, Command
from tinychat.mcp.errors import McpError, ProtocolError, Unreachable, one_line
from tinychat.mcp.lines import Lines

log = logging.getLogger(__name__)

PIECE = 1 << 16        # bytes of one read; a pipe holds no more
MAX_QUEUED = 1_000     # lines to a process that does not read; more are dropped
LOOK_MS = 100          # how soon a writer notices the end, while the process does not read
POLL_S = 0.01
STEPS = (None, signal.SIGTERM) if WINDOWS else (None, signal.SIGTERM, signal.SIGKILL)


@dataclass(frozen=True)
class ProcessLimits:
    step_s: float = 2.0             # each for: leaving at the end of input, SIGTERM, SIGKILL
    last_words_s: float = 0.3       # what is still in the pipes after the exit
    write_s: float = 30.0           # until the process has read what it is sent
    line_bytes: int = 8 << 20
    stderr_bytes: int = 8 << 10     # kept, of the end
    starts: int = 3                 # within starts_s; then none for as long
    starts_s: float = 60.0


class Line:
    """A line on its way. written: it is in the pipe."""

    def __init__(self, data: bytes):
        self.data, self.written = data, False

    def withdraw(self) -> None:
        """It is not sent, unless the writer has begun it."""
        self.data = b""


class Process:
    """Running from the start. on_line, on_stderr, on_end: called with it by threads of its own.

    on_end comes once, when it can be used no more; `fault` then says why.
    """

    def __init__(self, command: Command, limits: ProcessLimits, *,
                 on_line: Callable[["Process", bytes], None],
                 on_stderr: Callable[["Process"], None],
                 on_end: Callable[["Process"], None]):
        """Raises: NotConnected, Refused."""
        self.fault: McpError | None = None
        self._command, self._limits = command, limits
        self._on_line, self._on_stderr, self._on_end = on_line, on_stderr, on_end
        self._said = b""                 # on stderr, the end of it
        self._exited = threading.Event()
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._popen = command.spawn()
        self.pid = self._popen.pid
        self._wake: tuple[int, int] | None = None  # a pipe whose end tells the readers to stop
        if not WINDOWS:
            self._wake = os.pipe()
            os.set_blocking(self._popen.stdin.fileno(), False)
        self._reader, self._drain, self._writer, self._keeper = (
            threading.Thread(target=run, name=f"mcp-{what}-{self.pid}", daemon=True)
            for what, run in (("stdout", self._read), ("stderr", self._read_stderr),
                              ("stdin", self._write), ("exit", self._keep)))
        for thread in (self._reader, self._drain, self._writer, self._keeper):
            thread.start()

    def post(self, data: bytes) -> Line:
        """Queues a line. Waits for nothing; what a process does not read for long is dropped."""
        line = Line(data)
        if self._outbox.qsize() < MAX_QUEUED:
            self._outbox.put(line)
        return line

    def stop(self) -> None:
        """Begins the end: end of input, SIGTERM, SIGKILL. Waits for nothing."""
        self._end(Unreachable(f"{self._command.where}: the process was stopped"))

    def join(self, seconds: float) -> bool:
        """Waits until nothing of it is left: no process, thread, descriptor."""
        self._keeper.join(seconds)
        return not self._keeper.is_alive()

    def _end(self, fault: McpError) -> None:
        with self._lock:
            if self.fault is not None:
                return
            self.fault = fault
        self._outbox.put(None)
        self._on_end(self)

    # ---- the threads

    def _read(self) -> None:
        lines = Lines(self._limits.line_bytes)
        try:
            for piece in self._pieces(self._popen.stdout.fileno()):
                for line in lines.feed(piece):
                    self._on_line(self, line)
        except ProtocolError as error:
            self._end(error.named(self._command.where))
        finally:
            self._broke("closed its output")

    def _read_stderr(self) -> None:
        for piece in self._pieces(self._popen.stderr.fileno()):
            self._said = (self._said + piece)[-self._limits.stderr_bytes:]
            self._on_stderr(self)

    def _write(self) -> None:
        while (line := self._outbox.get()) is not None and self._put(line):
            pass
        with suppress(OSError):
            self._popen.stdin.close()
        self._see_off()

    def _keep(self) -> None:
        self._popen.wait()
        self._exited.set()
        end = time.monotonic() + self._limits.last_words_s
        for thread in (self._reader, self._drain):
            thread.join(max(0.0, end - time.monotonic()))
        self._end(Unreachable(f"{self._command.where}: {self._how_it_ended()}"))
        self._writer.join()
        if self._wake:
            os.close(self._wake[1])
        self._reader.join()
        self._drain.join()
        self._popen.stdout.close()
        self._popen.stderr.close()
        if self._wake:
            os.close(self._wake[0])

    # ---- reading and writing

    def _pieces(self, pipe: int) -> Iterator[bytes]:
        """What comes out of a pipe. A descendant outside of the group may hold it open for ever."""
        poll = None
        if self._wake:
            poll = select.poll()
            poll.register(pipe, select.POLLIN)
            poll.register(self._wake[0], select.POLLIN)
        while True:
            if poll and self._wake[0] in dict(poll.poll()):
                return
            try:
                piece = os.read(pipe, PIECE)
            except OSError:
                return
            if not piece:
                return
            yield piece

    def _put(self, line: Line) -> bool:
        """Writes a line; False when there will be no more."""
        pipe, left, poll = self._popen.stdin.fileno(), memoryview(line.data), None
        if not WINDOWS:
            poll = select.poll()
            poll.register(pipe, select.POLLOUT)
        while left and self.fault is None:
            if poll and not poll.poll(LOOK_MS):
                continue
            try:
                left = left[os.write(pipe, left):]
            except BlockingIOError:
                continue
            except OSError:
                self._broke("closed its input")
                return False
        line.written = not left
        return self.fault is None

    def _broke(self, how: str) -> None:
        """A pipe ended. If that is because the process did, the keeper has more to say."""
        if not self._exited.wait(self._limits.last_words_s):
            self._end(Unreachable(f"{self._command.where}: the process {how}"
                                  + self._last_words()))

    # ---- the end

    def _see_off(self) -> None:
        for step in STEPS:
            if step is not None:
                log.info("%s: did not leave, gets %s", self._command.where, step.name)
                self._signal(step)
            if self._is_gone_within(self._limits.step_s):
                return
        log.warning("%s: the process %d cannot be ended", self._command.where, self.pid)

    def _is_gone_within(self, seconds: float) -> bool:
        """Is it, and all of its group? Who outlives the leader dies with the group."""
        end = time.monotonic() + seconds
        if not self._exited.wait(seconds):
            return False
        while not WINDOWS and self._signal(0):
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)
        return True

    def _signal(self, number: int) -> bool:
        """To all of the group; is there anyone?"""
        try:
            if WINDOWS:  # which has no signals, but knows whose children are whose
                subprocess.run(["taskkill", "/T", "/F", "/PID", str(self.pid)],
                               capture_output=True, check=False)
            else:
                os.killpg(self.pid, number)
            return True
        except OSError:
            return False

    def _how_it_ended(self) -> str:
        code = self._popen.returncode
        if code < 0:
            with suppress(ValueError):  # a signal without a name
                return f"the process was ended by {signal.Signals(-code).name}" + self._last_words()
        return f"the process exited with code {code}" + self._last_words()

    def _last_words(self) -> str:
        lines = self._said.decode("utf-8", "replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"; it said: {one_line(self._command.hide_secrets(last), 300)}" if last else ""
