"""Text from outside is never structure: control tokens in it are marked, and encoded as text."""
import re
from collections.abc import Iterator

# Round control tokens that a stranger wrote into a text; dropped where they come in from outside.
MARK_OPEN, MARK_CLOSE = "\U00100000", "\U00100001"
MARKS = re.compile(f"[{MARK_OPEN}{MARK_CLOSE}]")
MARKED = re.compile(f"{MARK_OPEN}([^{MARK_OPEN}{MARK_CLOSE}]*){MARK_CLOSE}")


def add_piece(pieces: list[tuple[str, bool]], text: str, is_structure: bool) -> None:
    if not text:
        return
    if pieces and pieces[-1][1] == is_structure:
        pieces[-1] = pieces[-1][0] + text, is_structure
    else:
        pieces.append((text, is_structure))


class TextFinder:
    """Finds any of some thousand texts, the longest first; one alternation of them all crawls."""

    def __init__(self, texts: list[str]):
        # Runs of white space are tokens of their own in some vocabularies, and structure in none.
        self.texts = {text for text in texts if text.strip(" \t\r\n▁")}
        self.lengths = sorted({len(text) for text in self.texts}, reverse=True)
        starts = "|".join(re.escape(start) for start in sorted({text[:2] for text in self.texts}))
        self.starts = re.compile(starts or "(?!)")

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of each hit, from left to right."""
        pos = 0
        while match := self.starts.search(text, pos):
            start = match.start()
            stop = self._stop(text, start)
            if stop:
                yield start, stop
            pos = stop or start + 1

    def mark(self, text: str) -> str:
        """`text` with the marks round each hit, and none that it brought along."""
        text, parts, done = MARKS.sub("", text), [], 0
        for start, stop in self.spans(text):
            parts += [text[done:start], MARK_OPEN, text[start:stop], MARK_CLOSE]
            done = stop
        return "".join([*parts, text[done:]])

    def _stop(self, text: str, start: int) -> int | None:
        for n in self.lengths:
            if text[start:start + n] in self.texts:
                return start + n
        return None
