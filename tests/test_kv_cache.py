import numpy as np
import pytest
from helpers_engine import check_pages, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.engine.kv_cache import KVCache, n_pages_for
from tinychat.ops.program import PAGE_TOKENS as P


def ids(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int32)


def opened(cache, prompt, n_positions=None, **fields):
    result = cache.open(np.full(64, -1, np.int32), prompt, n_positions or len(prompt), **fields)
    assert result is not None
    return result


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
    assert cache.open(np.zeros(8, np.int32), ids(10, 500), 2 * P) is None
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
    assert cache.open(np.zeros(8, np.int32), ids(11), 11)[1] == 10


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


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=40), st.integers(4, 12))
def test_any_order_of_calls_keeps_contents_and_counts_right(steps, n_pages):
    cache = KVCache(n_pages)
    contents = np.full((n_pages, P), -1, np.int64)
    live: list[dict] = []
    for kind, chat, n, pick in steps:
        if kind == "open":
            prompt = np.concatenate([ids(n // 2, 10), ids(n - n // 2, 1000 * chat)])
            row = np.full(16, -1, np.int32)
            result = cache.open(row, prompt, n)
            if result:
                live.append(dict(lease=result[0], ids=prompt, done=result[1]))
        elif kind == "clear":
            cache.clear()
        elif live:
            one = live[pick % len(live)]
            if kind == "compute":
                one["done"] = cache.extend(one["lease"], one["ids"], one["done"])
                end = min(one["done"] + n, len(one["ids"]))
                cache.grow(one["lease"], end)
                for p in range(one["done"], end):
                    contents[one["lease"].row[p // P], p % P] = one["ids"][p]
                one["done"] = end
                cache.file(one["lease"], one["ids"], end)
            else:
                cache.close(one["lease"], one["ids"], one["done"], keep=kind == "close")
                live.remove(one)
        check_pages(cache, [one["lease"] for one in live])
        for one in live:
            p = np.arange(one["done"])
            assert (contents[one["lease"].row[p // P], p % P] == one["ids"][:one["done"]]).all()
    for one in live:
        cache.close(one["lease"], one["ids"], one["done"])
    assert cache.free_pages == n_pages
    check_pages(cache, [])
