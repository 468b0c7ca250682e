"""Stored responses: chains, branches, many threads, a file that lasts (C-085, C-087, C-089, C-099)."""
import json
import random
import re
import sqlite3
import threading
from contextlib import closing

import pytest

from tinychat.contract import ImageItem, TextItem
from tinychat.errors import InvalidRequest, TinychatError
from tinychat.store import MIGRATIONS, Store

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
    id = save(store, system_prompt="be kind", input=items, output=output)
    turn, = store.chain(id)
    assert (turn.id, turn.parent_id, turn.system_prompt, turn.model) == (id, None, "be kind", "m")
    assert turn.input == items and list(turn.output) == output


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
    ("input", "{"), ("input", "[1]"), ("input", '[{"who": 1}]'), ("output", "5"), ("output", "{")])
def test_a_damaged_row_is_one_clear_error(store, column, text):
    id = save(store)
    with store._db:
        store._db.execute(f"UPDATE responses SET {column} = ?", (text,))
    with pytest.raises(TinychatError, match="damaged") as caught:
        store.chain(id)
    assert caught.value.code == "internal_error"


# ---- dropping

def kept(store):
    return [row[0] for row in store._db.execute("SELECT id FROM responses WHERE NOT dropped")]


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


def test_a_random_forest_always_keeps_its_newest_with_their_whole_history():
    draw = random.Random(5)
    with closing(Store(max_responses=6)) as store:
        saved, history_of = [], {}
        for n in range(400):
            parent = draw.choice(saved[-6:]) if saved and draw.random() < 0.8 else None
            if parent and draw.random() < 0.2:  # others save before this continuation is done
                history = store.chain(parent)
                for _ in range(draw.randrange(9)):
                    saved.append(save(store, text="between"))
                    history_of[saved[-1]] = ["between"]
                id = store.save(history, None, "m", (TextItem(str(n)),), HELLO)
            else:
                id = save(store, parent, str(n))
            saved.append(id)
            history_of[id] = [*history_of.get(parent, []), str(n)]
            for known in saved[-6:]:
                assert texts(store, known) == history_of[known]
            assert not any(is_known(store, old) for old in saved[-12:-6])
            assert len(kept(store)) == min(6, len(saved))
        reachable = {turn.id for id in saved[-6:] for turn in store.chain(id)}
        assert n_rows(store) == len(reachable), "nothing stays for nobody"


def test_threads_that_save_and_read_while_others_drop_lose_nothing(tmp_path):
    """C-099."""
    with closing(Store(tmp_path / "s.sqlite3", max_responses=20)) as store:
        failures = []

        def work(i):
            try:
                id = None
                for n in range(15):
                    id = save(store, id, f"{i}.{n}") if n % 5 else save(store, text=f"{i}.{n}")
                    assert texts(store, id)[-1] == f"{i}.{n}"
            except BaseException as error:
                failures.append(error)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert failures == [] and len(kept(store)) == 20


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
