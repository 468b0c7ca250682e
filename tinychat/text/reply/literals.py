"""Literal texts of a format as a probe finds them: markers, free white space, numbers, ids.

A literal is a string in which a run of white space stands for any white space or none, and three
private characters stand for what changes from call to call.
"""
import re
from functools import lru_cache
from os.path import commonprefix  # of any texts, character by character

NUMBER = "\U0010F000"   # digits
ANY_ID = "\U0010F001"   # the id of a call
FREE = "\U0010F002"     # the inside of an attribute's quotes

MARKER = re.compile(
    r"<\|open\|>.*?<\|sep\|>|<\|close\|>.*?<\|sep\|>"     # composite tags
    r"|\]<\][^<>\[\]\s]+\[>\[<[^<>\n]*>"
    r"|<\|\"\|>|<[^<>\s][^<>\n]*>"                        # tags
    r"|\[/?[A-Z][A-Z_ ]*[A-Z]\]"
    r"|\[e~\[|\]~[a-z]\]", re.S)
_ATOMS = re.compile(f"\\s+|[{NUMBER}{ANY_ID}{FREE}]|[^\\s{NUMBER}{ANY_ID}{FREE}]+")
_CHANGING = (" ", NUMBER, ANY_ID, FREE)


@lru_cache(512)
def atoms(literal: str) -> tuple[str, ...]:
    """'\\n<a> b' -> (' ', '<a>', ' ', 'b'): texts, ' ' for white space, and the private characters."""
    return tuple(" " if atom.isspace() else atom for atom in _ATOMS.findall(literal))


def first_text(literal: str) -> str:
    """What a search for the literal looks for: '\\n<tool_call>\\n{' -> '<tool_call>'."""
    return next(iter(fixed_texts(literal)), "")


def fixed_texts(literal: str) -> list[str]:
    """The atoms that stand for themselves."""
    return [atom for atom in atoms(literal) if atom not in _CHANGING]


def markers(text: str) -> list[str]:
    return [match[0] for match in MARKER.finditer(text)]


def common_prefix(a: str, b: str) -> int:
    """How far both agree, cut back so as not to end inside a marker of either."""
    n = len(commonprefix([a, b]))
    return min(_outside_marker(a, n), _outside_marker(b, n))


def common_suffix(a: str, b: str) -> int:
    """How much of their ends both share, beginning at no marker's inside."""
    n = n_common_end(a, b)
    for text in (a, b):
        for match in MARKER.finditer(text):
            if match.start() < len(text) - n < match.end():
                n = len(text) - match.end()
    return n


def n_common_end(a: str, b: str) -> int:
    return len(commonprefix([a[::-1], b[::-1]]))


def _outside_marker(text: str, n: int) -> int:
    for match in MARKER.finditer(text):
        if match.start() < n < match.end():
            return match.start()
    return n


def is_plain(marker: str) -> bool:
    """A plain tag in running prose is prose; a marker with a bar is one wherever it stands."""
    return "|" not in marker and "｜" not in marker


def held_back(text: str, wanted: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that may begin one: ("a <th", ("<think>",)) -> 3"""
    longest = max(map(len, wanted), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1)
                 if any(len(one) > n and one.startswith(text[-n:]) for one in wanted)), 0)
