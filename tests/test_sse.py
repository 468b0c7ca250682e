"""Server-sent events: framing as the contract wants it, reading as the standard says."""
import json

import pytest
from contract_checker import parse_sse
from hypothesis import given
from hypothesis import strategies as st

from tinychat.sse import KEEP_ALIVE, Decoder, Event, EventTooLarge, encode


def decode(data: bytes, size: int = 1 << 20) -> list[Event]:
    decoder = Decoder()
    return [event for at in range(0, len(data), size) for event in decoder.feed(data[at:at + size])]


def test_an_event_is_its_name_and_one_line_of_json():
    """C-054."""
    assert encode({"type": "message.delta", "content": "ä"}) == (
        'event: message.delta\ndata: {"type":"message.delta","content":"ä"}\n\n'.encode())


@given(st.text())
def test_any_text_stays_on_one_line_for_every_kind_of_reader(text):
    """C-068."""
    event = {"type": "message.delta", "content": text}
    data = encode(event)
    assert parse_sse(data) == ([("message.delta", event)], [])
    assert len(data.decode().splitlines()) == 3
    assert [json.loads(read.data) for read in decode(data)] == [event]


def test_comments_between_events_are_no_events():
    """C-074."""
    data = KEEP_ALIVE + encode({"type": "a.b"}) + KEEP_ALIVE
    assert [name for name, _ in parse_sse(data)[0]] == ["a.b"]
    assert [event.event for event in decode(data)] == ["a.b"]


STREAM = ("\ufeffevent: add\r\ndata: 7\r\r: note\ndata\ndata:\ndata:  x\nid: 5\nretry: 250\nnonsense: 1\n\n"
          "event: empty\n\ndata: last é\nid: a\0b\n\ndata: cut off").encode()
EVENTS = [Event("7", "add"), Event("\n\n x", "message", "5"), Event("last é", "message", "5")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_stream_reads_the_same_in_pieces_of_any_size(size):
    """M-039, M-040."""
    assert decode(STREAM, size) == EVENTS


def test_retry_is_kept():
    decoder = Decoder()
    decoder.feed(STREAM)
    assert decoder.retry_ms == 250


def test_an_id_counts_when_its_event_has_ended_with_or_without_data():
    """M-030, M-039."""
    decoder = Decoder()
    assert decoder.feed(b"id: 1\nretry: soon\n") == [] and decoder.last_id == ""
    assert decoder.feed(b"\nid: 2\ndata: x") == [] and decoder.last_id == "1"
    assert decoder.retry_ms is None
    assert decoder.feed(b"\r\n\r\n") == [Event("x", "message", "2")] and decoder.last_id == "2"


@given(st.binary(max_size=200), st.integers(1, 9))
def test_pieces_never_change_the_events_of_any_bytes(data, size):
    assert decode(data, size) == decode(data)


def test_an_endless_event_is_refused_and_endless_comments_are_not():
    """M-042."""
    with pytest.raises(EventTooLarge):
        Decoder(max_event_bytes=1000).feed(b"data: " + b"x" * 2000)
    decoder = Decoder(max_event_bytes=1000)
    for _ in range(1000):
        decoder.feed(b": still here\n")
