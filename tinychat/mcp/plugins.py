"""The plugins: servers of mcp.json, connected when a chat needs them and shared by all chats.

A plugin stays while it is used, is stopped when nobody has used it for a while, and is replaced
when its entry changes. No lock is held while one starts or stops.
"""
import atexit
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinychat.mcp.client import Client
from tinychat.mcp.config import Entry, McpJson
from tinychat.mcp.errors import McpError, Refused, Unreachable
from tinychat.mcp.plugin import Plugin, PluginLimits
from tinychat.mcp.watch import Watch

PREFIX = "mcp/"


class UnknownPlugin(McpError):
    """mcp.json has no such label."""

    type = "plugin_connection_error"
    code = "plugin_not_found"


def plugin_error(error: McpError, label: str) -> McpError:
    """Itself, in the contract's words for a server of mcp.json, and with the label."""
    error.type, error.code = "plugin_connection_error", "connection_failed"
    return error if error.message.startswith(f"{label} ") else error.named(PREFIX + label)


class Plugins:
    """All plugins of one mcp.json. Ends with the program, if it is not closed before."""

    def __init__(self, path: Path, limits: PluginLimits = PluginLimits()):
        self.config = McpJson(path)
        self._limits = limits
        self._lock = threading.Condition()
        self._living: dict[str, Plugin] = {}
        self._retired: set[Plugin] = set()  # replaced, but still used
        self._reaper: threading.Thread | None = None
        self._is_closed = False
        self.config.entries()  # what is wrong with the file is in the log from the start
        atexit.register(self.close)

    def labels(self) -> list[str]:
        """Of the usable and of the broken entries."""
        return list(self.config.entries())

    def find(self, id: str) -> str:
        """The label that `mcp/<label>` means. Raises: UnknownPlugin, which lists the known ones."""
        return self._entry(id).label

    def timeout_ms(self, label: str) -> int | None:
        """How long a call may take without a sign of life, if mcp.json says so.

        Raises: UnknownPlugin.
        """
        return self._entry(PREFIX + label).timeout_ms

    @contextmanager
    def acquire(self, label: str, watch: Watch) -> Iterator[Client]:
        """A connected client, to be used inside `with`. watch: for the wait until it is there.

        Raises: McpError of type plugin_connection_error, UnknownPlugin among them.
        """
        entry = self._entry(PREFIX + label)
        plugin = self._enter(entry)
        try:
            try:
                client = plugin.client(watch)
            except McpError as error:
                raise plugin_error(error, entry.label)
            yield client
        finally:
            self._leave(plugin)

    def close(self) -> None:
        """Stops all, at the same time. May be called again."""
        with self._lock:
            self._is_closed = True
            plugins = [*self._living.values(), *self._retired]
            self._living, self._retired = {}, set()
            self._lock.notify_all()
        atexit.unregister(self.close)
        _close_all(plugins)
        if self._reaper:
            self._reaper.join()

    def _entry(self, id: str) -> Entry:
        entries = self.config.entries()
        label = match(id, entries)
        if label is None:
            known = ", ".join(PREFIX + label for label in entries) or "none"
            why = f" ({self.config.problem})" if self.config.problem else ""
            raise UnknownPlugin(f"there is no plugin {id[:80]!r}; known: {known}{why}")
        return entries[label]

    # ---- who uses which

    def _enter(self, entry: Entry) -> Plugin:
        """The plugin, with one user more. Raises: Unreachable when all is over, Refused."""
        if entry.problem:
            raise plugin_error(Refused(entry.problem), entry.label)
        with self._lock:
            if self._is_closed:
                raise plugin_error(Unreachable("the plugins are closed"), entry.label)
            self._retire_changed()
            plugin = self._living.get(entry.label)
            if plugin is None:
                plugin = self._living[entry.label] = Plugin(entry, self._limits)
            plugin.n_users += 1
            if self._reaper is None:
                self._reaper = threading.Thread(target=self._reap, name="mcp-reaper", daemon=True)
                self._reaper.start()
            return plugin

    def _leave(self, plugin: Plugin) -> None:
        with self._lock:
            plugin.n_users -= 1
            plugin.left_at = time.monotonic()
            self._lock.notify_all()

    def _retire_changed(self) -> None:
        """What mcp.json says otherwise by now gets no new users."""
        entries = self.config.entries()
        for label, plugin in list(self._living.items()):
            if entries.get(label) != plugin.entry:
                self._retired.add(self._living.pop(label))
                self._lock.notify_all()

    # ---- the end of those nobody uses

    def _reap(self) -> None:
        while True:
            with self._lock:
                while not (due := self._due()) and not self._is_closed:
                    self._lock.wait(self._until_due())
                if self._is_closed:
                    return
                for plugin in due:
                    self._retired.discard(plugin)
                    if self._living.get(plugin.entry.label) is plugin:
                        del self._living[plugin.entry.label]
            _close_all(due)

    def _due(self) -> list[Plugin]:
        """Replaced ones at once, others when they were idle for long."""
        before = time.monotonic() - self._limits.idle_s
        return [*(plugin for plugin in self._retired if not plugin.n_users),
                *(plugin for plugin in self._living.values()
                  if not plugin.n_users and plugin.left_at <= before)]

    def _until_due(self) -> float | None:
        left = [plugin.left_at for plugin in self._living.values() if not plugin.n_users]
        return max(0.0, min(left) + self._limits.idle_s - time.monotonic()) if left else None


def match(id: str, labels: Iterable[str]) -> str | None:
    """The label of an id `mcp/<label>`: as it is spelled, else folded where that is unambiguous."""
    if not id.startswith(PREFIX):
        return None
    wanted = id.removeprefix(PREFIX)
    if wanted in labels:
        return wanted
    alike = [label for label in labels if _folded(label) == _folded(wanted)]
    return alike[0] if len(alike) == 1 else None


def _folded(label: str) -> str:
    return re.sub("[ _]", "-", label.lower())


def _close_all(plugins: list[Plugin]) -> None:
    """At the same time, so that it takes no longer than the slowest."""
    for plugin in plugins:
        plugin.stop()
    threads, in_turn = [], []
    for plugin in plugins:
        thread = threading.Thread(target=plugin.close, name="mcp-close", daemon=True)
        try:
            thread.start()
            threads.append(thread)
        except RuntimeError:  # at the end of the interpreter no thread starts any more
            in_turn.append(plugin)
    for plugin in in_turn:  # their ends have begun together
        with suppress(RuntimeError):  # a goodbye over HTTP may want a thread too
            plugin.close()
    for thread in threads:
        thread.join()
