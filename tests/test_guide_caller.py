"""The guide of a generation: whatever a model prefers, a call that has begun becomes a whole one."""
import json
from pathlib import Path

import numpy as np
import pytest

from tinychat.engine.sampler import Sampler, SamplingParams
from tinychat.gguf_file import open_gguf
from tinychat.ops.sampling import sample
from tinychat.text.guide import TokenTrie
from tinychat.text.guide.caller import CallGuide
from tinychat.text.reply.calls import Call, InvalidCall
from tinychat.text.reply.format import Format, JsonCalls, NamedCalls, PythonCalls, TaggedCalls
from tinychat.text.reply.parse import parser_for
from tinychat.text.tokenizer import Tokenizer

SCHEMAS = {
    "read_page": {"type": "object", "required": ["url"], "additionalProperties": False, "properties": {
        "url": {"type": "string"}, "lines": {"type": "integer"}, "kind": {"enum": ["html", "text"]}}},
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
}
FORMATS = {  # each with the text that begins a call
    "json": (JsonCalls(), "<tool_call>"),
    "json, line breaks": (JsonCalls("<tool_call>\n", "\n</tool_call>"), "Hm.\n<tool_call>"),
    "json array": (JsonCalls("[TOOL_CALLS]", "", array=True), "[TOOL_CALLS]"),
    "json, name as key": (JsonCalls("<|p|>", "<|s|>", name_key="", arguments_key="", array=True), "<|p|>"),
    "json, bare": (JsonCalls("", "", arguments_key="parameters"), '{"name": "read_page"'),
    "named": (NamedCalls("[CALL]", "[ARGS]", ""), "[CALL]"),
    "named, section": (NamedCalls("<|call|>function<|sep|>", "\n```json\n", "\n```<|end_call|>",
                                  "<|calls|>", "<|end_calls|>"), "<|calls|>"),
    "named, bare keys": (NamedCalls("<|tool_call>call:", "", "<tool_call|>", quote='<|"|>'),
                         "<|tool_call>call:"),
    "tagged": (TaggedCalls("<tool_call>\n<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n",
                           "</function>\n</tool_call>"), "<tool_call>"),
    "tagged, section": (TaggedCalls('<invoke name="', '">\n', '<parameter name="', '">',
                                    "</parameter>\n", "</invoke>", "<mm:calls>", "</mm:calls>"),
                        "<mm:calls>"),
    "python": (PythonCalls("<|call_start|>", "<|call_end|>"), "<|call_start|>"),
}


class Random:
    """An executor that samples; its logits are noise, with a liking for what ends things."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.rng, self.n = np.random.default_rng(seed), tokenizer.n_vocab
        self.liked = [id for id in range(self.n) if tokenizer.token_bytes(id)[:1] in b'"}])</']
        self.ends = sorted(tokenizer.eog_ids)

    def logits(self) -> np.ndarray:
        logits = self.rng.normal(size=self.n).astype(np.float32)
        logits[self.liked] += 3
        logits[self.ends] += 4
        return logits

    def sample(self, logits, params, recent_ids, coin) -> int:
        return sample(logits, params, recent_ids, coin)


@pytest.fixture(scope="module")
def tokenizer(request) -> Tokenizer:
    with open_gguf(Path(request.path).parent / "golden" / "smollm2-a.gguf") as file:
        return Tokenizer.from_metadata(file.metadata)


def guide_of(tokenizer: Tokenizer, prefill: str = "", grammar=JsonCalls()) -> CallGuide:
    format = Format(calls=grammar)
    return CallGuide(format, SCHEMAS, prefill, tokenizer, TokenTrie(tokenizer, format.texts()))


def generate(tokenizer, grammar, begun: str, seed: int, temperature: float = 1.0, n_most: int = 600):
    """(events of the parser, text) of a random model that has begun with `begun`."""
    format = Format(calls=grammar)
    guide = guide_of(tokenizer, grammar=grammar)
    executor = Random(tokenizer, seed)
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=0, top_p=1, min_p=0), seed, guide)
    parser, decoder, text = parser_for(format, SCHEMAS, ""), tokenizer.decoder(), ""
    events = []
    ids = tokenizer.encode(begun)
    for id in ids:
        guide.accept(id)
    for _ in range(n_most):
        ids.append(sampler.next(executor, executor.logits(), np.array([], np.int32)))
        if ids[-1] in tokenizer.eog_ids:
            break
    for id in ids:
        if id not in tokenizer.eog_ids:
            piece = decoder.feed(id)
            text += piece
            events += parser.feed(piece)
    ended = ids[-1] in tokenizer.eog_ids
    return [*events, *parser.finish(cut=not ended)], text, ended


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("name", FORMATS)
def test_noise_becomes_a_call_that_the_schema_accepts(tokenizer, name, temperature):
    grammar, begun = FORMATS[name]
    n_ended = 0
    for seed in range(4):
        events, text, ended = generate(tokenizer, grammar, begun, seed, temperature)
        calls = [event for event in events if isinstance(event, (Call, InvalidCall))]
        n_ended += ended
        if not ended:  # an endless string; what came before it is whole
            calls = calls[:-1]
        assert calls or not ended, text
        assert all(isinstance(call, Call) for call in calls), (text, calls)
        json.dumps([call.arguments for call in calls])
    assert n_ended


@pytest.mark.parametrize("prefill, text", [
    ("", "Say <b> {\"name\": 5} and <tool_cal, then"),
    ("<think>\n", "Perhaps <tool_call>{\"nam"),
], ids=["text before a call", "a call in reasoning"])
def test_outside_of_calls_nothing_is_guided(tokenizer, prefill, text):
    guide = guide_of(tokenizer, prefill)
    for id in tokenizer.encode(text):
        guide.accept(id)
        assert not guide.active


def test_after_a_call_the_turn_ends_or_another_call_follows(tokenizer):
    guide = guide_of(tokenizer)
    for id in tokenizer.encode('<tool_call>{"name": "now", "arguments": {}}</tool_call>'):
        assert not guide.active or guide.allows(id)
        guide.accept(id)
    prose, = tokenizer.encode(" The")[:1]
    assert guide.active and guide.decided and not guide.allows(prose)
    assert set(np.flatnonzero(guide.mask())) == set(tokenizer.eog_ids)
    for id in tokenizer.encode('\n<tool_call>{"name": "re'):
        assert guide.allows(id)
        guide.accept(id)
    assert not guide.allows(tokenizer.encode("!")[0])


def test_a_fault_in_the_guide_ends_the_guidance_and_not_the_generation(tokenizer, caplog):
    class Broken:
        active = decided = True

        def allows(self, id):
            raise RuntimeError("scripted fault")

    executor = Random(tokenizer, 0)
    sampler = Sampler(SamplingParams(temperature=0), 0, Broken())
    for _ in range(2):
        logits = executor.logits()
        assert sampler.next(executor, logits, np.array([], np.int32)) == int(np.argmax(logits))
    assert caplog.text.count("a guide failed") == 1


def test_refused_tokens_leave_the_logits_as_they_were(tokenizer):
    class Picky:
        active, decided = True, False

        def __init__(self, only):
            self.only = only

        def allows(self, id):
            return id == self.only

        def mask(self):
            return np.arange(tokenizer.n_vocab) == self.only

        def accept(self, id):
            pass

    executor = Random(tokenizer, 1)
    logits = executor.logits()
    before = logits.copy()
    assert Sampler(SamplingParams(), 3, Picky(77)).next(executor, logits, np.array([], np.int32)) == 77
    assert (logits == before).all()
