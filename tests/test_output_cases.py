"""The worked cases: a template, what a model wrote, and the items that come of it."""
import json
import random
from pathlib import Path

import pytest

import tinychat
from tinychat.text.prompt.template import ChatTemplate
from tinychat.text.reply.calls import Call, CallStarted, InvalidCall
from tinychat.text.reply.format import Format, JsonCalls, PythonCalls
from tinychat.text.reply.parse import items, parser_for, schemas_of

OWN = Path(__file__).with_name("output-cases.jsonl")


def read(path: Path) -> tuple[dict, list[dict]]:
    """(tools by name, cases)"""
    toolset, *cases = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {tool["function"]["name"]: tool for tool in toolset["tools"]}, cases


TOOLS, CASES = read(OWN)


def without_reasons(found: list[dict]) -> list[dict]:
    assert all(item["reason"] for item in found if item["type"] == "invalid_tool_call")
    return [{key: value for key, value in item.items() if key != "reason"} for item in found]


def parsed(case: dict, pieces) -> list[dict]:
    schemas = schemas_of([TOOLS[name] for name in case["tools"]])
    parser = parser_for(ChatTemplate(case["chat_template"]).format, schemas, case["prefill"])
    events = [event for piece in pieces for event in parser.feed(piece)]
    return without_reasons(items([*events, *parser.finish(case["cut"])]))


def in_random_pieces(text: str, seed: int) -> list[str]:
    rng, pieces = random.Random(seed), []
    while text:
        n = rng.randint(1, 9)
        pieces.append(text[:n])
        text = text[n:]
    return pieces


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_case_gives_its_items_in_any_pieces(case):
    whole = tinychat.parse_output(case["raw_output_text"], case["chat_template"],
                                  [TOOLS[name] for name in case["tools"]], case["prefill"],
                                  case["cut"])
    assert without_reasons(whole) == case["expected"]
    text = case["raw_output_text"]
    for pieces in ([text], text, *(in_random_pieces(text, seed) for seed in range(3))):
        assert parsed(case, pieces) == case["expected"]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_case_cut_anywhere_is_the_same_in_any_pieces(case):
    text = case["raw_output_text"]
    for end in range(0, len(text), 3):
        cut = {**case, "cut": True}
        found = parsed(cut, [text[:end]])
        assert parsed(cut, text[:end]) == found
        assert all(item["type"] != "tool_call" or item in case["expected"] for item in found)


def test_the_copy_is_the_shared_file(shared):
    assert OWN.read_bytes() == (shared / "spec" / "output-cases.jsonl").read_bytes()


def test_renamed_tags_are_found_too():
    """No family is known by its name: the probe finds tags that nobody has listed."""
    n = 0
    for case in CASES:
        if "<tool_call>" not in case["chat_template"] or "TOOLCALL" in case["chat_template"]:
            continue
        renamed = json.loads(json.dumps(case).replace("tool_call>", "zz_use>"))
        if "{'name'" not in case["chat_template"] and "<function=" not in case["chat_template"]:
            continue
        n += 1
        assert parsed(renamed, [renamed["raw_output_text"]]) == renamed["expected"], case["id"]
    assert n > 10


MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=now>", "</function>",
           "<parameter=text>", "</parameter>", '{"name": "now", "arguments": {}}', "{", "}", "[", "]",
           '"', "'", "\\", "\n", " ", "x", "é🌍", "[TOOL_CALLS]", "[ARGS]", "<|channel|>", "<|message|>",
           "<|end|>", "analysis", "to=functions.now", ">>>", "all", "now(", ")", "<|im_end|>", "<",
           '{"name": "read_page", "arguments": {"url": "', "<arg_key>", "call:now{", '<|"|>',
           '{"name": "read_page", "arguments": {x}}', "[now(", "now(a=1)]", "<|tool_call_start|>",
           "<|tool_call_end|>", "read_page", "\\\"", ")]"]
SOURCES = sorted({case["chat_template"] for case in CASES})


def assert_started_calls_end(events) -> None:
    """What was started is concluded next, under its own name, and no call comes unannounced."""
    started = None
    for event in events:
        if started:
            assert isinstance(event, (Call, InvalidCall)) and event.tool == started, events
            started = None
        elif isinstance(event, CallStarted):
            started = event.tool
        else:
            assert not isinstance(event, Call), events
    assert not started, events


@pytest.mark.parametrize("seed", range(4))
def test_no_text_breaks_a_parser_and_every_chunking_agrees(seed):
    rng = random.Random(seed)
    for source in SOURCES:
        format = ChatTemplate(source).format
        for _ in range(12):
            text = "".join(rng.choice(MARKERS) for _ in range(rng.randint(1, 14)))
            schemas = schemas_of(TOOLS.values()) if rng.random() < 0.8 else {}
            prefill = rng.choice(["", "<think>\n", "<think>\n\n</think>\n\n", "<|start|>assistant"])
            cut, found = rng.random() < 0.5, []
            for pieces in ([text], text, in_random_pieces(text, seed)):
                parser = parser_for(format, schemas, prefill)
                events = [event for piece in pieces for event in parser.feed(piece)]
                events += parser.finish(cut)
                assert_started_calls_end(events)
                found.append(items(events))
            assert found[0] == found[1] == found[2], (format, text, prefill, cut)
            json.dumps(found[0])


def test_a_long_argument_in_small_pieces_costs_linear_time():
    """Counted in calls of Python's functions, not in seconds."""
    import cProfile
    import pstats

    def n_calls(n_chars: int) -> int:
        text = '<tool_call>\n{"name": "add_note", "arguments": {"text": "%s"}}\n</tool_call>' % (
            "ab } <" * (n_chars // 6))
        profile = cProfile.Profile()
        parser = parser_for(ChatTemplate(CASES[0]["chat_template"]).format,
                            schemas_of(TOOLS.values()), "")
        profile.enable()
        events = [event for i in range(0, len(text), 4) for event in parser.feed(text[i:i + 4])]
        profile.disable()
        (call,) = items(events)
        assert call["type"] == "tool_call" and len(call["arguments"]["text"]) >= n_chars - 6
        return pstats.Stats(profile).total_calls

    assert n_calls(60_000) < 2.2 * n_calls(30_000)


BROKEN = '<tool_call>\n{"name": "NAME", "arguments": {broken}}\n</tool_call>'


@pytest.mark.parametrize("before", ["", "Hm.\n", "Hm, "])
@pytest.mark.parametrize("name", ["read_page", "fly"])
def test_a_closed_region_with_a_name_and_no_arguments_is_one_invalid_call(name, before):
    """However it comes in: told of once, and the text after it is a message."""
    text = before + BROKEN.replace("NAME", name) + " So."
    metadata = ({"type": "invalid_arguments", "tool_name": name} if name in TOOLS else
                {"type": "invalid_name", "tool_name": name})
    expected = [*([{"type": "message", "content": before}] if before else []),
                {"type": "invalid_tool_call", "metadata": metadata},
                {"type": "message", "content": " So."}]
    for pieces in ([text], text, *(in_random_pieces(text, seed) for seed in range(5))):
        parser = parser_for(ChatTemplate(CASES[0]["chat_template"]).format,
                            schemas_of(TOOLS.values()), "")
        events = [event for piece in pieces for event in parser.feed(piece)]
        events += parser.finish(cut=False)
        assert without_reasons(items(events)) == expected
        n_started = sum(isinstance(event, CallStarted) for event in events)
        assert n_started == (name in TOOLS)


@pytest.mark.parametrize("text", ['{"name": "read_page", "parameters": broken}', "[now(], now()]"])
def test_a_bare_value_that_is_no_call_is_the_message_and_starts_nothing(text):
    for grammar in (JsonCalls("", ""), PythonCalls("", "")):
        for pieces in ([text], text):
            parser = parser_for(Format(calls=grammar), schemas_of(TOOLS.values()), "")
            events = [event for piece in pieces for event in parser.feed(piece)]
            events += parser.finish(cut=False)
            assert items(events) == [{"type": "message", "content": text}]
            assert all(isinstance(event, tuple) for event in events)
