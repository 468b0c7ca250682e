"""Stored responses in SQLite: one table, in which `parent_id` makes branching free.

A node never changes once written. The file is in WAL mode and every save is synced, so an id
that a client has read survives a killed process.
"""
import json
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tinychat.contract import RESPONSE_ID_PREFIX, ImageItem, TextItem
from tinychat.errors import InvalidRequest, TinychatError

log = logging.getLogger(__name__)

ID_BYTES = 24               # 48 hex digits
BUSY_TIMEOUT_S = 10.0       # how long a save waits for another process's save
OPEN_AGAIN_S = 0.01
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


# ---- the schema -------------------------------------------------------------------------------

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


def _number_responses(db: sqlite3.Connection):
    """The order of saving, and what is dropped but for the sake of younger responses."""
    db.execute("""
        CREATE TABLE numbered (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            parent_id TEXT,
            system_prompt TEXT,
            model TEXT NOT NULL,
            input TEXT NOT NULL,
            output TEXT NOT NULL,
            created_at REAL NOT NULL,
            dropped INTEGER NOT NULL DEFAULT 0)""")
    columns = "id, parent_id, system_prompt, model, input, output, created_at"
    db.execute(f"INSERT INTO numbered ({columns}) SELECT {columns} FROM responses "
               "ORDER BY created_at, id")
    db.execute("DROP TABLE responses")
    db.execute("ALTER TABLE numbered RENAME TO responses")
    db.execute("CREATE INDEX children ON responses (parent_id) WHERE parent_id IS NOT NULL")
    db.execute("CREATE INDEX kept ON responses (number) WHERE NOT dropped")


# Applied in order; the number of those applied is the file's user_version. Append, never edit.
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _create_responses, _number_responses)

CHAIN = """
    WITH RECURSIVE chain (id, depth) AS (
        SELECT ?, 0
        UNION ALL
        SELECT parent_id, depth + 1 FROM responses JOIN chain USING (id)
        WHERE parent_id IS NOT NULL)
    SELECT chain.id, parent_id, system_prompt, model, input, output, dropped
    FROM chain LEFT JOIN responses USING (id) ORDER BY depth DESC"""

INSERT = """
    INSERT OR IGNORE INTO responses (id, parent_id, system_prompt, model, input, output,
                                     created_at, dropped)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""

OLDEST_KEPT = "SELECT number, id FROM responses WHERE NOT dropped ORDER BY number LIMIT ?"
N_KEPT = "SELECT count(*) FROM responses WHERE NOT dropped"


class Store:
    """Safe for many threads: one connection, one lock; SQLite locks against other processes.

    max_responses: beyond it the oldest are dropped. What younger ones build on stays with them, out
    of reach, until they are dropped themselves.
    A file that cannot be opened or written for want of room or rights is tried anew at every use.
    Raises: TinychatError, for a file that is no store, or of a newer version.
    """

    def __init__(self, path: str | Path = IN_MEMORY, *, max_responses: int = 10_000):
        self.path = str(path)
        self._max_responses = max_responses
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._closed = False
        try:
            self._use("be opened", lambda db: None)
        except _Unusable:  # which has said why
            log.warning("no chat can be kept for now; every request tries again")

    def save(self, history: Sequence[Turn], system_prompt: str | None, model: str,
             input: Sequence[TextItem | ImageItem], output: Sequence[dict]) -> str:
        """Writes the response that follows `history`, which is what `chain` has said.

        Returns its new id; it is on disk when this returns.
        """
        id = RESPONSE_ID_PREFIX + secrets.token_hex(ID_BYTES)
        parent_id = history[-1].id if history else None
        turn = Turn(id, parent_id, system_prompt, model, tuple(input), tuple(output))

        def write(db: sqlite3.Connection):
            with db:
                db.execute("BEGIN IMMEDIATE")
                for earlier in history if parent_id and not _has(db, parent_id) else ():
                    db.execute(INSERT, _row(earlier, dropped=True))  # dropped while this one ran
                db.execute(INSERT, _row(turn))
                self._drop_oldest(db)
        self._use("take a response", write)
        return id

    def chain(self, id: str) -> list[Turn]:
        """The turns that lead to `id`, oldest first, `id` itself last.

        Raises: InvalidRequest previous_response_not_found when there is no such response, or not
        any more.
        """
        rows = self._use("be read", lambda db: db.execute(CHAIN, (id,)).fetchall())
        if rows[-1][-1] or any(row[3] is None for row in rows):
            raise InvalidRequest("no stored response has this id; it may have been dropped",
                                 code="previous_response_not_found", param="previous_response_id")
        try:
            return [_turn(*row[:-1]) for row in rows]
        except (ValueError, TypeError, AttributeError) as error:
            log.error("%s: the chain of %s cannot be understood: %s", self.path, id[:60], error)
            raise TinychatError("the stored chat is damaged and cannot be continued") from error

    def close(self):
        with self._lock:
            self._closed = True
            if self._db:
                self._db.close()

    def _drop_oldest(self, db: sqlite3.Connection):
        surplus = db.execute(N_KEPT).fetchone()[0] - self._max_responses
        for number, id in db.execute(OLDEST_KEPT, (max(0, surplus),)).fetchall():
            db.execute("UPDATE responses SET dropped = 1 WHERE number = ?", (number,))
            while id:
                id = _forget(db, id)

    # -- the file

    def _use(self, what: str, action: Callable):
        """The action's result; it gets the connection, which is opened if need be."""
        try:
            with self._lock:
                if self._closed:
                    raise TinychatError("the store is closed")
                if self._db is None:
                    self._db = self._open()
                return action(self._db)
        except (sqlite3.OperationalError, OSError) as error:
            said = getattr(error, "strerror", None) or error
            log.error("the store %s cannot %s: %s", self.path, what, said)
            raise _Unusable(f"the store of chats cannot {what}: {said}") from error
        except sqlite3.Error as error:
            log.error("the store %s cannot %s: %s", self.path, what, error)
            raise TinychatError(f"the store of chats cannot {what}: {error}") from error

    def _open(self) -> sqlite3.Connection:
        is_new = self.path != IN_MEMORY and not Path(self.path).exists()
        if is_new:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            _become_wal(db)
            db.execute("PRAGMA synchronous = FULL")
            self._migrate(db)
        except BaseException:
            db.close()
            raise
        if is_new:
            _sync_folder(Path(self.path).parent)
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


class _Unusable(TinychatError):
    """No room, no rights, a lock that is held: things that may be better next time."""


def _become_wal(db: sqlite3.Connection):
    """Of processes that open a new file at once SQLite lets one pass and does not make the others
    wait, whatever the timeout: they try again."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(OPEN_AGAIN_S)


def _sync_folder(folder: Path):
    """A new file's name is on disk only when its folder is."""
    with suppress(OSError):  # Windows cannot open a folder
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _has(db: sqlite3.Connection, id: str) -> bool:
    return db.execute("SELECT 1 FROM responses WHERE id = ?", (id,)).fetchone() is not None


def _forget(db: sqlite3.Connection, id: str) -> str | None:
    """Delete a dropped response that no other one continues; returns its parent, the next to try."""
    row = db.execute("SELECT parent_id, dropped FROM responses WHERE id = ?", (id,)).fetchone()
    if not row or not row[1] or db.execute("SELECT 1 FROM responses WHERE parent_id = ? LIMIT 1",
                                           (id,)).fetchone():
        return None
    db.execute("DELETE FROM responses WHERE id = ?", (id,))
    return row[0]


def _row(turn: Turn, *, dropped: bool = False) -> tuple:
    return (turn.id, turn.parent_id, turn.system_prompt, turn.model,
            _dump([asdict(item) for item in turn.input]), _dump(list(turn.output)), time.time(),
            dropped)


def _dump(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _turn(id, parent_id, system_prompt, model, input, output) -> Turn:
    items = tuple(ImageItem(**item) if "data_url" in item else TextItem(**item)
                  for item in json.loads(input))
    return Turn(id, parent_id, system_prompt, model, items, tuple(json.loads(output)))
