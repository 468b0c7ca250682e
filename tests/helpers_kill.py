"""`python helpers_kill.py STORE`: a server to be killed, again and again.

Everything is imported once; each line on standard input forks a child that serves a scripted model
with the store at STORE and tells its port and process id on standard output. Its parent reaps it.
"""
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

from helpers_chat import ScriptedLibrary, says  # noqa: E402

from tinychat.server import make_server  # noqa: E402
from tinychat.store import Store  # noqa: E402


def serve(path: str) -> None:
    library = ScriptedLibrary(says("Hello there."))
    server = make_server(library, Store(path, max_responses=10**6), port=0)
    print(SimpleNamespace(port=server.port, pid=os.getpid()).__dict__, flush=True)
    server.serve_forever()


def main(path: str) -> None:
    for _ in sys.stdin:
        child = os.fork()  # no thread has been started in this process
        if child == 0:
            try:
                serve(path)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print({"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
