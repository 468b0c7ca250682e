"""What a client asks of its way to a server, whichever it is: HTTP, HTTP+SSE or stdio."""
from collections.abc import Callable, Mapping
from typing import Protocol

from tinychat.mcp.watch import Watch


class Transport(Protocol):
    """One connection to a server; many threads may use it at once.

    where: the URL (without query and user-info) or the command, for messages.
    on_notification: called with each notification that no exchange consumed, by any thread.
    """

    where: str
    on_notification: Callable[[dict], None]

    def exchange(self, message: dict, watch: Watch, headers: Mapping[str, str] = {}) -> dict:
        """Sends a request, returns the JSON-RPC answer that carries its id (result or error).

        Progress for its id keeps `watch` alive; requests of the server are answered meanwhile. When
        the watch ends it, the server is told (notifications/cancelled, or a closed connection).
        headers: for this request alone (HTTP; ignored elsewhere).
        Raises: SessionLost where the server must be greeted before it takes this request, which it
        has not done: a session that is gone, a process that was started again. Else McpError.
        """

    def notify(self, message: dict, watch: Watch) -> None:
        """Sends a notification. Raises: McpError."""

    def close(self) -> None:
        """Ends the connection, within bounds; may be called again. Never raises."""
