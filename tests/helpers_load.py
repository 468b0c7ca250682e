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
            stats = model.engine.stats
            state = {"threads": threading.active_count(), "connections": server.n_connections,
                     "fds": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
                     "rss": resident_bytes(), "running": stats.running, "waiting": stats.waiting,
                     "held_pages": stats.n_pages - stats.free_pages, "users": model.n_users,
                     "generated": stats.n_generated_tokens}
            print(json.dumps(state), flush=True)


def resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0  # another system
    return pages * os.sysconf("SC_PAGE_SIZE")


class ServerProcess:
    """`port`, and `state()` of the process: threads, fds, rss, and what the engine holds."""

    def __init__(self, home, *, library: dict | None = None, **server):
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(home), json.dumps(library or {}), json.dumps(server)],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(tinychat.__file__).parents[1])})
        self._watchdog = threading.Timer(600, self.process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        self.port: int = json.loads(self.process.stdout.readline())["port"]

    def state(self) -> dict:
        self.process.stdin.write("state\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def when_quiet(self, before: dict) -> dict:
        """The state once nothing is left of the load; fails when something stays."""
        kept = ("threads", "connections", "fds", "running", "waiting", "held_pages", "users")
        deadline = time.monotonic() + WAIT_S
        while True:
            now = self.state()
            more = {name: (before[name], now[name]) for name in kept if now[name] > before[name]}
            if not more:
                return now
            assert time.monotonic() < deadline, f"(before, now): {more}"
            threading.Event().wait(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.stdin.close()
        try:
            assert self.process.wait(WAIT_S) == 0
        finally:
            self._watchdog.cancel()
            self.process.kill()
            self.process.stdout.close()


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
