"""Pieces of generated text -> events: reasoning, messages, calls. The same for every chunking.

A piece goes out as soon as it cannot be part of a marker. A region of calls is held until its
grammar has read it; inside reasoning until what follows decides whether it was meant.
"""
from tinychat.text.reply.call_reader import CallReader
from tinychat.text.reply.emitter import MESSAGE, REASONING, Emitter, Event
from tinychat.text.reply.format import Format
from tinychat.text.reply.literals import held_back, is_plain

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
        self._calls: CallReader | None = None      # the region of calls that is being read
        self._doubtful: list[CallReader] = []      # regions inside reasoning that may be thoughts
        self._state = self._reasoning if opened else self._message
        if opened:
            self._emitter.open(REASONING)

    @property
    def over(self) -> bool:
        """Has a text ended the turn? What follows it is ignored."""
        return self._over

    @property
    def call(self) -> CallReader | None:
        """The region of calls that is being written; None outside of one, and inside reasoning,
        where it may be no call."""
        return self._calls if self._calls and not self._calls.in_reasoning else None

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
        if marker in self._openings:
            self._begin_calls(marker)
            return True
        meant = not is_plain(marker) or self._boundary
        if marker in self._format.stops or marker in stops and self._after_call:
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
        if marker in self._openings:
            self._begin_calls(marker)
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

    def _begin_calls(self, marker: str) -> None:
        self._calls = CallReader(self._grammar, self._schemas, self._text, marker, self._position,
                             in_reasoning=self._state == self._reasoning,
                             surely=self._boundary or self._emitter.at_line_start)
        self._text = ""

    def _read_calls(self, final: bool) -> bool:
        calls = self._calls
        status = calls.read(final)
        if not calls.in_reasoning:
            self._tell(calls)
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

    def _tell(self, calls: CallReader) -> None:
        for event in calls.news():
            self._emitter.call(event)

    def _drop_to(self, calls: CallReader, n: int) -> None:
        self._text = calls.text[n:]
        self._position = calls.position + n

    def _end_region(self, calls: CallReader, n: int) -> None:
        """A region in a message is over; without any call in it, its text is the message's."""
        if calls.without_call:
            inside = calls.inside(n)
            if inside:
                self._emitter.text(inside if self._emitter.at_line_start else "\n" + inside)
                self._boundary = False
            return
        self._enter_message(after_call=True)

    def _unfinished(self, calls: CallReader) -> None:
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
        self._tell(calls)
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
                self._begin_calls(marker)
                return True
        if not words or words.startswith(stops or ("\0",)):
            doubtful, self._doubtful = self._doubtful, []
            self._end_span(doubtful[0].position)
            self._enter_message(after_call=True)
            for calls in doubtful:
                self._tell(calls)
            return True
        if not final and held_back(words, (*self._openings, *stops)) == len(words):
            return False
        doubtful, self._doubtful = self._doubtful, []
        for calls in doubtful:
            self._emitter.text(calls.text[:calls.n_read])
        return True


def reasoning_in(prefill: str, opening: str, closing: str) -> tuple[bool, bool, str]:
    """(is it open, was it closed at the end, what of it stands in the prompt)"""
    at = prefill.rfind(opening) if opening else -1
    closed_at = prefill.rfind(closing) if closing else -1
    if opening and at > closed_at:
        return True, False, prefill[at + len(opening):]
    if not opening and closed_at < 0:
        return True, False, ""
    return False, closed_at >= 0 and not prefill[closed_at + len(closing):].strip(), ""
