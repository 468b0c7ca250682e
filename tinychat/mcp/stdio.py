"""The transport over a process's standard input and output, one JSON text per line.

All chats share the process, and their calls may be answered in any order. A process that died is
started again by the next request, which then has to greet it (SessionLost).

Source: MCP, "Transports", stdio.
"""
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Mapping

from tinychat.mcp import era, jsonrpc
from tinychat.mcp.command import Command
from tinychat.mcp.errors import (
    CalledOff, McpError, ProtocolError, SessionLost, TimedOut, Unreachable)
from tinychat.mcp.limits import DEFAULT, Budget, Limits
from tinychat.mcp.process import STEPS, Line, Process, ProcessLimits
from tinychat.mcp.watch import Watch

log = logging.getLogger(__name__)

GREETINGS = ("initialize", "server/discover")
CLOSE_SLACK_S = 0.5  # for threads to end, beyond the steps of the end itself
_ID = re.compile(rb'"id"\s*:\s*(\d{1,18})\b')


class Slot:
    """One who waits for an answer of one process."""

    def __init__(self, process: Process, message: dict, watch: Watch, limits: Limits):
        self.process, self.watch, self.id = process, watch, message["id"]
        self.is_greeting = message["method"] in GREETINGS
        self.done, self.budget = threading.Event(), Budget(limits)
        self.answer: dict | None = None
        self.fault: McpError | None = None

    def fail(self, fault: McpError) -> None:
        self.fault = fault
        self.done.set()


class Starts:
    """Keeps a process that never stays from being started over and over."""

    def __init__(self, limits: ProcessLimits):
        self._times: deque[float] = deque(maxlen=limits.starts)
        self._limits = limits
        self.last_fault = ""

    def check(self, where: str) -> None:
        """Raises: Unreachable when it is too soon."""
        limits, times = self._limits, self._times
        if len(times) < limits.starts or times[-1] - times[0] >= limits.starts_s:
            return
        left = times[-1] + limits.starts_s - time.monotonic()
        if left > 0:
            last = f"; last: {self.last_fault}" if self.last_fault else ""
            raise Unreachable(f"{where}: was started {limits.starts} times in a short while, and "
                              f"will not be for {left:.0f} s{last}")

    def note(self) -> None:
        self._times.append(time.monotonic())


class StdioTransport:
    """See transport.Transport. The process starts at the first request."""

    def __init__(self, command: Command, *, limits: Limits = DEFAULT,
                 process_limits: ProcessLimits = ProcessLimits()):
        self.where = command.where
        self.on_notification = lambda message: None
        self._command, self._limits, self._process_limits = command, limits, process_limits
        self._starts = Starts(process_limits)
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._ending: list[Process] = []
        self._slots: dict[int, Slot] = {}
        self._is_greeted = self._is_stateless = self._is_closed = False

    @property
    def is_running(self) -> bool:
        process = self._process
        return process is not None and process.fault is None

    def exchange(self, message: dict, watch: Watch, headers: Mapping[str, str] = {}) -> dict:
        watch.left()
        data = jsonrpc.dumps(message) + b"\n"
        process = self._running(message)
        slot = self._slots[message["id"]] = Slot(process, message, watch, self._limits)
        line = process.post(data)
        try:
            return self._wait(slot, line)
        except (TimedOut, CalledOff):
            line.withdraw()
            if message["method"] != "initialize":
                self._post(process, jsonrpc.notification("notifications/cancelled", {
                    "requestId": message["id"], "reason": "nobody waits for it any more"}))
            raise
        except Unreachable as error:
            if message["method"] == "server/discover":  # it changes nothing, so it may come again
                raise SessionLost(error.message) from None
            raise
        finally:
            del self._slots[message["id"]]

    def notify(self, message: dict, watch: Watch) -> None:
        watch.left()
        with self._lock:
            process = self._process
            if process is None or process.fault:
                raise Unreachable(f"{self.where}: the process is gone")
            self._is_greeted |= message["method"] == "notifications/initialized"
        self._post(process, message)

    def drop(self) -> None:
        """Ends the process; the next request starts another."""
        if process := self._process:
            process.stop()

    def stop(self) -> None:
        """Begins what close() completes, so that many can end at the same time."""
        with self._lock:
            self._is_closed = True
            processes = [*self._ending, *([self._process] if self._process else [])]
            self._ending, self._process = processes, None
        for process in processes:
            process.stop()

    def close(self) -> None:
        self.stop()
        end = time.monotonic() + len(STEPS) * self._process_limits.step_s + CLOSE_SLACK_S
        for process in self._ending:
            process.join(max(0.0, end - time.monotonic()))

    # ---- requests

    def _running(self, message: dict) -> Process:
        """The process, started if there is none.

        Raises: SessionLost when it has to be greeted first; NotConnected, Unreachable, Refused.
        """
        with self._lock:
            if self._is_closed:
                raise Unreachable(f"{self.where}: the connection is closed")
            if not self.is_running:
                self._start()
            self._is_stateless = era.stated_version(message) is not None
            if message["method"] == "initialize" or self._is_stateless or self._is_greeted:
                return self._process
        raise SessionLost(f"{self.where}: the process was started again")

    def _start(self) -> None:
        self._starts.check(self.where)
        self._ending = [process for process in self._ending if not process.join(0)]
        if self._process:
            self._ending.append(self._process)
        self._process, self._is_greeted = None, False
        self._process = Process(self._command, self._process_limits, on_line=self._take_line,
                                on_stderr=self._heard, on_end=self._ended)
        self._starts.note()

    def _wait(self, slot: Slot, line: Line) -> dict:
        writing = slot.watch.within(self._process_limits.write_s,
                                    f"{self.where}: the process does not read; writing to it")
        if slot.process.fault is None:
            while not slot.done.wait((slot.watch if line.written else writing).slice()):
                pass
        if slot.answer is not None:
            return slot.answer
        fault = slot.fault or slot.process.fault
        raise type(fault)(fault.message)  # one for each thread

    def _post(self, process: Process, message: dict) -> None:
        process.post(jsonrpc.dumps(message) + b"\n")

    def _slots_of(self, process: Process) -> list[Slot]:
        return [slot for slot in list(self._slots.values()) if slot.process is process]

    # ---- what a process's threads tell

    def _heard(self, process: Process) -> None:
        """Something on stderr, which is a sign of life while a first start downloads."""
        for slot in self._slots_of(process):
            if slot.is_greeting:
                slot.watch.alive()

    def _ended(self, process: Process) -> None:
        if not self._is_closed:
            self._starts.last_fault = process.fault.message
        for slot in self._slots_of(process):
            slot.done.set()
        # Its successor may have other tools.
        self.on_notification(jsonrpc.notification("notifications/tools/list_changed"))

    def _take_line(self, process: Process, line: bytes) -> None:
        if not line.strip():
            return
        try:
            messages = jsonrpc.members(jsonrpc.loads(line))
        except ProtocolError as error:
            log.debug("%s: skipped a line of %d bytes that is no JSON", self.where, len(line))
            self._fail_answer(process, line, error)
            return
        for message in messages:
            self._sort(process, message)

    def _fail_answer(self, process: Process, line: bytes, error: ProtocolError) -> None:
        """An answer that cannot be read is no banner: whoever waits for it shall not in vain."""
        ends = line[:200] + b" " + line[-200:]
        found = _ID.search(ends) if b'"jsonrpc"' in ends else None
        slot = self._slots.get(int(found[1])) if found else None
        if slot and slot.process is process:
            slot.fail(error.named(self.where))

    def _sort(self, process: Process, message: dict) -> None:
        kind, slots = jsonrpc.kind_of(message), self._slots_of(process)
        if kind == "answer":
            for slot in slots:
                if jsonrpc.answers(message, slot.id):
                    slot.answer = message
                    slot.done.set()
            return
        if kind == "request":
            self._reply(process, message)
        elif of := [slot for slot in slots if jsonrpc.shows_progress(message, slot.id)]:
            slots = of  # who reports much of one call costs the others nothing
            for slot in of:
                slot.watch.alive()
        else:
            self.on_notification(message)
        for slot in slots:
            try:
                slot.budget.take_message(self.where)
            except ProtocolError as error:
                slot.fail(error)

    def _reply(self, process: Process, request: dict) -> None:
        if self._is_stateless:  # there a request of the server's is a fault
            return
        try:
            self._post(process, jsonrpc.reply_to(request))
        except ProtocolError as error:  # an id that JSON cannot say
            log.debug("%s: %s", self.where, error)
