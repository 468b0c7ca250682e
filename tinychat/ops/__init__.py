"""Operations, the recorder, and the executors that run a recorded program."""
import logging
import os

from tinychat.errors import KernelError

log = logging.getLogger(__name__)

KINDS = ("native", "reference")


def open_executor(program, *, kind: str | None = None, **limits):
    """An executor of `program`: kind "native" or "reference", None for the best there is here.

    limits: n_pages, max_tokens, max_outputs, max_sequences, kv_type, threads, isa, as
    `ReferenceExecutor` takes them. Without kernels, and under TINYCHAT_PURE=1, the best is the
    reference, and one warning says so.
    Raises: KernelError when the asked kind is not there, ModelFileError for unreadable weights.
    """
    if kind not in (None, *KINDS):
        raise KernelError(f"expected executor {' or '.join(KINDS)}, got {kind!r}")
    if kind is None and (reason := why_reference()):
        log.warning("running on NumPy, many times slower and in float32 (%s)", reason)
        kind = "reference"
    if kind == "reference":
        from tinychat.ops.reference import ReferenceExecutor
        return ReferenceExecutor(program, **limits)
    if reason := _why_no_kernels():
        raise KernelError(f"the native executor is not available ({reason})")
    from tinychat.ops.native import NativeExecutor
    return NativeExecutor(program, **limits)


def why_reference() -> str | None:
    """Why the best executor here is the reference; None where it is the native one."""
    return "TINYCHAT_PURE=1" if os.environ.get("TINYCHAT_PURE") == "1" else _why_no_kernels()


def _why_no_kernels() -> str | None:
    try:
        import tinychat.ops.native  # noqa: F401 - whether it can be had is all that is asked
    except ImportError as error:
        return f"no compiled kernels: {error}"
    return None
