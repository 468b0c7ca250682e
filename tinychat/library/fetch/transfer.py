"""One file over HTTP: continued where it broke off, and checked from its first byte to its last."""
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tinychat.errors import TinychatError
from tinychat.library.fetch.download import Progress
from tinychat.library.fetch.web import Answer, Web, WebError

CHUNK_BYTES = 1 << 18
MIN_GAIN_BYTES = 1 << 14  # a try that brings less, or brings less within the timeout, has failed
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


def fetch_file(web: Web, url: str, part: Path, *, size: int, sha256: str | None,
               report: Callable[[int], None], progress: Progress) -> None:
    """Make `part` the whole file, checked and synced; what is there already is its beginning.

    sha256: None where the listing has none; then a hash that the hub sends with the file counts.
    report: told how many bytes of the file are here. progress: told of the check of a beginning.
    Raises: WebError, TinychatError, Stopped, and OSError of the disk. What is here stays for the
    next attempt, but for bytes that are known to be wrong.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(part, "a+b") as out:
            transfer = _Transfer(web, url, out, size, sha256, report)
            resumed = transfer.take_up(progress)
            transfer.fill()
            out.flush()
            os.fsync(out.fileno())
        found, expected = transfer.digest.hexdigest(), transfer.sha256
        if expected in (None, found):
            return
        part.unlink()
        if not resumed:  # else the beginning was bad: once more without it
            raise TinychatError(f"{part.name}: expected a file with SHA-256 {expected}, "
                                f"got {found}; it was thrown away")


class _Transfer:
    """done: bytes in `out`, all of them in `digest`."""

    def __init__(self, web: Web, url: str, out: BinaryIO, size: int, sha256: str | None,
                 report: Callable[[int], None]):
        self.web, self.url, self.out, self.size, self.sha256 = web, url, out, size, sha256
        self.name = os.path.basename(out.name)
        self.done, self.digest = 0, hashlib.sha256()
        self._report = report
        self._ranges = True  # until the server shows that it cannot

    def take_up(self, progress: Progress) -> bool:
        """Read what an earlier attempt has left; is there anything?"""
        there = os.fstat(self.out.fileno()).st_size
        if there > self.size:
            self._restart()
            return False
        self.out.seek(0)
        while chunk := self.out.read(CHUNK_BYTES):
            self.digest.update(chunk)
            self.done += len(chunk)
            progress("checking", self.done, self.size)
            self.web.stop.check()
        self._report(self.done)
        return self.done > 0

    def fill(self) -> None:
        """Receive the rest, in as many tries as it takes while each brings something."""
        failures, best, pauses = 0, self.done, self.web.patience.pauses_s
        while self.done < self.size:
            problem = self._try()
            if self.done >= self.size:
                break
            if self.done >= best + MIN_GAIN_BYTES:
                failures, best = 0, self.done
            else:
                failures += 1
            if failures > len(pauses):
                raise TinychatError(f"{self.name}: {problem}; {failures} tries brought nothing. "
                                    f"{self.done} of {self.size} bytes are here, and the next "
                                    "download continues with them")
            pause_s = pauses[max(0, failures - 1)] if pauses else 0.0
            self.web.stop.wait(max(pause_s, problem.pause_s))

    def _try(self) -> WebError:
        """One request; what ended it."""
        try:
            self._receive()
            return WebError("the connection ended early")
        except WebError as error:
            if not error.transient:
                raise
            return error

    def _receive(self) -> None:
        if not self._ranges:
            self._restart()
        headers = {"Accept-Encoding": "identity"}
        if self.done:
            headers["Range"] = f"bytes={self.done}-"
        with self.web.get(self.url, headers) as answer:
            self.sha256 = self.sha256 or answer.sha256
            self._copy(answer, self._end_of(answer))

    def _end_of(self, answer: Answer) -> int:
        """The byte after the last that an answer will bring. Raises: WebError if it is another."""
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise self._wrong(f"Content-Encoding {encoding[:40]!r}, which was not asked for")
        if answer.status == 200:
            if answer.length not in (None, self.size):
                raise self._wrong(f"{answer.length} bytes")
            if self.done:  # it does not know Range
                self._restart()
            return self.size
        match = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status == 206 and self.done and match and int(match[1]) == self.done:
            end = int(match[2]) + 1
            if match[3] not in ("*", str(self.size)) or not self.done < end <= self.size:
                raise self._wrong(f"Content-Range {match[0]}")
            return end
        if not self.done:
            raise self._wrong(f"HTTP {answer.status} to a request for all of it")
        self._ranges = False
        raise WebError("the server sends another part of the file than was asked for")

    def _wrong(self, found: str) -> WebError:
        return WebError(f"{self.name}: expected a file of {self.size} bytes, the server sends "
                        f"{found}", transient=False)

    def _copy(self, answer: Answer, end: int) -> None:
        before, since, timeout_s = self.done, time.monotonic(), self.web.patience.timeout_s
        while self.done < end:
            chunk = answer.read(min(CHUNK_BYTES, end - self.done))
            if not chunk:
                return
            self.out.write(chunk)
            self.digest.update(chunk)
            self.done += len(chunk)
            self._report(self.done)
            self.web.stop.check()
            if time.monotonic() > since + timeout_s:
                if self.done < min(end, before + MIN_GAIN_BYTES):
                    raise WebError(f"fewer than {MIN_GAIN_BYTES} bytes came in {timeout_s:g} s")
                before, since = self.done, time.monotonic()
        if answer.length is None and end == self.size and self._has_more(answer):
            self._restart()  # nobody knows which bytes are the file's
            raise self._wrong("more")

    def _has_more(self, answer: Answer) -> bool:
        try:
            return bool(answer.read(1))
        except WebError:  # all that was promised is here
            return False

    def _restart(self) -> None:
        self.out.seek(0)
        self.out.truncate()
        self.done, self.digest = 0, hashlib.sha256()
        self._report(0)
