"""Header fields: which of a user's may go out, and how a text becomes one. Pure."""
import base64
import re
from collections.abc import Mapping

from tinychat.mcp.errors import Refused

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
RESERVED = frozenset(("host", "content-length", "content-type", "transfer-encoding", "connection",
                      "accept", "expect", "te", "trailer", "upgrade", "last-event-id"))
RESERVED_PREFIX = "mcp-"  # MCP-Protocol-Version is one of these
_VALUE = re.compile("[\t\x20-\x7e\xa0-\xff]*")
_WRAPPED = re.compile(r"=\?base64\?.*\?=", re.IGNORECASE | re.DOTALL)
_PLAIN = re.compile("[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?|")


def check(headers: Mapping[str, str]) -> dict[str, str]:
    """A user's own header fields, as they are.

    Raises: Refused, which names the field but never its value.
    """
    seen = set()
    for name, value in headers.items():
        if not isinstance(name, str) or not TOKEN.fullmatch(name):
            raise Refused(f"expected the name of a header in `headers`, got {str(name)[:60]!r}")
        low = name.lower()
        if low in RESERVED or low.startswith(RESERVED_PREFIX):
            raise Refused(f"the header {name[:60]} belongs to the protocol: leave it out of "
                          "`headers`")
        if low in seen:
            raise Refused(f"the header {name[:60]} is twice in `headers`")
        if not is_value(value):
            raise Refused(f"the header {name[:60]} in `headers` has a value that no header may "
                          "have: expected text of one line, in Latin-1")
        seen.add(low)
    return dict(headers)


def is_value(value: object) -> bool:
    """May a header have it? Printable ASCII, blanks and tabs, Latin-1 at most."""
    return isinstance(value, str) and _VALUE.fullmatch(value) is not None


def encode(text: str) -> str:
    """A text as the value of a header of the protocol: printable ASCII as it is, the rest wrapped.

    "Zürich" -> "=?base64?WsO8cmljaA==?="
    Source: MCP 2026-07-28, "Streamable HTTP", encoding of header values.
    """
    if _PLAIN.fullmatch(text) and not _WRAPPED.fullmatch(text):
        return text
    return f"=?base64?{base64.b64encode(text.encode('utf-8', 'replace')).decode()}?="
