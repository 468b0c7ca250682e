"""`tinychat bench`: how fast a model loads, prefills and decodes here, and what the machine allows.

Decoding one stream reads every weight once per token, so the memory's read bandwidth bounds it:
`decode_bytes_per_second` over `read_bandwidth_bytes_per_second` says how near we are.
"""
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tinychat
from tinychat.bench.decoding import DECODE_PROMPT, measure_decoding
from tinychat.bench.limits import measure_limits
from tinychat.bench.rival import measure_llama_cpp
from tinychat.errors import InvalidRequest
from tinychat.library import Library, LoadedModel
from tinychat.library.memory import kv_bytes_per_token
from tinychat.ops.program import Program


@dataclass(frozen=True)
class Plan:
    """What is measured. streams: numbers of sequences that decode together; depths: tokens of
    context before the decoded ones."""

    n_prompt: int = 512
    n_generate: int = 64
    streams: Sequence[int] = ()
    depths: Sequence[int] = ()

    @property
    def n_ctx(self) -> int:
        return max(self.n_prompt, max([DECODE_PROMPT, *self.depths]) + self.n_generate) + 1


def run(name: str, plan: Plan, *, n_runs: int, threads: int | None = None,
        rival_python: str | None = None, say: Callable[[str], None] = lambda text: None) -> dict:
    """Measure a model of the library or a path: medians of `n_runs`, each on a fresh load.

    rival_python: an interpreter that has a package of llama.cpp. The two take turns, so that a
    machine that slows down slows both; the rival has a process, so a peak of memory, of its own.
    Raises: TinychatError.
    """
    ours, rivals = [], []
    with Library(threads=threads, parallel=max([1, *plan.streams]),
                 prompt_lookup=False) as library:  # one token a step
        entry = library.resolve(name)
        if entry.type != "llm":
            raise InvalidRequest(f"{entry.key} is an embedding model: it decodes nothing")
        if plan.n_ctx > entry.max_context_length:
            raise InvalidRequest(f"{plan.n_ctx} tokens, of prompt and generated, do not fit in the "
                                 f"model's context of {entry.max_context_length}")
        for i in range(n_runs):
            say(f"{entry.key}: run {i + 1} of {n_runs}")
            loaded = library.load(entry.key, context_length=plan.n_ctx)
            ours.append({"load_seconds": loaded.load_time_seconds,
                         **measure_decoding(loaded, plan.n_prompt, plan.n_generate, plan.streams,
                                            plan.depths, seed=i)})
            facts = {**facts_of(loaded, plan.n_generate), **versions()}
            library.unload(entry.key)
            if rival_python:
                say(f"llama.cpp: run {i + 1} of {n_runs}")
                rivals.append(measure_llama_cpp(rival_python, entry.path, plan, facts["threads"]))
    say("the machine's limits")
    result = {"model": entry.key, "prompt_tokens": plan.n_prompt,
              "generate_tokens": plan.n_generate, "streams": list(plan.streams),
              "depths": list(plan.depths), **medians(ours),
              "peak_memory_bytes": peak_memory_bytes(), **facts,
              **measure_limits(facts["isa"], facts["threads"])}
    result["decode_bytes_per_second"] = (result["decode_tokens_per_second"]
                                         * facts["decode_bytes_per_token"])
    result["prefill_operations_per_second"] = (result["prefill_tokens_per_second"]
                                               * facts["prefill_operations_per_token"])
    if rivals:
        result["llama.cpp"] = medians(rivals)
    return result


def facts_of(model: LoadedModel, n_generate: int) -> dict:
    """What does not change from run to run."""
    n_past = DECODE_PROMPT + n_generate // 2
    kv_bytes = n_past * kv_bytes_per_token(model.program, model.settings.kv_type)
    executor = model.executor
    return {"executor": executor.name, "isa": getattr(executor, "isa", None),
            "threads": getattr(executor, "threads", os.cpu_count() or 1),
            "size_bytes": model.entry.size_bytes, "quantization": model.entry.quantization.name,
            "decode_bytes_per_token": weight_bytes_per_token(model.program) + kv_bytes,
            "prefill_operations_per_token": operations_per_token(model.program)}


def weight_bytes_per_token(program: Program) -> int:
    """Bytes of weights, as stored, that one token's step reads: all matrices, and its embedding."""
    return sum(weight.row_bytes if op.name == "embed" else weight.n_bytes
               for op in program.ops for weight in op.weights)


def operations_per_token(program: Program) -> int:
    """Of the matrix products that every token of a prompt takes, a product and its sum counting as
    two; attention is not among them."""
    n = 0
    for op in program.ops:
        if op.name in ("linear", "head_linear", "experts") and op.out.rows == "tokens":
            weight = op.weights[0]
            # of the experts' matrices a token takes as many as there are results side by side
            n += 2 * (op.out.width * weight.shape[-1] if op.name == "experts"
                      else math.prod(weight.shape))
    return n


def medians(runs: list[dict]) -> dict:
    """Of each figure; what is no number stays as in the first run."""
    return {key: statistics.median(run[key] for run in runs)
            if isinstance(value, (int, float)) else value for key, value in runs[0].items()}


def versions() -> dict:
    return {"tinychat": tinychat.__version__, "python": platform.python_version(),
            "numpy": np.__version__, "machine": _cpu_name()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int | None:
    """The most that was resident in this process; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
