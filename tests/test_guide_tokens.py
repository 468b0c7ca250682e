"""Masks over vocabularies: what trying each token gives, and a way to a call for any model."""
import json
import random
import threading

import numpy as np
import pytest

from helpers_guide import possible
from helpers_tokenizer import byte_pair_metadata, sentence_piece_metadata
from tinychat.gguf_file import open_gguf
from tinychat.text.guide import TokenTrie, json_call, named_call, tagged_call
from tinychat.text.guide import tokens as tokens_module
from tinychat.text.tokenizer import Tokenizer
from tinychat.text.vocabulary import CONTROL

TOOLS = [("read_page", {"type": "object", "required": ["url"], "properties": {
    "url": {"type": "string"}, "lines": {"type": "integer"}, "kind": {"enum": ["html", "text"]}}}),
    ("now", {"type": "object", "properties": {}})]
TEXT = ('{"name": "read_page", "arguments": {"lines": 12, "kind": "text", "url": "größer\\n😀"}}'
        "</tool_call>")


def call_state():
    return json_call(TOOLS, close=b"</tool_call>", array=False, many=False)


def golden_tokenizer(name: str, folder) -> Tokenizer:
    with open_gguf(folder / f"{name}.gguf") as file:
        return Tokenizer.from_metadata(file.metadata)


VOCABULARIES = {
    "smollm2": lambda folder: golden_tokenizer("smollm2-a", folder),
    "llama3": lambda folder: golden_tokenizer("llama3-a.Q8_0", folder),
    "mistral": lambda folder: golden_tokenizer("mistral-a", folder),
    "bytes": lambda folder: Tokenizer.from_metadata(byte_pair_metadata(
        special=[("<|im_end|>", CONTROL), ("</tool_call>", CONTROL)], eos_token_id=264)),
    "pieces": lambda folder: Tokenizer.from_metadata(sentence_piece_metadata(eos_token_id=2)),
}


@pytest.fixture(params=VOCABULARIES, scope="module")
def tokenizer(request) -> Tokenizer:
    return VOCABULARIES[request.param](request.path.parent / "golden")


def one_by_one(trie: TokenTrie, tokenizer: Tokenizer, state) -> np.ndarray:
    return np.array([trie.allowed(state, id) for id in range(tokenizer.n_vocab)])


def test_a_mask_is_what_trying_each_token_gives(tokenizer):
    trie, state = TokenTrie(tokenizer), call_state()
    for i, byte in enumerate(TEXT.encode()):
        if i % 5 == 0 or i > 80:
            mask = trie.mask(state)
            assert mask.dtype == bool and mask.shape == (tokenizer.n_vocab,)
            assert (mask == one_by_one(trie, tokenizer, state)).all(), TEXT[:i]
        state = state.step(byte)
    assert state.done
    assert np.flatnonzero(trie.mask(state)).tolist() == sorted(tokenizer.eog_ids)


def test_a_model_that_draws_what_is_allowed_is_never_stuck(tokenizer):
    trie = TokenTrie(tokenizer)
    lengths = np.array([len(tokenizer.token_bytes(id)) for id in range(tokenizer.n_vocab)])
    for seed in range(3):
        rng, state, text = random.Random(seed), call_state(), b""
        for _ in range(400):
            mask = trie.mask(state)
            assert mask is not None, text
            ids = np.flatnonzero(mask)
            id = int(rng.choice(ids))
            if len(text) > 100:  # then shortly: a quote or a bracket where there is one
                ends = [i for i in ids if tokenizer.token_bytes(i) in (b'"', b"}", b"</tool_call>")]
                id = int(ends[0]) if ends else int(ids[np.argmin(lengths[ids])])
            assert trie.allowed(state, id)
            if id in tokenizer.eog_ids:
                break
            state, text = trie.advance(state, id), text + tokenizer.token_bytes(id)
            if state.done:
                call = json.loads(text.removesuffix(b"</tool_call>"))
                assert call["name"] in dict(TOOLS) and isinstance(call["arguments"], dict)
        assert state.done, text


def test_encoded_calls_are_allowed_token_by_token(tokenizer):
    trie, state = TokenTrie(tokenizer, "</tool_call>"), call_state()
    for id in tokenizer.encode(TEXT, special=True):
        assert trie.allowed(state, id), tokenizer.token_bytes(id)
        state = trie.advance(state, id)
    assert state.done
    for id in tokenizer.eog_ids:
        assert trie.advance(state, id) is state and not trie.allowed(call_state(), id)


def test_a_marker_that_is_one_token_closes_the_call():
    tokenizer = VOCABULARIES["bytes"](None)
    marker = tokenizer.tokens.index("</tool_call>")
    trie = TokenTrie(tokenizer, "<tool_call>\n</tool_call>")
    state = call_state().walk(TEXT.removesuffix("</tool_call>").encode())
    assert trie.mask(state)[marker] and trie.advance(state, marker).done
    assert not trie.mask(call_state())[marker]


def test_a_control_token_that_is_no_part_of_the_format_stands_in_no_string():
    tokenizer = VOCABULARIES["bytes"](None)
    marker = tokenizer.tokens.index("</tool_call>")
    inside = call_state().walk(TEXT[:TEXT.rindex('"')].encode())
    assert not TokenTrie(tokenizer).mask(inside)[marker]
    assert TokenTrie(tokenizer, "</tool_call>").mask(inside)[marker]


def test_a_vocabulary_without_the_bytes_that_are_needed_has_no_mask():
    metadata = sentence_piece_metadata(pieces=[("▁h", -1), ("{", -1)])
    kinds = metadata["tokenizer.ggml.token_type"]
    kinds[3:259] = CONTROL  # the bytes are there no more
    trie, state = TokenTrie(Tokenizer.from_metadata(metadata)), call_state()
    assert trie.mask(state) is not None                    # {
    assert trie.mask(state.step(ord("{"))) is None         # "name"
    assert trie.mask(state.step(ord("{"))) is None         # and so the second time


def test_masks_are_kept_for_states_and_only_so_many(monkeypatch):
    monkeypatch.setattr(tokens_module, "MAX_MASKS", 3)
    tokenizer = VOCABULARIES["bytes"](None)
    trie, state = TokenTrie(tokenizer), call_state()
    text = TEXT.partition("größer")[0].encode()
    in_string = state.walk(text)
    kept = trie.mask(in_string)
    assert trie.mask(in_string.walk(b"abc")) is kept and not kept.flags.writeable
    for end in range(10, 20):
        trie.mask(state.walk(text[:end]))
    assert len(trie._masks) == 3
    assert trie.mask(in_string) is not kept and (trie.mask(in_string) == kept).all()


def test_threads_share_a_trie_and_a_state():
    tokenizer = VOCABULARIES["pieces"](None)
    trie, state = TokenTrie(tokenizer), call_state()
    found, fences = [], threading.Barrier(4)

    def work():
        fences.wait()
        at, masks = state, []
        for byte in TEXT.encode():
            masks.append(trie.mask(at).tobytes())
            at = at.step(byte)
        found.append(masks)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(masks == found[0] for masks in found)


@pytest.mark.parametrize("state", [
    named_call(TOOLS, sep=b"[ARGS]", close=b"", bare_keys=None),
    named_call(TOOLS, sep=b"", close=b"<end>", bare_keys=b'<|"|>'),
    tagged_call(TOOLS, sep=b">\n", key_open=b"<parameter=", key_end=b">\n",
                val_close=b"\n</parameter>\n", close=b"</function>"),
], ids=["named", "bare", "tagged"])
def test_masks_of_other_shapes_agree_too(state):
    tokenizer, rng = VOCABULARIES["bytes"](None), random.Random(1)
    trie = TokenTrie(tokenizer)
    for _ in range(60):
        assert (trie.mask(state) == one_by_one(trie, tokenizer, state)).all()
        if not (choices := possible(state)):
            break
        state = state.step(rng.choice(choices))
