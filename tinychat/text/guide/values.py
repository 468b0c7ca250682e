"""Values by schema, in a dialect, as nodes. Inner schemas wait until a text reaches them."""
import math
from collections.abc import Iterable
from typing import Any

from tinychat.text.guide.automaton import Lazy, Node, Symbols
from tinychat.text.guide.dialects import JSON, Dialect
from tinychat.text.guide.members import Members
from tinychat.text.guide.pieces import BLANK, GAP, INTEGER, NUMBER, literal, one_of
from tinychat.text.guide.schema import Schemas, exactly, kind_of, kinds, values

MAX_NESTING = 64           # of values of which a schema speaks; an answer may carry 100
MAX_FREE_NESTING = 32      # of those of which none does


class Values:
    """The values of one schema document in one dialect."""

    def __init__(self, root: Any, dialect: Dialect = JSON):
        self.schemas = Schemas(root)
        self._dialect = dialect
        self._built: dict[tuple[int, int], Node] = {}

    def objects(self) -> list[dict]:
        """Plain schemas of a call's arguments, which are an object whatever the document says."""
        plain = self.schemas.alternatives(self.schemas.root)
        return [one for one in plain if "object" in kinds(one)] or [{}]

    def arguments(self) -> Node:
        return Lazy(lambda: [
            symbols for plain in self.objects()
            for symbols in self._by_kind({**plain, "type": "object"}, MAX_NESTING)])

    def value(self, schema: Any, nesting: int = MAX_NESTING) -> Node:
        """nesting: how many arrays and objects may still stand in each other."""
        if not isinstance(schema, dict) or not schema:
            schema, nesting = _ANYTHING, min(nesting, MAX_FREE_NESTING)
        place = id(schema), nesting
        if place not in self._built:   # the node keeps the schema, and so its id, alive
            self._built[place] = Lazy(lambda: self._options(schema, nesting))
        return self._built[place]

    def _options(self, schema: dict, nesting: int) -> Iterable[Symbols]:
        for plain in self.schemas.alternatives(schema):
            exact = list(self._exactly(values(plain) or [], nesting))
            yield from exact or self._by_kind(plain, nesting)

    def _exactly(self, named: list, nesting: int) -> Iterable[Symbols]:
        scalars = [value for value in named if kind_of(value) not in ("array", "object")
                   and not (isinstance(value, float) and not math.isfinite(value))]
        if scalars:
            yield (one_of((text, ()) for value in scalars for text in self._dialect.scalar(value)),)
        for value in named if nesting else ():
            if kind_of(value) in ("array", "object"):
                yield from self._by_kind(exactly(value), nesting)

    def _by_kind(self, plain: dict, nesting: int) -> Iterable[Symbols]:
        allowed = kinds(plain)
        scalar = self._dialect.scalar
        if "string" in allowed:
            yield self._dialect.string
        if "number" in allowed or "integer" in allowed:
            yield NUMBER if "number" in allowed else INTEGER
        too_deep = not nesting and not set(allowed) - {"object", "array"}
        named = [value for kind, value in _NAMED if kind in allowed or too_deep]
        if named:
            yield (one_of((text, ()) for value in named for text in scalar(value)),)
        if "object" in allowed and nesting:
            yield (*literal(b"{"), self.members(plain, self._dialect, nesting - 1,
                                                first=(GAP,), end=(GAP, *literal(b"}"))).start())
        if "array" in allowed and nesting:
            yield (*literal(b"["), _Items(self, plain, nesting - 1).item(0))

    def members(self, plain: dict, dialect: Dialect, nesting: int = MAX_NESTING - 1, *,
                first: Symbols, end: Symbols) -> Members:
        """The members of the object of which a plain schema speaks."""
        properties, required, other = object_parts(plain)
        keys = [(dialect.key(name), (BLANK, self.value(schema, nesting)))
                for name, schema in properties.items()]
        bits = sum(1 << i for i, name in enumerate(properties)
                   if name in required and keys[i][0])
        value = None if other is None else (BLANK, self.value(other, nesting))
        return Members(keys, bits, others=dialect.other_keys, other_value=value, first=first,
                       comma=(*literal(b","), GAP), end=end)


class _Items:
    """The items of an array: each of the first has its own schema, and some must come."""

    def __init__(self, of: Values, plain: dict, nesting: int):
        first, rest = plain.get("prefixItems"), plain.get("items", True)
        if isinstance(rest, list):     # as schemas before 2020 have it
            first, rest = rest, plain.get("additionalItems", True)
        first = first if isinstance(first, list) else []
        self._values = [of.value(schema, nesting) for schema in first]
        self._rest = None if rest is False else of.value(rest, nesting)
        least = plain.get("minItems")
        self._least = least if isinstance(least, int) else 0
        if self._rest is None:
            self._least = min(self._least, len(first))
        self._items: dict[int, Node] = {}

    def item(self, i: int) -> Node:
        """The rest of an array after i items."""
        i = min(i, max(self._least, len(self._values), 1))  # from there on all are alike
        if i not in self._items:
            self._items[i] = Lazy(lambda: self._options(i))
        return self._items[i]

    def _options(self, i: int) -> Iterable[Symbols]:
        if i >= self._least:
            yield (GAP, *literal(b"]"))
        value = self._values[i] if i < len(self._values) else self._rest
        if value is not None:
            yield (*(literal(b",") if i else ()), GAP, value, self.item(i + 1))


def object_parts(plain: dict) -> tuple[dict[str, Any], set[str], Any]:
    """(properties, required names, schema of all other keys or None) of a plain object schema.

    A required name of which nothing is said becomes a property that may be anything.
    """
    named = plain.get("properties")
    properties = {str(name): schema for name, schema in named.items() if schema is not False} \
        if isinstance(named, dict) else {}
    other = plain.get("additionalProperties", True if plain.get("patternProperties") else
                      None if isinstance(named, dict) else True)
    other = None if other is False else other
    required = plain.get("required")
    required = {name for name in required if isinstance(name, str)} \
        if isinstance(required, list) else set()
    if plain.get("additionalProperties") is not False:
        properties |= {name: True if other is None else other
                       for name in sorted(required - properties.keys())}
    return properties, required & properties.keys(), other


_ANYTHING: dict = {}
_NAMED = (("boolean", True), ("boolean", False), ("null", None))
