"""Settings: a flag and an environment variable for each, and the kinds of value they take."""
import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

from tinychat.errors import TinychatError


def count(text: str) -> int:
    return _integer(text, 1, 2**63 - 1)


def port(text: str) -> int:
    return _integer(text, 0, 65535)


def seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def switch(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True,
             "0": False, "false": False, "no": False, "off": False}
    if text.strip().lower() not in words:
        raise ValueError
    return words[text.strip().lower()]


def address(text: str) -> str:
    return text


def _integer(text: str, low: int, high: int) -> int:
    number = int(text)
    if not low <= number <= high:
        raise ValueError
    return number


@dataclass(frozen=True)
class Setting:
    """A flag `--name-with-dashes` and an environment variable TINYCHAT_NAME.

    kind: reads the text of either, or raises ValueError; its name says what was expected.
    """

    name: str
    kind: Callable[[str], object]
    default: object
    help: str
    commands: tuple[str, ...] = ("serve",)
    aliases: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        return f"TINYCHAT_{self.name.upper()}"

    def value(self, given):
        """The flag's value, else the environment's, else the default. Raises: TinychatError."""
        text = os.environ.get(self.variable)
        if given is not None or not text:
            return self.default if given is None else given
        try:
            return self.kind(text)
        except ValueError:
            raise TinychatError(
                f"{self.variable}: expected a {self.kind.__name__}, got {text!r}") from None

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        flag = "--" + self.name.replace("_", "-")
        if self.kind is switch:
            note = f"{self.help} (default: {'on' if self.default else 'off'})"
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None,
                                help=note)
        else:
            note = self.help + ("" if self.default is None else f" (default: {self.default})")
            parser.add_argument(flag, *self.aliases, type=self.kind, help=note,
                                metavar=self.kind.__name__.upper())


SETTINGS = (
    Setting("host", address, "127.0.0.1", "where to listen"),
    Setting("port", port, 1234, "0 takes a free one"),
    Setting("default_context_length", count, 4096,
            "tokens of a chat, never above the model's own limit", ("serve", "chat"),
            ("--context-length",)),
    Setting("parallel", count, 4, "requests that generate at once, per model"),
    Setting("queue_limit", count, 64, "requests that may wait, per model"),
    Setting("jit", switch, True, "load models when they are first asked for"),
    Setting("threads", count, None, "threads that compute; left out: the cores of this process",
            ("serve", "chat", "bench")),
    Setting("cors", switch, False, "let web pages of any origin in"),
    Setting("max_body_bytes", count, 67_108_864, "largest request body"),
    Setting("sse_keepalive_seconds", seconds, 15.0,
            "silence in a stream before it gets a comment; 0: never"),
)
LIBRARY_SETTINGS = {"default_context_length", "parallel", "queue_limit", "jit", "threads"}


def settings_of(args: argparse.Namespace) -> tuple[dict, dict]:
    """What the command line and the environment say: the library's settings, and the server's."""
    found = {setting.name: setting.value(getattr(args, setting.name))
             for setting in SETTINGS if hasattr(args, setting.name)}
    ours = {name: found.pop(name) for name in LIBRARY_SETTINGS & found.keys()}
    return ours, found
