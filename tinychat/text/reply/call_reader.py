"""One region of calls while it is read: what its grammar finds, and what is told of it."""
from tinychat.text.reply.calls import (
    Call, CallStarted, InvalidCall, judge, started, unfinished, unknown_tool)
from tinychat.text.reply.grammars import Grammar, NotACall, Region
from tinychat.text.reply.source import Ended, Source


class CallReader:
    """One region of calls while it is read.

    marker: the text at which it began, "" for a call without one. surely: where it stands, its
    marker is no prose.
    """

    def __init__(self, grammar: Grammar, schemas: dict, text: str, marker: str, position: int, *,
                 in_reasoning: bool, surely: bool):
        self.grammar, self.schemas, self.marker, self.position = grammar, schemas, marker, position
        self.in_reasoning, self.surely = in_reasoning, surely
        self.closing = grammar.closing()
        self.region = Region(schemas)
        self.source = Source(text)
        self._pieces = [text]
        self._reading = grammar.read(self.source, self.region)
        self._broken = False                  # it holds no call: its end is looked for
        self._failed = False                  # its one call was told of as invalid
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
        return self._broken and not (self._failed or self._n_done)

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
            name = self._name()
            self.region.finish()
            self._judge()
            if name := self._announced or name:
                self._end_with(judge(name, None, self.schemas))
            return "over"
        if not self.marker or self.in_reasoning or not (self.surely or self._name()):
            return "text"
        self._broken = True
        if not self.closing:
            self.close_broken()
            return "over" if self._failed else "text"
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
        """Tells of the calls that are done, and announces the name of the next."""
        self._judge()
        name = self._name()
        # what has no marker may still turn out to be the message
        if name and self.marker and self._announced is None and not self._failed:
            self._announced = name
            self._told.append(started(name, self.schemas))

    def _judge(self) -> None:
        for name, arguments in self.region.done[self._n_done:]:
            self._conclude(judge(name, arguments, self.schemas))
        self._n_done = len(self.region.done)

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
        if name := self._announced or self._name():
            self._end_with(judge(name, None, self.schemas))

    def give_up(self, cut: bool) -> bool:
        """The text ended first. Whether anything comes of it."""
        name, arguments = self._announced or self._name(), None
        if self.region.whole and not cut:
            self.region.finish()
            self._note()
            return True
        if self.region.whole:
            name, arguments = self.region.whole[0]
        if name:
            self._end_with(unfinished(name, arguments) if name in self.schemas
                           else unknown_tool(name))
        self._broken = not (self._failed or self._n_done)
        return not self._broken

    def _end_with(self, call: InvalidCall) -> None:
        """A call that the region never completed."""
        self._failed = True
        self._conclude(call)

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
