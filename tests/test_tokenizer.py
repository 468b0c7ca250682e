"""Text to ids and back: families, special tokens, streaming, broken metadata, growing cost."""
import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_tokenizer import (
    byte_pair_metadata, join_plainly, mixed_text, sentence_piece_metadata)
from tinychat.errors import ModelFileError
from tinychat.gguf_file import open_gguf
from tinychat.text import pretokenizers, unicode_classes, words as words_module
from tinychat.text.tokenizer import Tokenizer, seconds_to_encode
from tinychat.text.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED
from tinychat.text.words import cut_between_pieces, join_pairs, join_pairs_of_many

ANY_TEXT = st.text(st.characters(), max_size=80)       # halves of UTF-16 pairs are in it too
BYTE_PAIRS = Tokenizer.from_metadata(byte_pair_metadata())
PIECES = Tokenizer.from_metadata(sentence_piece_metadata())
WHOLE_PIECES = Tokenizer.from_metadata(sentence_piece_metadata(add_space_prefix=False))


def texts(tokenizer, ids):
    return [tokenizer.tokens[id] for id in ids]


def test_pairs_join_in_the_order_of_the_merge_list():
    assert texts(BYTE_PAIRS, BYTE_PAIRS.encode("hello world")) == ["hell", "o", "Ġwor", "l", "d"]


def test_a_merge_that_stands_twice_has_its_first_rank():
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata(("a b", "b c", "a b"), special=()))
    assert texts(tokenizer, tokenizer.encode("abc")) == ["ab", "c"]


def test_the_best_scored_piece_joins_first_and_the_rest_is_spelt_in_bytes():
    assert texts(PIECES, PIECES.encode("hello é")) == ["▁hell", "o", "▁", "<0xC3>", "<0xA9>"]


def test_sentence_pieces_begin_with_a_space_also_after_a_special_token():
    ids = PIECES.encode("he<s>he", special=True)
    assert texts(PIECES, ids) == ["▁he", "<s>", "▁he"]
    assert texts(WHOLE_PIECES, WHOLE_PIECES.encode("he")) == ["he"]


def test_what_has_no_byte_tokens_becomes_the_unknown_token():
    metadata = sentence_piece_metadata(unknown_token_id=0)
    metadata["tokenizer.ggml.token_type"][3:259] = UNUSED
    tokenizer = Tokenizer.from_metadata(metadata)
    assert texts(tokenizer, tokenizer.encode("hé")) == ["▁h", "<unk>"]


def test_ignore_merges_takes_a_word_that_is_a_token_whole():
    merges = ("b c", "a b", "ab c")                    # never reached: "b c" comes before
    llama = Tokenizer.from_metadata(byte_pair_metadata(merges, pre="llama-bpe", special=()))
    gpt2 = Tokenizer.from_metadata(byte_pair_metadata(merges, special=()))
    assert texts(llama, llama.encode("abc")) == ["abc"]
    assert texts(gpt2, gpt2.encode("abc")) == ["a", "bc"]


def test_no_text_becomes_nothing():
    assert BYTE_PAIRS.encode("") == PIECES.encode("") == PIECES.encode("", special=True) == []
    assert BYTE_PAIRS.decode([]) == ""


# Special tokens

def test_control_tokens_are_found_only_when_asked_for():
    text = "<|im_start|>he<|im_end|>"
    assert texts(BYTE_PAIRS, BYTE_PAIRS.encode(text, special=True)) == [
        "<|im_start|>", "he", "<|im_end|>"]
    assert not {"<|im_start|>", "<|im_end|>"} & {*texts(BYTE_PAIRS, BYTE_PAIRS.encode(text))}
    assert BYTE_PAIRS.decode(BYTE_PAIRS.encode(text)) == text


def test_user_defined_tokens_are_always_found():
    assert texts(BYTE_PAIRS, BYTE_PAIRS.encode("he<tool>he")) == ["he", "<tool>", "he"]


def test_no_spelling_of_a_control_token_becomes_one():
    pieces = [("<", -1), ("/", -1), ("s", -1), (">", -1), ("</", -1), ("s>", -1)]
    tokenizer = Tokenizer.from_metadata(sentence_piece_metadata(pieces, add_space_prefix=False))
    assert texts(tokenizer, tokenizer.encode("</s>")) == ["</", "s>"]
    assert texts(tokenizer, tokenizer.encode("</s>", special=True)) == ["</s>"]


def test_bytes_that_would_join_to_a_control_token_stay_bytes():
    tokenizer = Tokenizer.from_metadata(
        byte_pair_metadata(("< e", "o s", "<e os", "<eos >"), pre="superbpe", special=()))
    assert tokenizer.tokens.index("<eos>") in tokenizer.eog_ids
    assert texts(tokenizer, tokenizer.encode("<eos>")) == [*"<eos>"]


@pytest.mark.parametrize("text, expected", [
    ("aab", ["a", "<ab>"]), ("abcd", ["a", "<bcd>"]), ("ababcdab", ["<ab>", "a", "<bcd>", "<ab>"]),
    ("bcbcd", ["b", "c", "<bcd>"]), ("abab", ["<ab>", "<ab>"]),
])
def test_of_special_texts_that_overlap_the_longest_goes_first(text, expected):
    special = (("ab", USER_DEFINED), ("bcd", USER_DEFINED))
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata((), special=special))
    shown = [f"<{token}>" if len(token) > 1 else token
             for token in texts(tokenizer, tokenizer.encode(text))]
    assert shown == expected


@given(st.text("abc", max_size=30))
def test_special_texts_split_as_if_each_were_looked_for_alone(text):
    """The plain meaning: the longest first, everywhere, then the next in what is left."""
    specials = ["abcab", "bcab", "cab", "ab", "bb"]
    expected = [text] if text else []
    for special in specials:
        expected = [piece for part in expected for piece in _plain_split(part, special)]
    special = tuple((text, USER_DEFINED) for text in specials)
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata((), special=special))
    parts = tokenizer._user_defined.split(text)
    assert [tokenizer.tokens[x] if isinstance(x, int) else x for x in parts] == \
        [x[0] if isinstance(x, tuple) else x for x in expected]


def _plain_split(part, special):
    if isinstance(part, tuple):
        return [part]
    pieces = part.split(special)
    return [x for piece in pieces for x in (piece, (special,)) if x][:-1]


def test_phi_3_tokens_take_the_spaces_behind_them_along():
    metadata = sentence_piece_metadata(special=(("<|end|>", CONTROL),))
    named = Tokenizer.from_metadata({**metadata, "general.name": "Phi-3 mini"})
    other = Tokenizer.from_metadata(metadata)
    assert texts(named, named.encode("<|end|>\n he", special=True)) == ["<|end|>", "▁he"]
    assert texts(other, other.encode("<|end|>\n he", special=True)) == \
        ["<|end|>", "▁", "<0x0A>", "▁he"]


def test_prompts_get_bos_once():
    tokenizer = Tokenizer.from_metadata(sentence_piece_metadata())
    assert tokenizer.add_bos and tokenizer.bos_id == 1
    assert texts(tokenizer, tokenizer.encode_prompt("he")) == ["<s>", "▁he"]
    assert texts(tokenizer, tokenizer.encode_prompt("<s>he")) == ["<s>", "▁he"]
    without = Tokenizer.from_metadata(sentence_piece_metadata(add_bos_token=False))
    assert texts(without, without.encode_prompt("he")) == ["▁he"]
    assert BYTE_PAIRS.encode_prompt("he") == BYTE_PAIRS.encode("he")


def ends(special, **keys):
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata((), special=special, **keys))
    return tokenizer, sorted(texts(tokenizer, tokenizer.eog_ids))


def test_ends_are_found_by_key_and_by_text():
    special = (("<stop>", NORMAL), ("<|im_end|>", NORMAL), ("<|file_sep|>", CONTROL), ("x", NORMAL))
    tokenizer, found = ends(special, eos_token_id=256)
    assert found == ["<stop>", "<|file_sep|>", "<|im_end|>"]
    assert tokenizer.is_control(257), "a text that ends a turn is control whatever its type says"
    assert ends((("<a>", CONTROL), ("<b>", CONTROL)), eot_token_id=256, eom_token_id=257)[1] == \
        ["<a>", "<b>"]


def test_end_is_no_end_where_a_turn_has_several_messages():
    special = tuple((text, CONTROL) for text in ("<|end|>", "<|return|>", "<|call|>"))
    assert ends(special)[1] == ["<|call|>", "<|return|>"]


# Back to text

@given(ANY_TEXT)
def test_decoding_undoes_encoding(text):
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert BYTE_PAIRS.decode(BYTE_PAIRS.encode(text)) == clean
    for tokenizer in (PIECES, WHOLE_PIECES):           # to these ▁ is a space
        assert tokenizer.decode(tokenizer.encode(text)) == clean.replace("▁", " ")


@pytest.mark.parametrize("text, clean", [("\ud83d\ude00", "😀"), ("a\udc00b", "a\ufffdb"),
                                         ("\ude00\ud83d", "\ufffd\ufffd")])
def test_halves_of_pairs_are_joined_or_replaced(text, clean):
    assert BYTE_PAIRS.decode(BYTE_PAIRS.encode(text)) == clean


@given(st.lists(st.integers(0, BYTE_PAIRS.n_vocab - 1), max_size=40))
def test_a_stream_of_any_ids_gives_what_decoding_them_at_once_gives(ids):
    for tokenizer in (BYTE_PAIRS, PIECES):
        for special in (True, False):
            decoder = tokenizer.decoder(special=special)
            streamed = "".join(map(decoder.feed, ids)) + decoder.flush()
            assert streamed == tokenizer.decode(ids, special=special)


@given(st.text(max_size=20))
def test_a_stream_never_shows_half_a_character(text):
    decoder = BYTE_PAIRS.decoder()
    shown = ""
    for id in BYTE_PAIRS.encode(text):
        shown += decoder.feed(id)
        assert text.startswith(shown)
    assert shown == text and decoder.flush() == ""


def test_bytes_that_cannot_become_a_character_are_replaced_once_that_is_certain():
    decoder = PIECES.decoder()
    euro = [3 + byte for byte in "€".encode()]
    assert [decoder.feed(id) for id in euro] == ["", "", "€"]
    assert [decoder.feed(id) for id in (*euro[:2], 3 + ord("x"))] == ["", "", "\ufffdx"]
    assert decoder.feed(euro[0]) == "" and decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_only_the_first_space_of_sentence_pieces_is_dropped():
    he, space = PIECES.tokens.index("▁he"), PIECES.tokens.index("▁")
    assert PIECES.decode([he, he]) == "he he"
    assert PIECES.decode([space, he]) == " he"
    assert PIECES.decode([PIECES.bos_id, he], special=False) == "he"
    assert WHOLE_PIECES.decode([he]) == " he"


def test_control_tokens_are_shown_or_hidden():
    ids = BYTE_PAIRS.encode("<|im_start|>he<tool>", special=True)
    assert BYTE_PAIRS.decode(ids) == "<|im_start|>he<tool>"
    assert BYTE_PAIRS.decode(ids, special=False) == "he<tool>"


@pytest.mark.parametrize("id", [-1, 10 ** 6])
def test_an_id_outside_the_vocabulary_is_refused(id):
    with pytest.raises(IndexError, match=str(id)):
        BYTE_PAIRS.decode([id])


# The fast ways mean the plain ones

RANKS = {"a b": 3, "b c": 1, "a a": 2, "aa aa": 5, "bc a": 0, "ab bc": 4, "aaaa aaaa": 6}


@given(st.text("abc", max_size=60))
def test_joining_means_to_join_the_lowest_pair_and_begin_again(word):
    expected = join_plainly(word, RANKS, " ")
    assert join_pairs(word, RANKS, " ") == expected
    assert join_pairs_of_many(list(word), RANKS, " ") == expected


@given(st.lists(st.text("▁ab>", min_size=1, max_size=5), min_size=1, max_size=12, unique=True),
       st.text("▁ab>c\n", max_size=40))
def test_cutting_before_joining_changes_nothing(pieces, text):
    ranks = {piece: len(pieces) - i for i, piece in enumerate(pieces)}
    words = cut_between_pieces(pieces)(text)
    assert "".join(words) == text
    assert [part for word in words for part in join_pairs(word, ranks, "")] == \
        join_plainly(text, ranks, "")


@pytest.mark.parametrize("name", sorted(pretokenizers._PATTERNS))
@given(text=st.text(st.one_of(st.sampled_from(" \n\r\t'sAé1²中の。!_-😀𝐀𝟙𠀀\u0301\x1c\u3000"),
                              st.characters(exclude_categories=["Cs"]),
                              st.characters(min_codepoint=0x10000, categories=[*"LMNPS"]),
                              st.sampled_from("\U00016fe2\U00016fe3\U00016ff0\U00012400𐐀𝒶𑁦")),
                    max_size=40))
@settings(max_examples=40, deadline=None)
def test_every_cut_keeps_every_character_and_the_fast_one_cuts_as_the_exact_one(name, text):
    words = pretokenizers.pretokenizer(name).cut(text)
    assert "".join(words) == text and "" not in words
    assert words == pretokenizers._exact_cutter(name)(text)


@pytest.mark.parametrize("name, text, words", [
    ("gpt-2", "I'm  42²!\n\n x", ["I", "'m", " ", " 42²", "!", "\n\n", " x"]),
    ("smollm", "a 42  7", ["a", " ", "4", "2", "  ", "7"]),
    ("llama-bpe", "I'LL 1234 (ok)\n\n", ["I", "'LL", " ", "123", "4", " (", "ok", ")\n\n"]),
    ("qwen2", "x1234\u3000y", ["x", "1", "2", "3", "4", "\u3000y"]),
    ("qwen35", "कि1", ["कि", "1"]),
    ("gpt-4o", "iPhone ÉCOLE's", ["i", "Phone", " ÉCOLE's"]),
    ("tekken", "HelloWorld 12", ["Hello", "World", " ", "1", "2"]),
    ("deepseek-v3", "你好world 1234", ["你好", "world", " ", "123", "4"]),
    ("kimi-k2", "你好World", ["你好", "World"]),
    ("superbpe", "a b 1234567", ["a b ", "1", "234", "567"]),
    ("afmoe", "abc 1234", ["abc", " ", "1", "234"]),
])
def test_words_of_a_pre_tokenizer(name, text, words):
    assert pretokenizers.pretokenizer(name).cut(text) == words


def test_an_unknown_pre_tokenizer_is_reported_and_cuts_the_default_way(caplog):
    with caplog.at_level(logging.WARNING):
        unknown = pretokenizers.pretokenizer("from-the-future")
        missing = pretokenizers.pretokenizer(None)
    default = pretokenizers.pretokenizer("default")
    assert unknown.cut("a 1234") == missing.cut("a 1234") == default.cut("a 1234")
    assert "from-the-future" in caplog.text and "not named" in caplog.text


def test_classes_have_exactly_the_characters_of_their_category():
    import re
    import unicodedata
    for name in ("L", "Lu", "N", "P", "S", "M"):
        members = re.compile(unicode_classes.expand(rf"\p{{{name}}}"))
        for code_point in (*range(0x3100), *range(0x1D400, 0x1F700), *range(0xE0000, 0xE0200)):
            is_member = unicodedata.category(chr(code_point)).startswith(name)
            assert bool(members.match(chr(code_point))) == is_member, hex(code_point)
    spaces = re.compile(unicode_classes.expand(r"\s"))
    assert [c for c in map(chr, range(0x3001)) if spaces.match(c) and c not in "\x85"] == \
        [c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f\x85"]


# Cost

class CountingRanks(dict):
    n_lookups = 0

    def get(self, key, default=None):
        self.n_lookups += 1
        return super().get(key, default)


@pytest.mark.parametrize("word", ["a" * 20_000, "abc" * 7_000, "ba" * 10_000])
def test_a_long_word_costs_as_many_lookups_as_it_has_characters(word):
    ranks = CountingRanks(RANKS)
    join_pairs(word, ranks, " ")
    assert ranks.n_lookups < 4 * len(word)


@pytest.mark.parametrize("name", sorted(pretokenizers._PATTERNS))
def test_cutting_ten_times_the_text_costs_about_ten_times(name):
    """One try of many will do: a busy machine spoils some, but what is quadratic spoils them all."""
    cut = pretokenizers.pretokenizer(name).cut

    def is_linear(unit):
        short, long = (_seconds(cut, unit * n + "x") for n in (4_000, 40_000))
        return long < 40 * short + 0.02   # quadratic: 100 times
    for unit in ("a", " ", "\n", "1", "A", "中", " \n", "'", "\u0301"):
        assert any(is_linear(unit) for _ in range(20)), unit


def _seconds(function, argument):
    start = time.process_time()
    function(argument)
    return time.process_time() - start


def test_the_cache_of_words_is_bounded_and_shared_by_threads(monkeypatch):
    monkeypatch.setattr(words_module, "MAX_CACHED_WORDS", 50)
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata())
    text = mixed_text(20_000)
    expected = BYTE_PAIRS.encode(text)
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(tokenizer.encode(text) == expected))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 4
    assert len(tokenizer._ids_of) <= 54
    tokenizer.encode("x" * 10_000)
    assert max(map(len, tokenizer._ids_of)) <= words_module.MAX_CACHED_WORD_CHARS


# Broken metadata

@pytest.mark.parametrize("key, value, says", [
    ("model", None, "tokenizer.ggml.model: expected a string, got nothing"),
    ("model", "rwkv", "expected gpt2, llama, gemma4, bert or t5, got 'rwkv'"),
    ("pre", 7, "tokenizer.ggml.pre: expected a string, got 7"),
    ("tokens", None, "tokenizer.ggml.tokens: expected an array of strings, got nothing"),
    ("tokens", [], "expected at least one token"),
    ("tokens", ["a", 1], "expected an array of strings"),
    ("tokens", "abc", "expected an array of strings, got 'abc'"),
    ("token_type", np.ones(3, np.int32), "token_type: expected 267 numbers"),
    ("token_type", np.ones(300, np.float32), "token_type: expected an array of whole numbers"),
    ("token_type", np.full(300, 6, np.int32), "tokens[0]: expected a byte like <0x41>"),
    ("token_type", ["1"], "expected an array of whole numbers"),
    ("merges", None, "tokenizer.ggml.merges: expected an array of strings, got nothing"),
    ("merges", ["h e", "q q"], "merges[1]: expected two pieces"),
    ("merges", ["he"], "merges[0]: expected two pieces"),
    ("bos_token_id", 267, "bos_token_id: expected a token id below 267, got 267"),
    ("eos_token_id", -1, "eos_token_id: expected a token id below 267, got -1"),
    ("eos_token_id", 2.0, "eos_token_id: expected a token id"),
    ("eot_token_id", True, "eot_token_id: expected a token id"),
    ("add_bos_token", 1, "add_bos_token: expected true or false, got 1"),
])
def test_broken_metadata_says_what_and_where(key, value, says):
    metadata = {**byte_pair_metadata(), f"tokenizer.ggml.{key}": value}
    with pytest.raises(ModelFileError) as error:
        Tokenizer.from_metadata({k: v for k, v in metadata.items() if v is not None})
    assert says in str(error.value)


@pytest.mark.parametrize("key, value, says", [
    ("scores", np.full(400, np.nan, np.float32), "scores[0]: expected a number, got nan"),
    ("scores", np.zeros(3, np.float32), "scores: expected 270 numbers"),
    ("scores", [0.5], "scores: expected an array of numbers"),
    ("unknown_token_id", 10 ** 9, "unknown_token_id: expected a token id below 270"),
    ("add_space_prefix", "yes", "add_space_prefix: expected true or false, got 'yes'"),
])
def test_broken_sentence_piece_metadata_says_what_and_where(key, value, says):
    with pytest.raises(ModelFileError) as error:
        Tokenizer.from_metadata({**sentence_piece_metadata(), f"tokenizer.ggml.{key}": value})
    assert says in str(error.value)


# Real files

GOLDEN_FOLDERS = [Path(__file__).parent / "golden", Path(__file__).parents[2] / "shared" / "golden"]
GOLDEN = sorted({path.name: path for folder in GOLDEN_FOLDERS
                 for path in folder.glob("*.npz")
                 if path.with_suffix(".gguf").is_file()}.items())


@pytest.mark.parametrize("path", [path for _, path in GOLDEN], ids=[name for name, _ in GOLDEN])
def test_golden_texts_become_golden_tokens(path):
    with np.load(path) as arrays, open_gguf(path.with_suffix(".gguf")) as file:
        if "text" not in arrays:
            pytest.skip("an image model")
        tokenizer = Tokenizer.from_metadata(file.metadata)
        text, expected = str(arrays["text"]), arrays["tokens"].tolist()
    assert tokenizer.encode_prompt(text) == expected


def test_smollm2_keeps_every_text_and_encodes_a_megabyte(smollm2_path, record_property):
    with open_gguf(smollm2_path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    assert texts(tokenizer, tokenizer.encode_prompt("<|im_start|>user\nHi<|im_end|>")) == \
        ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]
    text = mixed_text(1_000_000)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    seconds = seconds_to_encode(tokenizer, text)
    record_property("seconds_to_encode_1_MB", seconds)
    print(f"1 MB of mixed text encoded in {seconds:.2f} s of processor time")
