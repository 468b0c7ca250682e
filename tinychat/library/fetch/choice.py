"""Which of a repository's files to fetch: one quantization with all its parts, and its tower.

Without a wish it is Q4_K_M, else the nearest: other 4-bit files, then 5, 6, 3, 8, 2, 1, 16 and 32
bits, as a bit that is missing from 4 counts twice: quality falls faster below than it rises above.
Among files of as many bits the K ones come first, middle sizes before small and large.
"""
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath

from tinychat.errors import InvalidRequest, ModelNotFound
from tinychat.library.entry import PART, is_tower_name, quantization_in, tower_rank
from tinychat.library.fetch.hub import Listing, RemoteFile

USUAL_BITS = 4
BITS = re.compile(r"\d+")
KINDS = ("_K_M", "_K_S", "_K_L", "_K_XL", "_K", "_XS", "_NL", "_1", "_0", "")
NOT_MODELS = ("imatrix",)  # in the name of a GGUF file that holds no model


@dataclass(frozen=True)
class Candidate:
    """The files of one quantization, all parts in order."""

    parts: tuple[RemoteFile, ...]

    @property
    def first(self) -> RemoteFile:
        return self.parts[0]

    @property
    def quantization(self) -> str | None:
        """By the file's name, else by a folder's."""
        path = PurePosixPath(self.first.path)
        names = [PART.sub("", path.stem), *reversed(path.parent.parts)]
        return next((found for name in names if (found := quantization_in(name))), None)


@dataclass(frozen=True)
class Choice:
    """parts: of the model, in order; tower: its mmproj file if the repository has one."""

    parts: tuple[RemoteFile, ...]
    tower: RemoteFile | None

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        return (*self.parts, self.tower) if self.tower else self.parts


def choose(listing: Listing, quantization: str | None = None, file: str | None = None) -> Choice:
    """quantization: in any case. file: the path of one file, which decides.

    Raises: ModelNotFound where there is none; InvalidRequest, param quantization, where there are
    only others.
    """
    found = candidates(listing.files)
    if not found:
        raise ModelNotFound(f"{listing.repo} has no GGUF files, and only those run here; many "
                            f"models have a second repository, {listing.repo}-GGUF",
                            param="model")
    if file is not None:
        found = [one for one in found if any(part.path == file for part in one.parts)]
        if not found:
            raise ModelNotFound(f"{listing.repo} has no model file {file[:200]!r}", param="model")
    if quantization is not None:
        found = _only(found, quantization, listing.repo)
    best = min(found, key=_rank)
    return Choice(best.parts, _tower(best, listing.files))


def candidates(files: tuple[RemoteFile, ...]) -> list[Candidate]:
    """What can be fetched: whole files, and splits with all their parts."""
    found: dict[str, Candidate] = {}
    splits: dict[tuple[str, str], dict[int, RemoteFile]] = defaultdict(dict)
    for file in files:
        if is_tower_name(file.name) or any(word in file.name.lower() for word in NOT_MODELS):
            continue
        stem = file.path.removesuffix(".gguf")
        if part := PART.search(stem):
            splits[stem[:part.start()], part[2]][int(part[1])] = file
        else:
            found[file.path] = Candidate((file,))
    for (stem, count), parts in splits.items():
        if len(parts) == int(count) and set(parts) == set(range(1, int(count) + 1)):
            found[stem] = Candidate(tuple(parts[i] for i in sorted(parts)))
    return list(found.values())


def _only(found: list[Candidate], quantization: str, repo: str) -> list[Candidate]:
    wanted = quantization_in(quantization.strip()) or quantization
    same = [one for one in found if one.quantization == wanted]
    if not same:
        known = sorted({one.quantization for one in found if one.quantization})
        has = ", ".join(known) if known else "files whose names tell none"
        raise InvalidRequest(f"{repo} has no quantization {quantization[:60]!r}; it has: {has}",
                             param="quantization")
    return same


def _rank(one: Candidate) -> tuple:
    """Least is best; see the top of the file. Of equals, the plainest name."""
    path = one.first.path
    plain = ("ud-" in path.lower(), path.count("/"), len(path), path)
    if one.quantization is None:
        return (1, 0, 0, 0, *plain)
    bits = int(BITS.search(one.quantization)[0])
    distance = bits - USUAL_BITS if bits >= USUAL_BITS else 2 * (USUAL_BITS - bits)
    kinds = [i for i, kind in enumerate(KINDS) if one.quantization.endswith(kind)]
    return (0, distance, -bits, kinds[0], *plain)


def _tower(one: Candidate, files: tuple[RemoteFile, ...]) -> RemoteFile | None:
    """From the model's own folder if it has one, else from the repository's top."""
    towers = [file for file in files if is_tower_name(file.name)]
    folder = one.first.path.rpartition("/")[0]
    beside = [file for file in towers if file.path.rpartition("/")[0] == folder]
    near = beside or [file for file in towers if "/" not in file.path]
    return min(near, key=lambda file: tower_rank(file.name, file.size), default=None)
