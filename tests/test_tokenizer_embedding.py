"""WordPiece and Unigram: the tokenizers of embedding models."""
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers_tokenizer import charsmap, unigram_metadata, word_piece_metadata
from tinychat.errors import ModelFileError
from tinychat.text import wordpiece
from tinychat.text.tokenizer import Tokenizer

ANY_TEXT = st.text(st.characters(), max_size=60)
TABLE = {"\t": " ", "ﬁ": "fi", "e\u0301": "é", "e\u0301\u0301": "E", "\u00ad": ""}


def tokens(metadata, text, prompt=False):
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode_prompt(text) if prompt else tokenizer.encode(text)
    return [tokenizer.tokens[id] for id in ids]


# WordPiece

def test_the_longest_piece_of_a_word_goes_first():
    assert tokens(word_piece_metadata(), "undo undone") == ["▁un", "do", "▁un", "do", "ne"]


def test_a_word_that_pieces_do_not_cover_is_one_unknown_token():
    assert tokens(word_piece_metadata(), "undox un") == ["[UNK]", "▁un"]


def test_a_word_beyond_the_longest_is_unknown_though_pieces_cover_it():
    assert tokens(word_piece_metadata(), "un" + "do" * 49) == ["▁un", *["do"] * 49]
    assert tokens(word_piece_metadata(), "un" + "do" * 50) == ["[UNK]"]


@pytest.mark.parametrize("text", ["UN dö!", "u\u0308N\u2003do\u0301\n!", "\x00un\u200b do\x07!"])
def test_case_accents_and_control_characters_do_not_matter(text):
    assert tokens(word_piece_metadata(), text) == ["▁un", "▁do", "▁!"]


def test_case_and_accents_matter_where_the_file_says_so():
    cased = {**word_piece_metadata(), "tokenizer.ggml.normalizer.lowercase": False}
    assert tokens(cased, "un Un dö") == ["▁un", "[UNK]", "[UNK]"]
    accents_only = {**cased, "tokenizer.ggml.normalizer.strip_accents": True}
    assert tokens(accents_only, "Un dö") == ["[UNK]", "▁do"]


def test_punctuation_and_han_characters_are_words_of_their_own():
    assert tokens(word_piece_metadata(), "un!好un") == ["▁un", "▁!", "▁好", "▁un"]


def test_a_capital_sigma_is_lowered_the_same_at_the_end_of_a_word():
    assert tokens(word_piece_metadata(), "ΑΣ") == ["▁ασ"]


@given(st.text(st.one_of(st.sampled_from(" é中!a\n\x00\u0301"),
                         st.characters(exclude_categories=["Cs"]),
                         st.characters(min_codepoint=0x10000, categories=[*"LMPS", "Cf"]),
                         st.sampled_from("😀𠀀")), max_size=20))
@example("\U000110ab")                 # a letter that comes apart into one and an accent
@example("a\U000e0001b")
@example("a𠀀b")
@example("a𐄀b")
def test_characters_beyond_are_looked_at_only_where_that_changes_nothing(text):
    normalize = wordpiece.normalizer(True, True)
    words = wordpiece.cut(normalize(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wordpiece, "_is_looked_for", lambda character: True)
        assert wordpiece.cut(normalize(text)) == words


def test_cls_and_sep_stand_round_a_prompt_once():
    metadata = word_piece_metadata()
    assert tokens(metadata, "un", prompt=True) == ["[CLS]", "▁un", "[SEP]"]
    assert tokens(metadata, "[CLS]un[SEP]", prompt=True) == ["[CLS]", "▁un", "[SEP]"]
    assert tokens(metadata, "", prompt=True) == ["[CLS]", "[SEP]"]
    assert "[SEP]" not in tokens(metadata, "un[SEP]")


def test_bert_s_own_form_gives_the_same_tokens_and_text():
    hashes = word_piece_metadata()
    hashes["tokenizer.ggml.tokens"] = [
        text if text.startswith("[") else text[1:] if text.startswith("▁") else f"##{text}"
        for text in hashes["tokenizer.ggml.tokens"]]
    assert tokens(hashes, "undo 好x") == tokens(word_piece_metadata(), "undo 好x")
    tokenizer = Tokenizer.from_metadata(hashes)
    assert tokenizer.decode(tokenizer.encode("undo un")) == "undo un"


# Unigram

def test_the_likeliest_pieces_win_and_not_the_longest():
    assert tokens(unigram_metadata(), "abc") == ["▁a", "bc"]           # -1 -2, against -9 for ▁abc


def test_a_run_of_unknown_characters_is_one_token():
    assert tokens(unigram_metadata(), "a☃☃☃ ☃b") == ["▁a", "<unk>", "▁", "<unk>", "b"]


def test_spaces_are_merged_and_kept_as_the_flags_say():
    kept = unigram_metadata(remove_extra_whitespaces=False)
    assert tokens(unigram_metadata(), "  a   b ") == ["▁a", "▁", "b"]
    assert tokens(kept, " a  b ") == ["▁", "▁a", "▁", "▁", "b", "▁"]
    assert tokens({**kept, "tokenizer.ggml.add_space_prefix": False}, "b") == ["b"]
    assert tokens(unigram_metadata(), "   ") == tokens(kept, "") == []


def test_texts_are_normalised_by_the_longest_key_of_the_table():
    metadata = unigram_metadata(precompiled_charsmap=charsmap(TABLE))
    assert tokens(metadata, "ﬁ\te\u0301") == ["▁", "f", "i", "▁", "é"]
    assert tokens(metadata, "e\u0301\u0301e\u0301b\u00ad") == ["▁", "E", "é", "b"]
    assert tokens(metadata, "\u0301e") == ["▁", "<unk>", "e"]


def test_eos_stands_behind_a_prompt_as_the_file_says():
    assert tokens(unigram_metadata(), "a", prompt=True) == ["▁a", "</s>"]
    both = unigram_metadata(add_bos_token=True, bos_token_id=3)
    assert tokens(both, "a", prompt=True) == ["<s>", "▁a", "</s>"]
    assert tokens(unigram_metadata(add_eos_token=False), "a", prompt=True) == ["▁a"]


COSTS = {"▁": 2.0, "a": 1.5, "b": 1.0, "ab": 2.25, "▁a": 2.0, "bab": 2.0, "▁abb": 8.0, "aba": 4.0}


@given(st.text("abc ", max_size=10))
def test_no_other_way_to_cut_a_text_is_likelier(text):
    """Against trying all ways, by their costs."""
    metadata = unigram_metadata([(piece, -cost) for piece, cost in COSTS.items()])
    found = tokens(metadata, text)
    prepared = "".join(f"▁{word}" for word in text.split())
    if "c" not in prepared:
        assert "".join(found) == prepared
        assert sum(map(COSTS.get, found)) == _least_cost(prepared)


def _least_cost(text):
    return min((COSTS[text[:n]] + _least_cost(text[n:]) for n in range(1, len(text) + 1)
                if text[:n] in COSTS), default=0.0 if not text else float("inf"))


@given(ANY_TEXT)
def test_any_text_becomes_tokens_and_they_become_text(text):
    for metadata in (word_piece_metadata(), unigram_metadata(precompiled_charsmap=charsmap(TABLE))):
        tokenizer = Tokenizer.from_metadata(metadata)
        ids = tokenizer.encode_prompt(text)
        assert all(0 <= id < tokenizer.n_vocab for id in ids)
        tokenizer.decode(ids).encode()


@pytest.mark.parametrize("unit", ["a", "un", " ", "e\u0301", "☃", "好", "[CLS]", "a\u0301\u0301"])
def test_ten_times_the_text_costs_about_ten_times(unit):
    for metadata in (word_piece_metadata(), unigram_metadata(precompiled_charsmap=charsmap(TABLE))):
        assert any(_seconds(metadata, unit * 30_000) < 40 * _seconds(metadata, unit * 3_000) + 0.02
                   for _ in range(20)), "quadratic: 100 times"


def _seconds(metadata, text):
    tokenizer = Tokenizer.from_metadata(metadata)
    start = time.process_time()
    tokenizer.encode_prompt(text)
    return time.process_time() - start


# Broken metadata

def _with_trie(*words, rest=b"x\0"):
    trie = np.array(words, "<u4").tobytes()
    return np.frombuffer(len(trie).to_bytes(4, "little") + trie + rest, np.uint8)


@pytest.mark.parametrize("value, says", [
    (np.zeros(3, np.uint8), "expected a trie of at most 0 bytes"),
    (np.full(9, 255, np.uint8), "expected a trie of at most 5 bytes"),
    (np.array([4, 0, 0, 0, 0, 0, 0], np.uint8), "expected a trie of at most 3 bytes"),
    (np.zeros(8, np.float32), "expected an array of bytes"),
    ("abc", "expected an array of bytes, got 'abc'"),
    (_with_trie(0, rest=b"x"), "end in a zero byte"),
    (_with_trie(0, rest=b""), "end in a zero byte"),
    (_with_trie(0, 0x101 | 1000 << 10), "leaves inside of its 2 words"),
    (_with_trie(99, 0x101 | 1 << 10), "2 bytes of replacements"),
])
def test_a_broken_table_says_what_is_wrong(value, says):
    with pytest.raises(ModelFileError) as error:
        Tokenizer.from_metadata(unigram_metadata(precompiled_charsmap=value))
    assert "tokenizer.ggml.precompiled_charsmap: " in str(error.value)
    assert says in str(error.value)


def test_a_table_whose_nodes_lead_to_themselves_ends():
    loop = _with_trie(0, 1)            # the child for byte 1 is its own parent
    tokenizer = Tokenizer.from_metadata(unigram_metadata(precompiled_charsmap=loop))
    assert tokenizer.encode("\x01" * 10_000)


@given(st.lists(st.integers(0, 2 ** 32 - 1), min_size=1, max_size=40), st.binary(max_size=9),
       ANY_TEXT)
def test_any_table_is_refused_or_does_no_harm(words, rest, text):
    metadata = unigram_metadata(precompiled_charsmap=_with_trie(*words, rest=rest + b"\0"))
    try:
        tokenizer = Tokenizer.from_metadata(metadata)
    except ModelFileError:
        return
    tokenizer.encode("\x01\x02" + text)


@pytest.mark.parametrize("metadata, key, value, says", [
    (word_piece_metadata, "normalizer.lowercase", 1, "expected true or false, got 1"),
    (word_piece_metadata, "seperator_token_id", 999, "expected a token id below"),
    (word_piece_metadata, "cls_token_id", -1, "expected a token id below"),
    (unigram_metadata, "unknown_token_id", 999, "expected a token id below"),
    (unigram_metadata, "remove_extra_whitespaces", "no", "expected true or false, got 'no'"),
    (unigram_metadata, "scores", np.zeros(2, np.float32), "numbers, one for each token, got 2"),
])
def test_broken_metadata_says_what_and_where(metadata, key, value, says):
    with pytest.raises(ModelFileError) as error:
        Tokenizer.from_metadata({**metadata(), f"tokenizer.ggml.{key}": value})
    assert f"tokenizer.ggml.{key}: " in str(error.value) and says in str(error.value)
