"""Records what llama.cpp makes of the tiny models of `helpers_relatives`, in golden/relatives.npz.

Run by hand, by a Python that has llama-cpp-python, gguf and numpy. Not a test.
"""
import ctypes
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import llama_cpp as llama
import numpy as np

from helpers_relatives import PEER, ROWS, TOKENS, V, write_relative
from helpers_relatives_dense import DENSE
from helpers_relatives_mixed import MIXED


@contextmanager
def stepped(path: Path, tokens: np.ndarray, step: Callable, **params):
    """A context after one step of these tokens: float32 cache, no flash attention."""
    own = llama.llama_model_default_params()
    own.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), own)
    assert model, f"llama.cpp does not load {path.name}"
    own = llama.llama_context_default_params()
    own.n_ctx = own.n_batch = own.n_ubatch = 256
    own.n_threads = own.n_threads_batch = 1
    own.type_k = own.type_v = 0  # F32
    own.flash_attn_type = 0
    own.swa_full = True
    for name, value in params.items():
        setattr(own, name, value)
    context = llama.llama_init_from_model(model, own)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert step(context, batch) == 0
    yield context
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)


def logits_of(path: Path) -> np.ndarray:
    """float32 (T, V)."""
    with stepped(path, TOKENS, llama.llama_decode) as context:
        return np.stack([np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i),
                                               shape=(V,)).copy() for i in range(len(TOKENS))])


def record(file: Path, results: dict[str, Callable[[Path], np.ndarray]]) -> None:
    """By name, the result from a path at which a model's file may be made."""
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        np.savez_compressed(file, **{name: result(Path(folder) / f"{name}.gguf")
                                     for name, result in results.items()})


if __name__ == "__main__":
    record(PEER, {
        name: lambda path, name=name, one=one: logits_of(write_relative(path, name, one))[ROWS]
        for name, one in (MIXED | DENSE).items()})
