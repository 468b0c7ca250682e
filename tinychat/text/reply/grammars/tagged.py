"""Calls whose arguments are key and value pairs between tags.

    <tool_call>            <tool_call>now
    <function=now>         <arg_key>zone</arg_key><arg_value>UTC</arg_value>
    <parameter=zone>       </tool_call>
    UTC
    </parameter>
    </function>
    </tool_call>
"""
import re
from dataclasses import dataclass
from typing import Any

from tinychat.text.reply import literals
from tinychat.text.reply.grammars.region import (
    NotACall, Reading, Region, accept_parts, close, openings_of, own_name)
from tinychat.text.reply.source import Ended, Source
from tinychat.text.reply.values import typed

KEY = "\U0010F003"  # in val_close: the key once more
CDATA = ("<![CDATA[", "]]>")
_CDATA = re.compile(r"\s*<!\[CDATA\[(.*)\]\]>\s*\Z", re.S)
_INNER_OPEN = re.compile(r"<(?:[\w.-]+:)?(?:function|invoke)(?:=| name=\"?)")


@dataclass(frozen=True)
class TaggedCalls:
    open: str
    sep: str
    key_open: str
    key_end: str
    val_close: str
    close: str
    section_open: str = ""
    section_close: str = ""

    def openings(self) -> tuple[str, ...]:
        inner = _INNER_OPEN.search(self.open)  # some models leave out the tag round it
        return openings_of(self.section_open, self.open, inner[0] if inner else "")

    def closing(self) -> str:
        return literals.first_text(self.section_close) or (self.close.split() or [""])[-1]

    def read(self, source: Source, region: Region) -> Reading:
        if self.section_open:
            yield from source.accept(self.section_open)
        whole = yield from self._open(source)
        if whole is None:
            raise NotACall
        while whole is not None:
            yield from self._call(source, region, offered_only=not whole)
            whole = yield from self._open(source)
        if self.section_close:
            yield from accept_parts(source, self.section_close)

    def _open(self, source: Source):
        """True: the whole opening was there; False: only its inner tag; None: neither."""
        if (yield from source.accept(" " + self.open)):
            return True
        inner = _INNER_OPEN.search(self.open)
        if inner and (yield from source.accept(" " + self.open[inner.start():])):
            return False
        return None

    def _call(self, source: Source, region: Region, offered_only: bool) -> Reading:
        sep, key, end = map(literals.first_text, (self.sep, self.key_open, self.close))
        gap = "" if sep else " "
        name = yield from source.word(sep, key, end, gap)
        if not name or offered_only and own_name(name) not in region.schemas:
            if source.ended and not name:
                raise Ended
            raise NotACall
        if not sep:  # then the name alone has to show that this is a call
            yield from self._check_name(source, region, own_name(name))
        region.name = own_name(name)
        yield from source.accept(self.sep)
        arguments: dict[str, Any] = {}
        schema = region.schemas.get(region.name, {})
        while (yield from source.match(" " + self.close)) is None and (
                yield from source.accept(" " + self.key_open)):
            key, value = yield from self._argument(source, schema)
            arguments[key] = value
        region.called(region.name, arguments)
        yield from close(source, region, self.close, self.key_open)

    def _check_name(self, source: Source, region: Region, name: str) -> Reading:
        if name in region.schemas:
            return
        for literal in (self.key_open, self.close):
            if (yield from source.match(" " + literal)) is not None:
                return
        if source.ended:
            raise Ended
        raise NotACall

    def _argument(self, source: Source, schema: dict):
        key = yield from source.word(literals.first_text(self.key_end) or ">")
        if key is None:
            raise Ended if source.ended else NotACall
        yield from source.accept(self.key_end.strip())
        ending = self.val_close.replace(KEY, key).strip()
        inside = ""
        if (yield from source.match(f" {CDATA[0]}")) is not None:
            inside, _ = yield from source.until(CDATA[1])
        text, _ = yield from source.until(ending)
        source.skip(len(ending))
        return key, self._value(inside + text, key, schema)

    def _value(self, text: str, key: str, schema: dict) -> Any:
        if match := _CDATA.match(text):
            return typed(match[1], key, schema)
        if self.key_end[-1:] == "\n":
            text = text.removeprefix("\n")
        if self.val_close[:1] == "\n":
            text = text.removesuffix("\n")
        return typed(text, key, schema)

    def name_in(self, begun: str) -> str | None:
        return None  # the region has it as soon as it is complete
