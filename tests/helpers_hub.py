"""A stand-in for the model hub, and for the storage it redirects to, on a port of this machine.

A file's requests take the faults of `faults[name]` one after the other, then `always[name]` if
there is one; the rest is served as it should be. A fault is a function of a Reply.
"""
import hashlib
import json
import re
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from helpers_doors import WAIT_S

COMMIT = "c0ffee" + "0" * 34
PIECE = 1 << 16


@dataclass
class Seen:
    """One request; sent: bytes of the file that went out for it."""

    path: str
    headers: dict[str, str]
    sent: int = 0

    @property
    def start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(match[1]) if match else 0


@dataclass
class Reply:
    """What a fault has in its hands."""

    hub: "HubStandIn"
    handler: BaseHTTPRequestHandler
    seen: Seen
    data: bytes

    def head(self, status: int, **headers) -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.handler.send_header(name.replace("_", "-"), str(value))
        self.handler.end_headers()

    def body(self, data: bytes) -> None:
        for at in range(0, len(data), PIECE):
            self.handler.wfile.write(data[at:at + PIECE])
            self.seen.sent += len(data[at:at + PIECE])

    def good_head(self, **headers) -> int:
        """As it should be, but for `headers`; returns the first byte to send."""
        start, size = self.seen.start, len(self.data)
        if start:
            known = {"Content_Length": size - start,
                     "Content_Range": f"bytes {start}-{size - 1}/{size}"}
        else:
            known = {"Content_Length": size}
        self.head(206 if start else 200, **{**known, **self.hub.file_headers, **headers})
        return start

    def good(self, **headers) -> None:
        self.body(self.data[self.good_head(**headers):])


# ---- faults

def cut_after(n):
    """n bytes and the connection is gone."""
    def fault(reply):
        start = reply.good_head()
        reply.body(reply.data[start:start + n])
    return fault


def status(code, **headers):
    return lambda reply: reply.head(code, Content_Length=0, **headers)


def redirect(url, code=302, **headers):
    return lambda reply: reply.head(code, Location=url, Content_Length=0, **headers)


def lying(**headers):
    """The right bytes under wrong headers; None leaves one out."""
    return lambda reply: reply.good(**headers)


def ignoring_range(reply):
    reply.head(200, Content_Length=len(reply.data))
    reply.body(reply.data)


def sending(data, code=200, **headers):
    """Other bytes."""
    def fault(reply):
        reply.head(code, **headers)
        reply.body(data)
    return fault


def chunked(data):
    def fault(reply):
        reply.head(200, Transfer_Encoding="chunked")
        for at in range(0, len(data), PIECE):
            piece = data[at:at + PIECE]
            reply.handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            reply.seen.sent += len(piece)
        reply.handler.wfile.write(b"0\r\n\r\n")
    return fault


@dataclass
class Stalling:
    """n bytes, then nothing until the stand-in closes."""

    n: int
    reached: threading.Event = field(default_factory=threading.Event)

    def __call__(self, reply):
        start = reply.good_head()
        reply.body(reply.data[start:start + self.n])
        reply.handler.wfile.flush()
        self.reached.set()
        reply.hub.closing.wait(WAIT_S)


@dataclass
class Piecewise:
    """A piece each time that `go` is released; `sent` counts them."""

    piece: int = PIECE
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    sent: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __call__(self, reply):
        start = reply.good_head()
        for at in range(start, len(reply.data), self.piece):
            reply.body(reply.data[at:at + self.piece])
            reply.handler.wfile.flush()
            self.sent.release()
            assert self.go.acquire(timeout=WAIT_S)


# ---- the stand-in

class HubStandIn:
    """`repos[owner/name]` holds a repository's files by path. Close it, or use it in a `with`.

    how: "blobs" (the listing with sizes), "no sizes" or "no blobs" (only the tree will do).
    hashes: does the listing tell them? token: what the hub wants to hear, if it is not open.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.plain: dict[str, bytes] = {}  # other paths, as a storage serves them
        self.answers: dict[str, object] = {}  # path: JSON instead of the listing, or a fault
        self.faults, self.always = defaultdict(list), {}
        self.how, self.hashes, self.page, self.commit = "blobs", True, 1000, COMMIT
        self.token: str | None = None
        self.file_headers: dict[str, str] = {}
        self.requests: list[Seen] = []
        self.closing = threading.Event()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.close_connection = True
                stand_in.serve(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # a client that goes away is what many tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT_S)

    def of(self, name: str) -> list[Seen]:
        """The requests for the file of that name."""
        return [seen for seen in list(self.requests) if seen.path.endswith("/" + name)
                and "/api/" not in seen.path]

    def serve(self, handler) -> None:
        url = urlsplit(handler.path)
        seen = Seen(unquote(url.path), {k.lower(): v for k, v in handler.headers.items()})
        self.requests.append(seen)
        reply = Reply(self, handler, seen, b"")
        if self.token and seen.headers.get("authorization") != f"Bearer {self.token}":
            return reply.head(401, Content_Length=0)
        if seen.path.startswith("/api/models/"):
            return self._listing(reply, parse_qs(url.query))
        return self._file(reply)

    def _file(self, reply: Reply) -> None:
        path = reply.seen.path
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        data = self.repos.get(match[1], {}).get(match[2]) if match else self.plain.get(path)
        name = path.rpartition("/")[2]
        fault = self.faults[name].pop(0) if self.faults[name] else self.always.get(name)
        if data is None and fault is None:
            return reply.head(404, Content_Length=0)
        reply.data = data or b""
        return fault(reply) if fault else reply.good()

    def _listing(self, reply: Reply, query: dict) -> None:
        path = reply.seen.path
        if path in self.answers:
            answer = self.answers[path]
            return answer(reply) if callable(answer) else self._json(reply, answer)
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        files = self.repos.get(match[1]) if match else None
        if files is None or (match[2] == "revision" and self.how == "no blobs"):
            return reply.head(404, Content_Length=0)
        if match[2] == "revision":
            siblings = [{"rfilename": name} | self._facts(data, "sha256")
                        for name, data in files.items()]
            return self._json(reply, {"sha": self.commit, "siblings": siblings})
        items = [{"type": "directory", "path": "folder", "size": 0}]
        items += [{"type": "file", "path": name} | self._facts(data, "oid", always=True)
                  for name, data in files.items()]
        first = int(query.get("cursor", ["0"])[0])
        link = {}
        if first + self.page < len(items):
            link["Link"] = f'<{path}?recursive=true&cursor={first + self.page}>; rel="next"'
        return self._json(reply, items[first:first + self.page], **link)

    def _facts(self, data: bytes, hash_key: str, always: bool = False) -> dict:
        if self.how == "no sizes" and not always:
            return {}
        facts = {"size": len(data)}
        if self.hashes:
            facts["lfs"] = {hash_key: hashlib.sha256(data).hexdigest(), "size": len(data)}
        return facts

    def _json(self, reply: Reply, value, **headers) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        reply.head(200, Content_Length=len(data), **headers)
        reply.handler.wfile.write(data)

    def sent_of(self, name: str) -> int:
        return sum(seen.sent for seen in self.of(name))

    def counts(self) -> Counter:
        return Counter(seen.path.rpartition("/")[2] for seen in list(self.requests))
