"""One run of the model over one prompt: ids in, text and calls out, with exact counts."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tinychat.engine.images import PlacedImage
from tinychat.engine.sequence import Sequence, Update
from tinychat.errors import TinychatError
from tinychat.library import LoadedModel
from tinychat.text.reply.emitter import Event
from tinychat.text.reply.format import is_silent
from tinychat.text.reply.parse import parser_for


@dataclass(frozen=True)
class Prompt:
    """ids: the whole of it. prefill: the text at its end that belongs to the assistant's turn.

    schemas: the inputSchema of each offered tool by the name in the prompt. images: what is seen
    in it.
    """

    ids: list[int]
    prefill: str
    schemas: dict[str, dict] = field(default_factory=dict)
    images: tuple[PlacedImage, ...] = ()


class Round:
    """Raises, when it is made: ContextOverflow, Overloaded, InvalidRequest."""

    def __init__(self, model: LoadedModel, prompt: Prompt, *, check: Callable[[], None],
                 wait_s: float, **submit):
        self.model, self.prompt = model, prompt
        self._check, self._wait_s = check, wait_s
        format = model.template.format
        self._parser = parser_for(format, prompt.schemas, prompt.prefill)
        self._spelled = format.texts()
        self._decoder = model.tokenizer.decoder()
        self._n_chars = 0                  # of text given to the parser
        self._ends: list[int] = []         # where each token's text ends
        self.generated: list[int] = []
        self.reason = ""                   # why it ended: stop, length, context
        self.stopped_early = False         # a text ended the turn, not a token
        self.sequence: Sequence = model.engine.submit(
            prompt.ids, stop_ids=model.tokenizer.stop_ids, images=prompt.images, **submit)

    def updates(self) -> Iterator[Update | None]:
        """The engine's updates; None after each wait in which none came."""
        while True:
            try:
                for update in self.sequence.updates(timeout=self._wait_s):
                    self._check()
                    yield update
                return
            except TimeoutError:
                self._check()
                yield None

    def token(self, id: int) -> list[Event]:
        """What may be shown now that this token has come."""
        self.generated.append(id)
        tokenizer = self.model.tokenizer
        if id in tokenizer.stop_ids or is_silent(tokenizer, id, self._spelled):
            self._ends.append(self._n_chars)
            return []
        text = self._decoder.feed(id)
        self._n_chars += len(text)
        self._ends.append(self._n_chars)
        events = self._parser.feed(text) if text else []
        if self._parser.over and not self.stopped_early:
            self.stopped_early = True
            self.model.engine.cancel(self.sequence)
        return events

    def finished(self, reason: str, error: Exception | None) -> list[Event]:
        """The end of the engine's work, and what was held back. Raises: TinychatError."""
        self.reason = "stop" if self.stopped_early and reason == "cancelled" else reason
        if self.reason == "error":
            raise error or TinychatError("the engine stopped")
        if self.reason == "cancelled":
            raise TinychatError("the generation was cancelled")
        cut = self.reason in ("length", "context")
        return [*self._parser.feed(self._decoder.flush()), *self._parser.finish(cut)]

    @property
    def n_reasoning(self) -> int:
        """Tokens with text between the markers of reasoning, or with bytes of such a text."""
        count, start = 0, 0
        for end in self._ends:
            count += any(start < span_end and max(end, start + 1) > span_start
                         for span_start, span_end in self._parser.reasoning_spans)
            start = end
        return count

    @property
    def end_text(self) -> str | None:
        """The text of the token that ended the turn; None when something else did."""
        ended = self.generated and self.generated[-1] in self.model.tokenizer.eog_ids
        return self.model.tokenizer.decode(self.generated[-1:]) if ended else None
