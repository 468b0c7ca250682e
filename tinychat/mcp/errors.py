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

    def named(self, where: str) -> "McpError":
        """Itself, with a message that says where it happened."""
        if where not in self.message:
            self.message = one_line(f"{where}: {self.message}")
            self.args = (self.message,)
        return self


class Refused(McpError):
    """Not done, by a rule of ours: an address, a header, a redirect, a setting."""


class Unreachable(McpError):
    """No connection, no process, or it broke."""


class NotConnected(Unreachable):
    """It was never reached: no address, no connection, no valid certificate."""


class SessionLost(Unreachable):
    """The server knows us no more, and has done nothing of this request.

    Whoever greets it anew (`initialize`) may send the request again, once. A transport raises this
    before it sends a request to a process that was started again, too.
    """


class ProtocolError(McpError):
    """The server said something that the protocol does not know."""


class TimedOut(McpError):
    """The server took too long."""


class CalledOff(McpError):
    """Nobody waits for the answer any more."""


class ServerError(McpError):
    """The server answered with an error."""
