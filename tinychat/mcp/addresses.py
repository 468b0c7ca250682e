"""Which addresses a server may have that somebody else than this machine's owner chose.

A name is resolved once, every address that it has is judged, and the connection goes to one of
those: the name is never asked again between the check and the connection.
"""
import ipaddress
import socket
import threading
from collections.abc import Callable

from tinychat.mcp.errors import NotConnected, Refused
from tinychat.mcp.url import Url
from tinychat.mcp.watch import Watch

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]  # host, port -> addresses as text, the best one first

REFUSED_CODE = "private_address_refused"
METADATA = (ipaddress.ip_network("169.254.0.0/16"), ipaddress.ip_network("fd00:ec2::254/128"))
NAT64 = ipaddress.ip_network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Not for the public, and not known as such to every Python that we run on.
OTHERS = tuple(ipaddress.ip_network(net) for net in ("192.88.99.0/24", "192.0.0.0/24", "3fff::/20"))


def system_resolve(host: str, port: int) -> list[str]:
    """Raises: OSError, UnicodeError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def judged(url: Url, policy: str | None, resolve: Resolve, watch: Watch) -> list[str]:
    """The addresses of a host, all of them fit for the policy.

    policy: "public", "local" (private ones too), None for none.
    Raises: NotConnected when there are none; Refused when any of them is not fit.
    """
    found = _resolved(url, resolve, watch)
    for text in found if policy else ():
        address = ipaddress.ip_address(text)
        if kind := unfit(address, policy):
            hint = "" if unfit(address, "local") else ": 'local' would"
            raise Refused(f"{url.where} leads to {kind} address, which the setting ephemeral_mcp="
                          f"{policy!r} does not allow{hint}", code=REFUSED_CODE)
    return found


def unfit(address: Address, policy: str) -> str | None:
    """What kind of address it is, with an article, where the policy does not allow it."""
    if inner := _inner(address):
        return next((kind for one in inner if (kind := unfit(one, policy))), None)
    if any(address in net for net in METADATA if net.version == address.version):
        return "a cloud's metadata"
    if address.is_multicast:
        return "a multicast"
    if policy == "local":
        return None
    if address.is_loopback or address.is_unspecified:
        return "a loopback"
    if address.is_private or address.is_link_local:
        return "a private"
    public = address.is_global and not address.is_reserved and not any(
        address in net for net in OTHERS if net.version == address.version)
    if address.version == 6:
        public = public and address in GLOBAL_UNICAST
    return None if public else "a reserved"


def _inner(address: Address) -> list[Address]:
    """The IPv4 addresses that an IPv6 one is a wrapper of."""
    if address.version == 4:
        return []
    if address.ipv4_mapped:
        return [address.ipv4_mapped]
    if address.sixtofour:
        return [address.sixtofour]
    if address.teredo:
        return list(address.teredo)
    return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)] if address in NAT64 else []


def _resolved(url: Url, resolve: Resolve, watch: Watch) -> list[str]:
    """In a thread of its own, for the system's resolver knows no deadline and cannot be stopped."""
    result: list[list[str] | Exception] = []
    done = threading.Event()

    def look_up():
        try:
            result.append([str(ipaddress.ip_address(text)) for text in resolve(url.host, url.port)])
        except Exception as error:  # handed over to the thread that waits
            result.append(error)
        done.set()

    threading.Thread(target=look_up, name="mcp-resolve", daemon=True).start()
    while not done.wait(watch.slice()):
        pass
    found = result[0]
    if isinstance(found, (OSError, ValueError)) or found == []:
        reason = getattr(found, "strerror", None) or "it has no address"
        raise NotConnected(f"{url.where}: cannot resolve {url.host}: {reason}")
    if isinstance(found, Exception):
        raise found
    return found
