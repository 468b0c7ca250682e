"""How long and how much: every bound of a conversation with a server, in one place.

Seconds end in _s. Tests make smaller ones; nobody else needs to.
"""
from dataclasses import dataclass

from tinychat.mcp.errors import ProtocolError

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The bounds of the specification's section 10, as far as HTTP and the client know them."""

    connect_s: float = 10.0            # to resolve a name, connect and agree on TLS
    probe_s: float = 5.0               # for `server/discover` to tell the era
    initialize_s: float = 30.0         # over HTTP; a plugin's start is bounded by its owner
    list_s: float = 30.0               # for all pages of tools/list
    call_quiet_s: float = 120.0        # a tool call without a sign of life
    call_s: float = 1_800.0            # a tool call in all
    goodbye_s: float = 2.0             # for what is sent without hope of an answer: cancel, DELETE
    message_bytes: int = 8 * MIB       # one JSON body or event
    exchange_bytes: int = 32 * MIB     # all that comes in for one request, headers included
    head_bytes: int = 256 << 10        # status and headers of one answer, 100 Continue and all
    error_bytes: int = 64 << 10        # read of a body with a status of 400 and above
    messages: int = 10_000             # before the answer
    pages: int = 50
    tools: int = 256                   # of one server
    tools_seen: int = 5_000            # entries of its list that are looked at
    tools_bytes: int = 8 * MIB         # of all of them, as JSON
    resumptions: int = 3               # without a message in between
    redirects: int = 3
    input_rounds: int = 10
    retry_ms: int = 1_000              # before a stream is resumed, where the server says nothing
    max_retry_ms: int = 60_000
    max_ttl_s: float = 300.0           # how long a list may stay fresh, whatever its server says
    input_pause_s: tuple[float, float] = (0.05, 0.25)  # between input rounds: first, longest


DEFAULT = Limits()


class Budget:
    """What may still come in for one exchange, over all its connections."""

    def __init__(self, limits: Limits):
        self.bytes, self.messages = limits.exchange_bytes, limits.messages

    def head(self, limits: Limits) -> "Budget":
        """What may come in before an answer's headers are over; take from this what it took."""
        part = Budget(limits)
        part.bytes = min(self.bytes, limits.head_bytes)
        return part

    def take_bytes(self, n: int, where: str) -> None:
        """Raises: ProtocolError when that is too much."""
        self.bytes -= n
        if self.bytes < 0:
            raise ProtocolError(f"{where}: the server sent more than is taken for one answer")

    def take_message(self, where: str) -> None:
        """Raises: ProtocolError when that is one too many."""
        self.messages -= 1
        if self.messages < 0:
            raise ProtocolError(f"{where}: the server sent too many messages before its answer")
