"""WordPiece, the way of BERT: text is cleaned and cut at spaces, punctuation and Han characters;
of each word the longest piece goes first.

A piece that begins a word has ▁ before it, one that goes on has nothing: the form of GGUF files.
BERT's own, "##" before a piece that goes on, is brought to it by `respeller`.
Source: huggingface/tokenizers: BertNormalizer, BertPreTokenizer, WordPiece. llama.cpp differs in
what is rare: it takes U+000B, U+000C and U+0085 for spaces, strips every mark and not only Mn,
decomposes no Hangul, and knows no longest word.
"""
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache

from tinychat.text.unicode_classes import BEYOND, expand
from tinychat.text.words import SPACE

MAX_WORD_CHARS = 100                   # a longer word is the unknown token

_CONTINUES = "##"
_ASCII_SYMBOLS = "$+<=>^`|~"           # BERT takes them for punctuation
# As in BertNormalizer, where the fifth range begins at U+2B920 and not at U+2B820.
_HAN = "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff"
_HAN_BEYOND = ("\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
               "\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f")


_ANY_HAN_BEYOND = re.compile(f"[{_HAN_BEYOND}]")


@cache
def _patterns(beyond: bool) -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """Control characters, accents, words; without what lies beyond U+FFFF they are faster."""
    alone = rf"\p{{P}}{_ASCII_SYMBOLS}{_HAN}{_HAN_BEYOND if beyond else ''}"
    control, word = r"[\p{Cc}\p{Cf}\p{Co}\ufffd](?<![\t\n\r])", rf"[{alone}]|[^\s{alone}]+"
    return tuple(re.compile(expand(pattern, beyond)) for pattern in (control, r"\p{Mn}", word))


def _patterns_for(text: str) -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """Emoji and most letters beyond U+FFFF are of no class that is looked for."""
    return _patterns(not text.isascii() and any(map(_is_looked_for, {*BEYOND.findall(text)})))


def _is_looked_for(character: str) -> bool:
    is_han = _ANY_HAN_BEYOND.match(character) is not None
    return is_han or unicodedata.category(character)[0] in "CMP"


def normalizer(lowercase: bool, strip_accents: bool) -> Callable[[str], str]:
    """text -> text without control characters, and as asked without accents, in lower case."""
    def normalize(text: str) -> str:
        text = _patterns_for(text)[0].sub("", text)
        if strip_accents and not text.isascii():
            text = unicodedata.normalize("NFD", text)
            text = _patterns_for(text)[1].sub("", text)
        if lowercase:                  # Σ by itself, for Python makes it ς where a word ends
            text = text.replace("Σ", "σ").lower()
        return text

    return normalize


def cut(text: str) -> list[str]:
    """The words of a text, without the spaces between them.

    >>> cut("don't 好吃")
    ['don', "'", 't', '好', '吃']
    """
    return _patterns_for(text)[2].findall(text)


def respeller(texts: Iterable[str]) -> Callable[[str], str]:
    """What brings each text of a vocabulary to the form of GGUF files.

    >>> [*map(respeller(["un", "##do"]), ["un", "##do"])]
    ['▁un', 'do']
    """
    if any(text.startswith(SPACE) for text in texts):
        return str
    return lambda text: text[2:] if text.startswith(_CONTINUES) else SPACE + text


def word_encoder(ids: dict[str, int], unknown: list[int]) -> Callable[[str], list[int]]:
    """word -> the ids of its pieces; `unknown` if the pieces do not cover it."""
    first = {text[1:]: id for text, id in ids.items() if text.startswith(SPACE) and text[1:]}
    later = {text: id for text, id in ids.items() if text and not text.startswith(SPACE)}
    longest = max(map(len, [*first, *later]), default=0)

    def encode_word(word: str) -> list[int]:
        if len(word) > MAX_WORD_CHARS:
            return unknown
        found: list[int] = []
        start, pieces = 0, first
        while start < len(word):
            end = min(len(word), start + longest)
            while end > start and word[start:end] not in pieces:
                end -= 1
            if end == start:
                return unknown
            found.append(pieces[word[start:end]])
            start, pieces = end, later
        return found

    return encode_word
