"""Texts to vectors: whole texts in one step, the last hidden state of their tokens pooled."""
import threading

import numpy as np

from tinychat.engine.engine import Stats
from tinychat.errors import ContextOverflow, InvalidRequest, TinychatError
from tinychat.ops.batch import Batch
from tinychat.ops.program import PAGE_TOKENS, Program

POOLINGS = ("none", "mean", "cls", "last", "rank")  # by their number in a file
USABLE = ("mean", "cls", "last")
STEP_TOKENS = 512  # of texts that share a step: more is no faster, and takes more memory


class Embedder:
    """Runs one step at a time, for any thread.

    executor: of a program whose result is the hidden state; its max_tokens is the most that one
    text may have. pooling: one of USABLE.
    """

    def __init__(self, executor, pooling: str):
        assert pooling in USABLE, pooling
        self._executor, self._pooling = executor, pooling
        self._busy = threading.Lock()
        self._error: TinychatError | None = None
        self._n_tokens = self._n_steps = 0

    def embed(self, texts: list[list[int]]) -> np.ndarray:
        """float32 (len(texts), width) of token ids; a text's vector is the same
        beside any others, where the executor's results are.

        Raises: InvalidRequest for a text without tokens, ContextOverflow for one that is too long.
        """
        limits = self._executor.limits
        for ids in texts:
            if not ids:
                raise InvalidRequest("expected a text of at least one token", param="input")
            if len(ids) > limits.max_tokens:
                raise ContextOverflow(f"the text has {len(ids)} tokens, more than the context "
                                      f"length of {limits.max_tokens} has room for", param="input")
        out = np.empty((len(texts), self._executor.program.n_vocab), np.float32)
        begin = 0
        while begin < len(texts):
            end = self._end(texts, begin)
            out[begin:end] = self._step(texts[begin:end])
            begin = end
        return out

    def _end(self, texts: list[list[int]], begin: int) -> int:
        """The texts from `begin` on that share one step; a long one has it for itself."""
        end = begin + 1
        room = min(STEP_TOKENS, self._executor.limits.max_tokens) - len(texts[begin])
        last = min(len(texts), begin + self._executor.limits.max_sequences)
        while end < last and len(texts[end]) <= room:
            room -= len(texts[end])
            end += 1
        return end

    def _step(self, texts: list[list[int]]) -> np.ndarray:
        with self._busy:
            if self._error:
                raise self._error
            lengths = np.array([len(ids) for ids in texts])
            rows = self._executor.step(_batch(texts, lengths, self._executor.program))
            self._n_tokens += int(lengths.sum())
            self._n_steps += 1
            ends = lengths.cumsum()
            if self._pooling == "mean":
                # one text after the other: its sum does not depend on its neighbours
                return np.stack([rows[end - n:end].mean(axis=0) for n, end in zip(lengths, ends)])
            return rows[ends - 1 if self._pooling == "last" else ends - lengths].copy()

    @property
    def stats(self) -> Stats:
        pages = self._executor.limits.n_pages
        return Stats(self._n_tokens, 0, 0, self._n_steps, 0, 0, 0, 0, 0, pages, pages)

    def close(self, error: TinychatError | None = None) -> bool:
        """After the step that runs; later calls raise `error`. True: the executor may be closed."""
        self._error = self._error or error or TinychatError("the model is closed")
        with self._busy:  # told before: a thread with many steps could take each turn first
            return True


def _batch(texts: list[list[int]], lengths: np.ndarray, program: Program) -> Batch:
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in texts])
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    sequences = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
    pages, next_page = np.zeros((len(texts), -(-lengths.max() // PAGE_TOKENS)), np.int32), 0
    for row, n in zip(pages, -(-lengths // PAGE_TOKENS)):
        row[:n] = np.arange(next_page, next_page + n)
        next_page += n
    spans = None
    if program.n_spans:  # each token sees its whole text
        whole = np.stack([np.zeros_like(positions), np.repeat(lengths - 1, lengths)], 1)
        spans = np.repeat(whole[:, None].astype(np.int32), program.n_spans, 1)
    return Batch(tokens, positions, sequences, pages, np.arange(len(tokens), dtype=np.int32),
                 spans=spans)
