"""The one family of exceptions that leaves this package, whatever a server does."""
from typing import Any

from tinychat.errors import TinychatError

MAX_MESSAGE = 2_000  # characters of what is told of a server


def one_line(text: str, n_most: int = MAX_MESSAGE) -> str:
    """Text of a stranger for messages and logs: printable, on one line, not too long."""
    text = text[:4 * n_most]
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= n_most else line[:n_most - 1] + "…"


class McpError(TinychatError):
    """A fault with an MCP server.

    rpc_code, data: of a JSON-RPC error; http_status: of the HTTP answer that said so.
    """

    type = "mcp_connection_error"
    code = "connection_failed"

    def __init__(self, message: str, *, rpc_code: int | None = None, data: Any = None,
                 http_status: int | None = None, code: str | None = None):
        super().__init__(one_line(message), code=code)
        self.rpc_code, self.data, self.http_status = rpc_code, data, http_status


class Refused(McpError):
    """Not done, by a rule of ours: an address, a header, a redirect, a setting."""


class Unreachable(McpError):
    """No connection, no process, or it broke."""


class ProtocolError(McpError):
    """The server said something that the protocol does not know."""


class TimedOut(McpError):
    """The server took too long."""


class CalledOff(McpError):
    """Nobody waits for the answer any more."""


class ServerError(McpError):
    """The server answered with an error."""
