"""mcp.json: which servers the owner of this machine allows, entry by entry.

One broken entry costs no other, and a broken file costs nothing while a good one is remembered.
Values of `env` and `headers` are secrets: no message repeats them.
"""
import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinychat.mcp.command import Command
from tinychat.mcp.errors import McpError, one_line

log = logging.getLogger(__name__)

MCP_JSON_NAME = "mcp.json"  # in the data folder

MAX_BYTES = 1 << 20            # of mcp.json, and of an envFile
MAX_TIMEOUT_MS = 3_600_000
LABEL = re.compile(r"(?! )[A-Za-z0-9_. -]{1,64}(?<! )")  # blanks: LM Studio's labels have them
KNOWN = {"command", "args", "env", "cwd", "envFile", "url", "headers", "type", "timeout",
         "disabled"}
_PLACE = re.compile(r"\$\{(?:env:([^}]*)|userHome)\}")


class BadEntry(ValueError):
    """What is wrong with an entry; never leaves this file."""


@dataclass(frozen=True)
class Entry:
    """A server of mcp.json. One of command, url and problem is there."""

    label: str
    command: Command | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # secrets
    timeout_ms: int | None = None
    problem: str | None = None


class McpJson:
    """The file as it is now, or as it was when it could be read last. Threads may share it.

    problem: what is wrong with the file as it is now, with line and column.
    """

    def __init__(self, path: Path):
        self.path = Path(path).absolute()
        self.problem: str | None = None
        self._entries: dict[str, Entry] = {}
        self._stamp: tuple | None = None
        self._lock = threading.Lock()

    def entries(self) -> dict[str, Entry]:
        """By label; none where there is no file."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._read(exists=stamp is not None)
            return self._entries

    def _look(self) -> tuple | None:
        try:
            stat = self.path.stat()
            return stat.st_mtime_ns, stat.st_size, stat.st_ino
        except OSError:
            return None

    def _read(self, exists: bool) -> None:
        try:
            self._entries = read_servers(self.path) if exists else {}
            self.problem = None
        except McpError as error:
            self.problem = error.message
            kept = "; what it said before still holds" if self._entries else ""
            log.warning("%s%s", error, kept)


def read_servers(path: Path) -> dict[str, Entry]:
    """Raises: McpError with line and column when the file as a whole is of no use."""
    top = _json(path, _text_of(path))
    servers = top.get("mcpServers", {}) if isinstance(top, dict) else None
    if not isinstance(servers, dict):
        raise McpError(f'{path}: expected an object with "mcpServers", an object, in it')
    for key in sorted(top.keys() - {"mcpServers"}):
        log.info("%s: ignored the key %s", path, one_line(repr(key), 80))
    entries = (read_entry(label, value, path.parent) for label, value in servers.items())
    return {entry.label: entry for entry in entries if entry is not None}


def read_entry(label: str, value: Any, folder: Path) -> Entry | None:
    """With its problem if it has one; None when it is disabled. folder: of mcp.json."""
    try:
        if not LABEL.fullmatch(label):
            raise BadEntry("expected a label of 1 to 64 letters, digits, - _ . and blanks")
        if not isinstance(value, dict):
            raise BadEntry("expected an object")
        if value.get("disabled") is True:
            return None
        for key in sorted(value.keys() - KNOWN):
            log.info("mcp.json: ignored the key %s of %s", one_line(repr(key), 80), label)
        if ("command" in value) == ("url" in value):
            raise BadEntry("expected either a command or a url")
        timeout_ms = _timeout(value.get("timeout"))
        if "url" in value:
            return Entry(label, url=_text(value, "url"), headers=_texts(value, "headers"),
                         timeout_ms=timeout_ms)
        return Entry(label, command=_command(label, value, folder), timeout_ms=timeout_ms)
    except BadEntry as error:
        return Entry(label, problem=one_line(f"{label} in mcp.json: {error}"))


def _command(label: str, value: dict, folder: Path) -> Command:
    args = value.get("args", [])
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise BadEntry("args: expected an array of strings")
    # Without a `cwd` too the folder of mcp.json: a server shall not depend on where we started.
    cwd = folder / _text(value, "cwd") if "cwd" in value else folder
    env = _env_file(folder / _text(value, "envFile")) if "envFile" in value else {}
    return Command(label, _text(value, "command"), tuple(_filled(arg, "args") for arg in args),
                   env | _texts(value, "env"), cwd)


# ---- values

def _text(value: dict, key: str) -> str:
    text = value[key]
    if not isinstance(text, str) or not text.strip():
        raise BadEntry(f"{key}: expected a string with something in it")
    return _filled(text, key)


def _texts(value: dict, key: str) -> dict[str, str]:
    found = value.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise BadEntry(f"{key}: expected an object of strings")
    if key == "env" and any(not name or "=" in name or "\0" in name for name in found):
        raise BadEntry("env: expected names of variables")
    return {name: _filled(text, f"{key}.{name}") for name, text in found.items()}


def _filled(text: str, where: str) -> str:
    """With ${env:NAME} and ${userHome} replaced."""
    def value(place: re.Match) -> str:
        if place[1] is None:
            return os.path.expanduser("~")
        if place[1] not in os.environ:
            raise BadEntry(f"{where}: the variable {place[1][:80]} of the environment is not set")
        return os.environ[place[1]]
    text = _PLACE.sub(value, text)
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise BadEntry(f"{where}: expected text without NUL and halves of characters")
    return text


def _timeout(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= MAX_TIMEOUT_MS:
        raise BadEntry(f"timeout: expected 1 to {MAX_TIMEOUT_MS} milliseconds")
    return value


def _env_file(path: Path) -> dict[str, str]:
    """Lines of NAME=value; an `export` before them and quotes round the value may be there."""
    found = {}
    try:
        lines = _text_of(path).split("\n")
    except McpError as error:
        raise BadEntry(f"envFile: {error}") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.removeprefix("export ").partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not name or "\0" in line:
            raise BadEntry(f"envFile: {path}, line {number}: expected NAME=value")
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[name] = value
    return found


# ---- the file

def _text_of(path: Path) -> str:
    """Raises: McpError."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise McpError(f"{path}: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise McpError(f"{path}: expected at most {MAX_BYTES} bytes, got more")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[:error.start]
        raise McpError(f"{path}, line {before.count(10) + 1}, column "
                       f"{error.start - before.rfind(10)}: expected UTF-8") from None


def _json(path: Path, text: str) -> Any:
    """Raises: McpError with line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise McpError(f"{path}, line {error.lineno}, column {error.colno}: expected JSON: "
                       f"{error.msg}") from None
    except (ValueError, RecursionError):  # a number or a nesting beyond all sense
        raise McpError(f"{path}: expected JSON of a usual size") from None
