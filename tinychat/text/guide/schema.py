"""What a JSON schema says, plainly: a list of alternatives without $ref, allOf, anyOf and oneOf.

Only what an automaton uses is looked at; bounds, patterns, `not` and `if` are left to validation. A
schema that says nothing, or that cannot be made plain, becomes [{}]: any value.
"""
from itertools import product
from typing import Any
from urllib.parse import unquote

KINDS = ("object", "array", "string", "number", "integer", "boolean", "null")
MAX_ALTERNATIVES = 256
MAX_VISITS = 2000          # subschemas that one schema may refer to or be put together from
MAX_DEPTH = 50             # of allOf and anyOf in each other
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf")
_OF_OBJECTS = ("properties", "required", "additionalProperties", "patternProperties")
_OF_ARRAYS = ("items", "prefixItems")


class _TooMuch(Exception):
    """A schema that contains itself without a value between, or that grows without end."""


class Schemas:
    """The schemas inside one document, `root`, to which their references lead."""

    def __init__(self, root: Any):
        self.root = root

    def alternatives(self, schema: Any) -> list[dict]:
        """Never empty: [{}] where nothing is known."""
        try:
            return self._plain(schema, 0, [MAX_VISITS]) or [{}]
        except _TooMuch:
            return [{}]

    def _plain(self, schema: Any, depth: int, visits: list[int]) -> list[dict]:
        """[] when nothing can satisfy it."""
        visits[0] -= 1
        if depth > MAX_DEPTH or visits[0] < 0:
            raise _TooMuch
        if not isinstance(schema, dict):
            return [] if schema is False else [{}]
        parts = [[{key: value for key, value in schema.items() if key not in _COMBINED}]]
        if isinstance(schema.get("$ref"), str):
            parts.append(self._plain(self._target(schema["$ref"]), depth + 1, visits))
        for part in _list(schema, "allOf"):
            parts.append(self._plain(part, depth + 1, visits))
        for key in ("anyOf", "oneOf"):
            if options := _list(schema, key):
                parts.append([plain for option in options
                              for plain in self._plain(option, depth + 1, visits)])
        return _products(parts)

    def _target(self, reference: str) -> Any:
        """What a local reference points at; True (anything) if it leads nowhere."""
        found = self.root
        if not reference.startswith("#"):
            return True
        for name in unquote(reference[1:]).split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                return True
        return found if reference[1:2] in ("", "/") else True


def kinds(plain: dict) -> tuple[str, ...]:
    """The types that a plain schema lets through; without any it tells by its other words."""
    named = plain.get("type")
    named = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    if found := tuple(kind for kind in KINDS if kind in named):
        return found
    if not named and any(key in plain for key in _OF_OBJECTS):
        return ("object",)
    if not named and any(key in plain for key in _OF_ARRAYS):
        return ("array",)
    return KINDS


def values(plain: dict) -> list | None:
    """The values that a plain schema names, if it does."""
    named = [plain["const"]] if "const" in plain else plain.get("enum")
    if not isinstance(named, list) or not named:
        return None
    allowed = kinds(plain) if "type" in plain else KINDS
    return [value for value in named if kind_of(value) in allowed
            or kind_of(value) == "integer" and "number" in allowed] or named


def kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    kinds_of = {str: "string", int: "integer", float: "number", list: "array"}
    return kinds_of.get(type(value), "object")


def exactly(value: Any) -> dict:
    """The schema of one array or object."""
    if isinstance(value, list):
        return {"type": "array", "prefixItems": [{"const": item} for item in value],
                "items": False, "minItems": len(value)}
    return {"type": "object", "properties": {key: {"const": item} for key, item in value.items()},
            "required": list(value), "additionalProperties": False}


def _products(parts: list[list[dict]]) -> list[dict]:
    """Each alternative of each part merged with each of the others."""
    found = parts[0]
    for part in parts[1:]:
        if len(found) * len(part) > MAX_ALTERNATIVES:
            raise _TooMuch
        merged = (_merged(a, b) for a, b in product(found, part))
        found = [plain for plain in merged if plain is not None]
    return found


def _merged(a: dict, b: dict) -> dict | None:
    """What satisfies both, as far as that is simple; None: nothing does."""
    if not a or not b:
        return a or b
    found = {**b, **a}
    if "type" in a and "type" in b:
        in_both = [kind for kind in KINDS if _lets(a, kind) and _lets(b, kind)]
        if not in_both:
            return None
        found["type"] = in_both
    if isinstance(a.get("enum"), list) and isinstance(b.get("enum"), list):
        found["enum"] = [value for value in a["enum"] if value in b["enum"]]
        if not found["enum"]:
            return None
    if "required" in a and "required" in b:
        found["required"] = _list(a, "required") + _list(b, "required")
    if isinstance(a.get("properties"), dict) and isinstance(b.get("properties"), dict):
        found["properties"] = _both(a["properties"], b["properties"])
    if "items" in a and "items" in b:
        found["items"] = {"allOf": [a["items"], b["items"]]}
    if False in (a.get("additionalProperties"), b.get("additionalProperties")):
        found["additionalProperties"] = False
    return found


def _both(a: dict, b: dict) -> dict:
    return {**b, **a, **{key: {"allOf": [a[key], b[key]]} for key in a if key in b}}


def _lets(plain: dict, kind: str) -> bool:
    return kind in kinds(plain) or kind == "integer" and "number" in kinds(plain)


def _list(schema: dict, key: str) -> list:
    return schema[key] if isinstance(schema.get(key), list) else []
