"""Values as models write them: JSON, Python literals instead of it, and text that a schema types."""
import json
import re
from typing import Any

MAX_DEPTH = 100
BAD = object()  # text that is no value

_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_NAME = re.compile(r"[^\W\d]\w*")
_NAMES = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_STRING = {quote: re.compile(rf"{quote}((?:[^{quote[0]}\\]|\\.|{quote[0]}(?!{quote[1:]}))*){quote}"
                             if len(quote) == 3 else rf"{quote}((?:[^{quote}\\]|\\.)*){quote}", re.S)
           for quote in ('"""', "'''", '"', "'")}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.S)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}


def parse(text: str) -> Any:
    """The value of JSON text, or of a Python literal that stands for it; else BAD."""
    value = _json(text)
    return parse_literal(text) if value is BAD else value


def _json(text: str) -> Any:
    """Raw control characters in strings are let through; halves of UTF-16 pairs are replaced."""
    try:
        value = json.loads(text, strict=False, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError):
        return BAD
    if too_deep(value):
        return BAD
    return _whole_characters(value) if "\\u" in text else value


def _no_number(name: str):
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if value - value == 0 else _no_number(text)


def _whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    return [_whole_characters(item) for item in value] if isinstance(value, list) else value


def too_deep(value: Any) -> bool:
    """Nested further than what an answer may carry."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return True


def parse_literal(text: str) -> Any:
    """A whole text that is one Python literal (or JSON's names in one); else BAD."""
    try:
        reader = LiteralReader(text)
        value = reader.value()
        reader.space()
    except (NoLiteral, RecursionError, ValueError, OverflowError):
        return BAD
    return value if reader.at == len(text) else BAD


class NoLiteral(Exception):
    """What was to be read is no literal."""


class LiteralReader:
    """Reads Python's literals at `at`, as far as they are JSON values: no code is run."""

    def __init__(self, text: str, at: int = 0):
        self.text, self.at, self._depth = text, at, 0

    def space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def more(self) -> bool:
        """Does anything but white space follow?"""
        self.space()
        return self.at < len(self.text)

    def take(self, text: str) -> bool:
        self.space()
        found = self.text.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def need(self, text: str) -> None:
        if not self.take(text):
            raise NoLiteral

    def name(self) -> str:
        self.space()
        match = _NAME.match(self.text, self.at)
        if not match:
            raise NoLiteral
        self.at = match.end()
        return match[0]

    def value(self) -> Any:
        self.space()
        char = self.text[self.at:self.at + 1]
        if char in ("'", '"') and char:
            return self.string()
        if char in ("[", "(", "{") and char:
            return self._nested(char)
        match = _NUMBER.match(self.text, self.at)
        if match:
            self.at = match.end()
            return _number(match[0])
        word = self.name()
        if word not in _NAMES:
            raise NoLiteral
        return _NAMES[word]

    def string(self) -> str:
        """One string, and those that follow it without a comma."""
        parts = []
        while True:
            self.space()
            quote = next((quote for quote in _STRING if self.text.startswith(quote, self.at)), "")
            match = _STRING[quote].match(self.text, self.at) if quote else None
            if not match:
                if parts:
                    return "".join(parts)
                raise NoLiteral
            self.at = match.end()
            parts.append(_ESCAPE.sub(_unescaped, match[1]))

    def _nested(self, char: str) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NoLiteral
        self.at += 1
        found = self._dict() if char == "{" else self._items("]" if char == "[" else ")")
        self._depth -= 1
        return found

    def _items(self, end: str) -> list:
        items = []
        while not self.take(end):
            items.append(self.value())
            if not self.take(","):
                self.need(end)
                break
        return items

    def _dict(self) -> dict:
        items = {}
        while not self.take("}"):
            key = self.value()
            if not isinstance(key, str):
                raise NoLiteral
            self.need(":")
            items[key] = self.value()
            if not self.take(","):
                self.need("}")
                break
        return items


def _number(text: str) -> int | float:
    text = text.replace("_", "")
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if value - value != 0:  # an infinity is no JSON
            raise NoLiteral from None
        return value


def _unescaped(match: re.Match) -> str:
    found = match[1]
    if found[0] in "xuU" and len(found) > 1:
        return chr(min(int(found[1:], 16), 0x10FFFF))
    if found[0].isdigit():
        return chr(int(found, 8)) if found.isascii() and set(found) <= set("01234567") else match[0]
    return _ESCAPED.get(found, found if found in "\\'\"" else match[0])


# Text that stands for a value, typed by the tool's schema

def properties_of(schema: dict) -> dict[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def typed(text: str, key: str, schema: dict) -> Any:
    """What the text of the parameter `key` means. schema: of all the tool's arguments."""
    properties = properties_of(schema)
    kinds = kinds_of(properties[key]) if key in properties else None
    if kinds is None:                           # not in the schema, or any type goes
        value = _json(text)
        return text if value is BAD else value
    if kinds == {"string"}:
        return text
    value = _json(text)
    if "string" in kinds:
        return value if value is not BAD and any(
            kind != "string" and is_of(value, kind) for kind in kinds) else text
    if value is BAD:
        value = parse_literal(text.strip())
    return text if value is BAD else value


KINDS = ("string", "number", "integer", "boolean", "null", "array", "object")


def kinds_of(schema: Any, depth: int = 0) -> set[str] | None:
    """The JSON types that a schema lets through; None: any."""
    if not isinstance(schema, dict) or depth > 20:
        return None
    if isinstance(kinds := schema.get("type"), (str, list)):
        kinds = {kinds} if isinstance(kinds, str) else {kind for kind in kinds if kind in KINDS}
        return kinds or None
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list):
            found = [kinds_of(choice, depth + 1) for choice in choices]
            return None if None in found or not found else set().union(*found)
    values = schema.get("enum") if isinstance(schema.get("enum"), list) else (
        [schema["const"]] if "const" in schema else None)
    return {kind_of(value) for value in values} if values else None


def kind_of(value: Any) -> str:
    """The narrowest JSON type of a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    kinds = {str: "string", int: "integer", list: "array", dict: "object"}
    return kinds.get(type(value)) or ("integer" if value == int(value) else "number")


def is_of(value: Any, kind: str) -> bool:
    found = kind_of(value)
    return found == kind or kind == "number" and found == "integer" or kind not in KINDS
