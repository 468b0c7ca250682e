"""One client's connection: requests in, answers out, until either side is done.

http.server parses the heads, `http_io.py` keeps the limits; `handler.py` says what is answered.
"""
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from tinychat import sse
from tinychat.server.http_io import (
    BLANK, LAST_CHUNK, Body, Disconnected, Wire, body_length, check_request_line, chunk, joined,
    malformed, path_of, read_fields, too_large)

log = logging.getLogger(__name__)
access = logging.getLogger("tinychat.access")

MAX_LOGGED_PATH = 200


class Connection(BaseHTTPRequestHandler):
    """`answer()` and `fail(error)` are the subclass's; `server` is listener.py's Server."""

    protocol_version = default_request_version = "HTTP/1.1"
    common_headers: tuple[tuple[str, str], ...] = ()  # sent with every answer

    def answer(self) -> None:
        """Answers the request whose head has been read; raises what `fail` is then told."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """Answers with an error, if there is still time for one."""
        raise NotImplementedError

    # -- requests

    def setup(self):
        self.connection = self.request
        self.settings = self.server.settings
        self.wfile = Wire(self.request, write_timeout_s=self.settings.write_timeout_s)
        self.rfile = io.BufferedReader(self.wfile)

    def handle(self):
        try:
            super().handle()
            self.wfile.linger()
        except Disconnected:
            pass

    def handle_one_request(self):
        """Waits for a request and answers it; `close_connection` says whether it was the last."""
        self.close_connection = True
        self.status = 0                 # of the answer; set once its head is out
        self.body: Body | None = None   # none as long as the head is not understood
        self.command = self.requestline = self.path = ""
        self.who: str | None = None     # the name of the token, once that is known
        self.request_version = self.default_request_version
        self.server.set_busy(self.connection, False)
        if self.server.closing:
            return
        self.wfile.allow(self.settings.idle_timeout_s)
        self.rfile.peek(1)
        self.server.set_busy(self.connection, True)
        self.wfile.allow(self.settings.head_timeout_s, self.settings.read_timeout_s)
        self._respond()

    def _respond(self):
        began, before, ending = time.perf_counter(), self.wfile.n_written, "ok"
        try:
            try:
                super().handle_one_request()
            except Disconnected:
                raise
            except Exception as error:
                self._fail(error)
        except Disconnected:
            ending = "gone"
            raise
        finally:
            self._note(time.perf_counter() - began, self.wfile.n_written - before, ending)

    def _note(self, seconds: float, n_bytes: int, ending: str):
        """The request's line in the access log: figures and names, nothing of what was said."""
        self.server.metrics.request(self.path, self.status, seconds)
        access.info("time=%s client=%s token=%s method=%s path=%s status=%d bytes=%d seconds=%.4f "
                    "end=%s", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    self.client_address[0] if self.client_address else "-", self.who or "-",
                    self.command or "-", self.path[:MAX_LOGGED_PATH] or "-", self.status, n_bytes,
                    seconds, ending)

    def parse_request(self) -> bool:
        """The base class's, fed with lines that leave it no choice."""
        if self.raw_requestline in BLANK:  # a client may end a body with one line end too many
            self.raw_requestline = self.rfile.readline(65537)
        check_request_line(self.raw_requestline)
        self.go_ahead = None
        rfile, self.rfile = self.rfile, io.BytesIO(read_fields(self.rfile))
        try:
            super().parse_request()
        finally:
            self.rfile = rfile
        if re.search(r"\bclose\b", joined(self.headers, "connection"), re.IGNORECASE):
            self.close_connection = True
        self.path = path_of(self.path)
        self.body = Body(self.rfile, body_length(self.headers, self.request_version),
                         limits_s=(self.settings.body_timeout_s, self.settings.read_timeout_s),
                         go_ahead=self.go_ahead)
        return True

    def handle_expect_100(self) -> bool:
        self.go_ahead = super().handle_expect_100  # later, if the body is wanted at all
        return True

    def send_error(self, code: int, message=None, explain=None):
        """The base class's complaints in the contract's words; nothing is sent here."""
        if code == HTTPStatus.NOT_IMPLEMENTED:  # there is no do_ for this method
            self._answer()
        elif code in (HTTPStatus.REQUEST_URI_TOO_LONG, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE):
            raise too_large("a line of the request's head is too long, or it has too many headers")
        else:
            raise malformed("the request's head cannot be understood", "request")

    def _answer(self):
        try:
            self.answer()
        except Disconnected:
            raise
        except Exception as error:
            self._fail(error)

    do_GET = do_POST = do_OPTIONS = _answer

    def _fail(self, error: Exception):
        if self.status:  # too late for another answer
            log.error("an answer broke off", exc_info=error)
            self.close_connection = True
        else:
            self.fail(error)

    def watched(self, events: Iterator[dict | None]) -> Iterator[dict | None]:
        """The same events, for as long as the client is there to hear of them."""
        for event in events:
            if self.wfile.gone():
                raise Disconnected("the client went away")
            yield event

    # -- answers

    def send_json(self, status: int, value: dict, headers=()):
        data = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        self.send_bytes(status, "application/json; charset=utf-8", data, headers)

    def send_bytes(self, status: int, kind: str, data: bytes, headers=()):
        self.send_head(status, (("Content-Type", kind), ("Content-Length", str(len(data))),
                                *headers))
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_stream(self, events: Iterator[dict | None]):
        """The events as they come, each in a write of its own; ends with the last one.

        None is a moment in which nothing happened.
        """
        chunked = self.request_version >= "HTTP/1.1"
        frame: Callable[[bytes], bytes] = chunk if chunked else bytes
        first = next(event for event in events if event is not None)
        self.send_head(200, (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"),
                             *([("Transfer-Encoding", "chunked")] if chunked else [])),
                       sized=chunked)
        self.wfile.write(frame(sse.encode(first)))
        spoken = time.monotonic()
        for event in events:
            if event is not None:
                self.wfile.write(frame(sse.encode(event)))
            elif self._silent_since(spoken):
                self.wfile.write(frame(sse.KEEP_ALIVE))
            else:
                continue
            spoken = time.monotonic()
        if chunked:
            self.wfile.write(LAST_CHUNK)

    def _silent_since(self, spoken: float) -> bool:
        limit = self.settings.sse_keepalive_seconds
        return limit > 0 and time.monotonic() - spoken >= limit

    def send_head(self, status: int, headers, *, sized: bool = True):
        """Sends the head; decides whether the connection goes on.

        sized: the client can tell where the body ends; otherwise only closing tells.
        """
        if self.body:
            self.body.discard()
        keep = (sized and self.body is not None and self.body.consumed
                and not self.close_connection and not self.server.closing)
        self.status = status
        self.send_response(status)
        for name, value in (*headers, *self.common_headers,
                            ("Connection", "keep-alive" if keep else "close")):
            self.send_header(name, value)  # the last one sets close_connection
        self.end_headers()

    def send_header(self, keyword: str, value: str):
        """Nothing from outside gets into a header; that no line ends early is checked."""
        if {"\r", "\n"} & {*keyword, *value}:
            raise ValueError("a header with a line end")
        super().send_header(keyword, value)

    def version_string(self) -> str:
        return "tinychat"

    def log_message(self, format: str, *args):
        log.debug(format, *args)
