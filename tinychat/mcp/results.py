"""What the answer to tools/call comes to. Pure."""
import re
from dataclasses import dataclass
from typing import Any

from tinychat.mcp import jsonrpc
from tinychat.mcp.errors import ProtocolError


# How the servers of two SDKs say it in a result; others answer with a JSON-RPC error.
_UNKNOWN = re.compile(r"unknown tool|tool .{1,600} not found", re.IGNORECASE)


@dataclass(frozen=True)
class CallResult:
    """What a tool answered. is_error: the tool failed, not the call.

    content: the blocks as sent. structured: any JSON value since 2026-07-28, None for none.
    """

    content: list
    structured: Any
    is_error: bool


def call_result(result: dict) -> CallResult:
    """Raises: ProtocolError when later code could not handle it."""
    content = result.get("content")
    if content is not None and not isinstance(content, list):
        raise ProtocolError(f"expected a list as content, got {jsonrpc.json_type(content)}")
    structured = result.get("structuredContent")
    jsonrpc.check_depth([content, structured])
    return CallResult(content or [], structured, result.get("isError") is True)


def says_unknown(result: CallResult) -> bool:
    """Is it a failure because there is no such tool (any more)?"""
    first = result.content[0] if result.is_error and result.content else None
    text = first.get("text") if isinstance(first, dict) else None
    return isinstance(text, str) and _UNKNOWN.search(text[:1_000]) is not None


def check_complete(result: dict) -> None:
    """Raises: ProtocolError for a result of another type; only the stateless era has types."""
    kind = result.get("resultType", "complete")
    if kind != "complete":
        raise ProtocolError(f"expected a complete result, got one of type {str(kind)[:60]!r}")


def state_to_send(result: dict) -> str | None:
    """The state with which a call goes on where its result is not there yet; None when it is.

    Raises: ProtocolError when the server asks for what we never offered, or for nothing.
    """
    if result.get("resultType") != "input_required":
        check_complete(result)
        return None
    if asked := result.get("inputRequests"):
        wanted = [one.get("method") if isinstance(one, dict) else None
                  for one in (asked.values() if isinstance(asked, dict) else ())]
        raise ProtocolError("the tool asks for input, which tinychat does not give: "
                            + (", ".join(sorted({str(method)[:60] for method in wanted}))
                               or "in a way that the protocol does not know"))
    state = result.get("requestState")
    if not isinstance(state, str):
        raise ProtocolError("the tool asks for input without saying which")
    return state
