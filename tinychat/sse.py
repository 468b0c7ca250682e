"""Server-sent events, both ways: `encode` writes one, `Decoder` reads a stream of them.

Source: WHATWG HTML, "Server-sent events", 9.2.5 (parsing) and 9.2.6 (interpreting).
"""
import codecs
import json
import re
from dataclasses import dataclass

KEEP_ALIVE = b": keep-alive\n\n"

# Line ends for str.splitlines but not for JSON: readers that split decoded text would cut here.
LINE_ENDS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"})


def encode(event: dict) -> bytes:
    """One event as the contract frames it: its `type` as the name, the whole object as data.

    {"type": "message.end"} -> b'event: message.end\\ndata: {"type":"message.end"}\\n\\n'
    """
    data = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data.translate(LINE_ENDS)}\n\n".encode()


@dataclass(frozen=True)
class Event:
    """One dispatched event; `id` is the last id that the stream has set so far."""

    data: str
    event: str = "message"
    id: str = ""


class EventTooLarge(ValueError):
    """An event grew past the limit that the reader was given."""


class Decoder:
    """An incremental reader: feed bytes as they come, get the events that they complete."""

    def __init__(self, max_event_bytes: int = 1 << 26):
        self.retry_ms: int | None = None
        self.last_id = ""              # of the last event that has ended, be it without data
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._limit = max_event_bytes
        self._rest: list[str] = []     # pieces of a line that has not ended yet
        self._data: list[str] = []
        self._name = self._id = ""
        self._size = 0
        self._after_cr = False         # a \n that comes next belongs to the \r before it
        self._started = False

    def feed(self, data: bytes) -> list[Event]:
        """The events that end within `data`.

        Raises: EventTooLarge when one event holds more than the limit.
        """
        text = self._text.decode(data)
        if not text:
            return []
        if not self._started:
            self._started, text = True, text.removeprefix("\ufeff")
        if self._after_cr:
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r") if text else False
        *lines, rest = re.split("\r\n|\r|\n", text)
        events = []
        for line in lines:
            whole = "".join(self._rest) + line
            self._rest.clear()
            self._grow(line)
            events += self._line(whole)
        self._grow(rest)
        self._rest.append(rest)
        return events

    def _grow(self, piece: str):
        self._size += len(piece)
        if self._size > self._limit:
            raise EventTooLarge(f"an event is longer than {self._limit} bytes")

    def _line(self, line: str) -> list[Event]:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value[:9])
        elif name == "":
            self._size -= len(line)   # a comment: endless keep-alives are no large event
        return []

    def _dispatch(self) -> list[Event]:
        data, name = self._data, self._name or "message"
        self._data, self._name, self._size = [], "", 0
        self.last_id = self._id
        return [Event("\n".join(data), name, self._id)] if data else []
