"""Text that comes in pieces, read by generators that yield while they wait for more.

What has been read is dropped at once, so that an argument of a megabyte costs linear time.
"""
import re
from collections.abc import Generator

from tinychat.text.reply import literals

Waiting = Generator[None, None, None]


class Ended(Exception):
    """The generation is over, and what was being read is not complete."""


class Source:
    """`feed` and `end` belong to the parser, the rest to the grammar that reads.

    n_read: characters read in all. begun: the beginning of the value that is or was being read,
    until its reader has made a call of it.
    """

    def __init__(self, text: str = ""):
        self._text, self._pos = text, 0
        self.n_read = 0
        self.begun = ""
        self.ended = False

    def feed(self, piece: str) -> None:
        self._text, self._pos = self._text[self._pos:] + piece, 0

    def end(self) -> None:
        self.ended = True

    @property
    def rest(self) -> str:
        return self._text[self._pos:]

    def skip(self, n: int) -> str:
        """Reads n characters that are there."""
        text = self._text[self._pos:self._pos + n]
        self._pos += len(text)
        self.n_read += len(text)
        return text

    def more(self) -> Waiting:
        """Waits for another piece. Raises: Ended."""
        n = len(self.rest)
        while len(self.rest) == n:
            if self.ended:
                raise Ended
            yield

    def ahead(self) -> Generator[None, None, str]:
        """The next character that is no white space, "" at the end; nothing is read."""
        while not (found := self.rest.lstrip()):
            if self.ended:
                return ""
            yield
        return found[0]

    def space(self) -> Generator[None, None, str]:
        """Reads white space, and returns the next character."""
        char = yield from self.ahead()
        rest = self.rest
        self.skip(len(rest) - len(rest.lstrip()))
        return char

    def accept(self, literal: str) -> Generator[None, None, bool]:
        """Reads the literal if it comes next. White space in it is free, and so round numbers."""
        matched = yield from self.match(literal)
        if matched is None:
            return False
        self.skip(matched)
        return True

    def match(self, literal: str) -> Generator[None, None, int | None]:
        """The length of the literal if it comes next, else None."""
        at = 0
        wanted = literals.atoms(literal)
        for atom, following in zip(wanted, (*wanted[1:], "")):
            if atom == " ":
                at = yield from self._run(at, str.isspace)
            elif atom == literals.NUMBER:
                end = yield from self._run(at, str.isdigit)
                if end == at:
                    return None
                at = end
            elif atom in (literals.ANY_ID, literals.FREE):
                at = yield from self._up_to(at, following)
            else:
                at = yield from self._text_at(at, atom)
            if at is None:
                return None
        return at

    def _run(self, at: int, kind) -> Generator[None, None, int]:
        while True:
            rest = self.rest
            while at < len(rest) and kind(rest[at]):
                at += 1
            if at < len(rest) or self.ended:
                return at
            yield

    def _text_at(self, at: int, text: str) -> Generator[None, None, int | None]:
        while True:
            came = self.rest[at:at + len(text)]
            if not text.startswith(came):
                return None
            if came == text:
                return at + len(text)
            if self.ended:
                return None
            yield

    def _up_to(self, at: int, following: str) -> Generator[None, None, int | None]:
        """Past an id or the inside of quotes, which has no line break and is short."""
        while True:
            found = self.rest.find(following, at) if following.strip() else -1
            if found >= 0:
                return found
            if self.ended or len(self.rest) - at > 200 or "\n" in self.rest[at:]:
                return None
            yield

    def until(self, *ends: str) -> Generator[None, None, tuple[str, str]]:
        """(the text before the first of these texts, that text), which stays to be read.

        Raises: Ended when none comes.
        """
        parts = []
        longest = max(map(len, ends))
        while True:
            rest = self.rest
            hits = [(at, -len(end), end) for end in ends if (at := rest.find(end)) >= 0]
            if hits:
                at, _, end = min(hits)
                # an end that begins earlier may still be on its way
                held = literals.held_back(rest, ends)
                if not held or len(rest) - held > at or self.ended:
                    parts.append(self.skip(at))
                    return "".join(parts), end
            else:
                parts.append(self.skip(max(len(rest) - longest + 1, 0)))
            yield from self.more()

    def word(self, *ends: str, n_most: int = 256) -> Generator[None, None, str | None]:
        """The text before the first of these, on one line and not long; None when it is neither.

        White space round it is dropped; " " among the ends is any white space after it.
        """
        yield from self.space()
        texts = tuple(end for end in ends if end and end != " ")
        while True:
            rest = self.rest
            at = [found for end in texts if (found := rest.find(end)) >= 0]
            gap = re.search(r"\s" if " " in ends else r"[\r\n]", rest)
            if gap and not any(found < gap.start() for found in at):
                following = rest[gap.start():].lstrip()
                if " " in ends or following.startswith(texts):
                    at.append(gap.start())
                elif self.ended or not any(end.startswith(following) for end in texts):
                    return None
            if at and min(at) <= n_most:
                held = literals.held_back(rest, texts)
                if not held or len(rest) - held >= min(at) or self.ended:
                    return self.skip(min(at)).strip()
            if len(rest) > n_most + 64 or self.ended:
                return None
            yield

    def value(self, brackets: str = "[]{}", quotes: str = "") -> Generator[None, None, str]:
        """Reads one value, whose first bracket comes next, by counting brackets outside strings.

        quotes: what strings may begin with; left out, the first quote of the value decides, so that
        JSON with an apostrophe counts as well as a Python literal. Raises: Ended.
        """
        parts, depth, quote, self.begun = [], 0, "", ""
        while True:
            rest, at, n_kept = self.rest, 0, 0
            while match := (_IN_STRING[quote] if quote else _PUNCTUATION).search(rest, at):
                at, char = match.end(), match[0]
                if char == "\\":                     # what it escapes is still to come
                    n_kept = bool(quote)
                elif quote:
                    quote = "" if char == quote else quote
                elif char in "\"'":
                    quotes = quotes or ("\"'" if char == "'" else char)
                    quote = char if char in quotes else ""
                elif char in brackets:
                    depth += 1 if char in "{[(" else -1
                    if depth <= 0:
                        parts.append(self.skip(at))
                        self._begin_with(parts[-1])
                        return "".join(parts)
            parts.append(self.skip(len(rest) - n_kept))
            self._begin_with(parts[-1])
            yield from self.more()

    def _begin_with(self, part: str) -> None:
        if len(self.begun) < _BEGINNING:
            self.begun = (self.begun + part)[:_BEGINNING]


_BEGINNING = 4000
_PUNCTUATION = re.compile(r"[\[\]{}()\"']")
_IN_STRING = {quote: re.compile(rf"{quote}|\\.|\\\Z", re.S) for quote in "\"'"}
