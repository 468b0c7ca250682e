"""Building blocks over bytes: literals, alternatives, white space, numbers, valid UTF-8."""
from collections.abc import Iterable
from functools import lru_cache

from tinychat.text.reply import literals
from tinychat.text.guide.automaton import Node, Symbols

# Whatever could go on for ever has a bound: a model that cannot stop is made to.
MAX_INDENT = 64
MAX_SPACE = 8
MAX_DIGITS = 20
MAX_ID = 64
_DIGITS = b"0123456789"
_HEX = b"0123456789abcdefABCDEF"
_ID = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:-"


def utf8(text: str) -> bytes:
    """Halves of UTF-16 pairs, which Python may hold and bytes may not, become question marks."""
    return text.encode("utf-8", "replace")


def a_byte(choices: Iterable[int]) -> Node:
    return Node({byte: () for byte in choices})


_BYTES = [a_byte([byte]) for byte in range(256)]


def literal(text: bytes) -> Symbols:
    return tuple(map(_BYTES.__getitem__, text))


def any_of(*options: Symbols) -> Node:
    return Node({}, *options)


def optional(symbols: Symbols) -> Node:
    return any_of((), symbols)


def repeat(symbols: Symbols) -> Node:
    """Any number of times, none included."""
    node = Node()
    node.instead = ((), (*symbols, node))
    return node


@lru_cache(64)
def up_to(n: int, choices: bytes) -> Node:
    """At most n bytes out of `choices`."""
    node = any_of(())
    for _ in range(n):
        node = Node(dict.fromkeys(choices, (node,)), ())
    return node


def one_of(options: Iterable[tuple[bytes, Symbols]]) -> Node:
    """One of the literals, then what belongs to it. One may be the beginning of another."""
    root = Node()
    for text, then in options:
        node = root
        for byte in text:
            (node,) = node.reads.setdefault(byte, (Node(),))
        node.instead += (then,)
    return root


# White space

BLANK = optional(literal(b" "))        # as models write it after : and ,
GAP = any_of((), literal(b" "), (*literal(b"\n"), up_to(MAX_INDENT, b" \t")))
SPACE = up_to(MAX_SPACE, b" \t\r\n")   # between the parts of a call, outside of a value


def a_word() -> Node:
    return any_of((a_byte(_ID), up_to(MAX_ID - 1, _ID)))


@lru_cache(512)
def loose(text: bytes) -> Symbols:
    """A literal of a format: its white space is free, its numbers, ids and attributes are any."""
    return tuple(node for atom in literals.atoms(text.decode())
                 for node in _LOOSE.get(atom) or literal(atom.encode()))


def closing(close: bytes) -> Symbols:
    """White space and the literal; nothing at all for an empty one."""
    return (SPACE, *loose(close.strip())) if close.strip() else ()


_LOOSE: dict[str, Symbols] = {
    " ": (SPACE,),
    literals.NUMBER: (a_byte(_DIGITS), up_to(5, _DIGITS)),
    literals.ANY_ID: (a_word(),),
    literals.FREE: (up_to(MAX_ID, _ID),),
}


# Numbers, as JSON has them; two digits of exponent keep every one of them finite

INTEGER = (optional(literal(b"-")),
           any_of(literal(b"0"), (a_byte(b"123456789"), up_to(MAX_DIGITS - 1, _DIGITS))))
_FRACTION = (*literal(b"."), a_byte(_DIGITS), up_to(MAX_DIGITS - 1, _DIGITS))
_EXPONENT = (a_byte(b"eE"), up_to(1, b"+-"), a_byte(_DIGITS), up_to(1, _DIGITS))
NUMBER = (*INTEGER, optional(_FRACTION), optional(_EXPONENT))


# Text: valid UTF-8. Source: Unicode, table 3-7, well-formed byte sequences

_TAIL = a_byte(range(0x80, 0xC0))
CHARACTERS: dict[int, Symbols] = {     # first byte -> the others
    **dict.fromkeys(range(0x80), ()),
    **dict.fromkeys(range(0xC2, 0xE0), (_TAIL,)),
    0xE0: (a_byte(range(0xA0, 0xC0)), _TAIL),
    **dict.fromkeys([*range(0xE1, 0xED), 0xEE, 0xEF], (_TAIL, _TAIL)),
    0xED: (a_byte(range(0x80, 0xA0)), _TAIL),
    0xF0: (a_byte(range(0x90, 0xC0)), _TAIL, _TAIL),
    **dict.fromkeys(range(0xF1, 0xF4), (_TAIL, _TAIL, _TAIL)),
    0xF4: (a_byte(range(0x80, 0x90)), _TAIL, _TAIL),
}


def quoted(end: int, escape: Symbols) -> Node:
    """The inside of a string up to its quote `end`: no raw control characters, and after a
    backslash an `escape`."""
    node = Node()
    node.reads = {byte: (*tails, node) for byte, tails in CHARACTERS.items() if byte >= 0x20}
    node.reads |= {ord("\\"): (*escape, node), end: ()}
    return node


_HEX_DIGIT = a_byte(_HEX)
_NO_SURROGATE = any_of((a_byte(set(_HEX) - set(b"dD")), _HEX_DIGIT, _HEX_DIGIT, _HEX_DIGIT),
                       (a_byte(b"dD"), a_byte(b"01234567"), _HEX_DIGIT, _HEX_DIGIT))
_PAIR = (a_byte(b"dD"), a_byte(b"89abAB"), _HEX_DIGIT, _HEX_DIGIT, *literal(b"\\u"),
         a_byte(b"dD"), a_byte(b"cdefCDEF"), _HEX_DIGIT, _HEX_DIGIT)
JSON_ESCAPE = (any_of((a_byte(b'"\\/bfnrt'),), (*literal(b"u"), _NO_SURROGATE),
                      (*literal(b"u"), *_PAIR)),)
PYTHON_ESCAPE = (any_of((a_byte(b"\"'\\bfnrt"),), (*literal(b"u"), _NO_SURROGATE)),)


@lru_cache(64)
def until(end: bytes) -> Node:
    """Any text, then `end`: the first place where it stands. Source: Knuth, Morris and Pratt."""
    nodes: dict[tuple[int, Symbols], Node] = {}
    node = nodes[0, ()] = Node()
    todo = [(0, ())]                   # how much of `end` has matched, what its character lacks
    while todo:
        matched, tails = todo.pop()
        for byte in tails[0].reads if tails else CHARACTERS:
            now = _matched(end, matched, byte)
            place = now, tails[1:] if tails else CHARACTERS[byte]
            if place not in nodes and now < len(end):
                nodes[place] = Node()
                todo.append(place)
            nodes[matched, tails].reads[byte] = (nodes[place],) if now < len(end) else ()
    return node


def _matched(end: bytes, n: int, byte: int) -> int:
    """The longest beginning of `end` at the end of its first n bytes and one more."""
    text = end[:n] + bytes([byte])
    return next(k for k in range(len(text), -1, -1) if end.startswith(text[len(text) - k:]))
