"""Every statement of the HTTP contract is held by a test that cites it, or is named as a later one."""
import re

import pytest
import statements


def test_every_statement_is_cited_by_a_test_or_waits_for_a_later_part():
    held = statements.cited()
    open_ones = [n for n in range(1, statements.N_STATEMENTS + 1) if n not in held]
    assert open_ones == [n for n in open_ones if n in statements.LATER]
    assert [n for n in statements.LATER if n in held] == [], "held by now: no longer a later one"


def test_the_table_has_a_line_for_each_statement():
    lines = statements.table().splitlines()
    assert sum(bool(re.match(r"C-\d{3}  ", line)) for line in lines) == statements.N_STATEMENTS
    assert "MISSING" not in statements.table()


def test_the_numbers_are_those_of_the_contract(shared):
    text = (shared / "spec" / "chat-api.md").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r"^- C-(\d{3}) ", text, re.MULTILINE)]
    if not numbers:
        pytest.skip("the contract's list is not there")
    assert numbers == list(range(1, statements.N_STATEMENTS + 1))
