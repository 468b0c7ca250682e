"""Calls with the name before a JSON object: open, name, separator, object, close.

    [TOOL_CALLS]now[ARGS]{}        <|tool_call>call:now{zone:<|"|>UTC<|"|>}<tool_call|>
"""
import json
import re
from dataclasses import dataclass
from typing import Any

from tinychat.text.reply import literals
from tinychat.text.reply.grammars.region import (
    NotACall, Reading, Region, accept_parts, close, openings_of, own_name)
from tinychat.text.reply.source import Ended, Source
from tinychat.text.reply.values import BAD, MAX_DEPTH, parse

_BARE_WORD = re.compile(r"[^\s,:{}\[\]]+")


@dataclass(frozen=True)
class NamedCalls:
    """section_open, section_close: round all calls of a turn, empty where there is none.

    quote: in the dialect with bare keys, what stands round strings; empty for JSON.
    """

    open: str
    sep: str
    close: str
    section_open: str = ""
    section_close: str = ""
    quote: str = ""

    def openings(self) -> tuple[str, ...]:
        return openings_of(self.section_open, self.open)

    def closing(self) -> str:
        return literals.first_text(self.section_close) or literals.first_text(self.close)

    def read(self, source: Source, region: Region) -> Reading:
        if self.section_open:
            yield from source.accept(self.section_open)
        if not (yield from source.accept(" " + self.open)):
            raise NotACall
        while True:
            yield from self._call(source, region)
            if not (yield from source.accept(" " + self.open)):
                break
        if self.section_close:
            yield from accept_parts(source, self.section_close)

    def _call(self, source: Source, region: Region) -> Reading:
        first, last = self._sep_texts()
        gap = " " if self.sep[:1].isspace() else ""
        name = yield from source.word(first, last, gap, "{", literals.first_text(self.close))
        if not name:
            if source.ended:
                raise Ended
            raise NotACall
        region.name = own_name(name)
        if not (yield from source.accept(self.sep)) and last:
            yield from source.accept(" " + last)
        fenced = (yield from source.accept(" ```json")) or (yield from source.accept(" ```"))
        arguments: Any = {}
        char = yield from source.ahead()
        if char == "{":
            yield from source.space()
            text = yield from (bare_value(source, self.quote) if self.quote else source.value())
            arguments = parse_bare(text, self.quote) if self.quote else parse(text)
        elif not char:
            raise Ended
        elif (yield from source.match(" " + self.close)) is None or not self.close.strip():
            arguments = BAD
        if fenced:
            yield from source.accept(" ```")
        region.called(region.name, arguments)
        yield from close(source, region, self.close)

    def _sep_texts(self) -> tuple[str, str]:
        """The first text of the separator, and the last if it has more: an id between gets lost."""
        texts = literals.fixed_texts(self.sep)
        return (texts[0], texts[-1]) if texts else ("", "")

    def name_in(self, begun: str) -> str | None:
        return None  # the region has it as soon as it is complete


# The dialect with bare keys

def bare_value(source: Source, quote: str):
    """Reads {key:<|"|>text<|"|>,n:1}: brackets count outside the quote markers. Raises: Ended."""
    parts, depth = [], 0
    while True:
        text, end = yield from source.until(quote, "{", "}", "[", "]")
        parts += [text, source.skip(len(end))]
        if end == quote:
            text, _ = yield from source.until(quote)
            parts += [text, source.skip(len(quote))]
        else:
            depth += 1 if end in "{[" else -1
            if depth == 0:
                return "".join(parts)


def parse_bare(text: str, quote: str) -> Any:
    """'{key:<q>text<q>,n:1}' -> {"key": "text", "n": 1}; BAD when it is malformed."""
    try:
        reader = _BareReader(text, quote)
        value = reader.value(0)
        return value if not text[reader.at:].strip() else BAD
    except (ValueError, RecursionError):
        return BAD


class _BareReader:
    def __init__(self, text: str, quote: str):
        self.text, self.quote, self.at = text, quote, 0

    def take(self, token: str) -> bool:
        while self.text[self.at:self.at + 1].isspace():
            self.at += 1
        found = self.text.startswith(token, self.at)
        self.at += len(token) * found
        return found

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError
        if self.take("{"):
            return dict(self._members("}", depth, keys=True))
        if self.take("["):
            return self._members("]", depth, keys=False)
        if self.take(self.quote):
            return self._quoted()
        word = self._word()
        value = parse(word)  # a number, true, false, null, or JSON's own quotes
        return word if value is BAD else value

    def _members(self, end: str, depth: int, keys: bool) -> list:
        found = []
        while not self.take(end):
            if keys:
                key = self._quoted() if self.take(self.quote) else self._word().strip("\"'")
                if not self.take(":"):
                    raise ValueError
                found.append((key, self.value(depth + 1)))
            else:
                found.append(self.value(depth + 1))
            if not self.take(","):
                if not self.take(end):
                    raise ValueError
                break
        return found

    def _quoted(self) -> str:
        end = self.text.index(self.quote, self.at)
        text, self.at = self.text[self.at:end], end + len(self.quote)
        return text

    def _word(self) -> str:
        self.take("")
        if self.text.startswith('"', self.at):
            value, end = json.JSONDecoder(strict=False).raw_decode(self.text, self.at)
            word, self.at = self.text[self.at:end], end
            return word
        match = _BARE_WORD.match(self.text, self.at)
        if not match:
            raise ValueError
        self.at = match.end()
        return match[0]
