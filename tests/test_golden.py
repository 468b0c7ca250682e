"""Every golden model of the families in models/, on the reference and on each SIMD level.

Tolerances, s being the standard deviation of the expected logits (golden/README.md says whence):

    arithmetic                                          max difference   cosine    greedy margin
    float32 activations                                         0.02 s   0.9999           0.05 s
    keys and values in float16                                   0.1 s   0.999            0.2 s
    activations in 8 bits (native, quantised weights)            0.3 s   0.997            0.5 s
"""
import numpy as np
import pytest

from helpers_golden import EXECUTORS, load_golden, open_golden, prefill, step

FLOAT = ("smollm2-a", "llama3-a", "mistral-a", "qwen2-a", "qwen3-a", "qwen3-yarn-a", "granite3-a",
         "granite4-micro-a")
QTYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
          "IQ4_XS", "MXFP4")
QUANTISED = tuple(f"{name}.{qtype}" for name in ("llama3-a", "qwen3-a", "granite4-micro-a")
                  for qtype in QTYPES)

STRICT, FLOAT16, INT8 = (0.02, 0.9999, 0.05), (0.1, 0.999, 0.2), (0.3, 0.997, 0.5)

every_model = pytest.mark.parametrize("name", FLOAT + QUANTISED)
every_executor = pytest.mark.parametrize("kind", EXECUTORS)


def tolerance(name: str, kind: str, kv_type: str = "f32") -> tuple[float, float, float]:
    if kind != "reference" and name in QUANTISED:
        return INT8
    return STRICT if kv_type == "f32" else FLOAT16


def check(golden, logits, limits) -> None:
    difference, cosine = golden.worst(logits)
    assert difference <= limits[0] and cosine >= limits[1], (difference, cosine)


def check_greedy(golden, executor, last: np.ndarray, margin: float) -> None:
    """Follow the most likely token until the expected lead is too small to count on."""
    at = len(golden.tokens)
    for i, expected in enumerate(golden.greedy):
        if golden.margins[i] <= margin:
            return
        assert int(last.argmax()) == expected, f"greedy token {i}"
        last = step(executor, (0, at + i, [expected]))[0]


@every_executor
@every_model
def test_logits_and_greedy_tokens_agree(name, kind):
    golden = load_golden(name)
    executor, limits = open_golden(golden, kind), tolerance(name, kind)
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
        check(golden, logits, tolerance(name, kind))
        if kind != "reference":
            assert np.array_equal(logits, whole), f"chunks of {chunk} change the bits"
    executor.close()


@every_executor
@every_model
def test_logits_and_greedy_tokens_agree_with_a_float16_cache(name, kind):
    golden = load_golden(name)
    executor, limits = open_golden(golden, kind, "f16"), tolerance(name, kind, "f16")
    logits = step(executor, (0, 0, golden.tokens))
    check(golden, logits, limits)
    check_greedy(golden, executor, logits[-1], limits[2])
    executor.close()


@every_executor
@pytest.mark.parametrize("name", ("smollm2-a", "qwen3-yarn-a", "granite4-micro-a.Q2_K",
                                  "llama3-a.Q4_K"))
def test_two_sequences_in_a_step_do_not_see_each_other(name, kind):
    golden = load_golden(name)
    executor, tokens = open_golden(golden, kind), golden.tokens
    alone = step(executor, (0, 0, tokens))
    half = len(tokens) // 2
    step(executor, (1, 0, tokens[half:]))
    mixed = step(executor, (1, len(tokens) - half, tokens[:half]), (0, 0, tokens))[half:]
    check(golden, mixed, tolerance(name, kind))
    if kind != "reference":
        assert np.array_equal(mixed, alone), "company changes the bits"
    executor.close()
