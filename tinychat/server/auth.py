"""Who may use the server, and for what: tokens, their permissions, and integrations.

Tokens lie in a SQLite file of mode 0600 as SHA-256 hashes: they are 192 random bits, so that a
slow hash would protect nothing. Every check reads the file: what `tinychat token` does counts at
once, in every process.
"""
import hashlib
import hmac
import os
import re
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from tinychat.contract import EphemeralServer, Plugin
from tinychat.errors import InvalidRequest, TinychatError

TOKENS_NAME = "tokens.sqlite3"
TOKEN_PREFIX, TOKEN_BYTES = "tc-", 24
NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
PERMISSIONS = ("chat", "models", "ephemeral_mcp", "mcp")
MCP_LABEL = "mcp:"      # "mcp" allows every label of mcp.json, "mcp:files" the one
PLUGIN_PREFIX = "mcp/"
BUSY_TIMEOUT_S = 5.0
BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Token:
    """What is known of a token; not the token."""

    name: str
    permissions: tuple[str, ...]
    created_at: str  # ISO 8601, UTC

    def need(self, permission: str) -> None:
        """Raises: InvalidRequest permission_denied."""
        if permission not in self.permissions:
            raise InvalidRequest(f"this token lacks the permission `{permission}`",
                                 code="permission_denied")

    def allows_plugin(self, label: str) -> bool:
        return bool({"mcp", MCP_LABEL + label} & {*self.permissions})


class Tokens:
    """The file of tokens. Raises: TinychatError where it cannot be read or written."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def create(self, name: str, permissions: Sequence[str]) -> str:
        """The new token, which nobody can read again. Raises: InvalidRequest."""
        if not NAME.fullmatch(name):
            raise InvalidRequest("a token's name has 1 to 64 letters, digits and any of . _ @ -",
                                 param="name")
        token = TOKEN_PREFIX + secrets.token_hex(TOKEN_BYTES)
        row = (name, _hash(token), ",".join(checked_permissions(permissions)),
               datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"))
        try:
            self._do(lambda db: db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?)", row))
        except sqlite3.IntegrityError:
            raise InvalidRequest(f"there is a token named {name} already", param="name") from None
        return token

    def list(self) -> "list[Token]":
        return [Token(name, tuple(permissions.split(",")), created_at)
                for name, _, permissions, created_at in self._rows()]

    def revoke(self, name: str) -> None:
        """Raises: InvalidRequest when there is none of that name."""
        gone = self._do(lambda db: db.execute("DELETE FROM tokens WHERE name = ?", (name,)).rowcount)
        if not gone:
            raise InvalidRequest(f"there is no token named {name[:64]}", param="name")

    def check(self, authorization: str) -> Token:
        """The token of an Authorization header. Raises: InvalidRequest invalid_api_key, always
        the same, whatever is wrong."""
        given = BEARER.fullmatch(authorization.strip())
        hashed = _hash(given[1] if given else "")
        found = None
        for name, known, permissions, created_at in self._rows():
            if hmac.compare_digest(hashed, known) and given:
                found = Token(name, tuple(permissions.split(",")), created_at)
        if found is None:
            raise InvalidRequest("a valid token is needed, as Authorization: Bearer <token>",
                                 code="invalid_api_key")
        return found

    def _rows(self) -> "list[tuple]":
        if not self.path.exists():
            return []
        return self._do(lambda db: db.execute(
            "SELECT name, hash, permissions, created_at FROM tokens ORDER BY name").fetchall())

    def _do(self, action: Callable):
        try:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)) as db, db:
                db.execute("CREATE TABLE IF NOT EXISTS tokens (name TEXT PRIMARY KEY, "
                           "hash BLOB NOT NULL, permissions TEXT NOT NULL, "
                           "created_at TEXT NOT NULL) WITHOUT ROWID")
                return action(db)
        except sqlite3.IntegrityError:
            raise
        except (OSError, sqlite3.Error) as error:
            said = getattr(error, "strerror", None) or error  # without the path: clients read it
            raise TinychatError(f"the tokens cannot be read or written: {said}") from error


def checked_permissions(permissions: Sequence[str]) -> tuple[str, ...]:
    """Raises: InvalidRequest for one that does not exist, or for none at all."""
    for one in permissions:
        label = one.removeprefix(MCP_LABEL)
        if one not in PERMISSIONS and (label == one or not label):
            raise InvalidRequest(f"no permission is called {one!r}; there are "
                                 f"{', '.join(PERMISSIONS)} and {MCP_LABEL}LABEL",
                                 param="permissions")
    if not permissions:
        raise InvalidRequest("a token needs at least one permission", param="permissions")
    return tuple(dict.fromkeys(permissions))


def refusal(settings, token: Token | None, integration: Plugin | EphemeralServer) -> str | None:
    """Why an integration is not permitted; None when it is.

    settings: with `ephemeral_mcp` and `allow_mcp_json`. token: None when nobody needs one.
    """
    if isinstance(integration, EphemeralServer):
        if settings.ephemeral_mcp == "off":
            return "ephemeral MCP servers are switched off (the setting `ephemeral_mcp`)"
        allowed, wanted = token is None or "ephemeral_mcp" in token.permissions, "ephemeral_mcp"
    else:
        if not settings.allow_mcp_json:
            return "the servers of mcp.json are switched off (the setting `allow_mcp_json`)"
        label = integration.id.removeprefix(PLUGIN_PREFIX)
        allowed, wanted = token is None or token.allows_plugin(label), "mcp"
    return None if allowed else f"this token lacks the permission `{wanted}`"


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
