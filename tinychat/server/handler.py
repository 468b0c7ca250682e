"""The routes and the answers: the only file that knows status codes.

`Handler` reads requests from one connection and answers each; `server/listener.py` makes one per
client, on a thread of its own. http.server parses the heads, `server/http_io.py` keeps the limits.
"""
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from tinychat import chat, sse
from tinychat.contract import parse_chat_request, parse_json, wrong_type
from tinychat.errors import InvalidRequest, NotImplementedYet, Overloaded, TinychatError
from tinychat.server.http_io import (
    BLANK, LAST_CHUNK, Body, Disconnected, Wire, body_length, check_request_line, chunk, joined,
    malformed, path_of, read_fields, too_large)
from tinychat.server.origin import is_foreign, is_loopback

log = logging.getLogger(__name__)

# The contract's codes, section 2; what is not named here is a 500.
STATUS = {
    "invalid_json": 400, "invalid_type": 400, "missing_required_parameter": 400,
    "invalid_value": 400, "invalid_union": 400, "unrecognized_keys": 400,
    "model_not_loaded": 400, "previous_response_not_found": 400, "context_length_exceeded": 400,
    "plugin_not_found": 400, "invalid_api_key": 401, "permission_denied": 403,
    "private_address_refused": 403, "unknown_endpoint": 404, "model_not_found": 404,
    "job_not_found": 404, "method_not_allowed": 405, "request_too_large": 413,
    "unsupported_media_type": 415, "not_implemented": 501, "connection_failed": 502,
    "server_overloaded": 503,
}
RETRY_AFTER_S = 1
CORS_ALL = ("Access-Control-Allow-Origin", "*")
CORS_PREFLIGHT = (("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
                  ("Access-Control-Allow-Headers", "Authorization, Content-Type"))


class MethodNotAllowed(InvalidRequest):
    """A known path with another method; `allow` is the header's value."""

    code = "method_not_allowed"

    def __init__(self, allow: str):
        super().__init__(f"this path takes {allow} only")
        self.allow = allow


class Handler(BaseHTTPRequestHandler):
    """One client's connection: requests in, answers out, until either side is done.

    `server` is listener.py's Server.
    """

    protocol_version = default_request_version = "HTTP/1.1"

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
        self.started = False            # the head of the answer is out
        self.body: Body | None = None   # none as long as the head is not understood
        self.command = self.requestline = ""
        self.request_version = self.default_request_version
        self.server.set_busy(self.connection, False)
        if self.server.closing:
            return
        self.wfile.allow(self.settings.idle_timeout_s)
        self.rfile.peek(1)
        self.server.set_busy(self.connection, True)
        self.wfile.allow(self.settings.head_timeout_s, self.settings.read_timeout_s)
        try:
            super().handle_one_request()
        except Disconnected:
            raise
        except Exception as error:
            self._fail(error)

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
            self._dispatch()
        except Disconnected:
            raise
        except Exception as error:
            self._fail(error)

    do_GET = do_POST = do_OPTIONS = _answer

    def _fail(self, error: Exception):
        if not isinstance(error, TinychatError) or self.started:
            log.error("a request failed", exc_info=error)
            error = TinychatError("an internal error; the server's log has it")
        if self.started:
            self.close_connection = True
        else:
            self._send_refusal(error)

    def _dispatch(self):
        if self.command == "OPTIONS" and self.settings.cors:
            self._start(204, CORS_PREFLIGHT)
            return
        self._check_origin()
        method, answer = _route(self.path)
        if self.command != method:
            raise MethodNotAllowed(f"{method}, OPTIONS" if self.settings.cors else method)
        answer(self)

    def _check_origin(self):
        """Keeps web pages of other sites away from a server that only this machine can reach."""
        if (not self.settings.cors and is_loopback(self.settings.host)
                and is_foreign(joined(self.headers, "origin"))):
            raise InvalidRequest("web pages of other sites may not use this server; the setting"
                                 " `cors` allows it", code="permission_denied")

    # -- endpoints

    def _chat(self):
        asked = parse_chat_request(self._json())
        settings = chat.ChatSettings(heartbeat_s=self.settings.heartbeat_s)
        with closing(chat.run(self.server.library, self.server.store, asked, settings)) as events:
            if asked.stream:
                self._stream(self._watched(events))
            else:
                self._send_json(200, chat.fold(self._watched(events)))

    def _models(self):
        models = []
        for entry in self.server.library.list():
            loaded = self.server.library.loaded(entry.key)
            models.append(entry.to_json([loaded.to_json()] if loaded else []))
        self._send_json(200, {"models": models})

    def _post_later(self):
        self._json()
        raise NotImplementedYet("this build cannot do that yet")

    def _job_status(self):
        if self.path == JOB_STATUS:
            raise InvalidRequest("the path needs the id of a download",
                                 code="missing_required_parameter", param="job_id")
        raise NotImplementedYet("this build cannot download over HTTP yet")

    # -- reading

    def _json(self) -> dict:
        """The body as a JSON object, after the checks of its type and size."""
        kind = joined(self.headers, "content-type").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise InvalidRequest("expected Content-Type: application/json",
                                 code="unsupported_media_type")
        value = parse_json(self.body.read(self.settings.max_body_bytes))
        if not isinstance(value, dict):
            raise wrong_type("", "an object", value)
        return value

    def _watched(self, events: Iterator[dict | None]) -> Iterator[dict | None]:
        """The same events, for as long as the client is there to hear of them."""
        for event in events:
            if self.wfile.gone():
                raise Disconnected("the client went away")
            yield event

    # -- answering

    def _send_json(self, status: int, value: dict, headers=()):
        data = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        self._start(status, (("Content-Type", "application/json; charset=utf-8"),
                             ("Content-Length", str(len(data))), *headers))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_refusal(self, error: TinychatError):
        status = STATUS.get(error.code, 500)
        headers = []
        if isinstance(error, MethodNotAllowed):
            headers.append(("Allow", error.allow))
        if status == 503:
            headers.append(("Retry-After", str(RETRY_AFTER_S)))
        self._send_json(status, {"error": error.to_json()}, headers)

    def _stream(self, events: Iterator[dict | None]):
        """The events as they come, each in a write of its own; ends with the last one."""
        chunked = self.request_version >= "HTTP/1.1"
        frame = chunk if chunked else bytes
        first = next(event for event in events if event is not None)
        self._start(200, (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"),
                          *([("Transfer-Encoding", "chunked")] if chunked else [])), sized=chunked)
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

    def _start(self, status: int, headers, *, sized: bool = True):
        """Sends the head; decides whether the connection goes on.

        sized: the client can tell where the body ends; otherwise only closing tells.
        """
        if self.body:
            self.body.discard()
        keep = (sized and self.body is not None and self.body.consumed
                and not self.close_connection and not self.server.closing)
        self.started = True
        self.send_response(status)
        for name, value in (*headers, *([CORS_ALL] if self.settings.cors else []),
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


CHAT = "/api/v1/chat"
MODELS = "/api/v1/models"
JOB_STATUS = "/api/v1/models/download/status"

ROUTES: dict[str, tuple[str, Callable[[Handler], None]]] = {
    CHAT: ("POST", Handler._chat),
    MODELS: ("GET", Handler._models),
    f"{MODELS}/load": ("POST", Handler._post_later),
    f"{MODELS}/unload": ("POST", Handler._post_later),
    f"{MODELS}/download": ("POST", Handler._post_later),
    JOB_STATUS: ("GET", Handler._job_status),
}


def refusal() -> bytes:
    """The whole answer for a connection that cannot be taken."""
    data = json.dumps({"error": Overloaded("too many connections").to_json()}).encode()
    lines = [f"HTTP/1.1 503 {HTTPStatus(503).phrase}", "Connection: close",
             "Content-Type: application/json; charset=utf-8", f"Content-Length: {len(data)}",
             f"Retry-After: {RETRY_AFTER_S}", "", ""]
    return "\r\n".join(lines).encode() + data


def _route(path: str) -> tuple[str, Callable[[Handler], None]]:
    parent, _, last = path.rpartition("/")
    if parent == JOB_STATUS and last:
        path = parent
    if path not in ROUTES:
        raise InvalidRequest("there is nothing at this path", code="unknown_endpoint")
    return ROUTES[path]
