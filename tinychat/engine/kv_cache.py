"""The KV pages of one loaded model: who holds them, and what is in them.

A page is in one of three states: empty; held by one or more sequences; or idle, that is held by
nobody and kept because of what it contains. Contents are found through a prefix tree: a node is one
page, its key the tokens of that page, its place in the tree the tokens before. The tree is made of
dicts keyed by the tokens themselves, so a hit has been compared token by token. When no page is
empty, idle ones are given away, the least recently used first.

Only the engine's thread comes here; nothing locks.
"""
from collections import OrderedDict

import numpy as np

from tinychat.ops.program import PAGE_TOKENS

TOKEN_BYTES = np.dtype(np.int32).itemsize


def n_pages_for(n_positions: int) -> int:
    return -(-n_positions // PAGE_TOKENS)


class Node:
    """One page whose contents are known.

    A key shorter than a page is a tail: the end of what somebody computed.
    """

    __slots__ = ("key", "page", "parent", "children", "refs")

    def __init__(self, key: bytes, page: int, parent: "Node | None"):
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.refs = 0


class Lease:
    """What one sequence holds: pages in order of position, the first len(nodes) in the tree.

    row: int32 (max_pages,), the sequence's row of the step's page table, kept up to date in place.
    """

    __slots__ = ("row", "nodes", "n_pages", "n_reserved")

    def __init__(self, row: np.ndarray):
        self.row = row
        self.nodes: list[Node] = []
        self.n_pages = 0
        self.n_reserved = 0  # pages promised and not yet taken


class KVCache:
    """Pages 0 … n_pages-1 and the prefix tree over them.

    A holder of a node holds every node above it, so an idle node has only idle nodes below, and
    these went idle before it: the least recently used idle node is always a leaf.
    """

    def __init__(self, n_pages: int):
        self.n_pages = n_pages
        self._empty = list(range(n_pages - 1, -1, -1))
        self._idle: OrderedDict[Node, None] = OrderedDict()  # least recently used first
        self._root = Node(b"", -1, None)
        self._n_reserved = 0

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds: empty ones, and idle ones that only the tree keeps."""
        return len(self._empty) + len(self._idle)

    def open(self, row: np.ndarray, ids: np.ndarray, n_positions: int, *,
             reuse: bool = True) -> tuple[Lease, int] | None:
        """Promise the pages of positions below `n_positions`; None when there are not enough.

        ids: int32 (n,), n <= n_positions, the tokens to come. Returns the lease and how many of
        them are computed already, at most n-1.
        """
        path = self._find(ids) if reuse else []
        n_needed = n_pages_for(n_positions)
        n_shared = sum(node.refs > 0 for node in path)  # these cost nothing
        if self.free_pages - self._n_reserved < n_needed - n_shared:
            return None
        lease = Lease(row)
        lease.n_reserved = n_needed
        self._n_reserved += n_needed
        for node in path:
            self._hold(lease, node)
        n_done = len(path) * PAGE_TOKENS
        return lease, n_done + (self._take_tail(lease, ids[n_done:]) if reuse else 0)

    def extend(self, lease: Lease, ids: np.ndarray, n_done: int) -> int:
        """How many of `ids` are computed: n_done, or more if others have filed what follows."""
        if lease.n_pages != len(lease.nodes):  # it has begun a page of its own
            return n_done
        for node in self._find(ids, len(lease.nodes), self._last(lease)):
            self._hold(lease, node)
        return len(lease.nodes) * PAGE_TOKENS

    def grow(self, lease: Lease, n_positions: int) -> bool:
        """Take the pages of positions below `n_positions`; False when all others are promised."""
        while lease.n_pages * PAGE_TOKENS < n_positions:
            if lease.n_reserved == 0:
                if self.free_pages == self._n_reserved:
                    return False
                lease.n_reserved += 1
                self._n_reserved += 1
            self._append(lease, self._empty.pop() if self._empty else self._evict())
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

    def close(self, lease: Lease, ids: np.ndarray, n_done: int, *, keep: bool = True) -> None:
        """Give everything back; with `keep`, what is computed of ids[:n_done] can be found."""
        if keep:
            self.file(lease, ids, n_done)
        n_filed = len(lease.nodes)
        private = lease.row[n_filed:lease.n_pages].tolist()
        tail = ids[n_filed * PAGE_TOKENS:n_done].tobytes() if keep else b""
        if tail:
            self._keep_tail(self._last(lease), tail, private)
        self._empty.extend(reversed(private))
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

    def _take_tail(self, lease: Lease, rest: np.ndarray) -> int:
        """Take the longest tail that `rest` begins with out of the tree: it will be written on."""
        children = self._last(lease).children
        key = rest[:PAGE_TOKENS - 1].tobytes()
        for n in range(len(key), 0, -TOKEN_BYTES):
            node = children.get(key[:n])
            if node is not None:
                del children[node.key], self._idle[node]
                self._append(lease, node.page)
                return min(n // TOKEN_BYTES, len(rest) - 1)
        return 0

    def _keep_tail(self, parent: Node, key: bytes, private: list[int]) -> None:
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, private.pop(0), parent)
        self._idle[node] = None
        self._idle.move_to_end(node)

    def _hold(self, lease: Lease, node: Node) -> None:
        if node.refs == 0:
            del self._idle[node]
        node.refs += 1
        lease.nodes.append(node)
        self._append(lease, node.page)

    def _append(self, lease: Lease, page: int) -> None:
        assert lease.n_reserved > 0, "a page that was not promised"
        lease.row[lease.n_pages] = page
        lease.n_pages += 1
        lease.n_reserved -= 1
        self._n_reserved -= 1

    def _evict(self) -> int:
        node, _ = self._idle.popitem(last=False)
        assert not node.children and node.refs == 0, "an idle node above a held one"
        del node.parent.children[node.key]
        return node.page
