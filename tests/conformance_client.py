"""The client that the official conformance suite tests: what a chat does with a server, and for a model one that calls
each tool once.

Usage: conformance_client.py URL. The suite names the scenario in MCP_CONFORMANCE_SCENARIO, and in
MCP_CONFORMANCE_CONTEXT the calls to make where it wants certain ones.
"""
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing

from tinychat.mcp.client import connect_http
from tinychat.mcp.errors import McpError
from tinychat.mcp.limits import DEFAULT
from tinychat.mcp.tools import Tool, definition, expose, failure, text_for_model
from tinychat.mcp.watch import Watch

PATIENCE_S = 10.0
SAMPLES = {"string": "some text", "number": 1.5, "integer": 2, "boolean": True, "array": [], "null": None}


def main(url: str) -> None:
    scenario = os.environ["MCP_CONFORMANCE_SCENARIO"]
    context = json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT") or "{}")
    with closing(connect_http(url, policy="local", label=scenario)) as client:
        print(f"{scenario}: {client.version}")
        tools = client.tools(watch("tools/list"))
        for one in expose([(scenario, tools)]):
            print(f"shown to the model: {json.dumps(definition(one))[:200]}")
        for name, arguments in calls(tools, context.get("toolCalls")):
            try:
                result = client.call(name, arguments, watch(f"the tool {name}"))
            except McpError as error:  # a chat goes on, and the model reads of it
                result = failure(error)
            print(f"{name}: {text_for_model(result, 1_000)}")


def calls(tools: list[Tool], wanted: list[dict] | None) -> Iterator[tuple[str, dict]]:
    """What the model calls."""
    if wanted is not None:
        yield from ((call["name"], call["arguments"]) for call in wanted)
        return
    for tool in tools:
        arguments = sample(tool.input_schema)
        if tool.name == "json_schema_echo":  # it wants to see the other tool's schema, as we have it
            arguments["schema"] = next(one.input_schema for one in tools if one is not tool)
        yield tool.name, arguments


def sample(schema: dict):
    """A value for every property of a schema that says what type it is."""
    if schema.get("type") == "object":
        return {name: sample(inner) for name, inner in schema.get("properties", {}).items()}
    return SAMPLES.get(schema.get("type"))


def watch(what: str) -> Watch:
    return Watch(DEFAULT.call_s, what=what, patience_s=PATIENCE_S)


if __name__ == "__main__":
    main(sys.argv[1])
