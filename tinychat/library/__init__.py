"""Models on disk and in memory: find, name, fetch, load, unload."""
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tinychat.errors import InvalidRequest, ModelNotFound
from tinychat.library.fetch.download import Progress
from tinychat.library.entry import ModelEntry
from tinychat.library.fetch.jobs import Downloads, Job
from tinychat.library.loaded import LoadedModel, LoadSettings
from tinychat.library.residents import Progress as LoadProgress
from tinychat.library.residents import Residents, Wish
from tinychat.library.shelf import Shelf, catalog, default_model

__all__ = ["Library", "LoadedModel", "ModelEntry", "catalog", "data_folder", "default_model"]

log = logging.getLogger(__name__)


def data_folder() -> Path:
    """TINYCHAT_HOME, else the platform's data folder."""
    if chosen := os.environ.get("TINYCHAT_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "tinychat"
    if os.name == "nt":
        folder = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        folder = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(folder) / "tinychat"


class Library:
    """The shelf of models on disk, and those in memory. Safe for many threads.

    extra: files or folders with models beside those in `home/models`.
    jit, auto_evict, default_ttl_seconds (0: for ever): the contract's, for loads on demand.
    prompt_lookup: whether texts that repeat themselves are made faster by guesses; see `Engine`.
    A request holds its model with `acquire` and `release`, or `use`: whatever takes its place, or
    finds it idle, waits for that.
    """

    def __init__(self, *, home: Path | None = None, default_context_length: int = 4096,
                 parallel: int = 4, queue_limit: int = 64, kv_type: str = "f16",
                 threads: int | None = None, jit: bool = True, auto_evict: bool = True,
                 default_ttl_seconds: float = 3600, prompt_lookup: bool = True,
                 extra: list[Path] = ()):
        self.home = Path(home) if home else data_folder()
        self.jit = jit
        self._memory = Residents(LoadSettings(parallel, queue_limit, kv_type, threads,
                                              prompt_lookup=prompt_lookup),
                                 default_context_length=default_context_length,
                                 auto_evict=auto_evict, default_ttl_s=default_ttl_seconds)
        for path in extra:
            if not Path(path).exists():
                log.warning("%s: expected a folder or file with models, there is none", path)
        self._shelf = Shelf(self.home / "models", extra, self._path_in_memory)
        self._downloads = Downloads(self._shelf)

    # ---- on disk

    def list(self) -> list[ModelEntry]:
        """Every readable model, and those in memory whose file is gone, by key."""
        found = {entry.key: entry for entry in self._shelf.list()}
        for model in self._memory.instances():
            found.setdefault(model.entry.key, model.entry)
        return [found[key] for key in sorted(found)]

    def find(self, name: str) -> ModelEntry:
        """The model with this key, of this variant, or in memory under it. Raises: ModelNotFound."""
        model = self._memory.ready(name)
        if model and model.entry.is_as_it_was():  # no need to look through the folders
            return model.entry
        try:
            return self._shelf.find(name)
        except ModelNotFound:
            if model:  # its file is gone
                return model.entry
            raise

    def resolve(self, name: str | os.PathLike) -> ModelEntry:
        """As `find`, and a file's path too. Raises: ModelNotFound, ModelFileError."""
        return self._shelf.resolve(name)

    def pull(self, name: str, progress: Progress | None = None) -> ModelEntry:
        """Fetch a model of the catalogue, unless it is here; progress(what, done, total) in bytes.

        Raises: ModelNotFound for a name that the catalogue lacks; TinychatError.
        """
        return self._shelf.pull(name, progress)

    def ensure(self, name: str | os.PathLike, progress: Progress | None = None) -> ModelEntry:
        """As `resolve`; a model that only the catalogue has is pulled first, and a warning says so.

        Raises: ModelNotFound, ModelFileError, TinychatError when it cannot be fetched.
        """
        try:
            return self.resolve(name)
        except ModelNotFound:
            if str(name) not in catalog():
                raise
        log.warning("%s is not on this machine yet: fetching it (%s)", name,
                    catalog()[str(name)]["description"])
        return self.pull(str(name), progress)

    def download(self, model: str, quantization: str | None = None) -> Job | None:
        """Fetch a model beside everything else; None when it is here already.

        model: an id of the catalogue, or a link to a repository of the hub; with a link,
        quantization picks a file. Who asks again while it runs gets the same job.
        Raises: ModelNotFound, InvalidRequest, TinychatError when the hub cannot be asked or the
        disk is too full.
        """
        return self._downloads.start(model, quantization)

    def download_job(self, id: str) -> Job:
        """Raises: JobNotFound."""
        return self._downloads.get(id)

    # ---- in memory

    def loaded(self, key: str) -> LoadedModel | None:
        """The model, when a request can have it at once."""
        return self._memory.ready(key)

    def instance(self, key: str) -> LoadedModel | None:
        """The model, when it takes up memory: also while its last requests run."""
        return self._memory.instance(key)

    def instances(self) -> Sequence[LoadedModel]:
        """All models that take up memory."""
        return self._memory.instances()

    def expects(self, entry: ModelEntry) -> bool:
        """Is the model in memory, this variant of it, or on its way there?"""
        return self._memory.expects(entry)

    def counters(self) -> dict[str, Counter]:
        """By key, counts since the start: loads, failed_loads, load_seconds, and the tokens
        prefilled, reused, generated."""
        return self._memory.counters()

    def load(self, name: str, *, context_length: int | None = None,
             eval_batch_size: int | None = None, ttl: float | None = None,
             progress: LoadProgress | None = None) -> LoadedModel:
        """An explicit load: the model in memory as asked for, until `unload`, or idle for `ttl`
        seconds. An instance with other values is replaced once its requests are done.

        progress: called in this thread with 0 to 1, only when there is a load to wait for.
        Raises: ModelNotFound, InvalidRequest for a context_length above the model's,
        ModelFileError, ModelLoadError.
        """
        wish = Wish(context_length, eval_batch_size, explicit=True, ttl_s=ttl)
        model = self._acquire(name, wish, progress)
        self.release(model)
        return model

    @contextmanager
    def use(self, name: str) -> Iterator[LoadedModel]:
        """`acquire` and, at the end of the block, `release`."""
        model = self.acquire(name)
        try:
            yield model
        finally:
            self.release(model)

    def acquire(self, model: str | ModelEntry, *, context_length: int | None = None,
                ttl: float | None = None, progress: LoadProgress | None = None) -> LoadedModel:
        """The model for a request, with at least that much context, loaded if need be: loads at
        the same time are one. The caller must `release` it. Otherwise as `load`."""
        return self._acquire(model, Wish(context_length, ttl_s=ttl), progress)

    def try_acquire(self, entry: ModelEntry, *, context_length: int | None = None,
                    ttl: float | None = None) -> LoadedModel | None:
        """As `acquire`, and None where there would be a load to wait for."""
        return self._memory.try_acquire(entry, Wish(context_length, ttl_s=ttl))

    def release(self, model: LoadedModel) -> None:
        self._memory.release(model)

    def unload(self, name: str) -> str:
        """Give a model's memory back; its running requests fail with `model_unloaded`.

        name: of an instance, or as for `find`. Returns the instance's id. Raises: ModelNotFound.
        """
        key = name
        if self._memory.instance(name) is None:
            try:
                key = self._shelf.find(name).key
            except ModelNotFound:
                pass  # then it cannot be loaded either, and that is what the caller will hear
        self._memory.unload(key)
        return key

    def close(self) -> None:
        """Unload everything; running requests end with an error, downloads stop where they are.
        May be called again."""
        self._downloads.close()
        self._memory.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _acquire(self, model: str | ModelEntry, wish: Wish, progress: LoadProgress | None
                 ) -> LoadedModel:
        entry = self.find(model) if isinstance(model, str) else model
        n_ctx = wish.context_length
        if n_ctx is not None and not 0 < n_ctx <= entry.max_context_length:
            raise InvalidRequest(f"{entry.key} has a context of 1 to {entry.max_context_length} "
                                 f"tokens, not {n_ctx}", param="context_length")
        return self._memory.acquire(entry, wish, progress)

    def _path_in_memory(self, key: str) -> Path | None:
        model = self._memory.instance(key)
        return model.entry.path if model else None
