"""Unigram, SentencePiece's other way: of all ways to cut a text into pieces the most likely one.

Source: google/sentencepiece: unigram_model.cc; ggml-org/llama.cpp: src/llama-vocab.cpp, for what
the files mean.
"""
from collections.abc import Callable
from itertools import pairwise

from tinychat.text.words import SPACE

UNKNOWN_PENALTY = 10.0                 # below the least likely piece


def spacer(prefix: bool, merge: bool) -> Callable[[str, bool], str]:
    """Spaces become ▁: of a run one, and none at the ends, if merge. prefix: one more before the
    first other character of what begins a prompt or follows a special token."""
    def space(text: str, after_special: bool) -> str:
        if merge:
            text = " ".join(filter(None, text.split(" ")))
        rest = text.lstrip(" ")
        n_spaces = len(text) - len(rest) + bool(prefix and after_special and rest)
        return SPACE * n_spaces + rest.replace(" ", SPACE)

    return space


def word_encoder(costs: dict[str, float], ids: dict[str, int], unknown_cost: float,
                 unknown: list[int]) -> Callable[[str], list[int]]:
    """word -> the ids of the cheapest pieces that make it up (Viterbi; the first found of equals).
    A character that is no piece can be had for `unknown_cost`; a run of such is `unknown` once."""
    longest: dict[str, int] = {}       # of the pieces that begin with a character
    for piece in costs:
        if piece and longest.get(piece[0], 0) < len(piece):
            longest[piece[0]] = len(piece)

    def encode_word(word: str) -> list[int]:
        n = len(word)
        best = [0.0] + [float("inf")] * n          # best[i]: cost of word[:i]
        begin = [0] * (n + 1)                      # where its last piece begins
        for start in range(n):
            so_far = best[start]
            if word[start] not in costs:
                cost = so_far + unknown_cost
                if cost < best[start + 1]:
                    best[start + 1], begin[start + 1] = cost, start
            for end in range(start + 1, min(n, start + longest.get(word[start], 0)) + 1):
                cost = costs.get(word[start:end])
                if cost is not None and so_far + cost < best[end]:
                    best[end], begin[end] = so_far + cost, start
        return ids_along(_path(begin), word)

    def ids_along(places: list[int], word: str) -> list[int]:
        found: list[int] = []
        was_known = True
        for start, end in pairwise(places):
            id = ids.get(word[start:end])
            if id is not None:
                found.append(id)
            elif was_known:
                found += unknown
            was_known = id is not None
        return found

    return encode_word


def _path(begin: list[int]) -> list[int]:
    """[0, 0, 1, 1] -> [0, 1, 3]"""
    place = len(begin) - 1
    places = [place]
    while place:
        place = begin[place]
        places.append(place)
    return places[::-1]
