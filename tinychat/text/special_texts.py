"""Special tokens inside a text: where they are, and the text between them."""
import re
from collections.abc import Iterator
from itertools import chain

from tinychat.text.vocabulary import Vocabulary


class SpecialTexts:
    """Finds the texts of tokens of some types. Of texts that overlap the longest goes first."""

    def __init__(self, vocabulary: Vocabulary, *types: int):
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
