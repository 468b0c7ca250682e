"""What a server's list of tools comes to: which are kept, what a call of each repeats. Pure.

One bad tool never costs the others.
"""
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tinychat.mcp import headers, jsonrpc
from tinychat.mcp.errors import ProtocolError, one_line
from tinychat.mcp.limits import Limits

log = logging.getLogger(__name__)

MIRROR = "x-mcp-header"
MIRRORED_TYPES = ("string", "integer", "boolean")
MAX_NAME = 512
DATA = ("default", "const", "enum", "examples")  # of a schema: they hold values, not schemas
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

Path = tuple[str, ...]  # names of properties, from the root


@dataclass(frozen=True)
class Tool:
    """A tool as its server lists it. mirrors: (where an argument is, its header) for HTTP."""

    name: str
    description: str
    input_schema: dict
    mirrors: tuple[tuple[Path, str], ...] = ()


@dataclass
class Listing:
    """The tools of all pages so far."""

    limits: Limits
    where: str
    over_http: bool  # and in the stateless era: arguments may be mirrored
    tools: dict[str, Tool] = field(default_factory=dict)
    n_bytes: int = 0
    n_seen: int = 0
    n_left_out: int = 0

    def add(self, page: dict) -> None:
        """Raises: ProtocolError when there is no list at all."""
        found = page.get("tools")
        if not isinstance(found, list):
            raise ProtocolError(f"{self.where}: expected a list of tools, got "
                                f"{jsonrpc.json_type(found)}")
        looked_at = found[:self.limits.tools_seen - self.n_seen]
        self.n_seen += len(looked_at)
        self.n_left_out += len(found) - len(looked_at)
        for value in looked_at:
            self._add(value)

    def _add(self, value: Any) -> None:
        try:
            tool = tool_of(value, self.over_http)
            if tool.name in self.tools:
                raise ProtocolError("there is one of this name already")
            n_bytes = self.n_bytes + len(jsonrpc.dumps(value))
        except ProtocolError as error:
            name = value.get("name") if isinstance(value, dict) else None
            log.info("%s: left out the tool %s: %s", self.where, one_line(repr(name), 80), error)
            return
        if len(self.tools) >= self.limits.tools or n_bytes > self.limits.tools_bytes:
            self.n_left_out += 1
            return
        self.n_bytes = n_bytes
        self.tools[tool.name] = tool


def all_tools(fetch: Callable[[dict], dict], limits: Limits, where: str, over_http: bool
              ) -> tuple[list[Tool], dict]:
    """Follows the pages to the end. fetch: the params of tools/list -> its result.

    Returns the tools and the last page. Raises: ProtocolError for pages without end; what fetch
    raises.
    """
    listing, seen, params = Listing(limits, where, over_http), set(), {}
    for _ in range(limits.pages):
        page = fetch(params)
        listing.add(page)
        cursor = page.get("nextCursor")
        if cursor is None:
            if listing.n_left_out:
                log.warning("%s: left out %d tools: %d are taken of a server", where,
                            listing.n_left_out, len(listing.tools))
            return list(listing.tools.values()), page
        if not isinstance(cursor, str) or cursor in seen:
            raise ProtocolError(f"{where}: the list of tools has no end: a cursor came "
                                f"{'twice' if isinstance(cursor, str) else 'that is no string'}")
        seen.add(cursor)
        params = {"cursor": cursor}
    raise ProtocolError(f"{where}: the list of tools has more than {limits.pages} pages")


def tool_of(value: Any, over_http: bool) -> Tool:
    """Raises: ProtocolError with the reason why it is of no use to us."""
    if not isinstance(value, dict):
        raise ProtocolError(f"expected an object, got {jsonrpc.json_type(value)}")
    name, schema = value.get("name"), value.get("inputSchema")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise ProtocolError(f"expected a name of 1 to {MAX_NAME} characters")
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise ProtocolError("expected an inputSchema of type object")
    execution = value.get("execution")
    if isinstance(execution, dict) and execution.get("taskSupport") == "required":
        raise ProtocolError("it runs as a task only, and tinychat has no tasks")
    description = value.get("description")
    return Tool(name, description if isinstance(description, str) else "", schema,
                tuple(mirrors_of(schema)) if over_http else ())


def mirrors_of(schema: dict) -> Iterator[tuple[Path, str]]:
    """The annotated properties. Raises: ProtocolError for an annotation that is not sound.

    Source: MCP 2026-07-28, "Tools", x-mcp-header.
    """
    seen = set()
    for path, inner in _schemas(schema):
        if MIRROR not in inner:
            continue
        name = inner[MIRROR]
        if not path:
            raise ProtocolError(f"{MIRROR} stands where no plain property is")
        if not isinstance(name, str) or not headers.TOKEN.fullmatch(name):
            raise ProtocolError(f"{MIRROR} is not the name of a header")
        if inner.get("type") not in MIRRORED_TYPES:
            raise ProtocolError(f"{MIRROR} {name[:60]} is on a type other than string, integer and "
                                "boolean")
        if name.lower() in seen:
            raise ProtocolError(f"{MIRROR} {name[:60]} is there twice")
        seen.add(name.lower())
        yield path, name


def _schemas(root: dict) -> Iterator[tuple[Path | None, dict]]:
    """All schemas within one, with their paths; None where properties alone do not lead there."""
    todo: list[tuple[Path | None, Any]] = [((), root)]
    while todo:
        path, schema = todo.pop()
        if isinstance(schema, list):
            todo += [(None, inner) for inner in schema]
        if not isinstance(schema, dict):
            continue
        yield path, schema
        for key, value in schema.items():
            if key in NAMED and isinstance(value, dict):
                plain = key == "properties" and path is not None
                todo += [((*path, name) if plain else None, inner)
                         for name, inner in value.items()]
            elif key not in DATA:
                todo.append((None, value))


def mirrored(tool: Tool | None, arguments: dict) -> dict[str, str]:
    """The headers that repeat a call's arguments. Raises: McpError for a number beyond all size."""
    found = {}
    for path, name in tool.mirrors if tool else ():
        value: Any = arguments
        for step in path:
            value = value.get(step) if isinstance(value, dict) else None
        if isinstance(value, str):
            found[f"Mcp-Param-{name}"] = headers.encode(value)
        elif isinstance(value, (int, bool)):
            found[f"Mcp-Param-{name}"] = jsonrpc.dumps(value).decode()
    return found


def fresh_for(page: dict, limits: Limits) -> float:
    """Seconds for which a list of the stateless era may be used again."""
    ttl_ms = page.get("ttlMs")
    if isinstance(ttl_ms, bool) or not isinstance(ttl_ms, (int, float)):
        return 0.0
    return max(0.0, min(ttl_ms / 1000 if ttl_ms < 1e9 else limits.max_ttl_s, limits.max_ttl_s))
