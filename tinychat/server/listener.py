"""The listening socket and its connections, one thread each, a bounded number of them."""
import logging
import selectors
import socket
import threading
import time

from tinychat.errors import TinychatError
from tinychat.library import Library
from tinychat.server.handler import Connection, ServerSettings, refusal
from tinychat.server.http_io import Wire
from tinychat.store import Store

log = logging.getLogger(__name__)

BACKLOG = 128
ACCEPT_RETRY_S = 0.1  # after accept failed, for want of file descriptors say


def make_server(library: Library, store: Store, *, host: str = "127.0.0.1", port: int = 1234,
                **settings) -> "Server":
    """A server that listens already; `settings` are the fields of ServerSettings.

    Raises: TinychatError when the address cannot be had.
    """
    return Server(library, store, ServerSettings(host=host, port=port, **settings))


class Server:
    """Answers on `url` from `start()` or `serve_forever()` until `close()`.

    The library and the store belong to the caller.
    """

    def __init__(self, library: Library, store: Store, settings: ServerSettings):
        self.library, self.store, self.settings = library, store, settings
        self._listener = _listen(settings.host, settings.port)
        self.port: int = self._listener.getsockname()[1]
        self._waker, self._woken = socket.socketpair()
        self._closing = threading.Event()
        self._serving = threading.Lock()  # held by whoever uses the listening socket
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, Connection] = {}
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        host = self.settings.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def start(self) -> "Server":
        """Serves on a thread of its own."""
        self._thread = threading.Thread(target=self.serve_forever, name="listener", daemon=True)
        self._thread.start()
        return self

    def serve_forever(self):
        """Serves on this thread, until `close()` is called from another one."""
        with self._serving:
            try:
                self._accept_until_closed()
            finally:
                if self._closing.is_set():
                    self._close_sockets()

    def _accept_until_closed(self):
        with selectors.DefaultSelector() as ready:
            if self._closing.is_set():
                return
            ready.register(self._listener, selectors.EVENT_READ)
            ready.register(self._woken, selectors.EVENT_READ)
            while not self._closing.is_set():
                for key, _ in ready.select():
                    if key.fileobj is self._listener:
                        self._accept()

    def _accept(self):
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return  # the client is gone again
        except OSError as error:
            log.warning("cannot accept a connection: %s", error)
            self._closing.wait(ACCEPT_RETRY_S)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            accepted = len(self._connections) < self.settings.max_connections and self._begin(sock)
        if not accepted:
            log.warning("refused a connection: %d are open", len(self._connections))
            _refuse(sock)

    def _begin(self, sock: socket.socket) -> bool:
        wire = Wire(sock, read_timeout_s=self.settings.read_timeout_s,
                    write_timeout_s=self.settings.write_timeout_s)
        connection = Connection(wire, self.library, self.store, self.settings,
                                self._closing.is_set)
        thread = threading.Thread(target=self._serve, args=(connection,), name="connection",
                                  daemon=True)
        self._connections[thread] = connection
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            del self._connections[thread]
        return thread in self._connections

    def _serve(self, connection: Connection):
        try:
            connection.serve()
        except Exception:
            log.exception("a connection failed")
        finally:
            with self._lock:
                del self._connections[threading.current_thread()]

    def close(self):
        """Stops: idle connections at once, busy ones when their request is done or after
        `shutdown_s`. Bounded, and may be called again."""
        if self._closing.is_set():
            return
        self._waker.send(b"x")  # first, as whoever serves closes this socket too
        self._closing.set()
        if self._serving.acquire(blocking=False):  # else whoever serves closes them
            self._close_sockets()
            self._serving.release()
        self._hang_up(only_idle=True)
        self._wait(time.monotonic() + self.settings.shutdown_s)
        self._hang_up(only_idle=False)
        self._wait(time.monotonic() + self.settings.shutdown_s)
        if self._thread is not None:
            self._thread.join(self.settings.shutdown_s)

    def _close_sockets(self):
        for sock in (self._listener, self._waker, self._woken):
            sock.close()

    def _hang_up(self, *, only_idle: bool):
        with self._lock:
            for connection in self._connections.values():
                if not (only_idle and connection.busy):
                    connection.wire.hang_up()

    def _wait(self, deadline: float):
        with self._lock:
            threads = list(self._connections)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_):
        self.close()


def _refuse(sock: socket.socket):
    with sock:
        try:
            sock.setblocking(False)  # a few hundred bytes fit a new socket's buffer, or are lost
            sock.send(refusal())
        except OSError:
            pass


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                      flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise TinychatError(f"cannot listen on {host}:{port}: {error}; "
                            "--port chooses another port") from error
    listener.setblocking(False)
    return listener
