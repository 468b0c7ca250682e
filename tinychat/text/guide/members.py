"""Members of an object: known keys in any order, each at most once, and those that are required."""
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from tinychat.text.guide.automaton import Lazy, Node, Symbols
from tinychat.text.guide.pieces import literal


@dataclass(eq=False)
class _Place:
    """A place in the trie of keys. below: a bit for each key whose spelling goes on from here."""

    next: "dict[int, _Place]" = field(default_factory=dict)
    below: int = 0
    key: int | None = None


class Members:
    """keys: (spellings, value) of each. required: bits of those that must come.

    others: (opening, text with its end, rest) of keys that are not known, and `other_value`; None:
    there are no such keys. first, comma: what stands before the first member and before the others.
    end: what closes the object.

    A key that is not known may come twice, as JSON has it, and the last counts: to remember it
    would make each letter of it a state of its own, with a mask of its own.
    """

    def __init__(self, keys: list[tuple[Iterable[bytes], Symbols]], required: int, *,
                 others: Iterable[tuple[bytes, Node, bytes]] = (), other_value: Symbols | None,
                 first: Symbols, comma: Symbols, end: Symbols):
        self._values = [value for _, value in keys]
        self._required, self._first, self._comma, self._end = required, first, comma, end
        self._trie, self._all = _trie(spellings for spellings, _ in keys)
        self._others = [] if other_value is None else [
            (*_other_key(self._trie, *key), *other_value) for key in others]
        self._keys: dict[tuple[int, int], Node] = {}
        self._after: dict[int, Node] = {}

    def start(self) -> Node:
        return Lazy(lambda: self._options(0, self._first))

    def _options(self, used: int, before: Symbols) -> Iterable[Symbols]:
        if not self._required & ~used:
            yield self._end
        if self._all & ~used:
            yield (*before, self.key(self._trie, used))
        for other in self._others:
            yield (*before, *other, self.after(used))

    def after(self, used: int) -> Node:
        """What follows a member when those keys have been."""
        if used not in self._after:
            self._after[used] = Lazy(lambda: self._options(used, self._comma))
        return self._after[used]

    def key(self, place: _Place, used: int) -> Node:
        """The rest of a key that has not been, then its value and what follows."""
        found = self._keys.get((id(place), used))
        if found is None:
            found = self._keys[id(place), used] = _Key(self, place, used)
        return found

    def value(self, key: int) -> Symbols:
        return self._values[key]


class _Key(Node):
    def __init__(self, members: Members, place: _Place, used: int):
        self._members, self._place, self._used = members, place, used

    @cached_property
    def reads(self) -> dict[int, Symbols]:
        return {byte: (self._members.key(place, self._used),)
                for byte, place in self._place.next.items() if place.below & ~self._used}

    @cached_property
    def instead(self) -> tuple[Symbols, ...]:
        key = self._place.key
        if key is None or self._used >> key & 1:
            return ()
        return ((*self._members.value(key), self._members.after(self._used | 1 << key)),)


def _trie(keys: Iterable[Iterable[bytes]]) -> tuple[_Place, int]:
    """The root, and a bit for each key that has a spelling."""
    root = _Place()
    for key, spellings in enumerate(keys):
        for text in spellings:
            root.below |= 1 << key
            place = root
            for byte in text:
                place = place.next.setdefault(byte, _Place())
                place.below |= 1 << key
            place.key = key
    return root, root.below


def _other_key(known: _Place, opening: bytes, text: Node, rest: bytes) -> Symbols:
    place: _Place | None = known
    for byte in opening:
        place = place and place.next.get(byte)
    if place and place.next:
        text = _Unknown(text, (), place)
    return (*literal(opening), text, *literal(rest))


class _Unknown(Node):
    """The text of a key as long as it may still become a known one, which it must not end as.

    Escapes have to wait until it cannot: they would spell a known key another way.
    """

    def __init__(self, node: Node, then: Symbols, place: _Place):
        self._node, self._then, self._place = node, then, place
        self.instead = ()

    @cached_property
    def reads(self) -> dict[int, Symbols]:
        found = {}
        for byte, left in self._node.reads.items():
            left += self._then
            place = self._place.next.get(byte)
            if byte != ord("\\") and place is None:
                found[byte] = left
            elif byte != ord("\\") and left:
                found[byte] = (_Unknown(left[0], left[1:], place),)
        return found
