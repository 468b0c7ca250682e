"""Guesses at how a text goes on: with what followed where its last tokens stood before.

Text that repeats its prompt (a file that is edited, quotes) is mostly guessed right, other text
seldom. Each guess is compared with the token that came, whether or not a step computed it, so how
often guesses are right is known at no cost.
Source: prompt lookup decoding, Saxena 2023; the chains are those of LZ77 compressors.
"""
N_LEAST = 2   # tokens that must have stood there before
N_MOST = 16   # tokens that are compared
N_TRIES = 8   # places that are looked at
CHANCES = (0.0, 0.0, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)  # at first, by tokens that match
PACE = 1 / 12  # of what is learnt from one token


class Lookup:
    """The tokens of one sequence, at least one, and the place in them that its end is like.

    Negative tokens stand for parts of images: they are found again, but never guessed.
    credit: the steps that right guesses have saved, and what is left of those that guesses, its own
    and its neighbours', may cost it; kept by who decides how many are computed.
    """

    def __init__(self, tokens: list[int], credit: float = 0.0):
        self.credit = credit
        self._tokens = list(tokens)
        self._last: dict[tuple[int, int], int] = {}  # where a pair of tokens ended last
        self._before = [-1]                          # where the pair that ends here ended before
        self._next = 0                               # the place of the token that is guessed
        self._n_matched = 0                          # tokens before it that match; 0: no guess
        self._chances = list(CHANCES)
        self._enter(1)
        self._find()

    def add(self, token: int) -> None:
        """The sequence goes on with this token."""
        hit = False
        if self._n_matched:
            hit = self._tokens[self._next] == token
            i = min(self._n_matched, len(CHANCES) - 1)
            self._chances[i] += (hit - self._chances[i]) * PACE
        self._tokens.append(token)
        self._enter(len(self._tokens) - 1)
        if hit:
            self._next += 1
            self._n_matched += 1
        else:
            self._find()

    def chance(self, n_right: int) -> float:
        """How likely the next guess is right, after `n_right` that were; 0 where there is none."""
        if not self._n_matched:
            return 0.0
        return self._chances[min(self._n_matched + n_right, len(CHANCES) - 1)]

    def guesses(self, n: int) -> list[int]:
        """The tokens that may come next, n at most. What repeats itself is guessed to go on so."""
        out: list[int] = []
        if self._n_matched:
            period = len(self._tokens) - self._next
            for i in range(n):
                token = self._tokens[self._next + i] if i < period else out[i - period]
                if token < 0:
                    break
                out.append(token)
        return out

    def _enter(self, first: int) -> None:
        """Take note of the pairs that end at place `first` and behind."""
        tokens, last, before = self._tokens, self._last, self._before
        for place in range(first, len(tokens)):
            pair = tokens[place - 1], tokens[place]
            before.append(last.get(pair, -1))
            last[pair] = place

    def _find(self) -> None:
        """Of the last places where the last two tokens stood, the one that most before them match.
        """
        tokens, end = self._tokens, len(self._tokens) - 1
        place, self._n_matched = self._before[end], 0
        for _ in range(N_TRIES):
            if place < 0:
                break
            n = N_LEAST
            while n < N_MOST and n <= place and tokens[place - n] == tokens[end - n]:
                n += 1
            if n > self._n_matched:
                self._n_matched, self._next = n, place + 1
            place = self._before[place]
