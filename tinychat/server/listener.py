"""The listening socket and its connections, one thread each, a bounded number of them."""
import logging
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer

from tinychat.errors import TinychatError
from tinychat.library import Library
from tinychat.mcp.config import MCP_JSON_NAME
from tinychat.mcp.plugins import Plugins
from tinychat.server.auth import TOKENS_NAME, Tokens
from tinychat.server.handler import Handler, refusal, route_of
from tinychat.server.metrics import Metrics
from tinychat.server.origin import is_loopback
from tinychat.store import Store

log = logging.getLogger(__name__)

ACCEPT_RETRY_S = 0.1  # after accept failed, for want of file descriptors say
ERROR_EVENT_S = 2.0   # for requests that are cut off by the server's end to say so


@dataclass(frozen=True)
class ServerSettings:
    """The contract's settings, and the bounds of a connection in seconds.

    ephemeral_mcp: off, public or local; None for local on a loopback address, else off.
    mcp_json: the file; None for the one in the data folder. require_auth and allow_mcp_json None:
    on when a file is given.
    """

    host: str = "127.0.0.1"
    port: int = 1234
    cors: bool = False
    require_auth: bool | None = None
    ephemeral_mcp: str | None = None
    allow_mcp_json: bool | None = None
    mcp_json: str | os.PathLike | None = None
    mcp_connect_timeout_ms: int = 30_000  # for a server to be connected and listed
    mcp_call_timeout_ms: int = 60_000     # for one tool call without a sign of life
    max_tool_rounds: int = 25
    guided_tool_calls: bool = True        # hold calls to the tools' schemas
    max_body_bytes: int = 67_108_864
    sse_keepalive_seconds: float = 15.0   # 0: no comments
    max_connections: int = 512
    idle_timeout_s: float = 75.0          # between two requests of a connection
    head_timeout_s: float = 20.0          # for a whole request line with its headers
    body_timeout_s: float = 300.0         # for a whole body
    read_timeout_s: float = 30.0          # for the next bytes of either
    write_timeout_s: float = 30.0         # for a client to take one event
    heartbeat_s: float = 0.1              # how soon a client that is gone is noticed in silence
    shutdown_s: float = 5.0               # for running requests when the server stops


def make_server(library: Library, store: Store, *, host: str = "127.0.0.1", port: int = 1234,
                **settings) -> "Server":
    """A server that listens already; `settings` are the fields of ServerSettings.

    Raises: TinychatError when the address cannot be had, or settings contradict each other.
    """
    return Server(library, store, check_settings(host=host, port=port, **settings))


def check_settings(**settings) -> ServerSettings:
    """The fields with every value decided. Raises: TinychatError for a contradiction."""
    settings = ServerSettings(**settings)
    given = settings.mcp_json is not None
    decided = {name: given if getattr(settings, name) is None else getattr(settings, name)
               for name in ("require_auth", "allow_mcp_json")}
    if decided["allow_mcp_json"] and not decided["require_auth"]:
        raise TinychatError("allow_mcp_json needs require_auth: without auth, whoever reaches the "
                            "server could run the servers of mcp.json")
    default = "local" if is_loopback(settings.host) else "off"
    return replace(settings, ephemeral_mcp=settings.ephemeral_mcp or default, **decided)


class Server(ThreadingHTTPServer):
    """Answers on `url` from `start()` or `serve_forever()` until `close()`.

    The library and the store belong to the caller.
    """

    request_queue_size = 128
    allow_reuse_address = os.name == "posix"  # on Windows it would share a port that is taken

    def __init__(self, library: Library, store: Store, settings: ServerSettings):
        self.library, self.store, self.settings = library, store, settings
        self.metrics = Metrics(route_of)
        self.tokens = Tokens(Path(library.home) / TOKENS_NAME) if settings.require_auth else None
        self.plugins = Plugins(Path(settings.mcp_json or Path(library.home) / MCP_JSON_NAME)) \
            if settings.allow_mcp_json else None
        self._closing, self._stopping = threading.Event(), threading.Event()
        self._closed = threading.Event()
        self._serving = False
        self._changed = threading.Condition()
        self._connections: dict[socket.socket, bool] = {}  # and whether a request is under way
        self._thread: threading.Thread | None = None
        try:
            self.address_family, _, _, _, address = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM,
                flags=socket.AI_PASSIVE)[0]
            # getaddrinfo would take a port of 70000 for 4464, bind complains
            super().__init__((address[0], settings.port, *address[2:]), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise TinychatError(f"cannot listen on {settings.host}:{settings.port}: {error}; "
                                "--port chooses another port") from error

    def server_bind(self):
        if self.address_family == socket.AF_INET6:  # "::" would mean IPv4 too on some systems
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.socket.setblocking(False)  # a client may be gone again between select and accept
        TCPServer.server_bind(self)     # HTTPServer's asks the DNS for a name that nobody needs
        self.server_name = self.settings.host
        self.port = self.server_port = self.server_address[1]

    @property
    def url(self) -> str:
        host = self.settings.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    @property
    def stopping(self) -> bool:
        """Is the time over that running requests had to finish?"""
        return self._stopping.is_set()

    @property
    def n_connections(self) -> int:
        return len(self._connections)

    # -- serving

    def start(self) -> "Server":
        """Serves on a thread of its own."""
        self._thread = threading.Thread(target=self.serve_forever, name="listener", daemon=True)
        self._thread.start()
        return self

    def serve_forever(self, poll_interval: float = 0.5):
        """Serves on this thread, until `close()` is called from another one."""
        with self._changed:
            if self.closing:
                return
            self._serving = True  # from here on `shutdown` finds a loop to end
        super().serve_forever(poll_interval)

    def get_request(self):
        try:
            return super().get_request()
        except OSError as error:
            if not self.closing and not isinstance(error, BlockingIOError):
                log.warning("cannot accept a connection: %s", error)
                self._closing.wait(ACCEPT_RETRY_S)  # else the loop would spin
            raise

    def verify_request(self, request: socket.socket, client_address) -> bool:
        with self._changed:
            n_open = len(self._connections)
            accepted = n_open < self.settings.max_connections and not self.closing
            if accepted:
                self._connections[request] = False
        if not accepted:
            log.warning("refused a connection: %d are open", n_open)
            _refuse(request)
        return accepted

    def process_request(self, request: socket.socket, client_address):
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system gives no more threads
            log.warning("refused a connection: no thread for it")
            _refuse(request)
            self.shutdown_request(request)

    def set_busy(self, request: socket.socket, busy: bool):
        """For the handler: `close` lets the busy ones finish."""
        with self._changed:
            self._connections[request] = busy

    def shutdown_request(self, request: socket.socket):
        super().shutdown_request(request)
        with self._changed:
            self._connections.pop(request, None)
            self._changed.notify_all()

    def handle_error(self, request, client_address):
        log.exception("a connection failed")

    # -- closing

    def close(self):
        """Stops: idle connections at once, busy ones when their request is done. After
        `shutdown_s` the chats that still run get their error event, and a moment later what is
        left is cut off. Bounded, and may be called again; from any thread, but not by a signal
        handler of the one that is in `serve_forever`."""
        with self._changed:
            first = not self.closing
            self._closing.set()
        if first:
            try:
                self._close()
            finally:
                self._closed.set()
        else:
            self._closed.wait()  # whoever owns library and store will close them next

    def _close(self):
        with self._changed:
            serving = self._serving
        if serving:
            with suppress(OSError):  # wakes the loop, where the system allows it
                self.socket.shutdown(socket.SHUT_RDWR)
            self.shutdown()
        self.server_close()
        self._hang_up(only_idle=True)
        self._wait_for_connections(self.settings.shutdown_s)
        self._stopping.set()
        self._wait_for_connections(ERROR_EVENT_S)
        self._hang_up(only_idle=False)
        self._wait_for_connections(ERROR_EVENT_S)
        if self.plugins:
            self.plugins.close()
        if self._thread is not None:
            self._thread.join(self.settings.shutdown_s)

    def _hang_up(self, *, only_idle: bool):
        """Ends reads and writes under way."""
        with self._changed:
            for sock, busy in self._connections.items():
                if not (only_idle and busy):
                    with suppress(OSError):  # it is closed already
                        sock.shutdown(socket.SHUT_RDWR)

    def _wait_for_connections(self, seconds: float):
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, seconds)

    def __exit__(self, *_):
        self.close()


def _refuse(sock: socket.socket):
    with suppress(OSError):
        sock.setblocking(False)  # a few hundred bytes fit a new socket's buffer, or are lost
        sock.send(refusal())
