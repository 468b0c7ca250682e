"""Settings: a flag, an environment variable and a key of the settings file for each, in that order
of precedence, and the kinds of value they take."""
import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tinychat.errors import TinychatError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_NAME, CONFIG_VARIABLE = "config.toml", "TINYCHAT_CONFIG"
MAX_CONFIG_BYTES = 1 << 20
MAX_SECONDS = 4_000_000  # 46 days; some systems cannot wait for 50


def count(text: str) -> int:
    return _integer(text, 1, 2**63 - 1)


def port(text: str) -> int:
    return _integer(text, 0, 65535)


def threads(text: str) -> int:
    return _integer(text, 1, 1024)


def seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= MAX_SECONDS:
        raise ValueError
    return number


def switch(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True,
             "0": False, "false": False, "no": False, "off": False}
    if text.strip().lower() not in words:
        raise ValueError
    return words[text.strip().lower()]


def patience(text: str) -> float:
    """Seconds of which there must be some."""
    number = seconds(text)
    if number == 0:
        raise ValueError
    return number


def address(text: str) -> str:
    return text


def file(text: str) -> str:
    return text if text == ":memory:" else os.path.expanduser(text)


def folders(text: str) -> tuple[str, ...]:
    return tuple(os.path.expanduser(part) for part in text.split(os.pathsep) if part)


def reach(text: str) -> str:
    """Which addresses MCP servers of a request may have."""
    if text not in ("off", "public", "local"):
        raise ValueError
    return text


def kv_type(text: str) -> str:
    if text not in ("f16", "q8_0", "f32"):
        raise ValueError
    return text


def _integer(text: str, low: int, high: int) -> int:
    number = int(text)
    if not low <= number <= high:
        raise ValueError
    return number


EXPECTED = {count: "a count of at least 1", port: "a port", threads: "1 to 1024 threads",
            kv_type: "f16, q8_0 or f32",
            seconds: f"a number of seconds up to {MAX_SECONDS}",
            patience: f"a number of seconds above 0 and up to {MAX_SECONDS}",
            switch: "on or off", address: "an address", file: "a file's path",
            folders: f"paths with {os.pathsep} between", reach: "off, public or local"}


@dataclass(frozen=True)
class Setting:
    """A flag `--name-with-dashes`, an environment variable TINYCHAT_NAME, a key of the file.

    kind: reads the text of each, or raises ValueError. takes: whose argument the value becomes, and
    its name there; empty: the command's own.
    """

    name: str
    kind: Callable[[str], object]
    default: object
    help: str
    takes: str = ""
    commands: tuple[str, ...] = ("serve",)
    aliases: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        return f"TINYCHAT_{self.name.upper()}"

    def value(self, given, config: Mapping = {}) -> tuple[object, str]:
        """The flag's value, else the environment's, the file's, or the default; and whence.

        Raises: TinychatError.
        """
        if given is not None:
            return given, "flag"
        if text := os.environ.get(self.variable):
            return self._read(self.variable, text), self.variable
        if self.name in config:
            where, value = f"{self.name} in the settings file", config[self.name]
            if isinstance(value, bool) and self.kind is not switch:
                raise TinychatError(f"{where}: expected {EXPECTED[self.kind]}, got "
                                    f"{str(value).lower()}")
            return self._read(where, _text(value)), "file"
        return self.default, "default"

    def _read(self, where: str, text: str):
        try:
            return self.kind(text)
        except ValueError:
            raise TinychatError(f"{where}: expected {EXPECTED[self.kind]}, got {text!r}") from None

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        flag = "--" + self.name.replace("_", "-")
        if self.kind is switch:
            note = f"{self.help} (default: {'on' if self.default else 'off'})"
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None,
                                help=note)
        else:
            known = self.default is not None and self.default != ()
            note = self.help + (f" (default: {self.default})" if known else "")
            parser.add_argument(flag, *self.aliases, type=self.kind, help=note,
                                metavar=self.kind.__name__.upper())


SETTINGS = (
    Setting("host", address, "127.0.0.1", "where to listen", "server.host"),
    Setting("port", port, 1234, "0 takes a free one", "server.port"),
    Setting("require_auth", switch, None, "only with a token of `tinychat token create`",
            "server.require_auth"),
    Setting("cors", switch, False, "let web pages of any origin in", "server.cors"),
    Setting("ephemeral_mcp", reach, None, "MCP servers that requests bring along: off, at public "
            "addresses, or local ones too (default: local on a loopback address, else off)",
            "server.ephemeral_mcp"),
    Setting("allow_mcp_json", switch, None, "requests may use the servers of mcp.json; needs "
            "--require-auth", "server.allow_mcp_json"),
    Setting("mcp_json", file, None, "use the servers of this file: turns on --allow-mcp-json and "
            "--require-auth, and makes a token if there is none; left out: mcp.json in the data "
            "folder", "server.mcp_json"),
    Setting("mcp_connect_timeout_ms", count, 30_000, "for an MCP server to be connected and its "
            "tools listed", "server.mcp_connect_timeout_ms"),
    Setting("mcp_call_timeout_ms", count, 60_000, "for one tool call without a sign of life",
            "server.mcp_call_timeout_ms"),
    Setting("max_tool_rounds", count, 25, "rounds of a request with tool calls; one last round has "
            "no tools", "server.max_tool_rounds"),
    Setting("guided_tool_calls", switch, True, "hold a tool call that has begun to the tool's "
            "schema", "server.guided_tool_calls"),
    Setting("models_folders", folders, (), "more folders, or files, with models", "library.extra",
            ("serve", "chat", "list")),
    Setting("default_context_length", count, 4096,
            "tokens of a chat, never above the model's own limit", "library.default_context_length",
            ("serve", "chat"), ("--context-length",)),
    Setting("parallel", count, 4, "requests that generate at once, per model", "library.parallel"),
    Setting("kv_type", kv_type, "f16", "how keys and values are kept: f32, f16, or q8_0, which "
            "takes half of f16's memory", "library.kv_type", ("serve", "chat")),
    Setting("queue_limit", count, 64, "requests that may wait, per model", "library.queue_limit"),
    Setting("prompt_lookup", switch, True, "guess how a text goes on from what it repeats, where "
            "that makes it faster; the text stays the same", "library.prompt_lookup",
            ("serve", "chat")),
    Setting("jit", switch, True, "load models when they are first asked for", "library.jit"),
    Setting("auto_evict", switch, True, "loading on demand first unloads what was loaded on demand",
            "library.auto_evict"),
    Setting("default_ttl_seconds", seconds, 3600.0, "idle time after which a model that was loaded "
            "on demand is unloaded; 0: never", "library.default_ttl_seconds"),
    Setting("threads", threads, None, "threads that compute; left out: the cores of this process",
            "library.threads", ("serve", "chat", "bench")),
    Setting("store", file, None, "where chats are kept; :memory: forgets them at the end; left out: "
            "a file in the data folder", "store.path"),
    Setting("max_stored_responses", count, 10_000, "the oldest go first", "store.max_responses"),
    Setting("max_body_bytes", count, 67_108_864, "largest request body", "server.max_body_bytes"),
    Setting("max_connections", count, 512, "open at once; more are refused",
            "server.max_connections"),
    Setting("idle_timeout_seconds", patience, 75.0, "how long a connection may be silent between "
            "two requests", "server.idle_timeout_s"),
    Setting("sse_keepalive_seconds", seconds, 15.0,
            "silence in a stream before it gets a comment; 0: never",
            "server.sse_keepalive_seconds"),
    Setting("shutdown_seconds", seconds, 5.0, "how long running requests may take to finish when "
            "the server stops", "server.shutdown_s"),
    Setting("access_log", switch, True, "a line per request on standard error"),
)


@dataclass(frozen=True)
class Decided:
    """Every setting of a command with its value, and whence that came."""

    values: dict[str, object]
    origins: dict[str, str]

    def of(self, room: str) -> dict[str, object]:
        """The keyword arguments of "library", "server" or "store"."""
        rooms = {setting.name: setting.takes.partition(".") for setting in SETTINGS}
        return {rooms[name][2]: value for name, value in self.values.items()
                if rooms[name][0] == room}

    def toml(self, **defaults) -> str:
        """As a settings file, which says the same when it is read.

        defaults: what is meant where nothing was said, and the table of settings does not know it.
        """
        return "".join(_line(name, defaults.get(name) if value is None else value,
                             self.origins[name]) for name, value in self.values.items())


def decide(args: argparse.Namespace) -> Decided:
    """What command line, environment and settings file say. Raises: TinychatError."""
    config = read_config(getattr(args, "config", None))
    found = {setting.name: setting.value(getattr(args, setting.name), config)
             for setting in SETTINGS if hasattr(args, setting.name)}
    return Decided({name: value for name, (value, _) in found.items()},
                   {name: origin for name, (_, origin) in found.items()})


def read_config(given: str | None) -> dict:
    """The settings file: the one given, that of TINYCHAT_CONFIG, or config.toml in the data folder
    if there is one. Raises: TinychatError."""
    from tinychat.library import data_folder
    named = given or os.environ.get(CONFIG_VARIABLE)
    path = Path(named).expanduser() if named else data_folder() / CONFIG_NAME
    if not named and not path.is_file():
        return {}
    try:
        with open(path, "rb") as opened:
            config = tomllib.loads(opened.read(MAX_CONFIG_BYTES).decode())
    except OSError as error:
        raise TinychatError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TinychatError(f"{path}: no settings file: {error}") from error
    names = [setting.name for setting in SETTINGS]
    for name in config:
        if name not in names:
            raise TinychatError(f"{path}: no setting is called {name[:60]!r}; there are "
                                + ", ".join(names))
    return config


def _text(value) -> str:
    """A value of the file as the environment would have it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return os.pathsep.join(value)
    if not isinstance(value, (str, int, float)):
        raise TinychatError(f"the settings file: {type(value).__name__} is no kind of value for "
                            "a setting")
    return str(value)


def _line(name: str, value, origin: str) -> str:
    if value is None:
        return f"# {name} is left out\n"
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, (int, float)):
        text = repr(value)
    elif isinstance(value, tuple):
        text = "[" + ", ".join(map(_quoted, value)) + "]"
    else:
        text = _quoted(value)
    return f"{name} = {text}  # {origin}\n"


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's escapes are among its own."""
    import json
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
