"""Watches a generation, and once a tool call has begun lets no token through that would spoil it.

Before a call nothing is asked of anybody: a grammar that is always on makes models call tools when
they should answer. Reasoning is never constrained. After a call with a closing marker the turn ends,
or another call follows.
"""
import logging
import re

import numpy as np

from tinychat.text.guide.automaton import State
from tinychat.text.guide.calls import json_call, named_call, python_call
from tinychat.text.guide.tagged import tagged_call
from tinychat.text.guide.tokens import TokenTrie
from tinychat.text.reply.format import (
    Format, JsonCalls, NamedCalls, PythonCalls, TaggedCalls, is_silent)
from tinychat.text.reply.literals import first_text
from tinychat.text.reply.parser import Parser

log = logging.getLogger(__name__)


class CallGuide:
    """One generation's, for the thread that samples.

    schemas: the inputSchema of each offered tool by name. active: whether tokens are judged now.
    A fault in here ends the guidance and never the generation.
    """

    def __init__(self, format: Format, schemas: dict[str, dict], prefill: str, tokenizer,
                 trie: TokenTrie):
        self._grammar, self._schemas = format.calls, schemas
        self._parser = Parser(format, schemas, prefill)
        self._decoder = tokenizer.decoder()
        self._trie, self._eog = trie, tokenizer.eog_ids
        self._spelled = format.texts()
        self._tokenizer = tokenizer
        self._state: State | None = None
        self._tools = list(schemas.items())
        self._closes = bool(self._grammar.closing())
        self._between = False      # a call is over, and another one has not begun
        self._given_up = False     # on the region that is being written

    @property
    def active(self) -> bool:
        return self._state is not None

    @property
    def decided(self) -> bool:
        """Is one refused token enough to know what has to come?"""
        return self._between

    def allows(self, id: int) -> bool:
        """May this token come next? Anything may where a call without a closing marker can end."""
        if self._between and id in self._eog or self._state.done and not self._closes:
            return True
        return self._trie.allowed(self._state, id)

    def mask(self) -> np.ndarray | None:
        """bool (n_vocab,): the tokens that may come next; None: any, for none of them can."""
        if self._between:  # what the model wants to say is no call: its turn is over
            mask = np.zeros(self._tokenizer.n_vocab, bool)
            mask[list(self._eog)] = True
            return mask
        mask = self._trie.mask(self._state)
        if mask is None:
            self._give_up("no token of the vocabulary can go on with it")
        return mask

    def accept(self, id: int) -> None:
        """Takes note of the token that was chosen."""
        silent = id in self._eog or is_silent(self._tokenizer, id, self._spelled)
        text = "" if silent else self._decoder.feed(id)
        if text:
            self._parser.feed(text)
        call = self._parser.call
        if self._state is not None:
            self._go_on(id, in_call=call is not None)
        elif call is None:
            self._given_up = False
        elif not self._given_up:
            self._enter(call.marker, call.text)

    def _go_on(self, id: int, in_call: bool) -> None:
        self._state = self._trie.advance(self._state, id)
        self._between = self._between and not in_call
        if self._state is None:
            self._between = False
            self._given_up = in_call
        elif self._state.done and self._closes:
            self._state, self._between = self._start(None), True

    def _enter(self, marker: str, text: str) -> None:
        """A region has begun; `text` is what came of it, its marker included."""
        if not marker:
            start = self._bare_start(text)
            if start is None:
                return
            written = text.lstrip()
        else:
            start, written = self._start(marker), text[len(marker):]
        self._state = start.walk(written.encode("utf-8", "replace"))
        if self._state is None:
            self._give_up("it began in another way")

    def _bare_start(self, text: str) -> State | None:
        """A call without a marker: an answer may begin like it, until the name is there."""
        names = "|".join(map(re.escape, self._schemas))
        if isinstance(self._grammar, PythonCalls):
            found = re.match(rf"\s*\[\s*(?:{names})\(", text)
        else:
            key = re.escape(self._grammar.name_key or "name")
            found = re.match(rf'\s*\[?\s*\{{\s*"{key}"\s*:\s*"(?:{names})"', text)
        return self._start("") if found else None

    def _start(self, marker: str | None) -> State:
        """After the marker, "" for a grammar without one; None: before a whole opening."""
        grammar = self._grammar
        match grammar:
            case JsonCalls():
                return json_call(self._tools, close=grammar.close.encode(),
                                 name_key=grammar.name_key, args_key=grammar.arguments_key,
                                 array=grammar.array, many=grammar.array,
                                 single_key=not grammar.name_key,
                                 opening=_after(marker, grammar.open))
            case PythonCalls():
                return python_call(self._tools, close=grammar.close.encode(),
                                   opening=_after(marker, grammar.open))
            case NamedCalls():
                return named_call(self._tools, sep=grammar.sep.encode(),
                                  close=grammar.close.encode(),
                                  bare_keys=grammar.quote.encode() or None,
                                  **self._section(marker))
            case TaggedCalls():
                return tagged_call(self._tools, sep=grammar.sep.encode(),
                                   key_open=grammar.key_open.encode(),
                                   key_end=grammar.key_end.encode(),
                                   val_close=grammar.val_close.encode(),
                                   close=grammar.close.encode(), **self._section(marker))

    def _section(self, marker: str) -> dict[str, bytes]:
        grammar = self._grammar
        opening, close = grammar.open, ""
        if grammar.section_open and marker in (None, first_text(grammar.section_open)):
            opening, close = grammar.section_open + grammar.open, grammar.section_close
        return {"opening": _after(marker, opening), "again": grammar.open.encode() if close else b"",
                "section_close": close.encode()}

    def _give_up(self, why: str) -> None:
        log.debug("a call is written without guidance: %s", why)
        self._state, self._given_up = None, True


def _after(marker: str | None, literal: str) -> bytes:
    """What is left of a literal after its marker; all of it, and white space, for None."""
    if marker is None:
        return f" {literal}".encode()
    at = literal.find(marker)
    return literal[at + len(marker):].encode() if marker and at >= 0 else literal.encode()
