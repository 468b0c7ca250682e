"""Stored responses: chains, branches, many threads, a file that lasts (C-085, C-087, C-089, C-099)."""
import json
import logging
import os
import random
import re
import sqlite3
import stat
import threading
from contextlib import closing

import pytest

from tinychat.contract import ImageItem, TextItem
from tinychat.errors import InvalidRequest, TinychatError
from tinychat.store import CHAIN, MIGRATIONS, N_KEPT, OLDEST_KEPT, Store

HELLO = [{"type": "message", "content": "hello"}]


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    store = Store(":memory:" if request.param == "memory" else tmp_path / "deep" / "store.sqlite3")
    yield store
    store.close()


def save(store, parent=None, text="hi", **changes):
    """parent: the id of an earlier response."""
    fields = {"system_prompt": None, "model": "m", "input": (TextItem(text),), "output": HELLO, **changes}
    return store.save(store.chain(parent) if parent else [], **fields)


def texts(store, id):
    return [turn.input[0].content for turn in store.chain(id)]


def test_an_id_is_resp_and_48_hex_digits_and_never_the_same(store):
    """C-085."""
    ids = {save(store) for _ in range(20)}
    assert len(ids) == 20 and all(re.fullmatch("resp_[0-9a-f]{48}", id) for id in ids)


def test_a_turn_comes_back_as_it_was_saved(store):
    items = (TextItem("a\n\0ü"), ImageItem("data:image/png;base64,xx"))
    provider = {"type": "plugin", "plugin_id": "mcp/x"}
    output = [{"type": "reasoning", "content": "hm"}, {"type": "message", "content": "\u2028 ok"},
              {"type": "tool_call", "tool": "t", "arguments": {"a": [1, None]}, "output": "[]",
               "provider_info": provider},
              {"type": "invalid_tool_call", "reason": "no", "metadata": {
                  "type": "invalid_name", "tool_name": "u"}}]
    id = save(store, system_prompt="be kind\0", input=items, output=output)
    turn, = store.chain(id)
    assert (turn.id, turn.parent_id, turn.system_prompt, turn.model) == (id, None, "be kind\0", "m")
    assert turn.input == items and list(turn.output) == output


def test_a_large_image_and_half_a_surrogate_pair_come_back_as_they_were(store):
    image = ImageItem("data:image/png;base64," + "Zm9v" * 500_000)
    output = [{"type": "tool_call", "tool": "t", "arguments": {"n": 2**63, "x": 0.1},
               "output": "half \ud83d, whole \U0001f600"}]
    turn, = store.chain(save(store, input=(image, image), output=output))
    assert turn.input == (image, image) and list(turn.output) == output


def test_branches_share_their_beginning(store):
    """C-087."""
    root = save(store, text="root")
    left, right = save(store, root, "left"), save(store, root, "right")
    assert texts(store, left) == ["root", "left"]
    assert texts(store, save(store, right, "more")) == ["root", "right", "more"]


@pytest.mark.parametrize("id", ["resp_" + "0" * 48, "resp_", "resp_'; DROP TABLE responses; --"])
def test_an_unknown_id_is_not_found(store, id):
    """C-089."""
    with pytest.raises(InvalidRequest) as caught:
        store.chain(id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_a_chain_with_a_lost_beginning_is_not_found(store):
    root = save(store)
    id = save(store, root)
    with store._db:
        store._db.execute("DELETE FROM responses WHERE id = ?", (root,))
    with pytest.raises(InvalidRequest):
        store.chain(id)


@pytest.mark.parametrize("column, text", [
    ("input", "{"), ("input", "[1]"), ("input", '[{"who": 1}]'), ("output", "5"), ("output", "{"),
    ("input", "{}"), ("output", '["x"]'), ("output", "[" * 100_000), ("output", b"\xff[]"),
    pytest.param("model", b"\xff", id="model, bytes")])
def test_a_damaged_row_is_one_clear_error(store, column, text):
    id = save(store, save(store))
    with store._db:
        store._db.execute(f"UPDATE responses SET {column} = CAST(? AS TEXT)", (text,))
    with pytest.raises(TinychatError, match="damaged") as caught:
        store.chain(id)
    assert caught.value.code == "internal_error"
    assert texts(store, save(store)) == ["hi"], "others are not concerned"


def test_a_chain_that_is_a_circle_in_a_damaged_file_ends(store):
    root = save(store)
    id = save(store, root)
    with store._db:
        store._db.execute("UPDATE responses SET parent_id = ? WHERE id = ?", (id, root))
    with pytest.raises(InvalidRequest):
        store.chain(id)


# ---- dropping

def kept(store):
    with store._lock:
        return sorted(id for id, in store._db.execute("SELECT id FROM responses WHERE NOT dropped"))


def n_rows(store):
    return store._db.execute("SELECT count(*) FROM responses").fetchone()[0]


def is_known(store, id):
    try:
        store.chain(id)
        return True
    except InvalidRequest as error:
        assert error.code == "previous_response_not_found"
        return False


def test_the_oldest_go_when_there_are_too_many():
    with closing(Store(max_responses=3)) as store:
        ids = [save(store, text=str(n)) for n in range(7)]
        assert [is_known(store, id) for id in ids] == [False] * 4 + [True] * 3
        assert n_rows(store) == 3


def test_what_a_younger_response_builds_on_stays_out_of_reach_until_that_goes_too():
    with closing(Store(max_responses=2)) as store:
        chain = [save(store, text="0")]
        for n in range(1, 5):
            chain.append(save(store, chain[-1], str(n)))
        assert texts(store, chain[-1]) == ["0", "1", "2", "3", "4"]
        assert [is_known(store, id) for id in chain] == [False] * 3 + [True] * 2
        save(store, text="a")
        save(store, text="b")
        assert n_rows(store) == 2, "nobody builds on the chain any more"


def test_a_branch_keeps_the_root_when_its_other_branch_goes():
    with closing(Store(max_responses=2)) as store:
        root = save(store, text="root")
        left, right = save(store, root, "left"), save(store, root, "right")
        newest = save(store, right, "more")
        assert not is_known(store, root) and not is_known(store, left)
        assert texts(store, newest) == ["root", "right", "more"] and n_rows(store) == 3


def test_a_parent_that_is_dropped_while_its_continuation_runs_is_written_back():
    with closing(Store(max_responses=1)) as store:
        root = save(store, text="root")
        history = store.chain(save(store, root, "second"))
        save(store, text="other")
        assert n_rows(store) == 1
        id = store.save(history, None, "m", (TextItem("third"),), HELLO)
        assert texts(store, id) == ["root", "second", "third"]
        assert not is_known(store, history[-1].id), "it is dropped all the same"


class Model:
    """What a store has to do, in a few lines: every response, in the order of saving."""

    def __init__(self, max_responses):
        self.max_responses, self.saved, self.history = max_responses, [], {}

    def add(self, id, parent, text):
        self.saved.append(id)
        self.history[id] = [*self.history.get(parent, []), text]

    def check(self, store):
        """All that is kept has its whole history, the rest is unknown, and nothing lies there for nobody."""
        self.saved = self.saved[-3 * self.max_responses:]
        young = self.saved[-self.max_responses:]
        assert kept(store) == sorted(young)
        assert [texts(store, id) for id in young] == [self.history[id] for id in young]
        assert not any(is_known(store, id) for id in self.saved[:-self.max_responses])
        assert n_rows(store) == len({turn.id for id in young for turn in store.chain(id)})


@pytest.mark.parametrize("seed", range(4))
def test_a_random_forest_always_keeps_its_newest_with_their_whole_history(tmp_path, seed):
    """Through two stores on one file by turns, as two processes have it. C-087."""
    size, path = 1 + 2 * seed, tmp_path / "s.sqlite3"
    draw, model = random.Random(seed), Model(size)
    with closing(Store(path, max_responses=size)) as one, \
            closing(Store(path, max_responses=size)) as other:
        for store in (one, other):
            store._db.execute("PRAGMA synchronous = OFF")  # for the test's speed
        for n in range(150):
            store = draw.choice([one, one, other])
            young = model.saved[-model.max_responses:]
            parent = draw.choice(young) if young and draw.random() < 0.8 else None
            history = store.chain(parent) if parent else []
            if draw.random() < 0.2:  # others save before this one is done, and drop its parent
                for _ in range(draw.randrange(2 * model.max_responses)):
                    model.add(save(other, text="between"), None, "between")
            model.add(store.save(history, None, "m", (TextItem(str(n)),), HELLO), parent, str(n))
            model.check(draw.choice([one, other]))


def test_threads_that_save_and_read_while_others_drop_lose_nothing(tmp_path):
    """C-087, C-099."""
    whole, recent, failures = {}, [], []  # the history of each id; the ids in about their order
    with closing(Store(tmp_path / "s.sqlite3", max_responses=20)) as store:
        def work(i):
            draw = random.Random(i)
            try:
                for n in range(25):
                    parent = draw.choice(recent[-15:]) if recent and n % 5 else None
                    try:
                        history = store.chain(parent) if parent else []
                    except InvalidRequest:
                        history = []  # a slow thread: twenty others were faster
                    id = store.save(history, None, "m", (TextItem(f"{i}.{n}"),), HELLO)
                    whole[id] = [*(whole[parent] if history else []), f"{i}.{n}"]
                    recent.append(id)
                    for one in recent[-20:]:
                        assert texts_if_kept(one) in (None, whole[one])
            except BaseException as error:
                failures.append(error)

        def texts_if_kept(id):
            try:
                return texts(store, id)
            except InvalidRequest:
                return None
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert failures == []
        assert len(kept(store)) == 20
        assert all(texts(store, id) == whole[id] for id in kept(store))
        assert n_rows(store) == len({turn.id for id in kept(store) for turn in store.chain(id)})


def test_a_save_reads_by_index_and_counts_nothing_twice(tmp_path):
    """Its cost does not grow with what is stored."""
    with closing(Store(tmp_path / "s.sqlite3", max_responses=5)) as store:
        said = []
        store._db.set_trace_callback(said.append)
        for _ in range(20):
            save(store)
        store._db.set_trace_callback(None)
        assert len([line for line in said if line == N_KEPT]) == 1
        for query, value in ((OLDEST_KEPT, 1), (CHAIN, "x"),
                             ("SELECT 1 FROM responses WHERE parent_id = ?", "x")):
            plan = [row[3] for row in store._db.execute("EXPLAIN QUERY PLAN " + query, (value,))]
            assert not any(line.startswith("SCAN responses") and "INDEX" not in line
                           for line in plan), plan


def test_a_store_that_would_keep_nothing_is_refused():
    with pytest.raises(TinychatError, match="max_responses: expected at least 1, got 0"):
        Store(max_responses=0)


# ---- migrations

def test_a_file_of_version_1_keeps_its_chats(tmp_path):
    path = tmp_path / "old.sqlite3"
    with closing(sqlite3.connect(path)) as db, db:
        MIGRATIONS[0](db)
        db.execute("PRAGMA user_version = 1")
        for n, (id, parent) in enumerate([("resp_a", None), ("resp_b", "resp_a"), ("resp_c", "resp_a")]):
            db.execute("INSERT INTO responses VALUES (?, ?, 'sys', 'm', ?, ?, ?)",
                       (id, parent, json.dumps([{"content": id}]), json.dumps(HELLO), 100.0 - n))
    with closing(Store(path)) as store:
        assert texts(store, "resp_b") == ["resp_a", "resp_b"]
        assert texts(store, save(store, "resp_c", "new")) == ["resp_a", "resp_c", "new"]
        assert store.chain("resp_a")[0].system_prompt == "sys"


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "old.sqlite3"
    with closing(sqlite3.connect(path)) as db, db:
        MIGRATIONS[0](db)
        db.execute("PRAGMA user_version = 1")
        db.execute("INSERT INTO responses VALUES ('resp_a', NULL, NULL, 'm', '[]', '[]', 1.0)")

    def half(db):
        MIGRATIONS[1](db)
        raise TinychatError("power cut")
    monkeypatch.setattr("tinychat.store.MIGRATIONS", (MIGRATIONS[0], half))
    with pytest.raises(TinychatError, match="power cut"):
        Store(path)
    monkeypatch.undo()
    with closing(Store(path)) as store:
        assert [turn.id for turn in store.chain("resp_a")] == ["resp_a"]


def test_ten_threads_continue_one_id(store):
    """C-099."""
    root, ids = save(store, text="root"), []
    threads = [threading.Thread(target=lambda n=n: ids.append(save(store, root, f"t{n}"))) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(texts(store, id)[1] for id in ids) == [f"t{n}" for n in range(10)]


@pytest.mark.skipif(os.name != "posix", reason="looks at the mode of files")
def test_other_users_of_the_machine_cannot_read_chats(tmp_path):
    with closing(Store(tmp_path / "store.sqlite3")) as store:
        save(store)
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_second_process_reads_what_the_first_has_saved(tmp_path):
    path = tmp_path / "store.sqlite3"
    first, second = Store(path), Store(path)
    id = save(first)
    assert texts(second, save(second, id, "two")) == ["hi", "two"]
    assert first._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    first.close()
    second.close()


def test_a_new_file_has_the_newest_schema_version_and_a_newer_one_is_refused(tmp_path):
    path = tmp_path / "store.sqlite3"
    Store(path).close()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()
    with pytest.raises(TinychatError, match="schema version 99"):
        Store(path)


@pytest.mark.parametrize("version", [0, 1, len(MIGRATIONS)])
def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path, version):
    path = tmp_path / "theirs.sqlite3"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE theirs (x)")
        db.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(TinychatError, match="another program"):
        Store(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_saved_response_is_synced_and_so_are_the_names_of_new_folders(tmp_path, monkeypatch):
    """C-096, as far as a test can see it without a power cut."""
    synced, path = set(), tmp_path / "new" / "newer" / "store.sqlite3"
    monkeypatch.setattr("tinychat.store._sync_folder", synced.add)
    with closing(Store(path)) as store:
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert synced == {tmp_path, tmp_path / "new", tmp_path / "new" / "newer"}


@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_that_another_process_locks_keeps_no_server_from_starting(
        tmp_path, monkeypatch, caplog, is_new):
    monkeypatch.setattr("tinychat.store.BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "store.sqlite3"
    if not is_new:
        Store(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        store = Store(path)
        warning, = caplog.records
        assert warning.levelno == logging.WARNING and str(path) in warning.getMessage()
        with pytest.raises(TinychatError, match="locked") as caught:
            save(store)
        assert caught.value.code == "internal_error" and str(tmp_path) not in caught.value.message
        other.execute("ROLLBACK")
    with closing(store):
        assert texts(store, save(store)) == ["hi"]


def test_what_is_stored_can_be_read_while_another_process_writes_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr("tinychat.store.BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "store.sqlite3"
    with closing(Store(path)) as store:
        id = save(store)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert texts(store, id) == ["hi"]
            with pytest.raises(TinychatError, match="locked"):
                save(store, id)
            with closing(Store(path)) as third:
                assert texts(third, id) == ["hi"]
            other.execute("ROLLBACK")
        assert texts(store, save(store, id)) == ["hi", "hi"]


def test_a_newer_file_that_turns_up_later_is_an_error_without_its_path(tmp_path):
    (tmp_path / "folder").write_text("in the way")
    path = tmp_path / "folder" / "store.sqlite3"
    with closing(Store(path)) as store:
        (tmp_path / "folder").unlink()
        (tmp_path / "folder").mkdir()
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("PRAGMA user_version = 99")
        with pytest.raises(TinychatError, match="schema version 99") as caught:
            save(store)
        assert str(tmp_path) not in caught.value.message


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path):
    path = tmp_path / "store.sqlite3"
    path.write_bytes(b"not a database, though long enough to look at" * 100)
    with pytest.raises(TinychatError, match="cannot be opened"):
        Store(path)
    assert path.read_bytes().startswith(b"not a database")


def test_a_failed_save_is_an_error_and_leaves_the_file_whole(tmp_path):
    store = Store(tmp_path / "store.sqlite3")
    id = save(store)
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(TinychatError, match="cannot take a response"):
        save(store)
    store._db.execute("PRAGMA query_only = OFF")
    assert texts(store, save(store, id, "again")) == ["hi", "again"]
    store.close()
