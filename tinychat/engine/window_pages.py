"""The KV pages of layers with a reach: a sequence keeps those that its next token can see.

They are in the same prefix tree as the pages of the other layers, each in its node; what has fallen
out of every window stays in its node, idle, until another sequence needs the page.
"""
from collections import OrderedDict

from tinychat.ops.program import PAGE_TOKENS


class WindowPages:
    """Pages 0 … n_pages-1. A node that has one has it in `window_page`, and in `window_refs` how
    many sequences hold it; nodes that none holds stand in order of use."""

    def __init__(self, n_pages: int, window: int):
        self.n_pages, self._window = n_pages, window
        self._empty = list(range(n_pages - 1, -1, -1))
        self._idle: OrderedDict = OrderedDict()  # nodes, least recently used first

    def first(self, position: int) -> int:
        """The first page that a token at `position` looks at."""
        return max(0, position - self._window + 1) // PAGE_TOKENS

    def take(self) -> int:
        """An empty page, or the one that has been idle longest."""
        if not self._empty:
            assert self._idle, "fewer window pages than the running sequences need"
            node, _ = self._idle.popitem(last=False)
            self._empty.append(node.window_page)
            node.window_page = -1
        return self._empty.pop()

    def give(self, page: int) -> None:
        self._empty.append(page)

    def file(self, node, page: int) -> int:
        """Hold the node's page; if it has none it gets this one, else this one is given back."""
        if node.window_page < 0:
            node.window_page = page
        else:
            self.give(page)
        self.hold(node)
        return node.window_page

    def keep(self, node, page: int) -> None:
        """As `file`, but nobody holds it."""
        self.file(node, page)
        self.release(node)

    def hold(self, node) -> None:
        if node.window_refs == 0:
            self._idle.pop(node, None)
        node.window_refs += 1

    def release(self, node) -> None:
        node.window_refs -= 1
        if node.window_refs == 0:
            self._idle[node] = None

    def take_from(self, node) -> int:
        """The page of a node that nobody holds and that leaves the tree."""
        del self._idle[node]
        page, node.window_page = node.window_page, -1
        return page

    def forget(self, node) -> None:
        """The node leaves the tree; nobody holds its page."""
        if node.window_page >= 0:
            self.give(self.take_from(node))


def usable_depths(path: list, pages: WindowPages) -> list[bool]:
    """For d = 0 … len(path): whether a sequence can go on after the first d pages of `path`."""
    out, n_present = [True], 0  # pages in a row that are there, up to this depth
    for d, node in enumerate(path, 1):
        n_present = n_present + 1 if node.window_page >= 0 else 0
        out.append(n_present >= d - pages.first(d * PAGE_TOKENS))
    return out


def n_window_pages_for(window: int, *, n_sequences: int, max_tokens: int) -> int:
    """What sequences that run at the same time may need: a window each, and a step's tokens.

    A stretch of L positions touches (L - 2) // PAGE_TOKENS + 2 pages at most, and a sequence lets
    go only when a page is full.
    """
    per_sequence = (window - 1) // PAGE_TOKENS + 4
    return n_sequences * per_sequence + max_tokens // PAGE_TOKENS
