r"""How a BPE vocabulary cuts text into words before it merges, by `tokenizer.ggml.pre`.

A cutter is one pattern that covers every text, or several that are applied one after another: what
a pattern matches becomes a word of its own, what lies between stays a word, and the next pattern
cuts each of these. Merges never cross the end of a word.

The patterns are the ones in the models' own tokenizer.json, as far as known; llama.cpp simplifies
some (it takes every letter beyond ASCII for upper and lower case at once, in `gpt-4o` and
`tekken`), and there a few words of mixed case are cut differently.
Source: ggml-org/llama.cpp: src/llama-vocab.cpp, for the names and what they stand for.
"""
import logging
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, chain

from tinychat.text.unicode_classes import BEYOND, categories_in, expand, stand_in

log = logging.getLogger(__name__)

Cutter = Callable[[str], list[str]]

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+"
_GPT2 = _WORDS + r"| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# gpt2 after each digit became a word: the space before a digit is at the end of its own word
_GPT2_DIGITS = r"\p{N}|" + _WORDS + r"| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _CONTRACTION + "|" + _LETTERS + r"|\p{N}{1,3}" + _OTHER + _END
_QWEN2 = _CONTRACTION + "|" + _LETTERS + r"|\p{N}" + _OTHER + _END
_QWEN35 = (_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
           r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _END)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s"
          rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s")
_GPT4O = _CASED % (_CONTRACTION + "?", _CONTRACTION + "?") + \
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END
_YOUTU = _CASED % (_CONTRACTION + "?", _CONTRACTION + "?") + \
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END
_TEKKEN = _CASED % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END
# as in gpt-4o, but Han letters make words of their own
_KIMI = r"\p{Han}+|" + (_CASED % (_CONTRACTION + "?", _CONTRACTION + "?")).replace(
    r"\p{Lm}", r"\p{Lm-Han}").replace(r"\p{Lo}", r"\p{Lo-Han}") + r"|\p{N}{1,3}" + _OTHER + _END
_KANA_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = (_ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
              r"| ?[\p{P}\p{S}]+[\r\n]*" + _END)
_SPARK = (_ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
          r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+")
_LATIN_GREEK_CYRILLIC = (          # escapes: editors that normalise text would change it
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-"
    "\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90"
    "-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-"
    "\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943")
_CJK_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASIAN = ("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"
          "\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f"
          "\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_LINES = r"[^\n]+|\n+"

_PATTERNS: dict[str, str | tuple] = {
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": _GPT2,
    "smollm": _GPT2_DIGITS,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "qwen35": _QWEN35,
    "gpt-4o": _GPT4O,
    "tekken": _TEKKEN,
    "deepseek-llm": ("[\r\n]", rf"\s?[{_LATIN_GREEK_CYRILLIC}]+",
                     r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"(?<!\s)\s+\Z", _CJK_HANGUL, r"\p{N}+"),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", _KANA_HAN, _DEEPSEEK3),
    "falcon": (r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "bloom": (_BLOOM,),
    "viking": (_BLOOM, r"\p{N}"),
    "superbpe": (r"\p{N}+", "[0-9]+>>3"),
    "kimi-k2": _KIMI,
    "bailingmoe": (r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|" + _LETTERS + r"|\p{N}"
                   + _OTHER + r"|\s*[\r\n]|\s+(?!\S)|\s+"),
    "seed-coder": (_CONTRACTION + "|" + _LETTERS + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _END),
    "ufakzeka": _LETTERS + r"|\p{N}" + _OTHER + _END,
    "afmoe": (r"\p{N}+>>3", _ASIAN, _DEEPSEEK3),
    "tiny_aya": (r"\p{N}+>>3", _GPT4O.replace("[\\r\\n/]*", "[\\r\\n]*")),
    "laguna": (_LINES, _QWEN2),
    "exaone-moe": (_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
                   r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"),
    "minicpm5": (r"\p{N}{1,3}", _CONTRACTION + "|" + _LETTERS + r"|\p{N}+" + _OTHER + _END),
    "k2-horizon": (_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}\u200c\u200d]+|\p{N}{1,3}"
                   + _OTHER + _END),
    "jais-2": (_CONTRACTION + "|" + _LETTERS + r"|\p{N}{1,3}" + _OTHER + r"|\s*[\r\n]+|"
               + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
               + r"|\s{1,2}(?!\S)|\s"),
    "spark2_5": (r"\p{N}{1,3}", _KANA_HAN, _SPARK, r"\p{N}"),
    "youtu": ("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _KANA_HAN, _YOUTU),
    "chameleon": (r"<sentinel:[0-9]+>", r"IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}",
                  r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
    "granite-embed-multi-97m": _GPT4O,
    "gemma4": _LINES,
}

_SAME_AS = {
    "gpt-2": "phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert "
             "jina-v1-en jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling exaone4",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx "
                 "smaug-bpe chatglm-bpe glm4 glm5",
    "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "bloom": "poro-chat gpt3-finnish",
    "bailingmoe": "bailingmoe2 llada-moe",
    "tiny_aya": "cohere2moe",
    "gemma4": "sarvam-moe granite-embed-multi-311m",
}
_PATTERN_OF = {name: name for name in _PATTERNS} | {
    alias: name for name, aliases in _SAME_AS.items() for alias in aliases.split()}

_ADD_BOS = frozenset("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 "
                     "jina-v5-nano tekken chameleon gemma4 granite-embed-multi-311m".split())
_IGNORE_MERGES = frozenset("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 "
                           "jina-v5-nano tekken minicpm5 youtu glm4 glm5 "
                           "granite-embed-multi-97m".split())


@dataclass(frozen=True)
class PreTokenizer:
    """What the name under `tokenizer.ggml.pre` says about a BPE vocabulary.

    cut: text -> words; joined they are the text again.
    ignore_merges: a word that is a token is that token, whatever the merges say.
    add_bos: whether a prompt begins with the bos token when the file does not say.
    byte_level: tokens spell bytes (GPT-2's way); otherwise they spell characters, with ▁ for space.
    """

    name: str
    cut: Cutter
    ignore_merges: bool
    add_bos: bool
    byte_level: bool


def pretokenizer(name: str | None) -> PreTokenizer:
    """The pre-tokenizer of that name; an unknown one cuts as "default" does, with a warning."""
    pattern = _PATTERN_OF.get(name or "default")
    if name is None or pattern is None:
        log.warning("pre-tokenizer %s: text is cut the default way, "
                    "so the model may see other tokens than in its training",
                    f"{name!r} is unknown" if name else "not named in the file")
    pattern = pattern or "default"
    return PreTokenizer(name or "default", _cutter(pattern), name in _IGNORE_MERGES,
                        name in _ADD_BOS, pattern != "gemma4")


def names() -> list[str]:
    """All names under `tokenizer.ggml.pre` that are known."""
    return sorted(_PATTERN_OF)


@cache
def _cutter(pattern_name: str) -> Cutter:
    """Cuts by the pattern whose classes end at U+FFFF, 5 times as fast: what lies beyond and is of
    its classes is cut as its stand-in. An emoji is no letter, so most patterns take it as it is.
    """
    fast = _compile(_PATTERNS[pattern_name], False)
    categories = categories_in("".join(_PATTERNS[pattern_name]))

    def cut(text: str) -> list[str]:
        if text.isascii():
            return fast(text)
        stand_ins = {c: stand_in(c, categories) for c in {*BEYOND.findall(text)}}
        if all(c == taken for c, taken in stand_ins.items()):
            return fast(text)
        if None in stand_ins.values():
            return _exact_cutter(pattern_name)(text)
        words = fast(BEYOND.sub(lambda match: stand_ins[match[0]], text))
        _put_back(words, text)
        return words

    return cut


def _put_back(words: list[str], text: str) -> None:
    """Makes the words that hold stand-ins those of the text."""
    ends, end = [*accumulate(map(len, words))], 0
    for match in BEYOND.finditer(text):
        if match.start() >= end:
            i = bisect_right(ends, match.start())
            end = ends[i]
            words[i] = text[end - len(words[i]):end]


@cache
def _exact_cutter(pattern_name: str) -> Cutter:
    return _compile(_PATTERNS[pattern_name], True)


def _compile(patterns: str | tuple, beyond: bool) -> Cutter:
    if isinstance(patterns, str):
        return re.compile(expand(patterns, beyond)).findall
    return partial(_cut_in_stages, [_stage(pattern, beyond) for pattern in patterns])


def _stage(pattern: str, beyond: bool) -> Cutter:
    """One cut of several. A pattern that ends in >>3 groups what it matches by threes from the
    right: 1234567 -> 1 234 567."""
    split = re.compile(f"({expand(pattern.removesuffix('>>3'), beyond)})").split
    return partial(_cut_threes, split) if pattern.endswith(">>3") else split


def _cut_in_stages(stages: list[Cutter], text: str) -> list[str]:
    words = [text] if text else []
    for cut in stages:
        words = [word for word in chain.from_iterable(map(cut, words)) if word]
    return words


def _cut_threes(split: Cutter, text: str) -> list[str]:
    words = split(text)                # what lies between at even places, numbers at odd ones
    for i in range(len(words) - 2, 0, -2):
        number = words[i]
        cuts = [0, *range(len(number) % 3 or 3, len(number) + 1, 3)]
        words[i:i + 1] = [number[a:b] for a, b in zip(cuts, cuts[1:])]
    return words
