"""Each example runs as it stands, with the real small model, or the tiny one that embeds."""
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_doors import environment, golden

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
OTHERS = {"06_embeddings": golden("bert-a")}  # models of those that the real one is not for
TIMEOUT_S = 300  # the reference executor needs its time


def test_there_are_examples_numbered_without_gaps():
    assert [path.name[:2] for path in EXAMPLES] == [f"{i:02}" for i in range(1, len(EXAMPLES) + 1)]
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(path, request, tmp_path):
    model = OTHERS.get(path.stem) or request.getfixturevalue("smollm2_path")
    assert len(path.read_text().splitlines()) < 60
    done = subprocess.run([sys.executable, str(path), str(model)], capture_output=True,
                          text=True, timeout=TIMEOUT_S, cwd=tmp_path, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr
