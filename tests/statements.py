"""Which test holds which statement of the HTTP contract: `python tests/statements.py` prints the table.

A test cites the statements that it holds, as C-001, in its docstring or beside a case of its
parameters; ids outside of test functions count for nothing.
"""
import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
N_STATEMENTS = 149
CITED = re.compile(r"\bC-(\d{3})\b")

# What is not held yet, and why: number -> reason.
LATER: dict[int, str] = {}


def cited() -> dict[int, list[str]]:
    """By the statement's number, the tests that cite it, as file::function."""
    found = defaultdict(list)
    for path in sorted(TESTS.glob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                begin = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                text = "\n".join(lines[begin - 1:node.end_lineno])
                for number in sorted({int(id) for id in CITED.findall(text)}):
                    found[number].append(f"{path.name}::{node.name}")
    return found


def table() -> str:
    held = cited()
    rows = []
    for number in range(1, N_STATEMENTS + 1):
        tests = held.get(number) or [f"({LATER.get(number, 'MISSING')})"]
        rows += [f"C-{number:03d}  {tests[0]}", *(f"       {test}" for test in tests[1:])]
    n_held = sum(1 for number in range(1, N_STATEMENTS + 1) if held.get(number))
    return "\n".join([*rows, f"{n_held} of {N_STATEMENTS} statements are held by a test"])


if __name__ == "__main__":
    print(table())
