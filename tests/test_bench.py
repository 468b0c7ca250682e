"""`tinychat bench`: figures that are there and make sense; how fast is no test's business."""
import json
import math
import re
import sys
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest
from helpers_doors import golden
from helpers_golden import load_golden

from tinychat import bench, cli
from tinychat.bench import Plan, limits, report, rival, sight
from tinychat.bench.plot import plot
from tinychat.errors import InvalidRequest, TinychatError
from tinychat.gguf_file import open_gguf
from tinychat.models import build_program


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(limits, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "PEAK_ROUNDS", 1000)


def test_json_ends_with_one_line_of_all_figures(capsys):
    code = cli.main(["bench", str(golden("llama3-a.Q4_0")), "--prompt", "40", "--generate", "5",
                     "--runs", "2", "--threads", "1", "--streams", "3", "--depths", "33", "50",
                     "--json"])
    assert code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds",
                "peak_memory_bytes", "decode_bytes_per_second", "read_bandwidth_bytes_per_second",
                "decode_tokens_per_second_of_3_streams", "decode_tokens_per_second_after_33",
                "decode_tokens_per_second_after_50"):
        assert found[key] > 0, key
    assert (found["model"], found["prompt_tokens"], found["generate_tokens"]) == ("llama3-a", 40, 5)
    assert {"tinychat", "python", "numpy", "machine", "isa", "threads", "executor"} <= found.keys()
    assert found["decode_bytes_per_second"] == pytest.approx(
        found["decode_tokens_per_second"] * found["decode_bytes_per_token"])


def test_people_get_a_table(capsys):
    assert cli.main(["bench", str(golden("qwen2-a")), "--prompt", "8", "--generate", "2", "--runs",
                     "1", "--streams", "2", "--depths", "20"]) == 0
    said = capsys.readouterr()
    for part in ("prefill of 8", "decode of 2", "2 streams together", "decode after 20", "load",
                 "peak memory", "tokens/s", "% of the"):
        assert part in said.out
    assert "run 1 of 1" in said.err


def test_more_than_the_context_is_refused():
    with pytest.raises(InvalidRequest, match="context of 4096"):
        bench.run(str(golden("qwen2-a")), Plan(n_prompt=4096, n_generate=4), n_runs=1)
    with pytest.raises(InvalidRequest, match="4099 tokens"):
        bench.run(str(golden("qwen2-a")), Plan(8, 4, depths=[8, 4094]), n_runs=1)


def test_an_embedding_model_is_refused():
    with pytest.raises(InvalidRequest, match="embedding model"):
        bench.run(str(golden("qwen3-embedding-a")), Plan(8, 4), n_runs=1)


def test_a_picture_has_a_line_for_each_engine_and_a_place_for_each_figure(tmp_path):
    path = tmp_path / "plot.svg"
    assert cli.main(["bench", str(golden("qwen2-a")), "--prompt", "8", "--generate", "2", "--runs",
                     "1", "--streams", "2", "4", "--depths", "20", "--plot", str(path)]) == 0
    picture = ElementTree.parse(path).getroot()
    lines = picture.findall(".//{*}polyline")
    assert [len(line.get("points").split()) for line in lines] == [3, 2]
    figures = {"decode_tokens_per_second": 7.0, "decode_tokens_per_second_of_9_streams": 70.0}
    both = plot({**figures, "model": "<m>", "quantization": "Q8_0", "machine": "x", "threads": 2,
                 "streams": [9], "depths": [], "llama.cpp": {**figures, "version": "theirs & co"}})
    drawn = ElementTree.fromstring(both)
    assert len(drawn.findall(".//{*}polyline")) == 4
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("tinychat") == texts.count("theirs & co") == 2
    assert {"9", "80", "streams"} <= set(texts) and "<m> Q8_0, x, 2 threads" in texts


@pytest.mark.skipif(not find_spec("tinychat._kernels"), reason="no compiled kernels")
def test_peaks_are_known_for_every_instruction_set_but_portable_c():
    from tinychat._kernels import isa_levels, multiply_adds

    for isa in isa_levels():
        for is_int8 in (True, False):
            done = multiply_adds(isa, is_int8, 10)
            assert done == multiply_adds(isa, is_int8, 20) / 2
            assert (done > 0) == (isa != "scalar")
    with pytest.raises(ValueError, match="expected one of"):
        multiply_adds("amx_bf16", True, 1)
    found = limits.measure_limits(isa_levels()[-1], 1)
    assert all(value > 0 for value in found.values())
    assert found.keys() >= {"read_bandwidth_bytes_per_second"}
    assert limits.measure_limits(None, 1).keys() == {"read_bandwidth_bytes_per_second"}


def test_a_token_of_a_prompt_takes_each_matrix_once_and_its_experts():
    with open_gguf(golden("qwen2-a")) as file:
        sizes = {name: math.prod(tensor.shape) for name, tensor in file.tensors.items()
                 if name.startswith("blk.") and len(tensor.shape) == 2}
        assert bench.operations_per_token(build_program(file)) == 2 * sum(sizes.values())
    with open_gguf(load_golden("qwen3moe-a").path) as file:
        meta, n_all, n_experts = file.metadata, 0, 0
        for name, tensor in file.tensors.items():
            if name.startswith("blk.") and len(tensor.shape) == 2:
                n_all += math.prod(tensor.shape)
            elif name.startswith("blk.") and len(tensor.shape) == 3:
                n_experts += math.prod(tensor.shape[1:]) * meta["qwen3moe.expert_used_count"]
        assert bench.operations_per_token(build_program(file)) == 2 * (n_all + n_experts)


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
            "streams": [8], "depths": [], "decode_tokens_per_second_of_8_streams": 60.0,
            "llama.cpp": {**figures, "version": "llama.cpp 1"}}
    rows = {row[0]: row[1:] for row in report.table(ours)}
    assert rows["8 streams together"] == ("60.0 tokens/s", "not known", "")
    assert rows["decode of 1"] == ("15.0 tokens/s", "10.0 tokens/s", "1.50")
    assert rows[""] == ("tinychat", "llama.cpp 1", "ratio")


def test_a_rival_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(TinychatError, match="could not be measured") as error:
        rival.measure_llama_cpp(str(tmp_path / "no-python"), golden("qwen2-a"), Plan(8, 2), 1)
    assert "\n" not in str(error.value)
    script = "raise SystemExit('neither package')"
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(rival, "SCRIPT", tmp_path / "script.py")
    with pytest.raises(TinychatError, match="neither package"):
        rival.measure_llama_cpp(sys.executable, golden("qwen2-a"), Plan(8, 2), 1)


def test_a_towers_speed_is_told_beside_the_machines(capsys):
    sight.main(["--layers", "1", "--runs", "1"])
    assert re.search(r"\d s for a picture of 448x448 in 1 layers: \d+ GFLOP/s, \d+% of the \d+",
                     capsys.readouterr().out)
