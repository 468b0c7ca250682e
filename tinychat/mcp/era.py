"""Which of the protocol's two eras a server belongs to. Pure, but for what is remembered.

Handshake: `initialize` first, maybe a session. Stateless: every request stands alone.
"""
import threading
from collections.abc import Iterable
from typing import Any

import tinychat
from tinychat.mcp.errors import (
    CalledOff, McpError, NotConnected, ProtocolError, Refused, ServerError)
from tinychat.mcp.jsonrpc import HEADER_MISMATCH, MISSING_CAPABILITY, UNSUPPORTED_VERSION

# Names, not numbers: never compare them as text.
HANDSHAKE = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
NEWEST_HANDSHAKE = HANDSHAKE[-1]
STATELESS = "2026-07-28"

CLIENT_INFO = {"name": "tinychat", "version": tinychat.__version__}
META_VERSION = "io.modelcontextprotocol/protocolVersion"
META = {META_VERSION: STATELESS,
        "io.modelcontextprotocol/clientInfo": CLIENT_INFO,
        "io.modelcontextprotocol/clientCapabilities": {}}

FINAL_STATUSES = (401, 403, 407, 429)      # the handshake would meet the same
FINAL_CODES = (HEADER_MISMATCH, MISSING_CAPABILITY)  # a server of the stateless era, and a fault
OLD_STATUSES = (400, 404, 405)  # for `initialize`: it may know HTTP with two endpoints alone


def initialize_params() -> dict:
    return {"protocolVersion": NEWEST_HANDSHAKE, "capabilities": {}, "clientInfo": CLIENT_INFO}


def stated_version(message: dict) -> str | None:
    """The revision that a message of the stateless era states; None in the handshake era."""
    meta = message.get("params", {}).get("_meta")
    return meta.get(META_VERSION) if isinstance(meta, dict) else None


def of_discovery(result: dict) -> str:
    """"stateless" or "handshake". Raises: ProtocolError with both lists when we share neither."""
    return _of_versions(result.get("supportedVersions"))


def after_error(error: McpError) -> str:
    """What to try after `server/discover` failed: "again" (stateless) or "handshake".

    Raises: the error itself where another era would not help.
    """
    if isinstance(error, ServerError) and error.rpc_code == UNSUPPORTED_VERSION:
        supported = error.data.get("supported") if isinstance(error.data, dict) else None
        return "again" if _of_versions(supported) == "stateless" else "handshake"
    if (isinstance(error, (Refused, NotConnected, CalledOff)) or error.http_status in FINAL_STATUSES
            or error.rpc_code in FINAL_CODES):
        raise error
    return "handshake"


def _of_versions(theirs: Any) -> str:
    """Who names no revisions may not know the question."""
    if not isinstance(theirs, list) or not theirs:
        return "handshake"
    if STATELESS in theirs:
        return "stateless"
    if any(version in HANDSHAKE for version in theirs):
        return "handshake"
    raise ProtocolError(no_common_version(theirs))


def no_common_version(theirs: Iterable[Any]) -> str:
    listed = ", ".join(str(version)[:20] for version in list(theirs)[:20])
    ours = ", ".join((*HANDSHAKE, STATELESS))
    return f"the server speaks the revisions {listed}; tinychat {ours}"


class Memory:
    """What servers turned out to be, by URL, for the life of the process: a hint, never a promise.

    Only what saves a request is worth a place: "handshake", or "sse" for HTTP with two endpoints.
    """

    def __init__(self, n_most: int = 1_000):
        self._eras: dict[str, str] = {}
        self._lock = threading.Lock()
        self._n_most = n_most

    def get(self, url: str) -> str | None:
        with self._lock:
            return self._eras.get(url)

    def put(self, url: str, era: str | None) -> None:
        """None forgets."""
        with self._lock:
            self._eras.pop(url, None)
            if era in ("handshake", "sse"):
                self._eras[url] = era
                while len(self._eras) > self._n_most:
                    del self._eras[next(iter(self._eras))]


MEMORY = Memory()
