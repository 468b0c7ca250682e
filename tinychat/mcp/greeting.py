"""The first words with a server: which era, which revision, whether it has tools.

Over HTTP the stateless era is tried first, for it costs one request. Over stdio `initialize` comes
first: old servers exit at other requests or ignore them, and one of the stateless era says no.
"""
from collections.abc import Callable
from dataclasses import dataclass

from tinychat.mcp import era, jsonrpc
from tinychat.mcp.errors import CalledOff, McpError, ProtocolError, ServerError, SessionLost
from tinychat.mcp.limits import Limits
from tinychat.mcp.results import check_complete
from tinychat.mcp.transport import Transport
from tinychat.mcp.watch import Watch


@dataclass(frozen=True)
class Greeting:
    """What came of it. transport: the way that worked."""

    transport: Transport
    era: str  # "handshake" or "stateless"
    version: str
    has_tools: bool


@dataclass(frozen=True)
class Greeter:
    """older: makes the transport of last resort. key: what the memory knows the server by."""

    transport: Transport
    ids: jsonrpc.Ids
    limits: Limits
    over_http: bool
    mode: str
    older: Callable[[], Transport] | None
    memory: era.Memory
    key: str

    def greet(self, watch: Watch) -> Greeting:
        """Raises: McpError."""
        if self.mode == "modern":
            return self._stateless(self._discover(watch.within(self.limits.initialize_s)))
        if self.mode == "legacy":
            return self._handshake(watch)
        if not self.over_http:
            return self._over_stdio(watch)
        return self._remembered(watch) or self._over_http(watch)

    # ---- the decision

    def _remembered(self, watch: Watch) -> Greeting | None:
        """As last time; None where that does not help, and all is to be decided anew."""
        known = self.memory.get(self.key)
        try:
            if known == "sse" and self.older:
                return self._by_older(watch)
            return self._handshake(watch) if known else None
        except McpError as error:
            self.memory.put(self.key, None)
            watch.left()
            era.after_error(error)  # raises what another era would not help
            return None

    def _over_http(self, watch: Watch) -> Greeting:
        found = self._probe(watch) or self._handshake(watch)
        older = found.transport is not self.transport
        self.memory.put(self.key, "sse" if older else found.era)
        return found

    def _probe(self, watch: Watch) -> Greeting | None:
        """None where the handshake is to be tried."""
        for is_last in (False, True):
            what = f"server/discover at {self.transport.where}"
            try:
                result = self._discover(watch.within(self.limits.probe_s, what))
                break
            except McpError as error:
                watch.left()
                if era.after_error(error) == "handshake":
                    return None
                if is_last:  # a server that refuses what it offers must not loop us
                    raise
        return self._stateless(result) if era.of_discovery(result) == "stateless" else None

    def _handshake(self, watch: Watch) -> Greeting:
        """With HTTP's two endpoints as the last resort."""
        try:
            return self.initialize(self.transport, watch)
        except ServerError as first:
            if not self.older or first.http_status not in era.OLD_STATUSES:
                raise
            try:
                return self._by_older(watch)
            except CalledOff:
                raise
            except McpError:
                raise first from None

    def _by_older(self, watch: Watch) -> Greeting:
        transport = self.older()
        try:
            return self.initialize(transport, watch)
        except BaseException:
            transport.close()
            raise

    def _over_stdio(self, watch: Watch) -> Greeting:
        try:
            return self.initialize(self.transport, watch)
        except ServerError as first:
            try:
                return self._stateless(self._discover(watch))
            except SessionLost:  # it left at `initialize`, and was started again
                return self._stateless(self._discover(watch))
            except ServerError:
                raise first from None

    # ---- the two requests

    def initialize(self, transport: Transport, watch: Watch) -> Greeting:
        """The handshake, also once more where a session was lost. Raises: McpError."""
        if self.over_http:
            watch = watch.within(self.limits.initialize_s, f"initialize at {transport.where}")
        message = jsonrpc.request(self.ids.next(), "initialize", era.initialize_params())
        result = jsonrpc.result_of(transport.exchange(message, watch))
        version = result.get("protocolVersion")
        if version not in era.HANDSHAKE:
            raise ProtocolError(era.no_common_version([version]))
        transport.notify(jsonrpc.notification("notifications/initialized"), watch)
        return Greeting(transport, "handshake", version, _has_tools(result))

    def _discover(self, watch: Watch) -> dict:
        message = jsonrpc.request(self.ids.next(), "server/discover", {"_meta": era.META})
        result = jsonrpc.result_of(self.transport.exchange(message, watch))
        check_complete(result)
        return result

    def _stateless(self, result: dict) -> Greeting:
        if era.of_discovery(result) != "stateless":
            versions = result.get("supportedVersions")
            raise ProtocolError(era.no_common_version(versions if isinstance(versions, list)
                                                      else [versions]))
        return Greeting(self.transport, "stateless", era.STATELESS, _has_tools(result))


def _has_tools(result: dict) -> bool:
    capabilities = result.get("capabilities")
    return isinstance(capabilities, dict) and capabilities.get("tools") is not None
