"""JSON-RPC 2.0 messages: build, read, sort, match. Pure: bytes and dicts, no I/O.

Source: the MCP specification, "Base protocol"; JSON-RPC 2.0.
"""
import itertools
import json
import logging
from typing import Any

from tinychat.mcp.errors import ProtocolError, ServerError

log = logging.getLogger(__name__)

METHOD_NOT_FOUND = -32601


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
    """Raises: ProtocolError, whatever `data` is. NaN and infinities are no JSON."""
    try:
        if isinstance(data, bytes):
            data = data.decode("utf-8-sig", "replace")
        return json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # also integers of more than 4300 digits
        raise ProtocolError(f"expected JSON, got {data[:60]!r}: {error}") from None


def _no_number(name: str):
    raise ValueError(f"{name} is no JSON number")


def members(value: Any) -> list[dict]:
    """The messages in what a server sent: one, or those of a batch; noise is left out."""
    found = value if isinstance(value, list) else [value]
    messages = [message for message in found if kind_of(message)]
    if len(messages) < len(found):
        log.debug("skipped %d values that are no JSON-RPC messages", len(found) - len(messages))
    return messages


def kind_of(message: Any) -> str | None:
    """"request", "notification" or "answer"; None for noise."""
    if not isinstance(message, dict):
        return None
    if isinstance(message.get("method"), str):
        return "request" if message.get("id") is not None else "notification"
    return "answer" if "result" in message or "error" in message else None


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


def json_type(value: Any) -> str:
    """The name of a value's JSON type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", list: "an array", str: "a string"}
    return names.get(type(value), "a number")
