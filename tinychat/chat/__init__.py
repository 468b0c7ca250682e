"""One chat request from start to end as a stream of events: the one place where engine, text, mcp,
library and store meet.

`run` yields the contract's events in the contract's order; `fold` makes the plain answer of them.
There is no other path: each door, HTTP or Python, goes through `run`.
"""
from collections.abc import Iterator
from contextlib import closing

from tinychat.chat.checks import check_permissions, find_model, thread_of
from tinychat.chat.request import Chat
from tinychat.chat.settings import ChatSettings
from tinychat.contract import ChatRequest
from tinychat.errors import TinychatError
from tinychat.library import Library
from tinychat.store import Store

__all__ = ["ChatSettings", "fold", "run"]


def run(library: Library, store: Store, request: ChatRequest,
        settings: ChatSettings = ChatSettings()) -> Iterator[dict | None]:
    """The events of one request. Closing the generator cancels what runs.

    Raises: TinychatError before the first event; later failures are an `error` event, then `chat.end`.
    """
    entry = find_model(library, request)
    turns = thread_of(store, request, entry)
    check_permissions(request, settings)
    chat = Chat(library, store, request, entry, turns, settings)
    try:
        with closing(chat.events()) as events:
            for event in events:
                if event is not None or settings.heartbeat_s:
                    yield event
    finally:
        chat.end()


def fold(events: Iterator[dict | None]) -> dict:
    """The response that a stream of events amounts to.

    Raises: TinychatError when the stream has an `error`.
    """
    result = failure = None
    for event in events:  # to its end: what the chat held is given back before anybody is told
        if event is None:
            continue
        if event["type"] == "error":
            failure = dict(event["error"])
        elif event["type"] == "chat.end":
            result = event["result"]
    if failure:
        raise TinychatError(failure.pop("message"), **failure)
    if result:
        return result
    raise TinychatError("the chat ended without a result")
