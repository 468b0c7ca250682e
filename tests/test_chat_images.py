"""Chats with images, by tiny random models that see, over HTTP and in Python."""
import base64
import io
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers_chat import WAIT_S, Client
from helpers_doors import golden, put
from helpers_golden import FOLDERS
from helpers_mcp import wait_until
from PIL import Image

import tinychat
from tinychat.cli.talk import Talk
from tinychat.engine import Engine, PlacedImage, SamplingParams, Token
from tinychat.errors import InvalidRequest, ModelFileError, ModelLoadError
from tinychat.gguf_file import open_gguf
from tinychat.library import Library, loaded
from tinychat.library.sight import Sight
from tinychat.models import build_program
from tinychat.models.vision import VisionEncoder
from tinychat.ops import open_executor
from tinychat.server import make_server
from tinychat.store import Store
from tinychat.text.prompt.outside import IMAGE_CLOSE, IMAGE_OPEN

MODELS = ("qwen3vl-a", "qwen2.5vl-a", "gemma3-vision-a")
GREEDY = {"temperature": 0, "max_output_tokens": 6}


def of_golden(name: str) -> Path:
    for folder in FOLDERS:
        if (folder / f"{name}.png").is_file():
            return folder
    pytest.skip(f"{name} is neither in tests/golden nor in the developers' shared folder")


def put_seeing(models: Path, name: str) -> None:
    folder = of_golden(name)
    put(models / "pub" / name / f"{name}.gguf", folder / f"{name}.gguf")
    put(models / "pub" / name / "mmproj-F16.gguf", folder / f"{name}.mmproj.gguf")


def picture(seed: int = 0, size=(64, 48), kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(out, kind)
    return out.getvalue()


def image(data: bytes, kind: str = "png") -> dict:
    return {"type": "image",
            "data_url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}


def text(content: str) -> dict:
    return {"type": "text", "content": content}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for name in MODELS:
        put_seeing(home / "models", name)
    put(home / "models" / "blind.gguf", golden("qwen2-a"))
    with Library(home=home, default_context_length=512, parallel=2) as library:
        yield library


@pytest.fixture(scope="module")
def client(library, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store") / "responses.sqlite3")
    server = make_server(library, store, port=0).start()
    yield Client(server)
    server.close()
    store.close()


@pytest.fixture
def encodings(monkeypatch):
    """The images that a tower encodes while the test runs."""
    seen, encode = [], VisionEncoder.encode

    def watched(self, pixels, report=lambda part: None):
        seen.append(pixels)
        return encode(self, pixels, report)
    monkeypatch.setattr(VisionEncoder, "encode", watched)
    return seen


# ---- the contract

@pytest.mark.parametrize("name", MODELS)
def test_the_quickstarts_image_request_is_answered_streaming_or_not(client, name):
    """C-048: text first, then the image, as the public example has it."""
    content = [text("Describe this image in two sentences"), image(picture(1))]
    whole = client.chat(content, model=name, **GREEDY)
    events = client.stream(content, model=name, **GREEDY)
    assert whole["output"][0]["type"] == "message" and whole["stats"]["total_output_tokens"] == 6
    assert events[-1][1]["result"]["output"] == whole["output"]


def test_the_models_list_says_who_sees(client):
    status, headers, data = client.request("GET", "/api/v1/models")
    found = {model["key"]: model["capabilities"]["vision"]
             for model in json.loads(data)["models"]}
    assert found == {**dict.fromkeys(MODELS, True), "blind": False}


def test_an_image_needs_a_model_that_sees_also_in_a_chain(client):
    """C-035, C-095."""
    content = [text("a"), image(picture())]
    assert client.error(content, model="blind") == (400, "invalid_value", "input.1")
    first = client.chat(content, model=MODELS[0], **GREEDY)
    assert client.error("go on", model="blind", previous_response_id=first["response_id"]) == (
        400, "invalid_value", "previous_response_id")


BROKEN = picture(kind="JPEG")[:600]


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/cat.png", "data:image/png,abc", "data:image/png;base64,!!!",
    "data:image/png;base64,", "data:text/plain;base64,aGk=", image(b"no image at all")["data_url"],
    image(BROKEN, "jpeg")["data_url"], image(b"<svg xmlns='...'/>")["data_url"],
])
def test_what_is_no_image_is_refused_at_its_place(client, url):
    """C-036."""
    content = [text("a"), {"type": "image", "data_url": url}]
    assert client.error(content, model=MODELS[0]) == (400, "invalid_value", "input.1.data_url")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_usual_kind_of_image_is_seen(client, kind):
    content = [image(picture(2, kind=kind), kind.lower()), text("what is it?")]
    assert client.chat(content, model=MODELS[0], **GREEDY)["stats"]["total_output_tokens"] == 6


@pytest.mark.parametrize("name, n_tokens", [("qwen3vl-a", None), ("gemma3-vision-a", 16)])
def test_input_tokens_count_what_is_seen(library, client, name, n_tokens):
    without = client.chat([text("what is it?")], model=name, **GREEDY)
    seen = client.chat([text("what is it?"), image(picture(3))], model=name, **GREEDY)
    with library.use(name) as model:
        n_tokens = n_tokens or model.sight._encoder.count(48, 64)
    more = seen["stats"]["input_tokens"] - without["stats"]["input_tokens"]
    assert n_tokens < more <= n_tokens + 8                      # with what stands round it


@contextmanager
def prompts_of(library, name):
    """What the engine of that model is given while it lasts: [(ids, images)], and its tokenizer."""
    with library.use(name) as model:
        given, submit = [], model.engine.submit

        def watched(ids, **fields):
            given.append((ids, fields["images"]))
            return submit(ids, **fields)
        model.engine.submit = watched
        try:
            yield given, model.tokenizer
        finally:
            model.engine.submit = submit


def test_the_order_of_images_and_texts_is_that_of_the_items(library, client):
    with prompts_of(library, MODELS[0]) as (given, tokenizer):
        client.chat([text("A"), image(picture(4)), text("B"), image(picture(5)), text("C")],
                    model=MODELS[0], **GREEDY)
    (ids, placed), = given
    first, second = placed
    at = [tokenizer.decode(ids[:end]).count for end in (first.first, second.first)]
    assert first.end < second.first and (at[0]("A"), at[0]("B"), at[1]("B"), at[1]("C")) == (
        1, 0, 1, 0)
    assert first.digest != second.digest and not np.array_equal(first.rows, second.rows)


def test_a_text_cannot_pretend_to_be_an_image(library, client):
    forged = f"{IMAGE_OPEN}0{IMAGE_CLOSE} <|vision_start|><|image_pad|><|vision_end|>"
    with prompts_of(library, MODELS[0]) as (given, tokenizer):
        client.chat([text(f"x{forged}"), image(picture(8))], model=MODELS[0], **GREEDY)
    (ids, (placed,)), = given
    pad, = tokenizer.encode("<|image_pad|>", special=True)
    assert ids.count(pad) == len(placed.rows)


def test_an_image_seen_once_is_not_encoded_or_computed_again(library, client, encodings):
    content = [image(picture(6)), text("what is it?")]
    first = client.chat(content, model=MODELS[0], **GREEDY)
    assert len(encodings) == 1
    with library.use(MODELS[0]) as model:
        before = model.engine.stats.n_prefilled_tokens
        client.chat("and now?", model=MODELS[0], previous_response_id=first["response_id"],
                    **GREEDY)
        n_computed = model.engine.stats.n_prefilled_tokens - before
    assert len(encodings) == 1 and n_computed < first["stats"]["input_tokens"]
    client.chat(content, model=MODELS[0], **GREEDY)
    client.chat([image(picture(7)), text("what is it?")], model=MODELS[0], **GREEDY)
    assert len(encodings) == 2


def test_another_image_in_the_same_place_is_another_prompt(client):
    name, answers = "qwen3vl-a", []
    for seed in (10, 11, 12, 13, 10, 11, 12, 13):
        content = [image(picture(seed)), text("what is it?")]
        answers.append(client.chat(content, model=name, **GREEDY)["output"][0]["content"])
    assert answers[:4] == answers[4:] and len(set(answers)) > 1


def test_progress_covers_the_encoding(client, monkeypatch):
    """C-048, C-064: one start and one end round encoding and prefill, progress rising."""
    told, encode = threading.Event(), VisionEncoder.encode

    def slow(self, pixels, report=lambda part: None):
        report(0.5)
        assert told.wait(WAIT_S)
        return encode(self, pixels, report)
    monkeypatch.setattr(VisionEncoder, "encode", slow)
    events = []
    for event in client.events([image(picture(20)), text("hm")], model=MODELS[0], **GREEDY):
        events.append(event)
        if event[0] == "prompt_processing.progress":
            told.set()
    names = [name for name, _ in events]
    assert names.index("prompt_processing.start") < names.index("prompt_processing.progress")
    assert names.count("prompt_processing.start") == names.count("prompt_processing.end") == 1
    progress = [data["progress"] for name, data in events if name == "prompt_processing.progress"]
    assert progress == sorted(progress) and 0 < progress[0] <= 0.5


def test_who_goes_away_while_an_image_is_encoded_holds_nothing(library, client, monkeypatch):
    begun, encode = threading.Event(), VisionEncoder.encode

    def endless(self, pixels, report=lambda part: None):
        begun.set()
        while True:
            report(0.1)                                         # raises once nobody waits
    monkeypatch.setattr(VisionEncoder, "encode", endless)
    stream = client.events([image(picture(21)), text("hm")], model=MODELS[0], **GREEDY)
    assert next(stream)[0] == "chat.start" and begun.wait(WAIT_S)
    stream.close()
    monkeypatch.setattr(VisionEncoder, "encode", encode)
    wait_until(lambda: all(model.n_users == 0 for model in library.instances()), "release")
    client.chat([image(picture(21)), text("hm")], model=MODELS[0], **GREEDY)


# ---- the numbers

@pytest.mark.parametrize("kind", ["reference", "native"])
@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_with_an_image_is_answered_as_the_golden_file_has_it(name, chunk, kind):
    folder = of_golden(name)
    with np.load(folder / f"{name}.npz") as data:
        golden = dict(data)
    first, n = int(golden["image_first"]), int(golden["image_count"])
    rows = np.ascontiguousarray(np.concatenate(list(golden["image_embeds"]), 1))
    axes, n_positions = None, n
    if "position_ids" in golden:
        axes = np.ascontiguousarray(golden["position_ids"][:, first:first + n].T - first)
        n_positions = int(golden["position_ids"][:, first + n].max()) - first
    placed = PlacedImage(first, rows, axes, n_positions, b"the golden image", "gemma" in name)
    with open_gguf(folder / f"{name}.gguf") as file:
        program = build_program(file, sees=True)
    executor = open_executor(program, kind=kind, n_pages=32, max_tokens=128, max_outputs=128,
                             max_sequences=4, kv_type="f32")
    engine = Engine(executor, n_ctx=128, parallel=2, chunk=chunk)
    scale = golden["logits"].std()
    try:
        sequence = engine.submit(golden["tokens"].tolist(), images=(placed,), max_tokens=16,
                                 params=SamplingParams(temperature=0))
        got = [update.id for update in sequence.updates(WAIT_S) if isinstance(update, Token)]
    finally:
        engine.close()
        executor.close()
    for i, (token, margin) in enumerate(zip(golden["greedy"], golden["greedy_margin"])):
        if margin <= 0.05 * scale:
            break
        assert got[i] == token, f"greedy token {i}"
    assert i > 3


# ---- files

def test_a_tower_of_an_unknown_kind_leaves_a_model_blind(tmp_path):
    import gguf
    put(tmp_path / "models" / "pub" / "m" / "m.gguf", golden("qwen2-a"))
    writer = gguf.GGUFWriter(tmp_path / "models" / "pub" / "m" / "mmproj-F16.gguf", "clip")
    writer.add_string("clip.projector_type", "from the future")
    writer.add_tensor("x", np.zeros(4, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                  writer.write_tensors_to_file):
        write()
    writer.close()
    with Library(home=tmp_path, default_context_length=64) as library:
        assert library.find("m").capabilities["vision"] is False
        library.load("m")


def test_a_tower_of_another_model_is_refused_at_load_and_gives_all_back(tmp_path):
    put(tmp_path / "models" / "pub" / "m" / "m.gguf", of_golden(MODELS[0]) / "qwen3vl-a.gguf")
    put(tmp_path / "models" / "pub" / "m" / "mmproj-F16.gguf",
        of_golden("gemma3-vision-a") / "gemma3-vision-a.mmproj.gguf")
    with Library(home=tmp_path, default_context_length=64) as library:
        assert library.find("m").capabilities["vision"] is True
        with pytest.raises(ModelFileError, match="values a token"):
            library.load("m")
        assert library.instances() == []


def test_images_beyond_what_is_kept_are_encoded_again(library, monkeypatch, encodings):
    monkeypatch.setattr("tinychat.library.sight.KEPT_BYTES", 1)
    entry = library.find(MODELS[0])
    with library.use(MODELS[0]) as model:
        sight = Sight(entry, model.program, threads=1)
    urls = [image(picture(seed))["data_url"] for seed in (30, 31, 31, 30)]
    seen = sight.see_all(urls)
    sight.close()
    assert [len(one.image.parts) for one in seen] == [len(seen[0].image.parts)] * 4
    assert len(encodings) == 3                                  # 30, 31, and 30 again


# ---- Python

def test_python_takes_paths_bytes_and_data_urls(library, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(picture(40))
    with tinychat.load(MODELS[0], home=library.home, context_length=512) as model:
        answers = [model.chat([one, "what is it?"], **GREEDY)["output"]
                   for one in (path, path.read_bytes(), image(picture(40)))]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("wrong, says", [(Path("no/such/file.png"), "cannot be read"),
                                         (b"no image", "expected a PNG")])
def test_python_refuses_what_is_no_image(library, wrong, says):
    with tinychat.load(MODELS[0], home=library.home, context_length=512) as model:
        with pytest.raises(InvalidRequest, match=says):
            model.chat([wrong, "what is it?"])


def test_an_image_that_leaves_no_room_is_the_same_error_as_a_text_that_does(client):
    name = "gemma3-vision-a"                                    # 16 tokens an image
    text_error = client.error(text_of(60), model=name, context_length=32)
    many = [image(picture(50 + i)) for i in range(4)]
    assert client.error([*many, text("hm")], model=name, context_length=32) == text_error
    events = client.stream([*many, text("hm")], model=name, context_length=32)
    assert [event for event, _ in events][-2:] == ["error", "chat.end"]
    assert events[-2][1]["error"]["code"] == text_error[1]


def test_images_that_leave_no_room_are_not_encoded(client, encodings):
    many = [image(picture(70 + i)) for i in range(4)]
    assert client.error([*many, text("hm")], model="gemma3-vision-a", context_length=32) == (
        400, "context_length_exceeded", "input")
    assert not encodings


def test_a_request_of_too_many_pixels_or_images_decodes_none(client, monkeypatch):
    """C-036."""
    decoded = []
    monkeypatch.setattr("tinychat.images.decode", decoded.append)
    large = image(blank((6000, 6000)))
    assert client.error([large] * 3, model=MODELS[0]) == (400, "invalid_value", "input")
    small = image(blank((1, 1)))
    assert client.error([small] * 1001, model=MODELS[0]) == (400, "invalid_value", "input")
    assert not decoded


def blank(size) -> bytes:
    out = io.BytesIO()
    Image.new("1", size).save(out, "PNG")
    return out.getvalue()


def text_of(n_words: int) -> str:
    return " ".join(["word"] * n_words)


def test_a_broken_tower_is_one_clear_error_at_load(tmp_path):
    put(tmp_path / "models" / "pub" / "m" / "m.gguf", of_golden(MODELS[0]) / "qwen3vl-a.gguf")
    whole = (of_golden(MODELS[0]) / "qwen3vl-a.mmproj.gguf").read_bytes()
    (tmp_path / "models" / "pub" / "m" / "mmproj-F16.gguf").write_bytes(whole[:100_000])
    with Library(home=tmp_path, default_context_length=64) as library:
        with pytest.raises(ModelFileError, match="mmproj-F16.gguf"):
            library.load(library.find("m").key)
        assert library.instances() == []


def test_an_unload_while_an_image_is_encoded_ends_the_chat_with_its_error(library, client,
                                                                          monkeypatch):
    """C-134."""
    begun, leaving, encode = threading.Event(), threading.Event(), VisionEncoder.encode

    def slow(self, pixels, report=lambda part: None):
        begun.set()
        assert leaving.wait(WAIT_S)
        return encode(self, pixels, report)
    unloading = threading.Thread(target=library.unload, args=(MODELS[1],))
    client.chat("hi", model=MODELS[1], **GREEDY)
    monkeypatch.setattr(VisionEncoder, "encode", slow)
    answers = []
    chat = threading.Thread(target=lambda: answers.append(
        client.post({"model": MODELS[1], "input": [image(picture(60)), text("hm")], **GREEDY})))
    chat.start()
    assert begun.wait(WAIT_S)
    unloading.start()
    wait_until(lambda: library.loaded(MODELS[1]) is None, "the unload")
    leaving.set()
    chat.join(3 * WAIT_S)
    unloading.join(WAIT_S)
    assert not chat.is_alive() and not unloading.is_alive()
    (status, body), = answers
    assert (status, body["error"]["code"]) == (500, "model_unloaded")


def test_an_unload_does_not_wait_for_the_images_that_are_still_to_come(library, client,
                                                                       monkeypatch):
    begun, encode, begins = threading.Event(), VisionEncoder.encode, []

    def stopped_at_a_report(self, pixels, report=lambda part: None):
        begins.append(pixels)
        begun.set()
        while True:
            report(0.1)                                         # raises once the model leaves
    client.chat("hi", model=MODELS[1], **GREEDY)
    monkeypatch.setattr(VisionEncoder, "encode", stopped_at_a_report)
    answers, many = [], [image(picture(80 + i)) for i in range(3)]
    chat = threading.Thread(target=lambda: answers.append(
        client.post({"model": MODELS[1], "input": [*many, text("hm")], **GREEDY})))
    chat.start()
    assert begun.wait(WAIT_S)
    library.unload(MODELS[1])
    chat.join(3 * WAIT_S)
    (status, body), = answers
    assert (status, body["error"]["code"], len(begins)) == (500, "model_unloaded", 1)


# ---- the command line

@pytest.fixture
def talking(library):
    store = Store(library.home / "talk.sqlite3")
    yield lambda key: Talk(library, store, key, system=None, temperature=0, max_output_tokens=6)
    store.close()


def test_a_conversation_takes_images_from_files(talking, tmp_path, capsys, encodings):
    path = tmp_path / "picture.png"
    path.write_bytes(picture(90))
    talk = talking(MODELS[0])
    talk.command(f"/image {path}")
    assert talk.answer("what is it?") and talk.answer("and now?") and len(encodings) == 1
    assert "the image goes with the next message" in capsys.readouterr().err


@pytest.mark.parametrize("name, path, says", [
    ("blind", "", "blind cannot see images"), (MODELS[0], "~nobody-of-this-name/x.png", "~nobody"),
    (MODELS[0], "/no/such/file.png", "cannot be read"), (MODELS[0], "\0", "null")])
def test_a_conversation_goes_on_after_an_image_that_it_cannot_take(talking, tmp_path, capsys, name,
                                                                   path, says):
    (tmp_path / "picture.png").write_bytes(picture(91))
    talk = talking(name)
    talk.command(f"/image {path or tmp_path / 'picture.png'}")
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1 and talk.answer("hi")


def test_images_that_made_a_reply_fail_do_not_come_back(talking, tmp_path, capsys):
    path = tmp_path / "picture.png"
    path.write_bytes(picture(92))
    talk = talking("gemma3-vision-a")
    for _ in range(40):                                         # 16 tokens each, of 512
        talk.command(f"/image {path}")
    assert not talk.answer("hm") and "context length" in capsys.readouterr().err
    assert talk.answer("hm")


# ---- memory

def test_what_is_found_to_fit_can_be_loaded_with_its_tower(library, monkeypatch):
    """The tower is in the plan once, with its buffers, before it is in memory itself."""
    entry, settings = library.find(MODELS[0]), loaded.LoadSettings(parallel=1)
    held, encoder = [0], VisionEncoder.__init__

    def counted(self, file, **fields):
        encoder(self, file, **fields)
        held[0] = sum(stage.executor.weight_bytes for stage in self._stages)
    monkeypatch.setattr(VisionEncoder, "__init__", counted)
    for n_bytes in range(2_000_000, 1 << 40, 500_000):
        monkeypatch.setattr(loaded, "available_memory", lambda: n_bytes - held[0])
        try:
            loaded.check(entry, 64, settings, 0)
        except ModelLoadError:
            continue
        break
    model = loaded.open_model(entry, 64, settings)
    model.close()
    assert held[0] > 0 and model.memory.weight_bytes > held[0]
