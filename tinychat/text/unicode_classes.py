r"""Unicode classes for `re`, which knows no `\p{...}`: exact ranges, computed from `unicodedata`.

`expand` rewrites `\p{L}`, `\p{Lu}`, `\s` and the like, inside and outside of brackets. `\s` becomes
the White_Space property: Python's own adds U+001C to U+001F, which no tokenizer counts as space.

The classes are those of the running Python (3.10: Unicode 13, 3.13: 15.1; llama.cpp has 16), so
characters that one version has and another has not may be cut differently. Building the table
takes 40 ms, once per process.
"""
import re
import unicodedata
from functools import cache

WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Script=Han, which `unicodedata` does not tell. Source: Unicode 16, Scripts.txt.
HAN = ("\u2e80-\u2e99\u2e9b-\u2ef3\u2f00-\u2fd5\u3005\u3007\u3021-\u3029\u3038-\u303b"
       "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufa6d\ufa70-\ufad9\U00016fe2\U00016fe3"
       "\U00016ff0\U00016ff1\U00020000-\U0002a6df\U0002a700-\U0002ebe0\U0002ebf0-\U0002ee5d"
       "\U0002f800-\U0002fa1d\U00030000-\U000323af")

_LAST_ASSIGNED = 0x40000               # beyond: only tags, variation selectors, private use
_TAGS = range(0xE0000, 0xE1000)
_PIECES = re.compile(r"\\p\{(\^?)(\w+)\}|\\.|\[|\]|[^\\\[\]]+", re.DOTALL)


def expand(pattern: str) -> str:
    r"""A pattern for `re` from one that uses `\p{...}`.

    >>> expand(r"[\p{Nd}]")[:8]
    '[0-9٠-٩۰'
    """
    parts, inside = [], False
    for match in _PIECES.finditer(pattern):
        part = match[0]
        if match[2] or part == r"\s":
            members = class_members(match[2]) if match[2] else WHITE_SPACE
            part = members if inside else f"[{match[1] or ''}{members}]"
        elif part == r"\S":
            part = f"[^{WHITE_SPACE}]"
        elif part in "[]":
            inside = part == "["
        parts.append(part)
    return "".join(parts)


@cache
def class_members(name: str) -> str:
    """What stands between the brackets of a class: a general category ("Lu"), its first letter
    ("L"), or "Han"."""
    if name == "Han":
        return HAN
    letters = "".join(code for category, code in _codes().items() if category.startswith(name))
    return "".join(_range(m.start(), m.end() - 1)
                   for m in re.finditer(f"[{letters}]+", _categories()))


def _range(first: int, last: int) -> str:
    return _escape(first) if first == last else f"{_escape(first)}-{_escape(last)}"


def _escape(code: int) -> str:
    code = code if code < _LAST_ASSIGNED else code - _LAST_ASSIGNED + _TAGS.start
    return chr(code) if code > 127 or chr(code).isalnum() else f"\\x{code:02x}"


@cache
def _codes() -> dict[str, str]:
    """A letter for each general category, so that a run of one class is a run in a string."""
    names = "Cc Cf Cn Co Cs Ll Lm Lo Lt Lu Mc Me Mn Nd Nl No Pc Pd Pe Pf Pi Po Ps Sc Sk Sm So " \
            "Zl Zp Zs".split()
    return {name: chr(ord("A") + i) for i, name in enumerate(names)}


@cache
def _categories() -> str:
    """The code of each character's category; position `_LAST_ASSIGNED` + i is character E0000 + i."""
    codes = _codes()
    characters = [*map(chr, range(_LAST_ASSIGNED)), *map(chr, _TAGS)]
    return "".join(map(codes.__getitem__, map(unicodedata.category, characters)))
