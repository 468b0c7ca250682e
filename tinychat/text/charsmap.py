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
MAX_CACHED = 100_000                   # characters, and pairs of neighbours, seen in texts

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
        self._pairs: dict[tuple[str, str], bool] = {}

    def replace(self, text: str) -> str:
        """text with each longest key replaced, from left to right."""
        if not self._trie:
            return text
        pairs = {first + second for first, second in set(zip(text, text[1:]))
                 if self._is_pair(first, second)}
        if not pairs:                  # keys of several characters hold accents, and are rare
            return text.translate(self._singles)
        parts, done = [], 0
        firsts, seconds = (re.escape("".join(sorted(side))) for side in map(set, zip(*pairs)))
        for match in re.finditer(f"[{firsts}](?=[{seconds}])", text):
            start = match.start()
            if start < done or text[start:start + 2] not in pairs:
                continue
            n, value = self.longest(text[start:start + MAX_KEY_CHARS])
            if n > 1:
                parts += text[done:start].translate(self._singles), value
                done = start + n
        return "".join([*parts, text[done:].translate(self._singles)])

    def _is_pair(self, first: str, second: str) -> bool:
        found = self._pairs.get((first, second))
        if found is None:
            if len(self._pairs) >= MAX_CACHED:
                self._pairs.clear()
            key = (first + second).encode()
            found = self._pairs[first, second] = len(self._walk(key)) == len(key)
        return found

    def longest(self, text: str) -> tuple[int, str]:
        """The longest key at the head of a text: how many characters (0: none), what for."""
        data = text.encode()
        steps = self._walk(data)
        for n in range(len(steps), 0, -1):
            at_its_end = n == len(data) or data[n] & 0xC0 != 0x80      # of a character
            if steps[n - 1] is not None and at_its_end:
                start = steps[n - 1]
                end = self._replacements.index(b"\0", start)
                return len(data[:n].decode()), self._replacements[start:end].decode("utf-8",
                                                                                  "replace")
        return 0, ""

    def _walk(self, data: bytes) -> list[int | None]:
        """For each byte, as far as the trie goes: the place of a replacement, if it ends a key."""
        trie, steps = self._trie, []
        base = _base(trie[0])
        for byte in data:
            place = base ^ byte
            if not byte or place >= len(trie) or trie[place] & 0x800000FF != byte:
                break
            base = place ^ _base(trie[place])
            steps.append(trie[base] & 0x7FFFFFFF if trie[place] & 0x100 else None)
        return steps


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
