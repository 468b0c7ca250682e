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
    native = None if kind == "reference" else _native(required=kind == "native")
    if native:
        return native(program, **limits)
    from tinychat.ops.reference import ReferenceExecutor
    return ReferenceExecutor(program, **limits)


def _native(required: bool):
    """The native executor's class, or None with a warning when it is not there."""
    if os.environ.get("TINYCHAT_PURE") == "1" and not required:
        reason = "TINYCHAT_PURE=1"
    else:
        try:
            from tinychat.ops.native import NativeExecutor
            return NativeExecutor
        except ImportError as error:
            reason = f"no compiled kernels: {error}"
    if required:
        raise KernelError(f"the native executor is not available ({reason})")
    log.warning("running on NumPy, many times slower and in float32 (%s)", reason)
    return None
