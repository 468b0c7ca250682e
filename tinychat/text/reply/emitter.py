"""The contract's rules on white space and on joining, for text that is told apart already.

Reasoning is trimmed at both ends; what follows its end is dropped; white space alone beside
reasoning or a call is no item; regions of one kind with nothing between are joined by a line break;
thoughts that come after the message of their round are not shown.
"""
from tinychat.text.reply.calls import Call, CallStarted, InvalidCall

REASONING, MESSAGE = "reasoning", "message"

Text = tuple[str, str]  # (REASONING or MESSAGE, a piece that is not empty)
Event = Text | CallStarted | Call | InvalidCall


class Emitter:
    """Collects the events of one round; `take` gives those that came since the last time."""

    def __init__(self, after_reasoning: bool = False):
        self._events: list[Event] = []
        self._kind = MESSAGE
        self._held = ""                  # white space that waits for text behind it
        self._begun = False              # this region has had text
        self._drops_space = after_reasoning
        self._last = ""                  # kind of the last item, "call" for any call
        self._said = False               # a message has been
        self._at_line_start = True

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    @property
    def at_line_start(self) -> bool:
        """Would the next character of the message begin a line?"""
        return self._at_line_start or self._held[-1:] == "\n"

    @property
    def begun(self) -> bool:
        return self._begun

    def open(self, kind: str, after_reasoning: bool = False) -> None:
        """A region begins; white space that waited in the last one is dropped."""
        self._drops_space = after_reasoning or (self._drops_space and kind == MESSAGE
                                                and not self._begun)
        self._kind, self._held, self._begun = kind, "", False
        self._at_line_start = True

    def text(self, text: str) -> None:
        text = self._held + text
        if not self._begun and (self._kind == REASONING or self._drops_space):
            text = text.lstrip()
        shown = text.rstrip() if self._kind == REASONING or not text.strip() and not self._begun \
            else text
        self._held = text[len(shown):]
        if not shown:
            return
        if not self._begun and self._last == self._kind:
            shown = "\n" + shown
        self._begun, self._drops_space = True, False
        self._at_line_start = shown[-1] == "\n"
        if self._kind == MESSAGE:
            self._said = True
        elif self._said:
            return
        self._last = self._kind
        self._events.append((self._kind, shown))

    def call(self, event: CallStarted | Call | InvalidCall) -> None:
        if not isinstance(event, CallStarted):
            self._last, self._said = "call", False
        self._events.append(event)

    def finish(self, keeps_space: bool = True) -> None:
        """The end: white space is an item only when there is nothing else."""
        held, self._held = self._held, ""
        if held and keeps_space and self._kind == MESSAGE and not self._last \
                and not self._drops_space:
            self._events.append((MESSAGE, held))
