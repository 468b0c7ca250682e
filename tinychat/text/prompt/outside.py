"""Text from outside is never structure: control tokens in it are marked, and encoded as text."""
import re
from collections.abc import Iterator

# Round control tokens that a stranger wrote into a text, and round the number of an image; dropped
# where they come in from outside. The last four variation selectors mean nothing in any text, and
# `repr` leaves them as they are.
MARK_OPEN, MARK_CLOSE = "\U000E01EC", "\U000E01ED"
IMAGE_OPEN, IMAGE_CLOSE = "\U000E01EE", "\U000E01EF"
ALL_MARKS = (MARK_OPEN, MARK_CLOSE, IMAGE_OPEN, IMAGE_CLOSE)
MARKS = re.compile(f"[{MARK_OPEN}{MARK_CLOSE}]")
FOREIGN_MARKS = re.compile(f"[{''.join(ALL_MARKS)}]")
IMAGE = re.compile(f"{IMAGE_OPEN}([0-9]+){IMAGE_CLOSE}")
MARKED = re.compile(f"{MARK_OPEN}([^{MARK_OPEN}{MARK_CLOSE}]*){MARK_CLOSE}")


def add_piece(pieces: list[tuple[str, bool]], text: str, is_structure: bool) -> None:
    if not text:
        return
    if pieces and pieces[-1][1] == is_structure:
        pieces[-1] = pieces[-1][0] + text, is_structure
    else:
        pieces.append((text, is_structure))


def numbered(messages: list[dict]) -> list[dict]:
    """In contents that are lists with images, texts as texts and images as numbers, in the order of
    the chat; all else stays as it is."""
    out, n = [], 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(part.get("type") == "image" for part in content):
            parts = []
            for part in content:
                is_image = part.get("type") == "image"
                parts.append(n if is_image else part.get("text", ""))
                n += is_image
            message = {**message, "content": parts}
        out.append(message)
    return out


def with_image_marks(messages: list[dict]) -> list[dict]:
    """What `numbered` made into lists becomes texts, with the marks round each number."""
    def text(content):
        if not isinstance(content, list) or not any(isinstance(part, int) for part in content):
            return content
        return "".join(f"{IMAGE_OPEN}{part}{IMAGE_CLOSE}" if isinstance(part, int) else part
                       for part in content)
    return [{**message, "content": text(message.get("content"))} for message in messages]


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
        text, parts, done = FOREIGN_MARKS.sub("", text), [], 0
        for start, stop in self.spans(text):
            parts += [text[done:start], MARK_OPEN, text[start:stop], MARK_CLOSE]
            done = stop
        return "".join([*parts, text[done:]])

    def _stop(self, text: str, start: int) -> int | None:
        for n in self.lengths:
            if text[start:start + n] in self.texts:
                return start + n
        return None
