"""A whole generation -> items, with the template's own format: what `tinychat.parse_output` does."""
from collections.abc import Iterable
from typing import Any

from tinychat.text.prompt.forms import whole_tool
from tinychat.text.reply.calls import Call, InvalidCall
from tinychat.text.reply.channels import ChannelParser
from tinychat.text.reply.emitter import Event
from tinychat.text.reply.format import Format
from tinychat.text.reply.parser import Parser


def parser_for(format: Format, schemas: dict[str, dict], prefill: str) -> Parser | ChannelParser:
    """A parser of one generation. schemas: the inputSchema of each offered tool by its name."""
    if format.frame:
        return ChannelParser(format.frame, schemas, prefill)
    return Parser(format, schemas, prefill)


def schemas_of(tools: Iterable[dict]) -> dict[str, dict]:
    """OpenAI-style functions -> the schema of each by its name. Raises: InvalidRequest."""
    functions = [whole_tool(tool)["function"] for tool in tools]
    return {one["name"]: one["parameters"] or {} for one in functions}


def items(events: list[Event]) -> list[dict[str, Any]]:
    """Events as items: pieces of one text are one item."""
    found: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, tuple):
            kind, text = event
            if found and found[-1]["type"] == kind:
                found[-1]["content"] += text
            else:
                found.append({"type": kind, "content": text})
        elif isinstance(event, (Call, InvalidCall)):
            found.append(event.to_item())
    return found
