"""A model of the hub on its way to the models folder: everything it needs, or nothing.

Its files gather in the model's hidden folder, under their own names in a folder whose name stands
for exactly these files, by size and hash: a later attempt continues there, and an attempt for other
files does not. Once all are there and open as a model they are moved, the first part last.
"""
import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinychat.errors import ModelFileError, TinychatError
from tinychat.gguf_file import open_gguf
from tinychat.library import entry as entries
from tinychat.library.fetch.choice import Choice
from tinychat.library.fetch.download import HIDDEN, Progress, need_space, publish, slug, turn
from tinychat.library.fetch.hub import Hub, Listing, RemoteFile
from tinychat.library.fetch.transfer import fetch_file
from tinychat.library.fetch.web import Web, WebError


@dataclass(frozen=True)
class HubModel:
    """publisher, name: of the folder for it. web: holds the token, the patience and the stop."""

    hub: Hub
    web: Web
    listing: Listing
    choice: Choice
    models: Path
    publisher: str
    name: str

    @property
    def target(self) -> Path:
        return self._place(self.choice.parts[0])

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.choice.files)

    def is_here(self) -> bool:
        """Every file in its place, and a model that opens."""
        if not all(self._is_placed(file) for file in self.choice.files):
            return False
        try:
            entries.describe(self.target, "", "")
            return True
        except (TinychatError, OSError):
            return False

    def check_space(self) -> None:
        """Raises: TinychatError."""
        missing = [file for file in self.choice.files if not self._is_placed(file)]
        need_space(self.models, sum(max(0, file.size - _size(self._gathered(file)))
                                    for file in missing))

    def fetch(self, progress: Progress) -> None:
        """Raises: ModelNotFound where the hub refuses a file, TinychatError in one line."""
        try:
            with turn(self.models, slug(self.publisher, self.name), progress, self.web.stop):
                if not self.is_here():
                    self._fetch(progress)
        except WebError as error:
            raise self.hub.explained(error, self.listing.repo) from error
        except OSError as error:
            raise TinychatError(f"cannot write {self.target.parent}: "
                                f"{error.strerror or error}") from error

    def _fetch(self, progress: Progress) -> None:
        self.check_space()
        self._forget_what_may_be_other()
        missing = [file for file in self.choice.files if not self._is_placed(file)]
        again = [part for part in self.choice.parts if part not in missing]
        if missing and not set(missing) & set(self.choice.parts):
            again = []  # only the tower is new
        counts = {file: file.size if file not in missing else _size(self._gathered(file))
                  for file in self.choice.files}
        for file in missing:
            self._fetch_file(file, counts, progress)
        for part in again:  # what is here of a model that is not whole is checked like the rest
            publish(self._place(part), self._gathered(part))
            self._fetch_file(part, counts, progress)
        self._publish([*missing, *again])

    def _fetch_file(self, file: RemoteFile, counts: dict[RemoteFile, int],
                    progress: Progress) -> None:
        def report(done: int) -> None:
            counts[file] = done
            progress("downloading", sum(counts.values()), self.total_bytes)

        fetch_file(self.web, self.hub.file_url(self.listing, file), self._gathered(file),
                   size=file.size, sha256=file.sha256, report=report, progress=progress)

    def _publish(self, files: list[RemoteFile]) -> None:
        """Check that the gathered files open, and move them, so that nothing is listed too soon."""
        first, tower = self.choice.parts[0], self.choice.tower
        self._check(files)
        if first in files and len(self.choice.parts) > 1:
            self.target.unlink(missing_ok=True)  # an older one must not meet the new parts
        order = [file for file in files if file not in (first, tower)]
        order += [file for file in (tower, first) if file in files]
        for file in order:
            publish(self._gathered(file), self._place(file))
        for folder in {self._gathered(file).parent for file in files}:
            shutil.rmtree(folder, ignore_errors=True)

    def _check(self, files: list[RemoteFile]) -> None:
        """Raises: ModelFileError; then what was fetched is of no use and goes."""
        first, tower = self.choice.parts[0], self.choice.tower
        try:
            if first in files:
                entries.describe(self._gathered(first), "", "")
            if tower in files and tower.sha256 is None:
                open_gguf(self._gathered(tower)).close()
        except ModelFileError as error:
            folders = {self._gathered(file).parent for file in files}
            said = str(error)
            for folder in folders:
                said = said.replace(f"{folder}{os.sep}", "")
                shutil.rmtree(folder, ignore_errors=True)
            raise ModelFileError(f"{self.listing.repo}: {said}", param="model") from error

    def _forget_what_may_be_other(self) -> None:
        """Without hash and commit nobody knows whether a beginning belongs to today's file."""
        if not self.listing.is_pinned:
            for file in self.choice.files:
                if file.sha256 is None:
                    with suppress(FileNotFoundError):
                        self._gathered(file).unlink()

    def _place(self, file: RemoteFile) -> Path:
        return self.models / self.publisher / self.name / file.name

    def _is_placed(self, file: RemoteFile) -> bool:
        return _size(self._place(file)) == file.size

    def _gathered(self, file: RemoteFile) -> Path:
        together = [file] if file == self.choice.tower else self.choice.parts
        identity = [[one.name, one.size, one.sha256 or
                     [self.hub.endpoint, self.listing.repo, self.listing.revision, one.path]]
                    for one in together]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        return self.models / HIDDEN / slug(self.publisher, self.name) / key / file.name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
