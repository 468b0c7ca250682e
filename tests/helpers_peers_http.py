"""Servers that others wrote, as processes that listen: started on a free port, ended with all that they started."""
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers_mcp import wait_until

STOP_S = 5


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@contextmanager
def listening(port: int, *argv: str, env: dict[str, str] = {}) -> Iterator[subprocess.Popen]:
    """The process, once something answers at the port. Afterwards nothing of it runs."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(argv, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
                                   stdout=said, stderr=said, start_new_session=True)
        try:
            def answers() -> bool:
                if process.poll() is not None:
                    said.seek(0)
                    pytest.fail(f"{argv[0]} ended: {said.read()[-2000:].decode('utf-8', 'replace')}")
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    return True
                return False
            wait_until(answers, f"{argv[0]} to listen")
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """SIGTERM and then SIGKILL to its group, and to descendants with groups of their own."""
    others = descendants(process.pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    for pid in others:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Where /proc tells; a browser is in a group of its own."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]
