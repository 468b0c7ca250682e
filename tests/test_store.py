"""Stored responses: chains, branches, many threads, a file that lasts (C-085, C-087, C-089, C-099)."""
import re
import sqlite3
import threading

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
    fields = {"system_prompt": None, "model": "m", "input": (TextItem(text),), "output": HELLO, **changes}
    return store.save(parent, **fields)


def texts(store, id):
    return [turn.input[0].content for turn in store.chain(id)]


def test_an_id_is_resp_and_48_hex_digits_and_never_the_same(store):
    """C-085."""
    ids = {save(store) for _ in range(20)}
    assert len(ids) == 20 and all(re.fullmatch("resp_[0-9a-f]{48}", id) for id in ids)


def test_a_turn_comes_back_as_it_was_saved(store):
    items = (TextItem("a\n\0ü"), ImageItem("data:image/png;base64,xx"))
    output = [{"type": "reasoning", "content": "hm"}, {"type": "message", "content": "\u2028 ok"}]
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
    id = save(store, "resp_" + "0" * 48)
    with pytest.raises(InvalidRequest):
        store.chain(id)


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
