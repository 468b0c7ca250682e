"""HTTP/1.1 on one connection: bytes in to a `Request`, answers out to bytes.

Strict where laxness lets two readers disagree about where a message ends (RFC 9112, sections 2
to 7), bounded in size, count and time everywhere. Knows no route and no status code.
"""
import re
import selectors
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tinychat.errors import InvalidRequest

MAX_LINE_BYTES = 16 * 1024       # request line, or one header
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
MAX_CHUNK_LINE_BYTES = 1024
MAX_TRAILERS = 20
DISCARD_BYTES = 1 << 20          # of a body nobody wants, read so that the connection lives on
RECEIVE_BYTES = 64 * 1024
LINGER_S = 2.0                   # how long a closed connection's remaining input is thrown away
LINGER_BYTES = 256 << 20

# Not the default: an epoll object per connection would double the file descriptors in use.
SELECTOR = getattr(selectors, "PollSelector", selectors.SelectSelector)

METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}\Z")
TARGET = re.compile(rb"[!-~]+\Z")
VERSION = re.compile(rb"HTTP/1\.[0-9]\Z")
FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
FIELD_VALUE = re.compile(rb"[\t -~\x80-\xff]*\Z")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;.*)?\Z")


class Disconnected(Exception):
    """The other side is gone, or too slow."""


def malformed(what: str, where: str) -> InvalidRequest:
    return InvalidRequest(f"malformed HTTP: {what}", code="invalid_value", param=where)


def too_large(what: str) -> InvalidRequest:
    return InvalidRequest(what, code="request_too_large")


class Wire:
    """A connection's bytes: buffered reads with deadlines (time.monotonic), timed writes."""

    def __init__(self, sock: socket.socket, *, read_timeout_s: float, write_timeout_s: float):
        self.sock = sock
        self._read_timeout_s, self._write_timeout_s = read_timeout_s, write_timeout_s
        self._buffer = bytearray()
        self._watch = SELECTOR()
        self._watch.register(sock, selectors.EVENT_READ)

    def line(self, limit: int, deadline: float) -> bytes:
        """Up to the next line end, without it. Raises: Disconnected; InvalidRequest, too long."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0 and len(self._buffer) <= limit:
            searched = len(self._buffer)
            self._receive(deadline)
        if end < 0 or end > limit:
            raise too_large(f"a line of the request's head is longer than {limit} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 1]
        return line.removesuffix(b"\r")

    def exactly(self, n: int, deadline: float) -> bytes:
        while len(self._buffer) < n:
            self._receive(deadline)
        with memoryview(self._buffer) as view:
            data = bytes(view[:n])
        del self._buffer[:n]
        return data

    def wait(self, deadline: float):
        """Returns once there is a byte to read. Raises: Disconnected at the end or the deadline."""
        if not self._buffer:
            self._receive(deadline, silence_s=deadline - time.monotonic())

    def _receive(self, deadline: float, silence_s: float | None = None):
        left = deadline - time.monotonic()
        if left <= 0:
            raise Disconnected("too slow")
        try:
            self.sock.settimeout(min(left, silence_s or self._read_timeout_s))
            data = self.sock.recv(RECEIVE_BYTES)
        except OSError as error:
            raise Disconnected(str(error)) from None
        if not data:
            raise Disconnected("end of input")
        self._buffer += data

    def send(self, data: bytes):
        """All of it, or Disconnected: a reader that takes nothing for the timeout is gone."""
        try:
            self.sock.settimeout(self._write_timeout_s)
            self.sock.sendall(data)
        except OSError as error:
            raise Disconnected(str(error)) from None

    def gone(self) -> bool:
        """Has the other side closed? A peek; what it sent meanwhile stays to be read."""
        try:
            return bool(self._watch.select(0)) and not self.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def hang_up(self):
        """For another thread: ends whatever read or write is under way."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already

    def close(self, *, linger: bool):
        """Closes; with linger, input still under way is thrown away for a moment first, since
        closing over unread input resets the connection and may cost the client our answer."""
        self._watch.close()
        try:
            if linger:
                self.sock.shutdown(socket.SHUT_WR)
                self._throw_away(time.monotonic() + LINGER_S)
        except OSError:
            pass
        self.sock.close()

    def _throw_away(self, deadline: float):
        budget = LINGER_BYTES
        while budget > 0 and (left := deadline - time.monotonic()) > 0:
            self.sock.settimeout(left)
            n = len(self.sock.recv(RECEIVE_BYTES))
            if not n:
                return
            budget -= n


@dataclass
class Request:
    """A request's head; `headers` by lower-case name, doubled ones joined by commas."""

    method: str
    path: str            # without query
    version: str
    headers: dict[str, str]
    body: "Body" = field(repr=False)

    @property
    def keep_alive(self) -> bool:
        said = self.headers.get("connection", "").lower().split(",")
        options = {option.strip() for option in said}
        return "close" not in options if self.version == "HTTP/1.1" else "keep-alive" in options


class Body:
    """A request's body, unread as yet; `length` None says that it comes in chunks."""

    def __init__(self, wire: Wire, length: int | None, *, expects_continue: bool, timeout_s: float):
        self.length = length
        self.consumed = length == 0
        self._begun = False
        self._wire, self._expects_continue, self._timeout_s = wire, expects_continue, timeout_s

    def read(self, limit: int) -> bytes:
        """The whole body. Raises: InvalidRequest request_too_large, Disconnected."""
        if self.consumed:
            return b""
        if self.length is not None and self.length > limit:
            raise too_large(f"the body has {self.length} bytes, at most {limit} are taken")
        self._begun = True
        self._go_ahead()
        deadline = time.monotonic() + self._timeout_s
        data = (self._chunks(limit, deadline) if self.length is None
                else self._wire.exactly(self.length, deadline))
        self.consumed = True
        return data

    def discard(self):
        """Reads a small unwanted body away; one that is large, announced or broken stays."""
        small = self.length is None or self.length <= DISCARD_BYTES
        if self.consumed or self._begun or self._expects_continue or not small:
            return
        try:
            self.read(DISCARD_BYTES)
        except InvalidRequest:
            pass  # still unconsumed, so the connection closes after the answer

    def _go_ahead(self):
        if self._expects_continue:
            self._wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._expects_continue = False

    def _chunks(self, limit: int, deadline: float) -> bytes:
        data = bytearray()
        while size := self._chunk_size(deadline):
            if len(data) + size > limit:
                raise too_large(f"the body has more than {limit} bytes")
            data += self._wire.exactly(size, deadline)
            if self._wire.exactly(2, deadline) != b"\r\n":
                raise malformed("a chunk is longer than its size", "transfer-encoding")
        for _ in range(MAX_TRAILERS):
            if not self._wire.line(MAX_LINE_BYTES, deadline):
                return bytes(data)
        raise too_large(f"more than {MAX_TRAILERS} trailers")

    def _chunk_size(self, deadline: float) -> int:
        found = CHUNK_SIZE.match(self._wire.line(MAX_CHUNK_LINE_BYTES, deadline))
        if not found:
            raise malformed("expected a chunk size", "transfer-encoding")
        return int(found[1], 16)


def read_request(wire: Wire, *, head_timeout_s: float, body_timeout_s: float) -> Request:
    """The next request's head; the body follows when it is asked for.

    Raises: Disconnected; InvalidRequest, after which nothing more can be read from the wire.
    """
    deadline = time.monotonic() + head_timeout_s
    line = wire.line(MAX_LINE_BYTES, deadline) or wire.line(MAX_LINE_BYTES, deadline)
    method, target, version = _request_line(line)
    headers = _headers(wire, deadline)
    expects = version == "HTTP/1.1" and headers.get("expect", "").lower() == "100-continue"
    body = Body(wire, _body_length(headers, version), expects_continue=expects,
                timeout_s=body_timeout_s)
    return Request(method, _path(target), version, headers, body)


def _request_line(line: bytes) -> tuple[str, str, str]:
    parts = line.split(b" ")
    if len(parts) != 3 or not METHOD.match(parts[0]) or not TARGET.match(parts[1]):
        raise malformed("expected a request line such as GET /api/v1/models HTTP/1.1", "request")
    if not VERSION.match(parts[2]):
        raise malformed("expected HTTP/1.1", "request")
    # A later 1.x is answered as 1.1, which is the highest that this server speaks.
    return parts[0].decode(), parts[1].decode(), min(parts[2].decode(), "HTTP/1.1")


def _headers(wire: Wire, deadline: float) -> dict[str, str]:
    headers: dict[str, str] = {}
    count = size = 0
    while line := wire.line(MAX_LINE_BYTES, deadline):
        count, size = count + 1, size + len(line)
        if size > MAX_HEAD_BYTES:
            raise too_large(f"the headers are larger than {MAX_HEAD_BYTES} bytes")
        if count > MAX_HEADERS:
            raise too_large(f"more than {MAX_HEADERS} headers")
        raw_name, colon, raw_value = line.partition(b":")
        raw_value = raw_value.strip(b" \t")
        if not colon or not FIELD_NAME.match(raw_name) or not FIELD_VALUE.match(raw_value):
            raise malformed("expected a header such as Content-Type: application/json", "headers")
        name, value = raw_name.decode().lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _body_length(headers: dict[str, str], version: str) -> int | None:
    """The body's length in bytes, None for a chunked one (RFC 9112, 6.3)."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or version != "HTTP/1.1":
            raise malformed("Transfer-Encoding beside Content-Length, or in HTTP/1.0",
                            "transfer-encoding")
        if coding.lower() != "chunked":
            raise malformed("the only transfer coding taken is chunked", "transfer-encoding")
        return None
    if length is None:
        return 0
    lengths = {part.strip() for part in length.split(",")}
    if len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", one := lengths.pop()):
        raise malformed("Content-Length is no single number", "content-length")
    return int(one)


def _path(target: str) -> str:
    """The path of a request target, which may be a whole URL; no query, one trailing slash less."""
    if not target.startswith("/"):
        target = "/" + re.sub(r"^https?://[^/?#]*/?", "", target, flags=re.IGNORECASE)
    path = re.split(r"[?#]", target, maxsplit=1)[0]
    return path.removesuffix("/") or "/"


def head(status: int, reason: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """An answer's head. Nothing from outside gets into it; that no line ends early is checked."""
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header with a line end")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


def chunk(data: bytes) -> bytes:
    """One chunk of a body in chunked transfer coding; empty data would end the body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
