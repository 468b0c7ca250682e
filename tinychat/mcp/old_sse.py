"""HTTP+SSE, the transport of 2024-11-05: messages go to one address, answers come on a stream.

The stream is opened at the first request and lives as long as the connection. One thread reads it
and hands each answer to whoever waits: with several chats on one server, a reader that waits for
its own answer alone would leave the stream half read when its time is up.

Source: MCP 2024-11-05, "Transports".
"""
import logging
import threading
from collections.abc import Mapping

from tinychat.mcp import jsonrpc
from tinychat.mcp.errands import Errands
from tinychat.mcp.errors import (
    CalledOff, McpError, ProtocolError, Refused, SessionLost, TimedOut, Unreachable)
from tinychat.mcp.http import Answer, Door
from tinychat.mcp.limits import Budget
from tinychat.mcp.status import refusal
from tinychat.mcp.url import Url
from tinychat.mcp.watch import Watch
from tinychat.sse import Decoder, Event, EventTooLarge

log = logging.getLogger(__name__)

LIFE_S = 7 * 24 * 3600.0  # of a stream: it ends with its chat, or with its server


class Slot:
    """One who waits for an answer."""

    def __init__(self, watch: Watch):
        self.watch, self.done = watch, threading.Event()
        self.answer: dict | None = None


class Stream:
    """One event stream, and what has come of it."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.reader: threading.Thread | None = None
        self.endpoint: Url | None = None
        self.ready = threading.Event()       # the endpoint is known, or the stream is over
        self.fault: McpError | None = None   # why it is over
        self.slots: dict[int, Slot] = {}

    def check(self) -> None:
        """Raises: McpError when the stream is over; each thread gets an exception of its own."""
        if self.fault:
            raise type(self.fault)(self.fault.message)


class OldSseTransport:
    """See transport.Transport. When the stream ends, so do the calls that wait; the next request
    has to greet the server anew, on another stream (SessionLost).
    """

    def __init__(self, door: Door):
        self.where = door.url.where
        self.on_notification = lambda message: None
        self._door, self._limits = door, door.limits
        self._opening = threading.Lock()
        self._stream: Stream | None = None
        self._is_closed = False
        self._errands = Errands()

    def exchange(self, message: dict, watch: Watch, headers: Mapping[str, str] = {}) -> dict:
        stream = self._open(message, watch)
        slot = stream.slots[message["id"]] = Slot(watch)
        stream.answer.wire.budget = Budget(self._limits)
        try:
            stream.check()  # the reader tells of its end whoever waits by then
            self._post(message, watch, stream)
            while not slot.done.wait(watch.slice()):
                pass
            if slot.answer is None:
                stream.check()
            return slot.answer or {}
        except (TimedOut, CalledOff):
            if message["method"] != "initialize":
                gone = jsonrpc.notification("notifications/cancelled", {
                    "requestId": message["id"], "reason": "nobody waits for it any more"})
                self._errands.run(lambda: self._post(gone, self._briefly(), stream))
            raise
        finally:
            del stream.slots[message["id"]]

    def notify(self, message: dict, watch: Watch) -> None:
        if self._stream is None:
            raise Unreachable(f"{self.where}: there is no event stream")
        self._post(message, watch, self._stream)

    def close(self) -> None:
        self._errands.finish(self._limits.goodbye_s)
        with self._opening:
            self._is_closed = True
            stream = self._stream
        if stream:
            stream.answer.wire.shut()
            stream.reader.join(self._limits.goodbye_s)

    def _briefly(self) -> Watch:
        return Watch(self._limits.goodbye_s, what=f"a goodbye to {self.where}")

    def _post(self, message: dict, watch: Watch, stream: Stream) -> None:
        fields = {"Content-Type": "application/json", "Accept": "application/json"}
        with self._door.send("POST", watch, Budget(self._limits), url=stream.endpoint,
                             headers=fields, body=jsonrpc.dumps(message)) as answer:
            if answer.status >= 400:
                raise refusal(answer, self._door)

    def _open(self, message: dict, watch: Watch) -> Stream:
        """The stream, once it has named its endpoint. Raises: SessionLost, other McpErrors."""
        limited = watch.within(self._limits.connect_s, f"the event stream of {self.where}")
        while not self._opening.acquire(timeout=limited.slice()):
            pass
        try:
            stream = self._stream
            if stream and stream.fault and message["method"] != "initialize":
                raise SessionLost(f"{stream.fault.message}; it has to be opened anew")
            if stream is None or stream.fault:
                if self._is_closed:
                    raise Unreachable(f"{self.where}: the connection was closed")
                stream = self._stream = self._connect(limited)
        finally:
            self._opening.release()
        while not stream.ready.wait(limited.slice()):
            pass
        stream.check()
        return stream

    def _connect(self, watch: Watch) -> Stream:
        answer = self._door.send("GET", watch, Budget(self._limits),
                                 headers={"Accept": "text/event-stream"})
        try:
            if answer.status >= 400:
                raise refusal(answer, self._door)
            if answer.status != 200 or answer.content_type != "text/event-stream":
                raise ProtocolError(f"{self.where}: expected an event stream, got HTTP "
                                    f"{answer.status} with {answer.content_type or 'no type'}")
        except BaseException:
            answer.close()
            raise
        answer.wire.watch = Watch(LIFE_S, what=f"the event stream of {self.where}")
        stream = Stream(answer)
        stream.reader = threading.Thread(target=self._read, args=(stream,), name="mcp-sse",
                                         daemon=True)
        stream.reader.start()
        return stream

    def _read(self, stream: Stream) -> None:
        decoder = Decoder(self._limits.message_bytes)
        fault: McpError = Unreachable(f"{self.where}: the event stream ended")
        try:
            with stream.answer:
                for piece in stream.answer.pieces():
                    for event in decoder.feed(piece):
                        self._take(event, stream)
        except EventTooLarge as error:
            fault = ProtocolError(f"{self.where}: {error}")
        except McpError as error:
            fault = error
        log.debug("%s", fault)
        stream.fault = fault
        stream.ready.set()
        for slot in list(stream.slots.values()):
            slot.done.set()

    def _take(self, event: Event, stream: Stream) -> None:
        if event.event == "endpoint" and stream.endpoint is None:
            endpoint = self._door.url.join(event.data)
            if endpoint.origin != self._door.url.origin:
                raise Refused(f"{self.where}: the server wants messages at {endpoint.origin}, "
                              "which is another origin")
            stream.endpoint = endpoint
            stream.ready.set()
        elif event.event == "message" and event.data:
            for message in jsonrpc.members(jsonrpc.loads(event.data)):
                stream.answer.wire.budget.take_message(self.where)
                self._sort(message, stream)

    def _sort(self, message: dict, stream: Stream) -> None:
        kind, waiting = jsonrpc.kind_of(message), list(stream.slots.items())
        if kind == "answer":
            for id, slot in waiting:
                if jsonrpc.answers(message, id):
                    slot.answer = message
                    slot.done.set()
        elif kind == "request":
            try:
                self._post(jsonrpc.reply_to(message), self._briefly(), stream)
            except McpError as error:
                log.debug("a request of the server's got no answer: %s", error)
        elif kind == "notification":
            of = [slot for id, slot in waiting if jsonrpc.shows_progress(message, id)]
            for slot in of:
                slot.watch.alive()
            if not of:
                self.on_notification(message)
