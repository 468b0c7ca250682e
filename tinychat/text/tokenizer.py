r"""Text to token ids and back, for the vocabularies that come inside GGUF files.

Three families, by `tokenizer.ggml.model` and `tokenizer.ggml.pre`:

    gpt2     BPE over bytes: text is cut into words by a pattern, the bytes of a word are joined
             pair by pair in the order of the merge list
    llama    SentencePiece: no words; spaces become ▁, and the pair whose joined text is the
             vocabulary's best-scored piece is joined first; what is left is spelt in bytes <0x41>
    gemma4   the pieces of the second, joined in the merge order of the first

All three are one loop (`_join_pairs`) over the symbols of a word, and a cache of words.
Source: ggml-org/llama.cpp: src/llama-vocab.cpp, for what the files mean; minbpe for the loop.
"""
import codecs
import heapq
import re
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from operator import contains
from typing import Any

from tinychat.errors import ModelFileError
from tinychat.text.pretokenizers import pretokenizer

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "▁"
MAX_CACHED_WORDS = 100_000             # about 30 MB when full
MAX_CACHED_WORD_CHARS = 64
SHORT_WORD = 100                       # symbols; up to here a list beats a heap

# Texts that end a turn whatever the file says of them.
_END_TEXTS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[ <|ifm|im_end|>").split()
# Fill-in-the-middle tokens that end one too: by metadata key, else the first text that exists.
_END_OF_FILL = {
    "fim_pad_token_id": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]".split(),
    "fim_rep_token_id": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split(),
    "fim_sep_token_id": "<|file_sep|> <|plamo:file_separator|>".split(),
}


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
    eog_ids: the tokens after which a model has nothing more to say.
    add_bos, add_eos: whether the file wants them round a prompt.
    """

    def __init__(self, vocabulary: "_Vocabulary", encode_word: Callable[[str], list[int]],
                 cut: Callable[[str], list[str]], *, byte_level: bool, add_space_prefix: bool,
                 add_bos: bool):
        self.tokens = vocabulary.tokens
        self.n_vocab = len(self.tokens)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.eog_ids = vocabulary.eog_ids
        self.add_bos = vocabulary.flag("add_bos_token", add_bos) and self.bos_id is not None
        self.add_eos = vocabulary.flag("add_eos_token", False) and self.eos_id is not None
        self._types = vocabulary.types
        self._byte_level = byte_level
        self._add_space_prefix = add_space_prefix
        self._cut = cut
        self._ids_of = _WordCache(encode_word)
        self._bytes: list[bytes | None] = [None] * self.n_vocab
        self._user_defined = _SpecialTexts(vocabulary, USER_DEFINED)
        self._all_special = _SpecialTexts(vocabulary, USER_DEFINED, CONTROL, UNKNOWN)

    @staticmethod
    def from_metadata(metadata: dict[str, Any]) -> "Tokenizer":
        """Raises: ModelFileError for keys that are missing, of a wrong type, or contradict each
        other, and for a `tokenizer.ggml.model` of another family."""
        vocabulary = _Vocabulary(metadata)
        match vocabulary.string("model"):
            case "gpt2":
                return _byte_pairs(vocabulary)
            case "gemma4":
                return _character_pairs(vocabulary, add_bos=True)
            case "llama":
                return _sentence_pieces(vocabulary)
            case model:
                raise ModelFileError("tokenizer.ggml.model: expected gpt2, llama or gemma4, "
                                     f"got {model!r}")

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
                ids += self._encode_plain(part, after_special)
                after_special = False
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a rendered prompt: control tokens are found, bos comes first if the file wants it
        and the template has not written it."""
        ids = self.encode(text, special=True)
        if self.add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _encode_plain(self, text: str, after_special: bool) -> Iterable[int]:
        if not self._byte_level:
            prefix = SPACE if self._add_space_prefix and after_special else ""
            text = prefix + text.replace(" ", SPACE)
        return chain.from_iterable(map(self._ids_of.__getitem__, self._cut(text)))

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

    @property
    def drops_first_space(self) -> bool:
        """Whether the first space of a decoded text is the one that `encode` put there."""
        return self._add_space_prefix


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


# The three families

def _byte_pairs(vocabulary: "_Vocabulary") -> Tokenizer:
    pre = pretokenizer(vocabulary.string("pre", None))
    if not pre.byte_level:
        return _character_pairs(vocabulary, add_bos=pre.add_bos)
    ids, ranks = vocabulary.ids_by_text(), vocabulary.merge_ranks()

    def encode_word(word: str) -> list[int]:
        if word.isascii() and word.isprintable():
            text = word.replace(" ", "Ġ")
        else:
            text = word.encode().decode("latin-1").translate(_BYTE_CHARACTERS)
        if pre.ignore_merges and text in ids:
            return [ids[text]]
        # A byte that is no token is left out, as the makers of such vocabularies do.
        return [ids[piece] for piece in _join_pairs(text, ranks, " ") if piece in ids]

    return Tokenizer(vocabulary, encode_word, pre.cut, byte_level=True, add_space_prefix=False,
                     add_bos=pre.add_bos)


def _character_pairs(vocabulary: "_Vocabulary", *, add_bos: bool) -> Tokenizer:
    ids, ranks = vocabulary.ids_by_text(), vocabulary.merge_ranks()
    spell = vocabulary.byte_speller()

    def encode_word(word: str) -> list[int]:
        if word in ids and not word.strip("\n"):
            return [ids[word]]
        return _ids_of_pieces(_join_pairs(word, ranks, " "), ids, spell)

    return Tokenizer(vocabulary, encode_word, _cut_between_pieces(ids, "\n"), byte_level=False,
                     add_space_prefix=False, add_bos=add_bos)


def _sentence_pieces(vocabulary: "_Vocabulary") -> Tokenizer:
    ids, ranks = vocabulary.ids_by_text(), vocabulary.score_ranks()
    spell = vocabulary.byte_speller()

    def encode_word(word: str) -> list[int]:
        return _ids_of_pieces(_join_pairs(word, ranks, ""), ids, spell)

    return Tokenizer(vocabulary, encode_word, _cut_between_pieces(ids), byte_level=False,
                     add_space_prefix=vocabulary.flag("add_space_prefix", True), add_bos=True)


def _ids_of_pieces(pieces: list[str], ids: dict[str, int],
                   spell: Callable[[str], list[int]]) -> list[int]:
    found = list(map(ids.get, pieces))
    if None in found:
        return [*chain.from_iterable(spell(piece) if id is None else [id]
                                     for piece, id in zip(pieces, found))]
    return found


def _cut_between_pieces(pieces: Iterable[str], alone: str = "") -> Callable[[str], list[str]]:
    """Cuts before each ▁ that no piece holds behind the character before it. Joining cannot cross
    such a place, so it is exact to encode each side by itself; and the sides repeat, as words do.
    A run of the character `alone` is a word too."""
    before = set(re.findall(f"(.){SPACE}", "\0".join(pieces), re.DOTALL)) - {SPACE, "\0"}
    joined = f"(?:(?<=[{re.escape(''.join(sorted(before)))}]){SPACE}+[^{SPACE}{alone}]*)*"
    word = f"{SPACE}*[^{SPACE}{alone}]+{joined if before else ''}|{SPACE}+"
    return re.compile(f"{alone}+|{word}" if alone else word).findall


# Joining symbols

_NO_RANK = float("inf")

def _join_pairs(word: str, ranks: dict[str, float], glue: str) -> list[str]:
    """Joins the neighbours of lowest rank (the leftmost of equals) until none has a rank; the rank
    of a and b stands under a + glue + b.

    >>> _join_pairs("aabc", {"a a": 1, "b c": 0}, " ")
    ['aa', 'bc']
    """
    parts = list(word)
    if len(parts) > SHORT_WORD:
        return _join_pairs_of_many(parts, ranks, glue)
    rank_of = ranks.get
    pairs = [rank_of(a + glue + b, _NO_RANK) for a, b in zip(parts, parts[1:])]
    while pairs:
        lowest = min(pairs)
        if lowest == _NO_RANK:
            break
        i = pairs.index(lowest)
        parts[i] += parts.pop(i + 1)
        del pairs[i]
        if i:
            pairs[i - 1] = rank_of(parts[i - 1] + glue + parts[i], _NO_RANK)
        if i < len(pairs):
            pairs[i] = rank_of(parts[i] + glue + parts[i + 1], _NO_RANK)
    return parts


def _join_pairs_of_many(parts: list[str], ranks: dict[str, float], glue: str) -> list[str]:
    """The same in O(n log n): a heap of pairs, and links between the parts that are left. A pair
    whose parts have changed since it was pushed is passed over."""
    n = len(parts)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap: list[tuple[float, int, int, int]] = []       # rank, left, right, length of both

    def push(left: int, right: int) -> None:
        rank = ranks.get(parts[left] + glue + parts[right])
        if rank is not None:
            heapq.heappush(heap, (rank, left, right, len(parts[left]) + len(parts[right])))

    for i in range(n - 1):
        push(i, i + 1)
    while heap:
        _, left, right, length = heapq.heappop(heap)
        if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != length:
            continue
        parts[left] += parts[right]
        parts[right] = ""
        after[left] = after[right]
        if after[left] < n:
            before[after[left]] = left
            push(left, after[left])
        if before[left] >= 0:
            push(before[left], left)
    return [part for part in parts if part]


class _WordCache(dict):
    """word -> ids, filled by looking up; emptied when full, for it is filled by strangers."""

    def __init__(self, encode_word: Callable[[str], list[int]]):
        self._encode_word = encode_word

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode_word(word)
        if len(word) <= MAX_CACHED_WORD_CHARS:
            if len(self) >= MAX_CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


# Special tokens in a text

class _SpecialTexts:
    """Finds the texts of tokens of some types. Of texts that overlap the longest goes first."""

    def __init__(self, vocabulary: "_Vocabulary", *types: int):
        self._ids = {vocabulary.tokens[id]: id for id in vocabulary.ids_of_type(*types)
                     if vocabulary.tokens[id]}
        self._swallows_spaces = vocabulary.swallows_spaces()
        self._any: re.Pattern | None = None

    def split(self, text: str) -> list[str | int]:
        """Pieces of text and the ids between them."""
        if not self._ids:
            return [text] if text else []
        parts: list[str | int] = []
        done = 0
        for start, end, found in self._clusters(text):
            parts += [text[done:start], *self._split_cluster(text[start:end], found)]
            done = end
        return self._tidy([*parts, text[done:]])

    def _tidy(self, parts: list[str | int]) -> list[str | int]:
        """Texts side by side become one, spaces that a token swallows go, and so do empty texts."""
        tidy: list[str | int] = []
        for part in parts:
            if isinstance(part, str) and tidy and isinstance(tidy[-1], str):
                tidy[-1] += part
            else:
                tidy.append(part)
        for i, id in enumerate(tidy[:-1]):
            if id in self._swallows_spaces and isinstance(tidy[i + 1], str):
                tidy[i + 1] = tidy[i + 1].lstrip(" \t\n\v\f\r")
        return [part for part in tidy if part != ""]

    def _clusters(self, text: str) -> Iterator[tuple[int, int, set[str]]]:
        """Stretches of special texts that overlap, mostly a single one: start, end, which ones."""
        if self._any is None:
            longest_first = sorted(self._ids, key=len, reverse=True)
            self._any = re.compile("|".join(map(re.escape, longest_first)))
        search = self._any.search
        match = search(text)
        while match:
            start, end = match.span()
            found = {match[0]}
            match = search(text, start + 1)
            while match and match.start() < end:
                end = max(end, match.end())
                found.add(match[0])
                match = search(text, match.start() + 1)
            yield start, end, found

    def _split_cluster(self, text: str, found: set[str]) -> list[str | int]:
        if text in self._ids:
            return [self._ids[text]]
        found |= {longer[:n] for longer in found for n in range(1, len(longer))} & self._ids.keys()
        parts: list[str | int] = [text]
        for special in sorted(found, key=lambda text: (-len(text.encode()), self._ids[text])):
            cut = [part.split(special) if isinstance(part, str) else part for part in parts]
            parts = [*chain.from_iterable(
                [part] if isinstance(part, int) else _between(part, self._ids[special])
                for part in cut)]
        return parts


def _between(pieces: list[str], id: int) -> list[str | int]:
    """["a", "", "b"], 7 -> ["a", 7, 7, "b"]"""
    return [part for piece in pieces for part in (piece, id) if part != ""][:-1]


# Metadata

class _Vocabulary:
    """The `tokenizer.ggml.*` keys, each checked when it is asked for."""

    def __init__(self, metadata: dict[str, Any]):
        self._metadata = metadata
        self.string("model")
        self.tokens = self._strings("tokens")
        if not self.tokens:
            raise ModelFileError("tokenizer.ggml.tokens: expected at least one token, got none")
        types = self._numbers("token_type")
        self.types: list[int] = types[:len(self.tokens)] if types else [NORMAL] * len(self.tokens)
        self._all_ids = dict(zip(self.tokens, range(len(self.tokens))))
        default = (1, 2) if self.string("model") == "llama" else (None, None)
        self.bos_id = self._token_id("bos_token_id", default[0])
        self.eos_id = self._token_id("eos_token_id", default[1])
        self.eog_ids = self._end_of_generation()
        self._special_ids = [id for id, type in enumerate(self.types) if type != NORMAL]
        self._check_bytes()

    def string(self, key: str, *default: str | None) -> str | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}", *default)
        if not (isinstance(value, str) or default and value is default[0]):
            raise _wrong(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise _wrong(key, "true or false", value)
        return value

    def _strings(self, key: str) -> list[str]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not all(map(str.__instancecheck__, value)):
            raise _wrong(key, "an array of strings", value)
        return value

    def _numbers(self, key: str) -> list | None:
        """An array with a number for each token, or None where there is none."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        whole = key == "token_type"
        if getattr(getattr(value, "dtype", None), "kind", "none") not in ("iu" if whole else "iuf"):
            raise _wrong(key, f"an array of {'whole ' if whole else ''}numbers", value)
        if len(value) < len(self.tokens):
            raise ModelFileError(f"tokenizer.ggml.{key}: expected {len(self.tokens)} numbers, one "
                                 f"for each token, got {len(value)}")
        return value.tolist()

    def _token_id(self, key: str, default: int | None) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default if default is not None and default < len(self.tokens) else None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise _wrong(key, f"a token id below {len(self.tokens)}", value)
        return value

    def _end_of_generation(self) -> frozenset[int]:
        """The ids named by the file, and those whose text says it; the latter become control
        tokens, for converters forget to mark them."""
        ids = self._all_ids
        ends = {self._token_id(f"{key}_token_id", None) for key in ("eos", "eot", "eom")}
        ends.add(self.eos_id)
        for key, texts in _END_OF_FILL.items():
            texts = [text for text in texts if text in ids]
            ends.add(self._token_id(key, ids[texts[0]] if texts else None))
        by_text = {ids[text] for text in _END_TEXTS if text in ids}
        for id in by_text:
            self.types[id] = CONTROL
        ends = (ends | by_text) - {None}
        return frozenset(ends - self._not_ends({self.tokens[id]: id for id in ends}))

    def _not_ends(self, ends: dict[str, int]) -> set[int]:
        """Two texts mean something else in some families: <|end|> where a turn has several
        messages (gpt-oss, solar), </s> where it is ordinary text (gemma4, plamo)."""
        wrong = set()
        calls = "<|call|>" in ends or "<|calls|>" in ends
        if "<|end|>" in ends and calls and ("<|return|>" in ends or "<|flush|>" in ends):
            wrong.add(ends["<|end|>"])
        if "</s>" in ends and ("<|tool_response>" in ends or "<|plamo:eos|>" in ends):
            wrong.add(ends["</s>"])
            self.types[ends["</s>"]] = NORMAL
        return wrong

    def _check_bytes(self) -> None:
        for id in self.ids_of_type(BYTE):
            if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", self.tokens[id]):
                raise ModelFileError(f"tokenizer.ggml.tokens[{id}]: expected a byte like <0x41>, "
                                     f"for token_type says so, got {self.tokens[id]!r}")

    def ids_of_type(self, *types: int) -> list[int]:
        """types: any but NORMAL."""
        return [id for id in self._special_ids if self.types[id] in types]

    def ids_by_text(self) -> dict[str, int]:
        """The tokens that ordinary text can become: no control token may come of what a user
        typed, however it is spelt."""
        ids = self._all_ids.copy()
        for id in self.ids_of_type(CONTROL, UNKNOWN, BYTE):
            ids.pop(self.tokens[id], None)
        return ids

    def merge_ranks(self) -> dict[str, int]:
        """ "left right" -> its place in the list, the first if it stands there twice."""
        merges = self._strings("merges")
        joined = map(str.replace, merges, repeat(" "), repeat(""), repeat(1))
        if not all(map(self._all_ids.__contains__, joined)) or \
                not all(map(contains, merges, repeat(" "))):
            self._report_bad_merge(merges)
        return dict(zip(reversed(merges), range(len(merges) - 1, -1, -1)))

    def _report_bad_merge(self, merges: list[str]) -> None:
        for i, merge in enumerate(merges):
            if " " not in merge or merge.replace(" ", "", 1) not in self._all_ids:
                raise ModelFileError(f"tokenizer.ggml.merges[{i}]: expected two pieces with a "
                                     f"space between that join to a token, got {merge!r}")

    def score_ranks(self) -> dict[str, float]:
        """piece -> minus its score."""
        scores = self._numbers("scores") or [0.0] * len(self.tokens)
        bad = [id for id, score in enumerate(scores) if score != score]
        if bad:
            raise _wrong(f"scores[{bad[0]}]", "a number", scores[bad[0]])
        return {text: -scores[id] for text, id in self.ids_by_text().items()}

    def byte_speller(self) -> Callable[[str], list[int]]:
        """text -> the ids of its bytes; the unknown token where the vocabulary has no bytes."""
        of_byte = {int(self.tokens[id][3:5], 16): id for id in self.ids_of_type(BYTE)}
        unknown = self._token_id("unknown_token_id", None)
        rest = [] if unknown is None else [unknown]

        def spell(text: str) -> list[int]:
            ids = [of_byte.get(byte) for byte in text.encode()]
            return rest if None in ids else ids

        return spell

    def swallows_spaces(self) -> frozenset[int]:
        """The special tokens that take the spaces behind them along. GGUF has no place for that;
        it is known of the Phi-3 family, by the model's name."""
        name = self._metadata.get("general.name")
        if not isinstance(name, str) or not re.search("phi-?3", name, re.IGNORECASE):
            return frozenset()
        return frozenset(id for id in self.ids_of_type(CONTROL, UNKNOWN, USER_DEFINED)
                         if self.tokens[id] not in ("<unk>", "<s>", "<|endoftext|>"))


def _wrong(key: str, expected: str, value: Any) -> ModelFileError:
    shown = "nothing" if value is None else repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return ModelFileError(f"tokenizer.ggml.{key}: expected {expected}, got {shown}")


def _without_surrogates(text: str) -> str:
    """Python may hold halves of UTF-16 pairs, which have no UTF-8: pairs are put together, a half
    that stands alone becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
