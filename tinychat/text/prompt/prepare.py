"""A chat in the form that one template can show, where the neutral form would lose a part of it.

Each change answers a trait that was found by rendering; nothing is tried behind the user's back.
"""
import json

from tinychat.text.prompt.traits import Traits
from tinychat.text.prompt.writing import tools_text, written_calls
from tinychat.text.reply.format import Format
from tinychat.text.reply.values import properties_of

RESULT_OPEN, RESULT_CLOSE = "<tool_response>\n", "\n</tool_response>"


def prepared(messages: list[dict], tools: list[dict] | None, traits: Traits,
             owner) -> tuple[list[dict], list[dict] | None]:
    """(messages, tools) for the template; neither argument is changed.

    owner: with `format`, which is asked only where a call has to be written.
    """
    if tools and not traits.shows_tools:
        messages = _with_system(messages, tools_text(tools, owner.format.calls))
        tools = None
    elif tools and not traits.any_schema:
        tools = [_plainer_tool(tool) for tool in tools]
    if any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
        messages = _with_calls(messages, traits, owner)
    if messages and messages[0]["role"] == "system" and not traits.shows_system:
        messages = _system_into_user(messages)
    return _alternating(messages, traits), tools


# Tools, calls and results

def _with_calls(messages: list[dict], traits: Traits, owner) -> list[dict]:
    if not traits.shows_calls:
        messages = [_call_in_content(message, owner.format) for message in messages]
    elif not traits.parallel_calls:
        messages = _one_call_each(messages)
    if traits.shows_calls:
        messages = [_call_for(message, traits) for message in messages]
    return [_result_for(message, traits) for message in messages]


def _call_in_content(message: dict, format: Format) -> dict:
    """The template drops calls: they are written as the model would write them."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    text = written_calls(format.calls, [(call["function"]["name"], call["function"]["arguments"])
                                        for call in calls])
    return {**rest, "content": "\n".join(filter(None, [_text(message), text]))}


def _one_call_each(messages: list[dict]) -> list[dict]:
    """Each call in a message of its own, followed by its result."""
    found: list[dict] = []
    results = {message.get("tool_call_id"): message for message in messages
               if message["role"] == "tool"}
    split: set[str] = set()
    for message in messages:
        calls = message.get("tool_calls") or []
        if message["role"] == "tool" and message.get("tool_call_id") in split:
            continue
        if len(calls) < 2:
            found.append(message)
            continue
        for n, call in enumerate(calls):
            first = message if n == 0 else {"role": "assistant", "content": ""}
            found.append({**first, "tool_calls": [call]})
            if call.get("id") in results:
                found.append(results[call["id"]])
                split.add(call["id"])
    return found


def _call_for(message: dict, traits: Traits) -> dict:
    calls = message.get("tool_calls")
    if not calls:
        return message
    if traits.arguments_as_text:
        calls = [{**call, "function": {**call["function"], "arguments": json.dumps(
            call["function"]["arguments"], ensure_ascii=False)}} for call in calls]
        message = {**message, "tool_calls": calls}
    if message.get("thinking") and message["content"] and not traits.thought_beside_content:
        message = {**message, "content": ""}
    return message


def _result_for(message: dict, traits: Traits) -> dict:
    if message["role"] != "tool":
        return message
    if not traits.shows_results:
        return {"role": "user", "content": f"{RESULT_OPEN}{_text(message)}{RESULT_CLOSE}"}
    if traits.result_stands_in_json and not _is_json(_text(message)):
        return {**message, "content": json.dumps(_text(message), ensure_ascii=False)}
    return message


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _plainer_tool(tool: dict) -> dict:
    function = tool["function"]
    return {**tool, "function": {**function, "parameters": _plainer(function["parameters"], 0)}}


def _plainer(schema, depth: int):
    """First type that is not null, a description everywhere, `additionalProperties` on objects."""
    if not isinstance(schema, dict) or depth > 20:
        return {"type": "string", "description": ""}
    choices = [one for key in ("anyOf", "oneOf") for one in schema.get(key) or ()
               if isinstance(one, dict) and one.get("type") != "null"]
    if choices and "type" not in schema:
        schema = {**choices[0], **{key: value for key, value in schema.items()
                                   if key not in ("anyOf", "oneOf")}}
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "string")
    plain = {"type": kind, "description": str(schema.get("description") or "")}
    if isinstance(schema.get("enum"), list):
        plain["enum"] = schema["enum"]
    if kind == "object":
        plain["properties"] = {key: _plainer(one, depth + 1)
                               for key, one in properties_of(schema).items()}
        plain["required"] = schema.get("required") or []
        others = schema.get("additionalProperties")
        plain["additionalProperties"] = _plainer(others, depth + 1)
    if kind == "array":
        plain["items"] = _plainer(schema.get("items"), depth + 1)
    return plain


# Roles

def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(
        part["text"] for part in content if isinstance(part, dict) and "text" in part)


def _joined(first, second):
    """Two contents with an empty line between; either may be a list of parts."""
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(filter(None, [first, second]))
    parts = [[{"type": "text", "text": f"{one}\n\n"}] if isinstance(one, str) else list(one)
             for one in (first, second)]
    return [*parts[0], *parts[1]]


def _with_system(messages: list[dict], text: str) -> list[dict]:
    if messages and messages[0]["role"] == "system":
        system, *rest = messages
        return [{**system, "content": _joined(system["content"], text)}, *rest]
    return [{"role": "system", "content": text}, *messages]


def _system_into_user(messages: list[dict]) -> list[dict]:
    system, *rest = messages
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return [{**system, "role": "user"}, *rest]
    content = _joined(system["content"], rest[first]["content"])
    return [*rest[:first], {**rest[first], "content": content}, *rest[first + 1:]]


def _alternating(messages: list[dict], traits: Traits) -> list[dict]:
    """Neighbours of one role become one message where the template demands that roles alternate."""
    pairs = list(zip(messages, messages[1:]))
    if any(a["role"] == b["role"] == "user" for a, b in pairs) and not traits.same_role_twice:
        found: list[dict] = []
        for message in messages:
            if found and message["role"] == found[-1]["role"] == "user":
                content = _joined(found[-1]["content"], message["content"])
                found[-1] = {**found[-1], "content": content}
            else:
                found.append(message)
        messages = found
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), None)
    if first is not None and messages[first]["role"] == "assistant" \
            and not traits.begins_with_assistant:
        messages = [*messages[:first], {"role": "user", "content": ""}, *messages[first:]]
    return messages
