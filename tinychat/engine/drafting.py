"""How many guessed tokens a step computes besides those that are due: as many as pay.

What a token more costs is measured step by step, and how likely a guess is right by its sequence's
Lookup. A guess changes no answer: whatever is drawn where it stands is what would have been drawn,
and only when the two are equal does what stands behind it count.
"""
from tinychat.engine.lookup import Lookup
from tinychat.engine.scheduler import Work
from tinychat.engine.sequence import Sequence
from tinychat.engine.step_times import StepTimes
from tinychat.ops.program import PAGE_TOKENS

MAX_GUESSES = 15     # of one sequence in a step: two tiles of the kernels, with the token due
LEAST_PROFIT = 1.05  # by how much guesses must pay: chances and times are estimates
LEAST_GAIN = 0.02    # of its sequence's speed, below which a guess is not looked at
FREE_STEPS, FREE_SHARE = 2, 0.02  # what guesses may cost a sequence: so many steps, and of each


class Drafter:
    """Puts guesses behind the tokens of sequences that generate. n_most: tokens of one step."""

    def __init__(self, n_most: int):
        self.times = StepTimes()
        self._n_most = n_most

    def extend(self, work: Work) -> Work:
        """The work of a step in which each sequence has one token, and its guesses in ids."""
        for seq, _ in work:
            if seq.lookup is None:
                seq.lookup = Lookup(seq.keys[:seq.n_tokens].tolist(), FREE_STEPS)
        lookups = [seq.lookup for seq, _ in work]
        lengths = draft_lengths(lookups, [_room(seq) for seq, _ in work], self.times, self._n_most)
        slower = self.times.of(len(work) + sum(lengths)) / self.times.of(len(work))
        for lookup in lookups:
            lookup.credit += 1 + FREE_SHARE - slower
        return [(seq, 1 + _put_guesses(seq, n)) for (seq, _), n in zip(work, lengths)]


def draft_lengths(lookups: list[Lookup], rooms: list[int], times: StepTimes,
                  n_most: int) -> list[int]:
    """How many guesses of each sequence pay. rooms: the most of each; n_most: tokens of the step.

    A guess makes its own sequence faster and all slower. Those are chosen that raise the product of
    all speeds most. For one sequence alone that is its speed; in a crowd it keeps one from living
    off the others. And none may run out of credit by what is to be expected: by and large, guesses
    make no sequence slower than it would be without, but for FREE_SHARE.
    """
    n_sequences = len(lookups)
    best, best_profit = [0] * n_sequences, LEAST_PROFIT
    lengths, expected = [0] * n_sequences, [1.0] * n_sequences  # guesses; tokens of the step
    chances = [lookup.chance(0) if room > 0 else 0.0 for lookup, room in zip(lookups, rooms)]
    faster, time = 1.0, times.of(n_sequences)  # product of `expected`; of a step without guesses
    for n_tokens in range(n_sequences + 1, n_most + 1):
        gains = [chance / n for chance, n in zip(chances, expected)]
        gain = max(gains)
        if gain < LEAST_GAIN:
            break
        i = gains.index(gain)
        lengths[i] += 1
        expected[i] += chances[i]
        chances[i] *= lookups[i].chance(lengths[i]) if lengths[i] < rooms[i] else 0.0
        faster *= 1 + gain
        slower = times.of(n_tokens) / time
        profit = faster / slower ** n_sequences
        if profit > best_profit and all(lookup.credit + n >= slower
                                        for lookup, n in zip(lookups, expected)):
            best, best_profit = lengths.copy(), profit
    return best


def _room(seq: Sequence) -> int:
    """Guesses whose tokens the sequence may still have, in pages that are its own or promised to
    it: for the sake of a guess nobody else goes without a page."""
    lease = seq.lease
    n_positions = (lease.n_pages + lease.n_reserved) * PAGE_TOKENS
    return min(MAX_GUESSES, len(seq.ids) - seq.n_tokens - 1, n_positions - seq.n_tokens)


def _put_guesses(seq: Sequence, n: int) -> int:
    """Write up to n guesses behind the sequence's tokens; how many there were."""
    if not n:
        return 0
    guesses = seq.lookup.guesses(n)
    seq.ids[seq.n_tokens:seq.n_tokens + len(guesses)] = guesses
    return len(guesses)
