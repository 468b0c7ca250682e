"""What a door allows its chats."""
from collections.abc import Callable
from dataclasses import dataclass

from tinychat.contract import EphemeralServer, Plugin
from tinychat.mcp.plugins import Plugins


@dataclass(frozen=True)
class ChatSettings:
    """heartbeat_s: when given, `run` yields None at least once in so many seconds of silence, so
    that its consumer can look after its client. stopping: once it is true the chat fails, and ends.
    refusal: why an integration is not permitted, None when it is.
    ephemeral_mcp: which addresses the servers of a request may have, "public" or "local" ones too.
    plugins: the servers of mcp.json, None for none. max_tool_rounds: rounds with tool calls, after
    which one last round has no tools. guided_tool_calls: whether a call that has begun is held to
    the tool's schema. mcp_*_s: seconds for a server to be connected and listed, and for one tool
    call without a sign of life.
    """

    heartbeat_s: float | None = None
    stopping: Callable[[], bool] = lambda: False
    refusal: Callable[[Plugin | EphemeralServer], str | None] = lambda integration: None
    ephemeral_mcp: str = "local"
    plugins: Plugins | None = None
    max_tool_rounds: int = 25
    guided_tool_calls: bool = True
    mcp_connect_s: float = 30.0
    mcp_call_s: float = 60.0
