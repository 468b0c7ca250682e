"""The golden table: every golden model on every executor, as one command.

    python tests/golden_table.py [NAME ...]

Each cell is the largest difference from the expected logits, in units of their standard deviation,
and how many greedy tokens were compared and equal; "!" where a limit of test_golden.py is broken,
which is also the exit status.
"""
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers_golden import (
    EXECUTORS, FOLDERS, check, check_greedy, load_golden, open_golden, step, tolerance)


def names() -> list[str]:
    """Models whose logits are known, in every folder there is."""
    paths = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*-a*.npz"))}
    return sorted(name for name, path in paths.items() if is_of_text(path))


def is_of_text(path: Path) -> bool:
    with np.load(path) as data:
        return "logits" in data and "image_embeds" not in data


def cell(name: str, kind: str) -> str:
    try:
        golden = load_golden(name)
        executor = open_golden(golden, kind)
    except pytest.skip.Exception as reason:
        return f"- {reason}"
    limits = tolerance(golden, kind)
    logits = step(executor, (0, 0, golden.tokens))
    difference, _ = golden.worst(logits)
    try:
        check(golden, logits, limits)
        text = f"{difference:.4f} {check_greedy(golden, executor, logits[-1], limits[2]):2}"
    except AssertionError:
        text = f"{difference:.4f} !"
    executor.close()
    return text


def main(chosen: list[str]) -> int:
    rows = [("", *EXECUTORS)]
    for name in chosen or names():
        rows.append((name, *(cell(name, kind) for kind in EXECUTORS)))
        print(f"{len(rows) - 1} of {len(chosen or names())}: {name}", file=sys.stderr)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    return int(any("!" in text for row in rows[1:] for text in row[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
