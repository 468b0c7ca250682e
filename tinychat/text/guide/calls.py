"""Whole calls: the state of a text right after the marker that opens it, one function per grammar.

Literals are those that a probe of the template found (see `reply.literals`), as UTF-8: their white
space is free. After the arguments the closing literal is forced; an empty one forces nothing.
opening: what is left of the opening literal after the marker.
"""
from collections.abc import Sequence

from tinychat.text.guide.automaton import Lazy, Node, State, Symbols, start
from tinychat.text.guide.dialects import JSON, KEYWORDS, PYTHON, bare
from tinychat.text.guide.pieces import (
    BLANK, GAP, SPACE, any_of, closing, literal, loose, one_of, repeat, utf8,
)
from tinychat.text.guide.values import Values

Tools = Sequence[tuple[str, dict]]     # names and the schemas of their arguments


def json_call(tools: Tools, *, close: bytes, name_key: str = "name", args_key: str = "arguments",
              array: bool, many: bool, single_key: bool = False, opening: bytes = b"") -> State:
    """{"name": "f", "arguments": {…}}, the name first.

    array: in an array. many: one or more, separated by white space, a comma or a semicolon where
    they are in no array. single_key: {"f": {…}} instead.
    """
    def key(text: str) -> Symbols:
        return (*literal(JSON.key(text)[0]), BLANK)

    def after_name(schema: dict) -> Symbols:
        keyed = () if single_key else (*literal(b","), GAP, *key(args_key))
        return (*keyed, Values(schema).arguments(), GAP, *literal(b"}"))

    spell = JSON.key if single_key else JSON.scalar
    blank = (BLANK,) if single_key else ()
    names = one_of((text, (*blank, *after_name(schema)))
                   for name, schema in tools for text in spell(name))
    call = (*literal(b"{"), GAP, *(() if single_key else key(name_key)), names)
    comma = (*literal(b","), GAP) if array else \
        (SPACE, any_of((), literal(b","), literal(b";")), SPACE)
    calls = (*call, repeat((*comma, *call))) if many else call
    if array:
        calls = (*literal(b"["), GAP, *calls, GAP, *literal(b"]"))
    return start((*loose(opening), SPACE, *calls, *closing(close)))


def named_call(tools: Tools, *, sep: bytes, close: bytes, bare_keys: bytes | None,
               **section: bytes) -> State:
    """NAME sep {json} close. bare_keys: the marks round strings in the dialect with bare keys.

    section: see `in_section`.
    """
    dialect = JSON if bare_keys is None else bare(bare_keys)
    return in_section(one_of(
        (utf8(name), (*loose(sep), Values(schema, dialect).arguments(), *closing(close)))
        for name, schema in tools), **section)


def in_section(call: Node, *, opening: bytes = b"", again: bytes = b"",
               section_close: bytes = b"") -> State:
    """opening, a call, and as many more as there are, each after `again`; then section_close."""
    more = (repeat((SPACE, *loose(again.strip()), SPACE, call)),) if again.strip() else ()
    return start((*loose(opening), SPACE, call, *more, *closing(section_close)))


def python_call(tools: Tools, *, close: bytes, opening: bytes = b"") -> State:
    """[name(key=literal, …), …] close."""
    call = one_of((utf8(f"{name}("), _keywords(schema)) for name, schema in tools)
    return start((*loose(opening), SPACE, *literal(b"["), GAP, call, repeat((*literal(b","), GAP, call)), GAP,
                  *literal(b"]"), *closing(close)))


def _keywords(schema: dict) -> Symbols:
    values = Values(schema, PYTHON)
    return (Lazy(lambda: [
        (values.members(plain, KEYWORDS, first=(GAP,), end=(GAP, *literal(b")"))).start(),)
        for plain in values.objects()]),)
