"""What a chat is, apart from HTTP: events, items, stats, history. A scripted model answers."""
import logging
import threading

import pytest
from contract_checker import check_response, check_stream
from helpers_chat import KEY, WAIT_S, ScriptedEntry, ScriptedLibrary, reasoning_entry, says
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.chat import ChatSettings, fold, run
from tinychat.contract import ImageItem, TextItem, parse_chat_request
from tinychat.errors import KernelError, ModelLoadError, TinychatError
from tinychat.store import Store


class Chat:
    """A library, a store and a request's way through them, each stream checked."""

    def __init__(self, answer, **options):
        self.library = ScriptedLibrary(answer, **options)
        self.store = Store()

    def body(self, input="hi", **fields):
        return {"model": KEY, "input": input, **fields}

    def events(self, input="hi", **fields):
        body = self.body(input, **fields)
        was_loaded = self.library.loaded(KEY) is not None
        events = list(run(self.library, self.store, parse_chat_request(body)))
        assert check_stream(events, request=body, loaded=None if was_loaded else False) == []
        assert self.library.wait_idle()
        return events

    def ask(self, input="hi", **fields):
        body = self.body(input, **fields)
        response = fold(run(self.library, self.store, parse_chat_request(body)))
        assert check_response(response, request=body) == []
        return response

    def prompt(self, input="hi", **fields):
        """The prompt that the model was given."""
        self.ask(input, **fields)
        return self.library.engine.prompts[-1]

    def error(self, input="hi", **fields):
        with pytest.raises(TinychatError) as caught:
            self.ask(input, **fields)
        return caught.value.code, caught.value.param


@pytest.fixture
def chat_of():
    made = []

    def make(answer, **options):
        made.append(Chat(answer, **options))
        return made[-1]
    yield make
    for chat in made:
        chat.store.close()


def names(events):
    return [event["type"] for event in events]


def test_events_come_in_the_contracts_order(chat_of):
    """C-059, C-060."""
    events = chat_of(says("ok")).events()
    assert names(events) == [
        "chat.start", "prompt_processing.start", "prompt_processing.progress", "prompt_processing.end",
        "message.start", "message.delta", "message.delta", "message.end", "chat.end"]


def test_the_plain_answer_is_the_fold_of_the_stream(chat_of):
    """C-061."""
    chat = chat_of(says("Grüße 🌍!"))
    streamed = chat.events()[-1]["result"]
    whole = chat.ask()
    assert whole["output"] == streamed["output"] == [{"type": "message", "content": "Grüße 🌍!"}]
    assert whole["stats"].keys() == streamed["stats"].keys()


def test_a_character_is_never_split(chat_of):
    """C-067: each byte is a token of its own."""
    events = chat_of(says("a🌍ü")).events()
    assert [e["content"] for e in events if e["type"] == "message.delta"] == ["a", "🌍", "ü"]


def test_bytes_that_end_within_a_character_are_one_replacement(chat_of):
    assert chat_of(lambda prompt: list("ü".encode()[:1])).ask()["output"][0]["content"] == "\ufffd"


def test_the_end_of_the_turn_counts_and_does_not_show(chat_of):
    """C-048, C-077."""
    response = chat_of(says("four")).ask()
    assert response["output"] == [{"type": "message", "content": "four"}]
    assert response["stats"]["total_output_tokens"] == 5
    assert response["stats"]["tokens_per_second"] > 0


def test_a_model_that_says_nothing_makes_one_empty_message(chat_of):
    """C-046."""
    assert chat_of(says("")).ask()["output"] == [{"type": "message", "content": ""}]


def test_max_output_tokens_ends_the_run(chat_of):
    """C-050."""
    response = chat_of(says("a long answer")).ask(max_output_tokens=5)
    assert response["stats"]["total_output_tokens"] == 5
    assert response["output"][0]["content"] == "a lon"


def test_a_full_context_ends_the_run_without_error(chat_of):
    """C-106."""
    chat = chat_of(says("x" * 100))
    n = chat.ask(max_output_tokens=1)["stats"]["input_tokens"]
    assert chat.ask(context_length=n + 7)["stats"]["total_output_tokens"] == 7
    assert chat.library.n_loads == 0


def test_sampling_fields_reach_the_engine_and_defaults_stay_the_models(chat_of):
    chat = chat_of(says("x"))
    chat.ask(temperature=0, top_k=7)
    params = chat.library.engine.submitted[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0, 7, 0.95, 0.05)


# ---- prompts and history

def test_items_become_one_user_message(chat_of):
    """C-029, C-030, C-031."""
    chat = chat_of(says("x"))
    two = chat.prompt([{"type": "text", "content": "a"}, {"type": "message", "content": "b"}])
    assert two == chat.prompt("a\nb")
    assert two.count("<|im_start|>user") == 1


def test_input_tokens_grow_with_system_prompt_and_history(chat_of):
    """C-079."""
    chat = chat_of(says("x"))
    plain = chat.ask()
    longer = chat.ask(system_prompt="be brief")
    next_turn = chat.ask(previous_response_id=plain["response_id"])
    n = plain["stats"]["input_tokens"]
    assert longer["stats"]["input_tokens"] > n and next_turn["stats"]["input_tokens"] > n


def test_a_continuation_sees_the_earlier_turns(chat_of):
    """C-086, C-090."""
    chat = chat_of(says("noted"))
    first = chat.events("the word is plum")[-1]["result"]["response_id"]
    prompt = chat.prompt("which word?", previous_response_id=first)
    assert ("<|im_start|>user\nthe word is plum<|im_end|>\n<|im_start|>assistant\nnoted<|im_end|>\n"
            "<|im_start|>user\nwhich word?<|im_end|>\n") in prompt


def test_branches_do_not_see_each_other(chat_of):
    """C-087, C-088."""
    chat = chat_of(says("ok"))
    root = chat.ask("root")["response_id"]
    chat.ask("left", previous_response_id=root)
    unstored = chat.ask("gone", previous_response_id=root, store=False)
    assert "response_id" not in unstored
    right = chat.prompt("right", previous_response_id=root)
    assert "root" in right and "left" not in right and "gone" not in right


def test_a_system_prompt_stays_is_replaced_or_removed(chat_of):
    """C-091, C-092, C-093."""
    chat = chat_of(says("ok"))
    first = chat.ask(system_prompt="RULE ONE")["response_id"]
    assert "RULE ONE" in chat.prompt(previous_response_id=first)
    replaced = chat.ask(previous_response_id=first, system_prompt="RULE TWO")["response_id"]
    prompt = chat.prompt(previous_response_id=replaced)
    assert "RULE TWO" in prompt and "RULE ONE" not in prompt and prompt.count("<|im_start|>system") == 1
    removed = chat.ask(previous_response_id=replaced, system_prompt="")["response_id"]
    assert "system" not in chat.prompt(previous_response_id=removed)


def test_a_chat_with_an_image_is_not_continued_by_a_model_that_cannot_see(chat_of):
    """C-095."""
    chat = chat_of(says("ok"))
    output = ({"type": "message", "content": "a cat"},)
    seen = chat.store.save([], None, KEY, (ImageItem("data:image/png;base64,AAAA"),), output)
    later = chat.store.save(chat.store.chain(seen), None, KEY, (TextItem("and?"),), output)
    for id in (seen, later):
        assert chat.error(previous_response_id=id) == ("invalid_value", "previous_response_id")


def test_another_model_continues_a_chat_with_its_own_template(chat_of):
    """C-094."""
    chat = chat_of(says("ok"), entries=[ScriptedEntry(), reasoning_entry(key="test/other")])
    first = chat.ask("root")["response_id"]
    second = chat.ask("more", model="test/other", previous_response_id=first, reasoning="off")
    assert second["model_instance_id"] == "test/other"
    prompt = chat.library.models["test/other"].engine.prompts[-1]
    assert "root" in prompt and prompt.endswith("</think>\n\n")


def test_store_false_gives_no_id(chat_of):
    """C-085."""
    assert "response_id" not in chat_of(says("x")).ask(store=False)


def test_a_variant_selects_the_model(chat_of):
    """C-021."""
    chat = chat_of(says("x"), entries=[ScriptedEntry(variants=(f"{KEY}@q4", f"{KEY}@q8"))])
    assert chat.ask(model=f"{KEY}@q8")["model_instance_id"] == KEY


def test_control_tokens_in_a_message_are_plain_text(chat_of):
    chat = chat_of(says("x"))
    plain = chat.ask("a b")["stats"]["input_tokens"]
    assert chat.ask("a<|im_end|>b")["stats"]["input_tokens"] == plain - 1 + len("<|im_end|>")


# ---- refusals before the start

@pytest.mark.parametrize("fields, expected", [
    ({"model": "nope"}, ("model_not_found", "model")),                               # C-020
    ({"reasoning": "off"}, ("invalid_value", "reasoning")),                          # C-102
    ({"context_length": 8193}, ("invalid_value", "context_length")),                 # C-042
    ({"previous_response_id": "resp_0"}, ("previous_response_not_found", "previous_response_id")),  # C-089
    ({"integrations": ["mcp/x"]}, ("plugin_not_found", "integrations.0")),           # C-112
    ({"input": "x" * 5000}, ("context_length_exceeded", "input")),                   # C-104
])
def test_a_request_is_refused_before_the_first_event(chat_of, fields, expected):
    chat = chat_of(says("x"))
    with pytest.raises(TinychatError) as caught:
        next(run(chat.library, chat.store, parse_chat_request(chat.body(**fields))))
    assert (caught.value.code, caught.value.param) == expected
    assert chat.library.wait_idle()


def test_an_embedding_model_does_not_chat(chat_of):
    """C-022."""
    chat = chat_of(says("x"), entries=[ScriptedEntry(type="embedding", capabilities={})])
    assert chat.error() == ("invalid_value", "model")


def test_without_jit_an_unloaded_model_is_refused(chat_of):
    """C-139."""
    assert chat_of(says("x"), loaded=False, jit=False).error() == ("model_not_loaded", "model")


IMAGE = {"type": "image", "data_url": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4"
         "z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"}


def test_an_image_needs_a_model_that_sees(chat_of):
    """C-035."""
    content = [{"type": "text", "content": "a"}, IMAGE]
    assert chat_of(says("x")).error(content) == ("invalid_value", "input.1")


# ---- loading

def test_the_first_request_loads_and_says_so(chat_of):
    """C-058, C-081, C-082, C-084."""
    chat = chat_of(says("x"), loaded=False)
    events = chat.events()
    assert names(events)[:5] == ["chat.start", "model_load.start", "model_load.progress", "model_load.progress",
                                 "model_load.end"]
    stats = events[-1]["result"]["stats"]
    assert stats["model_load_time_seconds"] == events[4]["load_time_seconds"] == 0.25
    assert stats["time_to_first_token_seconds"] < 0.25
    assert "model_load.start" not in names(chat.events())


def test_chat_start_does_not_wait_for_the_load(chat_of):
    """C-057."""
    gate = threading.Event()
    chat = chat_of(says("x"), loaded=False, load_gate=gate)
    events = run(chat.library, chat.store, parse_chat_request(chat.body()), ChatSettings(heartbeat_s=0.01))
    assert [next(events)["type"] for _ in range(2)] == ["chat.start", "model_load.start"]
    assert None in [next(events) for _ in range(3)]  # heartbeats while it loads
    gate.set()
    assert fold(events)["output"]


def test_a_failed_load_ends_the_stream(chat_of):
    """C-072, C-073."""
    chat = chat_of(says("x"), loaded=False, load_error=ModelLoadError("no memory", param="model"))
    events = chat.events()
    assert [n for n in names(events) if n != "model_load.progress"] == [
        "chat.start", "model_load.start", "error", "chat.end"]
    assert "response_id" not in events[-1]["result"]


def test_a_prompt_too_long_for_an_unloaded_model_fails_after_the_load(chat_of):
    """C-105."""
    chat = chat_of(says("x"), loaded=False)
    events = chat.events("x" * 5000)
    assert names(events)[-3:] == ["model_load.end", "error", "chat.end"]
    assert events[-2]["error"]["code"] == "context_length_exceeded"
    assert chat.error("x" * 5000) == ("context_length_exceeded", "input")


def test_a_context_length_above_the_instances_makes_it_grow(chat_of):
    """C-107, C-108."""
    chat = chat_of(says("x"))
    chat.events(context_length=100)
    assert chat.library.models[KEY].context_length == 4096
    assert "model_load.end" in names(chat.events("x" * 5000, context_length=8000))
    assert chat.library.models[KEY].context_length == 8000


def test_a_request_given_up_while_its_model_loads_gives_the_model_back(chat_of):
    gate = threading.Event()
    chat = chat_of(says("x"), loaded=False, load_gate=gate)
    events = run(chat.library, chat.store, parse_chat_request(chat.body()))
    next(events), next(events), next(events)
    events.close()
    gate.set()
    loads = [thread for thread in threading.enumerate() if thread.name == "load"]
    for thread in loads:
        thread.join(WAIT_S)
    assert chat.library.models[KEY].n_users == 0


# ---- failures and ends

def test_a_fault_closes_the_text_and_ends_the_stream(chat_of):
    """C-071, C-072, C-097."""
    chat = chat_of(says("hello"), fault_after=3)
    chat.library.engine.fault = KernelError("broken")
    events = chat.events()
    assert names(events)[-3:] == ["message.end", "error", "chat.end"]
    result = events[-1]["result"]
    assert result["output"] == [{"type": "message", "content": "hel"}]
    assert result["stats"]["total_output_tokens"] == 3 and "response_id" not in result
    assert chat.error() == ("internal_error", None)


def test_a_foreign_fault_says_nothing_of_itself(chat_of, caplog):
    chat = chat_of(says("hello"), fault_after=0)
    chat.library.engine.fault = ValueError("secret text")
    with caplog.at_level(logging.CRITICAL, "tinychat.chat"):
        events = chat.events()
    assert "secret" not in str(events)


def test_a_store_that_fails_fails_the_request(chat_of):
    chat = chat_of(says("hello"))
    chat.store._db.execute("PRAGMA query_only = ON")
    assert names(chat.events())[-2:] == ["error", "chat.end"]
    assert chat.ask(store=False)["output"]


def test_closing_the_generator_cancels_the_sequence(chat_of):
    """C-075, C-097."""
    gate = threading.Semaphore(2)
    chat = chat_of(says("a long answer"), gate=gate)
    events = run(chat.library, chat.store, parse_chat_request(chat.body()))
    while next(events)["type"] != "message.delta":
        pass
    events.close()
    assert chat.library.engine.submitted[-1].cancelled.is_set()
    assert chat.library.wait_idle()
    assert chat.store._db.execute("SELECT count(*) FROM responses").fetchone() == (0,)


def test_one_line_is_logged_per_request_and_it_holds_no_text(chat_of, caplog):
    with caplog.at_level(logging.INFO, "tinychat.chat"):
        chat_of(says("the answer")).ask("the question", system_prompt="the rules")
    line, = [r.getMessage() for r in caplog.records if r.name == "tinychat.chat"]
    assert "tokens in" in line and line.endswith("stop")
    assert not any(text in line for text in ("question", "answer", "rules"))


# ---- reasoning

def test_reasoning_comes_before_the_message_and_is_trimmed(chat_of):
    """C-062, C-078."""
    chat = chat_of(says("<think>\n hm, so \n</think>\n\nyes \n"), entries=[reasoning_entry()])
    events = chat.events()
    result = events[-1]["result"]
    assert result["output"] == [{"type": "reasoning", "content": "hm, so"},
                                {"type": "message", "content": "yes \n"}]
    assert 0 < result["stats"]["reasoning_output_tokens"] <= len("\n hm, so \n")


def test_a_run_cut_inside_reasoning_ends_with_it(chat_of):
    """C-047."""
    chat = chat_of(says("<think>a long thought</think>x"), entries=[reasoning_entry()])
    output = chat.ask(max_output_tokens=7)["output"]
    assert output == [{"type": "reasoning", "content": "a long"}]


def test_reasoning_off_tells_the_template_and_shows_none(chat_of):
    """C-100."""
    chat = chat_of(says("<think>hm</think>yes"), entries=[reasoning_entry()])
    response = chat.ask(reasoning="off")
    assert response["output"] == [{"type": "message", "content": "yes"}]
    assert response["stats"]["reasoning_output_tokens"] == 0
    assert chat.library.engine.prompts[-1].endswith("</think>\n\n")
    assert not chat.prompt().endswith("</think>\n\n")  # C-103


def test_an_effort_reaches_the_template(chat_of):
    chat = chat_of(says("x"), entries=[reasoning_entry(("low", "high"), "low")])
    assert chat.prompt(reasoning="high").startswith("effort high")
    assert "effort" not in chat.prompt()


def test_a_value_that_the_model_does_not_allow_is_refused_with_those_it_does(chat_of):
    """C-101, C-102."""
    chat = chat_of(says("x"), entries=[reasoning_entry()])
    with pytest.raises(TinychatError, match="not supported by model.*off, on") as caught:
        chat.ask(reasoning="high")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "reasoning")
    with pytest.raises(TinychatError, match="does not expose reasoning configuration"):
        chat_of(says("x")).ask(reasoning="on")


def test_an_earlier_thought_is_not_part_of_the_answer_in_the_history(chat_of):
    chat = chat_of(says("<think>hm</think>yes"), entries=[reasoning_entry()])
    first = chat.ask()["response_id"]
    assert "<|im_start|>assistant\nyes<|im_end|>" in chat.prompt(previous_response_id=first)


# ---- text -> items

@given(st.lists(st.sampled_from(["<think>", "</think>", "<thi", " ", "\n\n", "ab", "ü", "<|im_start|>"]), max_size=10),
       st.integers(1, 30))
@settings(deadline=None, max_examples=100)
def test_whatever_a_model_says_the_stream_keeps_the_contract(parts, limit):
    """C-044, C-048, C-049, C-054."""
    chat = Chat(says("".join(parts)), entries=[reasoning_entry()])
    for fields in ({}, {"reasoning": "off"}):
        content = [item["content"] for item in chat.events(max_output_tokens=limit, **fields)[-1]["result"]["output"]]
        assert "<|im_start|>" not in "".join(content)
    chat.store.close()


@pytest.mark.parametrize("text, items", [
    (" \n", [("message", " \n")]),
    ("\n<think>a</think>\n\nb", [("reasoning", "a"), ("message", "b")]),
    ("<think>a </think> <think> b</think>", [("reasoning", "a\nb")]),
    ("<think>  </think>", [("message", "")]),
    ("a<|im_start|>b", [("message", "a")]),  # somebody else's turn
])
def test_white_space_and_markers_between_items(chat_of, text, items):
    output = chat_of(says(text), entries=[reasoning_entry()]).ask()["output"]
    assert [(item["type"], item["content"]) for item in output] == items
