"""The store on a full disk, in a folder of others, under two processes, and under SIGKILL."""
import ast
import http.client
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from helpers_chat import KEY, Client, ScriptedLibrary, says

import tinychat
from tinychat.contract import TextItem
from tinychat.errors import TinychatError
from tinychat.server import make_server
from tinychat.store import MIGRATIONS, Store

WAIT_S = 30.0
N_KILLS = 100
HELLO = [{"type": "message", "content": "hello"}]
POSIX = pytest.mark.skipif(os.name != "posix", reason="uses limits and signals of POSIX")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(
    [str(Path(tinychat.__file__).parents[1]), str(Path(__file__).parent)])}


def save(store, parent=None, text="hi"):
    return store.save(store.chain(parent) if parent else [], None, "m", (TextItem(text),), HELLO)


def is_whole(path):
    with closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def child(code, *args, **options):
    """The standard output of Python code in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True,
                          text=True, timeout=WAIT_S, env=ENVIRONMENT, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- no room

FULL_DISK = """
import sys
from tinychat.contract import TextItem
from tinychat.errors import TinychatError
from tinychat.store import Store
path, set_limit = sys.argv[1], sys.argv[2]

def save(store, text):
    return store.save([], None, "m", (TextItem(text),), [{"type": "message", "content": "x"}])

filler = path + ".filler"
if set_limit == "disk":
    with open(filler, "wb") as file:
        file.write(bytes(300_000))
store, ids, said = Store(path), [], None
ids.append(save(store, "before"))
if set_limit == "rlimit":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
for n in range(200):
    try:
        ids.append(save(store, "y" * 20_000))
    except TinychatError as error:
        said = error
        break
assert said is not None, "the disk never filled up"
assert said.code == "internal_error" and path not in said.message, said.message
for id in ids:
    store.chain(id)
if set_limit == "rlimit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
else:
    import os
    os.unlink(filler)
ids.append(save(store, "after"))
store.close()
print(" ".join(ids))
"""


@POSIX
def test_a_file_that_may_not_grow_fails_the_request_and_loses_nothing(tmp_path):
    """Every write beyond a limit fails in the system, as on a full disk; then there is room again."""
    path = tmp_path / "store.sqlite3"
    ids = child(FULL_DISK, path, "rlimit").split()
    assert len(ids) > 3 and is_whole(path)
    with closing(Store(path)) as store:
        assert [store.chain(id)[0].input[0].content[:6] for id in (ids[0], ids[-1])] \
            == ["before", "after"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a file system of Linux")
def test_a_full_disk_fails_the_request_and_loses_nothing(tmp_path):
    script = ('mount -t tmpfs -o size=900k none "$1" && "$2" -c "$3" "$1/store.sqlite3" disk && '
              '"$2" -c "$4" "$1/store.sqlite3"')
    check = ("import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); "
             "print(db.execute('PRAGMA integrity_check').fetchone()[0]); db.close()")
    mounted = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*mounted, "mount", "-t", "tmpfs", "none", tmp_path], check=True,
                       capture_output=True, timeout=WAIT_S)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a small disk")
    done = subprocess.run([*mounted, "sh", "-ec", script, "sh", tmp_path, sys.executable, FULL_DISK,
                           check], capture_output=True, text=True, timeout=WAIT_S, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ok" and len(done.stdout.split()) > 4


# ---- no rights

def client_of(store):
    server = make_server(ScriptedLibrary(says("Hello.")), store, port=0).start()
    return server, Client(server)


def test_a_folder_that_cannot_be_made_fails_what_is_stored_and_nothing_else(caplog, tmp_path):
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / "file" / "store.sqlite3"
    with closing(Store(path)) as store:
        warning, = caplog.records
        assert warning.levelno == logging.WARNING and str(path) in warning.getMessage()
        server, client = client_of(store)
        with server:
            assert client.error() == (500, "internal_error", None)
            status, answer = client.post({"model": KEY, "input": "hi"})
            assert "store of chats" in answer["error"]["message"]
            assert str(tmp_path) not in answer["error"]["message"]
            events = client.stream()
            assert [name for name, _ in events][-2:] == ["error", "chat.end"]
            assert client.chat(store=False)["output"]
            (tmp_path / "file").unlink()  # and now it can be made
            assert client.chat()["response_id"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_folder_in_which_even_root_makes_nothing_is_a_clear_error():
    with closing(Store("/proc/tinychat/store.sqlite3")) as store:
        for use in (lambda: save(store), lambda: store.chain("resp_x")):
            with pytest.raises(TinychatError, match="the store of chats cannot") as caught:
                use()
            assert caught.value.code == "internal_error" and "/proc" not in caught.value.message


READ_ONLY = """
import os, sys
from tinychat.errors import TinychatError
from tinychat.contract import TextItem
from tinychat.store import Store
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
store = Store(sys.argv[1])
try:
    store.save([], None, "m", (TextItem("x"),), [])
except TinychatError as error:
    print(error.code)
store.close()
"""


@POSIX
def test_a_file_that_may_only_be_read_is_a_clear_error(tmp_path):
    folder = tmp_path / "theirs"
    with closing(Store(folder / "store.sqlite3")) as store:
        id = save(store)
    for parent in (folder, *folder.parents[:-1]):
        if not os.access(parent, os.X_OK):
            pytest.skip("another user cannot come here")
    os.chmod(folder / "store.sqlite3", 0o444)
    os.chmod(folder, 0o555)
    open_up = [parent for parent in folder.parents if parent.stat().st_mode & 0o001 == 0]
    try:
        for parent in open_up:
            os.chmod(parent, parent.stat().st_mode | 0o011)
        assert child(READ_ONLY, folder / "store.sqlite3").split() == ["internal_error"]
    finally:
        for parent in open_up:
            os.chmod(parent, parent.stat().st_mode & ~0o011)
        os.chmod(folder, 0o755)
    os.chmod(folder / "store.sqlite3", 0o644)
    with closing(Store(folder / "store.sqlite3")) as store:
        assert store.chain(id)


# ---- an upgrade that is killed

KILLED_UPGRADE = """
import os, signal, sys
from tinychat import store

def half(db):
    store._number_responses(db)
    os.kill(os.getpid(), signal.SIGKILL)
store.MIGRATIONS = (store._create_responses, half)
store.Store(sys.argv[1])
"""


@POSIX
def test_an_upgrade_that_is_killed_leaves_the_old_version_which_upgrades_later(tmp_path):
    path = tmp_path / "old.sqlite3"
    with closing(sqlite3.connect(path)) as db, db:
        MIGRATIONS[0](db)
        db.execute("PRAGMA user_version = 1")
        for n in range(300):  # more than fits the cache's first pages
            db.execute("INSERT INTO responses VALUES (?, ?, NULL, 'm', ?, '[]', 1.0)",
                       (f"resp_{n}", f"resp_{n - 1}" if n else None,
                        json.dumps([{"content": str(n) * 100}])))
    done = subprocess.run([sys.executable, "-c", KILLED_UPGRADE, path], timeout=WAIT_S,
                          env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    with closing(Store(path)) as store:
        assert [turn.id for turn in store.chain("resp_299")] == [f"resp_{n}" for n in range(300)]
    assert is_whole(path)


# ---- two processes

OPEN = """
import sys
from tinychat.store import Store
print("ready", flush=True)
sys.stdin.readline()
store = Store(sys.argv[1])
assert store._db is not None
store.close()
"""


def test_processes_that_open_a_new_file_at_once_all_can(tmp_path):
    for n in range(4):
        processes = [subprocess.Popen([sys.executable, "-c", OPEN, tmp_path / f"{n}.sqlite3"],
                                      text=True, env=ENVIRONMENT, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                     for _ in range(4)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=WAIT_S)[1] for process in processes]
        assert said == [""] * 4


HAMMER = """
import sys
from tinychat.contract import TextItem
from tinychat.store import Store
store, name, ids = Store(sys.argv[1]), sys.argv[2], []
root = sys.argv[3]
for n in range(60):
    parent = ids[-1] if n % 4 else root
    history = store.chain(parent)
    ids.append(store.save(history, None, "m", (TextItem(f"{name}{n}"),), []))
    assert store.chain(ids[-1])[-1].input[0].content == f"{name}{n}"
store.close()
print(" ".join(ids))
"""


def test_two_processes_hammer_one_file_and_each_finds_all_that_was_saved(tmp_path):
    """C-087, C-099."""
    path = tmp_path / "store.sqlite3"
    with closing(Store(path)) as store:
        root, results = save(store, text="root"), []
        threads = [threading.Thread(target=lambda name=name: results.append(
            child(HAMMER, path, name, root).split())) for name in "ab"]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert store.chain(save(store, root))  # and a third one, here
            threads[0].join(0.01)
        for thread in threads:
            thread.join(WAIT_S)
        ids = [id for result in results for id in result]
        assert len(set(ids)) == 120
        assert all(store.chain(id)[0].id == root for id in ids)
    assert is_whole(path)


DROP = """
import sys
from tinychat.contract import TextItem
from tinychat.errors import InvalidRequest
from tinychat.store import Store
store, name, history = Store(sys.argv[1], max_responses=15), sys.argv[2], []
for n in range(80):
    told = [turn.input[0].content for turn in history]
    id = store.save(history if n % 6 else [], None, "m", (TextItem(f"{name}{n}"),), [])
    told = [*(told if n % 6 else []), f"{name}{n}"]
    try:
        history = store.chain(id)
        assert [turn.input[0].content for turn in history] == told, (told, history)
    except InvalidRequest:
        history = []  # the others have saved fifteen in the meantime
store.close()
"""


def test_processes_that_drop_each_others_responses_break_no_chain(tmp_path):
    """C-087: what a process goes on from may have been swept away by another one."""
    path = tmp_path / "store.sqlite3"
    Store(path).close()
    threads = [threading.Thread(target=child, args=(DROP, path, name)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
        assert not thread.is_alive()
    with closing(Store(path)) as store:
        rows = store._db.execute("SELECT id, dropped FROM responses").fetchall()
        kept = [id for id, dropped in rows if not dropped]
        assert len(kept) == 15
        assert {turn.id for id in kept for turn in store.chain(id)} == {id for id, _ in rows}
    assert is_whole(path)


# ---- kill -9

class Killed:
    """Servers that are killed, one after the other, all with one store."""

    def __init__(self, path):
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "helpers_kill.py", path], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT)
        self.watchdog = threading.Timer(300, self.process.kill)
        self.watchdog.daemon = True
        self.watchdog.start()

    def start(self):
        """(port, process id) of a new server."""
        self.process.stdin.write("another\n")
        self.process.stdin.flush()
        told = ast.literal_eval(self.process.stdout.readline())
        return told["port"], told["pid"]

    def ended_by(self):
        return ast.literal_eval(self.process.stdout.readline())["signal"]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.watchdog.cancel()
        self.process.stdin.close()
        self.process.kill()
        self.process.wait(WAIT_S)
        self.process.stdout.close()


class KilledClients:
    """Clients that chat until the server is gone, each on a connection of its own.

    read: the ids that they have read, each with the one it continues; `news` is released for each.
    """

    def __init__(self, port, seeds, parents):
        self.port, self.parents, self.read, self.news = port, parents, [], threading.Semaphore(0)
        self.threads = [threading.Thread(target=self._work, args=(seed,)) for seed in seeds]
        for thread in self.threads:
            thread.start()

    def join(self):
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()

    def _work(self, seed):
        draw = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            while True:
                body = {"model": KEY, "input": "hi", "stream": draw.random() < 0.5}
                if self.parents and draw.random() < 0.7:
                    body["previous_response_id"] = draw.choice(self.parents)
                connection.request("POST", "/api/v1/chat", json.dumps(body),
                                   {"Content-Type": "application/json"})
                response = connection.getresponse()
                assert response.status == 200
                if body["stream"]:
                    self._note(self._end_of(response)["result"], body)
                    response.read()
                else:
                    self._note(json.loads(response.read()), body)
        except (OSError, http.client.HTTPException):
            pass  # killed
        finally:
            connection.close()

    def _end_of(self, response):
        """The last event, as soon as its line is there: the stream's own end may never come."""
        while (line := response.readline()).endswith(b"\n"):
            if line.startswith(b"data: "):
                event = json.loads(line[len(b"data: "):])
                if event["type"] == "chat.end":
                    return event
        raise ConnectionError("killed")

    def _note(self, answer, body):
        self.read.append((answer["response_id"], body.get("previous_response_id")))
        self.news.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_hundred_kills_lose_no_id_that_a_client_has_read(tmp_path, capsys):
    """C-096, C-097: SIGKILL while four clients chat, right after some answer was read.

    What was under way leaves nothing or, if it was only not read, a whole answer.
    """
    path, draw = tmp_path / "store.sqlite3", random.Random(9)
    parent_of: dict[str, str | None] = {}
    n_read = 0
    with Killed(path) as servers:
        for _ in range(N_KILLS):
            port, pid = servers.start()
            clients = KilledClients(port, [draw.random() for _ in range(4)], list(parent_of)[-50:])
            for _ in range(draw.randrange(1, 12)):
                assert clients.news.acquire(timeout=WAIT_S)
            if draw.random() < 0.5:  # else at once; a moment waits for nothing, it is any
                threading.Event().wait(draw.random() * 0.003)
            os.kill(pid, signal.SIGKILL)
            clients.join()
            assert servers.ended_by() == signal.SIGKILL
            parent_of.update(clients.read)
            n_read += len(clients.read)
    assert is_whole(path)
    with closing(Store(path)) as store:
        for id, parent in parent_of.items():
            chain = [turn.id for turn in store.chain(id)]
            assert chain[-1] == id and chain[-2:-1] == ([parent] if parent else [])
        n_rows = store._db.execute("SELECT count(*) FROM responses").fetchone()[0]
        outputs = store._db.execute("SELECT DISTINCT output FROM responses").fetchall()
    assert [json.loads(output) for output, in outputs] \
        == [[{"type": "message", "content": "Hello there."}]]
    assert len(parent_of) == n_read >= 4 * N_KILLS
    with capsys.disabled():
        print(f"\n{N_KILLS} kills: {n_read} ids read, none lost; {n_rows} responses stored")


def test_an_error_of_the_store_is_no_traceback_for_the_client(tmp_path):
    with closing(Store(tmp_path / "store.sqlite3")) as store:
        store._use("be spoilt", lambda db: db.execute("DROP TABLE responses"))
        with pytest.raises(TinychatError, match="no such table"):
            save(store)
