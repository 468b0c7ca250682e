"""Turns and items -> messages in the neutral form that templates take."""
import itertools
import json
from collections.abc import Iterable, Iterator

from tinychat.contract import ChatRequest, ImageItem, TextItem
from tinychat.mcp.results import CallResult
from tinychat.mcp.tools import text_for_model
from tinychat.store import Turn

MAX_RESULT_CHARS = 8_000  # that the model reads of a result in an earlier turn
TEXT, CALLS = ("message", "reasoning"), ("tool_call", "invalid_tool_call")


class CallIds:
    """Ids for the calls of one prompt: nine letters and digits, which two templates demand."""

    def __init__(self):
        self._count = itertools.count(1)

    def next(self) -> str:
        return f"call{next(self._count):05d}"


def messages_of(turns: list[Turn], system_prompt: str | None, request: ChatRequest,
                ids: CallIds) -> list[dict]:
    """The conversation up to the request's input."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for turn in turns:
        messages += [_user_message(turn.input), *_assistant_messages(turn.output, ids)]
    return messages + [_user_message(request.input)]


def images_of(turns: list[Turn], request: ChatRequest) -> list[ImageItem]:
    """The images of the conversation, in the order in which `messages_of` has them."""
    return [item for items in (*(turn.input for turn in turns), request.input) for item in items
            if isinstance(item, ImageItem)]


def _user_message(items: tuple[TextItem | ImageItem, ...]) -> dict:
    """Neighbouring texts are joined; with images among them the content is a list of parts."""
    parts: list[dict] = []
    for item in items:
        if isinstance(item, ImageItem):
            parts.append({"type": "image"})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += "\n" + item.content
        else:
            parts.append({"type": "text", "text": item.content})
    if len(parts) == 1 and parts[0]["type"] == "text":
        return {"role": "user", "content": parts[0]["text"]}
    return {"role": "user", "content": parts}


def _assistant_messages(output: Iterable[dict], ids: CallIds) -> Iterator[dict]:
    """The messages of one turn: a text, or a text with the calls that follow it and their results."""
    for items in _rounds(output):
        calls = [(_call(item), _result(item)) for item in items if item["type"] in CALLS]
        yield from round_messages(items, calls, ids)
    if not output:
        yield {"role": "assistant", "content": ""}


def _rounds(output: Iterable[dict]) -> list[list[dict]]:
    """Items cut where a text follows a call: there the model had read the results."""
    rounds: list[list[dict]] = []
    for item in output:
        if not rounds or item["type"] in TEXT and rounds[-1][-1]["type"] in CALLS:
            rounds.append([])
        rounds[-1].append(item)
    return rounds


def _call(item: dict) -> tuple[str, dict]:
    if item["type"] == "tool_call":
        return item["tool"], item["arguments"]
    return item["metadata"]["tool_name"], item["metadata"].get("arguments") or {}


def _result(item: dict) -> str:
    if item["type"] == "invalid_tool_call":
        return item["reason"]
    try:
        content = json.loads(item["output"])
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, list):
        return item["output"]
    return text_for_model(CallResult(content, None, False), MAX_RESULT_CHARS)


def round_messages(items: Iterable[dict], calls: list[tuple[tuple[str, dict], str]],
                   ids: CallIds) -> list[dict]:
    """What the model said in one round, and what its calls gave.

    calls: ((name that the model used, arguments), what it reads of the result).
    """
    def joined(kind: str) -> str:
        return "\n".join(item["content"] for item in items if item["type"] == kind)

    message = {"role": "assistant", "content": joined("message")}
    thought = joined("reasoning")
    if thought:  # under each name that a template may look for
        message.update(reasoning_content=thought, thinking=thought, reasoning=thought)
    if not calls:
        return [message]
    results = []
    message["tool_calls"] = []
    for (name, arguments), text in calls:
        id = ids.next()
        message["tool_calls"].append({"id": id, "type": "function", "function": {
            "name": name, "arguments": arguments}})
        results.append({"role": "tool", "content": text, "tool_call_id": id, "name": name})
    return [message, *results]
