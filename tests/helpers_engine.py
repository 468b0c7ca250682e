"""A scripted model for the engine's tests: its keys and values are the tokens themselves.

The next token depends on every token before it, read back through the page table, so a wrong page,
a lost token or another sequence's page gives another answer.
"""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from tinychat.engine import (
    Finished, PromptDone, PromptProgress, PromptStarted, SamplingParams, Token)
from tinychat.engine.kv_cache import KVCache, Lease, Node
from tinychat.ops import sampling
from tinychat.ops.batch import Batch, Limits
from tinychat.ops.program import PAGE_TOKENS

GREEDY = SamplingParams(temperature=0)
N_VOCAB = 97
WAIT_S = 20.0  # bound of every wait; nothing takes that long


class FakeExecutor:
    """`before_step(batch)`, when set, runs on the engine's thread and may raise. after: the logits
    float32 (N_VOCAB,) after a list of ids; None: logits_after."""

    name = "fake"

    def __init__(self, *, n_pages=64, window=0, states=(), input_width=0, n_axes=0, n_spans=0,
                 after=None, **limits):
        self.after = after or logits_after
        self.program = SimpleNamespace(n_vocab=N_VOCAB, n_ids=N_VOCAB, window=window, states=states,
                                       input_width=input_width, n_axes=n_axes, n_spans=n_spans)
        self.limits = Limits(n_pages, **limits).of(self.program)
        self.seen = np.full((self.limits.n_window_pages, PAGE_TOKENS), -1, np.int64)
        self.states = [(0, 0)] * self.limits.n_states  # (tokens taken in, their digest)
        self.batches: list[Batch] = []                 # with images
        self.tokens = np.full((n_pages, PAGE_TOKENS), -1, np.int64)
        self.positions = np.full((n_pages, PAGE_TOKENS), -1, np.int64)
        self.steps: list[list[tuple[int, int]]] = []  # per step: (slot, its tokens), by slot
        self.before_step = None

    def step(self, batch: Batch) -> np.ndarray:
        batch = batch.whole(self.program)
        batch.check(self.program, self.limits)
        if batch.inputs is not None and len(batch.inputs):
            self.batches.append(replace(batch, positions=batch.positions.copy()))
        slots, counts = np.unique(batch.sequences, return_counts=True)
        self.steps.append(list(zip(slots.tolist(), counts.tolist())))
        if self.before_step:
            self.before_step(batch)
        pages = batch.pages[batch.sequences, batch.positions // PAGE_TOKENS]
        self.tokens[pages, batch.positions % PAGE_TOKENS] = batch.tokens
        self.positions[pages, batch.positions % PAGE_TOKENS] = batch.positions
        if self.program.window:
            pages = batch.window_pages[batch.sequences, batch.positions // PAGE_TOKENS]
            self.seen[pages, batch.positions % PAGE_TOKENS] = batch.tokens
        if self.program.states:
            self._take_in(batch)
        return np.array([self._row(batch, i) for i in batch.outputs], np.float32)

    def _row(self, batch: Batch, i: int) -> np.ndarray:
        position = np.arange(batch.positions[i] + 1)
        pages = batch.pages[batch.sequences[i], position // PAGE_TOKENS]
        stored = self.positions[pages, position % PAGE_TOKENS]
        assert (stored == position).all(), f"pages {pages[stored != position]} hold other positions"
        ids = self.tokens[pages, position % PAGE_TOKENS].tolist()
        if self.program.window:
            position = position[-self.program.window:]
            pages = batch.window_pages[batch.sequences[i], position // PAGE_TOKENS]
            seen = self.seen[pages, position % PAGE_TOKENS].tolist()
            assert seen == ids[-self.program.window:], "the window holds other tokens"
        return self.after(ids)

    def _take_in(self, batch: Batch) -> None:
        for s, position, token in zip(batch.sequences, batch.positions, batch.tokens):
            place = batch.states[s]
            n, known = (0, 7) if position == 0 else self.states[place]
            assert n == position, f"the state stands after {n} tokens, not before token {position}"
            self.states[place] = n + 1, (known * 31 + int(token) + 1) % 1_000_003
        for s in np.unique(batch.sequences):
            position = np.arange(batch.positions[batch.sequences == s].max() + 1)
            pages = batch.pages[s, position // PAGE_TOKENS]
            ids = self.tokens[pages, position % PAGE_TOKENS].tolist()
            assert self.states[batch.states[s]][1] == digest(ids), "the state of another text"

    def copy_state(self, source: int, target: int) -> None:
        self.states[target] = self.states[source]

    def sample(self, logits, params, recent_ids, coin):
        return sampling.sample(logits, params, recent_ids, coin)


def digest(ids) -> int:
    h = 7
    for id in ids:
        h = (h * 31 + id + 1) % 1_000_003
    return h


def logits_after(ids) -> np.ndarray:
    """float32 (N_VOCAB,): highest at a token that all of `ids` decide, falling from there on."""
    return -((np.arange(N_VOCAB) - digest(ids)) % N_VOCAB).astype(np.float32) / 4


def answer_after(ids, n: int) -> list[int]:
    """The n greedy tokens after `ids`."""
    out = list(ids)
    for _ in range(n):
        out.append(digest(out) % N_VOCAB)
    return out[len(ids):]


def read(seq) -> SimpleNamespace:
    """All updates of one sequence: ids, progress, reason, error; their order is checked."""
    updates = list(seq.updates(WAIT_S))
    kinds = [type(u) for u in updates]
    assert kinds[-1] is Finished and kinds.count(Finished) == 1
    order = (PromptStarted, PromptProgress, PromptDone, Token)
    assert kinds[:-1] == [kind for kind in order for _ in range(kinds.count(kind))]
    assert kinds.count(PromptStarted) <= 1 and kinds.count(PromptDone) <= 1
    return SimpleNamespace(
        ids=[u.id for u in updates if type(u) is Token],
        progress=[(u.done, u.total) for u in updates if type(u) is PromptProgress],
        reason=updates[-1].reason, error=updates[-1].error, updates=updates)


def check_pages(cache: KVCache, leases: list[Lease]) -> None:
    """Every page is empty, in the tree, or private to one lease; and the counts say so."""
    nodes = list(tree(cache._root))
    private = [int(p) for lease in leases for p in lease.row[len(lease.nodes):lease.n_pages]]
    assert sorted([*cache._empty, *(n.page for n in nodes), *private]) == list(range(cache.n_pages))
    if cache.window:
        check_window_pages(cache, leases, nodes)
    held = [id(node) for lease in leases for node in lease.nodes]
    for node in nodes:
        assert node.refs == held.count(id(node))
        assert (node.refs == 0) == (node in cache._idle)
        assert node.refs <= node.parent.refs or node.parent is cache._root
    for lease in leases:
        assert [n.page for n in lease.nodes] == lease.row[:len(lease.nodes)].tolist()
    assert cache._n_reserved == sum(lease.n_reserved for lease in leases) <= cache.free_pages


def check_window_pages(cache: KVCache, leases: list[Lease], nodes: list[Node]) -> None:
    """Every window page is empty, a node's, or private to one lease; what a lease still looks at
    is held by it and in its row."""
    private = [int(p) for lease in leases
               for p in lease.window_row[len(lease.nodes):lease.n_pages]]
    of_nodes = [n.window_page for n in nodes if n.window_page >= 0]
    pool = cache.window
    assert sorted([*pool._empty, *of_nodes, *private]) == list(range(pool.n_pages))
    held = [node for lease in leases for node in lease.nodes[lease.first_window:]]
    for node in nodes:
        assert node.window_refs == held.count(node)
        assert (node in pool._idle) == (node.window_refs == 0 and node.window_page >= 0)
    for lease in leases:
        span = slice(lease.first_window, len(lease.nodes))
        assert [n.window_page for n in lease.nodes[span]] == lease.window_row[span].tolist()


def tree(node: Node):
    for child in node.children.values():
        assert child.parent is node
        yield child
        yield from tree(child)
