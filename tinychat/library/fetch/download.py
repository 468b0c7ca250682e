"""What every download needs: a way to be stopped, turns between processes, room on the disk.

    models/.downloads/<model>.lock   held by whoever fetches that model; gone with its last holder
    models/.downloads/<model>/       what is not whole yet: hidden, so that nothing there is listed

Nothing but `publish` puts a file where models are looked for.
"""
import errno
import os
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from tinychat.errors import Overloaded, TinychatError

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all or 0
POLL_S = 0.1                 # how often somebody who waits for a turn looks again
STALE_S = 7 * 24 * 3600.0    # an unfinished file that nobody has touched for so long is given up
HIDDEN = ".downloads"
BUSY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # what a taken lock says


class Stopped(Overloaded):
    """A download was told to stop; what it has so far stays for the next attempt."""


class Stop:
    """Ends a download from another thread: waits are cut short, its connections shut."""

    def __init__(self):
        self._set = threading.Event()
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def set(self) -> None:
        with self._lock:
            self._set.set()
            sockets = list(self._sockets)
        for sock in sockets:
            _shut(sock)

    def check(self) -> None:
        """Raises: Stopped."""
        if self._set.is_set():
            raise Stopped("the download was stopped")

    def wait(self, seconds: float) -> None:
        """Raises: Stopped, at once when `set` is called meanwhile."""
        self._set.wait(seconds)
        self.check()

    def watch(self, sock: socket.socket) -> None:
        """Shut this connection too, now or later."""
        with self._lock:
            self._sockets.add(sock)
            late = self._set.is_set()
        if late:
            _shut(sock)


def _shut(sock: socket.socket) -> None:
    # NOTE: the plain socket's method: TLS's own drops the session under the thread that reads it.
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class Plan(Protocol):
    """A model that can be fetched; `target` is the file whose appearance makes it a model."""

    target: Path
    total_bytes: int

    def check_space(self) -> None:
        """Raises: TinychatError with what is needed and what there is."""

    def fetch(self, progress: Progress) -> None:
        """Bring it, unless somebody else has meanwhile. Raises: TinychatError in one line."""


@contextmanager
def turn(models: Path, model: str, progress: Progress, stop: Stop) -> Iterator[Path]:
    """The hidden folder of one model, for one thread of one process at a time.

    The system drops the lock when a process dies. What is in the folder then stays, else an empty
    one goes.
    Raises: Stopped while it waits.
    """
    sweep(models)
    hidden = models / HIDDEN
    try:
        while True:
            with _held(hidden / f"{model}.lock") as mine:
                if mine:
                    with _folder(hidden / model) as folder:
                        yield folder
                    return
            progress("waiting for another download", 0, 0)
            stop.wait(POLL_S)
    finally:
        _remove_if_empty(hidden)


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    path.mkdir(exist_ok=True)
    try:
        yield path
    finally:
        _remove_if_empty(path)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Is the lock free, and ours until the end of the block?"""
    with _open_lock(path) as lock:
        if not (_try_lock(lock) and _is_at(path, lock)):  # not there: its last holder removed it
            yield False
            return
        try:
            yield True
        finally:
            with suppress(OSError):  # Windows does not remove an open file
                path.unlink()


def _open_lock(path: Path):
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # somebody has just removed the empty folder
            return open(path, "a+b")


def _try_lock(lock) -> bool:
    try:
        if os.name == "nt":
            import msvcrt
            lock.seek(0)
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in BUSY:
            return False
        raise  # a file system without locks would be waited for in vain


def _is_at(path: Path, file) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def sweep(models: Path) -> None:
    """Remove what nobody has touched for a week, but not where somebody is at work."""
    hidden, before = models / HIDDEN, time.time() - STALE_S
    with suppress(OSError):
        for folder in [path for path in hidden.glob("*") if path.is_dir()]:
            if not any(_is_stale(path, before) for path in folder.rglob("*")):
                continue
            with _held(hidden / f"{folder.name}.lock") as mine:
                if mine:
                    _remove_stale(folder, before)


def _is_stale(path: Path, before: float) -> bool:
    try:
        return path.is_file() and path.stat().st_mtime < before
    except OSError:  # gone meanwhile
        return False


def _remove_stale(folder: Path, before: float) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir():
            _remove_if_empty(path)
        elif _is_stale(path, before):
            path.unlink()
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def need_space(folder: Path, n_bytes: int) -> None:
    """Raises: TinychatError when fewer bytes are free where `folder` is, or will be."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        raise TinychatError(f"{folder}: the download needs {n_bytes / 1e6:.0f} MB of disk space, "
                            f"{free / 1e6:.0f} MB are free")


def publish(file: Path, target: Path) -> None:
    """Move a whole and synced file to where it will be found, all of it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _move_across(file, target)  # the publisher's folder is a link to another disk
    if os.name != "nt":  # there a folder cannot be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _move_across(file: Path, target: Path) -> None:
    beside = target.with_name(f".{target.name}.part")  # hidden: not listed
    try:
        with open(file, "rb") as source, open(beside, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    file.unlink()


def slug(publisher: str, name: str) -> str:
    """What a model's hidden folder and lock are called; one folder on any disk, one name."""
    return f"{publisher}--{name}".lower()
