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

# UNION, not UNION ALL: it ends in a damaged file too, where a response may follow from itself.
CHAIN = """
    WITH RECURSIVE chain (id) AS (
        VALUES (?)
        UNION
        SELECT parent_id FROM responses JOIN chain USING (id) WHERE parent_id IS NOT NULL)
    SELECT id, parent_id, system_prompt, model, input, output, dropped
    FROM chain JOIN responses USING (id)"""

INSERT = """
    INSERT INTO responses (id, parent_id, system_prompt, model, input, output, created_at, dropped)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"""

OLDEST_KEPT = "SELECT number, id FROM responses WHERE NOT dropped ORDER BY number LIMIT ?"
N_KEPT = "SELECT count(*) FROM responses WHERE NOT dropped"


class Store:
    """Safe for many threads: one connection, one lock; SQLite locks against other processes.

    max_responses: beyond it the oldest are dropped. What younger ones build on stays with them, out
    of reach, until they are dropped themselves.
    A file that cannot be opened or written for want of room or rights is tried anew at every use,
    whose error names no path, for it goes to the client.
    Raises: TinychatError, for a file that is no store, or of a newer version.
    """

    def __init__(self, path: str | Path = IN_MEMORY, *, max_responses: int = 10_000):
        self.path = str(path)
        self._max_responses = max_responses
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._closed = False
        self._counted: tuple[int, int] | None = None    # data_version, and how many were kept then
        if max_responses < 1:
            raise TinychatError(f"max_responses: expected at least 1, got {max_responses}")
        try:
            self._db = self._open()
        except (sqlite3.OperationalError, OSError) as error:  # no room, no rights, a lock
            log.warning("the store %s cannot be opened: %s; no chat can be kept for now, "
                        "every request tries again", self.path, _reason(error))
        except sqlite3.Error as error:
            raise TinychatError(f"the store {self.path} cannot be opened: {error}") from error

    def save(self, history: Sequence[Turn], system_prompt: str | None, model: str,
             input: Sequence[TextItem | ImageItem], output: Sequence[dict]) -> str:
        """Writes the response that follows `history`, which is what `chain` has said.

        Returns its new id; it is on disk when this returns.
        """
        id = RESPONSE_ID_PREFIX + secrets.token_hex(ID_BYTES)
        parent_id = history[-1].id if history else None
        row = _row(Turn(id, parent_id, system_prompt, model, tuple(input), tuple(output)))

        def write(db: sqlite3.Connection):
            counted, self._counted = self._counted, None  # after a commit that fails: anew
            with db:
                db.execute("BEGIN IMMEDIATE")
                for earlier in history if parent_id and not _has(db, parent_id) else ():
                    db.execute(INSERT, _row(earlier, dropped=True))  # dropped while this one ran
                db.execute(INSERT, row)
                counted = self._drop_oldest(db, counted)
            self._counted = counted
        self._use("take a response", write)
        return id

    def chain(self, id: str) -> list[Turn]:
        """The turns that lead to `id`, oldest first, `id` itself last.

        Raises: InvalidRequest previous_response_not_found when there is no such response, or not
        any more.
        """
        try:
            rows = self._use("be read", lambda db: db.execute(CHAIN, (id,)).fetchall())
            return _follow({row[0]: row for row in rows}, id)
        except (ValueError, TypeError, RecursionError) as error:
            log.error("%s: the chain of %s cannot be understood: %s", self.path,
                      id[:12], error)
            raise TinychatError("the stored chat is damaged and cannot be continued") from error

    def close(self):
        with self._lock:
            self._closed = True
            if self._db:
                self._db.close()

    def _drop_oldest(self, db: sqlite3.Connection, counted: tuple[int, int] | None) -> tuple:
        """After one more was inserted; returns the new `_counted`.

        Counting 10,000 takes 0.4 ms, more than the rest of a save: done only when another process
        has written, which data_version tells.
        """
        version = db.execute("PRAGMA data_version").fetchone()[0]
        n_kept = counted[1] + 1 if counted and counted[0] == version \
            else db.execute(N_KEPT).fetchone()[0]
        surplus = max(0, n_kept - self._max_responses)
        for number, id in db.execute(OLDEST_KEPT, (surplus,)).fetchall():
            db.execute("UPDATE responses SET dropped = 1 WHERE number = ?", (number,))
            while id:
                id = _forget(db, id)
        return version, n_kept - surplus

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
        except (sqlite3.Error, OSError) as error:
            log.error("the store %s cannot %s: %s", self.path, what, _reason(error))
            raise TinychatError(f"the store of chats cannot {what}: {_reason(error)}") from error

    def _open(self) -> sqlite3.Connection:
        if self.path != IN_MEMORY:
            _make_folder(Path(self.path).absolute().parent)
            with suppress(FileExistsError):  # a new one is for this user alone
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            db.text_factory = bytes.decode  # damaged text is a ValueError, as damaged JSON is
            with db:
                db.execute("BEGIN")
                n_migrated = _n_migrated(db)  # first: nothing is done to another program's file
            _become_wal(db)
            db.execute("PRAGMA synchronous = FULL")
            if n_migrated < len(MIGRATIONS):  # else no write: what a full disk holds can be read
                _migrate(db)
        except BaseException:
            db.close()
            raise
        if self.path != IN_MEMORY:
            _sync_folder(Path(self.path).absolute().parent)
        return db


def _n_migrated(db: sqlite3.Connection) -> int:
    """How many of the migrations the file has had; both queries see one moment in a transaction.

    Raises: sqlite3.DatabaseError for a file of a newer version, or of another program.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise sqlite3.DatabaseError(f"schema version {version} is newer than {len(MIGRATIONS)}, "
                                    "the newest that this tinychat knows")
    tables = {name for name, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "responses" not in tables if version else tables:
        raise sqlite3.DatabaseError("the database is of another program")
    return version


def _migrate(db: sqlite3.Connection):
    with db:
        db.execute("BEGIN IMMEDIATE")  # two processes may open a new file at once
        for migrate in MIGRATIONS[_n_migrated(db):]:
            migrate(db)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


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


def _reason(error: Exception) -> str:
    """Without the path that an OSError names."""
    return getattr(error, "strerror", None) or str(error)


def _make_folder(folder: Path):
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        _sync_folder(each.parent)


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
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # half a surrogate pair, from a tool: escaped it comes back as it was
        return json.dumps(value, separators=(",", ":"))


def _follow(rows: dict[str, tuple], id: str | None) -> list[Turn]:
    """The turns from the first to `id`."""
    turns: list[Turn] = []
    while id is not None:
        *columns, dropped = rows.pop(id, (None, True))
        if not columns[0] or (dropped and not turns):
            raise InvalidRequest("no stored response has this id; it may have been dropped",
                                 code="previous_response_not_found", param="previous_response_id")
        turns.append(_turn(*columns))
        id = turns[-1].parent_id
    return turns[::-1]


def _turn(id, parent_id, system_prompt, model, input, output) -> Turn:
    items = tuple(ImageItem(**item) if "data_url" in item else TextItem(**item)
                  for item in _objects(input))
    return Turn(id, parent_id, system_prompt, model, items, _objects(output))


def _objects(text: str) -> tuple[dict, ...]:
    items = json.loads(text)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError("expected an array of objects")
    return tuple(items)
