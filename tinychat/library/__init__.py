"""Models on disk and in memory: find, name, fetch, load, unload."""
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinychat.errors import InvalidRequest, ModelLoadError, ModelNotFound, Overloaded, TinychatError
from tinychat.library.download import Progress
from tinychat.library.entry import ModelEntry
from tinychat.library.loaded import LoadedModel, LoadSettings, open_model, plan
from tinychat.library.shelf import Shelf, catalog, default_model

__all__ = ["Library", "LoadedModel", "ModelEntry", "catalog", "data_folder", "default_model"]

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.02     # how often a growing instance looks whether its requests are done
UNLOAD_WAIT_S = 5.0     # how long unload waits for requests to notice that they failed


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


class _Loading:
    """A load under way; fields are written under the library's lock."""

    def __init__(self):
        self.progress = 0.0
        self.error: TinychatError | None = None
        self.done = False


class Library:
    """Safe for many threads.

    extra: files or folders with models beside those in `home/models`.
    A request holds its model with `acquire` and `release`, or `use`, so that an instance that must
    grow waits for it.
    """

    def __init__(self, *, home: Path | None = None, default_context_length: int = 4096,
                 parallel: int = 4, queue_limit: int = 64, kv_type: str = "f16",
                 threads: int | None = None, jit: bool = True, extra: list[Path] = ()):
        self.home = Path(home) if home else data_folder()
        self.default_context_length, self.jit = default_context_length, jit
        self._settings = LoadSettings(parallel, queue_limit, kv_type, threads)
        self._shelf = Shelf(self.home / "models", extra, self._path_in_memory)
        self._changed = threading.Condition()  # guards all below
        self._loaded: dict[str, LoadedModel] = {}
        self._loading: dict[str, _Loading] = {}
        self._closed = False

    # ---- on disk

    def list(self) -> list[ModelEntry]:
        """Every readable model, by key."""
        return self._shelf.list()

    def find(self, name: str) -> ModelEntry:
        """The model with this key, or of this variant. Raises: ModelNotFound."""
        return self._shelf.find(name)

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

    # ---- in memory

    def loaded(self, key: str) -> LoadedModel | None:
        """The model when it is in memory; None also while a larger instance replaces it."""
        with self._changed:
            return None if key in self._loading else self._loaded.get(key)

    def load(self, name: str, *, context_length: int | None = None,
             progress: Callable[[float], None] | None = None) -> LoadedModel:
        """The model in memory with at least that much context; loads at the same time are one.

        progress: called in this thread with 0 to 1, only when there is a load to wait for.
        Raises: ModelNotFound, InvalidRequest for a context_length above the model's,
        ModelFileError, ModelLoadError.
        """
        with self.use(name, context_length=context_length, progress=progress) as model:
            return model

    @contextmanager
    def use(self, name: str, *, context_length: int | None = None,
            progress: Callable[[float], None] | None = None) -> Iterator[LoadedModel]:
        """As `load`; an instance that must grow waits for the end of the block."""
        model = self.acquire(name, context_length=context_length, progress=progress)
        try:
            yield model
        finally:
            self.release(model)

    def acquire(self, name: str, *, context_length: int | None = None,
                progress: Callable[[float], None] | None = None) -> LoadedModel:
        """As `load`, and the caller must `release` the model."""
        entry = self.find(name)
        if context_length is not None and not 0 < context_length <= entry.max_context_length:
            raise InvalidRequest(f"{entry.key} has a context of 1 to {entry.max_context_length} "
                                 f"tokens, not {context_length}", param="context_length")
        while True:
            with self._changed:
                self._check_open()
                model, loading = self._loaded.get(entry.key), self._loading.get(entry.key)
                if loading is None and model and _fits(model, entry, context_length):
                    model.n_users += 1
                    return model
                if mine := loading is None:
                    loading = self._loading[entry.key] = _Loading()
            if not mine:
                self._follow(loading, progress)
            else:
                return self._load(entry, context_length, loading, progress)

    def release(self, model: LoadedModel) -> None:
        with self._changed:
            model.n_users -= 1
            self._changed.notify_all()

    def unload(self, key: str) -> None:
        """Give a model's memory back; its running requests fail with `model_unloaded`.

        Raises: ModelNotFound.
        """
        with self._changed:
            self._changed.wait_for(lambda: key not in self._loading)
            model = self._loaded.pop(key, None)
        if model is None:
            raise ModelNotFound(f"no model {key[:200]!r} is loaded", param="instance_id")
        self._end(model, TinychatError(f"{key} was unloaded", code="model_unloaded", param="model"))

    def close(self) -> None:
        """Unload everything; running requests end with an error. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._loading)
            models = [self._loaded.pop(key) for key in list(self._loaded)]
        for model in models:
            self._end(model, Overloaded("tinychat is shutting down"))

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _path_in_memory(self, key: str) -> Path | None:
        model = self._loaded.get(key)
        return model.entry.path if model else None

    def _check_open(self) -> None:
        if self._closed:
            raise Overloaded("tinychat is shutting down")

    def _end(self, model: LoadedModel, error: TinychatError) -> None:
        model.engine.close(error)
        with self._changed:  # those who hold it are reading its last updates
            self._changed.wait_for(lambda: model.n_users == 0, UNLOAD_WAIT_S)
        model.close(error)

    def _load(self, entry: ModelEntry, context_length: int | None, loading: "_Loading",
              progress: Callable[[float], None] | None) -> LoadedModel:
        """Open the model, in place of a smaller instance if there is one, and hold it."""
        def report(part: float) -> None:
            with self._changed:
                loading.progress = part
                self._changed.notify_all()
            if progress:
                progress(part)

        try:
            n_ctx = self._make_room(entry, context_length)
            model = open_model(entry, n_ctx, self._settings, report)
            model.n_users = 1
            log.info("%s: loaded in %.2f s, %s, %d tokens of context, %d KV pages", entry.key,
                     model.load_time_seconds, model.executor.name, n_ctx, model.memory.n_pages)
        except TinychatError as error:
            loading.error = error
            raise
        except BaseException:
            loading.error = ModelLoadError(f"the load of {entry.key} broke off", param="model")
            raise
        else:
            with self._changed:
                self._loaded[entry.key] = model
            return model
        finally:
            with self._changed:
                del self._loading[entry.key]
                loading.done = True
                self._changed.notify_all()

    def _make_room(self, entry: ModelEntry, context_length: int | None) -> int:
        """The context length to load with. A smaller instance ends once its requests are done."""
        wanted = context_length or min(self.default_context_length, entry.max_context_length)
        old = self._loaded.get(entry.key)
        if old is None:
            return wanted
        if old.entry.path == entry.path:
            wanted = max(wanted, old.context_length)
            plan(old.program, wanted, self._settings, old.memory.total_bytes)  # or refuse, before
        with self._changed:
            while old.busy:
                self._check_open()
                self._changed.wait(DRAIN_POLL_S)
            del self._loaded[entry.key]
        old.close()
        return wanted

    def _follow(self, loading: "_Loading", progress) -> None:
        """Wait for another's load, and fail as it fails."""
        told = -1.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: loading.done or loading.progress > told)
                part, done, error = loading.progress, loading.done, loading.error
            if error:
                raise error
            if progress and part > told:
                progress(part)
            told = part
            if done:
                return


def _fits(model: LoadedModel, entry: ModelEntry, context_length: int | None) -> bool:
    return model.entry.path == entry.path and (context_length or 0) <= model.context_length
