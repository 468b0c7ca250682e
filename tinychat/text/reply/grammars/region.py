"""What is known of the calls in a region while it is read."""
import re
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from tinychat.text.reply.literals import MARKER, first_text
from tinychat.text.reply.source import Ended, Source

Reading = Generator[None, None, None]
NO_OBJECT = None  # arguments that are no JSON object


class NotACall(Exception):
    """What was read is no call of this grammar."""


@dataclass
class Region:
    """name: of the call that is being read, once it is complete.

    whole: calls with all of their arguments that still lack the closing marker. done: the others.
    Each call is (name, arguments); arguments None are no JSON object.
    """

    schemas: dict[str, dict]
    name: str | None = None
    whole: list[tuple[str, Any]] = field(default_factory=list)
    done: list[tuple[str, Any]] = field(default_factory=list)

    def called(self, name: str, arguments: Any) -> None:
        self.whole.append((name, arguments if isinstance(arguments, dict) else NO_OBJECT))

    def finish(self) -> None:
        """The calls read so far have ended."""
        self.done += self.whole
        self.whole, self.name = [], None


def openings_of(*literals: str) -> tuple[str, ...]:
    """What a search for these openings looks for; nothing for empty ones."""
    return tuple(dict.fromkeys(text for literal in literals if (text := first_text(literal))))


def own_name(name: str) -> str:
    """gpt-oss and Kimi write `functions.` before a name."""
    return name.strip().removeprefix("functions.")


def close(source: Source, region: Region, literal: str, *others: str) -> Reading:
    """Reads the closing marker, which may be missing if something else comes.

    others: literals that might have come instead. Raises: Ended, also in the midst of one.
    """
    if literal.strip() and not (yield from accept_parts(source, literal)):
        yield from source.ahead()
        rest = source.rest.strip()
        if not rest or source.ended and any(_begins(one, rest) for one in (literal, *others)):
            raise Ended
    region.finish()


def _begins(literal: str, rest: str) -> bool:
    """Is `rest` the beginning of the literal, or of one of its parts?"""
    return any(part.strip().startswith(rest) for part in (literal, *_PARTS.split(literal)) if part)


def accept_parts(source: Source, literal: str) -> Generator[None, None, bool]:
    """Reads a literal of several markers of which a model may leave out some, or the last."""
    if (yield from source.accept(" " + literal)):
        return True
    parts = [part for part in _PARTS.split(literal) if part and part.strip()]
    found = False
    for part in parts if len(parts) > 1 else ():
        found = (yield from source.accept(" " + part.strip())) or found
    return found


_PARTS = re.compile(rf"({MARKER.pattern})", MARKER.flags)
