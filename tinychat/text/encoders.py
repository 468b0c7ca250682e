"""One word to ids, by the four ways of the families: compiled where there are kernels, and else in
plain Python, which says what is meant. Both give the same ids.

A text of 1 MB has some 30,000 words that were not seen before; plain Python takes 25 us for one of
7 characters, the compiled way 0.5.
"""
import os
from collections.abc import Callable
from itertools import chain

import numpy as np

from tinychat.text import unigram, wordpiece
from tinychat.text.vocabulary import NORMAL, Vocabulary
from tinychat.text.words import join_pairs

try:
    from tinychat import _kernels
except ImportError:                    # said when a model is loaded
    _kernels = None


def by_merges(vocabulary: Vocabulary, alphabet: str | None = None) -> Callable[..., list[int]]:
    """Pairs join in the order of the merge list. Returns (word, whole=False) -> ids; whole: a word
    that is a token is that token, however it joins.

    alphabet: the characters that spell the 256 bytes in the tokens' texts; None where tokens spell
    characters. Raises: ModelFileError for merges that are missing or join to nothing.
    """
    pieces = _compiled(vocabulary, alphabet)
    if pieces is None:
        vocabulary.check_merges()
        merges = vocabulary.merges()   # the first counts of those that stand there twice
        ranks = dict(zip(reversed(merges), range(len(merges) - 1, -1, -1)))
        return _plain_joiner(vocabulary, ranks, " ", alphabet)
    if not pieces.add_merges(vocabulary.merges()):
        vocabulary.check_merges()      # else some join to what no text can spell
    return pieces.join


def by_scores(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """The pair that joins to the best-scored piece joins first. Raises: ModelFileError."""
    pieces = _compiled(vocabulary)
    if pieces is None:
        return _plain_joiner(vocabulary, vocabulary.score_ranks(), "", None)
    pieces.add_costs(-vocabulary.scores())
    return pieces.join


def longest_first(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """WordPiece."""
    unknown = vocabulary.unknown(100)
    pieces = _compiled(vocabulary)
    if pieces is None:
        return wordpiece.word_encoder(vocabulary.ids_by_text(), unknown)
    return lambda word: (unknown if len(word) > wordpiece.MAX_WORD_CHARS
                         else pieces.longest_first(word, unknown))


def likeliest(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """Unigram. Raises: ModelFileError for scores that are none."""
    unknown, costs = vocabulary.unknown(2), -vocabulary.scores()
    unknown_cost = unigram.UNKNOWN_PENALTY + float(
        costs[np.equal(vocabulary.types, NORMAL)].max(initial=0.0))
    pieces = _compiled(vocabulary)
    if pieces is None:
        return unigram.word_encoder(vocabulary.score_ranks(), vocabulary.ids_by_text(),
                                    unknown_cost, unknown)
    pieces.add_costs(costs)
    return lambda word: pieces.likeliest(word, unknown_cost, unknown)


def _compiled(vocabulary: Vocabulary, alphabet: str | None = None):
    if _kernels is None or os.environ.get("TINYCHAT_PURE") == "1":
        return None
    return _kernels.Pieces(vocabulary.tokens, vocabulary.ids_never_made(), alphabet,
                           vocabulary.byte_speller())


def _plain_joiner(vocabulary: Vocabulary, ranks: dict[str, float], glue: str,
                  alphabet: str | None) -> Callable[..., list[int]]:
    ids, spell_bytes = vocabulary.ids_by_text(), vocabulary.byte_speller()

    def spell(piece: str) -> list[int]:
        """For what is no token that a text may become. A byte that is none is left out."""
        if alphabet is None:
            return spell_bytes(piece.encode())
        return [ids[byte] for byte in piece if byte in ids]

    def join(word: str, whole: bool = False) -> list[int]:
        if alphabet is not None:
            word = word.encode().decode("latin-1").translate(alphabet)
        if whole and word in ids:
            return [ids[word]]
        return [*chain.from_iterable([ids[piece]] if piece in ids else spell(piece)
                                     for piece in join_pairs(word, ranks, glue))]

    return join
