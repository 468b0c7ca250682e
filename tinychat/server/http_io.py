"""What http.server leaves out of HTTP/1.1: time limits, strict heads, request bodies.

Strict where laxness lets two readers disagree about where a message ends (RFC 9112, sections 2
to 7), bounded in size, count and time everywhere. Knows no route and no status code.
"""
import io
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from email.message import Message

from tinychat.errors import InvalidRequest

MAX_LINE_BYTES = 16 * 1024       # request line, one header, the size line of a chunk
MAX_FIELDS_BYTES = 64 * 1024     # all headers, or all trailers; the base class counts them
DISCARD_BYTES = 1 << 20          # of a body nobody wants, read so that the connection lives on
RECEIVE_BYTES = 64 * 1024
LINGER_S = 2.0                   # how long a closed connection's remaining input is thrown away
LINGER_BYTES = 256 << 20

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
TEXT = rb"[\t -~\x80-\xff]*"
# A later 1.x is answered as 1.1, which is the highest that this server speaks.
REQUEST_LINE = re.compile(TOKEN + rb"{1,32} [!-~]+ HTTP/1\.[0-9]\r?\n\Z")
FIELD = re.compile(TOKEN + rb"+:" + TEXT + rb"\r?\n\Z")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;" + TEXT + rb")?\r?\n\Z")
BLANK = (b"\r\n", b"\n")


class Disconnected(Exception):
    """The other side is gone, or too slow."""


def malformed(what: str, where: str) -> InvalidRequest:
    return InvalidRequest(f"malformed HTTP: {what}", code="invalid_value", param=where)


def too_large(what: str) -> InvalidRequest:
    return InvalidRequest(what, code="request_too_large")


class Wire(io.RawIOBase):
    """A socket as the raw stream below `rfile`, and as `wfile`. All of it raises Disconnected.

    Reads obey what `allow` said last; the end of input counts as disconnected, so that nobody
    takes half a line or half a body for a whole one.
    """

    def __init__(self, sock: socket.socket, *, write_timeout_s: float):
        self.sock = sock
        self.n_written = 0  # bytes
        self._write_timeout_s = write_timeout_s
        self._deadline = self._silence_s = 0.0
        with suppress(OSError):  # no TCP, or gone already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def allow(self, total_s: float, silence_s: float | None = None):
        """How long the reads from now on may take together, and each of them."""
        self._deadline, self._silence_s = time.monotonic() + total_s, silence_s or total_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Disconnected("too slow")
        try:
            self.sock.settimeout(min(left, self._silence_s))
            n = self.sock.recv_into(buffer)
        except OSError as error:
            raise Disconnected(str(error)) from None
        if not n:
            raise Disconnected("end of input")
        return n

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        """All of it: a reader that takes nothing for the timeout is gone."""
        try:
            self.sock.settimeout(self._write_timeout_s)
            self.sock.sendall(data)
        except OSError as error:
            raise Disconnected(str(error)) from None
        self.n_written += len(data)
        return len(data)

    def gone(self) -> bool:
        """Has the other side closed? A peek; what it sent meanwhile stays to be read."""
        try:
            self.sock.settimeout(0)
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def linger(self):
        """Says that nothing more comes, and throws away the input still under way for a moment:
        closing over unread input resets the connection and may cost the client our answer."""
        deadline, budget = time.monotonic() + LINGER_S, LINGER_BYTES
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while budget > 0 and (left := deadline - time.monotonic()) > 0:
                self.sock.settimeout(left)
                if not (n := len(self.sock.recv(RECEIVE_BYTES))):
                    return
                budget -= n


def read_line(rfile: io.BufferedReader) -> bytes:
    """The next line with its end. Raises: InvalidRequest, too long; Disconnected."""
    line = rfile.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise too_large(f"a line of the request is longer than {MAX_LINE_BYTES} bytes")
    return line


def check_request_line(line: bytes):
    if len(line) > MAX_LINE_BYTES:
        raise too_large(f"the request line is longer than {MAX_LINE_BYTES} bytes")
    if not REQUEST_LINE.match(line):
        raise malformed("expected a request line such as GET /api/v1/models HTTP/1.1", "request")


def read_fields(rfile: io.BufferedReader) -> bytes:
    """The raw lines of the headers (or trailers) and the blank one after them, each one checked:
    no folded lines, no blanks in names, no control characters, no CR alone."""
    lines, size = [], 0
    while (line := read_line(rfile)) not in BLANK:
        size += len(line)
        if size > MAX_FIELDS_BYTES:
            raise too_large(f"the headers are larger than {MAX_FIELDS_BYTES} bytes")
        if not FIELD.match(line):
            raise malformed("expected a header such as Content-Type: application/json", "headers")
        lines.append(line)
    return b"".join([*lines, line])


def joined(headers: Message, name: str) -> str:
    """A header's value; those of doubled ones with commas between."""
    return ", ".join(value.strip() for value in headers.get_all(name, []))


def body_length(headers: Message, version: str) -> int | None:
    """The body's length in bytes, None for a chunked one (RFC 9112, 6.3)."""
    if "transfer-encoding" in headers:
        if "content-length" in headers or version < "HTTP/1.1":
            raise malformed("Transfer-Encoding beside Content-Length, or in HTTP/1.0",
                            "transfer-encoding")
        if joined(headers, "transfer-encoding").lower() != "chunked":
            raise malformed("the only transfer coding taken is chunked", "transfer-encoding")
        return None
    if "content-length" not in headers:
        return 0
    lengths = {part.strip() for part in joined(headers, "content-length").split(",")}
    if len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", one := lengths.pop()):
        raise malformed("Content-Length is no single number", "content-length")
    return int(one)


def path_of(target: str) -> str:
    """The path of a request target, which may be a whole URL; no query, one trailing slash less."""
    if not target.startswith("/"):
        target = "/" + re.sub(r"^https?://[^/?#]*/?", "", target, flags=re.IGNORECASE)
    path = re.split(r"[?#]", target, maxsplit=1)[0]
    return path.removesuffix("/") or "/"


class Body:
    """A request's body, unread as yet.

    length: None says that it comes in chunks. limits_s: for Wire.allow.
    go_ahead: asks for a body that the client holds back; None, it does not.
    """

    def __init__(self, rfile: io.BufferedReader, length: int | None, *,
                 limits_s: tuple[float, float], go_ahead: Callable[[], object] | None):
        self.length = length
        self.consumed = length == 0
        self._begun = False
        self._rfile, self._limits_s, self._go_ahead = rfile, limits_s, go_ahead

    def read(self, limit: int) -> bytes:
        """The whole body. Raises: InvalidRequest request_too_large, Disconnected."""
        if self.consumed:
            return b""
        if self.length is not None and self.length > limit:
            raise too_large(f"the body has {self.length} bytes, at most {limit} are taken")
        self._begun = True
        if self._go_ahead:
            self._go_ahead()
        self._rfile.raw.allow(*self._limits_s)
        data = self._chunks(limit) if self.length is None else self._exactly(self.length)
        self.consumed = True
        return data

    def discard(self):
        """Reads a small unwanted body away; one that is large, held back or broken stays."""
        small = self.length is None or self.length <= DISCARD_BYTES
        if not self._begun and not self._go_ahead and small:
            with suppress(InvalidRequest):  # unconsumed, so the connection closes after the answer
                self.read(DISCARD_BYTES)

    def _exactly(self, n: int) -> bytes:
        data = bytearray()  # grows as they come: a length alone costs no memory
        while len(data) < n:
            data += self._rfile.read1(min(n - len(data), RECEIVE_BYTES))
        return bytes(data)

    def _chunks(self, limit: int) -> bytes:
        data = bytearray()
        while size := self._chunk_size():
            if len(data) + size > limit:
                raise too_large(f"the body has more than {limit} bytes")
            data += self._exactly(size)
            if self._exactly(2) != b"\r\n":
                raise malformed("a chunk is longer than its size", "transfer-encoding")
        read_fields(self._rfile)
        return bytes(data)

    def _chunk_size(self) -> int:
        found = CHUNK_SIZE.match(read_line(self._rfile))
        if not found:
            raise malformed("expected a chunk size", "transfer-encoding")
        return int(found[1], 16)


def chunk(data: bytes) -> bytes:
    """One chunk of a body in chunked transfer coding; empty data would end the body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
