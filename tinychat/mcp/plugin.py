"""One plugin: a server of mcp.json, connected for all who use it."""
import copy
import logging
import threading
import time
from dataclasses import dataclass, field

from tinychat.mcp.client import Client, connect_http
from tinychat.mcp.config import Entry
from tinychat.mcp.errors import McpError, Unreachable
from tinychat.mcp.limits import DEFAULT, Limits
from tinychat.mcp.process import ProcessLimits
from tinychat.mcp.stdio import StdioTransport
from tinychat.mcp.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PluginLimits:
    start_s: float = 180.0        # the first start of a program may download it ...
    start_quiet_s: float = 60.0   # ... and then says something on stderr now and then
    idle_s: float = 600.0         # without a user, until it is stopped
    client: Limits = DEFAULT
    process: ProcessLimits = field(default_factory=ProcessLimits)


class Start:
    """One attempt to connect, for all who wait for it."""

    def __init__(self):
        self.done = threading.Event()
        self.fault: McpError | None = Unreachable("the start did not come to its end")


class Plugin:
    """A process or a URL. n_users, left_at: kept by Plugins, under its lock."""

    def __init__(self, entry: Entry, limits: PluginLimits):
        self.entry, self._limits = entry, limits
        self.n_users, self.left_at = 0, time.monotonic()
        self._lock = threading.Lock()
        self._start: Start | None = None
        self._closing = threading.Event()  # calls a start off
        self._client: Client | None = None
        self._process: StdioTransport | None = None
        if entry.command is not None:
            self._process = StdioTransport(entry.command, limits=limits.client,
                                           process_limits=limits.process)
            self._client = Client(self._process, limits=limits.client)

    def client(self, watch: Watch) -> Client:
        """Connected, by one start however many ask. A start that failed is tried again by whoever
        asks next. Raises: McpError.
        """
        with self._lock:
            start = self._start
            if start is None or start.done.is_set() and not self._is_well(start):
                self._start = start = Start()
                # NOTE: a thread of its own: whoever asked first may go away, the others stay.
                threading.Thread(target=self._connect, args=(start,), daemon=True,
                                 name=f"mcp-start-{self.entry.label}").start()
        while not start.done.wait(watch.slice()):
            pass
        if start.fault:
            raise copy.copy(start.fault)  # one for each thread
        return self._client

    def stop(self) -> None:
        """Begins what close() completes."""
        self._closing.set()
        if self._process:
            self._process.stop()

    def close(self) -> None:
        self.stop()
        with self._lock:
            start = self._start
        if start:
            start.done.wait(self._limits.process.step_s)
        if self._client:
            self._client.close()

    def _is_well(self, start: Start) -> bool:
        return start.fault is None and (self._process is None or self._process.is_running)

    def _connect(self, start: Start) -> None:
        try:
            if self._process:
                self._greet_process()
            else:
                self._client = connect_http(
                    self.entry.url, headers=self.entry.headers, called_off=self._closing,
                    label=self.entry.label, limits=self._limits.client)
            start.fault = None
        except McpError as error:
            log.info("%s: did not start: %s", self.entry.label, error)
            start.fault = error
        finally:
            start.done.set()

    def _greet_process(self) -> None:
        """Its process starts with the first word to it."""
        limits = self._limits
        # NOTE: a short timeout is meant for calls; it must not cut off a first start's download.
        quiet_s = max(limits.start_quiet_s, (self.entry.timeout_ms or 0) / 1000)
        watch = Watch(max(limits.start_s, quiet_s), patience_s=quiet_s,
                      what=f"the start of {self.entry.label}", called_off=self._closing)
        try:
            self._client.connect(watch)
        except McpError:
            self._process.drop()
            raise
