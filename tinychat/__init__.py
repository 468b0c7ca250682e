"""tinychat: a chat server that a Python program can carry inside itself.

    with tinychat.load("smollm2-135m-instruct") as model:
        print(model.chat("What is the capital of France?")["output"][0]["content"])
"""
from typing import TYPE_CHECKING

from tinychat import errors
from tinychat.errors import TinychatError

if TYPE_CHECKING:
    from tinychat.api import Model, load, load_tokenizer, parse_output, render, serve

__version__ = "0.1.0"
__all__ = ["Model", "TinychatError", "errors", "load", "load_tokenizer", "parse_output", "render",
           "serve"]

_FROM_API = ("Model", "load", "load_tokenizer", "parse_output", "render", "serve")


def __getattr__(name: str):
    """Names of tinychat.api, imported when first asked for: `import tinychat` costs nothing."""
    if name in _FROM_API:
        from tinychat import api
        return getattr(api, name)
    raise AttributeError(f"module 'tinychat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM_API})
