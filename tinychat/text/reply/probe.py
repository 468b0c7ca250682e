"""Finds a template's format by rendering chosen chats and comparing: no family has a parser.

The turn of a rendering is what follows the rendering of the same chat without the assistant's
message. Where a template drops calls from the history, its text is searched for known markers.
"""
import json
import re


from tinychat.text.prompt import needles
from tinychat.text.reply.format import (
    DEFAULT_REASONING, FALLBACK, Format, Grammar, JsonCalls, NamedCalls, PythonCalls, TaggedCalls)
from tinychat.text.reply.grammars.tagged import KEY
from tinychat.text.reply.known import (
    CALLS_BY_TEXT, END_OF_TURN, FRAMES, REASONING_PAIRS, WRAPPERS_BY_TEXT)
from tinychat.text.reply.literals import (
    ANY_ID, FREE, MARKER, NUMBER, common_prefix, common_suffix, markers,
    n_common_end)
from tinychat.text.prompt.needles import CONTENT, KEYS, RESULT, THOUGHT, TOOLS, VALUES, Render, assistant
from tinychat.text.reply.values import BAD

THINKING_ON = {"enable_thinking": True, "thinking": True}


def probe(render: Render, source: str, *, arguments_as_text: bool = False) -> Format:
    """render: the template's, which raises TemplateError; source: its text."""
    for frame, signs in FRAMES.items():
        if all(sign in source for sign in signs):
            return Format(frame=frame, reasoning=("", ""), calls=FALLBACK)
    return _Probe(render, source, arguments_as_text).format()


class _Probe:
    def __init__(self, render: Render, source: str, arguments_as_text: bool):
        self.render, self.source = render, source
        self.calls = [needles.call(n) for n in (0, 1)]
        if arguments_as_text:
            self.calls = [needles.call(n, json.dumps(call["function"]["arguments"]))
                          for n, call in enumerate(self.calls)]
        question = needles.rendered(self.render, prompt=True, **THINKING_ON)
        before, _, self.prompt = question.partition(needles.USER)
        self.role_markers = markers(before)[-2:]  # of the user's turn, and perhaps its header
        self.content_turn = self.turn(assistant(CONTENT))
        self.reasoning = DEFAULT_REASONING
        self.wrappers: tuple[str, ...] = ()
        self.end = ""

    def turn(self, message: dict, *more: dict, tools: bool = False) -> str:
        offered = needles.BOTH_TOOLS if tools else None
        before = needles.rendered(self.render, tools=offered, prompt=True, **THINKING_ON)
        whole = needles.rendered(self.render, message, *more, tools=offered, **THINKING_ON)
        return whole[common_prefix(before, whole):]

    def format(self) -> Format:
        self.reasoning = self._reasoning()
        self.wrappers = self._wrappers()
        self.end = self._end_of_turn()
        one = self._call_text(self.calls[0])
        if TOOLS[0] in one and self.end and one.startswith(self.end):  # it closes the content, not the turn
            self.wrappers += (self.end,)
            self.end = self._end_of_turn()
            one = self._call_text(self.calls[0])
        grammar = self._grammar(one) if TOOLS[0] in one else None
        if grammar is None:
            grammar = self._by_text() or FALLBACK
            return Format("", self.reasoning, self.wrappers, tuple(filter(None, [self.end])), "",
                          grammar)
        ends, result_open = self._around_result(one)
        stops = tuple(dict.fromkeys(filter(None, [self.end, *ends])))
        return Format("", self.reasoning, self.wrappers, stops, result_open, grammar)

    # -- reasoning, wrappers, the end of the turn

    def _reasoning(self) -> tuple[str, str]:
        turns = (self.turn(assistant(CONTENT, thought=THOUGHT)),
                 self.turn(assistant("", self.calls[0], thought=THOUGHT), tools=True))
        for turn in turns:
            before, found, after = turn.partition(THOUGHT)
            close = MARKER.match(after.lstrip()) if found else None
            if close:
                self.wrappers = _wrapper_after(after.lstrip()[close.end():])
                return self._opening_before(before, close[0]), close[0]
        return next((pair for pair in REASONING_PAIRS if pair[1] in self.source), None) or next(
            (pair for pair in REASONING_PAIRS if pair[0] in self.source), DEFAULT_REASONING)

    def _opening_before(self, before: str, close: str) -> str:
        """What opens the reasoning that `close` ends; "" when nothing can be told."""
        counterpart = _counterpart(close, closing=False)
        for text in (before, self.prompt):
            at = text.rfind(counterpart) if counterpart else -1
            if at >= 0:
                return counterpart if close in text[at:] else text[at:].rstrip()
        found = markers(before)
        directly = found and before.rstrip().endswith(found[-1])
        return found[-1] if directly and found[-1] not in self.content_turn else ""

    def _wrappers(self) -> tuple[str, ...]:
        before, found, _ = self.content_turn.partition(CONTENT)
        if not found:
            return self.wrappers
        both = [text for marker in markers(before)
                if marker not in (*self.reasoning, *self.role_markers) and marker not in self.prompt
                for text in (marker, _counterpart(marker, closing=True))]
        named = [text for sign, texts in WRAPPERS_BY_TEXT if sign in self.source for text in texts]
        return tuple(dict.fromkeys(filter(None, [*self.wrappers, *both, *named])))

    def _end_of_turn(self) -> str:
        _, _, after = self.content_turn.partition(CONTENT)
        return next((marker for marker in markers(after) if marker not in self.wrappers), "")

    # -- calls

    def _call_text(self, *calls: dict) -> str:
        """The turn with calls, from where it departs from the turn with content to its end."""
        turn = self.turn(assistant("", *calls), tools=True)
        text = turn[common_prefix(turn, self.content_turn):]
        last = max((text.rfind(needle) for needle in (*VALUES, *TOOLS)), default=0)
        for end in filter(None, (self.end, *END_OF_TURN, *self.role_markers)):
            at = text.find(end, last)
            if at >= 0:
                text = text[:at]
        front = [marker for marker in (*self.reasoning, *self.wrappers) if marker]
        text = text.lstrip()
        while start := next((marker for marker in front if text.startswith(marker)), ""):
            text = text[len(start):].lstrip()
        return _general(text.rstrip())

    def _grammar(self, one: str) -> Grammar | None:
        name, key = TOOLS[0], KEYS[0]
        if re.search(rf'[{{:,]\s*"{name}"', one):
            return _json_calls(one)
        two = self._call_text(*self.calls)
        if TOOLS[1] not in two:
            two = ""
        if re.search(rf'"{key}"\s*:', one):
            return _named_calls(one, two, quote="")
        if re.search(rf"{name}\(\s*{key}\s*=", one):
            return _python_calls(one)
        bare = re.search(rf"{name}\{{\s*{key}\s*:(.*?){VALUES[0]}", one, re.S)
        if bare:
            return _named_calls(one, two, quote=bare[1].strip())
        if key in one and VALUES[0] in one and VALUES[1] in one:
            return _tagged_calls(one, two)
        return None

    def _around_result(self, one: str) -> tuple[list[str], str]:
        """(stops that follow a call, the marker that opens a result)"""
        turn = self.turn(assistant("", self.calls[0]), needles.result(), tools=True)
        at = turn.find(one[-20:])
        between, found, _ = turn[at + len(one[-20:]):].partition(RESULT)
        found_markers = markers(between) if found and at >= 0 else []
        if not found_markers:
            return [], ""
        opening = found_markers[-1]
        ends = [] if self.end in found_markers else [
            marker for marker in found_markers[:1] if TOOLS[0] not in marker]
        return ends, opening if _counterpart(opening, closing=True) else ""

    def _by_text(self) -> Grammar | None:
        """For a template that drops calls but names their markers."""
        for signs, grammar in CALLS_BY_TEXT:
            if any(sign in self.source for sign in signs):
                return grammar
        return None


def _wrapper_after(text: str) -> tuple[str, ...]:
    """Between the end of reasoning and the content: '<|begin|>assistant<|content|>', and without
    its last marker, which begins something else before a call."""
    between, found, _ = text.partition(CONTENT)
    between = between.strip()
    if not found or not markers(between):
        return ()
    header = between.removesuffix(markers(between)[-1])
    if MARKER.match(header):
        return between, header
    return tuple(filter(None, (between, _counterpart(between, closing=True))))


_SWAPS = (("<|close|>", "<|open|>"), ("</", "<"), ("[/", "["), ("END", "START"), ("suffix", "prefix"), ("end", "start"))


def _counterpart(marker: str, *, closing: bool) -> str:
    """'</think>' -> '<think>', '[/THINK]' -> '[THINK]', '<x|>' -> '<|x>'; with closing the way back."""
    for end, start in _SWAPS:
        if closing and start in marker and end not in marker:
            if start in ("<", "[") and "|" in marker:
                continue
            return marker.replace(start, end, 1)
        if not closing and end in marker:
            return marker.replace(end, start, 1)
    if not closing and (match := re.fullmatch(r"<([^|<>]+)\|>", marker)):
        return f"<|{match[1]}>"
    if closing and (match := re.fullmatch(r"<\|([^|<>]+)>", marker)):
        return f"<{match[1]}|>"
    return ""


# What stands round the needles of one call, and of two

def _general(literal: str) -> str:
    """The probe's own ids and numbers stand for any."""
    for id in needles.IDS:
        literal = literal.replace(id, ANY_ID)
    return re.sub(r"\d+", NUMBER, literal)


def _json_calls(one: str) -> JsonCalls | None:
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[\[{]", one[:one.index(TOOLS[0])]):
        try:
            value, end = decoder.raw_decode(one, match.start())
        except ValueError:
            continue
        call = value[0] if isinstance(value, list) and value else value
        if not isinstance(call, dict):
            continue
        call = call.get("function") if isinstance(call.get("function"), dict) else call
        name = next((key for key, item in call.items() if item == TOOLS[0]), "")
        arguments = next((key for key, item in call.items() if key != name
                          and KEYS[0] in json.dumps(item)), "")
        return JsonCalls(one[:match.start()].lstrip(), one[end:].rstrip(), name,
                         arguments if name else "", array=isinstance(value, list))
    return None


def _split_section(before: str, between: str, after: str) -> tuple[str, str, str, str]:
    """(section_open, open, close, section_close) of calls, from what stands before the first,
    between two (empty when unknown) and after the last."""
    if not between:
        return "", before, after, ""
    n = common_suffix(before, between)
    opening = before[len(before) - n:]
    closing = between[:len(between) - n]
    if not opening.strip():
        return "", before, after, ""
    section_close = after.strip().removeprefix(closing.strip())
    return before[:len(before) - n], opening, closing, section_close.strip()


def _named_calls(one: str, two: str, quote: str) -> NamedCalls | None:
    def object_in(text: str, start: int) -> tuple[int, int]:
        """Where the arguments stand."""
        at = text.index("{", start)
        if quote or (value := _decoded(text, at)) is BAD:
            end = text.index("}", text.rindex(VALUES[1] if start < text.rindex(VALUES[1])
                                              else VALUES[2])) + 1
            return at, end
        return at, value

    name_end = one.index(TOOLS[0]) + len(TOOLS[0])
    try:
        start, end = object_in(one, name_end)
        between = ""
        if two:
            _, first_end = object_in(two[:two.index(TOOLS[1])],
                                     two.index(TOOLS[0]) + len(TOOLS[0]))
            between = two[first_end:two.index(TOOLS[1])]
    except ValueError:
        return None
    section_open, opening, closing, section_close = _split_section(
        one[:one.index(TOOLS[0])], between, one[end:])
    return NamedCalls(opening.lstrip().removesuffix("functions."), one[name_end:start],
                      closing.strip("\n"), section_open.strip(), section_close.strip(), quote)


def _decoded(text: str, at: int):
    """Where the JSON value at `at` ends; BAD when there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, at)[1]
    except ValueError:
        return BAD


def _python_calls(one: str) -> PythonCalls | None:
    start = one.index(TOOLS[0])
    end = one.index(")", one.index(VALUES[1])) + 1
    before, after = one[:start], one[end:]
    if before.rstrip().endswith("[") and after.lstrip().startswith("]"):
        before, after = before.rstrip()[:-1], after.lstrip()[1:]
    return PythonCalls(before.strip(), after.strip())


def _tagged_calls(one: str, two: str) -> TaggedCalls | None:
    (name, _), (key, second_key), (value, second_value, third_value) = TOOLS, KEYS, VALUES
    try:
        name_at, key_at, value_at = one.index(name), one.index(key), one.index(value)
        second_at = one.index(second_key, value_at)
        last_at = one.index(second_value, second_at)
    except ValueError:
        return None
    a = one[name_at + len(name):key_at]
    b = one[value_at + len(value):second_at]
    ending = _key_opening(a, b)
    sep, val_close = a[:len(a) - len(ending)], b[:len(b) - len(ending)]
    key_end = one[key_at + len(key):value_at]
    tail = one[last_at + len(second_value):]
    after = _after_value(tail, val_close.replace(key, second_key))
    between = ""
    if two and third_value in two:
        gap = two[two.index(second_value) + len(second_value):two.index(TOOLS[1])]
        between = _after_value(gap, val_close.replace(key, second_key))
    section_open, opening, closing, section_close = _split_section(one[:name_at], between, after)
    key_end = re.sub(r'="[^"]*"', f'="{FREE}"', key_end)
    return TaggedCalls(opening.lstrip(), sep, ending, key_end,
                       val_close.replace(key, KEY), closing.strip(), section_open.strip(),
                       section_close.strip())


def _key_opening(a: str, b: str) -> str:
    """The common ending of what stands before two keys, from its first marker on."""
    ending = a[len(a) - n_common_end(a, b):]
    start = re.search(r"<|\]<\]|\[", ending)
    return ending[start.start():] if start else ending.lstrip()


def _after_value(text: str, val_close: str) -> str:
    """What follows a value's end; its white space at the very end of a call may differ."""
    for ending in (val_close, val_close.rstrip()):
        if text.startswith(ending):
            return text[len(ending):]
    return text
