"""Output in a channel frame: header, body, end; the header says what the body is.

    <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>
    all\\nWait.\\n>>>now\\n{}
"""
import re

from tinychat.text.reply.calls import judge, started, unfinished
from tinychat.text.reply.emitter import MESSAGE, REASONING, Emitter, Event
from tinychat.text.reply.grammars.region import own_name
from tinychat.text.reply.literals import held_back
from tinychat.text.reply.values import BAD, parse, typed

_RECIPIENT = re.compile(r"to=([^\s<|]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*([a-z]+)")
_CALL = "call"
_MUSE_CALL = re.compile(r'<(?:\w+:)?invoke name="([^"]*)">(.*)', re.S)
_MUSE_VALUE = re.compile(r'<(\w+:)?parameter name="([^"]*)">(.*?)</(?:\w+:)?parameter>', re.S)


class ChannelParser:
    """As `parser.Parser`, for the frames that are told by their markers.

    frame: "harmony", "muse" or "functionary"; prefill: the end of the prompt, where a header may
    have begun.
    """

    def __init__(self, frame: str, schemas: dict[str, dict], prefill: str = ""):
        self._schemas = schemas
        self._lines = frame == "functionary"
        self._muse = frame == "muse"
        self._header_end = "\n" if self._lines else "<|message|>"
        self._ends = (">>>",) if self._lines else ("<|end|>", "<|eom|>", "<|eot|>", "<|call|>",
                                                   "<|return|>", "<|start|>")
        self._last_ends = ("<|return|>", "<|call|>", "<|eot|>")
        self._emitter = Emitter()
        self._text = "" if self._lines else _begun_header(prefill)
        self._position = -len(self._text)
        self.reasoning_spans: list[tuple[int, int]] = []
        self._span_from = 0
        self._body: list[str] = []
        self._kind = ""                 # of the body: reasoning, message or call; "" in a header
        self._name = ""
        self._over = False

    @property
    def over(self) -> bool:
        return self._over

    def feed(self, text: str) -> list[Event]:
        self._text += text
        self._run(final=False)
        return self._emitter.take()

    def finish(self, cut: bool = False) -> list[Event]:
        self._run(final=True)
        if self._kind == _CALL and not self._over:
            self._end_call("".join(self._body), cut=cut)
        elif self._kind == REASONING:
            self._end_span()
        elif not self._kind and not self._over and self._lost():
            self._emitter.open(MESSAGE)
            self._emitter.text(self._text)
        self._emitter.finish()
        return self._emitter.take()

    def _lost(self) -> bool:
        """Text without any header: a model that forgot the frame."""
        return bool(self._text.strip()) and "<|" not in self._text and not self._lines

    def _run(self, final: bool) -> None:
        while not self._over and (self._in_body(final) if self._kind else self._in_header()):
            pass

    def _drop(self, n: int) -> str:
        text, self._text = self._text[:n], self._text[n:]
        self._position += n
        return text

    def _in_header(self) -> bool:
        at = self._text.find(self._header_end)
        if at < 0:
            return False
        header = self._drop(at)
        self._drop(len(self._header_end))
        self._kind, self._name = self._meaning(header)
        self._span_from = self._position
        self._body = []
        if self._kind == _CALL:
            self._emitter.call(started(self._name, self._schemas))
        else:
            self._emitter.open(self._kind)
        return True

    def _meaning(self, header: str) -> tuple[str, str]:
        """(reasoning, message or call; the tool's name)"""
        if self._lines:
            name = header.strip().removeprefix(">>>").strip()
            return (MESSAGE, "") if name == "all" else (_CALL, own_name(name))
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient and recipient[1] == "self" or not recipient and channel and (
                channel[1] == "analysis"):
            return REASONING, ""
        if recipient and recipient[1] not in ("user", "all"):
            return _CALL, own_name(recipient[1])
        return MESSAGE, ""

    def _in_body(self, final: bool) -> bool:
        hits = [(at, end) for end in self._ends if (at := self._text.find(end)) >= 0]
        if not hits:
            n_held = 0 if final else held_back(self._text, self._ends)
            self._take_body(self._drop(len(self._text) - n_held))
            return False
        at, end = min(hits)
        self._take_body(self._drop(at))
        if self._kind == _CALL:
            self._end_call("".join(self._body), cut=False)
        elif self._kind == REASONING:
            self._end_span()
        self._over = end in self._last_ends
        if end != "<|start|>":
            self._drop(len(end))
        self._kind = ""
        return True

    def _take_body(self, text: str) -> None:
        if self._kind == _CALL:
            self._body.append(text)
        else:
            self._emitter.text(text)

    def _end_span(self) -> None:
        if self._emitter.begun:
            self.reasoning_spans.append((self._span_from, self._position))

    def _end_call(self, body: str, cut: bool) -> None:
        if self._name not in self._schemas:
            return                       # said when its name was complete
        arguments = self._muse_arguments(body) if self._muse else parse(body or "{}")
        arguments = arguments if isinstance(arguments, dict) else None
        if cut:
            self._emitter.call(unfinished(self._name, arguments))
        else:
            self._emitter.call(judge(self._name, arguments, self._schemas))

    def _muse_arguments(self, body: str):
        call = _MUSE_CALL.search(body)
        if not call:
            return parse(body)
        schema = self._schemas[self._name]
        found = {key: typed(text, key, schema)
                 for _, key, text in _MUSE_VALUE.findall(call[2])}
        left = _MUSE_VALUE.sub("", call[2])
        return BAD if "<" in left.split("</")[0] else found


def _begun_header(prefill: str) -> str:
    """The header that the prompt has begun: '<|end|><|start|>assistant' -> 'assistant'."""
    _, found, header = prefill.rpartition("<|start|>")
    return header if found and "<|message|>" not in header else ""
