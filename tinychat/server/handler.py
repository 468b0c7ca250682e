"""The routes and the answers: the only file that knows status codes.

A `Connection` reads requests from one socket and answers each; `server/listener.py` makes one per
client, on a thread of its own.
"""
import ipaddress
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import urlsplit

from tinychat import chat, sse
from tinychat.contract import parse_chat_request, parse_json, wrong_type
from tinychat.errors import InvalidRequest, NotImplementedYet, Overloaded, TinychatError
from tinychat.library import Library, ModelEntry
from tinychat.server.http_io import (
    LAST_CHUNK, Disconnected, Request, Wire, chunk, head, read_request)
from tinychat.store import Store

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


@dataclass(frozen=True)
class ServerSettings:
    """The contract's settings, and the bounds of a connection in seconds."""

    host: str = "127.0.0.1"
    port: int = 1234
    cors: bool = False
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


class MethodNotAllowed(InvalidRequest):
    """A known path with another method; `allow` is the header's value."""

    code = "method_not_allowed"

    def __init__(self, allow: str):
        super().__init__(f"this path takes {allow} only")
        self.allow = allow


class Connection:
    """One client's socket: requests in, answers out, until either side is done."""

    def __init__(self, wire: Wire, library: Library, store: Store, settings: ServerSettings,
                 closing: Callable[[], bool]):
        self.wire, self.library, self.store, self.settings = wire, library, store, settings
        self.closing = closing
        self.busy = False     # a request is being read or answered
        self.started = False  # the head of its answer is out
        self.keep = False     # the connection outlives it
        self.request: Request | None = None

    def serve(self):
        linger = False
        try:
            while self._next() and not self.closing():
                pass
            linger = True
        except Disconnected:
            pass
        finally:
            self.wire.close(linger=linger)

    def _next(self) -> bool:
        """Answers the next request; false when the connection is done."""
        self.busy, self.started, self.request = False, False, None
        self.wire.wait(time.monotonic() + self.settings.idle_timeout_s)
        self.busy, self.keep = True, False
        try:
            self.request = read_request(self.wire, head_timeout_s=self.settings.head_timeout_s,
                                        body_timeout_s=self.settings.body_timeout_s)
            self._dispatch(self.request)
        except Disconnected:
            raise
        except Exception as error:
            if not isinstance(error, TinychatError) or self.started:
                log.exception("a request failed")
                error = TinychatError("an internal error; the server's log has it")
            if self.started:
                return False
            self._send_error(error)
        return self.keep

    def _dispatch(self, request: Request):
        if request.method == "OPTIONS" and self.settings.cors:
            self._start(204, CORS_PREFLIGHT)
            return
        self._check_origin(request)
        method, answer = _route(request.path)
        if request.method != method:
            raise MethodNotAllowed(f"{method}, OPTIONS" if self.settings.cors else method)
        answer(self, request)

    def _check_origin(self, request: Request):
        """Keeps web pages of other sites away from a server that only this machine can reach."""
        origin = urlsplit_or_none(request.headers.get("origin", ""))
        if self.settings.cors or origin is None or not is_loopback(self.settings.host):
            return
        if origin.scheme in ("http", "https") and not is_loopback(origin.hostname or ""):
            raise InvalidRequest("web pages of other sites may not use this server; the setting"
                                 " `cors` allows it", code="permission_denied")

    # -- endpoints

    def _chat(self, request: Request):
        asked = parse_chat_request(self._json(request))
        settings = chat.ChatSettings(heartbeat_s=self.settings.heartbeat_s)
        with closing(chat.run(self.library, self.store, asked, settings)) as events:
            if asked.stream:
                self._stream(self._watched(events))
            else:
                self._send_json(200, chat.fold(self._watched(events)))

    def _models(self, request: Request):
        self._send_json(200, {"models": [entry.to_json(self._instances(entry))
                                         for entry in self.library.list()]})

    def _instances(self, entry: ModelEntry) -> list[dict]:
        loaded = self.library.loaded(entry.key)
        return [loaded.to_json()] if loaded else []

    def _post_later(self, request: Request):
        self._json(request)
        raise NotImplementedYet("this build cannot do that yet")

    def _job_status(self, request: Request):
        if request.path == JOB_STATUS:
            raise InvalidRequest("the path needs the id of a download",
                                 code="missing_required_parameter", param="job_id")
        raise NotImplementedYet("this build cannot download over HTTP yet")

    # -- reading

    def _json(self, request: Request) -> dict:
        """The body as a JSON object, after the checks of its type and size."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise InvalidRequest("expected Content-Type: application/json",
                                 code="unsupported_media_type")
        value = parse_json(request.body.read(self.settings.max_body_bytes))
        if not isinstance(value, dict):
            raise wrong_type("", "an object", value)
        return value

    def _watched(self, events: Iterator[dict | None]) -> Iterator[dict | None]:
        """The same events, for as long as the client is there to hear of them."""
        for event in events:
            if self.wire.gone():
                raise Disconnected("the client went away")
            yield event

    # -- answering

    def _send_json(self, status: int, value: dict, headers=()):
        data = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        self._start(status, (("Content-Type", "application/json; charset=utf-8"),
                             ("Content-Length", str(len(data))), *headers), data)

    def _send_error(self, error: TinychatError):
        status = STATUS.get(error.code, 500)
        headers = []
        if isinstance(error, MethodNotAllowed):
            headers.append(("Allow", error.allow))
        if status == 503:
            headers.append(("Retry-After", str(RETRY_AFTER_S)))
        self._send_json(status, {"error": error.to_json()}, headers)

    def _stream(self, events: Iterator[dict | None]):
        """The events as they come, each in a write of its own; ends with the last one."""
        chunked = self.request.version == "HTTP/1.1"
        frame = chunk if chunked else bytes
        first = next(event for event in events if event is not None)
        self._start(200, (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"),
                          *([("Transfer-Encoding", "chunked")] if chunked else [])),
                    frame(sse.encode(first)), sized=chunked)
        spoken = time.monotonic()
        for event in events:
            if event is not None:
                self.wire.send(frame(sse.encode(event)))
            elif self._silent_since(spoken):
                self.wire.send(frame(sse.KEEP_ALIVE))
            else:
                continue
            spoken = time.monotonic()
        if chunked:
            self.wire.send(LAST_CHUNK)

    def _silent_since(self, spoken: float) -> bool:
        limit = self.settings.sse_keepalive_seconds
        return limit > 0 and time.monotonic() - spoken >= limit

    def _start(self, status: int, headers, data: bytes = b"", *, sized: bool = True):
        """Sends the head, and `data` behind it; decides whether the connection goes on.

        sized: the client can tell where the body ends; otherwise only closing tells.
        """
        request = self.request
        if request:
            request.body.discard()
            self.keep = (sized and request.keep_alive and request.body.consumed
                         and not self.closing())
        fixed = [("Server", "tinychat"), ("Date", formatdate(usegmt=True)),
                 ("Connection", "keep-alive" if self.keep else "close")]
        if self.settings.cors:
            fixed.append(CORS_ALL)
        self.started = True
        first = head(status, HTTPStatus(status).phrase, (*headers, *fixed))
        self.wire.send(first if request and request.method == "HEAD" else first + data)


CHAT = "/api/v1/chat"
MODELS = "/api/v1/models"
JOB_STATUS = "/api/v1/models/download/status"

ROUTES: dict[str, tuple[str, Callable[[Connection, Request], None]]] = {
    CHAT: ("POST", Connection._chat),
    MODELS: ("GET", Connection._models),
    f"{MODELS}/load": ("POST", Connection._post_later),
    f"{MODELS}/unload": ("POST", Connection._post_later),
    f"{MODELS}/download": ("POST", Connection._post_later),
    JOB_STATUS: ("GET", Connection._job_status),
}


def refusal() -> bytes:
    """The whole answer for a connection that cannot be taken."""
    data = json.dumps({"error": Overloaded("too many connections").to_json()}).encode()
    return head(503, HTTPStatus(503).phrase, (
        ("Content-Type", "application/json; charset=utf-8"), ("Content-Length", str(len(data))),
        ("Retry-After", str(RETRY_AFTER_S)), ("Connection", "close"))) + data


def _route(path: str) -> tuple[str, Callable[[Connection, Request], None]]:
    parent, _, last = path.rpartition("/")
    if parent == JOB_STATUS and last:
        path = parent
    if path not in ROUTES:
        raise InvalidRequest("there is nothing at this path", code="unknown_endpoint")
    return ROUTES[path]


def urlsplit_or_none(url: str):
    try:
        return urlsplit(url)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """localhost, its subdomains, 127.0.0.0/8 and ::1; nothing is resolved."""
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
