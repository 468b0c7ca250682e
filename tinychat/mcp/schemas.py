"""A tool's input schema as a prompt can hold it: small, whole, without references. Pure.

The server's own schema stays as it is. Nothing of a schema is run or fetched.
"""
import json
import logging
from typing import Any
from urllib.parse import unquote

from tinychat.mcp.errors import one_line
from tinychat.mcp.listing import DATA, MIRROR, NAMED

log = logging.getLogger(__name__)

MAX_DEPTH = 64
MAX_NODES = 5_000         # objects and arrays
MAX_BYTES = 64 << 10      # as JSON
DROPPED = {"$schema", "$id", "$comment", "$defs", "definitions", MIRROR}  # no references remain


class TooMuch(ValueError):
    """The schema is beyond a bound; never leaves this file."""


def prompt_schema(schema: dict, name: str = "a tool") -> dict:
    """A copy with local references in place, recursion cut to {}, and what no model needs dropped.

    {"type": "object"} and a warning where that is too much. name: of the tool, for the warning.
    """
    try:
        copy = _Copier(schema).schema(schema, 0, ("#",))
        if len(json.dumps(copy, ensure_ascii=False).encode("utf-8", "replace")) > MAX_BYTES:
            raise TooMuch(f"it is longer than {MAX_BYTES} bytes")
        return copy
    except TooMuch as error:
        log.warning("the schema of %s is left out of the prompt: %s", one_line(name, 80), error)
        return {"type": "object"}


class _Copier:
    """refs: the references that the schema at hand stands inside."""

    def __init__(self, root: dict):
        self._root, self._n_nodes = root, 0

    def schema(self, value: Any, depth: int, refs: tuple[str, ...]) -> Any:
        """What is no schema becomes the one that allows all."""
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            return {}
        self._count(depth)
        copy = self._referred(value, depth, refs) if "$ref" in value else {}
        for key, inner in value.items():
            if key == "$ref" or key in DROPPED or key in NAMED and not isinstance(inner, dict):
                continue
            if key in NAMED:
                self._count(depth + 1)
                copy[key] = {name: self.schema(one, depth + 2, refs)
                             for name, one in inner.items()}
            elif key in DATA:
                copy[key] = self._data(inner, depth + 1)
            else:
                copy[key] = self._other(inner, depth + 1, refs)
        return copy

    def _referred(self, value: dict, depth: int, refs: tuple[str, ...]) -> dict:
        """What `$ref` leads to within the document; {} where that is nowhere, or round again."""
        ref = value["$ref"]
        if not isinstance(ref, str) or ref in refs:
            return {}
        target = self.schema(self._at(ref), depth + 1, (*refs, ref))
        return target if isinstance(target, dict) else {}

    def _at(self, ref: str) -> Any:
        if not ref.startswith("#/"):
            return None
        found: Any = self._root
        for step in unquote(ref[2:]).split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isascii() and step.isdigit() and len(step) < 6:
                found = dict(enumerate(found)).get(int(step))
            else:
                found = found.get(step) if isinstance(found, dict) else None
        return found

    def _other(self, value: Any, depth: int, refs: tuple[str, ...]) -> Any:
        """Under a keyword that may hold a schema, or several."""
        if isinstance(value, dict):
            return self.schema(value, depth, refs)
        if isinstance(value, list):
            self._count(depth)
            return [self._other(inner, depth + 1, refs) for inner in value]
        return value

    def _data(self, value: Any, depth: int) -> Any:
        if not isinstance(value, (dict, list)):
            return value
        self._count(depth)
        if isinstance(value, dict):
            return {key: self._data(inner, depth + 1) for key, inner in value.items()}
        return [self._data(inner, depth + 1) for inner in value]

    def _count(self, depth: int) -> None:
        self._n_nodes += 1
        if self._n_nodes > MAX_NODES:
            raise TooMuch(f"it has more than {MAX_NODES} parts")
        if depth > MAX_DEPTH:
            raise TooMuch(f"it is nested deeper than {MAX_DEPTH}")
