"""`tinychat bench`: figures that are there and make sense; how fast is no test's business."""
import json
import re
import sys

import pytest
from helpers_doors import golden

from tinychat import bench, cli
from tinychat.bench import rival, sight
from tinychat.errors import InvalidRequest, TinychatError
from tinychat.gguf_file import open_gguf
from tinychat.models import build_program


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(bench, "BANDWIDTH_BYTES", 1 << 20)


def test_json_ends_with_one_line_of_all_figures(capsys):
    code = cli.main(["bench", str(golden("llama3-a.Q4_0")), "--prompt", "40", "--generate", "5",
                     "--runs", "2", "--threads", "1", "--json"])
    assert code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds",
                "peak_memory_bytes", "decode_bytes_per_second", "read_bandwidth_bytes_per_second"):
        assert found[key] > 0, key
    assert (found["model"], found["prompt_tokens"], found["generate_tokens"]) == ("llama3-a", 40, 5)
    assert {"tinychat", "python", "numpy", "machine", "isa", "threads", "executor"} <= found.keys()
    assert found["decode_bytes_per_second"] == pytest.approx(
        found["decode_tokens_per_second"] * found["decode_bytes_per_token"])


def test_people_get_a_table(capsys):
    assert cli.main(["bench", str(golden("qwen2-a")), "--prompt", "8", "--generate", "2", "--runs",
                     "1"]) == 0
    said = capsys.readouterr()
    for part in ("prefill of 8", "decode of 2", "load", "peak memory", "tokens/s", "% of the"):
        assert part in said.out
    assert "run 1 of 1" in said.err


def test_more_than_the_context_is_refused():
    with pytest.raises(InvalidRequest, match="context of 4096"):
        bench.run(str(golden("qwen2-a")), n_prompt=4096, n_generate=4, n_runs=1)


def test_an_embedding_model_is_refused():
    with pytest.raises(InvalidRequest, match="embedding model"):
        bench.run(str(golden("qwen3-embedding-a")), n_prompt=8, n_generate=4, n_runs=1)


def test_a_token_reads_all_matrices_but_one_row_of_the_embedding():
    with open_gguf(golden("qwen2-a")) as file:
        n_bytes = bench.weight_bytes_per_token(build_program(file))
        everything = sum(tensor.n_bytes for tensor in file.tensors.values())
        embedding = file.tensors["token_embd.weight"]
        assert n_bytes == everything + embedding.row_bytes, "tied: all as output, a row as input"
        assert "output.weight" not in file.tensors


def test_medians_keep_what_is_no_number():
    assert bench.medians([{"a": 1.0, "v": "x"}, {"a": 9.0, "v": "x"},
                          {"a": 2.0, "v": "x"}]) == {"a": 2.0, "v": "x"}


def test_the_rival_stands_beside_us():
    figures = {"load_seconds": 2.0, "prefill_tokens_per_second": 100.0,
               "decode_tokens_per_second": 10.0, "peak_memory_bytes": 2e8}
    ours = {**figures, "prompt_tokens": 1, "generate_tokens": 1, "decode_tokens_per_second": 15.0,
            "llama.cpp": {**figures, "version": "llama.cpp 1"}}
    rows = {row[0]: row[1:] for row in bench.table(ours)}
    assert rows["decode of 1"] == ("15.0 tokens/s", "10.0 tokens/s", "1.50")
    assert rows[""] == ("tinychat", "llama.cpp 1", "ratio")


def test_a_rival_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(TinychatError, match="could not be measured") as error:
        rival.measure_llama_cpp(str(tmp_path / "no-python"), golden("qwen2-a"), 8, 2, 1)
    assert "\n" not in str(error.value)
    script = "raise SystemExit('neither package')"
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(rival, "SCRIPT", tmp_path / "script.py")
    with pytest.raises(TinychatError, match="neither package"):
        rival.measure_llama_cpp(sys.executable, golden("qwen2-a"), 8, 2, 1)


def test_a_towers_speed_is_told_beside_the_machines(capsys):
    sight.main(["--layers", "1", "--runs", "1"])
    assert re.search(r"\d s for a picture of 448x448 in 1 layers: \d+ GFLOP/s, \d+% of the \d+",
                     capsys.readouterr().out)
