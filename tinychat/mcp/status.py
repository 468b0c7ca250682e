"""What an HTTP status of 400 and above means to a user."""
from tinychat.mcp import jsonrpc
from tinychat.mcp.errors import McpError, ServerError, TimedOut, one_line
from tinychat.mcp.http import Answer, Door

MAX_TEXT = 200       # characters shown of a body that is no JSON-RPC error
SHORTEST_SECRET = 6  # shorter values of headers stay in a text: they are words, not keys


def refusal(answer: Answer, door: Door, session: str | None = None) -> ServerError:
    """The error that an answer with such a status is. Reads of its body what it takes.

    A server may repeat what it was told: the user's header values and the session are cut out.
    """
    error, text = _said(answer, door)
    status = f"HTTP {answer.status} {answer.reason}".strip()
    if answer.status == 401:
        message = _unauthorized(answer, f"{door.url.where}: {status}", text)
    elif error:
        message = text
    else:
        message = f"{door.url.where}: {status}" + (f": {text}" if text else "")
    if answer.status in (429, 503) and answer.header("retry-after"):
        message += f" (Retry-After: {answer.header('retry-after')[:40]})"
    for value in (*door.headers.values(), session or ""):
        for secret in (value, value.rpartition(" ")[2]):  # "Bearer x", and x
            if len(secret) >= SHORTEST_SECRET:
                message = message.replace(secret, "…")
    return ServerError(message, rpc_code=error.rpc_code if error else None,
                       data=error.data if error else None, http_status=answer.status)


def _said(answer: Answer, door: Door) -> tuple[McpError | None, str]:
    """The JSON-RPC error in the body if it is one, and what the server says in words."""
    try:
        body = answer.start(door.limits.error_bytes)
    except TimedOut:  # the status is known, and says more
        return None, ""
    try:
        for message in jsonrpc.members(jsonrpc.loads(body)):
            if isinstance(message.get("error"), dict):
                error = jsonrpc.error_of(message["error"], answer.status)
                return error, error.message
    except McpError:
        pass
    kind = answer.content_type
    readable = not kind or kind.startswith("text/") or "json" in kind or "xml" in kind
    return None, one_line(body.decode("utf-8", "replace"), MAX_TEXT) if readable else ""


def _unauthorized(answer: Answer, start: str, text: str) -> str:
    message = (f"{start}: the server wants credentials, which go into `headers` "
               "(Authorization: Bearer …)")
    if "resource_metadata" in answer.header("www-authenticate").lower():
        message += "; it announces OAuth, and tinychat signs in nowhere by itself"
    return message + (f"; it says: {text}" if text else "")
