"""Tools as a model knows them: by names it can spell, with schemas it can hold. Pure.

The wire to a server and the answer to the user carry the server's own names and schemas.
"""
import hashlib
import re
from dataclasses import dataclass

from tinychat.mcp.blocks import failure, output_of, text_for_model
from tinychat.mcp.listing import Tool
from tinychat.mcp.schemas import prompt_schema

__all__ = ["Exposed", "Tool", "definition", "expose", "failure", "output_of", "prompt_schema",
           "text_for_model"]

MAX_NAME = 64
MAX_DESCRIPTION = 4_000
_STRANGE = re.compile("[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class Exposed:
    """name: for the model. server: the position among those that were exposed."""

    name: str
    tool: Tool
    server: int


def expose(servers: list[tuple[str, list[Tool]]]) -> list[Exposed]:
    """All tools of all servers (label, tools), under names that differ: [A-Za-z0-9_-]{1,64}.

    The first of two equal names stays as it is, each later one gets its label in front. Names
    depend on the order of the servers, but not on that of a server's tools: some change it.
    """
    taken: set[str] = set()
    found: list[Exposed] = []
    for position, (label, tools) in enumerate(servers):
        names: dict[str, str] = {}
        for own in sorted({tool.name for tool in tools}, key=lambda own: (own != fit(own), own)):
            names[own] = _free(own, label, position, taken)
            taken.add(names[own])
        found += [Exposed(names[tool.name], tool, position) for tool in tools]
    return found


def _free(own: str, label: str, position: int, taken: set[str]) -> str:
    labelled = f"{label}__{own}"
    for name in (fit(own), fit(labelled)):
        if name not in taken:
            return name
    while (name := _hashed(labelled, f"{position} {labelled}")) in taken:
        position += 1
    return name


def fit(name: str) -> str:
    """The name in the letters and the length that models and grammars take."""
    plain = _STRANGE.sub("_", name)
    return plain if len(plain) <= MAX_NAME else _hashed(name, name)


def _hashed(name: str, of: str) -> str:
    digest = hashlib.sha256(of.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{_STRANGE.sub('_', name)[:MAX_NAME - 9]}_{digest}"


def definition(exposed: Exposed) -> dict:
    """What chat templates know as a tool: OpenAI's notation."""
    tool = exposed.tool
    description = tool.description
    if len(description) > MAX_DESCRIPTION:
        description = description[:MAX_DESCRIPTION - 1] + "…"
    # Templates walk through `properties`, which a tool without arguments may lack.
    parameters = {"type": "object", "properties": {}, **prompt_schema(tool.input_schema, tool.name)}
    return {"type": "function", "function": {"name": exposed.name, "description": description,
                                             "parameters": parameters}}
