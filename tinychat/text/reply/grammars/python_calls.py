"""Calls as Python writes them: open, [name(key=literal, …), …], close.

    <|tool_call_start|>[add_note(text="it's", pinned=True), now()]<|tool_call_end|>
"""
import re
from dataclasses import dataclass

from tinychat.text.reply import literals
from tinychat.text.reply.grammars.region import (
    NotACall, Reading, Region, close, openings_of, own_name)
from tinychat.text.reply.source import Ended, Source
from tinychat.text.reply.values import BAD, LiteralReader, NoLiteral

_EARLY_NAME = re.compile(r"\s*\[?\s*([^\W\d][\w.-]*)\(")
_CALL = re.compile(r"\s*([^\W\d][\w.-]*)\s*\(")
BOTH_QUOTES = "\"'"


@dataclass(frozen=True)
class PythonCalls:
    """With an empty `open` the output must begin with [name( and has no closing marker."""

    open: str = ""
    close: str = ""

    def openings(self) -> tuple[str, ...]:
        return openings_of(self.open)

    def closing(self) -> str:
        return literals.first_text(self.close)

    def read(self, source: Source, region: Region) -> Reading:
        if not (yield from source.accept(self.open)):
            raise NotACall
        char = yield from source.space()
        if char == "[":
            text = yield from source.value("[]{}()", BOTH_QUOTES)
            calls = calls_in(text)
            if calls is None:
                raise NotACall
            for name, arguments in calls:
                region.called(name, arguments)
            source.begun = ""
        elif self.open and char:
            yield from self._lines(source, region)
        else:
            raise NotACall
        yield from close(source, region, self.close)

    def _lines(self, source: Source, region: Region) -> Reading:
        """One call a line, without brackets round them."""
        while True:
            name = yield from source.word("(")
            if not name or not _CALL.fullmatch(name + "("):
                raise NotACall
            region.name = own_name(name)
            text = yield from source.value("()[]{}", BOTH_QUOTES)
            for _, arguments in calls_in(f"[{name}{text}]") or [(name, BAD)]:
                region.called(region.name, arguments)
            source.begun = ""
            char = yield from source.ahead()
            if not (char.isalpha() or char == "_"):
                return
            region.finish()

    def name_in(self, begun: str) -> str | None:
        match = _EARLY_NAME.match(begun)
        return own_name(match[1]) if match else None


def calls_in(text: str) -> list[tuple[str, object]] | None:
    """(name, arguments or BAD) of each call in '[f(a=1), g()]'; None when there is none."""
    calls, at = [], text.index("[") + 1
    while match := _CALL.match(text, at):
        end = _end_of_arguments(text, match.end() - 1)
        if end is None:
            return None
        calls.append((own_name(match[1]), _arguments(text[match.end():end])))
        at = end + 1
        rest = text[at:].lstrip()
        if not rest.startswith((",", ";")):
            break
        at = len(text) - len(rest) + 1
    return calls or None


def _end_of_arguments(text: str, at: int) -> int | None:
    """Where the parenthesis that opens at `at` closes; None when it never does."""
    source = Source(text[at:])
    source.end()
    try:
        for _ in source.value("()", BOTH_QUOTES):
            pass
    except Ended:
        return None
    return at + source.n_read - 1


def _arguments(text: str) -> object:
    reader, arguments = LiteralReader(text), {}
    try:
        while reader.more():
            key = reader.name()
            reader.need("=")
            arguments[key] = reader.value()
            if not reader.take(","):
                break
    except (NoLiteral, ValueError, RecursionError, OverflowError):
        return BAD
    return BAD if reader.more() else arguments
