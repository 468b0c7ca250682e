"""The address of a server as a request needs it, and as a message may show it. Pure."""
import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from tinychat.mcp.errors import Refused

DEFAULT_PORTS = {"http": 80, "https": 443}
MAX_URL = 8_192
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_KEPT = "/%:@!$&'()*+,;=~"  # of a path; whatever else a URL may not have is percent-encoded


@dataclass(frozen=True)
class Url:
    """host: ASCII, without brackets. target: path and query, as the request line has them."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        """Scheme, host and port where it is not the usual one: what two addresses may share."""
        return f"{self.scheme}://{self.host_header}"

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def where(self) -> str:
        """For messages: the query may hold secrets, and is left out."""
        return (self.origin + self.target.partition("?")[0])[:300]

    def join(self, reference: str) -> "Url":
        """The address that `reference` means when it is found here. Raises: Refused."""
        try:
            return parse(urljoin(self.origin + self.target, reference))
        except ValueError:
            raise Refused(f"{self.where} points to an address that is no URL") from None


def parse(text: str) -> Url:
    """Raises: Refused, naming what is wrong but not the query nor user-info."""
    if not text or len(text) > MAX_URL:
        raise Refused(f"expected a URL of 1 to {MAX_URL} characters, got {len(text)}")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text):
        raise Refused("expected a URL, got one with control characters")
    try:
        parts = urlsplit(text.strip(" "))
        host, port, in_brackets = parts.hostname, parts.port, "[" in parts.netloc
    except ValueError as error:  # brackets without an address, a port that is none
        raise Refused(f"expected a URL: {error}") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise Refused("expected a URL with http or https, got "
                      f"{parts.scheme[:20] or 'no scheme'!r}")
    if "@" in parts.netloc:
        raise Refused("expected a URL without a user or password: credentials go into `headers`")
    if port == 0:
        raise Refused("expected a URL with a port from 1 to 65535, got 0")
    target = quote(parts.path or "/", safe=_KEPT, errors="replace")
    if parts.query:
        target += "?" + quote(parts.query, safe=_KEPT + "?", errors="replace")
    return Url(parts.scheme, _host(host, in_brackets), port or DEFAULT_PORTS[parts.scheme], target)


def _host(host: str | None, in_brackets: bool) -> str:
    """In ASCII. Raises: Refused."""
    if not host:
        raise Refused("expected a URL with a host, got none")
    if in_brackets:
        try:
            if "%" in host:  # a zone means something on one machine only
                raise ValueError
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise Refused(f"expected an IPv6 address in brackets, got {host[:60]!r}") from None
    try:
        ascii_host = host.encode("idna").decode("ascii")
    except UnicodeError:
        raise Refused(f"expected the name of a host, got {host[:60]!r}") from None
    if not _HOST.fullmatch(ascii_host) or len(ascii_host) > 253:
        raise Refused(f"expected the name of a host, got {host[:60]!r}")
    return ascii_host
