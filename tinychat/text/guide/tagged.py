"""Calls whose arguments are keys and values between tags, as text.

NAME sep (key_open KEY key_end VALUE val_close)* close, where a value that may be a string stands as
it is up to the first val_close, and the others are JSON.
"""
from collections.abc import Iterable
from typing import Any

from tinychat.text.reply.grammars.tagged import KEY
from tinychat.text.guide.automaton import Lazy, State, Symbols
from tinychat.text.guide.calls import Tools, in_section
from tinychat.text.guide.members import Members
from tinychat.text.guide.pieces import (
    SPACE, a_word, any_of, closing, literal, loose, one_of, optional, until, utf8,
)
from tinychat.text.guide.schema import kind_of, kinds, values
from tinychat.text.guide.values import Values, object_parts


def tagged_call(tools: Tools, *, sep: bytes, key_open: bytes, key_end: bytes, val_close: bytes,
                close: bytes, **section: bytes) -> State:
    """Known keys are offered, and keys of any name only where the schema knows none.

    section: see `calls.in_section`.
    """
    tags = _Tags(key_open, key_end, val_close, close)
    return in_section(one_of((utf8(name), (*loose(sep), tags.members(schema)))
                             for name, schema in tools), **section)


class _Tags:
    def __init__(self, key_open: bytes, key_end: bytes, val_close: bytes, close: bytes):
        self._key_open = (SPACE, *loose(key_open.strip()))
        self._key_end, self._val_close = key_end, val_close
        self._close = closing(close)
        edges = key_end[-1:] == b"\n", val_close[:1] == b"\n"
        self._line_before, self._line_after = (
            optional(literal(b"\n")) if edge else any_of(()) for edge in edges)

    def members(self, schema: dict) -> Lazy:
        inner = Values(schema)
        return Lazy(lambda: [(self._members(inner, plain).start(),) for plain in inner.objects()])

    def _members(self, inner: Values, plain: dict) -> Members:
        properties, required, other = object_parts(plain)
        names = [name for name in properties if name.isprintable()]  # others end at a line break
        keys = [((name.encode(),), self._value(inner, properties[name], name)) for name in names]
        bits = sum(1 << i for i, name in enumerate(names) if name in required)
        names_key = KEY.encode() in self._val_close  # then a key has to be known to be closed
        any_key = other is not None and not keys and not names_key
        return Members(keys, bits, others=((b"", a_word(), b""),),
                       other_value=self._value(inner, other, "") if any_key else None,
                       first=self._key_open, comma=self._key_open, end=self._close)

    def _value(self, inner: Values, schema: Any, key: str) -> Symbols:
        """Of one parameter, with what stands before and after it."""
        before, end = self._key_end.rstrip(), self._val_close.replace(KEY.encode(), key.encode())
        end = end.strip() or b"\n"
        return (*loose(before), Lazy(lambda: self._options(inner, schema, end)))

    def _options(self, inner: Values, schema: Any, end: bytes) -> Iterable[Symbols]:
        plains = inner.schemas.alternatives(schema)
        if any(values(plain) is None and "string" in kinds(plain) for plain in plains):
            return [(until(end),)]     # any text is fine, and so is any JSON
        texts = [utf8(value) for plain in plains
                 for value in values(plain) or () if kind_of(value) == "string"]
        found = [(self._line_before, *literal(text), self._line_after, *literal(end))
                 for text in texts if end not in text]
        rest = [plain if values(plain) is None else {"enum": others} for plain in plains
                if (others := [value for value in values(plain) or [None]
                               if kind_of(value) != "string"])]
        found += [(SPACE, inner.value(plain), SPACE, *literal(end)) for plain in rest]
        return found or [(until(end),)]
