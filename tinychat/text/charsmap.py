"""The table by which a Unigram vocabulary normalises a text: `precompiled_charsmap`.

A trie from sequences of bytes to what takes their place, folded into one array of 32-bit words:

    length of the trie in bytes, uint32 | words of the trie, uint32 each | replacements
    word = replacement's place (bits 0-30), or
           label (bits 0-7, and 31) | has a leaf (8) | base in 256s (9) | base (10-30)

Each replacement ends in a zero byte. The child of a node for a byte b stands at the node's base ^ b
and is one if its label is b; its own base is its place ^ the base in its word, where its leaf is.
Nodes are shared, so 44 thousand words hold 220 thousand keys: they are never listed.
Source: google/sentencepiece: normalizer.cc; s-yata/darts-clone: the array.
"""
import re

import numpy as np

from tinychat.errors import ModelFileError

MAX_KEY_CHARS = 24                     # looked at; real keys have up to 9
MAX_CACHED = 100_000                   # characters seen in texts

_FIRST_BYTES = (*range(1, 0x80), *range(0xC2, 0xF5))   # of a character
_KEY = "tokenizer.ggml.precompiled_charsmap"
_NODES_AT_ONCE = 4096


class Charsmap:
    """data: uint8 or int8 [n], or None for a table that changes nothing. Raises: ModelFileError."""

    def __init__(self, data: np.ndarray | None):
        blob = b"\0\0\0\0" if data is None or not len(data) else data.tobytes()
        size = int.from_bytes(blob[:4], "little")
        if len(blob) < 4 or size % 4 or size > len(blob) - 4:
            raise ModelFileError(f"{_KEY}: expected a trie of at most {max(0, len(blob) - 4)} "
                                 f"bytes, in words of 4, got one of {size}")
        trie = np.frombuffer(blob, "<u4", size // 4, 4)
        self._replacements = blob[4 + size:]
        _check(trie, self._replacements)
        self._trie: list[int] = trie.tolist()
        self._singles = _Singles(self)
        self._seconds_of: dict[str, frozenset[int]] = {}

    def replace(self, text: str) -> str:
        """text with each longest key replaced, from left to right."""
        if not self._trie:
            return text
        parts, done = [], 0
        for start in self._pairs(text):
            if start < done:
                continue
            n, value = self.longest(text[start:start + MAX_KEY_CHARS])
            if n > 1:
                parts += text[done:start].translate(self._singles), value
                done = start + n
        return "".join([*parts, text[done:].translate(self._singles)])

    def _pairs(self, text: str) -> list[int]:
        """Where keys of several characters may begin. They hold accents, and are rare."""
        present = {*text}
        firsts = {c: seconds for c in present if (seconds := self._seconds(c))}
        leads = frozenset().union(*firsts.values())
        seconds = [c for c in present if c.encode()[0] in leads]
        if not seconds:
            return []
        first, second = (re.escape("".join(sorted(side))) for side in (firsts, seconds))
        found = re.finditer(f"[{second}](?<=[{first}][{second}])", text)   # the rare ones first
        starts = [match.start() - 1 for match in found]
        pairs = {pair for pair in {text[start:start + 2] for start in starts}
                 if len(self._walk(pair.encode())[0]) == len(pair.encode())}
        return [start for start in starts if text[start:start + 2] in pairs]

    def _seconds(self, character: str) -> frozenset[int]:
        """The first bytes of the characters that go on with a key after this one."""
        found = self._seconds_of.get(character)
        if found is None:
            if len(self._seconds_of) >= MAX_CACHED:
                self._seconds_of.clear()
            data = character.encode()
            steps, base = self._walk(data)
            found = self._seconds_of[character] = frozenset(
                byte for byte in _FIRST_BYTES if len(steps) == len(data)
                and self._is_child(base ^ byte, byte))
        return found

    def longest(self, text: str) -> tuple[int, str]:
        """The longest key at the head of a text: how many characters (0: none), what for."""
        data = text.encode()
        steps, _ = self._walk(data)
        for n in range(len(steps), 0, -1):
            at_its_end = n == len(data) or data[n] & 0xC0 != 0x80      # of a character
            if steps[n - 1] is not None and at_its_end:
                start = steps[n - 1]
                end = self._replacements.index(b"\0", start)
                return len(data[:n].decode()), self._replacements[start:end].decode("utf-8",
                                                                                  "replace")
        return 0, ""

    def _walk(self, data: bytes) -> tuple[list[int | None], int]:
        """For each byte, as far as the trie goes: the place of a replacement, if it ends a key.
        And where the children of the last one stand."""
        trie, steps = self._trie, []
        base = _base(trie[0])
        for byte in data:
            place = base ^ byte
            if not byte or not self._is_child(place, byte):
                break
            base = place ^ _base(trie[place])
            steps.append(trie[base] & 0x7FFFFFFF if trie[place] & 0x100 else None)
        return steps, base

    def _is_child(self, place: int, byte: int) -> bool:
        return place < len(self._trie) and self._trie[place] & 0x800000FF == byte


class _Singles(dict):
    """code point -> what takes its place, for `str.translate`; filled by looking up."""

    def __init__(self, charsmap: Charsmap):
        self._charsmap = charsmap

    def __missing__(self, code_point: int) -> str:
        if len(self) >= MAX_CACHED:
            self.clear()
        n, value = self._charsmap.longest(chr(code_point))
        found = self[code_point] = value if n else chr(code_point)
        return found


def _base(word):
    return word >> 10 << ((word & 0x200) >> 6)


def _check(trie: np.ndarray, replacements: bytes) -> None:
    """Visits each node once, however many keys lead to it."""
    if len(trie) and replacements[-1:] != b"\0":
        raise ModelFileError(f"{_KEY}: expected replacements that end in a zero byte")
    labels = np.arange(1, 256, dtype=np.uint32)
    todo, seen = _base(trie[:1]), np.zeros(len(trie), bool)
    while len(todo):
        places = (todo[:_NODES_AT_ONCE, None] ^ labels).ravel()
        is_child = places < len(trie)
        places, label = places[is_child], np.resize(labels, is_child.shape)[is_child]
        places = np.unique(places[trie[places] & 0x800000FF == label])
        places = places[~seen[places]]
        seen[places] = True
        bases = places ^ _base(trie[places])
        leaves = bases[trie[places] & 0x100 > 0]
        if (leaves >= len(trie)).any() or (trie[leaves] & 0x7FFFFFFF >= len(replacements)).any():
            raise ModelFileError(f"{_KEY}: expected leaves inside of its {len(trie)} words and "
                                 f"{len(replacements)} bytes of replacements, got one beyond them")
        todo = np.concatenate([todo[_NODES_AT_ONCE:], bases])
