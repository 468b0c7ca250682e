"""Who takes part in the next step, and with how many tokens; and the step's arrays.

Every sequence that generates takes part in every step with one token. What room is left goes to
prompts, in order of arrival and in chunks, so a long prompt delays the others by one chunk at most.
"""
import numpy as np

from tinychat.engine.kv_cache import n_pages_for
from tinychat.engine.sequence import Sequence
from tinychat.ops.batch import Batch

Work = list[tuple[Sequence, int]]  # sequences and how many of their next tokens to compute


def plan_step(running: list[Sequence], *, max_tokens: int, chunk: int) -> Work:
    """The work of one step, generating sequences first.

    running: in order of arrival; max_tokens: the step's limit; chunk: that of its prompt tokens.
    """
    work = [(seq, 1) for seq in running if seq.generating]
    room = min(max_tokens - len(work), chunk)
    for seq in running:
        if room <= 0:
            break
        if not seq.generating:
            n = min(room, seq.n_pending)
            work.append((seq, n))
            room -= n
    return work


class StepArrays:
    """The batch descriptor's memory, filled anew for each step, and the page table.

    pages: int32 (n_slots, max_pages), a row per running sequence, which its lease keeps up to date.
    """

    def __init__(self, *, max_tokens: int, n_slots: int, n_ctx: int):
        self.tokens = np.zeros(max_tokens, np.int32)
        self.positions = np.zeros(max_tokens, np.int32)
        self.sequences = np.zeros(max_tokens, np.int32)
        self.outputs = np.zeros(max_tokens, np.int32)
        self.pages = np.zeros((n_slots, n_pages_for(n_ctx)), np.int32)
        self._counting = np.arange(n_ctx, dtype=np.int32)

    def fill(self, work: Work, *, all_rows: bool = False) -> Batch:
        """Logits are wanted where nothing remains pending; with `all_rows`, everywhere."""
        end = n_outputs = 0
        for seq, n in work:
            begin, end = end, end + n
            self._put(seq, n, begin)
            wanted = n if all_rows else int(n == seq.n_pending)
            for i in range(end - wanted, end):
                self.outputs[n_outputs] = i
                n_outputs += 1
        return Batch(self.tokens[:end], self.positions[:end], self.sequences[:end], self.pages,
                     self.outputs[:n_outputs])

    def _put(self, seq: Sequence, n: int, at: int) -> None:
        if n == 1:  # scalars: a third of the time of slices, on the path of every generated token
            self.tokens[at] = seq.ids[seq.n_done]
            self.positions[at] = seq.n_done
            self.sequences[at] = seq.slot
            return
        self.tokens[at:at + n] = seq.ids[seq.n_done:seq.n_done + n]
        self.positions[at:at + n] = self._counting[seq.n_done:seq.n_done + n]
        self.sequences[at:at + n] = seq.slot
