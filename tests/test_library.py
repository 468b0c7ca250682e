"""Models on disk and in memory: names, lists, shared loads, memory."""
import json
import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from contract_checker import check_models
from helpers_doors import WAIT_S, all_at_once, golden, put, write_model

from tinychat.errors import (InvalidRequest, ModelFileError, ModelLoadError, ModelNotFound,
                             Overloaded)
from tinychat.gguf_file import open_gguf
from tinychat.library import Library, data_folder, loaded, memory, residents
from tinychat.library.entry import describe
from tinychat.models import build_program
from tinychat.ops.program import PAGE_TOKENS
from tinychat.text.prompt.template import ChatTemplate, source_of

SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
SWITCH_OFF = "{% if thinking is defined and thinking %}<think>{% endif %}{# </think> #}"


@pytest.fixture
def shelves(tmp_path):
    """A library that is closed in the end: call it for one with options."""
    made = []

    def make(**options):
        made.append(Library(home=tmp_path, **options))
        return made[-1]
    yield make
    for library in made:
        library.close()


def with_one_more_token(file):
    file.metadata["tokenizer.ggml.tokens"].append("one more")
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if key in file.metadata:
            file.metadata[key] = np.append(file.metadata[key], file.metadata[key][:1])
    return file


def keys(library):
    return [entry.key for entry in library.list()]


# ---- on disk

def test_a_folder_below_a_publisher_gives_the_key(shelves, tmp_path):
    put(tmp_path / "models" / "Maker" / "Llama-Small-GGUF" / "llama.Q4_0.gguf",
        golden("llama3-a.Q4_0"))
    (entry,) = shelves().list()
    assert (entry.key, entry.publisher, entry.type) == ("llama-small", "Maker", "llm")
    assert (entry.architecture, entry.params_string) == ("llama", "853K")
    assert entry.max_context_length == 2048 and entry.variants == ()
    assert entry.quantization.name == "Q4_0" and 4.5 <= entry.quantization.bits_per_weight < 5
    assert entry.size_bytes == golden("llama3-a.Q4_0").stat().st_size
    assert entry.capabilities == {"vision": False, "trained_for_tool_use": False}


def test_single_files_and_extra_folders_are_listed(shelves, tmp_path):
    put(tmp_path / "models" / "Alone.gguf", golden("qwen2-a"))
    put(tmp_path / "elsewhere" / "pub" / "Other" / "x.gguf", golden("llama3-a.Q4_0"))
    single = put(tmp_path / "Third.Q8_0.gguf", golden("llama3-a.Q8_0"))
    assert keys(shelves(extra=[tmp_path / "elsewhere", single])) == ["alone", "other", "third"]


def test_an_extra_folder_that_is_not_there_is_told(shelves, tmp_path, caplog):
    assert keys(shelves(extra=[tmp_path / "absent"])) == []
    assert "absent: expected a folder or file with models" in caplog.text


def test_quantizations_in_one_folder_are_variants_of_one_model(shelves, tmp_path):
    for quant in ("Q8_0", "Q4_0", "Q2_K"):
        put(tmp_path / "models" / "pub" / "Llama" / f"llama-{quant}.gguf",
            golden(f"llama3-a.{quant}"))
    library = shelves()
    (entry,) = library.list()
    assert entry.key == "llama" and entry.selected_variant == "llama@q4_0"
    assert set(entry.variants) == {"llama@q8_0", "llama@q4_0", "llama@q2_k"}
    found = library.find("llama@q8_0")
    assert found.path.name == "llama-Q8_0.gguf" and found.selected_variant == "llama@q8_0"
    library.load("llama@q8_0")
    assert library.find("llama").selected_variant == "llama@q8_0", "its key means what is in memory"


def test_a_second_model_of_one_name_has_its_publisher_in_the_key(shelves, tmp_path):
    for publisher in ("Adams", "Brown"):
        put(tmp_path / "models" / publisher / "Same" / "same.gguf", golden("qwen2-a"))
    assert keys(shelves()) == ["brown/same", "same"]


def test_a_corrupt_file_is_listed_nowhere_and_logged_once(shelves, tmp_path, caplog):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.gguf").write_bytes(golden("qwen2-a").read_bytes()[:1000])
    put(tmp_path / "models" / "whole.gguf", golden("qwen2-a"))
    library = shelves()
    assert keys(library) == keys(library) == ["whole"]
    assert [record.message for record in caplog.records if "broken.gguf" in record.message] \
        == [record.message for record in caplog.records]
    assert len(caplog.records) == 1
    with pytest.raises(ModelNotFound):
        library.find("broken")


def test_a_file_that_changes_is_read_again(shelves, tmp_path):
    path = write_model(tmp_path / "models" / "m.gguf", general__name="before")
    library = shelves()
    assert library.find("m").display_name == "before"
    write_model(path, general__name="and after")
    assert library.find("m").display_name == "and after"
    path.unlink()
    assert library.list() == []


def test_towers_later_parts_and_hidden_files_are_no_models(shelves, tmp_path):
    folder = tmp_path / "models" / "pub" / "Model"
    for name in ("model.gguf", "mmproj-model.gguf", "model-00002-of-00002.gguf", ".hidden.gguf",
                 "notes.txt"):
        write_model(folder / name)
    write_model(tmp_path / "models" / ".download-abc" / "part.gguf")
    write_model(tmp_path / "models" / "tower.gguf", arch="clip")
    write_model(tmp_path / "models" / "vocabulary.gguf", tensors=False)
    (entry,) = shelves().list()
    assert entry.path == folder / "model.gguf"


@pytest.mark.skipif(os.name != "posix", reason="makes odd files")
def test_odd_files_and_names_spoil_no_list(shelves, tmp_path):
    """Pipes, devices, loops of links, and names that are no text."""
    models = tmp_path / "models"
    (models / "pub" / "dir.gguf").mkdir(parents=True)
    os.mkfifo(models / "pipe.gguf")
    for name, target in (("broken", "/nonexistent"), ("zero", "/dev/zero"), ("loop", models)):
        os.symlink(target, models / f"{name}.gguf")
    os.symlink(models / "pub", models / "pub" / "self")
    data = golden("qwen2-a").read_bytes()
    with open(os.fsencode(models) + b"/not\xff\nutf8.gguf", "wb") as file:
        file.write(data)
    (entry,) = shelves().list()
    assert entry.key == "not\ufffd\ufffdutf8"
    assert check_models({"models": [json.loads(json.dumps(entry.to_json()).encode())]}) == []
    assert shelves().load(entry.key).entry.key == entry.key


def test_the_list_passes_the_contract_loaded_or_not(shelves, tmp_path):
    put(tmp_path / "models" / "pub" / "Qwen" / "qwen.gguf", golden("qwen2-a"))
    write_model(tmp_path / "models" / "pub" / "Thinker" / "t.gguf", template=SWITCH,
                general__size_label="7B")
    write_model(tmp_path / "models" / "pub" / "Embedder" / "e.gguf", llama__pooling_type=1)
    for quant in ("Q8_0", "Q4_0"):
        put(tmp_path / "models" / "pub" / "Llama" / f"llama-{quant}.gguf",
            golden(f"llama3-a.{quant}"))
    library = shelves()

    def body():
        entries = [(entry, library.loaded(entry.key)) for entry in library.list()]
        return json.loads(json.dumps({"models": [entry.to_json([model.to_json()] if model else [])
                                                 for entry, model in entries]}))
    assert check_models(body()) == []
    library.load("qwen")
    models = {model["key"]: model for model in body()["models"]}
    assert check_models(body()) == []
    assert models["qwen"]["loaded_instances"][0]["id"] == "qwen"
    assert models["embedder"]["type"] == "embedding" and "capabilities" not in models["embedder"]


@pytest.mark.parametrize("template, found", [
    ("{{ messages }}", None),
    (SWITCH, {"allowed_options": ["off", "on"], "default": "on"}),
    (SWITCH_OFF, {"allowed_options": ["off", "on"], "default": "off"}),
    ("<think>{# </think> #}", {"allowed_options": ["on"], "default": "on"}),
    ("{{ raise_exception('never') }}</think>", {"allowed_options": ["on"], "default": "on"}),
])
def test_reasoning_is_offered_as_the_template_can_switch_it(tmp_path, template, found):
    entry = describe(write_model(tmp_path / "m.gguf", template=template), "m", "")
    assert entry.capabilities.get("reasoning") == found


def test_the_list_and_the_chat_read_the_same_template(tmp_path):
    path = write_model(tmp_path / "m.gguf", tokenizer__chat_template__default=SWITCH)
    with open_gguf(path) as file:
        template = ChatTemplate(source_of(file.metadata))
    assert describe(path, "m", "").capabilities["reasoning"] == template.reasoning


def test_what_a_file_does_not_say_is_counted(tmp_path):
    entry = describe(write_model(tmp_path / "m.gguf", general__file_type=1024,
                                 general__organization="Org"), "m", "")
    assert (entry.quantization.name, entry.quantization.bits_per_weight) == ("F16", 16.0)
    assert (entry.params_string, entry.publisher, entry.display_name) == ("6.4K", "Org", "m")


@pytest.mark.parametrize("name", ["QWEN", "qwe", "", "qwen@q9", "nothing", "../models/qwen.gguf"])
def test_names_match_exactly_and_paths_are_no_names(shelves, tmp_path, name):
    put(tmp_path / "models" / "qwen.gguf", golden("qwen2-a"))
    with pytest.raises(ModelNotFound) as error:
        shelves().find(name)
    assert error.value.param == "model"


def test_a_path_is_found_listed_and_loaded(shelves, tmp_path):
    path = put(tmp_path / "somewhere" / "My-Model.Q4_0.gguf", golden("llama3-a.Q4_0"))
    library = shelves()
    entry = library.resolve(path)
    assert entry.key == "my-model" and keys(library) == ["my-model"]
    assert library.resolve(str(path)) == entry and library.load("my-model").entry == entry


def test_a_path_that_leads_nowhere_says_so(shelves, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match="bad.gguf"):
        shelves().resolve(tmp_path / "bad.gguf")
    with pytest.raises(ModelNotFound, match="no such file"):
        shelves().resolve(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="without weights"):
        shelves().resolve(write_model(tmp_path / "vocab.gguf", tensors=False))


def test_the_data_folder_is_what_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.delenv("TINYCHAT_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert data_folder() == tmp_path / "xdg" / "tinychat"


# ---- in memory

@pytest.fixture
def qwen(shelves, tmp_path):
    put(tmp_path / "models" / "qwen.gguf", golden("qwen2-a"))
    return shelves(parallel=2)


def test_a_load_takes_the_default_context_or_the_models_own_limit(qwen, shelves):
    small = shelves(default_context_length=64).load("qwen")
    assert small.context_length == 64 and small.to_json()["config"]["context_length"] == 64
    large = shelves(default_context_length=10**6).load("qwen")
    assert large.context_length == large.entry.max_context_length


def test_a_split_files_name_is_no_pattern(tmp_path):
    names = [f"a**[b]-0000{i}-of-00002.gguf" for i in (1, 2)]
    paths = [write_model(tmp_path / name) for name in names]
    assert describe(paths[0], "a", "").size_bytes == sum(path.stat().st_size for path in paths)


def test_a_context_above_the_models_is_refused(qwen):
    for length in (0, 4097):
        with pytest.raises(InvalidRequest) as error:
            qwen.load("qwen", context_length=length)
        assert error.value.param == "context_length"
    assert qwen.loaded("qwen") is None


def test_a_vocabulary_of_another_size_than_the_models_is_refused(qwen, monkeypatch):
    monkeypatch.setattr(loaded, "open_gguf", lambda path: with_one_more_token(open_gguf(path)))
    with pytest.raises(ModelFileError, match="tokens has 513 tokens, but token_embd.weight 512"):
        qwen.load("qwen")


def test_progress_rises_to_one_and_is_silent_when_nothing_is_loaded(qwen):
    parts = []
    qwen.load("qwen", context_length=64, progress=parts.append)
    assert parts == sorted(parts) and parts[-1] == 1.0
    qwen.load("qwen", progress=lambda part: pytest.fail("nothing had to be loaded"))


def test_loads_at_the_same_time_share_one(qwen, monkeypatch):
    opened, others_wait = [], threading.Event()

    def slow(entry, n_ctx, settings, report):
        opened.append(entry.key)
        report(0.5)
        others_wait.wait(WAIT_S)
        return loaded.open_model(entry, n_ctx, settings, report)
    monkeypatch.setattr(residents, "open_model", slow)
    told = [[] for _ in range(4)]

    def load(i):
        def progress(part):
            told[i].append(part)
            if all(told):
                others_wait.set()
        return qwen.load("qwen", context_length=64, progress=progress)
    models = all_at_once(*[lambda i=i: load(i) for i in range(4)])
    assert opened == ["qwen"] and len(set(map(id, models))) == 1
    assert all(parts[-1] == 1.0 for parts in told)


def test_a_failed_load_fails_for_all_and_may_be_tried_again(qwen, monkeypatch):
    ready = threading.Barrier(3, timeout=WAIT_S)

    def fail(entry, n_ctx, settings, report):
        report(0.5)
        ready.wait()
        raise ModelLoadError("no luck")
    monkeypatch.setattr(residents, "open_model", fail)
    first = threading.Event()

    def load(i):
        def progress(part):
            if part == 0.5 and i:
                ready.wait()
            first.set()
        if i:
            first.wait(WAIT_S)
        qwen.load("qwen", progress=progress)
    assert [str(error) for error in all_at_once(*[lambda i=i: load(i) for i in range(3)])] == ["no luck"] * 3
    monkeypatch.undo()
    assert qwen.load("qwen", context_length=64)


def test_an_instance_grows_once_its_requests_are_done(qwen, monkeypatch):
    small = qwen.acquire("qwen", context_length=64)
    grown, planned = [], threading.Event()
    monkeypatch.setattr(residents, "check", lambda *args: planned.set())
    thread = threading.Thread(target=lambda: grown.append(qwen.acquire("qwen", context_length=128)))
    thread.start()
    assert planned.wait(WAIT_S) and qwen.loaded("qwen") is None
    assert small.engine.logits([1, 2]).shape[0] == 2, "it works on while another waits for it"
    assert grown == []
    qwen.release(small)
    thread.join(WAIT_S)
    assert grown[0].context_length == 128 and qwen.loaded("qwen") is grown[0]
    assert qwen.acquire("qwen", context_length=100) is grown[0], "enough is enough"
    for _ in range(2):
        qwen.release(grown[0])


def test_growth_that_memory_forbids_leaves_the_instance_alone(qwen, monkeypatch):
    small = qwen.load("qwen", context_length=64)
    monkeypatch.setattr(loaded, "available_memory", lambda: 0)
    with pytest.raises(ModelLoadError):
        qwen.load("qwen", context_length=4096)
    assert qwen.loaded("qwen") is small and small.engine.logits([1]).shape[0] == 1


def test_unload_ends_running_requests_with_model_unloaded(qwen):
    model = qwen.load("qwen")
    sequence = model.engine.submit([1, 2, 3])
    updates = sequence.updates(timeout=WAIT_S)
    next(updates)
    qwen.unload("qwen")
    *_, last = updates
    assert last.error.code == "model_unloaded" and last.error.param == "model"
    assert qwen.loaded("qwen") is None
    with pytest.raises(ModelNotFound) as error:
        qwen.unload("qwen")
    assert error.value.param == "instance_id"


def test_a_closed_library_loads_nothing(qwen):
    qwen.load("qwen")
    qwen.close()
    with pytest.raises(Overloaded):
        qwen.load("qwen")


def test_a_model_that_cannot_run_names_why(shelves, tmp_path):
    write_model(tmp_path / "models" / "odd.gguf", arch="unheard-of")
    with pytest.raises(ModelFileError, match="unheard-of") as error:
        shelves().load("odd")
    assert (error.value.code, error.value.param) == ("model_load_failed", "model")


def test_the_files_own_sampling_is_the_default(tmp_path):
    path = write_model(tmp_path / "m.gguf", general__sampling__temp=0.25,
                       general__sampling__top_k=7, general__sampling__top_p=17.0)
    with open_gguf(path) as file:
        params = loaded.sampling_defaults(file.metadata)
    assert (params.temperature, params.top_k, params.top_p) == (0.25, 7, 0.95)


# ---- memory

@pytest.fixture
def program():
    with open_gguf(golden("qwen2-a")) as file:
        yield build_program(file)


def test_a_load_that_cannot_fit_is_refused_with_both_figures(qwen, monkeypatch):
    monkeypatch.setattr(loaded, "available_memory", lambda: 1_000_000)
    with pytest.raises(ModelLoadError,
                       match=r"needs .*MB.*, but only 1.0 MB are available") as error:
        qwen.load("qwen")
    assert error.value.param == "model" and qwen.loaded("qwen") is None


def test_the_pool_holds_every_request_or_what_memory_allows(program):
    def plan(**options):
        return memory.plan_memory(program, n_ctx=256, parallel=4, max_tokens=512, **options)
    full = plan()
    assert full.n_pages == 4 * 256 // PAGE_TOKENS
    assert full.weight_bytes == sum(weight.n_bytes for weight in program.weights())
    n_values = sum(int(np.prod(weight.shape)) for weight in program.weights())
    assert plan(dequantized=True).weight_bytes == 4 * n_values
    assert plan(kv_type="f32").page_bytes == 2 * full.page_bytes
    assert plan(available=2 * full.total_bytes).n_pages == full.n_pages
    less = full.total_bytes - full.page_bytes * full.n_pages // 2
    tight = plan(available=int(less / memory.HEADROOM) + 1)
    assert 256 // PAGE_TOKENS <= tight.n_pages < full.n_pages


def test_kernels_that_cannot_be_imported_are_planned_for_as_float32(program, monkeypatch):
    monkeypatch.delenv("TINYCHAT_PURE", raising=False)
    monkeypatch.setitem(sys.modules, "tinychat.ops.native", None)
    n_values = sum(int(np.prod(weight.shape)) for weight in program.weights())
    assert loaded.plan(program, SimpleNamespace(type="llm", sees=False), 64,
                       loaded.LoadSettings()).weight_bytes == 4 * n_values


@pytest.mark.parametrize("files, free", [
    ({"memory.max": "1000\n", "memory.current": "700\n",
      "memory.stat": "anon 5\ninactive_file 200\n"}, 500),
    ({"memory.max": "1000\n", "memory.current": "1700\n"}, 0),
    ({"memory.max": "max\n", "memory.current": "700\n"}, None),
    ({}, None),
])
def test_a_control_groups_limit_is_heeded(tmp_path, files, free):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory._cgroup_v2(tmp_path) == free


def test_available_memory_is_the_least_that_anyone_leaves(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 10 kB\nMemAvailable: 4 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "PROC_CGROUP", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text("1:cpu:/other\n0::/user/service\n")
    (tmp_path / "user" / "service").mkdir(parents=True)
    assert memory.available_memory() == 4096
    for folder, limit in ((tmp_path, 3000), (tmp_path / "user" / "service", 2000),
                          (tmp_path / "user", 1000)):
        (folder / "memory.max").write_text(str(limit))
        (folder / "memory.current").write_text("0")
        assert memory.available_memory() == limit
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "absent")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    assert memory.available_memory() is None
