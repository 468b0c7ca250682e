"""Stored responses in SQLite: one table, in which `parent_id` makes branching free.

A node never changes once written. The file is in WAL mode and every save is synced, so an id
that a client has read survives a killed process.
"""
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tinychat.contract import RESPONSE_ID_PREFIX, ImageItem, TextItem
from tinychat.errors import InvalidRequest, TinychatError

ID_BYTES = 24               # 48 hex digits
BUSY_TIMEOUT_S = 10.0       # how long a save waits for another process's save
IN_MEMORY = ":memory:"


@dataclass(frozen=True)
class Turn:
    """One stored response: what came in, what went out, and the system prompt in force."""

    id: str
    parent_id: str | None
    system_prompt: str | None
    model: str
    input: tuple[TextItem | ImageItem, ...]
    output: tuple[dict, ...]    # items as on the wire


def _create_responses(db: sqlite3.Connection):
    db.execute("""
        CREATE TABLE responses (
            id TEXT PRIMARY KEY,
            parent_id TEXT,
            system_prompt TEXT,
            model TEXT NOT NULL,
            input TEXT NOT NULL,      -- JSON array of {"content"} and {"data_url"}
            output TEXT NOT NULL,     -- JSON array of output items
            created_at REAL NOT NULL  -- seconds since 1970
        ) WITHOUT ROWID""")


# Applied in order; the number of those applied is the file's user_version. Append, never edit.
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_create_responses,)

CHAIN = """
    WITH RECURSIVE chain (id, depth) AS (
        SELECT ?, 0
        UNION ALL
        SELECT parent_id, depth + 1 FROM responses JOIN chain USING (id)
        WHERE parent_id IS NOT NULL)
    SELECT chain.id, parent_id, system_prompt, model, input, output
    FROM chain LEFT JOIN responses USING (id) ORDER BY depth DESC"""


class Store:
    """Safe for many threads: one connection, one lock; SQLite locks against other processes."""

    def __init__(self, path: str | Path = IN_MEMORY):
        self.path = str(path)
        self._lock = threading.Lock()
        self._db = self._guard("be opened", self._open)

    def save(self, parent_id: str | None, system_prompt: str | None, model: str,
             input: Sequence[TextItem | ImageItem], output: Sequence[dict]) -> str:
        """Writes one response and returns its new id; it is on disk when this returns."""
        id = RESPONSE_ID_PREFIX + secrets.token_hex(ID_BYTES)
        row = (id, parent_id, system_prompt, model, _dump([asdict(item) for item in input]),
               _dump(list(output)), time.time())

        def write():
            with self._db:
                self._db.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self._guard("take a response", write)
        return id

    def chain(self, id: str) -> list[Turn]:
        """The turns that lead to `id`, oldest first, `id` itself last.

        Raises: InvalidRequest previous_response_not_found when it, or one before it, is gone.
        """
        rows = self._guard("be read", lambda: self._db.execute(CHAIN, (id,)).fetchall())
        if any(row[3] is None for row in rows):
            raise InvalidRequest("no stored response has this id; it may have been dropped",
                                 code="previous_response_not_found", param="previous_response_id")
        return [_turn(*row) for row in rows]

    def close(self):
        with self._lock:
            self._db.close()

    def _open(self) -> sqlite3.Connection:
        if self.path != IN_MEMORY:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            self._migrate(db)
        except BaseException:
            db.close()
            raise
        return db

    def _migrate(self, db: sqlite3.Connection):
        with db:
            db.execute("BEGIN IMMEDIATE")  # two processes may open a new file at once
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(MIGRATIONS):
                raise TinychatError(f"{self.path}: schema version {version} is newer than "
                                    f"{len(MIGRATIONS)}, the newest that this tinychat knows")
            for migrate in MIGRATIONS[version:]:
                migrate(db)
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _guard(self, what: str, action: Callable):
        try:
            with self._lock:
                return action()
        except (sqlite3.Error, OSError) as error:
            raise TinychatError(f"the store {self.path} cannot {what}: {error}") from error


def _dump(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _turn(id, parent_id, system_prompt, model, input, output) -> Turn:
    items = tuple(ImageItem(**item) if "data_url" in item else TextItem(**item)
                  for item in json.loads(input))
    return Turn(id, parent_id, system_prompt, model, items, tuple(json.loads(output)))
