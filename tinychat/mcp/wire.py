"""A connection on which nothing waits without a deadline and nothing comes in uncounted.

A deadline is a moment, not a timeout of one read: each recv gets what is left of it, so a byte a
second ends on time too. When the work may be called off, waits are cut into slices.
"""
import errno
import functools
import io
import os
import selectors
import socket
import ssl
from contextlib import suppress

from tinychat.mcp.errors import NotConnected, TimedOut
from tinychat.mcp.limits import Budget
from tinychat.mcp.url import Url
from tinychat.mcp.watch import Watch

PIECE = 1 << 16  # bytes of one read
CONNECTING = (errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", errno.EAGAIN))


class Wire(io.RawIOBase):
    """A connected socket, as http.client reads it. `watch` and `budget` may be exchanged."""

    def __init__(self, sock: socket.socket, where: str, watch: Watch, budget: Budget):
        self._sock, self._where = sock, where
        self.watch, self.budget = watch, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            self._sock.settimeout(self.watch.slice())
            try:
                n = self._sock.recv_into(buffer)
                break
            except TimeoutError:  # a slice is over, or the watch, which says so itself
                continue
        self.budget.take_bytes(n, self._where)
        return n

    def send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            self._sock.settimeout(self.watch.slice())
            with suppress(TimeoutError):
                left = left[self._sock.send(left):]

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client asks of a socket."""
        return io.BufferedReader(self, PIECE)

    def shut(self) -> None:
        """Ends a read in another thread."""
        # NOTE: the plain socket's method: TLS's own drops the session under the thread that reads.
        with suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        if not self.closed:
            self._sock.close()
        super().close()


def connect(url: Url, addresses: list[str], watch: Watch, tls: ssl.SSLContext | None
            ) -> socket.socket:
    """To the first address that takes it; each gets its share of the time that is left.

    Raises: NotConnected, TimedOut, CalledOff.
    """
    error: Exception | None = None
    for i, address in enumerate(addresses):
        share = watch.within(watch.left() / (len(addresses) - i))
        try:
            sock = _dial(address, url.port, share)
            break
        except (OSError, TimedOut) as failed:
            error = failed
    else:
        watch.left()
        raise NotConnected(f"{url.where}: cannot connect: {reason(error)}")
    if url.scheme == "http":
        return sock
    try:
        return _secured(sock, url.host, watch, tls or _system_tls())
    except (OSError, ValueError) as error:  # a certificate too: ssl.SSLError is an OSError
        raise NotConnected(f"{url.where}: no TLS with this server: {reason(error)}") from None


def _dial(address: str, port: int, watch: Watch) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        sock.setblocking(False)
        code = sock.connect_ex((address, port))
        if code in CONNECTING:
            with selectors.DefaultSelector() as selector:
                selector.register(sock, selectors.EVENT_WRITE)
                while not selector.select(watch.slice()):
                    pass
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except BaseException:
        sock.close()
        raise


def _secured(sock: socket.socket, host: str, watch: Watch, tls: ssl.SSLContext) -> ssl.SSLSocket:
    try:
        sock.settimeout(watch.slice())
        secured = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    except BaseException:
        sock.close()
        raise
    try:
        while True:
            secured.settimeout(watch.slice())
            try:
                secured.do_handshake()
                return secured
            except TimeoutError:
                continue
    except BaseException:
        secured.close()
        raise


@functools.cache
def _system_tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def reason(error: Exception | None) -> str:
    """Few words for a fault of the system's."""
    return getattr(error, "verify_message", None) or getattr(error, "strerror", None) or str(error)
