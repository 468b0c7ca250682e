"""How much memory a model will take, and whether the machine has it: known before the load."""
import math
from dataclasses import dataclass, replace
from pathlib import Path

from tinychat.engine.window_pages import n_window_pages_for
from tinychat.errors import ModelLoadError
from tinychat.ops.program import KV_BYTES, PAGE_TOKENS, Program, plan_slots

SNAPSHOTS = 2         # of recurrent states that are kept for each request that may run
HEADROOM = 0.95       # share of the available memory that a load may plan for
CGROUP = Path("/sys/fs/cgroup")
MEMINFO, PROC_CGROUP = Path("/proc/meminfo"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes and numbers. n_pages: of PAGE_TOKENS positions each, for the layers that see all of
    them; n_window_pages: for those with a reach; n_states: places for recurrent states."""

    weight_bytes: int
    buffer_bytes: int
    page_bytes: int
    n_pages: int
    window_page_bytes: int = 0
    n_window_pages: int = 0
    state_bytes: int = 0
    n_states: int = 0

    @property
    def fixed_bytes(self) -> int:
        """All but the KV pages."""
        return (self.weight_bytes + self.buffer_bytes + self.n_states * self.state_bytes
                + self.n_window_pages * self.window_page_bytes)

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.n_pages * self.page_bytes


def plan_memory(program: Program, *, n_ctx: int, parallel: int, max_tokens: int,
                kv_type: str = "f16", dequantized: bool = False, extra_bytes: int = 0,
                spare_pages: int = 0, available: int | None = None) -> MemoryPlan:
    """A KV pool in which `parallel` sequences of `n_ctx` tokens fit, or what memory allows.

    The pool never has fewer pages than one full context: with less the load is refused. Sequences
    that do not fit at the same time wait for pages; they are never dropped.
    dequantized: weights become float32 (the reference executor). extra_bytes: taken besides.
    spare_pages: beside those of one full context.
    available: bytes that may be used; None when the machine does not tell.
    Raises: ModelLoadError with both figures.
    """
    least = math.ceil(n_ctx / PAGE_TOKENS) + spare_pages
    plan = MemoryPlan(
        weight_bytes=extra_bytes + _weight_bytes(program, dequantized),
        buffer_bytes=_buffer_bytes(program, max_tokens),
        page_bytes=PAGE_TOKENS * kv_bytes_per_token(program, kv_type, with_reach=False),
        n_pages=least * parallel,
        window_page_bytes=PAGE_TOKENS * kv_bytes_per_token(program, kv_type, with_reach=True),
        n_window_pages=_window_pages(program, n_ctx, parallel, max_tokens),
        state_bytes=4 * sum(program.states),
        n_states=1 + (1 + SNAPSHOTS) * parallel if program.states else 0)
    if available is None:
        return plan
    left = int(available * HEADROOM) - plan.fixed_bytes
    if left < least * plan.page_bytes:
        context = least * plan.page_bytes + plan.n_window_pages * plan.window_page_bytes
        raise ModelLoadError(
            f"the model needs {gigabytes(plan.fixed_bytes + least * plan.page_bytes)} of memory "
            f"(weights {gigabytes(plan.weight_bytes)}, buffers {gigabytes(plan.buffer_bytes)}, "
            f"{n_ctx} tokens of context {gigabytes(context)}, recurrent states "
            f"{gigabytes(plan.n_states * plan.state_bytes)}), but only {gigabytes(available)} are "
            "available", param="model")
    return replace(plan, n_pages=min(plan.n_pages, left // plan.page_bytes)
                   if plan.page_bytes else plan.n_pages)


def bytes_without_context(program: Program, max_tokens: int, dequantized: bool) -> int:
    """Of a program whose steps stand alone, as a vision tower's do: its KV is that of one step."""
    return (_weight_bytes(program, dequantized) + _buffer_bytes(program, max_tokens)
            + max_tokens * kv_bytes_per_token(program, "f32"))


def _weight_bytes(program: Program, dequantized: bool) -> int:
    return sum(4 * math.prod(w.shape) if dequantized else w.n_bytes for w in program.weights())


def _buffer_bytes(program: Program, max_tokens: int) -> int:
    return 4 * max_tokens * sum(plan_slots(program)[1])


def _window_pages(program: Program, n_ctx: int, parallel: int, max_tokens: int) -> int:
    """Those that may be needed at once, and as much again for chats that are idle."""
    if not program.window:
        return 0
    needed = n_window_pages_for(program.window, n_sequences=parallel + 1, max_tokens=max_tokens)
    return max(needed, min(2 * needed, parallel * math.ceil(n_ctx / PAGE_TOKENS)))


def kv_bytes_per_token(program: Program, kv_type: str, with_reach: bool | None = None) -> int:
    """Of all layers, or of those with or without a reach."""
    n_values = sum(h.n_head_kv * (h.key_length + h.value_length) for h in program.kv
                   if with_reach is None or with_reach == (h.reach > 0))
    return math.ceil(KV_BYTES[kv_type] * n_values)


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
