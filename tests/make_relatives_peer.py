"""Records what llama.cpp makes of the tiny models of `helpers_relatives`, in golden/relatives.npz.

Run by hand, by a Python that has llama-cpp-python, gguf and numpy. Not a test.
"""
import ctypes
import tempfile
from pathlib import Path

import llama_cpp as llama
import numpy as np

from helpers_relatives import PEER, ROWS, TOKENS, E, V, write_relative
from helpers_relatives_dense import DENSE
from helpers_relatives_encoders import ENCODERS
from helpers_relatives_mixed import MIXED


def result_of(path: Path, is_encoder: bool) -> np.ndarray:
    """float32 (T, V) or (T, E): float32 cache, one step, no flash attention."""
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp does not load {path.name}"
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # F32
    params.flash_attn_type = 0
    params.swa_full = True
    params.embeddings, params.pooling_type = is_encoder, 0
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for i, token in enumerate(TOKENS):
        batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    run, row, width = (llama.llama_encode, llama.llama_get_embeddings_ith, E) if is_encoder else \
        (llama.llama_decode, llama.llama_get_logits_ith, V)
    assert run(context, batch) == 0
    rows = [np.ctypeslib.as_array(row(context, i), shape=(width,)).copy()
            for i in range(len(TOKENS))]
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return np.stack(rows)


def main() -> None:
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: result_of(write_relative(Path(folder) / f"{name}.gguf", name, relative),
                                 name in ENCODERS)
                 for name, relative in (MIXED | DENSE | ENCODERS).items()}
    np.savez_compressed(PEER, **{name: logits[ROWS] for name, logits in found.items()})


if __name__ == "__main__":
    main()
