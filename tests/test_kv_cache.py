import numpy as np
import pytest
from helpers_engine import check_pages, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.engine.kv_cache import KVCache, Lease, n_pages_for
from tinychat.engine.snapshots import Snapshots
from tinychat.engine.window_pages import WindowPages, n_window_pages_for
from tinychat.ops.program import PAGE_TOKENS as P


def ids(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int32)


def new_lease(slot=-1, **fields):
    return Lease(np.full(64, -1, np.int32), np.full(64, -1, np.int32), slot, **fields)


def opened(cache, prompt, n_positions=None, **fields):
    lease = new_lease()
    n_done = cache.open(lease, prompt, n_positions or len(prompt), **fields)
    assert n_done is not None
    return lease, n_done


def run(cache, prompt, **fields) -> int:
    """Open, compute the whole prompt, close; returns how many tokens were there."""
    lease, n_done = opened(cache, prompt, **fields)
    cache.grow(lease, len(prompt))
    cache.close(lease, prompt, len(prompt))
    return n_done


def test_pages_are_taken_as_needed_and_all_return():
    cache = KVCache(8)
    lease, n_done = opened(cache, ids(40), 100)
    assert (n_done, lease.n_pages, lease.n_reserved, cache.free_pages) == (0, 0, 4, 8)
    cache.grow(lease, 40)
    assert (lease.n_pages, lease.n_reserved, cache.free_pages) == (2, 2, 6)
    cache.close(lease, ids(40), 40)
    assert cache.free_pages == 8
    check_pages(cache, [])


def test_what_is_promised_is_not_promised_twice():
    cache = KVCache(4)
    lease, _ = opened(cache, ids(10), 3 * P)
    assert cache.open(new_lease(), ids(10, 500), 2 * P) is None
    cache.close(lease, ids(10), 0)
    opened(cache, ids(10, 500), 4 * P)


def test_idle_pages_are_given_away_before_anything_waits():
    cache = KVCache(4)
    run(cache, ids(4 * P))
    assert cache.free_pages == 4 and len(list(tree(cache._root))) == 4
    lease, _ = opened(cache, ids(4 * P, 1000))
    cache.grow(lease, 4 * P)
    assert list(tree(cache._root)) == []


@pytest.mark.parametrize("n, reused", [
    (1, 0), (P, P - 1), (P + 1, P), (2 * P, 2 * P - 1), (3 * P + 5, 3 * P)])
def test_a_longer_prompt_finds_the_pages_of_a_shorter(n, reused):
    """What was computed is found to its last token, tail included, but for the prompt's last."""
    cache = KVCache(16)
    run(cache, ids(n))
    assert run(cache, ids(n)) <= n - 1
    run(cache, ids(n))
    assert run(cache, ids(n + 40)) == n
    assert run(cache, ids(n)) <= reused


def test_hits_are_by_all_tokens_before_not_by_the_page_alone():
    cache = KVCache(16)
    run(cache, np.concatenate([ids(P), ids(P, 100)]))
    assert run(cache, np.concatenate([ids(P, 50), ids(P, 100), ids(1)])) == 0


def test_equal_hashes_are_not_equal_tokens():
    """Keys are bytes in a dict, which compares them; -1 and -2 have equal hashes as ints."""
    cache = KVCache(16)
    run(cache, np.full(P, -1, np.int32))
    assert run(cache, np.full(P + 1, -2, np.int32)) == 0


def test_a_tail_belongs_to_the_first_who_continues_it():
    cache = KVCache(16)
    run(cache, ids(P + 10))
    first, n_first = opened(cache, ids(P + 20))
    second, n_second = opened(cache, ids(P + 20))
    assert (n_first, n_second) == (P + 10, P)
    check_pages(cache, [first, second])


def test_a_tail_that_is_not_a_prefix_stays():
    cache = KVCache(16)
    run(cache, ids(P + 10))
    assert run(cache, np.concatenate([ids(P + 9), ids(10, 900)])) == P
    assert run(cache, ids(P + 11)) == P + 10


def test_a_page_computed_twice_is_kept_once():
    cache = KVCache(16)
    leases = [opened(cache, ids(2 * P))[0] for _ in range(2)]
    for lease in leases:
        cache.grow(lease, 2 * P)
    for lease in leases:
        cache.file(lease, ids(2 * P), 2 * P)
    assert leases[0].row[:2].tolist() == leases[1].row[:2].tolist()
    assert cache.free_pages == 14
    check_pages(cache, leases)


def test_a_page_that_is_idle_in_the_tree_is_held_when_another_computes_it():
    cache = KVCache(4)
    leases = [opened(cache, ids(P))[0] for _ in range(2)]
    for lease in leases:
        cache.grow(lease, P)
    cache.close(leases[0], ids(P), P)
    cache.file(leases[1], ids(P), P)
    check_pages(cache, leases[1:])
    assert cache.free_pages == 3


def test_pages_promised_to_one_are_not_given_to_another_that_outgrows_its_own():
    cache = KVCache(4)
    promised, _ = opened(cache, ids(10, 500), 2 * P)
    greedy, _ = opened(cache, ids(10), P)
    assert cache.grow(greedy, 2 * P) and not cache.grow(greedy, 2 * P + 1)
    assert cache.grow(promised, 2 * P)
    check_pages(cache, [promised, greedy])
    cache.close(promised, ids(10, 500), 10)
    assert cache.grow(greedy, 4 * P)


def test_a_tail_used_again_is_forgotten_after_older_ones():
    cache = KVCache(3)
    for first in (0, 100, 0):
        lease, _ = opened(cache, ids(10, first), reuse=False)
        cache.grow(lease, 10)
        cache.close(lease, ids(10, first), 10)
    lease, _ = opened(cache, ids(1, 900), 2 * P)
    cache.grow(lease, 2 * P)
    assert cache.open(new_lease(), ids(11), 11) == 10


def test_extend_finds_what_others_filed_since():
    cache = KVCache(16)
    first, _ = opened(cache, ids(3 * P))
    second, n_done = opened(cache, ids(3 * P))
    cache.grow(first, 3 * P)
    cache.file(first, ids(3 * P), 3 * P)
    assert (n_done, cache.extend(second, ids(3 * P), 0)) == (0, 2 * P)
    cache.grow(second, 2 * P + 1)
    assert cache.extend(second, ids(3 * P), 2 * P + 1) == 2 * P + 1
    check_pages(cache, [first, second])


def test_without_reuse_nothing_is_found():
    cache = KVCache(16)
    run(cache, ids(100))
    assert opened(cache, ids(101), reuse=False)[1] == 0


def test_closing_without_keeping_files_nothing():
    cache = KVCache(16)
    lease, _ = opened(cache, ids(100))
    cache.grow(lease, 100)
    cache.close(lease, ids(100), 100, keep=False)
    assert list(tree(cache._root)) == [] and cache.free_pages == 16


def test_clear_forgets_idle_pages_only():
    cache = KVCache(16)
    run(cache, ids(100))
    run(cache, ids(100, 500))
    lease, _ = opened(cache, ids(100))
    cache.clear()
    assert len(list(tree(cache._root))) == 3
    check_pages(cache, [lease])


def test_end_of_an_old_chat_is_evicted_before_its_beginning():
    cache = KVCache(5)
    run(cache, ids(4 * P))
    run(cache, ids(2 * P, 1000))  # takes the one empty page and the deepest of the four
    assert run(cache, ids(4 * P)) == 3 * P


@pytest.mark.parametrize("n, pages", [(0, 0), (1, 1), (P, 1), (P + 1, 2)])
def test_pages_for_positions(n, pages):
    assert n_pages_for(n) == pages


# A model of the cache: what each page holds, by lease and by tree, at any time

STEP = st.tuples(st.sampled_from(["open", "compute", "compute", "close", "drop", "clear"]),
                 st.integers(0, 3), st.integers(1, 4 * P), st.integers(0, 9))


class Model:
    """What the pages and states of a cache hold, and who runs."""

    def __init__(self, n_pages: int, window: int, n_snapshots: int):
        self.window, self.has_states = window, n_snapshots > 0
        self.contents = np.full((n_pages, P), -1, np.int64)
        self.seen = np.full((n_window_pages_for(window or 1, n_sequences=4, max_tokens=4 * P), P),
                            -1, np.int64)
        self.states = [() for _ in range(4 + n_snapshots)]
        self.live: list[dict] = []
        pages = WindowPages(len(self.seen), window) if window else None
        snapshots = Snapshots(range(4, 4 + n_snapshots), self.copy) if n_snapshots else None
        self.cache = KVCache(n_pages, pages, snapshots)

    def copy(self, source, target):
        self.states[target] = self.states[source]

    def open(self, chat, n):
        slots = set(range(4)) - {one["lease"].slot for one in self.live}
        if not slots:
            return
        prompt = np.concatenate([ids(n // 2, 10), ids(n - n // 2, 1000 * chat)])
        lease = new_lease(min(slots))
        n_done = self.cache.open(lease, prompt, n)
        if n_done is not None:
            self.live.append(dict(lease=lease, ids=prompt, done=n_done))
            self.check_state(self.live[-1])

    def compute(self, one, n):
        lease, ids_ = one["lease"], one["ids"]
        done = self.cache.extend(lease, ids_, one["done"])
        if done > one["done"]:
            one["done"] = done
            self.check_state(one)
        end = min(done + n, len(ids_))
        self.cache.grow(lease, end)
        for p in range(done, end):
            self.contents[lease.row[p // P], p % P] = ids_[p]
            if self.window:
                self.seen[lease.window_row[p // P], p % P] = ids_[p]
        self.states[lease.slot] = tuple(ids_[:end])
        one["done"] = end
        self.cache.file(lease, ids_, end)
        if end % P == 0:
            self.cache.snapshot(lease)

    def close(self, one, keep):
        self.cache.close(one["lease"], one["ids"], one["done"], keep=keep)
        self.live.remove(one)

    def check_state(self, one):
        if self.has_states and one["done"]:
            assert self.states[one["lease"].slot] == tuple(one["ids"][:one["done"]])

    def check(self):
        check_pages(self.cache, [one["lease"] for one in self.live])
        for one in self.live:
            p, lease = np.arange(one["done"]), one["lease"]
            assert (self.contents[lease.row[p // P], p % P] == one["ids"][p]).all()
            if self.window:
                p = p[max(0, one["done"] - self.window + 1):]
                assert (self.seen[lease.window_row[p // P], p % P] == one["ids"][p]).all()


@pytest.mark.parametrize("window, n_snapshots", [(0, 0), (1, 0), (20, 0), (2 * P + 3, 0), (0, 2),
                                                 (P, 1), (2 * P, 0)])
@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEP, max_size=40), n_pages=st.integers(4, 12))
def test_any_order_of_calls_keeps_contents_and_counts_right(steps, n_pages, window, n_snapshots):
    model = Model(n_pages, window, n_snapshots)
    for kind, chat, n, pick in steps:
        if kind == "open":
            model.open(chat, n)
        elif kind == "clear":
            model.cache.clear()
        elif model.live:
            one = model.live[pick % len(model.live)]
            model.compute(one, n) if kind == "compute" else model.close(one, kind == "close")
        model.check()
    for one in list(model.live):
        model.close(one, keep=True)
    assert model.cache.free_pages == n_pages
    model.check()


# Layers with a reach, and recurrent states

def test_a_long_sequence_holds_its_window_only():
    pool = WindowPages(6, window=2 * P)
    cache = KVCache(64, pool)
    lease, _ = opened(cache, ids(60 * P))
    for end in range(P, 60 * P, P):
        cache.grow(lease, end)
        cache.file(lease, ids(60 * P), end)
    assert lease.n_pages == 59 and len(lease.nodes) - lease.first_window <= 3


def test_a_chat_goes_on_from_where_its_window_is_still_there():
    cache = KVCache(64, WindowPages(4, window=P))
    assert run_in_pages(cache, ids(6 * P)) == 0
    assert run_in_pages(cache, ids(6 * P + 10)) == 6 * P
    run_in_pages(cache, ids(6 * P, 5000))  # takes the window pages of the first
    assert run_in_pages(cache, ids(6 * P + 20)) == 0


def test_a_tail_goes_on_though_a_page_is_gone_that_only_its_first_token_looked_at():
    cache = KVCache(64, WindowPages(8, window=2 * P))
    prompt = ids(6 * P - 1)
    run_in_pages(cache, prompt)
    third = next(node for node in tree(cache._root)
                 if node.key == prompt[3 * P:4 * P].tobytes())
    for first in range(1000, 9000, 100):
        if third.window_page < 0:
            break
        run_in_pages(cache, ids(5, first))
    lease, n_done = opened(cache, ids(6 * P + 20))
    assert n_done == 6 * P - 1 and third.window_page < 0 and third.window_refs == 0
    cache.close(lease, ids(6 * P + 20), n_done)
    check_pages(cache, [])


def run_in_pages(cache, prompt) -> int:
    lease, n_done = opened(cache, prompt)
    for end in [*range(n_done // P * P + P, len(prompt), P), len(prompt)]:
        cache.grow(lease, end)
        cache.file(lease, prompt, end)
    cache.close(lease, prompt, len(prompt))
    return n_done


def test_a_recurrent_chat_goes_on_exactly_where_a_snapshot_was_taken():
    states = ["of the first chat", "", ""]
    cache = KVCache(64, snapshots=Snapshots([2], lambda a, b: states.__setitem__(b, states[a])))
    first = new_lease(slot=0)
    cache.open(first, ids(2 * P + 5), 2 * P + 5)
    cache.grow(first, 2 * P + 5)
    cache.close(first, ids(2 * P + 5), 2 * P + 5)
    second = new_lease(slot=1)
    assert cache.open(second, ids(2 * P + 4), 2 * P + 4) == 0     # it ends before the snapshot
    cache.close(second, ids(2 * P + 4), 0)
    assert cache.open(second, ids(2 * P + 6), 2 * P + 6) == 2 * P + 5
    assert states[1] == "of the first chat"


def test_runs_that_must_stay_whole_are_not_reused_in_part():
    cache = KVCache(64)
    run(cache, ids(3 * P))
    lease = new_lease(whole=((P - 5, 2 * P + 5),))
    assert cache.open(lease, ids(2 * P + 20), 2 * P + 20) == 0
    cache.close(lease, ids(2 * P + 20), 0)
    lease = new_lease(whole=((P, 2 * P),))
    assert cache.open(lease, ids(2 * P + 20), 2 * P + 20) == 2 * P
