"""MCP servers to talk to: a good one that can be told to misbehave, and raw sockets that are hostile."""
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tinychat.mcp.client import Client, connect_http
from tinychat.mcp.era import HANDSHAKE, STATELESS, Memory
from tinychat.mcp.limits import Limits
from tinychat.mcp.watch import Watch

WAIT_S = 20.0  # bound of every wait; a test that needs it has failed
QUICK = Limits(connect_s=2.0, probe_s=0.4, initialize_s=3.0, list_s=5.0, goodbye_s=1.0,
               retry_ms=10, input_pause_s=(0.001, 0.004))


def quick(**changes) -> Limits:
    return replace(QUICK, **changes)


ECHO = {"name": "echo", "description": "says it again",
        "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}}}


@dataclass
class Seen:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    at: float = field(default_factory=time.monotonic)

    @property
    def message(self):
        return json.loads(self.body) if self.body else None

    @property
    def rpc(self) -> str:
        """The JSON-RPC method, or the HTTP one where there is no body; "" for an answer of ours."""
        return self.message.get("method", "") if self.body else self.method


class Reply:
    """What a script answers with."""

    def __init__(self, server: "McpServer", handler: BaseHTTPRequestHandler, seen: Seen):
        self.server, self.seen, self._handler = server, seen, handler

    def head(self, status: int, **headers) -> None:
        """Names with _ for -; lists for several."""
        self._handler.send_response(status)
        for name, values in headers.items():
            for value in values if isinstance(values, list) else [values]:
                self._handler.send_header(name.replace("_", "-"), str(value))
        self._handler.end_headers()

    def write(self, data: bytes) -> None:
        self._handler.wfile.write(data)
        self._handler.wfile.flush()

    def status(self, status: int, body: bytes | str = b"", kind: str | None = "text/plain",
               **headers) -> None:
        body = body.encode() if isinstance(body, str) else body
        if kind:
            headers["Content_Type"] = kind
        self.head(status, Content_Length=len(body), **headers)
        self.write(body)

    def json(self, value, status: int = 200, kind: str = "application/json", **headers) -> None:
        self.status(status, json.dumps(value), kind, **headers)

    def result(self, result: dict, **headers) -> None:
        """As JSON, or as an event stream if the server is of that kind."""
        answer = {"jsonrpc": "2.0", "id": self.seen.message["id"], "result": result}
        if self.server.streams:
            self.stream(**headers)
            self.event(answer)
        else:
            self.json(answer, **headers)

    def error(self, code: int, message: str = "no", status: int = 200, data=None, **headers) -> None:
        error = {"code": code, "message": message} | ({} if data is None else {"data": data})
        self.json({"jsonrpc": "2.0", "id": self.seen.message["id"], "error": error}, status, **headers)

    def stream(self, **headers) -> None:
        self.head(200, **{"Content_Type": "text/event-stream", **headers})

    def event(self, value=None, **fields) -> None:
        self.write(frame(value, **fields))

    def hang(self) -> None:
        """Until the test is over or the client gone."""
        self._handler.connection.settimeout(0.02)
        while not self.server.closing.is_set():
            try:
                if self._handler.connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        self.server.gone.append(self.seen)


def frame(value=None, *, id: str | None = None, event: str | None = None,
          retry: int | None = None) -> bytes:
    """One event. value: JSON, or text as it is."""
    fields = {"retry": retry, "id": id, "event": event,
              "data": json.dumps(value) if isinstance(value, (dict, list)) else value}
    lines = [f"{name}: {text}\n" for name, text in fields.items() if text is not None]
    return "".join([*lines, "\n"]).encode()


Script = Callable[[Reply], None]


class McpServer:
    """Speaks the revisions in `versions`, and keeps sessions if told to; `on` changes it by method.

    on: JSON-RPC method (or GET, DELETE) -> script, or list of scripts for one request after the
    other, after which all is as usual.
    """

    def __init__(self, *, versions=(*HANDSHAKE, STATELESS), tools=(ECHO,), streams: bool = False,
                 sessions: bool = False, on: dict[str, Script | list[Script]] | None = None):
        self.versions, self.tools, self.streams, self.sessions = versions, list(tools), streams, sessions
        self.on = dict(on or {})
        self.seen: list[Seen] = []
        self.gone: list[Seen] = []     # whose client went away
        self.session_ids: list[str] = []
        self.closing = threading.Event()
        self.capabilities = {"tools": {}}

    # ---- what was asked

    def rpcs(self) -> list[str]:
        return [seen.rpc for seen in self.seen]

    def of(self, rpc: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.rpc == rpc]

    def wait_for(self, rpc: str, n: int = 1) -> list[Seen]:
        wait_until(lambda: len(self.of(rpc)) >= n, f"{n} of {rpc}, got {self.rpcs()}")
        return self.of(rpc)

    # ---- what is answered

    def handle(self, reply: Reply) -> None:
        script = self.on.get(reply.seen.rpc)
        if isinstance(script, list):
            script = script.pop(0) if script else None
        (script or self.usual)(reply)

    def usual(self, reply: Reply) -> None:
        seen = reply.seen
        if seen.method != "POST":
            return reply.status(405 if seen.method == "GET" else 200)
        message = seen.message
        if "id" not in message or "method" not in message:
            return reply.status(202)
        method, params = message["method"], message["params"]
        if method == "initialize":
            return self._initialize(reply, params)
        modern = STATELESS in self.versions and "_meta" in params \
            and "io.modelcontextprotocol/protocolVersion" in params["_meta"]
        if not modern and (method == "server/discover" or not set(HANDSHAKE) & set(self.versions)):
            return reply.error(-32601, status=404)
        if self.sessions and not modern and \
                seen.headers.get("mcp-session-id") not in self.session_ids:
            return reply.status(404, "session not found")
        results = {"server/discover": self._discovery, "tools/list": self._list, "tools/call": self._call}
        reply.result(results[method](params))

    def _initialize(self, reply: Reply, params: dict) -> None:
        known = [version for version in HANDSHAKE if version in self.versions]
        if not known:
            return reply.error(-32022, "unsupported", 400, {"supported": list(self.versions)})
        wanted = params["protocolVersion"]
        headers = {}
        if self.sessions:
            self.session_ids.append(f"session-{len(self.session_ids) + 1}-secret")
            headers["Mcp_Session_Id"] = self.session_ids[-1]
        reply.result({"protocolVersion": wanted if wanted in known else known[-1],
                      "capabilities": self.capabilities, "serverInfo": {"name": "s", "version": "1"}},
                     **headers)

    def _discovery(self, params: dict) -> dict:
        return {"supportedVersions": list(self.versions), "capabilities": self.capabilities,
                "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}

    def _list(self, params: dict) -> dict:
        return {"tools": self.tools, "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}

    def _call(self, params: dict) -> dict:
        text = params["arguments"].get("text", "")
        return {"content": [{"type": "text", "text": text}], "resultType": "complete"}

    # ---- the socket

    def __enter__(self) -> "McpServer":
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                seen = Seen(self.command, self.path,
                            {name.lower(): value for name, value in self.headers.items()}, body)
                script.seen.append(seen)
                with suppress(ConnectionError):
                    script.handle(Reply(script, self, seen))

            do_GET = do_DELETE = do_POST

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *args: None
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT_S)


@contextmanager
def raw_server(serve: Callable[[socket.socket, threading.Event], None]):
    """Yields a URL. serve: has a fresh connection, and an event that is set when the test is over."""
    closing, threads = threading.Event(), []
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection):
        with connection, suppress(OSError):
            serve(connection, closing)

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=one, args=(connection,), daemon=True))
            threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
    finally:
        closing.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in [accepting, *threads]:
            thread.join(WAIT_S)


def read_request(connection: socket.socket) -> bytes:
    """Head and body of one request. Raises: ConnectionError when it does not come."""
    def more() -> bytes:
        piece = connection.recv(1 << 16)
        if not piece:
            raise ConnectionError("the client is gone")
        return piece

    data = b""
    while b"\r\n\r\n" not in data:
        data += more()
    head, _, body = data.partition(b"\r\n\r\n")
    size = next((int(line[15:]) for line in head.split(b"\r\n")
                 if line.lower().startswith(b"content-length:")), 0)
    while len(body) < size:
        body += more()
    return head + b"\r\n\r\n" + body


@contextmanager
def connected(server: "McpServer | str", **options):
    """A client, with quick limits and a memory of its own."""
    client = connect(server, **options)
    try:
        yield client
    finally:
        client.close()


def connect(server: "McpServer | str", **options) -> Client:
    url = server if isinstance(server, str) else server.url
    return connect_http(url, **{"limits": QUICK, "memory": Memory(), "connect_s": 15.0, **options})


def watch(seconds: float = 5.0, **options) -> Watch:
    return Watch(seconds, what="the test's call", **options)


def echo(client: Client, text: str = "hello", seconds: float = 5.0) -> str:
    """One call of the tool that repeats."""
    result = client.call("echo", {"text": text}, watch(seconds))
    assert not result.is_error
    return result.content[0]["text"]


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.005)
