"""The batch descriptor: one step's tokens, and where what belongs to their sequences lives."""
from dataclasses import dataclass

import numpy as np

from tinychat.errors import KernelError
from tinychat.ops.program import PAGE_TOKENS, Program


@dataclass(frozen=True)
class Limits:
    """What an executor has room for, taken once.

    n_pages: KV pages of layers that see all positions; n_window_pages: of those with a reach;
    n_states: places for the recurrent states of one sequence each.
    """

    n_pages: int
    max_tokens: int = 512
    max_outputs: int = 64
    max_sequences: int = 64
    n_window_pages: int | None = None  # None: n_pages
    n_states: int | None = None        # None: max_sequences

    def of(self, program: Program) -> "Limits":
        """With the defaults filled in, and 0 for what this program does not have."""
        window = self.n_pages if self.n_window_pages is None else self.n_window_pages
        states = self.max_sequences if self.n_states is None else self.n_states
        limits = Limits(self.n_pages, self.max_tokens, self.max_outputs, self.max_sequences,
                        window if program.window else 0, states if program.states else 0)
        least = [limits.n_pages, limits.max_tokens, limits.max_outputs, limits.max_sequences]
        least += [limits.n_window_pages] * bool(program.window)
        least += [limits.n_states] * bool(program.states)
        if min(least) < 1:
            raise KernelError(f"expected room for at least one of each, got {limits}")
        return limits


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's tokens, of any mix of sequences; each one's tokens stand in order of position.

    tokens, positions, sequences: int32 (T,); sequences[t] is token t's row of `pages`.
    pages: int32 (n_sequences, max_pages); position p of sequence s lives in slot p % PAGE_TOKENS
    of page pages[s, p // PAGE_TOKENS]. Every position below a token's own must have been stored
    by this or an earlier step. Entries behind a sequence's last position are not looked at.
    outputs: int32 (n_outputs,), indices of the tokens whose results are wanted; may be empty.

    The rest is for programs that ask for it:
    window_pages: like `pages`, for the layers with a reach; only the entries are looked at that
    positions within `program.window` of this step's tokens need. None: as `pages`.
    states: int32 (n_sequences,), where each sequence's recurrent state is kept. It begins as
    zeros with the token at position 0; else it must stand after the position before the sequence's
    first token here, and afterwards it stands after its last. None: sequence s has state s.
    inputs: float32 (n, program.input_width), input_rows: int32 (T,), the row of each token, -1 for
    none. None: no token has one.
    axes: int32 (T, program.n_axes), what ropes with axes turn by. None: the positions.
    spans: int32 (T, n_spans, 2), first and last position; over tokens of the same step and sequence
    only. None: each token's own position.
    """

    tokens: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    pages: np.ndarray
    outputs: np.ndarray
    window_pages: np.ndarray | None = None
    states: np.ndarray | None = None
    inputs: np.ndarray | None = None
    input_rows: np.ndarray | None = None
    axes: np.ndarray | None = None
    spans: np.ndarray | None = None

    def whole(self, program: Program) -> "Batch":
        """With the arrays that this program reads filled in, and None for the others."""
        n = len(self.tokens)
        own = np.asarray(self.positions, np.int32).reshape(-1, 1)
        window = states = inputs = rows = axes = spans = None
        if program.window:
            window = self.pages if self.window_pages is None else self.window_pages
        if program.states:
            states = np.arange(len(self.pages), dtype=np.int32) if self.states is None \
                else self.states
        if program.input_width:
            inputs = np.zeros((0, program.input_width), np.float32) if self.inputs is None \
                else self.inputs
            rows = np.full(n, -1, np.int32) if self.input_rows is None else self.input_rows
        if program.n_axes:
            axes = np.repeat(own, program.n_axes, 1) if self.axes is None else self.axes
        if program.n_spans:
            spans = np.repeat(own[:, :, None], program.n_spans, 1).repeat(2, 2) \
                if self.spans is None else self.spans
        return Batch(self.tokens, self.positions, self.sequences, self.pages, self.outputs,
                     window, states, inputs, rows, axes, spans)

    def check(self, program: Program, limits: Limits) -> None:
        """For a whole batch. Raises: KernelError naming the first thing that cannot be run."""
        self._check_shapes(program)
        n_tokens, n_sequences = len(self.tokens), len(self.pages)
        _check_between("the number of tokens", n_tokens, 1, limits.max_tokens)
        _check_between("the number of sequences", n_sequences, 1, limits.max_sequences)
        _check_between("the number of outputs", len(self.outputs), 0, limits.max_outputs)
        _check_range("tokens", self.tokens, program.n_ids)
        _check_range("sequences", self.sequences, n_sequences)
        _check_range("outputs", self.outputs, n_tokens)
        _check_range("positions", self.positions, self.pages.shape[1] * PAGE_TOKENS)
        self._check_order()
        first, last = self._ends()
        self._check_pages("pages", self.pages, first * 0, last, limits.n_pages)
        if self.window_pages is not None:
            self._check_pages("window_pages", self.window_pages,
                              np.maximum(first - program.window + 1, 0), last,
                              limits.n_window_pages)
        if self.states is not None:
            self._check_states(limits.n_states)
        if self.input_rows is not None:
            _check_range("input_rows", self.input_rows, len(self.inputs), low=-1)
        if self.spans is not None:
            self._check_spans(first, last)

    def _check_shapes(self, program: Program) -> None:
        n, n_sequences = len(self.tokens), len(self.pages)
        shapes = {"tokens": (n,), "positions": (n,), "sequences": (n,), "outputs": (None,),
                  "pages": (n_sequences, None), "window_pages": (n_sequences, None),
                  "states": (n_sequences,), "input_rows": (n,), "axes": (n, program.n_axes),
                  "spans": (n, program.n_spans, 2), "inputs": (None, program.input_width)}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is None:
                continue
            dtype = np.float32 if name == "inputs" else np.int32
            fits = array.dtype == dtype and array.ndim == len(shape) and all(
                size in (None, found) for size, found in zip(shape, array.shape))
            if not fits:
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                raise KernelError(f"batch: expected {name} as {np.dtype(dtype)} ({wanted}), "
                                  f"got {array.dtype} {array.shape}")
        if self.window_pages is not None and self.window_pages.shape != self.pages.shape:
            raise KernelError(f"batch: expected window_pages of shape {self.pages.shape}, "
                              f"got {self.window_pages.shape}")

    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last position of each sequence here, int32 (n_sequences,); last -1: none."""
        first = np.full(len(self.pages), np.iinfo(np.int32).max, np.int32)
        last = np.full(len(self.pages), -1, np.int32)
        np.minimum.at(first, self.sequences, self.positions)
        np.maximum.at(last, self.sequences, self.positions)
        return first, last

    def _check_pages(self, name, pages, first, last, n_pages: int) -> None:
        """Only the pages of these positions are read."""
        at = np.arange(pages.shape[1], dtype=np.int32)
        used = (at >= first[:, None] // PAGE_TOKENS) & (at <= last[:, None] // PAGE_TOKENS)
        _check_range(name, pages[used & (last >= 0)[:, None]], n_pages)

    def _check_order(self) -> None:
        order = np.argsort(self.sequences, kind="stable")
        same = np.diff(self.sequences[order]) == 0
        wrong = np.flatnonzero(same & (np.diff(self.positions[order]) <= 0))
        if len(wrong):
            before, at = order[wrong[0]], order[wrong[0] + 1]
            raise KernelError(f"batch: positions[{at}] is {self.positions[at]}, expected above "
                              f"{self.positions[before]}, which comes before it in its sequence")

    def _check_states(self, n_states: int) -> None:
        """Two sequences of a step may not share one, and each goes on without a gap."""
        present = np.unique(self.sequences)
        _check_range("states", self.states[present], n_states)
        if len(np.unique(self.states[present])) < len(present):
            raise KernelError("batch: two sequences share a recurrent state")
        order = np.argsort(self.sequences, kind="stable")
        gap = (np.diff(self.sequences[order]) == 0) & (np.diff(self.positions[order]) != 1)
        if gap.any():
            raise KernelError("batch: positions with a gap, which a recurrent state cannot pass")

    def _check_spans(self, first, last) -> None:
        begin, end = self.spans[..., 0], self.spans[..., 1]
        s = self.sequences[:, None]
        wrong = np.argwhere((begin < first[s]) | (begin > end) | (end > last[s]))
        if len(wrong):
            t, i = wrong[0]
            raise KernelError(f"batch: spans[{t}, {i}] is {begin[t, i]} to {end[t, i]}, expected "
                              f"to lie within {first[s[t, 0]]} to {last[s[t, 0]]}")


def _check_between(what: str, n: int, low: int, high: int) -> None:
    if not low <= n <= high:
        raise KernelError(f"batch: {what} is {n}, expected {low} to {high}")


def _check_range(name: str, values: np.ndarray, end: int, low: int = 0) -> None:
    wrong = np.flatnonzero((values < low) | (values >= end))
    if len(wrong):
        at = wrong[0]
        raise KernelError(f"batch: {name}[{at}] is {values[at]}, expected {low} to {end - 1}")
