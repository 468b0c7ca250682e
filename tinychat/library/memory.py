"""How much memory a model will take, and whether the machine has it: known before the load."""
import math
from dataclasses import dataclass
from pathlib import Path

from tinychat.errors import ModelLoadError
from tinychat.ops.program import PAGE_TOKENS, Program, plan_slots

KV_BYTES = {"f16": 2, "f32": 4}
HEADROOM = 0.95       # share of the available memory that a load may plan for
CGROUP = Path("/sys/fs/cgroup")
MEMINFO, PROC_CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, but for n_pages: pages of PAGE_TOKENS positions in the KV pool."""

    weight_bytes: int
    buffer_bytes: int
    page_bytes: int
    n_pages: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.buffer_bytes + self.n_pages * self.page_bytes


def plan_memory(program: Program, *, n_ctx: int, parallel: int, max_tokens: int,
                kv_type: str = "f16", dequantized: bool = False,
                available: int | None = None) -> MemoryPlan:
    """A KV pool in which `parallel` sequences of `n_ctx` tokens fit, or what memory allows.

    The pool never has fewer pages than one full context: with less the load is refused. Sequences
    that do not fit at the same time wait for pages; they are never dropped.
    dequantized: weights become float32 (the reference executor).
    available: bytes that may be used; None when the machine does not tell.
    Raises: ModelLoadError with both figures.
    """
    weights = program.weights()
    weight_bytes = sum(4 * math.prod(w.shape) if dequantized else w.n_bytes for w in weights)
    buffer_bytes = 4 * max_tokens * sum(plan_slots(program)[1])
    page_bytes = PAGE_TOKENS * kv_bytes_per_token(program, kv_type)
    least = math.ceil(n_ctx / PAGE_TOKENS)
    n_pages = least * parallel
    if available is not None:
        left = int(available * HEADROOM) - weight_bytes - buffer_bytes
        if left < least * page_bytes:
            needed = weight_bytes + buffer_bytes + least * page_bytes
            raise ModelLoadError(
                f"the model needs {gigabytes(needed)} of memory (weights "
                f"{gigabytes(weight_bytes)}, buffers {gigabytes(buffer_bytes)}, {n_ctx} tokens of "
                f"context {gigabytes(least * page_bytes)}), but only {gigabytes(available)} are "
                "available",
                param="model")
        n_pages = min(n_pages, left // page_bytes) if page_bytes else n_pages
    return MemoryPlan(weight_bytes, buffer_bytes, page_bytes, n_pages)


def kv_bytes_per_token(program: Program, kv_type: str) -> int:
    n_values = sum(h.n_head_kv * (h.key_length + h.value_length) for h in program.kv)
    return KV_BYTES[kv_type] * n_values


def available_memory() -> int | None:
    """Bytes this process may still take, by the machine and its cgroup; None if unknown."""
    found = [_meminfo(MEMINFO), _cgroup_v1(CGROUP / "memory"), *map(_cgroup_v2, _own_cgroups())]
    return min((n for n in found if n is not None), default=None)


def _own_cgroups() -> list[Path]:
    """This process's folder of version 2 and those above it, each of which may have a limit."""
    own = [line.removeprefix("0::/") for line in _lines(PROC_CGROUP) if line.startswith("0::/")]
    folder = CGROUP / (own[0] if own else "")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(CGROUP))]


def _meminfo(path: Path) -> int | None:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _cgroup_v2(folder: Path) -> int | None:
    return _limit_left(folder / "memory.max", folder / "memory.current",
                       folder / "memory.stat", "inactive_file")


def _cgroup_v1(folder: Path) -> int | None:
    return _limit_left(folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes",
                       folder / "memory.stat", "total_inactive_file")


def _limit_left(limit: Path, usage: Path, stat: Path, reclaimable: str) -> int | None:
    """limit - usage + what the kernel would give back. No limit is "max" in v2, huge in v1."""
    limits, used = _lines(limit), _lines(usage)
    if not (limits and used and limits[0].isdigit() and used[0].isdigit()):
        return None
    cached = [int(line.split()[1]) for line in _lines(stat)
              if line.split()[:1] == [reclaimable]]
    return max(0, int(limits[0]) - int(used[0]) + sum(cached))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")
    except (OSError, UnicodeDecodeError):
        return []  # another system, or no limit of this kind


def gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
