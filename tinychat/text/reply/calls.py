"""Is a call one of the offered tools', with arguments that the tool's schema accepts?

Checked are type, required, enum, const, additionalProperties, items and nested properties, anyOf,
oneOf, allOf and references inside the schema; patterns, formats and bounds are the server's affair.
"""
from dataclasses import dataclass
from typing import Any

from tinychat.text.reply.values import KINDS, is_of, kind_of, properties_of

MAX_DEPTH = 64


@dataclass(frozen=True)
class CallStarted:
    """The name of a call to an offered tool is complete."""

    tool: str


@dataclass(frozen=True)
class Call:
    tool: str
    arguments: dict

    def to_item(self) -> dict:
        return {"type": "tool_call", "tool": self.tool, "arguments": self.arguments}


@dataclass(frozen=True)
class InvalidCall:
    """kind: invalid_name or invalid_arguments; arguments: None when they are no object."""

    kind: str
    tool: str
    reason: str
    arguments: dict | None = None

    def metadata(self) -> dict:
        found = {"type": self.kind, "tool_name": self.tool}
        return found if self.arguments is None else {**found, "arguments": self.arguments}

    def to_item(self) -> dict:
        return {"type": "invalid_tool_call", "reason": self.reason, "metadata": self.metadata()}


def started(name: str, schemas: dict[str, dict]) -> CallStarted | InvalidCall:
    """What is told once the name of a call is complete."""
    return CallStarted(name) if name in schemas else unknown_tool(name)


def unfinished(name: str, arguments: dict | None) -> InvalidCall:
    """A call to an offered tool that the end of the generation cut off."""
    return InvalidCall("invalid_arguments", name, f"The call of {name} was not finished.", arguments)


def unknown_tool(name: str) -> InvalidCall:
    return InvalidCall("invalid_name", name, f"Cannot find tool with name {name}.")


def judge(name: str, arguments: Any, schemas: dict[str, dict]) -> Call | InvalidCall:
    """schemas: the inputSchema of each offered tool. arguments: None when they are no object."""
    if name not in schemas:
        return unknown_tool(name)
    if not isinstance(arguments, dict):
        return InvalidCall("invalid_arguments", name, f"The arguments of {name} are not a complete "
                                                      "JSON object.")
    fault = fault_in(arguments, schemas[name])
    if fault:
        return InvalidCall("invalid_arguments", name, f"Invalid arguments for {name}: {fault}",
                           arguments)
    return Call(name, arguments)


def fault_in(value: Any, schema: Any) -> str | None:
    """What the schema does not accept, and where; None when it accepts the value."""
    return _Check(schema).fault(value, schema, "arguments", 0)


class _Check:
    def __init__(self, root: Any):
        self.root = root
        self.n_steps = 0

    def fault(self, value: Any, schema: Any, at: str, depth: int) -> str | None:
        self.n_steps += 1
        if schema is False:
            return f"{at} is not allowed"
        if not isinstance(schema, dict) or depth > MAX_DEPTH or self.n_steps > 100_000:
            return None
        if isinstance(schema.get("$ref"), str):
            target = self._resolve(schema["$ref"])
            if target is not None and (fault := self.fault(value, target, at, depth + 1)):
                return fault
        return (_fault_of_type(value, schema.get("type"), at)
                or _fault_of_value(value, schema, at)
                or self._fault_of_choice(value, schema, at, depth)
                or (self._fault_of_object(value, schema, at, depth) if isinstance(value, dict) else
                    self._fault_of_items(value, schema, at, depth) if isinstance(value, list) else
                    None))

    def _resolve(self, ref: str) -> Any:
        if not ref.startswith("#"):
            return None
        found = self.root
        for part in filter(None, ref[1:].split("/")):
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict):
                found = found.get(part)
            elif isinstance(found, list) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            else:
                return None
        return found

    def _fault_of_choice(self, value, schema: dict, at: str, depth: int) -> str | None:
        for part in _list_in(schema, "allOf"):
            if fault := self.fault(value, part, at, depth + 1):
                return fault
        for key in ("anyOf", "oneOf"):
            choices = _list_in(schema, key)
            faults = [self.fault(value, choice, at, depth + 1) for choice in choices]
            if faults and None not in faults:
                return faults[0] if len(faults) == 1 else f"{at} fits none of its forms"
        return None

    def _fault_of_object(self, value: dict, schema: dict, at: str, depth: int) -> str | None:
        for name in _list_in(schema, "required"):
            if isinstance(name, str) and name not in value:
                return f"{at}.{name} is missing"
        properties = properties_of(schema)
        others = schema.get("additionalProperties")
        if isinstance(schema.get("patternProperties"), dict):
            others = None
        for name, item in value.items():
            inner = properties.get(name, others)
            if name not in properties and others is False:
                return f"{at}.{name} is not a parameter"
            if fault := self.fault(item, inner, f"{at}.{name}", depth + 1):
                return fault
        return None

    def _fault_of_items(self, value: list, schema: dict, at: str, depth: int) -> str | None:
        first = _list_in(schema, "prefixItems")
        for i, item in enumerate(value):
            inner = first[i] if i < len(first) else schema.get("items")
            if isinstance(inner, (dict, bool)) and (
                    fault := self.fault(item, inner, f"{at}[{i}]", depth + 1)):
                return fault
        return None


def _list_in(schema: dict, key: str) -> list:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def _fault_of_type(value: Any, kinds: Any, at: str) -> str | None:
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    kinds = [kind for kind in kinds if isinstance(kind, str)]
    if not kinds or any(kind not in KINDS or is_of(value, kind) for kind in kinds):
        return None
    return f"{at} must be {' or '.join(kinds)}, not {kind_of(value)}"


def _fault_of_value(value: Any, schema: dict, at: str) -> str | None:
    allowed = _list_in(schema, "enum") or ([schema["const"]] if "const" in schema else [])
    if not allowed or any(_same(value, one) for one in allowed):
        return None
    return f"{at} must be one of {', '.join(map(repr, allowed[:10]))}"


def _same(a: Any, b: Any) -> bool:
    """Equality in JSON, where true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)
