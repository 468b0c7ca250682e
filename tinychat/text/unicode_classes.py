r"""Unicode classes for `re`, which knows no `\p{...}`: exact ranges, computed from `unicodedata`.

`expand` rewrites `\p{L}`, `\p{Lu}`, `\s` and the like, inside and outside of brackets. `\s` becomes
the White_Space property: Python's own adds U+001C to U+001F, which no tokenizer counts as space.

The classes are those of the running Python (3.10: Unicode 13, 3.13: 15.1; llama.cpp has 16), so
characters that one version has and another has not may be cut differently. The table up to U+FFFF
takes 10 ms, once per process; the one beyond 30 ms, and most processes never need it.
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

BEYOND = re.compile("[\U00010000-\U0010ffff]")

_CATEGORIES = ("Cc Cf Cn Co Cs Ll Lm Lo Lt Lu Mc Me Mn Nd Nl No Pc Pd Pe Pf Pi Po Ps Sc Sk Sm So "
               "Zl Zp Zs").split()
_CODES = {name: chr(ord("A") + i) for i, name in enumerate(_CATEGORIES)}
_HAN_CODE = "-"
# Up to U+FFFF, and all beyond that is not for private use (the last: tags, variation selectors).
_CHARACTERS = (range(0x10000), (*range(0x10000, 0x40000), *range(0xE0000, 0xE1000)))

# For the categories that go beyond U+FFFF, but Nl: it has none up to U+0800, where a list begins.
_STAND_INS = dict(zip("Lu Ll Lm Lo Mn Mc Nd No Pd Po Sc Sk Sm So".split(),
                      "\u0531\u0561\u02b0\u05d0\u0591\u0903\u0660\u00bd\u058a\u055a\u058f\u02c2"
                      "\u03f6\u0482"))
_HAN_STAND_INS = {"Lo": "\u4e00"}
_ANY_HAN = re.compile(f"[{HAN}]")

_CLASS = re.compile(r"\\p\{([\w-]+)\}")
_PIECES = re.compile(rf"{_CLASS.pattern}|\\.|\[|\]|[^\\\[\]]+", re.DOTALL)


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
            members = _members(match[1], beyond) if match[1] else WHITE_SPACE
            part = members if inside else f"[{members}]"
        elif part == r"\S":
            part = f"[^{WHITE_SPACE}]"
        elif part in "[]":
            inside = part == "["
        parts.append(part)
    return "".join(parts)


def categories_in(pattern: str) -> frozenset[str]:
    r"""The general categories that a pattern's classes hold, and "Han" if it is there.

    >>> sorted(categories_in(r"[\p{Han}\p{Lu-Han}]\p{S}"))
    ['Han', 'Lu', 'Sc', 'Sk', 'Sm', 'So']
    """
    names = {name.partition("-")[0] for name in _CLASS.findall(pattern)}
    found = {category for name in names for category in _CATEGORIES if category.startswith(name)}
    return frozenset(found | names & {"Han"})


def stand_in(character: str, categories: frozenset[str]) -> str | None:
    """What is cut as `character` by a pattern with these categories: a character up to U+FFFF that
    no list of characters in `pretokenizers` names, or itself if it is of none of them. None if
    nothing is."""
    category = unicodedata.category(character)
    if "Han" in categories and _ANY_HAN.match(character):
        return _HAN_STAND_INS.get(category)
    return _STAND_INS.get(category) if category in categories else character


def _members(name: str, beyond: bool) -> str:
    return _members_of(name, False) + (_members_of(name, True) if beyond else "")


@cache
def _members_of(name: str, beyond: bool) -> str:
    """What stands between the brackets of a class. name: a general category ("Lu"), its first
    letter ("L"), "Han", or with "-Han" behind it."""
    category, _, without = name.partition("-")
    codes = "".join(code for long, code in _CODES.items() if long.startswith(category))
    table = _categories(beyond)
    if without or name == "Han":
        table = _categories_but_han(beyond)
        codes = codes or _HAN_CODE
    characters = _CHARACTERS[beyond]
    return "".join(_range(characters[m.start()], characters[m.end() - 1])
                   for m in re.finditer(f"[{codes}]+", table))


def _range(first: int, last: int) -> str:
    return _escape(first) if first == last else f"{_escape(first)}-{_escape(last)}"


def _escape(code_point: int) -> str:
    character = chr(code_point)
    return character if code_point > 127 or character.isalnum() else f"\\x{code_point:02x}"


@cache
def _categories(beyond: bool) -> str:
    """A letter for the category of each character: a run of one class is a run here."""
    characters = map(chr, _CHARACTERS[beyond])
    return "".join(map(_CODES.__getitem__, map(unicodedata.category, characters)))


@cache
def _categories_but_han(beyond: bool) -> str:
    marked = list(_categories(beyond))
    for match in re.finditer(f"[{HAN}]+", "".join(map(chr, _CHARACTERS[beyond]))):
        marked[match.start():match.end()] = _HAN_CODE * len(match[0])
    return "".join(marked)
