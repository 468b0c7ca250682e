"""What was measured, for people: a table, and what its figures stand beside."""
from tinychat.bench.decoding import depth_key, streams_key


def table(result: dict) -> list[tuple[str, ...]]:
    """The figures for people, row by row."""
    rival = result.get("llama.cpp")
    rows = [("", "tinychat", *([rival["version"], "ratio"] if rival else ()))]
    for name, key, scale, unit in (
            ("load", "load_seconds", 1, "s"),
            (f"prefill of {result['prompt_tokens']}", "prefill_tokens_per_second", 1, "tokens/s"),
            (f"decode of {result['generate_tokens']}", "decode_tokens_per_second", 1, "tokens/s"),
            *((f"{n} streams together", streams_key(n), 1, "tokens/s")
              for n in result["streams"]),
            *((f"decode after {n}", depth_key(n), 1, "tokens/s") for n in result["depths"]),
            ("peak memory", "peak_memory_bytes", 1e6, "MB")):
        row = [name, _figure(result.get(key), scale, unit)]
        if rival:
            row += [_figure(rival.get(key), scale, unit), _ratio(result[key], rival.get(key))]
        rows.append(tuple(row))
    return rows


def notes(result: dict) -> list[str]:
    """What the figures stand beside: the machine's limits, and what was measured."""
    reads, limit = result["decode_bytes_per_second"], result["read_bandwidth_bytes_per_second"]
    lines = [f"decoding reads {reads / 1e9:.1f} GB/s, {reads / limit:.0%} of the "
             f"{limit / 1e9:.1f} GB/s that {result['threads']} threads can read"]
    for key, what in (("int8_peak_per_second", "int8"),
                      ("int8_vector_peak_per_second", "int8 without AMX"),
                      ("float32_peak_per_second", "float32")):
        if peak := result.get(key):
            share = result["prefill_operations_per_second"] / peak
            lines.append(f"prefill does {share:.0%} of the {peak / 1e12:.2f} TOP/s in {what} that "
                         "they can do")
    return [*lines, f"{result['model']} {result['quantization']}, {result['executor']}, "
                    f"{result['threads']} threads, {result['machine']}"]


def _figure(value: float | None, scale: float, unit: str) -> str:
    if value is None:
        return "not known"
    value /= scale
    return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else ""
