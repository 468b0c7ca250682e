"""Which web pages a browser may let talk to a server that only this machine can reach."""
import ipaddress
from urllib.parse import urlsplit


def is_foreign(origin: str) -> bool:
    """Does an Origin header name a web page of another machine? Programs send none, or odd ones."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and not is_loopback(parts.hostname or "")


def is_loopback(host: str) -> bool:
    """localhost, its subdomains, 127.0.0.0/8 and ::1; nothing is resolved."""
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
