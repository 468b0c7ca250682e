"""Writes tests/golden/vision-peer.npz: what llama.cpp makes of the random towers of helpers_vision.

Run by hand, by a Python that has llama-cpp-python, with two text models of 64 values a token, one
of which has M-RoPE: make_vision_peer.py MODEL M-ROPE-MODEL. Not a test.
"""
import ctypes
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from helpers_vision import PEER_CASES, Maker, picture
from llama_cpp import mtmd_cpp as mtmd

IMAGE_CHUNK = 1


def encode(mmproj: Path, model: str, pixels: np.ndarray) -> np.ndarray:
    """float32 (n, n_embd) of all image tokens, in order."""
    text_model = llama_cpp.llama_model_load_from_file(
        model.encode(), llama_cpp.llama_model_default_params())
    params = mtmd.mtmd_context_params_default()
    params.use_gpu, params.warmup, params.flash_attn_type = False, False, 0
    context = mtmd.mtmd_init_from_file(str(mmproj).encode(), text_model, params)
    bitmap = mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0],
                                   pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    marker = mtmd.mtmd_get_marker(context)
    text = mtmd.mtmd_input_text(marker, len(marker), False, True)
    chunks = mtmd.mtmd_input_chunks_init()
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
    width, rows = llama_cpp.llama_model_n_embd(text_model), []
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, i)
        if mtmd.mtmd_input_chunk_get_type(chunk) == IMAGE_CHUNK:
            assert mtmd.mtmd_encode_chunk(context, chunk) == 0
            n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            values = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (n * width,))
            rows.append(values.reshape(n, width).copy())
    return np.concatenate(rows)


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, how, size) in PEER_CASES.items():
            path = Path(folder, f"{name}.gguf")
            Maker(path, kind, class_last=True, **how)
            model = sys.argv[2] if kind.startswith("qwen") else sys.argv[1]
            found[name] = encode(path, model, picture(*size))
    np.savez_compressed(Path(__file__).parent / "golden" / "vision-peer.npz", **found)


if __name__ == "__main__":
    main()
