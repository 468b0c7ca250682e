"""JSON-RPC 2.0 messages: build, read, sort, match. Pure: bytes and dicts, no I/O.

Source: the MCP specification, "Base protocol"; JSON-RPC 2.0.
"""
import itertools
import json
import logging
import re
from typing import Any

from tinychat.mcp.errors import ProtocolError, ServerError

log = logging.getLogger(__name__)

METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
HEADER_MISMATCH = -32020
MISSING_CAPABILITY = -32021
UNSUPPORTED_VERSION = -32022

MAX_DEPTH = 200  # of what a tool answers; json itself gives up near the depth of Python's own stack

# One escape of JSON text at a time; group 1: half of a surrogate pair that lacks the other.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
                     r"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL)


class Ids:
    """Integers for the requests of one connection: rising, never used again."""

    def __init__(self):
        self._count = itertools.count(1)

    def next(self) -> int:
        return next(self._count)


def request(id: int, method: str, params: dict | None = None) -> dict:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params or {}}


def notification(method: str, params: dict | None = None) -> dict:
    return {"jsonrpc": "2.0", "method": method, "params": params or {}}


def dumps(message: dict) -> bytes:
    """One line of ASCII: no reader of lines can cut it, and surrogates stay escapes.

    Raises: ProtocolError for what JSON cannot say (NaN, nesting without end).
    """
    try:
        return json.dumps(message, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"the message cannot be written as JSON: {error}") from None


def loads(data: bytes | str) -> Any:
    """A value that can be encoded again: lone surrogates become U+FFFD.

    Raises: ProtocolError, whatever `data` is. NaN and infinities are no JSON.
    """
    try:
        if isinstance(data, bytes):
            data = data.decode("utf-8-sig", "replace")
        if "\\ud" in data or "\\uD" in data:
            data = _ESCAPE.sub(lambda escape: "\\ufffd" if escape[1] else escape[0], data)
        return json.loads(data, parse_constant=_no_number, parse_float=_float)
    except (ValueError, RecursionError) as error:  # also integers of more than 4300 digits
        raise ProtocolError(f"expected JSON, got {data[:60]!r}: {error}") from None


def _no_number(name: str):
    raise ValueError(f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large")
    return value


def members(value: Any) -> list[dict]:
    """The messages in what a server sent: one, or those of a batch; noise is left out."""
    found = value if isinstance(value, list) else [value]
    messages = [message for message in found if kind_of(message)]
    if len(messages) < len(found):
        log.debug("skipped %d values that are no JSON-RPC messages", len(found) - len(messages))
    return messages


def kind_of(message: Any) -> str | None:
    """"request", "notification" or "answer"; None for noise.

    An object with nothing but an integer id is an answer too, if a broken one: whoever waits for
    it shall not wait in vain.
    """
    if not isinstance(message, dict):
        return None
    if isinstance(message.get("method"), str):
        return "request" if message.get("id") is not None else "notification"
    if "result" in message or "error" in message or type(message.get("id")) is int:
        return "answer"
    return None


def answers(message: dict, id: int) -> bool:
    """Is this the answer to the request `id`? A boolean or a float is never an id."""
    return kind_of(message) == "answer" and type(message.get("id")) is int and message["id"] == id


def is_nobodys_error(message: dict) -> bool:
    """An error that names no request: as the body of an HTTP answer it is that request's."""
    return "error" in message and message.get("id") is None and kind_of(message) == "answer"


def result_of(answer: dict, http_status: int | None = None) -> dict:
    """The result of an answer. Raises: ServerError for its error, ProtocolError for nonsense."""
    if "error" in answer and answer["error"] is not None:
        raise error_of(answer["error"], http_status)
    result = answer.get("result")
    if not isinstance(result, dict):
        raise ProtocolError(f"expected a result object, got {json_type(result)}")
    return result


def error_of(error: Any, http_status: int | None = None) -> ServerError | ProtocolError:
    """A server's error object as an exception."""
    if not isinstance(error, dict):
        return ProtocolError(f"expected an error object, got {json_type(error)}",
                             http_status=http_status)
    code, message = error.get("code"), error.get("message")
    return ServerError(message if isinstance(message, str) and message.strip() else
                       f"error {code} without a message",
                       rpc_code=code if type(code) is int else None, data=error.get("data"),
                       http_status=http_status)


def reply_to(message: dict) -> dict:
    """What a server's request gets: we know `ping` alone."""
    if message["method"] == "ping":
        return {"jsonrpc": "2.0", "id": message["id"], "result": {}}
    return {"jsonrpc": "2.0", "id": message["id"], "error": {
        "code": METHOD_NOT_FOUND, "message": f"{message['method'][:100]} is not supported"}}


def progress_token(message: dict) -> Any:
    """The token of a progress notification, else None."""
    params = message.get("params")
    if message.get("method") == "notifications/progress" and isinstance(params, dict):
        return params.get("progressToken")
    return None


def shows_progress(message: dict, id: int) -> bool:
    """Is this a sign of life of the request `id`, whose id is its progress token?"""
    token = progress_token(message)
    return type(token) is int and token == id


def check_depth(value: Any) -> None:
    """Raises: ProtocolError for what is nested so deep that later code might stumble over it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return
    raise ProtocolError(f"expected at most {MAX_DEPTH} levels of nesting, got more")


def json_type(value: Any) -> str:
    """The name of a value's JSON type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", list: "an array", str: "a string"}
    return names.get(type(value), "a number")
