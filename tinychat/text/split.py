"""Pieces of generated text -> (channel, text): what the model thinks, and what it says.

Channels are "reasoning" and "message". A piece goes out as soon as it cannot be part of a marker;
every chunking of the same text gives the same channels with the same texts.
"""

KNOWN_MARKERS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)


def reasoning_markers(template_source: str) -> tuple[str, str] | None:
    """The pair that a template's text names; its close counts first, as it ends a whole thought.

    None: the template knows no reasoning.
    """
    return next((pair for part in (1, 0) for pair in KNOWN_MARKERS
                 if pair[part] in template_source), None)


def held_back(text: str, markers: list[str]) -> int:
    """Length of the longest end of `text` that may begin a marker: ("a <th", ["<think>"]) -> 3"""
    longest = max(map(len, markers), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1)
                 if any(len(marker) > n and marker.startswith(text[-n:]) for marker in markers)), 0)


class Splitter:
    """Splits one generation.

    markers: what opens (empty: the prompt does) and closes the reasoning; None: all is message.
    prefill: the end of the prompt; a template may have opened the reasoning there, or closed it.
    """

    def __init__(self, markers: tuple[str, str] | None, prefill: str = ""):
        self.open, self.close = markers or ("", "")
        # A plain tag in mid-message is prose; a marker with a bar is a marker wherever it stands.
        self._anywhere = [marker for marker in (self.open, self.close) if "|" in marker]
        self._text = ""            # not given out yet: perhaps part of a marker, or space to drop
        self._shown = set()        # channels that have had text
        self._begun = False        # this region has had text
        end = prefill.rstrip() if markers else ""
        self._after_close = end.endswith(self.close) if end else False
        opened = end.endswith(self.open) if end and self.open else False
        self._read = self._reasoning if opened else self._boundary if markers else self._message

    def feed(self, text: str) -> list[tuple[str, str]]:
        """What may go out now that `text` has come."""
        self._text += text
        found: list[tuple[str, str]] = []
        while self._read(found):
            pass
        return found

    def finish(self) -> list[tuple[str, str]]:
        """The rest, once the generation has ended: what was held back was no marker."""
        found: list[tuple[str, str]] = []
        text, self._text = self._text, ""
        if self._read == self._reasoning:
            self._give(found, "reasoning", text.rstrip() if self._begun else text.strip())
        else:
            drops_space = self._read == self._boundary and self._after_close
            self._give(found, "message", text.lstrip() if drops_space else text)
        return found

    # Each state reads what it can and says whether another state should go on.

    def _boundary(self, found: list) -> bool:
        """Before the first word of a message: white space waits, and a marker may come."""
        words = self._text.lstrip()
        if self.open and words.startswith(self.open):
            return self._enter(self._reasoning, words[len(self.open):])
        if words.startswith(self.close):
            self._after_close = True
            return self._enter(self._boundary, words[len(self.close):])
        if held_back(words, [self.open, self.close]) == len(words):
            return False
        return self._enter(self._message, words if self._after_close else self._text)

    def _reasoning(self, found: list) -> bool:
        if not self._begun:
            self._text = self._text.lstrip()
            while self.open and self._text.startswith(self.open):  # some models open it again
                self._text = self._text[len(self.open):].lstrip()
            if held_back(self._text, [self.open]) == len(self._text):
                return False
        text, closed, rest = self._text.partition(self.close)
        if not closed:
            text = text[:len(text) - held_back(text, [self.close])]
        text = text.rstrip()
        self._give(found, "reasoning", text)
        if closed:
            self._after_close = True
            return self._enter(self._boundary, rest)
        self._text = self._text[len(text):]
        return False

    def _message(self, found: list) -> bool:
        places = [(self._text.find(marker), marker) for marker in self._anywhere]
        at, marker = min((place for place in places if place[0] >= 0), default=(-1, ""))
        if not marker:
            n_held = held_back(self._text, self._anywhere)
            n_sure = len(self._text) - n_held
            self._give(found, "message", self._text[:n_sure])
            self._text = self._text[n_sure:]
            return False
        self._give(found, "message", self._text[:at])
        rest = self._text[at + len(marker):]
        if marker == self.open:
            return self._enter(self._reasoning, rest)
        self._text = rest
        return True

    def _enter(self, state, text: str) -> bool:
        self._read, self._text, self._begun = state, text, False
        return True

    def _give(self, found: list, channel: str, text: str) -> None:
        """Regions of a channel are joined by a line break; thoughts after a message are hidden."""
        if not text:
            return
        if not self._begun and channel in self._shown:
            text = "\n" + text
        self._begun = True
        if channel == "message" or "message" not in self._shown:
            self._shown.add(channel)
            found.append((channel, text))
