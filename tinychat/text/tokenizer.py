r"""Text to token ids and back, for the vocabularies that come inside GGUF files.

Five families, by `tokenizer.ggml.model` and `tokenizer.ggml.pre`:

    gpt2     BPE over bytes: text is cut into words by a pattern, the bytes of a word are joined
             pair by pair in the order of the merge list
    llama    SentencePiece: no words; spaces become ▁, and the pair whose joined text is the
             vocabulary's best-scored piece is joined first; what is left is spelt in bytes <0x41>
    gemma4   the pieces of the second, joined in the merge order of the first
    bert     WordPiece (`wordpiece`): cleaned text, the longest piece of a word first
    t5       Unigram (`unigram`): normalised text, the likeliest of all ways to cut it

The first three join the symbols of a word pair by pair (`words`). All are a way to prepare a text,
to cut it into words, and to encode a word (`encoders`), with a cache of words.
Source: ggml-org/llama.cpp: src/llama-vocab.cpp, for what the files mean; minbpe for the loop.
"""
import codecs
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

from tinychat.errors import ModelFileError
from tinychat.text import encoders, unigram, wordpiece
from tinychat.text.charsmap import Charsmap
from tinychat.text.pretokenizers import pretokenizer
from tinychat.text.special_texts import SpecialTexts
from tinychat.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from tinychat.text.words import SPACE, WordCache, cut_between_pieces


def _byte_characters() -> str:
    """GPT-2's character for each byte: itself where it shows, else the next from U+0100 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in shown else next(others)) for byte in range(256))


_BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(_BYTE_CHARACTERS)}


class Tokenizer:
    """A vocabulary. Threads may share one: after `from_metadata` only its caches change.

    bos_id, eos_id: None when the file names none.
    eog_ids: the tokens after which a model has nothing more to say. stop_ids: with those that begin
    the next turn, which is not the model's.
    add_bos, add_eos: whether the file wants them round a prompt.
    drops_first_space: whether the first space of a decoded text is the one `encode` put there.

    prepare: text, whether it begins the prompt or follows a special token -> what is cut.
    always_bos: whatever the file says. closing_id: the token at a prompt's end where it is not eos.
    """

    def __init__(self, vocabulary: Vocabulary, encode_word: Callable[[str], list[int]],
                 cut: Callable[[str], list[str]], prepare: Callable[[str, bool], str], *,
                 byte_level: bool = False, drops_first_space: bool = False, add_bos: bool = False,
                 always_bos: bool = False, add_eos: bool = False, closing_id: int | None = None):
        self.tokens = vocabulary.tokens
        self.n_vocab = len(self.tokens)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.eog_ids = vocabulary.eog_ids
        self.stop_ids = vocabulary.stop_ids
        add_bos = vocabulary.flag("add_bos_token", add_bos) or always_bos
        self.add_bos = add_bos and self.bos_id is not None
        self.add_eos = vocabulary.flag("add_eos_token", add_eos) and self.eos_id is not None
        self._closing_id = self.eos_id if closing_id is None and self.add_eos else closing_id
        self._types = vocabulary.types
        self._byte_level = byte_level
        self.drops_first_space = drops_first_space
        self._prepare = prepare
        self._cut = cut
        self._ids_of = WordCache(encode_word)
        self._bytes: list[bytes | None] = [None] * self.n_vocab
        self._user_defined = SpecialTexts(vocabulary, USER_DEFINED)
        self._all_special = SpecialTexts(vocabulary, USER_DEFINED, CONTROL, UNKNOWN)

    @staticmethod
    def from_metadata(metadata: dict[str, Any]) -> "Tokenizer":
        """Raises: ModelFileError for keys that are missing, of a wrong type, or contradict each
        other, and for a `tokenizer.ggml.model` of another family."""
        vocabulary = Vocabulary(metadata)
        match vocabulary.string("model"):
            case "gpt2":
                return _byte_pairs(vocabulary)
            case "gemma4":
                return _character_pairs(vocabulary, add_bos=True)
            case "llama":
                return _sentence_pieces(vocabulary)
            case "bert":
                return _word_pieces(vocabulary)
            case "t5":
                return _likeliest_pieces(vocabulary)
            case model:
                raise ModelFileError("tokenizer.ggml.model: expected gpt2, llama, gemma4, bert or "
                                     f"t5, got {model!r}")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without bos and eos. special: the texts of control tokens become those
        tokens (leave it off for what a user typed). User-defined tokens are found in any case."""
        text = _without_surrogates(text)
        ids: list[int] = []
        after_special = True           # the start counts as one: SentencePiece puts a space there
        specials = self._all_special if special else self._user_defined
        for part in specials.split(text):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
            else:
                ids += self.encode_plain(part, after_special)
                after_special = False
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a whole input, as a text to embed: control tokens are found, and bos and eos stand
        round them if the file wants them and the text has not written them (bert: CLS and SEP)."""
        ids = self.encode(text, special=True)
        if self.add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if self._closing_id is not None and ids[-1:] != [self._closing_id]:
            ids.append(self._closing_id)
        return ids

    def encode_plain(self, text: str, after_special: bool) -> Iterable[int]:
        """Ids of `text` in which nothing is looked for, user-defined tokens neither: what text
        from outside becomes. after_special: it begins the prompt or follows a special token."""
        words = self._cut(self._prepare(text, after_special))
        return chain.from_iterable(map(self._ids_of.__getitem__, words))

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. special=False leaves control
        tokens out. Raises: IndexError for an id outside of the vocabulary."""
        decoder = self.decoder(special=special)
        return decoder.feed_all(ids) + decoder.flush()

    def decoder(self, *, special: bool = True) -> "Decoder":
        return Decoder(self, special)

    def token_bytes(self, id: int) -> bytes:
        """What a token adds to the text: its bytes, ▁ being a space again."""
        if not 0 <= id < self.n_vocab:
            raise IndexError(f"expected a token id below {self.n_vocab}, got {id}")
        found = self._bytes[id]
        if found is None:
            found = self._bytes[id] = self._spell(id)
        return found

    def _spell(self, id: int) -> bytes:
        text, type = self.tokens[id], self._types[id]
        if type in (CONTROL, UNKNOWN, USER_DEFINED):
            return text.encode()
        if type == BYTE:
            return bytes([int(text[3:5], 16)])
        if type != NORMAL:
            return b""
        if not self._byte_level:
            return text.replace(SPACE, " ").encode()
        try:
            return bytes(map(_BYTE_OF.__getitem__, text))
        except KeyError:               # a text that spells no bytes, as some added tokens do
            return text.encode()

    def is_control(self, id: int) -> bool:
        """Whether a token stands for no text of its own (unknown tokens count as control)."""
        return self._types[id] in (CONTROL, UNKNOWN)


class Decoder:
    """Turns ids into text as they come. A character is given out when its last byte is there;
    bytes that can no longer become one are given out as U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, special: bool = True):
        self._tokenizer = tokenizer
        self._special = special
        self._drop_space = tokenizer.drops_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that is certain now, often a word, sometimes nothing."""
        return self._utf8.decode(self._piece(id))

    def feed_all(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(map(self._piece, ids)))

    def flush(self) -> str:
        """What is left of a character that was never finished: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)

    def _piece(self, id: int) -> bytes:
        piece = self._tokenizer.token_bytes(id)
        if not self._special and self._tokenizer.is_control(id):
            return b""
        if self._drop_space:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return piece


def seconds_to_encode(tokenizer: Tokenizer, text: str) -> float:
    """Processor seconds for a text of which no word was seen before."""
    tokenizer._ids_of.clear()
    start = time.process_time()
    tokenizer.encode(text)
    return time.process_time() - start


# The families

def _byte_pairs(vocabulary: Vocabulary) -> Tokenizer:
    pre = pretokenizer(vocabulary.string("pre", None))
    if not pre.byte_level:
        return _character_pairs(vocabulary, add_bos=pre.add_bos)
    join = encoders.by_merges(vocabulary, _BYTE_CHARACTERS)
    return Tokenizer(vocabulary, partial(join, whole=pre.ignore_merges), pre.cut, _as_it_is,
                     byte_level=True, add_bos=pre.add_bos)


def _character_pairs(vocabulary: Vocabulary, *, add_bos: bool) -> Tokenizer:
    join = encoders.by_merges(vocabulary)

    def encode_word(word: str) -> list[int]:
        return join(word, whole=not word.strip("\n"))

    return Tokenizer(vocabulary, encode_word, cut_between_pieces(vocabulary.tokens, "\n"),
                     _spacer(False), add_bos=add_bos, always_bos=add_bos)


def _sentence_pieces(vocabulary: Vocabulary) -> Tokenizer:
    prefix = vocabulary.flag("add_space_prefix", True)
    return Tokenizer(vocabulary, encoders.by_scores(vocabulary),
                     cut_between_pieces(vocabulary.tokens), _spacer(prefix),
                     drops_first_space=prefix, add_bos=True)


def _word_pieces(vocabulary: Vocabulary) -> Tokenizer:
    """CLS and SEP stand round every input, whatever the flags say."""
    vocabulary.respell(wordpiece.respeller)
    lowercase = vocabulary.flag("normalizer.lowercase", True)
    normalize = wordpiece.normalizer(
        lowercase, vocabulary.flag("normalizer.strip_accents", lowercase))
    return Tokenizer(vocabulary, encoders.longest_first(vocabulary), wordpiece.cut,
                     lambda text, _: normalize(text), drops_first_space=True, always_bos=True,
                     closing_id=vocabulary.sep_id)


def _likeliest_pieces(vocabulary: Vocabulary) -> Tokenizer:
    replace = Charsmap(vocabulary.charsmap()).replace
    prefix = vocabulary.flag("add_space_prefix", False)
    space = unigram.spacer(prefix, vocabulary.flag("remove_extra_whitespaces", False))
    # a run of unknown characters is one token, so words are only cut where ▁ is known
    cut = (cut_between_pieces(vocabulary.tokens) if SPACE in vocabulary.tokens
           else lambda text: [text])
    return Tokenizer(vocabulary, encoders.likeliest(vocabulary), cut,
                     lambda text, after_special: space(replace(text), after_special),
                     drops_first_space=prefix, add_eos=True)


def _as_it_is(text: str, after_special: bool) -> str:
    return text


def _spacer(prefix: bool) -> Callable[[str, bool], str]:
    """Spaces become ▁, and one comes first after a special token if the file wants a prefix."""
    def space(text: str, after_special: bool) -> str:
        return (SPACE if prefix and after_special else "") + text.replace(" ", SPACE)

    return space


def _without_surrogates(text: str) -> str:
    """Python may hold halves of UTF-16 pairs, which have no UTF-8: pairs are put together, a half
    that stands alone becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
