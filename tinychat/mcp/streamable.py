"""Streamable HTTP: one endpoint, a POST for each message, answers as JSON or as an event stream.

Source: MCP 2025-11-25 (sessions, resumption) and 2026-07-28 (neither), "Streamable HTTP".
"""
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tinychat.mcp import era, headers as header_rules, jsonrpc
from tinychat.mcp.errands import Errands
from tinychat.mcp.errors import (
    CalledOff, McpError, ProtocolError, SessionLost, TimedOut, Unreachable)
from tinychat.mcp.http import Answer, Door
from tinychat.mcp.limits import Budget
from tinychat.mcp.status import refusal
from tinychat.mcp.watch import Watch
from tinychat.sse import Decoder, EventTooLarge

log = logging.getLogger(__name__)

JSON, EVENTS = "application/json", "text/event-stream"
SESSION = "Mcp-Session-Id"
_SESSION = re.compile("[\x21-\x7e]{1,1024}")
MAX_EVENT_ID = 4_096  # characters that we send back


@dataclass
class Place:
    """How far an exchange has read, over all the streams it took."""

    last_id: str = ""
    retry_ms: int = 0
    n_tries: int = 0  # resumptions since the last message


class HttpTransport:
    """Both eras: a message of the stateless one says so itself. See transport.Transport.

    What an answer to `initialize` sets, session and version, goes out with all that follows it.
    """

    def __init__(self, door: Door):
        self.where = door.url.where
        self.on_notification = lambda message: None
        self._door, self._limits = door, door.limits
        self._session: str | None = None  # a secret
        self._disowned: str | None = None  # a session that the server says it does not know
        self._version: str | None = None
        self._errands = Errands()

    def exchange(self, message: dict, watch: Watch, headers: Mapping[str, str] = {}) -> dict:
        try:
            return self._converse(message, watch, headers)
        except (TimedOut, CalledOff):
            # A server of the stateless era sees the closed connection.
            if not era.stated_version(message) and message["method"] != "initialize":
                gone = jsonrpc.notification("notifications/cancelled", {
                    "requestId": message["id"], "reason": "nobody waits for it any more"})
                self._errands.run(lambda: self.notify(gone, self._briefly()))
            raise
        except ProtocolError as error:
            raise error.named(self.where)

    def notify(self, message: dict, watch: Watch) -> None:
        self._post(message, watch, Budget(self._limits)).close()

    def close(self) -> None:
        watch = self._briefly()
        self._errands.finish(self._limits.goodbye_s)
        session, self._session = self._session, None
        if session:
            try:
                fields = self._era_headers({}) | {SESSION: session}
                self._door.send("DELETE", watch, Budget(self._limits), headers=fields).close()
            except McpError as error:
                log.debug("a session could not be ended: %s", error)

    def _briefly(self) -> Watch:
        return Watch(self._limits.goodbye_s, what=f"a goodbye to {self.where}")

    def _converse(self, message: dict, watch: Watch, headers: Mapping[str, str]) -> dict:
        budget, place = Budget(self._limits), Place(retry_ms=self._limits.retry_ms)
        first = message["method"] == "initialize"
        with self._post(message, watch, budget, headers) as answer:
            if first:
                self._session, self._version = self._new_session(answer), None
            found = self._find(answer, message, watch, budget, place)
        while found is None:
            with self._resume(message, watch, budget, place) as answer:
                found = self._find(answer, message, watch, budget, place)
        if first and isinstance(found.get("result"), dict):
            version = found["result"].get("protocolVersion")
            self._version = version if version in era.HANDSHAKE else None
        return found

    def _new_session(self, answer: Answer) -> str | None:
        session = answer.header(SESSION)
        if session and not _SESSION.fullmatch(session):
            raise ProtocolError("expected a session id of 1 to 1024 visible ASCII characters, got "
                                f"one of {len(session)} that is not")
        return session or None

    def _post(self, message: dict, watch: Watch, budget: Budget,
              extra: Mapping[str, str] = {}) -> Answer:
        """Raises: SessionLost, ServerError for a status of 400 and above, other McpErrors."""
        fields = {"Content-Type": JSON, "Accept": f"{JSON}, {EVENTS}",
                  **self._era_headers(message), **extra}
        session = fields.get(SESSION)
        if session and session == self._disowned:
            raise SessionLost(f"{self.where}: the server does not know our session")
        answer = self._door.send("POST", watch, budget, headers=fields,
                                 body=jsonrpc.dumps(message))
        if answer.status < 400:
            return answer
        with answer:
            if answer.status == 404 and session:
                raise SessionLost(f"{self.where}: the server has forgotten our session (HTTP 404)",
                                  http_status=404)
            error = refusal(answer, self._door, self._session)
            # Many servers say so instead of 404 when they were restarted. It may mean other things
            # too, so this request is over; the next one begins with another session.
            said = error.message.replace(self.where, "").lower()
            if answer.status == 400 and session and "session" in said:
                self._disowned = session
            raise error

    def _era_headers(self, message: dict) -> dict[str, str]:
        """What the era wants of every request: its message repeated, or version and session."""
        if version := era.stated_version(message):
            method = message["method"]
            fields = {"MCP-Protocol-Version": version, "Mcp-Method": header_rules.encode(method)}
            if method == "tools/call":
                fields["Mcp-Name"] = header_rules.encode(message["params"]["name"])
            return fields
        if message.get("method") == "initialize":
            return {}
        known = {"MCP-Protocol-Version": self._version, SESSION: self._session}
        return {name: value for name, value in known.items() if value}

    def _resume(self, message: dict, watch: Watch, budget: Budget, place: Place) -> Answer:
        """A stream that ended too early goes on where it stopped, if the server can do that.

        Raises: Unreachable when it cannot: the request may have been done, it is not sent again.
        """
        if not place.last_id or era.stated_version(message):
            raise Unreachable(f"{self.where}: the stream ended without an answer")
        if place.n_tries >= self._limits.resumptions:
            raise Unreachable(f"{self.where}: the stream ended without an answer, and "
                              f"{place.n_tries} times more when it was resumed")
        place.n_tries += 1
        watch.pause(min(place.retry_ms, self._limits.max_retry_ms) / 1000)
        fields = {"Accept": EVENTS, "Last-Event-ID": place.last_id, **self._era_headers({})}
        answer = self._door.send("GET", watch, budget, headers=fields)
        if answer.status < 400:
            return answer
        with answer:
            raise refusal(answer, self._door, self._session)

    def _find(self, answer: Answer, message: dict, watch: Watch, budget: Budget, place: Place
              ) -> dict | None:
        """The answer to `message`; None when the stream ended before."""
        if answer.status == 200 and answer.content_type == JSON:
            found = self._in_body(answer)
        elif answer.status == 200 and answer.content_type == EVENTS:
            found = self._in_stream(answer, place)
        else:
            raise ProtocolError(f"expected JSON or an event stream, got HTTP {answer.status} with "
                                f"{answer.content_type or 'no content type'}",
                                http_status=answer.status)
        for one in found:
            nobodys = answer.content_type == JSON and jsonrpc.is_nobodys_error(one)
            if jsonrpc.answers(one, message["id"]) or nobodys:
                return one
            budget.take_message(self.where)
            self._aside(one, message, watch)
        if answer.content_type == JSON:
            raise ProtocolError(f"expected the answer to request {message['id']}, got JSON "
                                "without it")
        return None

    def _in_body(self, answer: Answer) -> Iterator[dict]:
        body = answer.body(self._limits.message_bytes)
        if not body.strip():
            raise ProtocolError("expected an answer, got an empty body")
        yield from jsonrpc.members(jsonrpc.loads(body))

    def _in_stream(self, answer: Answer, place: Place) -> Iterator[dict]:
        """The messages of a stream until it ends, be it properly or not."""
        decoder = Decoder(self._limits.message_bytes)
        pieces = answer.pieces()
        while True:
            try:
                piece = next(pieces, b"")
            except Unreachable as error:
                log.debug("a stream broke: %s", error)
                return
            if not piece:
                return
            yield from self._messages(decoder, piece, place)
            if decoder.retry_ms is not None:
                place.retry_ms = decoder.retry_ms
            if header_rules.is_value(decoder.last_id) and len(decoder.last_id) <= MAX_EVENT_ID:
                place.last_id = decoder.last_id or place.last_id

    def _messages(self, decoder: Decoder, piece: bytes, place: Place) -> Iterator[dict]:
        try:
            for event in decoder.feed(piece):
                if event.event != "message" or not event.data:
                    continue
                place.n_tries = 0
                yield from jsonrpc.members(jsonrpc.loads(event.data))
        except EventTooLarge as error:
            raise ProtocolError(str(error)) from None

    def _aside(self, one: dict, message: dict, watch: Watch) -> None:
        """What comes beside the answer."""
        kind = jsonrpc.kind_of(one)
        if kind == "request" and not era.stated_version(message):
            try:
                self.notify(jsonrpc.reply_to(one), watch.within(self._limits.goodbye_s))
            except McpError as error:  # also when the watch is over: who reads on sees it
                log.debug("a request of the server's got no answer: %s", error)
        elif kind == "notification":
            if jsonrpc.shows_progress(one, message["id"]):
                watch.alive()
            else:
                self.on_notification(one)
