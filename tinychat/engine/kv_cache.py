"""The KV pages of one loaded model: who holds them, and what is in them.

A page is in one of three states: empty; held by one or more sequences; or idle, that is held by
nobody and kept because of what it contains. Contents are found through a prefix tree: a node is one
page, its key the tokens of that page, its place in the tree the tokens before. The tree is made of
dicts keyed by the tokens themselves, so a hit has been compared token by token; for the tokens of
an image its content's digest stands in their keys. When no page is empty, idle ones are given away,
the least recently used first.

Layers with a reach have pages of their own (window_pages.py), and recurrent states are kept as
snapshots (snapshots.py): a sequence can go on only where the tree has what it needs of these.

Only the engine's thread comes here; nothing locks.
"""
from collections import OrderedDict

import numpy as np

from tinychat.engine.snapshots import Snapshots
from tinychat.engine.window_pages import WindowPages, usable_depths
from tinychat.ops.program import PAGE_TOKENS

TOKEN_BYTES = np.dtype(np.int32).itemsize


def n_pages_for(n_positions: int) -> int:
    return -(-n_positions // PAGE_TOKENS)


class Node:
    """One page whose contents are known.

    A key shorter than a page is a tail: the end of what somebody computed.
    """

    __slots__ = ("key", "page", "parent", "children", "refs", "window_page", "window_refs",
                 "snapshot")

    def __init__(self, key: bytes, page: int, parent: "Node | None"):
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.refs = 0
        self.window_page, self.window_refs = -1, 0  # see WindowPages
        self.snapshot = -1                          # see Snapshots


class Lease:
    """What one sequence holds: pages in order of position, the first len(nodes) in the tree.

    row, window_row: int32 (max_pages,), the sequence's rows of the step's page tables, kept up to
    date in place. slot: the place of its recurrent state. whole: [first, end) of positions that
    must be computed in one step, hence not be reused in part.
    """

    __slots__ = ("row", "window_row", "slot", "whole", "nodes", "n_pages", "n_reserved",
                 "first_window")

    def __init__(self, row: np.ndarray, window_row: np.ndarray | None = None, slot: int = -1,
                 whole: tuple[tuple[int, int], ...] = ()):
        self.row, self.window_row, self.slot, self.whole = row, window_row, slot, whole
        self.first_window = 0  # the first page of window_row that it still holds
        self.nodes: list[Node] = []
        self.n_pages = 0
        self.n_reserved = 0  # pages promised and not yet taken


class KVCache:
    """Pages 0 … n_pages-1 and the prefix tree over them.

    A holder of a node holds every node above it, so an idle node has only idle nodes below, and
    these went idle before it: the least recently used idle node is always a leaf.
    """

    def __init__(self, n_pages: int, window: WindowPages | None = None,
                 snapshots: Snapshots | None = None):
        self.n_pages, self.window, self.snapshots = n_pages, window, snapshots
        self._empty = list(range(n_pages - 1, -1, -1))
        self._idle: OrderedDict[Node, None] = OrderedDict()  # least recently used first
        self._root = Node(b"", -1, None)
        self._n_reserved = 0

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds: empty ones, and idle ones that only the tree keeps."""
        return len(self._empty) + len(self._idle)

    def open(self, lease: Lease, ids: np.ndarray, n_positions: int, *,
             reuse: bool = True) -> int | None:
        """Promise the pages of positions below `n_positions`; None when there are not enough.

        ids: int32 (n,), n <= n_positions, the keys of the tokens to come. Returns how many of
        them are computed already, at most n-1.
        """
        path = self._find(ids) if reuse else []
        tail, n_tail = self._find_tail(path, ids, lease) if reuse else (None, 0)
        if tail is None:
            path = path[:self._usable(path, lease)]
        n_needed = n_pages_for(n_positions)
        n_shared = sum(node.refs > 0 for node in path)  # these cost nothing
        if self.free_pages - self._n_reserved < n_needed - n_shared:
            return None
        lease.n_reserved = n_needed
        self._n_reserved += n_needed
        n_done = len(path) * PAGE_TOKENS + n_tail
        self._hold_all(lease, path, n_done)
        if tail:
            self._take_tail(lease, tail)
        elif path:
            self._restore(lease)
        return n_done

    def extend(self, lease: Lease, ids: np.ndarray, n_done: int) -> int:
        """How many of `ids` are computed: n_done, or more if others have filed what follows."""
        n_held = len(lease.nodes)
        if lease.n_pages != n_held:  # it has begun a page of its own
            return n_done
        found = self._find(ids, n_held, self._last(lease))
        found = found[:self._usable(lease.nodes + found, lease, n_held) - n_held]
        if found:
            self._hold_all(lease, found, (n_held + len(found)) * PAGE_TOKENS)
            self._restore(lease)
        return len(lease.nodes) * PAGE_TOKENS

    def snapshot(self, lease: Lease) -> None:
        """Keep the state after the lease's last full page, where it now stands."""
        if self.snapshots and lease.nodes:
            self.snapshots.save(lease.nodes[-1], lease.slot)

    def grow(self, lease: Lease, n_positions: int) -> bool:
        """Take the pages of positions below `n_positions`; False when all others are promised."""
        while lease.n_pages * PAGE_TOKENS < n_positions:
            if lease.n_reserved == 0:
                if self.free_pages == self._n_reserved:
                    return False
                lease.n_reserved += 1
                self._n_reserved += 1
            page = self._empty.pop() if self._empty else self._evict()
            self._append(lease, page, self.window.take() if self.window else -1)
        return True

    def file(self, lease: Lease, ids: np.ndarray, n_done: int) -> None:
        """Enter into the tree the pages that the first `n_done` of `ids` fill.

        Where the tree has such a page, it is held instead and ours given back: they are equal.
        """
        while (len(lease.nodes) + 1) * PAGE_TOKENS <= n_done:
            i = len(lease.nodes)
            key = ids[i * PAGE_TOKENS:(i + 1) * PAGE_TOKENS].tobytes()
            parent, page = self._last(lease), int(lease.row[i])
            node = parent.children.get(key)
            if node is None:
                node = parent.children[key] = Node(key, page, parent)
            else:
                self._empty.append(page)
                self._idle.pop(node, None)
                lease.row[i] = node.page
            node.refs += 1
            lease.nodes.append(node)
            if self.window:
                lease.window_row[i] = self.window.file(node, int(lease.window_row[i]))
        if self.window:
            self._let_go(lease, self.window.first(n_done))

    def close(self, lease: Lease, ids: np.ndarray, n_done: int, *, keep: bool = True) -> None:
        """Give everything back; with `keep`, what is computed of ids[:n_done] can be found."""
        if keep:
            self.file(lease, ids, n_done)
        n_filed = len(lease.nodes)
        private = lease.row[n_filed:lease.n_pages].tolist()
        windows = lease.window_row[n_filed:lease.n_pages].tolist() if self.window else []
        if self.window:
            self._let_go(lease, n_filed)
        tail = ids[n_filed * PAGE_TOKENS:n_done].tobytes() if keep else b""
        if tail:
            node = self._keep_tail(self._last(lease), tail, private, windows)
        elif keep and n_done and lease.nodes:
            node = lease.nodes[-1]
        if self.snapshots and keep and n_done:
            self.snapshots.save(node, lease.slot)
        self._empty.extend(reversed(private))
        for page in reversed(windows):
            self.window.give(page)
        for node in reversed(lease.nodes):  # the deepest goes idle first, hence is given away first
            node.refs -= 1
            if node.refs == 0:
                self._idle[node] = None
        self._n_reserved -= lease.n_reserved
        lease.nodes, lease.n_pages, lease.n_reserved = [], 0, 0

    def clear(self) -> None:
        """Forget the contents of all idle pages."""
        while self._idle:
            self._empty.append(self._evict())

    def _last(self, lease: Lease) -> Node:
        return lease.nodes[-1] if lease.nodes else self._root

    def _find(self, ids: np.ndarray, skip: int = 0, node: Node | None = None) -> list[Node]:
        """The full pages below `node` that hold `ids` from page `skip` on, bar the last token."""
        node, path = node or self._root, []
        for i in range(skip, (len(ids) - 1) // PAGE_TOKENS):
            node = node.children.get(ids[i * PAGE_TOKENS:(i + 1) * PAGE_TOKENS].tobytes())
            if node is None:
                break
            path.append(node)
        return path

    def _usable(self, path: list[Node], lease: Lease, least: int = 0) -> int:
        """The most pages of `path`, at least `least`, after which this lease can go on."""
        in_window = usable_depths(path, self.window) if self.window else None
        for d in range(len(path), least, -1):
            if ((in_window is None or in_window[d])
                    and (self.snapshots is None or path[d - 1].snapshot >= 0)
                    and not _splits(lease.whole, d * PAGE_TOKENS)):
                return d
        return least

    def _find_tail(self, path: list[Node], ids: np.ndarray,
                   lease: Lease) -> tuple[Node | None, int]:
        """The longest tail after `path` that `ids` go on with, and how many of its tokens count."""
        n_done = len(path) * PAGE_TOKENS
        rest = ids[n_done:]
        children = (path[-1] if path else self._root).children
        key = rest[:PAGE_TOKENS - 1].tobytes()
        for n in range(len(key), 0, -TOKEN_BYTES):
            node = children.get(key[:n])
            n_tail = min(n // TOKEN_BYTES, len(rest) - 1)
            if node and n_tail and self._can_go_on(path, node, n_done, n_tail, lease):
                return node, n_tail
        return None, 0

    def _can_go_on(self, path: list[Node], tail: Node, n_done: int, n_tail: int,
                   lease: Lease) -> bool:
        """Whether after the first n_tail tokens of this tail."""
        if self.snapshots and (tail.snapshot < 0 or n_tail < len(tail.key) // TOKEN_BYTES):
            return False
        if self.window:
            seen = path[self.window.first(n_done + n_tail):]
            if any(node.window_page < 0 for node in (*seen, tail)):
                return False
        return not _splits(lease.whole, n_done + n_tail)

    def _take_tail(self, lease: Lease, node: Node) -> None:
        """Out of the tree: it will be written on."""
        if self.snapshots:
            self.snapshots.restore(node, lease.slot)
            self.snapshots.forget(node)
        del node.parent.children[node.key], self._idle[node]
        self._append(lease, node.page, self.window.take_from(node) if self.window else -1)

    def _keep_tail(self, parent: Node, key: bytes, private: list[int],
                   windows: list[int]) -> Node:
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, private.pop(0), parent)
        self._idle[node] = None
        self._idle.move_to_end(node)
        if windows:
            self.window.keep(node, windows.pop(0))
        return node

    def _hold_all(self, lease: Lease, nodes: list[Node], n_done: int) -> None:
        """Go on with these pages; of their window pages with those that position n_done looks at.

        The others may have been given away: `_usable` and `_can_go_on` look at these alone.
        """
        for node in nodes:
            if node.refs == 0:
                del self._idle[node]
            node.refs += 1
            lease.nodes.append(node)
            self._append(lease, node.page, node.window_page)
        if self.window and nodes:
            n_held = len(lease.nodes)
            first = max(self.window.first(n_done), lease.first_window)
            for node in lease.nodes[max(first, n_held - len(nodes)):]:
                self.window.hold(node)
            self._let_go(lease, first, n_held - len(nodes))

    def _let_go(self, lease: Lease, first: int, n_held: int | None = None) -> None:
        """Release the window pages before page `first` of the first n_held nodes, or of all."""
        n_held = len(lease.nodes) if n_held is None else n_held
        for node in lease.nodes[lease.first_window:min(first, n_held)]:
            self.window.release(node)
        lease.first_window = max(first, lease.first_window)

    def _restore(self, lease: Lease) -> None:
        if self.snapshots:
            self.snapshots.restore(lease.nodes[-1], lease.slot)

    def _append(self, lease: Lease, page: int, window_page: int = -1) -> None:
        assert lease.n_reserved > 0, "a page that was not promised"
        lease.row[lease.n_pages] = page
        if self.window:
            lease.window_row[lease.n_pages] = window_page
        lease.n_pages += 1
        lease.n_reserved -= 1
        self._n_reserved -= 1

    def _evict(self) -> int:
        node, _ = self._idle.popitem(last=False)
        assert not node.children and node.refs == 0, "an idle node above a held one"
        del node.parent.children[node.key]
        if self.window:
            self.window.forget(node)
        if self.snapshots:
            self.snapshots.forget(node)
        return node.page


def _splits(whole: tuple[tuple[int, int], ...], position: int) -> bool:
    """Whether a step that begins at `position` would begin within one of these."""
    return any(first < position < end for first, end in whole)
