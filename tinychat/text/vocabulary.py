"""The `tokenizer.ggml.*` keys of a GGUF file, checked: what a tokenizer is made of."""
import re
import reprlib
from collections.abc import Callable
from itertools import compress
from typing import Any

import numpy as np

from tinychat.errors import ModelFileError

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Texts that end a turn whatever the file says of them.
_END_TEXTS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[ <|ifm|im_end|>").split()
# Control tokens with which a model that runs on begins somebody's turn, or a tool's result.
_NEXT_TURN = (
    "<|im_start|> <|start_header_id|> <|start_of_role|> <|START_OF_TURN_TOKEN|> <start_of_turn> "
    "<|turn> <|user|> <|observation|> <|END_OF_TURN_TOKEN|> <start_function_response> "
    "<|role_end|>").split()
# Fill-in-the-middle tokens that end one too: by metadata key, else the first text that exists.
_END_OF_FILL = {
    "fim_pad_token_id": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]".split(),
    "fim_rep_token_id": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split(),
    "fim_sep_token_id": "<|file_sep|> <|plamo:file_separator|>".split(),
}
_KNOWN_TEXTS = frozenset(_END_TEXTS).union(_NEXT_TURN, *_END_OF_FILL.values())
# bos, eos and sep where the file names none
_DEFAULT_IDS = {"llama": (1, 2, None), "t5": (None, 1, None), "bert": (101, None, 102)}


class Vocabulary:
    """The `tokenizer.ggml.*` keys, each checked when it is asked for."""

    def __init__(self, metadata: dict[str, Any]):
        self._metadata = metadata
        self.string("model")
        self.tokens = self._strings("tokens")
        if not self.tokens:
            raise ModelFileError("tokenizer.ggml.tokens: expected at least one token, got none")
        types = self._numbers("token_type")
        self._types = (np.full(len(self.tokens), NORMAL) if types is None
                       else types.astype(np.int64))
        self._known_ids = {text: id for id, text in enumerate(self.tokens) if text in _KNOWN_TEXTS}
        bos, eos, sep = _DEFAULT_IDS.get(self.string("model"), (None, None, None))
        self.bos_id = self._token_id("bos_token_id", self._token_id("cls_token_id", bos))
        self.eos_id = self._token_id("eos_token_id", eos)
        self.sep_id = self._token_id("seperator_token_id", sep)        # GGUF spells it so
        self.eog_ids = self._end_of_generation()
        self.stop_ids = self.eog_ids | {
            self._known_ids[text] for text in _NEXT_TURN if text in self._known_ids
            and self._types[self._known_ids[text]] in (CONTROL, USER_DEFINED)}
        self.types: list[int] = self._types.tolist()
        self.special_ids: list[int] = np.flatnonzero(self._types != NORMAL).tolist()
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
        if not isinstance(value, list) or not {*map(type, value)} <= {str}:
            raise _wrong(key, "an array of strings", value)
        return value

    def _numbers(self, key: str) -> np.ndarray | None:
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
        return value[:len(self.tokens)]

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
        ids = self._known_ids
        ends = {self._token_id(f"{key}_token_id", None) for key in ("eos", "eot", "eom")}
        ends.add(self.eos_id)
        for key, texts in _END_OF_FILL.items():
            texts = [text for text in texts if text in ids]
            ends.add(self._token_id(key, ids[texts[0]] if texts else None))
        by_text = {ids[text] for text in _END_TEXTS if text in ids}
        for id in by_text:
            self._types[id] = CONTROL
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
            self._types[ends["</s>"]] = NORMAL
        return wrong

    def _check_bytes(self) -> None:
        for id in self.ids_of_type(BYTE):
            if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", self.tokens[id]):
                raise ModelFileError(f"tokenizer.ggml.tokens[{id}]: expected a byte like <0x41>, "
                                     f"for token_type says so, got {self.tokens[id]!r}")

    def ids_of_type(self, *types: int) -> list[int]:
        """types: any but NORMAL."""
        return [id for id in self.special_ids if self.types[id] in types]

    def ids_by_text(self) -> dict[str, int]:
        """The tokens that ordinary text can become, of those with the same text the last."""
        ids = dict(zip(self.tokens, range(len(self.tokens))))
        for id in self.ids_never_made():
            ids.pop(self.tokens[id], None)
        return ids

    def ids_never_made(self) -> list[int]:
        """No control token may come of what a user typed, however it is spelt."""
        return self.ids_of_type(CONTROL, UNKNOWN, BYTE)

    def merges(self) -> list[str]:
        """ "left right", first to last; `check_merges` says whether they are."""
        return self._strings("merges")

    def check_merges(self) -> None:
        texts = {*self.tokens}
        for i, merge in enumerate(self.merges()):
            if " " not in merge or merge.replace(" ", "", 1) not in texts:
                raise ModelFileError(f"tokenizer.ggml.merges[{i}]: expected two pieces with a "
                                     f"space between that join to a token, got {merge!r}")

    def respell(self, respeller: Callable[[list[str]], Callable[[str], str]]) -> None:
        """Gives the ordinary tokens other texts. respeller: all their texts -> old text -> new."""
        ordinary = [type == NORMAL for type in self.types]
        spell = respeller([*compress(self.tokens, ordinary)])
        self.tokens = [spell(text) if is_ordinary else text
                       for text, is_ordinary in zip(self.tokens, ordinary)]

    def charsmap(self) -> np.ndarray | None:
        """The bytes of the table by which Unigram normalises a text."""
        value = self._metadata.get("tokenizer.ggml.precompiled_charsmap")
        if value is not None and getattr(value, "dtype", None) not in (np.uint8, np.int8):
            raise _wrong("precompiled_charsmap", "an array of bytes", value)
        return value

    def scores(self) -> np.ndarray:
        """float64, one for each token; 0 where the file has none."""
        scores = self._numbers("scores")
        scores = np.zeros(len(self.tokens)) if scores is None else scores.astype(np.float64)
        bad = np.flatnonzero(np.isnan(scores))
        if len(bad):
            raise _wrong(f"scores[{bad[0]}]", "a number", float(scores[bad[0]]))
        return scores

    def score_ranks(self) -> dict[str, float]:
        """piece -> minus its score."""
        ranks = (-self.scores()).tolist()
        return {text: ranks[id] for text, id in self.ids_by_text().items()}

    def byte_speller(self) -> Callable[[bytes], list[int]]:
        """bytes -> their ids; the unknown token where the vocabulary has no bytes."""
        of_byte = {int(self.tokens[id][3:5], 16): id for id in self.ids_of_type(BYTE)}
        rest = self.unknown(None)

        def spell(text: bytes) -> list[int]:
            ids = [of_byte.get(byte) for byte in text]
            return rest if None in ids else ids

        return spell

    def unknown(self, default: int | None) -> list[int]:
        """The unknown token, or nothing where there is none."""
        id = self._token_id("unknown_token_id", default)
        return [] if id is None else [id]

    def swallows_spaces(self) -> frozenset[int]:
        """The special tokens that take the spaces behind them along. GGUF has no place for that;
        it is known of the Phi-3 family, by the model's name."""
        name = self._metadata.get("general.name")
        if not isinstance(name, str) or not re.search("phi-?3", name, re.IGNORECASE):
            return frozenset()
        return frozenset(id for id in self.ids_of_type(CONTROL, UNKNOWN, USER_DEFINED)
                         if self.tokens[id] not in ("<unk>", "<s>", "<|endoftext|>"))


def _wrong(key: str, expected: str, value: Any) -> ModelFileError:
    shown = "nothing" if value is None else reprlib.repr(value)
    return ModelFileError(f"tokenizer.ggml.{key}: expected {expected}, got {shown}")
