"""Generated text is split into reasoning and message, the same for every chunking."""
import random
import time

import pytest

from tinychat.text.split import Splitter, held_back, reasoning_markers

THINK = ("<think>", "</think>")
BARS = ("<|START_THINKING|>", "<|END_THINKING|>")
OPENED = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"

CASES = [
    ("plain", THINK, "", "Hello\n there ", "", "Hello\n there "),
    ("no markers", None, "", "<think>a</think>b", "", "<think>a</think>b"),
    ("both", THINK, "", "<think>\n why \n</think>\n\nso ", "why", "so "),
    ("space before", THINK, "", " \n<think>a</think>b", "a", "b"),
    ("opened by the prompt", THINK, OPENED, "a\n\nb\n</think>\n\nc", "a\n\nb", "c"),
    ("opened again", THINK, OPENED, "<think>\n<think>a</think>c", "a", "c"),
    ("closed by the prompt", THINK, CLOSED, "\n\nHi\n", "", "Hi\n"),
    ("not opened, space kept", THINK, "", "\n\nHi", "", "\n\nHi"),
    ("space alone", THINK, "", " \n", "", " \n"),
    ("space alone after reasoning", THINK, "", "<think>a</think> \n", "a", ""),
    ("space alone after empty reasoning", THINK, "", "<think>\n</think> \n", "", ""),
    ("empty reasoning", THINK, "", "<think>\n\n</think>\n\nHi", "", "Hi"),
    ("cut in reasoning", THINK, OPENED, "a b \n", "a b", ""),
    ("cut in the close", THINK, OPENED, "a\n</thin", "a\n</thin", ""),
    ("cut in the open", THINK, "", "\n<thi", "", "\n<thi"),
    ("cut in a second open", THINK, CLOSED, "\n<thi", "", "<thi"),
    ("a lone close", THINK, "", "\n</think>\n\nHi", "", "Hi"),
    ("tags in prose", THINK, "", "Say <think> and </think>.", "", "Say <think> and </think>."),
    ("an open in reasoning", THINK, "", "<think>a <think> b</think>c", "a <think> b", "c"),
    ("twice", THINK, "", "<think>a</think>\n<think>b</think>c", "a\nb", "c"),
    ("no bars, no marker", BARS, "", "a < b |> c", "", "a < b |> c"),
    ("bars", BARS, "", "<|START_THINKING|>a<|END_THINKING|>b", "a", "b"),
    ("bars after the message", BARS, "", "a<|START_THINKING|>b<|END_THINKING|>\nc", "", "a\nc"),
    ("a lone close with bars", BARS, "", "a<|END_THINKING|>b", "", "ab"),
    ("only the prompt opens", ("", "</think>"), "", "<think>a</think>b", "", "<think>a</think>b"),
    ("nearly a marker", THINK, "", "<thinking>a</thinking>", "", "<thinking>a</thinking>"),
    ("nearly a close", THINK, OPENED, "a </thin </ </think>b", "a </thin </", "b"),
    ("nothing", THINK, OPENED, "", "", ""),
]


def split(markers, prefill, pieces) -> tuple[str, str]:
    splitter, texts = Splitter(markers, prefill), {"reasoning": "", "message": ""}
    deltas = [delta for piece in pieces for delta in splitter.feed(piece)] + splitter.finish()
    for channel, text in deltas:
        assert text
        texts[channel] += text
    return texts["reasoning"], texts["message"]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_every_chunking_gives_the_same_texts(case):
    _, markers, prefill, text, reasoning, message = case
    assert split(markers, prefill, [text]) == (reasoning, message)
    assert split(markers, prefill, text) == (reasoning, message)
    rng = random.Random(text)
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert split(markers, prefill, pieces) == (reasoning, message), pieces


def test_random_mixtures_of_marker_pieces_do_not_depend_on_chunking():
    rng = random.Random(2)
    for _ in range(2000):
        markers = rng.choice((THINK, BARS))
        parts = (*markers, *markers, markers[1][:3], "a", " ", "\n", "<")
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(9)))
        prefill = rng.choice(("", f"x{markers[0]}\n", f"x{markers[1]}\n\n"))
        whole = split(markers, prefill, [text])
        assert split(markers, prefill, text) == whole, (text, prefill)
        assert whole[0] == whole[0].strip()


def test_text_goes_out_as_soon_as_it_cannot_be_a_marker():
    splitter = Splitter(THINK)
    assert splitter.feed("Say <") == [("message", "Say <")]
    assert splitter.feed("think>") == [("message", "think>")]
    splitter = Splitter(THINK, OPENED)
    assert splitter.feed("a <") == [("reasoning", "a")]
    assert splitter.feed("b") == [("reasoning", " <b")]
    assert splitter.feed("\n</") == []
    assert splitter.feed("think>\n") == []
    assert splitter.feed("c ") == [("message", "c ")]


def test_a_long_thought_takes_linear_time():
    splitter = Splitter(THINK, OPENED)
    start = time.perf_counter()
    for _ in range(200_000):
        splitter.feed("words ")
    assert time.perf_counter() - start < 20  # measured: 0.7 s; quadratic would take hours


@pytest.mark.parametrize(("text", "n_held"), [
    ("a <th", 3), ("<think>", 0), ("a <", 1), ("", 0), ("<<", 1), ("</thin", 6)])
def test_the_longest_beginning_of_a_marker_is_held_back(text, n_held):
    assert held_back(text, list(THINK)) == n_held
    assert held_back(text, []) == 0


def test_the_pair_is_read_from_the_template():
    assert reasoning_markers("... {{ content.split('</think>')[-1] }}") == THINK
    assert reasoning_markers("[THINK]{{ x }}[/THINK]") == ("[THINK]", "[/THINK]")
    assert reasoning_markers("Assistant: <think>\n") == THINK
    assert reasoning_markers("<|im_start|>{{ m.content }}<|im_end|>") is None
