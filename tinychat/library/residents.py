"""Models in memory: loads that are shared, grown, evicted, given back when idle, unloaded.

A model is *ready* for requests, or *leaving*: it takes no new ones, and is closed once nobody holds
it. There is at most one instance of a model, and its id is the model's key.
"""
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from tinychat.errors import ModelNotFound, Overloaded, TinychatError
from tinychat.library.entry import ModelEntry
from tinychat.library.loaded import MIN_CONTEXT, LoadedModel, LoadSettings, check, open_model

log = logging.getLogger(__name__)

UNLOAD_WAIT_S = 5.0     # how long unload waits for requests to notice that they failed
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Wish:
    """What somebody wants of a model in memory.

    explicit: a load asked for as such: its values hold exactly, and the instance stays. Else it is
    a request's: an instance with as much context will do, and one loaded for it may be evicted.
    ttl_s: how long the instance may be idle; None for ever, if explicit, else the default.
    """

    context_length: int | None = None
    eval_batch_size: int | None = None
    explicit: bool = False
    ttl_s: float | None = None

    def asks_for_the_same(self, other: "Wish") -> bool:
        return (self.context_length, self.eval_batch_size) == (
            other.context_length, other.eval_batch_size)

    def fits(self, model: LoadedModel, entry: ModelEntry) -> bool:
        if (model.entry.path, model.entry.stamp) != (entry.path, entry.stamp):
            return False  # another variant, or the file has been replaced
        n_ctx = max(self.context_length or 0, MIN_CONTEXT)
        if not self.explicit:
            return n_ctx <= model.context_length
        batch = min(self.eval_batch_size or model.eval_batch_size, model.context_length)
        return (batch == model.eval_batch_size
                and (self.context_length is None or n_ctx == model.context_length))


class _Loading:
    """A load under way; fields are written under the lock. begun: nothing has to make room first.

    error: of the load, for those who wished the same.
    """

    def __init__(self, wish: Wish):
        self.wish = wish
        self.progress, self.begun = 0.0, False
        self.error: TinychatError | None = None
        self.done = False


class Residents:
    """Safe for many threads.

    auto_evict: a load for a request first lets go of what was loaded for other requests.
    default_ttl_s: idle seconds of an instance that was loaded for a request; 0: for ever.
    """

    def __init__(self, settings: LoadSettings, *, default_context_length: int,
                 auto_evict: bool = True, default_ttl_s: float = 0):
        self.default_context_length = default_context_length
        self._settings, self._auto_evict = settings, auto_evict
        self._default_ttl_s = default_ttl_s
        self._evicting = threading.Lock()      # one load with evictions at a time
        self._changed = threading.Condition()  # guards all below
        self._ready: dict[str, LoadedModel] = {}
        self._leaving: dict[str, LoadedModel] = {}
        self._loading: dict[str, _Loading] = {}
        self._past: dict[str, Counter] = {}    # counters of instances that are gone
        self._reaper: threading.Thread | None = None
        self._closed = False

    # ---- what is there

    def ready(self, key: str) -> LoadedModel | None:
        """The model, when a request can have it at once."""
        with self._changed:
            return self._ready.get(key)

    def instance(self, key: str) -> LoadedModel | None:
        """The model, when it takes up memory: also while its last requests run."""
        with self._changed:
            return self._ready.get(key) or self._leaving.get(key)

    def instances(self) -> list[LoadedModel]:
        with self._changed:
            return [*self._ready.values(), *self._leaving.values()]

    def expects(self, entry: ModelEntry) -> bool:
        """Is the model in memory, this variant of it, or on its way there?"""
        with self._changed:
            model = self._ready.get(entry.key)
            return entry.key in self._loading or (
                model is not None and model.entry.path == entry.path)

    def counters(self) -> dict[str, Counter]:
        """By key, counts since the start: loads, failed_loads, load_seconds, and the engine's
        prefilled, reused and generated tokens, drafted and accepted guesses."""
        with self._changed:
            total = {key: Counter(past) for key, past in self._past.items()}
            for model in [*self._ready.values(), *self._leaving.values()]:
                total.setdefault(model.entry.key, Counter()).update(_engine_counts(model))
        return total

    # ---- for requests

    def acquire(self, entry: ModelEntry, wish: Wish, progress: Progress | None = None
                ) -> LoadedModel:
        """The model in memory as wished; loads at the same time are one. It is held: the caller
        must `release` it.

        progress: called in this thread with 0 to 1, only when there is a load to wait for.
        Raises: ModelFileError, ModelLoadError, Overloaded.
        """
        while True:
            with self._changed:
                if model := self.try_acquire(entry, wish):
                    return model
                loading = self._loading.get(entry.key)
                if mine := loading is None:
                    loading = self._loading[entry.key] = _Loading(wish)
            if not mine:
                self._follow(loading, wish, progress)
            else:
                return self._load(entry, wish, loading, progress)

    def try_acquire(self, entry: ModelEntry, wish: Wish) -> LoadedModel | None:
        """As `acquire`, and None where there would be a load to wait for. Raises: Overloaded."""
        with self._changed:
            self._check_open()
            model = self.ready(entry.key)
            return self._taken(model, wish) if model and wish.fits(model, entry) else None

    def release(self, model: LoadedModel) -> None:
        with self._changed:
            model.n_users -= 1
            model.idle_since = time.monotonic()
            self._changed.notify_all()

    def unload(self, key: str) -> None:
        """Give a model's memory back; its running requests fail with `model_unloaded`.

        Raises: ModelNotFound.
        """
        error = TinychatError(f"{key} was unloaded", code="model_unloaded", param="model")
        found = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: key in self._leaving or key in self._ready
                                       or key not in self._loading
                                       or not self._loading[key].begun)
                theirs, ours = self._leaving.get(key), self._ready.get(key)
                if theirs is None and ours is not None:
                    self._leaving[key] = self._ready.pop(key)
            if theirs:  # another thread waits for its requests: they need not finish now
                theirs.engine.close(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._leaving.get(key) is not theirs)
                found = True
            elif ours:
                return self._end(ours, error)
            elif found:
                return None
            else:
                raise ModelNotFound(f"no model {key[:200]!r} is loaded", param="instance_id")

    def close(self) -> None:
        """Unload everything; running requests end with an error. May be called again."""
        error = Overloaded("tinychat is shutting down")
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            leaving = list(self._leaving.values())
        for model in leaving:
            model.stop(error)
        with self._changed:
            self._changed.wait_for(lambda: not self._loading)
            models = list(self._ready.values())
            self._leaving |= self._ready
            self._ready.clear()
        for model in models:
            self._end(model, error)
        with self._changed:
            self._changed.wait_for(lambda: not self._leaving)
        if self._reaper:
            self._reaper.join()

    # ---- loading

    def _check_open(self) -> None:
        if self._closed:
            raise Overloaded("tinychat is shutting down")

    def _taken(self, model: LoadedModel, wish: Wish) -> LoadedModel:
        """Hold the model; its time to live is what the latest request says, if it has one at all."""
        model.n_users += 1
        if wish.explicit:
            model.on_demand, model.ttl_s = False, wish.ttl_s
        elif model.on_demand:
            model.ttl_s = wish.ttl_s or self._default_ttl_s or None
        if model.ttl_s:
            self._start_reaper()
        return model

    def _start_reaper(self) -> None:
        if self._reaper is None:
            reaper = threading.Thread(target=self._reap, name="idle-models", daemon=True)
            try:
                reaper.start()
                self._reaper = reaper
            except RuntimeError:  # the system gives no more threads: with the next request, then
                log.warning("no thread for the unloading of idle models yet")

    def _load(self, entry: ModelEntry, wish: Wish, loading: _Loading,
              progress: Progress | None) -> LoadedModel:
        """Open the model, in place of an instance that does not fit if there is one, and hold it."""
        def report(part: float) -> None:
            with self._changed:
                loading.progress = part
                self._changed.notify_all()
            if progress:
                progress(part)

        try:
            report(0.0)
            with self._turn(wish):
                old, n_ctx, settings = self._make_room(entry, wish)
                loading.begun = True
                model = open_model(entry, n_ctx, settings, report)
                model.on_demand = not wish.explicit and (old is None or old.on_demand)
                model.ttl_s = old.ttl_s if old and not old.on_demand else None
                log.info("%s: loaded in %.2f s, %s, %d tokens of context, %d KV pages", entry.key,
                         model.load_time_seconds, model.executor.name, n_ctx, model.memory.n_pages)
                self._loaded(entry.key, loading, model, wish)  # before the next one looks round
                return model
        except TinychatError as error:
            loading.error = error
            raise
        finally:
            self._loaded(entry.key, loading)

    def _loaded(self, key: str, loading: _Loading, model: LoadedModel | None = None,
                wish: Wish | None = None) -> None:
        """The end of a load, with a model or without one; only the first call counts."""
        with self._changed:
            if loading.done:
                return
            past = self._past.setdefault(key, Counter())
            if model:
                self._ready[key] = self._taken(model, wish)
                past.update(loads=1, load_seconds=model.load_time_seconds)
            else:
                past.update(failed_loads=1)
            del self._loading[key]
            loading.done = True
            self._changed.notify_all()

    @contextmanager
    def _turn(self, wish: Wish):
        """Loads that evict take turns: two at once would each find nothing to evict."""
        with nullcontext() if wish.explicit or not self._auto_evict else self._evicting:
            yield

    def _make_room(self, entry: ModelEntry, wish: Wish
                   ) -> tuple[LoadedModel | None, int, LoadSettings]:
        """What is replaced, and the context length and settings to load with. Waits for the
        requests of whatever has to go; nothing has to go for a load that would fail."""
        with self._changed:
            self._changed.wait_for(lambda: entry.key not in self._leaving)
            self._check_open()
            old = self._ready.get(entry.key)
            going = [old] if old else []
            if self._auto_evict and not wish.explicit:
                going += [model for model in self._ready.values() if model.on_demand
                          and model is not old]
        n_ctx, settings = self._decided(entry, wish, old)
        if going:
            check(entry, n_ctx, settings, sum(model.memory.total_bytes for model in going))
        for model in going:
            if model is not old:
                log.info("%s makes room for %s", model.entry.key, entry.key)
            self._let_go(model)
        with self._changed:
            self._check_open()
        return old, n_ctx, settings

    def _decided(self, entry: ModelEntry, wish: Wish, old: LoadedModel | None
                 ) -> tuple[int, LoadSettings]:
        """Context length and settings: as wished, else as they were, else the defaults."""
        n_ctx = wish.context_length or min(self.default_context_length, entry.max_context_length)
        settings = self._settings
        if old and old.entry.path == entry.path:
            settings = old.settings
            if not (wish.explicit and wish.context_length):
                n_ctx = min(max(wish.context_length or 0, old.context_length),
                            entry.max_context_length)
        if wish.eval_batch_size:
            settings = replace(settings, eval_batch_size=wish.eval_batch_size)
        return n_ctx, settings

    def _let_go(self, model: LoadedModel) -> None:
        """Close a model once its requests are done; new ones wait for its successor."""
        key = model.entry.key
        with self._changed:
            if self._ready.get(key) is not model:  # somebody else was faster
                self._changed.wait_for(lambda: self._leaving.get(key) is not model)
                return
            self._leaving[key] = self._ready.pop(key)
            try:
                self._changed.wait_for(lambda: model.n_users == 0 or self._closed)
            except BaseException:  # Ctrl-C: it stays
                self._ready[key] = self._leaving.pop(key)
                self._changed.notify_all()
                raise
        self._end(model, Overloaded("tinychat is shutting down"))

    def _follow(self, loading: _Loading, wish: Wish, progress: Progress | None) -> None:
        """Wait for another's load, and fail as it fails if it was for the same; else the caller
        tries for itself."""
        told = -1.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: loading.done or loading.progress > told)
                part, done, error = loading.progress, loading.done, loading.error
            if error and wish.asks_for_the_same(loading.wish):
                raise error
            if progress and part > told:
                progress(part)
            told = part
            if done:
                return

    # ---- the end of an instance

    def _end(self, model: LoadedModel, error: TinychatError) -> None:
        """Close one that is leaving; requests that still run on it get the error."""
        key = model.entry.key
        try:
            model.stop(error)
            with self._changed:  # those who hold it are reading its last updates
                self._changed.wait_for(lambda: model.n_users == 0, UNLOAD_WAIT_S)
            model.close(error)
        finally:
            with self._changed:
                self._past.setdefault(key, Counter()).update(_engine_counts(model))
                if self._leaving.get(key) is model:
                    del self._leaving[key]
                self._changed.notify_all()

    def _reap(self) -> None:
        """Let go of instances that have been idle for their time."""
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                ends = {model: model.idle_since + model.ttl_s for model in self._ready.values()
                        if model.ttl_s and model.n_users == 0}
                expired = [model for model, end in ends.items() if end <= now]
                for model in expired:
                    self._leaving[model.entry.key] = self._ready.pop(model.entry.key)
                if not expired:
                    self._changed.wait(min(min(ends.values()) - now, threading.TIMEOUT_MAX)
                                       if ends else None)
            for model in expired:
                log.info("%s: unloaded after %g s without a request", model.entry.key, model.ttl_s)
                self._end(model, Overloaded("the model was idle"))


def _engine_counts(model: LoadedModel) -> dict[str, int]:
    stats = model.engine.stats
    return {"prefilled": stats.n_prefilled_tokens, "reused": stats.n_reused_tokens,
            "generated": stats.n_generated_tokens, "drafted": stats.n_drafted,
            "accepted": stats.n_accepted}
