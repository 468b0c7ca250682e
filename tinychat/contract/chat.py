"""`POST /api/v1/chat`: the request's dataclasses, and the validation that makes them."""
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tinychat import images
from tinychat.contract.checks import (
    Fields, array, boolean, choice, integer, number, string, text, wrong_type, wrong_value)
from tinychat.errors import InvalidRequest

MAX_IMAGES, MAX_PIXELS = 1000, 100_000_000  # of one request; decoding so many pixels takes 3 s
MAX_INTEGRATIONS = 32
MAX_LABEL_LENGTH = 64
MAX_TOOL_TIMEOUT_MS = 3_600_000
REASONING = ("off", "low", "medium", "high", "on")
RESPONSE_ID_PREFIX = "resp_"


@dataclass(frozen=True)
class TextItem:
    content: str


@dataclass(frozen=True)
class ImageItem:
    data_url: str


@dataclass(frozen=True)
class Plugin:
    """A server from mcp.json; `allowed_tools` None offers all of its tools."""

    id: str
    allowed_tools: tuple[str, ...] | None = None
    timeout: int | None = None  # ms per tool call


@dataclass(frozen=True)
class EphemeralServer:
    """A remote MCP server that lives as long as the request; `headers` stay out of every repr."""

    server_label: str
    server_url: str
    allowed_tools: tuple[str, ...] | None = None
    headers: tuple[tuple[str, str], ...] = ()
    timeout: int | None = None  # ms per tool call

    def __repr__(self) -> str:
        return f"EphemeralServer({self.server_label!r})"


@dataclass(frozen=True)
class ChatRequest:
    """One chat request; fields are the wire's, None means that the request does not say."""

    model: str
    input: tuple[TextItem | ImageItem, ...]
    system_prompt: str | None = None
    integrations: tuple[Plugin | EphemeralServer, ...] = ()
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    max_output_tokens: int | None = None
    reasoning: str | None = None
    context_length: int | None = None
    store: bool = True
    previous_response_id: str | None = None
    ttl: int | None = None


def parse_chat_request(value: Any) -> ChatRequest:
    """The request, checked field by field in the order of the contract's table.

    Raises: InvalidRequest with code and param of the first violation.
    """
    body = Fields("", value)
    request = ChatRequest(
        model=body.required("model", text()),
        input=body.required("input", _input),
        system_prompt=body.optional("system_prompt", string),
        integrations=body.optional("integrations", _integrations, ()),
        stream=body.optional("stream", boolean, False),
        temperature=body.optional("temperature", number(0, 2)),
        top_p=body.optional("top_p", number(0, 1)),
        top_k=body.optional("top_k", integer(0)),
        min_p=body.optional("min_p", number(0, 1)),
        repeat_penalty=body.optional("repeat_penalty", number(0, 10, above=True)),
        max_output_tokens=body.optional("max_output_tokens", integer(1)),
        reasoning=body.optional("reasoning", choice(REASONING)),
        context_length=body.optional("context_length", integer(1)),
        store=body.optional("store", boolean, True),
        previous_response_id=body.optional("previous_response_id", text(prefix=RESPONSE_ID_PREFIX)),
        ttl=body.optional("ttl", integer(1)),
    )
    body.finish()
    return request


def _input(path: str, value: Any) -> tuple[TextItem | ImageItem, ...]:
    if isinstance(value, str):
        return (TextItem(value),)
    if not isinstance(value, list):
        raise wrong_type(path, "a string or an array", value)
    if not value:
        raise wrong_value(path, "an array that is not empty")
    items = array(_input_item)(path, value)
    _check_images(path, items)
    return items


def _check_images(path: str, items: tuple[TextItem | ImageItem, ...]) -> None:
    """Whether each can be decoded; all sizes are judged before."""
    found = {f"{path}.{position}.data_url": item.data_url
             for position, item in enumerate(items) if isinstance(item, ImageItem)}
    if len(found) > MAX_IMAGES:
        raise wrong_value(path, f"at most {MAX_IMAGES} images")
    drawn, n_pixels = {}, 0
    for where, url in found.items():
        with _image_at(where):
            drawn[where] = images.parse_data_url(url)
            n_pixels += math.prod(images.size_of(drawn[where]))
    if n_pixels > MAX_PIXELS:
        raise wrong_value(path, f"at most {MAX_PIXELS} pixels in all images together")
    for where, data in drawn.items():
        with _image_at(where):
            images.decode(data)


@contextmanager
def _image_at(path: str):
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{error} at `{path}`", code="invalid_value", param=path) from None


def _input_item(path: str, value: Any) -> TextItem | ImageItem:
    item = Fields(path, value)
    kind = value.get("type")
    item.known.add("type")
    if kind == "text" or kind == "message":
        read = TextItem(item.required("content", string))
    elif kind == "image":
        read = ImageItem(item.required("data_url", string))
    else:
        raise InvalidRequest(f"expected `type` text, message or image at `{path}`",
                             code="invalid_union", param="input")
    item.finish()
    return read


def _integrations(path: str, value: Any) -> tuple[Plugin | EphemeralServer, ...]:
    read = array(_integration, most=MAX_INTEGRATIONS)(path, value)
    seen = set()
    for position, one in enumerate(read):
        is_plugin = isinstance(one, Plugin)
        name = (is_plugin, one.id if is_plugin else one.server_label)
        if name in seen:
            at = f"{path}.{position}" if is_plugin else f"{path}.{position}.server_label"
            raise wrong_value(at, "each integration only once")
        seen.add(name)
    return read


def _integration(path: str, value: Any) -> Plugin | EphemeralServer:
    if isinstance(value, str):
        return Plugin(text()(path, value))
    if not isinstance(value, dict):
        raise wrong_type(path, "a string or an object", value)
    item = Fields(path, value)
    kind = value.get("type")
    item.known.add("type")
    if kind == "plugin":
        read = Plugin(item.required("id", text()), *_call_options(item))
    elif kind == "ephemeral_mcp":
        label = item.required("server_label", text(most=MAX_LABEL_LENGTH))
        url = item.required("server_url", _server_url)
        allowed = item.optional("allowed_tools", array(string))
        headers = item.optional("headers", _headers, ())
        read = EphemeralServer(label, url, allowed, headers, item.optional("timeout", _timeout))
    else:
        raise InvalidRequest(f"expected `type` plugin or ephemeral_mcp at `{path}`",
                             code="invalid_union", param=path)
    item.finish()
    return read


_timeout = integer(1, MAX_TOOL_TIMEOUT_MS)


def _call_options(item: Fields) -> tuple[tuple[str, ...] | None, int | None]:
    return item.optional("allowed_tools", array(string)), item.optional("timeout", _timeout)


def _server_url(path: str, value: Any) -> str:
    expected = wrong_value(path, "an absolute http or https URL")
    if not string(path, value).isprintable() or " " in value:
        raise expected
    try:
        parts = urlsplit(value)
        parts.port  # raises when it is no port number
    except ValueError:
        raise expected from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise expected
    return value


HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
FORBIDDEN_HEADERS = {"host", "content-length", "transfer-encoding", "connection"}


def _headers(path: str, value: Any) -> tuple[tuple[str, str], ...]:
    """Header names and values; the param is the object itself, as a name may be anything."""
    if not isinstance(value, dict):
        raise wrong_type(path, "an object", value)
    for name, content in value.items():
        if not isinstance(content, str):
            raise wrong_type(path, "an object of strings", content)
        if not HEADER_NAME.match(name) or name.lower() in FORBIDDEN_HEADERS:
            raise wrong_value(path, "header names that may be set")
        if any(ord(char) < 32 and char != "\t" or char == "\x7f" for char in content):
            raise wrong_value(path, "header values without line breaks or control characters")
    return tuple(value.items())
