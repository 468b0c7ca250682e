"""The compiled ways to encode a word give what the plain ones give, for any vocabulary and text."""
import random
import struct
import time
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_tokenizer import (
    byte_pair_metadata, mixed_text, sentence_piece_metadata, unigram_metadata, word_piece_metadata)
from tinychat import gguf_file
from tinychat.errors import ModelFileError
from tinychat.text import encoders
from tinychat.text.tokenizer import Tokenizer
from tinychat.text.vocabulary import CONTROL, NORMAL, USER_DEFINED

_kernels = pytest.importorskip("tinychat._kernels", reason="the native kernels are not built")

# Few characters, so that they meet: one to four bytes long, two that share bytes, ▁ and the space's
# own, what a byte alphabet knows (Ġ) and what it does not (中)
LETTERS = "ab▁ Ġé中㐀😀\n"
WORDS = st.text(st.sampled_from(LETTERS), max_size=40)
PIECES = st.lists(st.text(st.sampled_from(LETTERS), min_size=1, max_size=5), max_size=25)
SCORES = st.sampled_from([-1.0, -2.0, -2.5, 0.0, 3.0, -np.inf])
SEVERAL = settings(max_examples=150, deadline=None)


def both(metadata):
    """The same tokenizer compiled and plain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYCHAT_PURE", "0")
        compiled = Tokenizer.from_metadata(metadata)
        patch.setenv("TINYCHAT_PURE", "1")
        plain = Tokenizer.from_metadata(metadata)
    assert is_compiled(compiled) and not is_compiled(plain)
    return compiled, plain


def is_compiled(tokenizer):
    encode = tokenizer._ids_of._encode_word
    cells = [cell.cell_contents for cell in getattr(encode, "__closure__", None) or ()]
    return any(isinstance(getattr(x, "__self__", x), _kernels.Pieces)
               for x in (encode, getattr(encode, "func", None), *cells))


def assert_agree(metadata, texts):
    compiled, plain = both(metadata)
    for text in texts:
        assert compiled.encode(text) == plain.encode(text), ascii(text)
        assert compiled.encode_prompt(text) == plain.encode_prompt(text), ascii(text)


@st.composite
def merge_lists(draw, letters):
    """Merges of letters, and of what others before them made; some come twice, some join what
    others join in another way."""
    made, merges = list(letters), []
    for _ in range(draw(st.integers(0, 25))):
        left, right = draw(st.sampled_from(made)), draw(st.sampled_from(made))
        merges.append(f"{left} {right}")
        made.append(left + right)
    return draw(st.permutations(merges))


@pytest.mark.parametrize("pre", ["superbpe", "llama-bpe"])       # whole texts; whole tokens first
@given(merges=merge_lists("abĠÃ©ä"), texts=st.lists(WORDS, max_size=8), control=st.booleans())
@SEVERAL
def test_byte_pairs(pre, merges, texts, control):
    metadata = byte_pair_metadata(merges, pre=pre, special=(("中中", NORMAL), ("ab", CONTROL)))
    if control:                        # texts that join must be spelt instead, and bytes go missing
        n = 256 + len(merges) // 2
        metadata["tokenizer.ggml.token_type"][[ord("a"), *range(250, n)]] = CONTROL
    assert_agree(metadata, texts)


@given(merge_lists("ab▁é中"), st.lists(WORDS, max_size=8))
@SEVERAL
def test_character_pairs(merges, texts):
    tokens = {*"ab\n", "\n\n", *(merge.replace(" ", "") for merge in merges)}
    metadata = sentence_piece_metadata([(token, 0) for token in sorted(tokens)], merges=merges)
    assert_agree({**metadata, "tokenizer.ggml.model": "gemma4"}, texts)


@given(PIECES, st.data(), st.lists(WORDS, max_size=8))
@SEVERAL
def test_sentence_pieces(pieces, data, texts):
    """Some pieces come twice, with another score, or are control tokens too."""
    scored = [(piece, data.draw(SCORES)) for piece in pieces]
    special = [(piece, CONTROL) for piece in pieces[:2] if len(pieces) > 4]
    assert_agree(sentence_piece_metadata(scored, special), texts)


@given(PIECES, st.lists(WORDS, max_size=8))
@SEVERAL
def test_word_pieces(pieces, texts):
    assert_agree(word_piece_metadata([*pieces, *("▁" + piece for piece in pieces[::2])]), texts)


@given(PIECES, st.data(), st.lists(WORDS, max_size=8))
@SEVERAL
def test_unigram(pieces, data, texts):
    scored = [(piece, data.draw(SCORES)) for piece in pieces]
    assert_agree(unigram_metadata([*scored, ("▁", -2)]), texts)


LONG = {
    "one letter": "a" * 100_000, "spaces": " " * 100_000, "two letters": "ab" * 50_000,
    "bytes without a token": "😀" * 25_000,
    "all of them": "".join(random.Random(1).choices(LETTERS, k=50_000)),
}
FAMILIES = {
    "byte pairs": byte_pair_metadata(("a a", "aa aa", "aaaa aaaa", "a b", "ab ab", "Ġ Ġ", "ĠĠ ĠĠ"),
                                     pre="superbpe"),
    "sentence pieces": sentence_piece_metadata(
        [("a", -9), ("aa", -1), ("aaa", -2), ("ab", -3), ("abab", -1), ("▁▁", -1), ("▁▁▁▁", 0)]),
    "unigram": unigram_metadata([("▁", -2), ("a", -3), ("aa", -4), ("aaaaa", -5), ("ab", -1)]),
    "word pieces": word_piece_metadata(("▁a", "a", "b", "▁")),
}


@pytest.mark.parametrize("family, text", [*product(FAMILIES, LONG)])
def test_one_very_long_word(family, text):
    assert_agree(FAMILIES[family], [LONG[text]])


@pytest.mark.parametrize("family, unit", [*product(FAMILIES, ["a", " ", "ab", "😀"])])
def test_a_word_ten_times_as_long_costs_about_ten_times(family, unit):
    """One try of many will do: a busy machine spoils some, but what is quadratic spoils them all."""
    encode = Tokenizer.from_metadata(FAMILIES[family])._ids_of._encode_word

    def is_linear():
        short, long = (_seconds(encode, unit * n) for n in (10_000, 100_000))
        return long < 40 * short + 0.02          # quadratic: 100 times
    assert any(is_linear() for _ in range(20))


def _seconds(function, argument):
    start = time.process_time()
    function(argument)
    return time.process_time() - start


def test_real_pieces_and_a_mixed_text(smollm2_path):
    with gguf_file.open_gguf(smollm2_path) as file:
        assert_agree(file.metadata, [mixed_text(200_000)])


def test_bad_merges_are_told_of_alike():
    for merges in (["h e", "q q"], ["he"], ["h e", ""], ["h  e"]):
        said = []
        for pure in ("0", "1"):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(ModelFileError) as error:
                patch.setenv("TINYCHAT_PURE", pure)
                Tokenizer.from_metadata({**byte_pair_metadata(), "tokenizer.ggml.merges": merges})
            said.append(str(error.value))
        assert said[0] == said[1] and f"merges[{len(merges) - 1}]" in said[0]


def test_without_kernels_the_plain_way_is_taken(monkeypatch):
    monkeypatch.setattr(encoders, "_kernels", None)
    assert not is_compiled(Tokenizer.from_metadata(byte_pair_metadata()))


# The strings of a file

def strings_of(data, n):
    reader = gguf_file._Reader(SimpleNamespace(), data)
    try:
        return reader.strings(n, "a text"), reader.pos
    except ModelFileError as error:
        return str(error).partition(": ")[2]


@given(st.lists(st.binary(max_size=9) | st.text(max_size=5).map(str.encode), max_size=6),
       st.integers(0, 12), st.integers(0, 8), st.sampled_from([0, 3, 2 ** 63, 2 ** 64 - 1]))
def test_strings_of_a_file_are_read_and_refused_alike(texts, cut, n_more, wrong_size):
    data = b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    data = data[:len(data) - cut] + struct.pack("<Q", wrong_size)[:n_more]
    for n in (len(texts), len(texts) + 1):
        compiled = strings_of(data, n)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf_file, "read_strings", None)
            assert strings_of(data, n) == compiled
