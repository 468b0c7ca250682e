"""A conversation with one server: greet it, list its tools, call them. Over any transport.

Many threads may use one client; no lock is held while a server is waited for.
"""
import logging
import math
import ssl
import threading
import time
from collections.abc import Callable, Mapping

from tinychat.mcp import era, headers as header_rules, jsonrpc, url as urls
from tinychat.mcp.addresses import Resolve, system_resolve
from tinychat.mcp.errors import (
    McpError, ProtocolError, ServerError, SessionLost, Unreachable)
from tinychat.mcp.greeting import Greeter, Greeting
from tinychat.mcp.http import Door
from tinychat.mcp.limits import DEFAULT, Limits
from tinychat.mcp.listing import Tool, all_tools, fresh_for, mirrored
from tinychat.mcp.old_sse import OldSseTransport
from tinychat.mcp.results import (
    CallResult, call_result, check_complete, says_unknown, state_to_send)
from tinychat.mcp.streamable import HttpTransport
from tinychat.mcp.transport import Transport
from tinychat.mcp.watch import Watch

log = logging.getLogger(__name__)

__all__ = ["CallResult", "Client", "Tool", "connect_http"]

CONNECT_S = 60.0  # for all that connect_http does: a probe, a handshake, the old transport
CHANGED_CODES = (jsonrpc.METHOD_NOT_FOUND, jsonrpc.INVALID_PARAMS)  # what "unknown tool" comes as


class Client:
    """One server. Call `connect` first.

    over_http: the stateless era first, and arguments mirrored in headers. older: makes the
    transport to try last. mode: "auto", or "legacy" or "modern" for one era alone.
    memory, key: where the era of the server is remembered, and under which name.
    """

    def __init__(self, transport: Transport, *, over_http: bool = False,
                 older: Callable[[], Transport] | None = None, mode: str = "auto",
                 limits: Limits = DEFAULT, memory: era.Memory = era.MEMORY, key: str = ""):
        assert mode in ("auto", "legacy", "modern"), mode
        self.where, self._transport = transport.where, transport
        self._limits, self._over_http = limits, over_http
        self._ids = jsonrpc.Ids()
        self._greeter = Greeter(transport, self._ids, limits, over_http, mode, older, memory, key)
        self._greeting: Greeting | None = None
        self._regreeting: threading.Event | None = None  # while one is tried; set when that is over
        self._lock = threading.Lock()
        self._tools: dict[str, Tool] = {}
        self._fresh_until = -math.inf  # by time.monotonic
        self._n_changes = 0            # of the list, as far as we were told

    @property
    def version(self) -> str:
        """The revision that is spoken."""
        return self._greeted().version

    def connect(self, watch: Watch) -> None:
        """Raises: McpError, which names the server's address."""
        try:
            greeting = self._greeter.greet(watch)
        except McpError as error:
            raise error.named(self.where)
        greeting.transport.on_notification = self._notified
        self._greeting, self._transport = greeting, greeting.transport
        log.info("%s speaks MCP %s%s", self.where, greeting.version,
                 "" if greeting.has_tools else " and has no tools")

    def close(self) -> None:
        """Ends the connection, within bounds. Never raises."""
        self._transport.close()

    # ---- tools

    def tools(self, watch: Watch) -> list[Tool]:
        """In the server's order; again from memory as long as nothing says that they changed.

        Raises: McpError, which names the server's address.
        """
        with self._lock:
            if time.monotonic() < self._fresh_until:
                return list(self._tools.values())
        try:
            return self._list(watch.within(self._limits.list_s, f"tools/list at {self.where}"))
        except McpError as error:
            raise error.named(self.where)

    def call(self, name: str, arguments: dict, watch: Watch) -> CallResult:
        """name: the server's own. Make the watch with Limits.call_s and call_quiet_s.

        Raises: ServerError for a JSON-RPC error, with the server's own words; other McpErrors.
        """
        try:
            result = call_result(self._call(name, arguments, watch))
            if says_unknown(result):
                self._forget_tools()
            return result
        except ServerError as error:
            if error.rpc_code in CHANGED_CODES:
                self._forget_tools()
            if not self._mirrors() or error.rpc_code != jsonrpc.HEADER_MISMATCH:
                raise
        self._list(watch.within(self._limits.list_s, f"tools/list at {self.where}"))
        return call_result(self._call(name, arguments, watch))

    def _list(self, watch: Watch) -> list[Tool]:
        if not self._greeted().has_tools:
            return []
        n_changes = self._n_changes
        tools, page = all_tools(lambda params: self._ask_whole("tools/list", params, watch),
                                self._limits, self.where, self._mirrors())
        seconds = fresh_for(page, self._limits) if self._is_stateless() else math.inf
        with self._lock:
            self._tools = {tool.name: tool for tool in tools}
            # A notice of a change that came while the list did is about a later list.
            if n_changes == self._n_changes:
                self._fresh_until = time.monotonic() + seconds
        return tools

    def _call(self, name: str, arguments: dict, watch: Watch) -> dict:
        headers = mirrored(self._tools.get(name), arguments) if self._mirrors() else {}
        params = {"name": name, "arguments": arguments}
        pause, longest = self._limits.input_pause_s
        for _ in range(self._limits.input_rounds):
            result = self._ask("tools/call", params, watch, headers)
            state = state_to_send(result) if self._is_stateless() else None
            if state is None:
                return result
            params = {**params, "requestState": state}
            watch.pause(pause)
            pause = min(2 * pause, longest)
        raise ProtocolError(f"{self.where}: after {self._limits.input_rounds} rounds the tool "
                            "still has no result")

    def _mirrors(self) -> bool:
        return self._over_http and self._is_stateless()

    def _is_stateless(self) -> bool:
        return self._greeted().era == "stateless"

    def _forget_tools(self) -> None:
        with self._lock:
            self._n_changes += 1
            self._fresh_until = -math.inf

    def _notified(self, message: dict) -> None:
        if message["method"] == "notifications/tools/list_changed":
            self._forget_tools()

    # ---- requests

    def _ask_whole(self, method: str, params: dict, watch: Watch) -> dict:
        result = self._ask(method, params, watch)
        if self._is_stateless():
            check_complete(result)
        return result

    def _ask(self, method: str, params: dict, watch: Watch, headers: Mapping[str, str] = {}
             ) -> dict:
        """The result. A server that has forgotten us is greeted again, and asked once more."""
        self._wait_for_greeting(watch)
        greeting = self._greeted()
        try:
            return self._ask_once(method, params, watch, headers)
        except SessionLost as error:
            log.info("%s", error)
            if greeting.era == "handshake":
                self._greet_again(greeting, watch)
            return self._ask_once(method, params, watch, headers)

    def _greet_again(self, lost: Greeting, watch: Watch) -> None:
        """By one of those who miss the session; where it fails, by the next. Raises: McpError."""
        while self._greeting is lost:
            with self._lock:
                mine = None if self._regreeting else threading.Event()
                self._regreeting = mine or self._regreeting
            if mine is None:
                self._wait_for_greeting(watch)
                continue
            try:
                if self._greeting is lost:
                    self._greeting = self._greeter.initialize(self._transport, watch)
                    self._forget_tools()
            finally:
                self._regreeting = None
                mine.set()

    def _wait_for_greeting(self, watch: Watch) -> None:
        """While somebody greets the server anew, it takes no other requests."""
        while (theirs := self._regreeting) and not theirs.wait(watch.slice()):
            pass

    def _ask_once(self, method: str, params: dict, watch: Watch, headers: Mapping[str, str]
                  ) -> dict:
        id = self._ids.next()
        meta = dict(era.META) if self._is_stateless() else {}
        if method == "tools/call":
            meta["progressToken"] = id
        message = jsonrpc.request(id, method, {**params, "_meta": meta} if meta else params)
        try:
            return jsonrpc.result_of(self._transport.exchange(message, watch, headers))
        except Unreachable:
            self._forget_tools()  # who comes back may have others
            raise

    def _greeted(self) -> Greeting:
        assert self._greeting, "connect() comes first"
        return self._greeting


def connect_http(url: str, *, headers: Mapping[str, str] | None = None, policy: str | None = None,
                 called_off: threading.Event | None = None, connect_s: float = CONNECT_S,
                 label: str = "", mode: str = "auto", limits: Limits = DEFAULT,
                 memory: era.Memory = era.MEMORY, resolve: Resolve = system_resolve,
                 tls: ssl.SSLContext | None = None) -> Client:
    """A client of the server at a URL, connected.

    policy: "public" or "local" for a URL that a request brought along, None for the owner's own.
    called_off: set it to end the attempt. connect_s: for the whole of it. label: for messages.
    Raises: Refused with code private_address_refused by the policy; other McpErrors.
    """
    door = Door(urls.parse(url), header_rules.check(headers or {}), policy, limits, resolve, tls)
    client = Client(HttpTransport(door), over_http=True, older=lambda: OldSseTransport(door),
                    mode=mode, limits=limits, memory=memory, key=door.url.origin + door.url.target)
    what = f"connecting to {door.url.where}" + (f" ({label})" if label else "")
    try:
        client.connect(Watch(connect_s, what=what, called_off=called_off))
    except BaseException:
        client.close()
        raise
    return client
