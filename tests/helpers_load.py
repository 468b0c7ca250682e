"""A server in a process of its own, so that what it holds can be counted: `ServerProcess`.

Run as a program it serves a tiny model; each line on standard input is answered with its state.
"""
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import tinychat

TESTS = Path(__file__).parent
MODEL = TESTS / "golden" / "qwen2-a.gguf"
KEY = "qwen2-a"
WAIT_S = 30.0  # bound of every wait; a test that needs it has failed
PROC = Path("/proc/self")  # other systems have none: there memory and descriptors count as 0


def serve(home: str, library_options: dict, server_options: dict) -> None:
    from tinychat.library import Library
    from tinychat.server import make_server
    from tinychat.store import Store

    with Library(home=home, extra=[MODEL], **library_options) as library, \
            closing(Store(Path(home) / "store.sqlite3")) as store, \
            make_server(library, store, port=0, **server_options) as server:
        model = library.load(KEY)
        server.start()
        print(json.dumps({"port": server.port}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(state_of(server, model)), flush=True)


def state_of(server, model) -> dict:
    """`broken_pages`: what `check_pages` has against the KV cache, looked at while nothing runs."""
    from helpers_engine import check_pages

    stats, broken = model.engine.stats, ""
    if not (stats.running or stats.waiting):
        try:
            check_pages(model.engine._stepper.cache, [])
        except (AssertionError, RuntimeError) as error:  # or the engine has just begun again
            broken = repr(error)
    tasks, sizes = PROC / "task", PROC / "statm"
    return {"threads": len(os.listdir(tasks)) if tasks.is_dir() else threading.active_count(),
            "fds": len(os.listdir(PROC / "fd")) if tasks.is_dir() else 0,
            "rss": int(sizes.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            if sizes.exists() else 0,
            "connections": server.n_connections, "users": model.n_users,
            "running": stats.running, "waiting": stats.waiting,
            "held_pages": stats.n_pages - stats.free_pages, "broken_pages": broken,
            "generated": stats.n_generated_tokens}


class ServerProcess:
    """`port`, and `state()` of the process: threads, fds, rss, and what the engine holds."""

    def __init__(self, home: Path, *, library: dict | None = None, **server):
        self._errors = open(home / "stderr.txt", "w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(home), json.dumps(library or {}), json.dumps(server)],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "PYTHONPATH": str(Path(tinychat.__file__).parents[1])})
        try:
            self.port: int = self._answer()["port"]
        except BaseException:
            self._end()
            raise

    def state(self) -> dict:
        self.process.stdin.write("state\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        watchdog = threading.Timer(WAIT_S, self.process.kill)
        watchdog.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        assert line, f"the server is gone: {self._said()}"
        return json.loads(line)

    def when_quiet(self, before: dict | None = None) -> dict:
        """The state once nothing is left of the load: the engine holds nothing, and the process
        no more threads and descriptors than before. Fails when something stays."""
        none = dict.fromkeys(("connections", "running", "waiting", "held_pages", "users"), 0)
        most = {**none, **{name: before[name] for name in ("threads", "fds") if before}}
        deadline = time.monotonic() + WAIT_S
        while True:
            now = self.state()
            more = {name: (most[name], now[name]) for name in most if now[name] > most[name]}
            if not more and not now["broken_pages"]:
                return now
            assert time.monotonic() < deadline, f"(at most, now): {more} {now['broken_pages']}"
            threading.Event().wait(0.05)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.process.stdin.close()
            ended = self.process.wait(WAIT_S)
            assert kind or (ended == 0 and "Traceback" not in self._said()), self._said()
        finally:
            self._end()

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def _end(self):
        self.process.kill()
        self.process.wait(WAIT_S)
        for file in (self.process.stdin, self.process.stdout, self._errors):
            file.close()


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
