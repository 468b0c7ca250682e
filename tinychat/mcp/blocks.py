"""What a tool answered, as the model reads it and as the user sees it. Pure."""
import base64
import json
import re
from typing import Any

from tinychat.errors import TinychatError
from tinychat.mcp import jsonrpc
from tinychat.mcp.errors import ServerError, one_line
from tinychat.mcp.results import CallResult

MAX_SHOWN = 300  # characters of a type, a name or an address in a note

_HALVES = re.compile("[\ud800-\udfff]")  # of characters: they have no UTF-8


def text_for_model(result: CallResult, budget_chars: int) -> str:
    """The texts, and notes in place of what is none; too long a whole loses its middle."""
    text = "\n".join(map(_shown, _blocks(result)))
    if result.is_error and not text:
        text = "Error: the tool failed and said nothing"
    return cut(_HALVES.sub("\ufffd", text), budget_chars)


def output_of(result: CallResult) -> str:
    """JSON text of the blocks as the server sent them: a tool call's `output` in the contract."""
    return _HALVES.sub("\ufffd", _json(_blocks(result)))


def failure(error: TinychatError) -> CallResult:
    """A call that came to nothing, as a result that the model can read."""
    said = "" if isinstance(error, ServerError) else "the call failed: "
    return CallResult([_text_block(f"Error: {said}{error.message}")], None, True)


def cut(text: str, n_most: int) -> str:
    """Without its middle, where a line says how much is missing."""
    if len(text) <= n_most:
        return text
    n_kept = n_most - len(_mark(len(text)))
    if n_kept <= 0:
        return text[:max(0, n_most)]
    n_end = n_kept // 2
    return text[:n_kept - n_end] + _mark(len(text) - n_kept) + text[len(text) - n_end:]


def _mark(n_missing: int) -> str:
    return f"\n[... {n_missing} characters are left out here ...]\n"


def _blocks(result: CallResult) -> list:
    """Structured content counts where nothing else is text: else it says the same again."""
    if result.structured is None or any(map(_text_of, result.content)):
        return result.content
    return [*result.content, _text_block(_json(result.structured))]


def _text_of(block: Any) -> str:
    """Of a text block; empty for others."""
    is_text = isinstance(block, dict) and block.get("type") == "text"
    return block["text"] if is_text and isinstance(block.get("text"), str) else ""


def _text_block(text: str) -> dict:
    return {"type": "text", "text": text}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ---- one block for the model

def _shown(block: Any) -> str:
    if not isinstance(block, dict):
        return f"[expected a block of content, got {jsonrpc.json_type(block)}]"
    kind = block.get("type")
    if kind == "text" and isinstance(block.get("text"), str):
        return block["text"]
    if kind in ("image", "audio"):  # NOTE: an image becomes a part of its own for models that see
        return f"[{kind} {_word(block, 'mimeType')}, {_size(block.get('data'))}]"
    if kind == "resource" and isinstance(block.get("resource"), dict):
        return _resource(block["resource"])
    if kind == "resource_link":
        return f"[resource {_word(block, 'name')}: {_word(block, 'uri')}]"
    return f"[a block of a kind that is not shown: {_word(block, 'type')}]"


def _resource(resource: dict) -> str:
    if isinstance(resource.get("text"), str):
        return f"{_word(resource, 'uri')}\n{resource['text']}"
    return (f"[resource {_word(resource, 'uri')}, {_word(resource, 'mimeType')}, "
            f"{_size(resource.get('blob'))}]")


def _word(of: dict, key: str) -> str:
    """A short text of the server's."""
    value = of.get(key)
    return one_line(value, MAX_SHOWN) if isinstance(value, str) and value else f"without {key}"


def _size(data: Any) -> str:
    if not isinstance(data, str):
        return "without data"
    try:
        n_bytes = len(base64.b64decode("".join(data.split()), validate=True))
    except ValueError:  # also for what is not ASCII
        return "which is no valid base64"
    for unit, step in (("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= step:
            return f"{n_bytes / step:.0f} {unit}"
    return f"{n_bytes} bytes"
