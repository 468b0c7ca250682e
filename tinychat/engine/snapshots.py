"""Copies of recurrent states, so that a sequence can go on from where another one was.

A recurrent state cannot be cut back to an earlier token: it is worth something exactly where it was
taken. Snapshots hang at nodes of the prefix tree and mean "after this node's last token".
"""
from collections import OrderedDict
from collections.abc import Callable, Iterable


class Snapshots:
    """A few places for states; when all are full, the least recently used snapshot goes.

    A node that has one has its place in `snapshot`, else -1. copy(source, target): the executor's.
    """

    def __init__(self, places: Iterable[int], copy: Callable[[int, int], None]):
        self._empty = list(places)
        self._copy = copy
        self._nodes: OrderedDict = OrderedDict()  # least recently used first

    def save(self, node, slot: int) -> None:
        """The state in `slot` stands after this node; taken once."""
        if node.snapshot >= 0:
            self._nodes.move_to_end(node)
            return
        if not self._empty:
            if not self._nodes:
                return  # there are no places at all
            self.forget(next(iter(self._nodes)))
        node.snapshot = self._empty.pop()
        self._copy(slot, node.snapshot)
        self._nodes[node] = None

    def restore(self, node, slot: int) -> None:
        self._copy(node.snapshot, slot)
        self._nodes.move_to_end(node)

    def forget(self, node) -> None:
        if node.snapshot >= 0:
            del self._nodes[node]
            self._empty.append(node.snapshot)
            node.snapshot = -1
