"""Every error a caller of tinychat may catch.

`type`, `code` and `param` are the words of the HTTP contract; the handler alone turns them into
a status code. A message says what was expected, what came, and where.
"""
import logging


class TinychatError(Exception):
    """An error with a message for people and the contract's words for programs."""

    type = "internal_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, type: str | None = None, code: str | None = None,
                 param: str | None = None):
        super().__init__(message)
        self.message = message
        self.type = type or self.type
        self.code = code or self.code
        self.param = param

    def to_json(self) -> dict:
        """The contract's error object: absent fields are left out, never null."""
        fields = {"type": self.type, "message": self.message[:4096] or "unknown error",
                  "code": self.code, "param": self.param}
        return {name: value for name, value in fields.items() if value is not None}


def known(error: Exception, log: logging.Logger, what: str) -> TinychatError:
    """The error itself; in place of a fault of ours, which the log gets, one without particulars."""
    if isinstance(error, TinychatError):
        return error
    log.error("%s failed", what, exc_info=error)
    return TinychatError("an internal error; the server's log has it")


class InvalidRequest(TinychatError):
    """The request breaks the contract; `param` is the dotted path of the offending field."""

    type = "invalid_request"
    code = "invalid_value"


class ModelNotFound(TinychatError):
    type = "model_not_found"
    code = "model_not_found"


class JobNotFound(TinychatError):
    type = "job_not_found"
    code = "job_not_found"


class ModelFileError(TinychatError):
    """A model file is malformed or of a kind this build cannot run."""

    code = "model_load_failed"


class ModelLoadError(TinychatError):
    """A well-formed model cannot be loaded: no memory, no executor, unloaded meanwhile."""

    code = "model_load_failed"


class ContextOverflow(TinychatError):
    type = "invalid_request"
    code = "context_length_exceeded"


class TemplateError(TinychatError):
    """The model's chat template is missing, broken, or refused the conversation."""


class Overloaded(TinychatError):
    """The queue is full or the engine is shutting down."""

    code = "server_overloaded"


class NotImplementedYet(TinychatError):
    """A part of the API that this build lacks."""

    type = "not_implemented"
    code = "not_implemented"


class KernelError(TinychatError):
    """The native kernels refused their arguments or are not there."""
