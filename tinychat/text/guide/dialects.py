"""How values are spelled: JSON, Python literals, and JSON with bare keys and marked strings."""
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tinychat.text.guide.automaton import Node, Symbols
from tinychat.text.guide.pieces import (
    JSON_ESCAPE, PYTHON_ESCAPE, any_of, literal, quoted, until, utf8,
)

Spellings = tuple[bytes, ...]
_BARE_NAME = re.compile(r"[A-Za-z0-9_.$-]+")
_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_"


@dataclass(frozen=True)
class Dialect:
    """scalar: spellings of a string, number, boolean or null; several, as models have habits.

    key: spellings of a key with all that stands before the blank and its value; none: the dialect
    cannot write it. other_keys: (opening, text with its end, rest) of a key that is not known.
    """

    string: Symbols
    scalar: Callable[[Any], Spellings]
    key: Callable[[str], Spellings]
    other_keys: tuple[tuple[bytes, Node, bytes], ...]


# JSON

def _json_scalar(value: Any) -> Spellings:
    """Non-ASCII as itself and as json.dumps escapes it."""
    texts = dict.fromkeys([json.dumps(value, ensure_ascii=False), json.dumps(value)])
    return tuple(utf8(text) for text in texts)


_JSON_TEXT = quoted(ord('"'), JSON_ESCAPE)

JSON = Dialect(
    string=(*literal(b'"'), _JSON_TEXT),
    scalar=_json_scalar,
    key=lambda name: tuple(text + b":" for text in _json_scalar(name)),
    other_keys=((b'"', _JSON_TEXT, b":"),),
)


# Python: either quote, Python's names and JSON's

def _python_scalar(value: Any) -> Spellings:
    if isinstance(value, str):
        return _python_string(value, '"'), _python_string(value, "'")
    if value is None or isinstance(value, bool):
        return repr(value).encode(), json.dumps(value).encode()
    return _json_scalar(value)


def _python_string(text: str, quote: str) -> bytes:
    text = text.replace("\\", "\\\\").replace(quote, "\\" + quote)
    text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return utf8(f"{quote}{text}{quote}")


_PYTHON_TEXTS = tuple((quote, quoted(ord(quote), PYTHON_ESCAPE)) for quote in (b'"', b"'"))

PYTHON = Dialect(
    string=(any_of(*((*literal(quote), text) for quote, text in _PYTHON_TEXTS)),),
    scalar=_python_scalar,
    key=lambda name: tuple(text + b":" for text in _python_scalar(name)),
    other_keys=tuple((quote, text, b":") for quote, text in _PYTHON_TEXTS),
)


def _word(end: int) -> Node:
    """A name as Python has them, of ASCII alone, then `end`."""
    more = Node()
    more.reads = {**dict.fromkeys(_LETTERS + b"0123456789", (more,)), end: ()}
    return Node(dict.fromkeys(_LETTERS, (more,)))


KEYWORDS = replace(               # the arguments of a Python call
    PYTHON,
    key=lambda name: (f"{name}=".encode(),) if name.isidentifier() else (),
    other_keys=((b"", _word(ord("=")), b""),),
)


# Bare keys

@lru_cache(16)
def bare(quote: bytes) -> Dialect:
    """{key:<|"|>text<|"|>,n:1}: strings are verbatim between the marks `quote`."""
    def scalar(value: Any) -> Spellings:
        if not isinstance(value, str):
            return (json.dumps(value).encode(),)
        return (quote + utf8(value) + quote,)

    def key(name: str) -> Spellings:
        bare_name = _BARE_NAME.fullmatch(name)
        return (name.encode() + b":",) if bare_name else (scalar(name)[0] + b":",)

    return Dialect((*literal(quote), until(quote)), scalar, key,
                   ((b"", _word(ord(":")), b""),))
