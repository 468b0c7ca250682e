"""Every golden text model, on the reference and on each SIMD level: whole, in chunks, in company.

Tolerances, s being the standard deviation of the expected logits (golden/README.md says whence):

    arithmetic                                          max difference   cosine    greedy margin
    float32 activations                                         0.02 s   0.9999           0.05 s
    keys and values in float16                                   0.1 s   0.999            0.2 s
    keys and values in q8_0                                      0.3 s   0.997
    activations in 8 bits (native, quantised weights)            0.3 s   0.997            0.5 s

Rounded activations can make a router choose another expert, which is no fault: so few rows of such
a file may be further off.
"""
import numpy as np
import pytest

import golden_table
from helpers_golden import (
    EXECUTORS, INT8, QTYPES, check, check_greedy, load_golden, open_golden, prefill, step, tolerance)

FLOAT = ("cohere2-a", "deepseek2-lite-a", "deepseek3-a", "gemma3-a", "glm4-a", "glm4moe-a",
         "gpt-oss-a", "granite3-a", "granite4-h-micro-a", "granite4-h-tiny-a", "granite4-micro-a",
         "granitemoe-a", "lfm2-a", "lfm2moe-a", "llama3-a", "ministral3-a", "mistral-a", "qwen2-a",
         "qwen2moe-a", "qwen3-a", "qwen3-yarn-a", "qwen3.5-a", "qwen3moe-a", "qwen3next-a",
         "smollm2-a", "smollm3-a")
EXPERTS = ("deepseek2-lite-a", "deepseek3-a", "glm4moe-a", "gpt-oss-a", "granite4-h-tiny-a",
           "granitemoe-a", "lfm2moe-a", "qwen2moe-a", "qwen3moe-a", "qwen3next-a")
QUANTISED = ("gpt-oss-a.MXFP4", *(f"{name}.{qtype}" for name in ("llama3-a", "qwen3-a",
                                                                 "granite4-micro-a")
                                  for qtype in sorted(QTYPES)))

every_model = pytest.mark.parametrize("name", FLOAT + QUANTISED)
every_executor = pytest.mark.parametrize("kind", EXECUTORS)


@every_executor
@every_model
def test_logits_and_greedy_tokens_agree(name, kind):
    golden = load_golden(name)
    executor, limits = open_golden(golden, kind), tolerance(golden, kind)
    logits = step(executor, (0, 0, golden.tokens))
    check(golden, logits, limits)
    check_greedy(golden, executor, logits[-1], limits[2])
    executor.close()


@every_executor
@every_model
def test_logits_agree_when_the_prompt_comes_in_chunks(name, kind):
    golden = load_golden(name)
    executor = open_golden(golden, kind)
    whole = step(executor, (0, 0, golden.tokens))
    for chunk in (7, 1):
        logits = prefill(executor, golden.tokens, chunk)
        check(golden, logits, tolerance(golden, kind))
        if kind != "reference":
            assert np.array_equal(logits, whole), f"chunks of {chunk} change the bits"
    executor.close()


@every_executor
@every_model
def test_logits_and_greedy_tokens_agree_with_a_float16_cache(name, kind):
    golden = load_golden(name)
    executor, limits = open_golden(golden, kind, "f16"), tolerance(golden, kind, "f16")
    logits = step(executor, (0, 0, golden.tokens))
    check(golden, logits, limits)
    check_greedy(golden, executor, logits[-1], limits[2])
    executor.close()


@every_executor
@pytest.mark.parametrize("name", [name for name in FLOAT if name not in EXPERTS])
def test_a_q8_0_cache_moves_logits_by_hundredths(name, kind):
    golden = load_golden(name)
    executor = open_golden(golden, kind, "q8_0")
    logits = step(executor, (0, 0, golden.tokens))
    moved = np.sqrt(np.mean((logits - golden.logits) ** 2)) / golden.std
    check(golden, logits, INT8)
    assert 0.0015 < moved < 0.04, "of the standard deviation; F16 moves them by less"
    executor.close()


@every_executor
@pytest.mark.parametrize("name", FLOAT + ("granite4-micro-a.Q2_K", "llama3-a.Q4_K"))
def test_two_sequences_in_a_step_do_not_see_each_other(name, kind):
    golden = load_golden(name)
    executor, tokens = open_golden(golden, kind), golden.tokens
    alone = step(executor, (0, 0, tokens))
    half = len(tokens) // 2
    step(executor, (1, 0, tokens[half:]))
    mixed = step(executor, (1, len(tokens) - half, tokens[:half]), (0, 0, tokens))[half:]
    check(golden, mixed, tolerance(golden, kind))
    if kind != "reference":
        assert np.array_equal(mixed, alone), "company changes the bits"
    executor.close()


def test_the_table_of_all_is_one_command(capsys):
    assert golden_table.main(["smollm2-a", "llama3-a.Q4_0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [word for kind in EXECUTORS for word in kind.split()]
    assert [line.split()[0] for line in lines[1:]] == ["smollm2-a", "llama3-a.Q4_0"]
    assert all("!" not in line for line in lines)
