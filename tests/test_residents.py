"""Models in memory: what requests load, share, grow, evict and outlive; counters of it all."""
import threading
import time

import pytest
from helpers_doors import WAIT_S, golden, joined, put, started, wait_until, write_model

from tinychat.errors import ModelLoadError, ModelNotFound, Overloaded, TinychatError
from tinychat.library import Library, loaded, residents


@pytest.fixture
def library_of(tmp_path):
    """A library with the models qwen, llama and mistral, closed in the end."""
    for name in ("qwen2-a", "llama3-a.Q4_0", "mistral-a"):
        put(tmp_path / "models" / f"{name[:5].rstrip('23')}.gguf", golden(name))
    made = []

    def make(**options):
        made.append(Library(home=tmp_path, **{"default_context_length": 64, **options}))
        return made[-1]
    yield make
    for library in made:
        library.close()


@pytest.fixture
def library(library_of):
    return library_of()


def held(library, key, **fields):
    return library.acquire(library.find(key), **fields)


def touch(library, key, **fields):
    """A request that is over already."""
    library.release(held(library, key, **fields))


def in_memory(library):
    return {model.entry.key for model in library.instances()}


# ---- idle time

def test_an_idle_model_is_gone_after_its_ttl_and_a_busy_one_is_not(library):
    """C-140."""
    busy = held(library, "qwen", ttl=0.05)
    explicit = library.load("mistr")
    other = held(library, "qwen")  # the latest request says how long: the default
    assert busy is other and busy.ttl_s == 3600
    library.release(other)
    touch(library, "qwen", ttl=0.05)
    assert busy.ttl_s == 0.05
    threading.Event().wait(0.2)  # time for it to go wrong
    assert library.loaded("qwen") is busy, "one request still holds it"
    library.release(busy)
    wait_until(lambda: in_memory(library) == {"mistr"})
    assert library.loaded("mistr") is explicit


def test_every_request_starts_the_idle_time_anew(library_of):
    library = library_of(default_ttl_seconds=0.6)
    model, began = held(library, "qwen"), time.monotonic()
    library.release(model)
    while time.monotonic() < began + 1.0:
        touch(library, "qwen")
        assert library.loaded("qwen") is model
        threading.Event().wait(0.02)
    wait_until(lambda: library.loaded("qwen") is None)


def test_a_load_may_give_a_ttl_that_requests_do_not_touch(library):
    model = library.load("qwen", ttl=300)
    touch(library, "qwen", ttl=0.01)
    assert model.ttl_s == 300 and not model.on_demand
    library.load("qwen")
    assert model.ttl_s is None, "the latest load gave none"


def test_no_default_ttl_keeps_a_model_for_ever(library_of):
    library = library_of(default_ttl_seconds=0)
    model = held(library, "qwen")
    assert model.ttl_s is None and model.on_demand
    library.release(model)


# ---- making room

def test_a_load_on_demand_evicts_those_on_demand_and_leaves_explicit_ones(library):
    """C-141."""
    library.load("mistr")
    touch(library, "qwen")
    touch(library, "llama")
    assert in_memory(library) == {"mistr", "llama"}
    library.load("qwen")
    assert in_memory(library) == {"mistr", "llama", "qwen"}, "an explicit load evicts nothing"


def test_eviction_waits_for_running_requests_and_later_ones_get_their_model_back(library):
    busy = held(library, "qwen")
    thread, results = started(held, library, "llama")
    wait_until(lambda: library.loaded("qwen") is None)
    assert library.instance("qwen") is busy and results == []
    again = started(held, library, "qwen")
    assert busy.engine.logits([1, 2]).shape[0] == 2, "its request goes on"
    library.release(busy)
    llama = joined(thread, results)
    assert in_memory(library) == {"llama"} and again[1] == []
    library.release(llama)
    qwen = joined(*again)
    assert qwen is not busy and in_memory(library) == {"qwen"}
    library.release(qwen)


def test_without_auto_evict_nothing_makes_room(library_of):
    library = library_of(auto_evict=False)
    for key in ("qwen", "llama", "mistr"):
        touch(library, key)
    assert in_memory(library) == {"qwen", "llama", "mistr"}


def test_many_threads_that_want_two_models_all_get_theirs(library):
    def work(i):
        for n in range(6):
            model = held(library, ("qwen", "llama")[(i + n) % 2])
            assert model.engine.logits([1]).shape[0] == 1
            library.release(model)
        return "done"
    threads = [started(work, i) for i in range(4)]
    assert [joined(*thread) for thread in threads] == ["done"] * 4
    assert len(in_memory(library)) == 1


# ---- explicit loads

def test_an_explicit_load_adopts_what_a_request_has_loaded(library):
    model = held(library, "qwen")
    library.release(model)
    parts = []
    assert library.load("qwen", progress=parts.append) is model and parts == []
    assert not model.on_demand and model.ttl_s is None


@pytest.mark.parametrize("fields, reloads", [
    ({}, False), ({"context_length": 64}, False), ({"eval_batch_size": 64}, False),
    ({"eval_batch_size": 10**6}, False), ({"context_length": 32}, True),
    ({"context_length": 128}, True), ({"eval_batch_size": 16}, True),
])
def test_a_differing_configuration_reloads_the_instance(library, fields, reloads):
    first = library.load("qwen")
    second = library.load("qwen", **fields)
    assert (second is not first) == reloads and in_memory(library) == {"qwen"}
    assert second.context_length == fields.get("context_length", 64)
    assert second.eval_batch_size == min(fields.get("eval_batch_size", 512), second.context_length)


def test_a_small_batch_size_gives_the_same_logits(library):
    ids = list(range(1, 40))
    whole = library.load("qwen").engine.logits(ids)
    assert (library.load("qwen", eval_batch_size=1).engine.logits(ids) == whole).all()


def test_a_grown_instance_stays_as_explicit_as_it_was(library):
    library.load("qwen", ttl=300)
    grown = held(library, "qwen", context_length=128)
    library.release(grown)
    assert (grown.on_demand, grown.ttl_s, grown.context_length) == (False, 300, 128)


# ---- files that change

def test_a_file_that_was_replaced_is_loaded_anew(library, tmp_path):
    old = held(library, "qwen")
    library.release(old)
    path = tmp_path / "models" / "qwen.gguf"
    path.unlink()
    put(path, golden("qwen3-a.Q2_K"))
    new = held(library, "qwen")
    assert new is not old and new.entry.architecture == "qwen3"
    library.release(new)


def test_a_model_whose_file_is_gone_serves_on_and_is_listed_until_it_is_unloaded(library, tmp_path):
    model = library.load("qwen")
    (tmp_path / "models" / "qwen.gguf").unlink()
    assert "qwen" in [entry.key for entry in library.list()]
    touch(library, "qwen")
    assert library.loaded("qwen") is model and library.unload("qwen") == "qwen"
    assert "qwen" not in [entry.key for entry in library.list()]
    with pytest.raises(ModelNotFound):
        library.find("qwen")


# ---- unload

def test_unload_ends_the_requests_that_an_eviction_waits_for(library_of):
    library = library_of(default_context_length=4096)
    busy = held(library, "qwen")
    sequence = busy.engine.submit([1, 2, 3])
    thread, results = started(held, library, "llama")
    wait_until(lambda: library.loaded("qwen") is None)
    unloading = started(library.unload, "qwen")
    *_, last = sequence.updates(timeout=WAIT_S)
    assert last.error.code == "model_unloaded"
    library.release(busy)
    assert joined(*unloading) == "qwen"
    library.release(joined(thread, results))


def test_a_request_that_submits_to_an_unloaded_model_hears_that(library):
    model = held(library, "qwen")
    unloading = started(library.unload, "qwen")
    wait_until(lambda: library.loaded("qwen") is None)

    def refused():
        try:
            model.engine.submit([1])
        except TinychatError as error:
            return error.code
    wait_until(lambda: refused() == "model_unloaded")
    library.release(model)
    joined(*unloading)


def test_unload_takes_the_names_that_load_takes(library_of, tmp_path):
    for quant in ("Q8_0", "Q4_0"):
        put(tmp_path / "models" / "pub" / "Two" / f"two-{quant}.gguf", golden(f"llama3-a.{quant}"))
    library = library_of()
    library.load("two@q8_0")
    assert library.unload("two@q8_0") == "two"
    library.load("two")
    assert library.unload("two") == "two"
    for name in ("two", "nothing"):
        with pytest.raises(ModelNotFound) as error:
            library.unload(name)
        assert error.value.param == "instance_id"


# ---- the end

def test_closing_ends_waits_for_room(library_of):
    library = library_of(default_context_length=4096)
    busy = held(library, "qwen")
    sequence = busy.engine.submit([1, 2, 3])
    waiting = started(held, library, "llama")
    wait_until(lambda: library.loaded("qwen") is None)
    closing = started(library.close)
    *_, last = sequence.updates(timeout=WAIT_S)
    assert isinstance(last.error, Overloaded)
    library.release(busy)
    assert isinstance(joined(*waiting), Overloaded)
    joined(*closing)
    assert in_memory(library) == set()
    library.close()


def test_a_closed_library_has_no_threads_left(library):
    before = threading.active_count()
    touch(library, "qwen", ttl=300)
    assert threading.active_count() > before
    library.close()
    assert threading.active_count() <= before


def test_a_load_that_fails_keeps_nothing(library, tmp_path):
    write_model(tmp_path / "models" / "odd.gguf", arch="unheard-of")
    for _ in range(2):
        with pytest.raises(TinychatError):
            touch(library, "odd")
    assert in_memory(library) == set() and library.counters()["odd"]["failed_loads"] == 2


def test_what_cannot_fit_evicts_nothing_that_is_explicit(library, monkeypatch):
    library.load("mistr")
    monkeypatch.setattr(loaded, "available_memory", lambda: 1000)
    with pytest.raises(ModelLoadError, match="needs .*weights .*buffers .*tokens of context"):
        touch(library, "qwen")
    assert in_memory(library) == {"mistr"}


def test_a_load_that_would_fail_evicts_nothing(library, monkeypatch, tmp_path):
    touch(library, "qwen")
    write_model(tmp_path / "models" / "odd.gguf", arch="unheard-of")
    with pytest.raises(TinychatError):
        touch(library, "odd")
    monkeypatch.setattr(loaded, "available_memory", lambda: -10**12)
    with pytest.raises(ModelLoadError, match="available"):
        touch(library, "llama")
    assert in_memory(library) == {"qwen"}


def test_a_growth_that_fails_is_no_concern_of_requests_that_fit(library, monkeypatch):
    model = library.load("qwen")
    asked, go_on = threading.Event(), threading.Event()

    def refuse(*args):
        asked.set()
        go_on.wait(WAIT_S)
        raise ModelLoadError("too large", param="model")
    monkeypatch.setattr(residents, "check", refuse)
    growing = started(held, library, "qwen", context_length=128)
    assert asked.wait(WAIT_S)
    touch(library, "qwen")
    go_on.set()
    assert isinstance(joined(*growing), ModelLoadError)
    assert library.loaded("qwen") is model


def test_a_load_too_large_for_one_is_tried_smaller_by_those_who_ask_for_less(library, monkeypatch):
    original, begun, go_on = residents.open_model, threading.Event(), threading.Event()

    def only_small(entry, n_ctx, settings, report):
        if n_ctx > 64:
            begun.set()
            go_on.wait(WAIT_S)
            raise ModelLoadError("too large", param="model")
        return original(entry, n_ctx, settings, report)
    monkeypatch.setattr(residents, "open_model", only_small)
    large = started(held, library, "qwen", context_length=128)
    assert begun.wait(WAIT_S)
    heard = threading.Event()
    small = started(held, library, "qwen", progress=lambda part: heard.set())
    assert heard.wait(WAIT_S)
    go_on.set()
    assert isinstance(joined(*large), ModelLoadError)
    model = joined(*small)
    assert model.context_length == 64
    library.release(model)


def test_a_model_whose_file_is_gone_is_kept_when_it_cannot_grow(library, tmp_path):
    model = library.load("qwen")
    (tmp_path / "models" / "qwen.gguf").unlink()
    with pytest.raises(TinychatError) as error:
        touch(library, "qwen", context_length=128)
    assert library.loaded("qwen") is model
    assert str(tmp_path) not in error.value.message and "qwen.gguf" in error.value.message


def test_without_a_thread_for_the_idle_ones_loads_work_all_the_same(library, monkeypatch):
    start = threading.Thread.start

    def refuse(self):
        if self.name == "idle-models":
            raise RuntimeError("can't start new thread")
        start(self)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    touch(library, "qwen", ttl=0.05)
    monkeypatch.undo()
    touch(library, "qwen", ttl=0.05)
    wait_until(lambda: library.loaded("qwen") is None)


def test_a_wait_for_room_that_is_interrupted_leaves_all_as_it_was(library, monkeypatch):
    model = held(library, "qwen")
    condition = library._memory._changed
    monkeypatch.setattr(condition, "wait_for", interrupted_when(condition.wait_for, lambda: (
        library._memory._leaving)))
    with pytest.raises(KeyboardInterrupt):
        library.load("qwen", context_length=128)
    monkeypatch.undo()
    assert library.loaded("qwen") is model
    library.release(model)
    touch(library, "qwen", context_length=128)


def interrupted_when(wait_for, comes):
    def wait(predicate, timeout=None):
        if comes() and not predicate():
            raise KeyboardInterrupt
        return wait_for(predicate, timeout)
    return wait


def test_three_models_on_demand_take_turns_and_one_stays(library):
    """C-141: whoever comes, there are never two in the end."""
    import sys
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(15):
            threads = [started(touch, library, key) for key in ("qwen", "llama", "mistr")]
            for thread in threads:
                joined(*thread)
            assert len(in_memory(library)) == 1
    finally:
        sys.setswitchinterval(interval)


# ---- counters

def test_counters_outlive_their_instances(library):
    model = library.load("qwen")
    *_, _ = model.engine.submit(list(range(1, 21)), max_tokens=5).updates(WAIT_S)
    wait_until(lambda: library.counters()["qwen"]["generated"] == 5)
    library.unload("qwen")
    touch(library, "qwen")
    counts = library.counters()["qwen"]
    assert (counts["loads"], counts["prefilled"], counts["generated"]) == (2, 20, 5)
    assert counts["load_seconds"] > 0 and counts["failed_loads"] == 0


def test_a_load_that_breaks_off_in_any_way_is_tried_by_the_next_who_waits(library, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def broken(entry, n_ctx, settings, report):
        report(0.5)
        begun.set()
        go_on.wait(WAIT_S)
        raise MemoryError
    monkeypatch.setattr(residents, "open_model", broken)
    loading, heard = started(held, library, "qwen"), threading.Event()
    assert begun.wait(WAIT_S)
    waiting = started(held, library, "qwen", progress=lambda part: heard.set())
    assert heard.wait(WAIT_S)
    go_on.set()
    assert isinstance(joined(*loading), MemoryError)
    assert isinstance(joined(*waiting), MemoryError), "it has tried for itself"
    monkeypatch.undo()
    touch(library, "qwen")
