"""Who takes part in the next step, and with how many tokens; and the step's arrays.

Every sequence that generates takes part in every step with one token. What room is left goes to
prompts, in order of arrival and in chunks, so a long prompt delays the others by one chunk at most.
"""
import numpy as np

from tinychat.engine.kv_cache import Lease, n_pages_for
from tinychat.engine.sequence import Sequence
from tinychat.ops.batch import Batch
from tinychat.ops.program import PAGE_TOKENS, Program

Work = list[tuple[Sequence, int]]  # sequences and how many of their next tokens, or guesses
FIRST_CUT = 512  # tokens, a multiple of PAGE_TOKENS


def plan_step(running: list[Sequence], *, max_tokens: int, chunk: int,
              cuts: bool = False) -> Work:
    """The work of one step, generating sequences first.

    running: in order of arrival; max_tokens: the step's limit; chunk: that of its prompt tokens.
    cuts: whether prompts stop at `next_cut`.
    """
    work = [(seq, 1) for seq in running if seq.generating]
    most = max_tokens - len(work)
    room = min(most, chunk)
    for seq in running:
        if room <= 0:
            break
        if not seq.generating:
            n = part_of(seq, room, most, cuts)
            if n:
                work.append((seq, n))
            room, most = room - n, most - n
    return work


def part_of(seq: Sequence, room: int, most: int, cuts: bool) -> int:
    """How many of a prompt's next tokens take part: `room` of them, fewer or, up to `most`, more.

    A run that must stay whole is taken to its end, or left for another step.
    """
    begin = seq.n_done
    end = begin + min(room, seq.n_pending)
    if cuts:
        end = min(end, next_cut(begin, seq.n_tokens))
    for first, last in seq.whole:
        if first < end < last:
            end = last if last - begin <= most else max(first, begin)
    return end - begin


def next_cut(begin: int, n_tokens: int) -> int:
    """Where a prompt's next step ends at the latest, so that a snapshot can be taken there.

    That is the last page boundary before its last token, and FIRST_CUT, twice that, and so on: what
    chats begin with in common is found again, at the cost of a few snapshots.
    """
    doubled = FIRST_CUT
    while doubled <= begin:
        doubled *= 2
    boundary = (n_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS
    return min(doubled, boundary) if boundary > begin else doubled


class StepArrays:
    """The batch descriptor's memory, filled anew for each step, and the page tables.

    pages, window_pages: int32 (n_slots, max_pages), a row per running sequence, which its lease
    keeps up to date. A slot is also the place of its sequence's recurrent state.
    """

    def __init__(self, program: Program, *, max_tokens: int, n_slots: int, n_ctx: int):
        self._program = program
        self.tokens = np.zeros(max_tokens, np.int32)
        self.positions = np.zeros(max_tokens, np.int32)
        self.sequences = np.zeros(max_tokens, np.int32)
        self.outputs = np.zeros(max_tokens, np.int32)
        self.pages = np.zeros((n_slots, n_pages_for(n_ctx)), np.int32)
        self.window_pages = np.zeros_like(self.pages) if program.window else None
        self._counting = np.arange(n_ctx, dtype=np.int32)

    def lease(self, slot: int, whole: tuple[tuple[int, int], ...] = ()) -> Lease:
        """An empty lease on the rows of this slot."""
        window_row = None if self.window_pages is None else self.window_pages[slot]
        return Lease(self.pages[slot], window_row, slot, whole)

    def fill(self, work: Work, *, all_rows: bool = False) -> Batch:
        """Results are wanted where nothing remains pending, and of guesses behind; with `all_rows`,
        everywhere."""
        end = n_outputs = 0
        for seq, n in work:
            begin, end = end, end + n
            self._put(seq, n, begin)
            wanted = n if all_rows else max(0, n - seq.n_pending + 1)
            for i in range(end - wanted, end):
                self.outputs[n_outputs] = i
                n_outputs += 1
        images = self._images(work, end) if any(seq.images for seq, _ in work) else {}
        return Batch(self.tokens[:end], self.positions[:end], self.sequences[:end], self.pages,
                     self.outputs[:n_outputs], self.window_pages, **images)

    def _put(self, seq: Sequence, n: int, at: int) -> None:
        if n == 1:  # scalars: a third of the time of slices, on the path of every generated token
            self.tokens[at] = seq.ids[seq.n_done]
            self.positions[at] = seq.n_done
            self.sequences[at] = seq.slot
            return
        self.tokens[at:at + n] = seq.ids[seq.n_done:seq.n_done + n]
        self.positions[at:at + n] = self._counting[seq.n_done:seq.n_done + n]
        self.sequences[at:at + n] = seq.slot

    def _images(self, work: Work, n_tokens: int) -> dict[str, np.ndarray]:
        """What a step needs besides where one of its sequences has images."""
        rows, n_rows, program = [], 0, self._program
        input_rows = np.full(n_tokens, -1, np.int32)
        axes = np.repeat(self.positions[:n_tokens, None], program.n_axes, 1)
        spans = np.repeat(self.positions[:n_tokens, None, None], max(program.n_spans, 1), 1)
        spans = spans.repeat(2, 2)
        end = 0
        for seq, n in work:
            at, end = end - seq.n_done, end + n                # of its position 0; of its tokens
            if program.n_axes:
                axes[end - n:end] = seq.turns(seq.n_done, n, program.n_axes)
            for image in seq.images:
                first = max(image.first, seq.n_done)
                last = min(image.end, seq.n_done + n)
                if first >= last:
                    continue
                part = image.rows[first - image.first:last - image.first]
                input_rows[at + first:at + last] = np.arange(n_rows, n_rows + len(part))
                rows.append(part)
                n_rows += len(part)
                if image.both_ways:
                    spans[at + first:at + last] = first, last - 1
        inputs = np.concatenate(rows) if rows else np.zeros((0, program.input_width), np.float32)
        return {"inputs": inputs, "input_rows": input_rows,
                "axes": axes if program.n_axes else None,
                "spans": spans if program.n_spans else None}
