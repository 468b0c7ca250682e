"""The routes and the answers: the only file that knows status codes."""
import json
import logging
from collections.abc import Callable
from contextlib import closing
from functools import partial
from http import HTTPStatus

from tinychat import chat
from tinychat.contract import (
    parse_chat_request, parse_download_request, parse_json, parse_load_request,
    parse_unload_request, wrong_type)
from tinychat.errors import InvalidRequest, Overloaded, known
from tinychat.server import auth
from tinychat.server.connection import Connection
from tinychat.server.http_io import joined
from tinychat.server.metrics import CONTENT_TYPE as METRICS_TYPE
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


class Handler(Connection):
    """The API's side of a connection; the contract's order of checks is section 3."""

    token: auth.Token | None = None  # of a request that had to have one

    def setup(self):
        super().setup()
        self.common_headers = (CORS_ALL,) if self.settings.cors else ()

    def answer(self):
        if self.command == "OPTIONS" and self.settings.cors and _route(self.path):
            self.send_head(204, CORS_PREFLIGHT)
            return
        self._check_origin()
        self.token = None
        if self.settings.require_auth and self.path.startswith(API):
            self.token = self.server.tokens.check(joined(self.headers, "authorization"))
            self.who = self.token.name
        route = _route(self.path)
        if self.command != route.method:
            raise MethodNotAllowed(f"{route.method}, OPTIONS" if self.settings.cors
                                   else route.method)
        if route.permission and self.token:
            self.token.need(route.permission)
        route.answer(self)

    def fail(self, error: Exception):
        error = known(error, log, "a request")
        status = STATUS.get(error.code, 500)
        headers = []
        if status == 401:
            headers.append(("WWW-Authenticate", "Bearer"))
        if isinstance(error, MethodNotAllowed):
            headers.append(("Allow", error.allow))
        if status == 503:
            headers.append(("Retry-After", str(RETRY_AFTER_S)))
        self.send_json(status, {"error": error.to_json()}, headers)

    def _check_origin(self):
        """Keeps web pages of other sites away from a server that only this machine can reach."""
        if (not self.settings.cors and is_loopback(self.settings.host)
                and is_foreign(joined(self.headers, "origin"))):
            raise InvalidRequest("web pages of other sites may not use this server; the setting"
                                 " `cors` allows it", code="permission_denied")

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

    # -- endpoints

    def _chat(self):
        asked = parse_chat_request(self._json())
        settings = self.settings
        doors = chat.ChatSettings(
            heartbeat_s=settings.heartbeat_s, stopping=lambda: self.server.stopping,
            refusal=partial(auth.refusal, settings, self.token),
            ephemeral_mcp=settings.ephemeral_mcp, plugins=self.server.plugins,
            max_tool_rounds=settings.max_tool_rounds, guided_tool_calls=settings.guided_tool_calls,
            mcp_connect_s=settings.mcp_connect_timeout_ms / 1000,
            mcp_call_s=settings.mcp_call_timeout_ms / 1000)
        with closing(chat.run(self.server.library, self.server.store, asked, doors)) as events:
            if asked.stream:
                self.send_stream(self.watched(events))
            else:
                self.send_json(200, chat.fold(self.watched(events)))

    def _models(self):
        models = []
        for entry in self.server.library.list():
            instance = self.server.library.instance(entry.key)
            models.append(entry.to_json([instance.to_json()] if instance else []))
        self.send_json(200, {"models": models})

    def _load(self):
        asked = parse_load_request(self._json())
        waited: list[float] = []  # nothing is heard of a load that was not needed
        model = self.server.library.load(
            asked.model, context_length=asked.context_length,
            eval_batch_size=asked.eval_batch_size, ttl=asked.ttl, progress=waited.append)
        body = {"type": model.entry.type, "instance_id": model.entry.key,
                "load_time_seconds": model.load_time_seconds if waited else 0.0,
                "status": "loaded"}
        if asked.echo_load_config:
            body["load_config"] = model.load_config()
        self.send_json(200, body)

    def _unload(self):
        name = parse_unload_request(self._json())
        self.send_json(200, {"instance_id": self.server.library.unload(name)})

    def _download(self):
        asked = parse_download_request(self._json())
        job = self.server.library.download(asked.model, asked.quantization)
        self.send_json(200, job.answer() if job else {"status": "already_downloaded"})

    def _job_status(self):
        if self.path == JOB_STATUS:
            raise InvalidRequest("the path needs the id of a download",
                                 code="missing_required_parameter", param="job_id")
        job_id = self.path.rpartition("/")[2]
        self.send_json(200, self.server.library.download_job(job_id).status())

    def _health(self):
        self.send_json(200, {"status": "ok"})

    def _metrics(self):
        self.send_bytes(200, METRICS_TYPE, self.server.metrics.text(
            self.server.library, self.server.n_connections).encode())


class Route:
    """permission: what a token must allow, apart from being valid."""

    def __init__(self, method: str, answer: Callable[[Handler], None],
                 permission: str | None = None):
        self.method, self.answer, self.permission = method, answer, permission


API = "/api/"
JOB_STATUS = "/api/v1/models/download/status"

ROUTES = {
    "/api/v1/chat": Route("POST", Handler._chat, "chat"),
    "/api/v1/models": Route("GET", Handler._models),
    "/api/v1/models/load": Route("POST", Handler._load, "models"),
    "/api/v1/models/unload": Route("POST", Handler._unload, "models"),
    "/api/v1/models/download": Route("POST", Handler._download, "models"),
    JOB_STATUS: Route("GET", Handler._job_status),
    "/healthz": Route("GET", Handler._health),
    "/metrics": Route("GET", Handler._metrics),
}


def route_of(path: str) -> str:
    """The route's own path, "other" where there is none: few values, whatever clients ask for."""
    parent, _, last = path.rpartition("/")
    path = parent if parent == JOB_STATUS and last else path
    return path if path in ROUTES else "other"


def _route(path: str) -> Route:
    try:
        return ROUTES[route_of(path)]
    except KeyError:
        raise InvalidRequest("there is nothing at this path", code="unknown_endpoint") from None


def refusal() -> bytes:
    """The whole answer for a connection that cannot be taken."""
    data = json.dumps({"error": Overloaded("too many connections").to_json()}).encode()
    lines = [f"HTTP/1.1 503 {HTTPStatus(503).phrase}", "Connection: close",
             "Content-Type: application/json; charset=utf-8", f"Content-Length: {len(data)}",
             f"Retry-After: {RETRY_AFTER_S}", "", ""]
    return "\r\n".join(lines).encode() + data
