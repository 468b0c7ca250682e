"""One HTTP request and its answer, within rules and bounds. Knows nothing of JSON-RPC."""
import http.client
import logging
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import tinychat
from tinychat.mcp.addresses import Resolve, judged, system_resolve
from tinychat.mcp.errors import (
    McpError, NotConnected, ProtocolError, Refused, TimedOut, Unreachable)
from tinychat.mcp.limits import DEFAULT, Budget, Limits
from tinychat.mcp.url import Url
from tinychat.mcp.watch import Watch
from tinychat.mcp.wire import PIECE, Wire, connect, reason

log = logging.getLogger(__name__)

FOLLOWED = (307, 308)  # redirects that keep method and body


@dataclass(frozen=True)
class Door:
    """How requests to one server go out: to which address, with what, under which rules.

    headers: the user's, checked; they go out with every request and to this origin alone.
    policy: see `addresses.judged`. resolve, tls: the system's, unless a test has its own.
    """

    url: Url
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    policy: str | None = None
    limits: Limits = DEFAULT
    resolve: Resolve = system_resolve
    tls: ssl.SSLContext | None = None

    def send(self, method: str, watch: Watch, budget: Budget, *, url: Url | None = None,
             headers: Mapping[str, str] = {}, body: bytes = b"") -> "Answer":
        """The answer's head has come when this returns; close the answer.

        url: another address of the same origin.
        Raises: McpError.
        """
        url = url or self.url
        for _ in range(1 + self.limits.redirects):
            answer = self._send_once(method, url, watch, budget, headers, body)
            if not 300 <= answer.status < 400:
                return answer
            with answer:
                url = _followed(url, answer)
        raise Refused(f"{self.url.where}: more than {self.limits.redirects} redirects")

    def _send_once(self, method, url, watch, budget, headers, body) -> "Answer":
        head = budget.head(self.limits)
        granted = head.bytes
        wire = self._open(url, watch, head)
        answer = Answer(http.client.HTTPResponse(wire, method=method), wire, url.where)
        try:
            with faults(url.where):
                try:
                    wire.send(self._head(method, url, headers, body) + body)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # an answer that came before all was read may say why
                answer.begin()
            budget.take_bytes(granted - head.bytes, url.where)
            wire.budget = budget
            log.debug("%s %s: %d", method, url.where, answer.status)
            if answer.header("content-encoding").lower() not in ("", "identity"):
                raise ProtocolError(f"{url.where}: expected an answer without compression, got "
                                    f"{answer.header('content-encoding')!r}")
            return answer
        except BaseException:
            answer.close()
            raise

    def _open(self, url: Url, watch: Watch, budget: Budget) -> Wire:
        """Raises: NotConnected also when the time for connecting is over and the watch is not."""
        limited = watch.within(self.limits.connect_s)
        try:
            addresses = judged(url, self.policy, self.resolve, limited)
            sock = connect(url, addresses, limited, self.tls)
        except TimedOut:
            watch.left()
            raise NotConnected(f"{url.where}: cannot connect within "
                               f"{self.limits.connect_s:g} seconds") from None
        return Wire(sock, url.where, watch, budget)

    def _head(self, method: str, url: Url, headers: Mapping[str, str], body: bytes) -> bytes:
        """Source: RFC 9112. All values are checked: no CR or LF can be in one."""
        fields = {"User-Agent": f"tinychat/{tinychat.__version__}", "Accept-Encoding": "identity"}
        own = {name.lower() for name in self.headers}
        fields = {name: value for name, value in fields.items() if name.lower() not in own}
        fields |= {"Host": url.host_header, "Connection": "close", **headers, **self.headers}
        if method == "POST":
            fields["Content-Length"] = str(len(body))
        lines = [f"{method} {url.target} HTTP/1.1", *(f"{n}: {v}" for n, v in fields.items())]
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


class Answer:
    """The answer to one request: its head, and its body as it comes."""

    def __init__(self, response: http.client.HTTPResponse, wire: Wire, where: str):
        self._response, self.wire, self._where = response, wire, where
        self.status, self.reason = 0, ""

    def begin(self) -> None:
        """Reads the head."""
        self._response.begin()
        self.status, self.reason = self._response.status, self._response.reason

    def header(self, name: str) -> str:
        """"" where there is none; the first where there are several."""
        return (self._response.headers.get(name) or "").strip(" \t")

    @property
    def content_type(self) -> str:
        """Without parameters, in lower case."""
        return self.header("content-type").partition(";")[0].strip().lower()

    def pieces(self) -> Iterator[bytes]:
        """The body. Raises: Unreachable when it is cut off, other McpErrors."""
        left = self._response.length  # None: until the end
        while left is None or left > 0:
            with faults(self._where):
                piece = self._response.read1(PIECE if left is None else min(PIECE, left))
            if not piece:
                break
            left = None if left is None else left - len(piece)
            yield piece
        if left:
            raise Unreachable(f"{self._where}: the connection ended {left} bytes before the answer")

    def body(self, limit: int) -> bytes:
        """All of it. Raises: McpError when it is longer than `limit` bytes, or cut off."""
        found = bytearray()
        if (self._response.length or 0) <= limit:
            for piece in self.pieces():
                found += piece
                if len(found) > limit:
                    break
            else:
                return bytes(found)
        raise ProtocolError(f"{self._where}: the server's answer is longer than {limit} bytes")

    def start(self, limit: int) -> bytes:
        """At most so much of the body, and no complaint when the rest cannot be had."""
        found = bytearray()
        try:
            for piece in self.pieces():
                found += piece
                if len(found) >= limit:
                    break
        except (Unreachable, ProtocolError):
            log.debug("%s: the body of an error cannot be read", self._where)
        return bytes(found[:limit])

    def close(self) -> None:
        self._response.close()  # first: it flushes what it reads from, which must be open
        self.wire.close()

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _followed(url: Url, answer: Answer) -> Url:
    """Where a redirect leads, if it may be followed. Raises: Refused."""
    location = answer.header("location")
    target = url.join(location) if location else None
    if answer.status in FOLLOWED and target and target.origin == url.origin:
        return target
    raise Refused(f"{url.where}: the server redirects ({answer.status}) to "
                  f"{target.origin if target else 'nowhere'}, which is not followed: only 307 and "
                  "308 within one origin are", http_status=answer.status)


@contextmanager
def faults(where: str) -> Iterator[None]:
    """What sockets and http.client raise, as errors of ours."""
    try:
        yield
    except McpError:
        raise
    except OSError as error:
        raise Unreachable(f"{where}: the connection broke: {reason(error)}") from None
    except http.client.IncompleteRead:
        raise Unreachable(f"{where}: the connection ended before the answer did") from None
    except (http.client.HTTPException, ValueError) as error:
        raise ProtocolError(f"{where}: expected HTTP, got something else: "
                            f"{type(error).__name__}: {error}") from None
