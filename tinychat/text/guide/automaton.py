"""What may be written next, byte by byte: immutable states that follow a text.

A grammar is made of nodes (`Node`), each a thing that is still to be written. A stack is the list
of what is left, the next thing on top; a state is the set of all stacks that the text so far
allows, so alternatives live side by side until a byte tells them apart.

    state = start(literal(b"ab"))
    state.step(ord("a")).step(ord("b")).done        # True
    state.step(ord("b"))                            # None: impossible

Stacks and states are interned within one automaton: equal ones are the same object, and what was
found out about one (its transitions, the mask of a vocabulary) is found again by identity.
"""
from collections.abc import Callable, Iterable
from functools import cached_property

Symbols = tuple["Node", ...]  # things to write one after the other


class Node:
    """reads: byte -> what is left of this node after it.

    instead: sequences of which any may stand in this node's place; () lets it be left out.
    """

    def __init__(self, reads: dict[int, Symbols] | None = None, *instead: Symbols):
        self.reads: dict[int, Symbols] = {} if reads is None else reads
        self.instead: tuple[Symbols, ...] = instead


class Lazy(Node):
    """A node that is built when it is first looked at, so that a grammar may contain itself."""

    def __init__(self, build: Callable[[], Iterable[Symbols]]):
        self._build = build
        self.reads = {}

    @cached_property
    def instead(self) -> tuple[Symbols, ...]:
        return tuple(self._build())


class _Stack:
    """A node on top of what follows it. The bottom has neither: there all is written."""

    __slots__ = ("node", "below", "_above", "_ready")

    def __init__(self, node: Node | None, below: "_Stack | None"):
        self.node, self.below = node, below
        self._above: dict[Node, _Stack] = {}
        self._ready: tuple[_Stack, ...] | None = None

    def push(self, symbols: Symbols) -> "_Stack":
        stack = self
        for node in reversed(symbols):
            above = stack._above.get(node)
            stack = above or stack._above.setdefault(node, _Stack(node, stack))
        return stack

    def ready(self) -> "tuple[_Stack, ...]":
        """The stacks that this may become without a byte and that can read one, or are done."""
        if self._ready is None:
            found, seen, todo = [], {self}, [self]
            while todo:
                stack = todo.pop()
                if stack.node is None or stack.node.reads:
                    found.append(stack)
                for symbols in stack.node.instead if stack.node else ():
                    other = stack.below.push(symbols)
                    if other not in seen:
                        seen.add(other)
                        todo.append(other)
            self._ready = tuple(found)
        return self._ready


class State:
    """Where a text has got to. Compare by identity; from `start`, never made by hand.

    done: the text may end here. possible: the bytes that may come next.
    """

    __slots__ = ("done", "possible", "_stacks", "_next", "_states")

    def __init__(self, stacks: frozenset[_Stack], states: "dict[frozenset[_Stack], State]"):
        nodes = [stack.node for stack in stacks]
        self.done: bool = None in nodes
        self.possible: frozenset[int] = frozenset().union(*(node.reads for node in nodes if node))
        self._stacks, self._states = stacks, states
        self._next: dict[int, State | None] = {}

    def step(self, byte: int) -> "State | None":
        """The state after one more byte; None: the byte is impossible here."""
        try:
            return self._next[byte]
        except KeyError:
            found = self._next[byte] = self._after(byte)
            return found

    def walk(self, text: bytes) -> "State | None":
        """The state after all of `text`; None where a byte of it is impossible."""
        state: State | None = self
        for byte in text:
            state = state.step(byte)
            if state is None:
                return None
        return state

    def _after(self, byte: int) -> "State | None":
        stacks: set[_Stack] = set()
        for stack in self._stacks:
            left = stack.node.reads.get(byte) if stack.node else None
            if left is not None:
                stacks.update(stack.below.push(left).ready())
        return _state(frozenset(stacks), self._states) if stacks else None


def _state(stacks: frozenset[_Stack], states: dict[frozenset[_Stack], State]) -> State:
    return states.get(stacks) or states.setdefault(stacks, State(stacks, states))


def start(symbols: Symbols) -> State:
    """The state before the first byte of a text of `symbols`. It holds all that grows from it: when
    it is let go, so is its automaton."""
    return _state(frozenset(_Stack(None, None).push(symbols).ready()), {})
