"""HTTP GET for downloads: redirects judged one by one, a token for one origin, bounded waits.

urllib opens the connections, so the environment's proxies and certificates count as everywhere
else. It follows no redirect itself: the token must not go where a redirect leads.
"""
import json
import re
import ssl
import string
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import tinychat
from tinychat.errors import TinychatError
from tinychat.library.fetch.download import Stop

MAX_REDIRECTS = 5
MAX_JSON_BYTES = 16 << 20
JSON_TRIES = 3
MAX_PAUSE_S = 60.0                  # what a server's Retry-After may ask for
REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
SHA256 = re.compile(r"[0-9a-f]{64}")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server, and how often to come back to it."""

    timeout_s: float = 30.0  # for a connection, and for the next bytes of an answer
    json_s: float = 60.0     # for a listing as a whole: somebody waits for it
    pauses_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # before each try in a row


class WebError(TinychatError):
    """A server that cannot be reached, or answers something else than what was asked for.

    status: of its answer, None when there was none. transient: trying again may help, after
    `pause_s` seconds if the server says so.
    """

    def __init__(self, message: str, *, status: int | None = None, transient: bool = True,
                 pause_s: float = 0.0):
        super().__init__(message)
        self.status, self.transient, self.pause_s = status, transient, pause_s


class Answer:
    """An open answer of status 200, 206 or 416.

    length: bytes of its body, None when it does not say. sha256: what the token's origin says of
    the file, on the way here, or None.
    """

    def __init__(self, response: HTTPResponse, host: str, sha256: str | None, web: "Web"):
        self.status, self.headers, self.length = response.status, response.headers, response.length
        self.sha256 = sha256
        self._response, self._host, self._web = response, host, web

    def read(self, n: int) -> bytes:
        """1 to n bytes as they come; none at the end of the body, or of the connection.

        Raises: WebError, Stopped.
        """
        with self._web.troubles(self._host):
            data = self._response.read1(n)
        if not data:  # else it is kept, and whoever reads on looks whether to stop
            self._web.stop.check()
        return data


class Web:
    """GET with a bearer token for the origin of `endpoint`. Safe for many threads."""

    def __init__(self, endpoint: str, token: str | None, patience: Patience, stop: Stop):
        self.patience, self.stop = patience, stop
        self._origin, self._token = origin(endpoint), token
        self._opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler(), _HttpHandler(stop), _HttpsHandler(stop)):
            self._opener.add_handler(handler)

    @contextmanager
    def get(self, url: str, headers: dict[str, str]) -> Iterator[Answer]:
        """The answer at the end of at most MAX_REDIRECTS redirects. Raises: WebError, Stopped."""
        sha256 = None
        for _ in range(MAX_REDIRECTS + 1):
            response = self._open(url, headers)
            try:
                ours = origin(url) == self._origin
                if ours:
                    sha256 = sha256 or _sha256_of(response.headers)
                if response.status not in REDIRECTS:
                    _check_status(response, url, ours)
                    yield Answer(response, _host(url), sha256, self)
                    return
                url = _next_url(url, response.headers.get("Location"))
            finally:
                response.close()
        raise WebError(f"{_host(url)}: more than {MAX_REDIRECTS} redirects", transient=False)

    def json(self, url: str) -> tuple[Any, str]:
        """A JSON body, and its Link header. Tries again where that may help, for json_s seconds.

        Raises: WebError, Stopped.
        """
        ends = time.monotonic() + self.patience.json_s
        for pause_s in self.patience.pauses_s[:JSON_TRIES - 1]:
            try:
                return self._json(url, ends)
            except WebError as error:
                pause_s = max(pause_s, error.pause_s)
                if not error.transient or time.monotonic() + pause_s > ends:
                    raise
                self.stop.wait(pause_s)
        return self._json(url, ends)

    def _json(self, url: str, ends: float) -> tuple[Any, str]:
        with self.get(url, {"Accept": "application/json"}) as answer:
            data = bytearray()
            while len(data) <= MAX_JSON_BYTES and (chunk := answer.read(1 << 16)):
                data += chunk
                if time.monotonic() > ends:
                    raise WebError(f"{_host(url)}: no whole listing in {self.patience.json_s:g} s")
            if len(data) > MAX_JSON_BYTES:
                raise WebError(f"{_host(url)}: expected at most {MAX_JSON_BYTES} bytes of JSON",
                               transient=False)
            try:
                return json.loads(data), answer.headers.get("Link", "")
            except (ValueError, RecursionError):  # cut short, or no JSON, or nested absurdly
                raise WebError(f"{_host(url)}: expected JSON, got something else") from None

    def _open(self, url: str, headers: dict[str, str]) -> HTTPResponse:
        self.stop.check()
        request = urllib.request.Request(
            url, headers={"User-Agent": f"tinychat/{tinychat.__version__}", **headers})
        if self._token and origin(url) == self._origin:
            request.add_header("Authorization", f"Bearer {self._token}")
        with self.troubles(_host(url)):
            return self._opener.open(request, timeout=self.patience.timeout_s)

    @contextmanager
    def troubles(self, host: str) -> Iterator[None]:
        """What goes wrong with a connection is a WebError, or Stopped where that is why."""
        try:
            yield
        except (OSError, HTTPException, ValueError) as error:
            self.stop.check()
            reason = getattr(error, "reason", error)  # what urllib has wrapped
            if isinstance(reason, TimeoutError):
                reason = f"nothing came for {self.patience.timeout_s:g} s"
            raise WebError(f"{host}: {reason or type(reason).__name__}",
                           transient=not isinstance(reason, ssl.SSLCertVerificationError)) from None


def origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port). Raises: ValueError for a port that is no number."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme)


def _host(url: str) -> str:
    """All that a message says of an address: the rest may hold a signature."""
    return urlsplit(url).hostname or "?"


def _next_url(url: str, location: str | None) -> str:
    """Where a redirect leads. Raises: WebError for nowhere, and for out of TLS."""
    try:
        new = urljoin(url, quote(location or "none:", encoding="iso-8859-1",
                                 safe=string.punctuation))
        scheme, host, _ = origin(new)
    except ValueError:
        scheme = host = ""
    if scheme not in _PORTS or not host or "@" in urlsplit(new).netloc:
        raise WebError(f"{_host(url)}: redirects to no address", transient=False)
    if scheme == "http" and urlsplit(url).scheme == "https":
        raise WebError(f"{_host(url)}: redirects from https to http, on {host}", transient=False)
    return new


def _check_status(response: HTTPResponse, url: str, ours: bool) -> None:
    if response.status in (200, 206, 416):
        return
    asked = response.headers.get("Retry-After", "")
    pause_s = min(float(asked), MAX_PAUSE_S) if asked.isascii() and asked.isdigit() else 0.0
    # a storage server's refusal is an expired signature, and the hub gives a new one
    transient = response.status in TRANSIENT or not ours
    raise WebError(f"{_host(url)} answers HTTP {response.status}",
                   status=response.status if ours else None, transient=transient, pause_s=pause_s)


def _sha256_of(headers) -> str | None:
    for name in ("X-Linked-Etag", "ETag"):
        if SHA256.fullmatch(tag := (headers.get(name) or "").removeprefix("W/").strip('"').lower()):
            return tag
    return None


class _Watched:
    """A connection that a Stop can shut."""

    def __init__(self, *args, stop: Stop, **options):
        super().__init__(*args, **options)
        self._stop = stop

    def connect(self):
        super().connect()
        self._stop.watch(self.sock)


class _Http(_Watched, HTTPConnection):
    pass


class _Https(_Watched, HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, stop: Stop):
        super().__init__()
        self._stop = stop

    def http_open(self, request):
        return self.do_open(_Http, request, stop=self._stop)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, stop: Stop):
        super().__init__()
        self._stop, self._tls = stop, ssl.create_default_context()

    def https_open(self, request):
        return self.do_open(_Https, request, stop=self._stop, context=self._tls)
