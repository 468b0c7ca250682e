"""Pieces of generated text -> events: reasoning, messages, calls. The same for every chunking.

A piece goes out as soon as it cannot be part of a marker. A region of calls is held until its
grammar has read it; inside reasoning until what follows decides whether it was meant.
"""
from tinychat.text.reply.calls import Call, CallStarted, InvalidCall, judge, unknown_tool
from tinychat.text.reply.emitter import MESSAGE, REASONING, Emitter, Event
from tinychat.text.reply.format import Format
from tinychat.text.reply.grammars import NotACall, Region
from tinychat.text.reply.literals import held_back, is_plain
from tinychat.text.reply.source import Ended, Source

PYTHON_TAG = "<|python_tag|>"  # may stand before a call that has no marker of its own


class Parser:
    """Splits one generation.

    schemas: the inputSchema of each offered tool by name; none: calls are text. prefill: the part
    of the prompt that belongs to the assistant's turn, where reasoning may have been opened.
    """

    def __init__(self, format: Format, schemas: dict[str, dict], prefill: str = ""):
        self._format, self._schemas = format, schemas
        self._grammar = format.calls if schemas else None
        self._openings = self._grammar.openings() if self._grammar else ()
        self._bare = bool(self._grammar) and not self._openings
        self._wrappers = format.wrappers + ((PYTHON_TAG,) if self._bare else ())
        opened, closed, rest = reasoning_in(prefill, *format.reasoning)
        self._emitter = Emitter(after_reasoning=closed)
        self._text = rest if opened else ""
        self._position = -len(self._text)     # of self._text in what was fed
        self.reasoning_spans: list[tuple[int, int]] = []
        self._reasoning_from = self._position
        self._boundary = True                  # nothing but white space since a region ended
        self._after_call = False
        self._over = False
        self._calls: _Calls | None = None      # the region of calls that is being read
        self._doubtful: list[_Calls] = []      # regions inside reasoning that may be thoughts
        self._state = self._reasoning if opened else self._message
        if opened:
            self._emitter.open(REASONING)

    @property
    def over(self) -> bool:
        """Has a text ended the turn? What follows it is ignored."""
        return self._over

    @property
    def call_begun(self) -> tuple[str, str] | None:
        """(marker, all of its text so far) of the region of calls that is being written; None
        outside of one, and inside reasoning, where it may be no call."""
        calls = self._calls
        return (calls.marker, calls.text) if calls and not calls.in_reasoning else None

    def feed(self, text: str) -> list[Event]:
        """What may go out now that `text` has come."""
        if self._calls:
            self._calls.feed(text)
        else:
            self._text += text
        self._run(final=False)
        return self._emitter.take()

    def finish(self, cut: bool = False) -> list[Event]:
        """The rest. cut: a limit ended the generation, not the model."""
        self._cut = cut
        self._run(final=True)
        if not self._over and self._state == self._reasoning:
            self._end_span(self._position)
        self._emitter.finish()
        return self._emitter.take()

    def _run(self, final: bool) -> None:
        while not self._over:
            if self._calls:
                going_on = self._read_calls(final)
            elif self._doubtful:
                going_on = self._decide(final)
            else:
                going_on = self._state(final)
            if not going_on:
                return

    def _drop(self, n: int) -> None:
        self._text = self._text[n:]
        self._position += n

    # Text outside of calls. Each state says whether another step should follow.

    def _message(self, final: bool) -> bool:
        if self._boundary and self._bare and (begun := self._bare_call(final)) is not None:
            return begun
        opening, closing = self._format.reasoning
        stops = self._format.stops + ((self._format.result_open,)
                                      if self._after_call and self._format.result_open else ())
        marker = self._find((*self._openings, opening, closing, *self._wrappers, *stops), final)
        if not marker:
            return False
        if marker in self._openings and self._begin_calls(marker):
            return True
        meant = not is_plain(marker) or self._boundary
        if marker in stops:
            self._over = True
        elif marker == opening and meant:
            self._drop(len(marker))
            self._enter_reasoning()
        elif marker == closing and meant:
            self._drop(len(marker))
            if self._boundary:
                self._emitter.open(MESSAGE, after_reasoning=True)
        elif marker in self._wrappers:
            self._drop(len(marker))
        else:
            self._say(marker)
        return True

    def _reasoning(self, final: bool) -> bool:
        opening, closing = self._format.reasoning
        if not self._emitter.begun and opening:  # some models open it again
            words = self._text.lstrip()
            if words.startswith(opening):
                self._drop(len(self._text) - len(words) + len(opening))
                return True
            if not final and held_back(words, (opening,)) == len(words):
                return False
        marker = self._find((*self._openings, closing, *self._format.wrappers,
                             *self._format.stops), final)
        if not marker:
            return False
        if marker in self._openings and self._begin_calls(marker):
            return True
        if marker == closing:
            self._end_span(self._position)
            self._drop(len(marker))
            self._enter_message(after_reasoning=True)
        elif marker in self._format.stops:
            self._end_span(self._position)
            self._over = True
        elif marker in self._format.wrappers:
            self._drop(len(marker))
        else:
            self._say(marker)
        return True

    def _find(self, wanted: tuple[str, ...], final: bool) -> str | None:
        """Says what comes before the next marker, and returns it; None: wait for more text."""
        text, wanted = self._text, tuple(filter(None, wanted))
        hits = [(at, -len(marker), marker) for marker in wanted if (at := text.find(marker)) >= 0]
        at, _, marker = min(hits, default=(len(text), 0, None))
        n_held = 0 if final else held_back(text, wanted)
        if len(text) - n_held < at + (not marker) or n_held and len(text) - n_held == at:
            at, marker = len(text) - n_held, None  # a longer marker may be on its way
        self._say(text[:at])
        return marker

    def _say(self, text: str) -> None:
        if text.strip() and self._state == self._message:
            self._boundary = self._after_call = False
        self._emitter.text(text)
        self._drop(len(text))

    def _enter_reasoning(self) -> None:
        self._state, self._boundary = self._reasoning, True
        self._reasoning_from = self._position
        self._emitter.open(REASONING)

    def _enter_message(self, after_reasoning: bool = False, after_call: bool = False) -> None:
        self._state, self._boundary, self._after_call = self._message, True, after_call
        self._emitter.open(MESSAGE, after_reasoning)

    def _end_span(self, position: int) -> None:
        if self._emitter.begun:
            self.reasoning_spans.append((self._reasoning_from, position))

    # Calls

    def _bare_call(self, final: bool) -> bool | None:
        """Does the output begin with a call that has no marker? None: it does not."""
        words = self._text.lstrip()
        if not words:
            return None if final else False
        if words[0] not in "{[":
            return None
        self._begin_calls("")
        return True

    def _begin_calls(self, marker: str) -> bool:
        self._calls = _Calls(self._grammar, self._schemas, self._text, marker, self._position,
                             in_reasoning=self._state == self._reasoning,
                             surely=self._boundary or self._emitter.at_line_start)
        self._text = ""
        return True

    def _read_calls(self, final: bool) -> bool:
        calls = self._calls
        status = calls.read(final)
        if not calls.in_reasoning:
            for event in calls.news():
                self._emitter.call(event)
        if status == "more":
            return False
        self._calls = None
        self._position = calls.position
        if status == "ended":
            self._unfinished(calls)
            return True
        if status == "text":                  # no call after all: its marker is text
            self._text = calls.text
            if calls.marker:
                self._say(calls.marker)
            else:
                self._boundary = False
            return True
        if calls.in_reasoning:
            self._doubtful.append(calls)
        else:
            self._end_region(calls, calls.n_read)
        self._drop_to(calls, calls.n_read)
        return True

    def _drop_to(self, calls: "_Calls", n: int) -> None:
        self._text = calls.text[n:]
        self._position = calls.position + n

    def _end_region(self, calls: "_Calls", n: int) -> None:
        """A region in a message is over; without any call in it, its text is the message's."""
        if calls.without_call:
            inside = calls.inside(n)
            if inside:
                self._emitter.text(inside if self._emitter.at_line_start else "\n" + inside)
                self._boundary = False
            return
        self._enter_message(after_call=True)

    def _unfinished(self, calls: "_Calls") -> None:
        """The generation ended inside a region."""
        at = calls.find_closing(anywhere=not self._cut)
        if at is not None:                     # the value never closed, but its region did
            calls.close_broken()
            end = at + len(calls.closing)
        else:
            end = len(calls.text)
            if not calls.give_up(self._cut):   # nothing can be made of it
                self._drop_to(calls, end)
                if not self._cut:
                    self._end_region(calls, end)
                return
        if calls.in_reasoning:
            self._end_span(calls.position)
            self._enter_message()
        for event in calls.news():
            self._emitter.call(event)
        self._end_region(calls, end)
        self._drop_to(calls, end)

    def _decide(self, final: bool) -> bool:
        """After regions inside reasoning: another one, or the end, means that they are calls."""
        words = self._text.lstrip()
        stops = self._format.stops
        if not words and not final:
            return False
        for marker in self._openings:
            if words.startswith(marker):
                self._drop(len(self._text) - len(words))
                return self._begin_calls(marker)
        if not words or words.startswith(stops or ("\0",)):
            doubtful, self._doubtful = self._doubtful, []
            self._end_span(doubtful[0].position)
            self._enter_message(after_call=True)
            for calls in doubtful:
                for event in calls.news():
                    self._emitter.call(event)
            return True
        if not final and held_back(words, (*self._openings, *stops)) == len(words):
            return False
        doubtful, self._doubtful = self._doubtful, []
        position, rest = self._position, self._text
        for calls in doubtful:
            self._emitter.text(calls.text[:calls.n_read])
        self._text, self._position = rest, position
        return True


class _Calls:
    """One region of calls while it is read.

    marker: the text at which it began, "" for a call without one. surely: where it stands, its
    marker is no prose.
    """

    def __init__(self, grammar, schemas: dict, text: str, marker: str, position: int, *,
                 in_reasoning: bool, surely: bool):
        self.grammar, self.schemas, self.marker, self.position = grammar, schemas, marker, position
        self.in_reasoning, self.surely = in_reasoning, surely
        self.closing = grammar.closing()
        self.region = Region(schemas)
        self.source = Source(text)
        self._pieces = [text]
        self._reading = grammar.read(self.source, self.region)
        self._broken = False                  # it holds no call: its end is looked for
        self._judged: list[Call | InvalidCall] = []
        self._n_done = 0                      # calls of region.done that were judged
        self._announced: str | None = None    # name of the call that `news` has told of
        self._told: list = []

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    @property
    def n_read(self) -> int:
        return self.source.n_read

    @property
    def without_call(self) -> bool:
        return self._broken and not self._n_done and self._announced is None

    def feed(self, text: str) -> None:
        self._pieces.append(text)
        self.source.feed(text)

    def read(self, final: bool) -> str:
        """"more", "over", "text" (it is no call), or "ended" before its end."""
        if final:
            self.source.end()
        status = self._step()
        self._note()
        return status

    def _step(self) -> str:
        try:
            next(self._reading)
            return "more"
        except StopIteration:
            return "over"
        except Ended:
            return "ended"
        except NotACall:
            return self._not_a_call()

    def _not_a_call(self) -> str:
        if self.region.whole or self.region.done:
            self.region.finish()
            return "over"
        if not self.marker or self.in_reasoning or not self.surely:
            return "text"
        self._broken = True
        if not self.closing:
            return "over" if self._name() else "text"
        self._reading = self._skip_to_closing()
        return self._step()

    def _skip_to_closing(self):
        yield from self.source.until(self.closing)
        self.source.skip(len(self.closing))
        self.close_broken()

    def _name(self) -> str | None:
        return self.region.name or self.grammar.name_in(self.source.begun)

    # What came of it

    def _note(self) -> None:
        """Judges the calls that are done, and announces the name of the next."""
        for name, arguments in self.region.done[self._n_done:]:
            self._conclude(judge(name, arguments, self.schemas))
        self._n_done = len(self.region.done)
        name = self._name()
        if name and self._announced is None:
            self._announced = name
            self._told.append(CallStarted(name) if name in self.schemas else unknown_tool(name))

    def _conclude(self, call: Call | InvalidCall) -> None:
        if self._announced is not None:
            known, self._announced = self._announced in self.schemas, None
            if not known:                     # told of as soon as its name was there
                return
        elif call.tool in self.schemas:
            self._told.append(CallStarted(call.tool))
        self._told.append(call)

    def close_broken(self) -> None:
        """The region has closed, and there is no call in it but perhaps the name of one."""
        self._broken = True
        name = self._announced or self._name()
        if name:
            self._n_done += 1
            self._conclude(judge(name, None, self.schemas))

    def give_up(self, cut: bool) -> bool:
        """The text ended first. Whether anything comes of it."""
        name = self._announced or self._name()
        if self.region.whole and not cut:
            self.region.finish()
        elif self.region.whole:
            (name, arguments), *_ = self.region.whole
            self._give_up_on(name, arguments)
        elif name:
            self._give_up_on(name, None)
        self._note()
        self._broken = not self._n_done
        return not self._broken

    def _give_up_on(self, name: str, arguments) -> None:
        self.region.whole, self.region.name = [], None
        self.source.begun = ""
        self._n_done += 1
        self.region.done.append((name, arguments))
        if name not in self.schemas:
            self._conclude(unknown_tool(name))
            return
        self._conclude(InvalidCall("invalid_arguments", name, f"The call of {name} was not "
                                   "finished.", arguments))

    def find_closing(self, anywhere: bool) -> int | None:
        """Where the closing marker of a value stands that never closed, outside of strings."""
        if not self.closing or self.region.whole or self.region.done or not self.marker:
            return None
        start = len(self.marker)
        at, quoted = start, False
        text = self.text
        while at < len(text):
            if not quoted and text.startswith(self.closing, at):
                return at
            if text[at] == "\\" and quoted:
                at += 1
            elif text[at] == '"':
                quoted = not quoted
            at += 1
        found = text.find(self.closing, start) if anywhere else -1
        return found if found >= 0 else None

    def inside(self, n: int) -> str:
        """The text of the region without its markers."""
        text = self.text[:n].removeprefix(self.marker)
        return (text.removesuffix(self.closing) if self.closing else text).strip()

    def news(self) -> list:
        told, self._told = self._told, []
        return told


def reasoning_in(prefill: str, opening: str, closing: str) -> tuple[bool, bool, str]:
    """(is it open, was it closed at the end, what of it stands in the prompt)"""
    at = prefill.rfind(opening) if opening else -1
    closed_at = prefill.rfind(closing) if closing else -1
    if opening and at > closed_at:
        return True, False, prefill[at + len(opening):]
    if not opening and closed_at < 0:
        return True, False, ""
    return False, closed_at >= 0 and not prefill[closed_at + len(closing):].strip(), ""
