"""Lines out of pieces of bytes. Pure."""
from collections.abc import Iterator

from tinychat.mcp.errors import ProtocolError


class Lines:
    """Cuts at LF only: U+2028 and others may stand inside JSON, and end lines for `splitlines`."""

    def __init__(self, max_bytes: int):
        self._rest, self._max = bytearray(), max_bytes

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Raises: ProtocolError for a line that is too long, before it is kept."""
        *whole, rest = piece.split(b"\n")
        for end in whole:
            self._add(end)
            line, self._rest = bytes(self._rest), bytearray()
            yield line
        self._add(rest)

    def _add(self, part: bytes) -> None:
        if len(self._rest) + len(part) > self._max:
            raise ProtocolError(f"expected lines of at most {self._max} bytes, got a longer one")
        self._rest += part
