"""`tinychat bench`: how fast a model loads, prefills and decodes here, and what the machine allows.

Decoding one stream reads every weight once per token, so the memory's read bandwidth bounds it:
`decode_bytes_per_second` over `read_bandwidth_bytes_per_second` says how near we are.
"""
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tinychat
from tinychat.bench.rival import measure_llama_cpp
from tinychat.engine.sequence import Finished, Token
from tinychat.errors import InvalidRequest
from tinychat.library import Library, LoadedModel
from tinychat.library.memory import kv_bytes_per_token
from tinychat.ops.program import Program
from tinychat.ops.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
DECODE_PROMPT = 16           # tokens before the decoded ones
BANDWIDTH_BYTES = 512 << 20  # much more than any cache
BANDWIDTH_RUNS = 5


def run(name: str, *, n_prompt: int, n_generate: int, n_runs: int, threads: int | None = None,
        rival_python: str | None = None, say: Callable[[str], None] = lambda text: None) -> dict:
    """Measure a model of the library or a path: medians of `n_runs`, each on a fresh load.

    rival_python: an interpreter that has a package of llama.cpp. The two take turns, so that a
    machine that slows down slows both; the rival has a process, so a peak of memory, of its own.
    Raises: TinychatError.
    """
    ours, rivals = [], []
    with Library(threads=threads, parallel=1, prompt_lookup=False) as library:  # one token a step
        entry = library.resolve(name)
        if entry.type != "llm":
            raise InvalidRequest(f"{entry.key} is an embedding model: it decodes nothing")
        n_ctx = _context(n_prompt, n_generate, entry.max_context_length)
        for i in range(n_runs):
            say(f"{entry.key}: run {i + 1} of {n_runs}")
            loaded = library.load(entry.key, context_length=n_ctx)
            ours.append(measure(loaded, n_prompt, n_generate, seed=i))
            facts = {**facts_of(loaded, n_generate), **versions()}
            library.unload(entry.key)
            if rival_python:
                rivals.append(measure_llama_cpp(rival_python, entry.path, n_prompt, n_generate,
                                                facts["threads"]))
    result = {"model": entry.key, "prompt_tokens": n_prompt, "generate_tokens": n_generate,
              **medians(ours), "peak_memory_bytes": peak_memory_bytes(), **facts}
    result["decode_bytes_per_second"] = (result["decode_tokens_per_second"]
                                         * facts["decode_bytes_per_token"])
    say("reading memory")
    result["read_bandwidth_bytes_per_second"] = read_bandwidth(facts["threads"],
                                                               BANDWIDTH_BYTES)
    if rivals:
        result["llama.cpp"] = medians(rivals)
    return result


def _context(n_prompt: int, n_generate: int, n_ctx_max: int) -> int:
    n_ctx = max(n_prompt + 1, DECODE_PROMPT + n_generate + 1)
    if n_ctx > n_ctx_max:
        raise InvalidRequest(f"{n_prompt} tokens of prompt or {n_generate} generated do not fit "
                             f"in the model's context of {n_ctx_max}")
    return n_ctx


def measure(model: LoadedModel, n_prompt: int, n_generate: int, seed: int) -> dict:
    """Tokens per second of one stream; `seed` makes a prompt that no page in memory knows."""
    rng = np.random.default_rng(seed)
    n_vocab = model.program.n_vocab
    _times(model, rng.integers(n_vocab, size=2).tolist(), 2)  # touch everything once
    start, first, _ = _times(model, rng.integers(n_vocab, size=n_prompt).tolist(), 1)
    _, begin, end = _times(model, rng.integers(n_vocab, size=DECODE_PROMPT).tolist(),
                           n_generate + 1)
    return {"load_seconds": model.load_time_seconds,
            "prefill_tokens_per_second": n_prompt / (first - start),
            "decode_tokens_per_second": n_generate / (end - begin)}


def _times(model: LoadedModel, ids: list[int], n: int) -> tuple[float, float, float]:
    """When the prompt began, and when the first and the last of `n` tokens came, in seconds."""
    sequence = model.engine.submit(ids, params=GREEDY, max_tokens=n)
    tokens = []
    for update in sequence.updates():
        if isinstance(update, Token):
            tokens.append(update.t)
        elif isinstance(update, Finished) and update.error:
            raise update.error
    return sequence.t_started, tokens[0], tokens[-1]


def facts_of(model: LoadedModel, n_generate: int) -> dict:
    """What does not change from run to run."""
    n_past = DECODE_PROMPT + n_generate // 2
    kv_bytes = n_past * kv_bytes_per_token(model.program, model.settings.kv_type)
    executor = model.executor
    return {"executor": executor.name, "isa": getattr(executor, "isa", None),
            "threads": getattr(executor, "threads", os.cpu_count() or 1),
            "size_bytes": model.entry.size_bytes, "quantization": model.entry.quantization.name,
            "decode_bytes_per_token": weight_bytes_per_token(model.program) + kv_bytes}


def weight_bytes_per_token(program: Program) -> int:
    """Bytes of weights, as stored, that one token's step reads: all matrices, and its embedding."""
    return sum(weight.row_bytes if op.name == "embed" else weight.n_bytes
               for op in program.ops for weight in op.weights)


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


def read_bandwidth(n_threads: int, n_bytes: int) -> float:
    """Bytes per second that `n_threads` read together from `n_bytes`: the best of a few passes.

    max() of float32 has the least arithmetic to a byte among NumPy's reductions (38 GB/s on a
    machine where sum() saw 29).
    """
    parts = np.array_split(np.ones(n_bytes // 4, np.float32), n_threads)
    return n_bytes / min(_together(np.max, parts) for _ in range(BANDWIDTH_RUNS))


def _together(work, parts: list[np.ndarray]) -> float:
    """Seconds until `work` is done on every part, each on its own thread."""
    gate = threading.Barrier(len(parts) + 1)

    def one(part):
        gate.wait()
        work(part)

    threads = [threading.Thread(target=one, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def table(result: dict) -> list[tuple[str, ...]]:
    """The figures for people, row by row."""
    rival = result.get("llama.cpp")
    rows = [("", "tinychat", *([rival["version"], "ratio"] if rival else ()))]
    for name, key, scale, unit in (
            ("load", "load_seconds", 1, "s"),
            (f"prefill of {result['prompt_tokens']}", "prefill_tokens_per_second", 1, "tokens/s"),
            (f"decode of {result['generate_tokens']}", "decode_tokens_per_second", 1, "tokens/s"),
            ("peak memory", "peak_memory_bytes", 1e6, "MB")):
        row = [name, _figure(result[key], scale, unit)]
        if rival:
            row += [_figure(rival[key], scale, unit), _ratio(result[key], rival[key])]
        rows.append(tuple(row))
    return rows


def notes(result: dict) -> list[str]:
    """What the figures stand beside: the machine's limit, and what was measured."""
    reads, limit = result["decode_bytes_per_second"], result["read_bandwidth_bytes_per_second"]
    return [f"decoding reads {reads / 1e9:.1f} GB/s, {reads / limit:.0%} of the {limit / 1e9:.1f} "
            f"GB/s that {result['threads']} threads can read",
            f"{result['model']} {result['quantization']}, {result['executor']}, "
            f"{result['threads']} threads, {result['machine']}"]


def _figure(value: float | None, scale: float, unit: str) -> str:
    if value is None:
        return "not known"
    value /= scale
    return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else ""
