"""How every command says things: words, tables and progress on a terminal."""
import sys
import time

CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7f, 0xa0))
           if chr(code) not in "\n\t"}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Without control characters: a file or a model must not tell the terminal to do things."""
    return text.translate(CONTROL)


def one_line(error: Exception | str) -> str:
    return printable(" ".join(str(error).split()))


def size(n_bytes: float) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= step:
            return f"{n_bytes / step:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths))
        print(printable("  ".join(cells)).rstrip())


class Bar:
    """Progress on standard error: a bar on a terminal, elsewhere a line for each thing begun."""

    WIDTH, EVERY_S = 30, 0.1

    def __init__(self):
        self._terminal = sys.stderr.isatty()
        self._what: str | None = None
        self._next = 0.0

    def bytes(self, what: str, done: int, total: int) -> None:
        note = f" {size(done)} of {size(total)}" if total else ""
        self.show(what, done / total if total else 0.0, note)

    def show(self, what: str, part: float, note: str = "") -> None:
        """part: 0 to 1."""
        now = time.monotonic()
        if not self._terminal:
            if what != self._what:
                say(f"{what} …")
        elif part >= 1 or what != self._what or now >= self._next:
            filled = round(self.WIDTH * part)
            bar = "#" * filled + "." * (self.WIDTH - filled)
            sys.stderr.write(f"\r\x1b[K{what} [{bar}] {part:4.0%}{note}")
            sys.stderr.flush()
            self._next = now + self.EVERY_S
        self._what = what

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._terminal and self._what:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
