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

_CATEGORIES = ("Cc Cf Cn Co Cs Ll Lm Lo Lt Lu Mc Me Mn Nd Nl No Pc Pd Pe Pf Pi Po Ps Sc Sk Sm So "
               "Zl Zp Zs").split()
_CODES = {name: chr(ord("A") + i) for i, name in enumerate(_CATEGORIES)}
# All that is assigned and not for private use: planes 0 to 3, then tags and variation selectors.
_CHARACTERS = (range(0x40000), range(0xE0000, 0xE1000))

_CLASS = re.compile(r"\\p\{([\w-]+)\}")
_PIECES = re.compile(rf"{_CLASS.pattern}|\\.|\[|\]|[^\\\[\]]+", re.DOTALL)
_RANGE = re.compile(r"(.)(?:-(.))?", re.DOTALL)


def expand(pattern: str, beyond: bool = True) -> str:
    r"""A pattern for `re` from one that uses `\p{...}`. beyond=False leaves out of each class what
    lies beyond U+FFFF: such a pattern is 5 to 10 times as fast, for `re` keeps a bitmap up to there
    and tries the ranges beyond, hundreds, one by one.

    >>> expand(r"[\p{Nd}_]", beyond=False)[:8]
    '[0-9٠-٩۰'
    """
    parts, inside = [], False
    for match in _PIECES.finditer(pattern):
        part = match[0]
        if match[1] or part == r"\s":
            members = "".join(class_members(match[1])[:1 + beyond]) if match[1] else WHITE_SPACE
            part = members if inside else f"[{members}]"
        elif part == r"\S":
            part = f"[^{WHITE_SPACE}]"
        elif part in "[]":
            inside = part == "["
        parts.append(part)
    return "".join(parts)


def members_beyond(pattern: str) -> str:
    """What `expand(pattern, beyond=False)` leaves out, all classes together."""
    return "".join(class_members(name)[1] for name in sorted(set(_CLASS.findall(pattern))))


@cache
def class_members(name: str) -> tuple[str, str]:
    """What stands between the brackets of a class, up to U+FFFF and beyond. name: a general
    category ("Lu"), its first letter ("L"), "Han", or with "-Han" behind it."""
    if name == "Han":
        ranges = [(ord(m[1]), ord(m[2] or m[1])) for m in _RANGE.finditer(HAN)]
    else:
        category, _, without = name.partition("-")
        codes = "".join(code for long, code in _CODES.items() if long.startswith(category))
        table = _categories_but_han() if without else _categories()
        ranges = [(_code_point(m.start()), _code_point(m.end() - 1))
                  for m in re.finditer(f"[{codes}]+", table)]
    return ("".join(_range(*r) for r in ranges if r[0] <= 0xFFFF),
            "".join(_range(*r) for r in ranges if r[0] > 0xFFFF))


def _range(first: int, last: int) -> str:
    return _escape(first) if first == last else f"{_escape(first)}-{_escape(last)}"


def _escape(code_point: int) -> str:
    character = chr(code_point)
    return character if code_point > 127 or character.isalnum() else f"\\x{code_point:02x}"


def _code_point(position: int) -> int:
    beyond = position - len(_CHARACTERS[0])
    return position if beyond < 0 else _CHARACTERS[1][beyond]


@cache
def _all_characters() -> str:
    return "".join(chr(code_point) for part in _CHARACTERS for code_point in part)


@cache
def _categories() -> str:
    """A letter for the category of each of `_all_characters`: a run of one class is a run here."""
    return "".join(map(_CODES.__getitem__, map(unicodedata.category, _all_characters())))


@cache
def _categories_but_han() -> str:
    table = list(_categories())
    for match in re.finditer(f"[{HAN}]+", _all_characters()):
        table[match.start():match.end()] = "-" * len(match[0])
    return "".join(table)
