"""Calls as JSON: open, an object or an array of objects, close.

    <tool_call>{"name": "now", "arguments": {}}</tool_call>      [TOOL_CALLS][{"name": …}, {…}]
"""
import re
from dataclasses import dataclass
from typing import Any

from tinychat.text.reply import literals
from tinychat.text.reply.grammars.region import (
    NotACall, Reading, Region, close, openings_of, own_name)
from tinychat.text.reply.source import Source
from tinychat.text.reply.values import BAD, parse

NAME_KEYS = ("name", "tool_name", "function", "tool")
ARGUMENTS_KEYS = ("arguments", "parameters", "args", "input")
_SCALAR = r'"[^"\\]*"\s*:\s*(?:"[^"\\]*"|-?\d+|null|true|false)\s*,\s*'
_KEY = "|".join(NAME_KEYS)
# The name at the beginning of an object or of an array's first, simple members before it.
_EARLY_NAME = re.compile(rf'\s*\[?\s*\{{\s*(?:"function"\s*:\s*\{{\s*)?'
                         rf'(?:(?!"(?:{_KEY})"){_SCALAR})*"(?:{_KEY})"\s*:\s*"([^"\\]*)"')
_ARGUMENTS_KEY = re.compile(rf'"(?:{"|".join(ARGUMENTS_KEYS)})"\s*:')


@dataclass(frozen=True)
class JsonCalls:
    """An empty `open`: the whole output is the call, or none of it.

    name_key, arguments_key, array: how the template writes a call, for those who have to write or to
    force one; without a name_key the name is the key of the arguments.
    """

    open: str = "<tool_call>"
    close: str = "</tool_call>"
    name_key: str = "name"
    arguments_key: str = "arguments"
    array: bool = False

    def openings(self) -> tuple[str, ...]:
        return openings_of(self.open)

    def closing(self) -> str:
        return literals.first_text(self.close)

    def read(self, source: Source, region: Region) -> Reading:
        if not (yield from source.accept(self.open)):
            raise NotACall
        fenced = (yield from source.accept(" ```json")) or (yield from source.accept(" ```"))
        if (yield from source.space()) not in ("{", "["):
            raise NotACall
        while (yield from source.ahead()) in ("{", "["):
            region.finish()  # another value shows that the calls before have ended
            yield from source.space()
            found = calls_in(parse((yield from source.value())), region.schemas)
            if found is None or not (self.open or all(has_both for *_, has_both in found)):
                raise NotACall
            for name, arguments, _ in found:
                region.called(name, arguments)
            source.begun = ""
            yield from self._separator(source)
        if fenced:
            yield from source.accept(" ```")
        yield from close(source, region, self.close)

    @staticmethod
    def _separator(source: Source) -> Reading:
        for literal in (" ,", " ;"):
            at = yield from source.match(literal + " ")
            if at is not None and source.rest[at:at + 1] in ("{", "["):
                source.skip(at)

    def name_in(self, begun: str) -> str | None:
        """The name at the beginning of a value that is not complete.

        With an empty `open` only when arguments have begun too: until then it may be an answer.
        """
        match = _EARLY_NAME.match(begun)
        if not match or not (self.open or _ARGUMENTS_KEY.search(begun, match.end())):
            return None
        return own_name(match[1])


def calls_in(value: Any, schemas: dict[str, dict]) -> list[tuple[str, Any, bool]] | None:
    """(name, arguments, whether both had keys of their own) of each call; None: it is no call."""
    found = [_call(item, schemas) for item in (value if isinstance(value, list) else [value])]
    return None if None in found else found


def _call(value: Any, schemas: dict[str, dict]) -> tuple[str, Any, bool] | None:
    if not isinstance(value, dict) or not value:
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = next((value[key] for key in NAME_KEYS if isinstance(value.get(key), str)), None)
    if name is None:
        (key, inner), *others = value.items()
        if others or not isinstance(inner, dict):
            return None
        return own_name(key), inner, own_name(key) in schemas
    key = next((key for key in ARGUMENTS_KEYS if key in value), None)
    arguments = value.get(key) if key else None
    if isinstance(arguments, str):
        arguments = parse(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else None if arguments is BAD else arguments
    return own_name(name), arguments, key is not None
