"""The wire's dataclasses and the hand-written validation of what comes over it.

`parse_json` turns bytes into values, `parse_chat_request` turns a value into a frozen
`ChatRequest`. Both raise `InvalidRequest` with the contract's code and the dotted path of the
field. A message names fields, kinds and limits, never the text that a client sent in them.
"""
import base64
import binascii
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tinychat.errors import InvalidRequest

MAX_DEPTH = 100            # nesting of arrays and objects in a body
MAX_INT_DIGITS = 400       # longer integers are read as floats, that is as infinite
MAX_COUNT = 2**31 - 1      # counts without an upper limit end here: no chat is that long
MAX_INTEGRATIONS = 32
MAX_LABEL_LENGTH = 64
MAX_TOOL_TIMEOUT_MS = 3_600_000
REASONING = ("off", "low", "medium", "high", "on")
RESPONSE_ID_PREFIX = "resp_"
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


# ---- what a request is ------------------------------------------------------------------------

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


# ---- JSON -------------------------------------------------------------------------------------

SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no trailing text, at most MAX_DEPTH levels.

    Unpaired surrogate escapes become U+FFFD; of a doubled key the last one counts; numbers too
    large for a float become infinite and fail their field's range.

    Raises: InvalidRequest, code invalid_json.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant,
                           parse_int=_integer_of)
    except UnicodeDecodeError as error:
        raise _invalid_json(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _invalid_json(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    return _cleaned(value, 0)


def _invalid_json(why: str) -> InvalidRequest:
    return InvalidRequest(f"the body is not JSON: {why}", code="invalid_json")


def _too_deep() -> InvalidRequest:
    return _invalid_json(f"nested deeper than {MAX_DEPTH} levels")


def _refuse_constant(name: str):
    raise _invalid_json(f"{name} is no JSON number")


def _integer_of(digits: str) -> int | float:
    # int() refuses more than 4300 digits with an error of its own, and takes quadratic time.
    return int(digits) if len(digits) <= MAX_INT_DIGITS else float(digits)


def _cleaned(value: Any, depth: int) -> Any:
    """The value without unpaired surrogates, its depth checked."""
    if isinstance(value, str):
        return value if value.isascii() else SURROGATE.sub("\ufffd", value)
    if not isinstance(value, (dict, list)):
        return value
    if depth >= MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, list):
        return [_cleaned(item, depth + 1) for item in value]
    return {_cleaned(name, 0): _cleaned(item, depth + 1) for name, item in value.items()}


# ---- checks: each takes the path and the value, and returns the value as the program wants it -

Check = Callable[[str, Any], Any]

KINDS = ((bool, "boolean"), (int, "number"), (float, "number"), (str, "string"),
         (list, "array"), (dict, "object"), (type(None), "null"))


def kind_of(value: Any) -> str:
    """JSON's name for the type of a parsed value."""
    return next(name for kind, name in KINDS if isinstance(value, kind))


def wrong_type(path: str, expected: str, value: Any) -> InvalidRequest:
    where = f" at `{path}`" if path else ""
    return InvalidRequest(f"expected {expected}, got {kind_of(value)}{where}",
                          code="invalid_type", param=path or None)


def wrong_value(path: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"expected {expected} at `{path}`", code="invalid_value", param=path)


def boolean(path: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(path, "a boolean", value)
    return value


def string(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong_type(path, "a string", value)
    return value


def text(least: int = 1, most: int | None = None, prefix: str = "") -> Check:
    """A string with limits on its length or a fixed beginning."""
    def check(path: str, value: Any) -> str:
        string(path, value)
        if len(value) < least:
            raise wrong_value(path, "a string that is not empty")
        if most is not None and len(value) > most:
            raise wrong_value(path, f"at most {most} characters")
        if not value.startswith(prefix):
            raise wrong_value(path, f"a string that starts with {prefix}")
        return value
    return check


def choice(options: tuple[str, ...]) -> Check:
    def check(path: str, value: Any) -> str:
        if string(path, value) not in options:
            raise wrong_value(path, f"one of {', '.join(options)}")
        return value
    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A finite number from `low` to `high`; with `above`, `low` itself is outside."""
    expected = (f"a number above {low:g} and at most {high:g}" if above
                else f"a number from {low:g} to {high:g}")

    def check(path: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(path, "a number", value)
        if not low <= value <= high or (above and value == low):
            raise wrong_value(path, expected)
        return float(value)
    return check


def integer(low: int, high: int | None = None) -> Check:
    """A whole number, `8000.0` too, of at least `low`; without `high` it is capped at MAX_COUNT."""
    expected = (f"an integer of at least {low}" if high is None
                else f"an integer from {low} to {high}")

    def check(path: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(path, "an integer", value)
        if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
            raise InvalidRequest(f"expected an integer, got a fraction at `{path}`",
                                 code="invalid_type", param=path)
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            raise wrong_value(path, expected)
        return min(int(value), MAX_COUNT)
    return check


def array(of: Check, *, most: int | None = None) -> Check:
    def check(path: str, value: Any) -> tuple:
        if not isinstance(value, list):
            raise wrong_type(path, "an array", value)
        if most is not None and len(value) > most:
            raise wrong_value(path, f"at most {most} entries")
        return tuple(of(f"{path}.{position}", item) for position, item in enumerate(value))
    return check


class Fields:
    """Reads one object's fields in the order of the contract's table; `null` means absent."""

    def __init__(self, path: str, value: Any):
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        self.path, self.value, self.known = path, value, set()

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def optional(self, name: str, check: Check, default: Any = None) -> Any:
        self.known.add(name)
        value = self.value.get(name)
        return default if value is None else check(self.at(name), value)

    def required(self, name: str, check: Check) -> Any:
        if self.value.get(name) is None:
            raise InvalidRequest(f"`{self.at(name)}` is required",
                                 code="missing_required_parameter", param=self.at(name))
        return self.optional(name, check)

    def finish(self):
        """Refuses fields that nobody asked for: at the top the field itself is the param."""
        unknown = [name for name in self.value if name not in self.known]
        if unknown:
            names = ", ".join(repr(name[:60]) for name in unknown[:8])
            raise InvalidRequest(f"Unrecognized key(s) in object: {names}",
                                 code="unrecognized_keys",
                                 param=self.path or unknown[0][:512] or "''")


# ---- the chat request -------------------------------------------------------------------------

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
    return array(_input_item)(path, value)


def _input_item(path: str, value: Any) -> TextItem | ImageItem:
    item = Fields(path, value)
    kind = value.get("type")
    item.known.add("type")
    if kind == "text" or kind == "message":
        read = TextItem(item.required("content", string))
    elif kind == "image":
        read = ImageItem(item.required("data_url", _image_url))
    else:
        raise InvalidRequest(f"expected `type` text, message or image at `{path}`",
                             code="invalid_union", param="input")
    item.finish()
    return read


IMAGE_URL = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,", re.IGNORECASE)


def _image_url(path: str, value: Any) -> str:
    head = IMAGE_URL.match(string(path, value))
    if not head:
        raise wrong_value(path, "an image as data:image/...;base64,...")
    try:
        data = base64.b64decode(value[head.end():], validate=True)
    except (binascii.Error, ValueError):
        raise wrong_value(path, "valid base64") from None
    _check_image(path, data)
    return value


def _check_image(path: str, data: bytes):
    from PIL import Image  # here, because a chat without images should not pay for it

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.verify()
    except Exception:  # Pillow has a dozen kinds of error for a broken image, bombs among them
        kinds = ", ".join(IMAGE_FORMATS)
        raise wrong_value(path, f"an image ({kinds}) that can be decoded") from None


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
