"""Words: joining the symbols of one pair by pair, remembering what came of it, and finding words
where a vocabulary knows none."""
import heapq
import re
from collections.abc import Callable, Iterable

SPACE = "▁"
MAX_CACHED_WORDS = 100_000             # about 30 MB when full
MAX_CACHED_WORD_CHARS = 64
SHORT_WORD = 100                       # symbols; up to here a list beats a heap

_NO_RANK = float("inf")


def join_pairs(word: str, ranks: dict[str, float], glue: str) -> list[str]:
    """Joins the neighbours of lowest rank (the leftmost of equals) until none has a rank; the rank
    of a and b stands under a + glue + b.

    >>> join_pairs("aabc", {"a a": 1, "b c": 0}, " ")
    ['aa', 'bc']
    """
    parts = list(word)
    if len(parts) > SHORT_WORD:
        return join_pairs_of_many(parts, ranks, glue)
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


def join_pairs_of_many(parts: list[str], ranks: dict[str, float], glue: str) -> list[str]:
    """The same in O(n log n): a heap of pairs, and links between the parts that are left. A pair
    whose parts have changed since it was pushed is passed over."""
    n = len(parts)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap: list[tuple[float, int, int, int]] = []       # rank, left, right, length of both

    def push(left: int, right: int) -> None:
        rank = ranks.get(parts[left] + glue + parts[right], _NO_RANK)
        if rank < _NO_RANK:
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


class WordCache(dict):
    """word -> ids, filled by looking up; emptied when full, for it is filled by strangers. Tuples
    of numbers leave the garbage collector's sight, which took a quarter of the time with lists."""

    def __init__(self, encode_word: Callable[[str], list[int]]):
        self._encode_word = encode_word

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._encode_word(word))
        if len(word) <= MAX_CACHED_WORD_CHARS:
            if len(self) >= MAX_CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def cut_between_pieces(pieces: Iterable[str], alone: str = "") -> Callable[[str], list[str]]:
    """Cuts before each ▁ that no piece holds behind the character before it. Joining cannot cross
    such a place, so it is exact to encode each side by itself; and the sides repeat, as words do.
    A run of the character `alone` is a word too."""
    joined = "\0".join(pieces)
    inside = re.finditer(f"{SPACE}(?<=[^{SPACE}\0]{SPACE})", joined)     # ▁ first: `re` skips to it
    before = {joined[match.start() - 1] for match in inside}
    more = f"(?:(?<=[{re.escape(''.join(sorted(before)))}]){SPACE}+[^{SPACE}{alone}]*)*"
    word = f"{SPACE}*[^{SPACE}{alone}]+{more if before else ''}|{SPACE}+"
    return re.compile(f"{alone}+|{word}" if alone else word).findall
