"""Each example runs as it stands, with the real small model or a tiny one."""
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_doors import GOLDEN, environment

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
TIMEOUT_S = 300  # the reference executor needs its time


def test_there_are_examples_numbered_without_gaps():
    assert [path.name[:2] for path in EXAMPLES] == [f"{i:02}" for i in range(1, len(EXAMPLES) + 1)]
    assert len(EXAMPLES) >= 5


ARGUMENTS = {  # of those that want another model than the small one
    "06_images": (GOLDEN / "qwen3vl-a.gguf", GOLDEN / "qwen3vl-a.png"),
    "07_embeddings": (GOLDEN / "bert-a.gguf",),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(path, smollm2_path, tmp_path):
    assert len(path.read_text().splitlines()) < 60
    given = map(str, ARGUMENTS.get(path.stem, (smollm2_path,)))
    done = subprocess.run([sys.executable, str(path), *given], capture_output=True,
                          text=True, timeout=TIMEOUT_S, cwd=tmp_path, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr
