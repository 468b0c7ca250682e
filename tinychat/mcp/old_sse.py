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
    CalledOff, McpError, ProtocolError, Refused, TimedOut, Unreachable)
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


class OldSseTransport:
    """See transport.Transport. There is no second connection: when the stream ends, all is over."""

    def __init__(self, door: Door):
        self.where = door.url.where
        self.on_notification = lambda message: None
        self._door, self._limits = door, door.limits
        self._opening = threading.Lock()
        self._stream: Answer | None = None
        self._reader: threading.Thread | None = None
        self._endpoint: Url | None = None
        self._ready = threading.Event()       # the endpoint is known, or the stream is over
        self._fault: McpError | None = None   # why it is over
        self._slots: dict[int, Slot] = {}
        self._errands = Errands()

    def exchange(self, message: dict, watch: Watch, headers: Mapping[str, str] = {}) -> dict:
        stream = self._open(watch)
        slot = self._slots[message["id"]] = Slot(watch)
        stream.wire.budget = Budget(self._limits)
        try:
            self._check()  # the reader tells of its end whoever waits by then
            self.notify(message, watch)
            while not slot.done.wait(watch.slice()):
                pass
            if slot.answer is None:
                self._check()
            return slot.answer or {}
        except (TimedOut, CalledOff):
            if message["method"] != "initialize":
                gone = jsonrpc.notification("notifications/cancelled", {
                    "requestId": message["id"], "reason": "nobody waits for it any more"})
                self._errands.run(lambda: self.notify(gone, self._briefly()))
            raise
        finally:
            del self._slots[message["id"]]

    def notify(self, message: dict, watch: Watch) -> None:
        fields = {"Content-Type": "application/json", "Accept": "application/json"}
        with self._door.send("POST", watch, Budget(self._limits), url=self._endpoint,
                             headers=fields, body=jsonrpc.dumps(message)) as answer:
            if answer.status >= 400:
                raise refusal(answer, self._door)

    def close(self) -> None:
        self._errands.finish(self._limits.goodbye_s)
        with self._opening:
            stream, reader = self._stream, self._reader
        if stream and reader:
            stream.wire.shut()
            reader.join(self._limits.goodbye_s)

    def _briefly(self) -> Watch:
        return Watch(self._limits.goodbye_s, what=f"a goodbye to {self.where}")

    def _open(self, watch: Watch) -> Answer:
        """The stream, once it has named its endpoint. Raises: McpError, the same one ever after."""
        limited = watch.within(self._limits.connect_s, f"the event stream of {self.where}")
        while not self._opening.acquire(timeout=limited.slice()):
            pass
        try:
            if self._stream is None:
                self._stream = self._connect(limited)
                self._reader = threading.Thread(target=self._read, args=(self._stream,),
                                                name="mcp-sse", daemon=True)
                self._reader.start()
            stream = self._stream
        finally:
            self._opening.release()
        while not self._ready.wait(limited.slice()):
            pass
        self._check()
        return stream

    def _check(self) -> None:
        """Raises: McpError when the stream is over; each thread gets an exception of its own."""
        if self._fault:
            raise type(self._fault)(self._fault.message)

    def _connect(self, watch: Watch) -> Answer:
        stream = self._door.send("GET", watch, Budget(self._limits),
                                 headers={"Accept": "text/event-stream"})
        try:
            if stream.status >= 400:
                raise refusal(stream, self._door)
            if stream.status != 200 or stream.content_type != "text/event-stream":
                raise ProtocolError(f"{self.where}: expected an event stream, got HTTP "
                                    f"{stream.status} with {stream.content_type or 'no type'}")
        except BaseException:
            stream.close()
            raise
        stream.wire.watch = Watch(LIFE_S, what=f"the event stream of {self.where}")
        return stream

    def _read(self, stream: Answer) -> None:
        decoder = Decoder(self._limits.message_bytes)
        fault: McpError = Unreachable(f"{self.where}: the event stream ended")
        try:
            with stream:
                for piece in stream.pieces():
                    for event in decoder.feed(piece):
                        self._take(event, stream)
        except EventTooLarge as error:
            fault = ProtocolError(f"{self.where}: {error}")
        except McpError as error:
            fault = error
        log.debug("%s", fault)
        self._fault = fault
        self._ready.set()
        for slot in list(self._slots.values()):
            slot.done.set()

    def _take(self, event: Event, stream: Answer) -> None:
        if event.event == "endpoint" and self._endpoint is None:
            endpoint = self._door.url.join(event.data)
            if endpoint.origin != self._door.url.origin:
                raise Refused(f"{self.where}: the server wants messages at {endpoint.origin}, "
                              "which is another origin")
            self._endpoint = endpoint
            self._ready.set()
        elif event.event == "message" and event.data:
            for message in jsonrpc.members(jsonrpc.loads(event.data)):
                stream.wire.budget.take_message(self.where)
                self._sort(message)

    def _sort(self, message: dict) -> None:
        kind, waiting = jsonrpc.kind_of(message), list(self._slots.items())
        if kind == "answer":
            for id, slot in waiting:
                if jsonrpc.answers(message, id):
                    slot.answer = message
                    slot.done.set()
        elif kind == "request":
            try:
                self.notify(jsonrpc.reply_to(message), self._briefly())
            except McpError as error:
                log.debug("a request of the server's got no answer: %s", error)
        elif kind == "notification":
            of = [slot for id, slot in waiting if jsonrpc.shows_progress(message, id)]
            for slot in of:
                slot.watch.alive()
            if not of:
                self.on_notification(message)
