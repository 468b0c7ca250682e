"""Records llama.cpp's vectors of the models of `helpers_embedders`, in golden/embedders.npz.

Run by hand, by a Python that has llama-cpp-python, gguf and numpy. Not a test.
"""
from pathlib import Path

import llama_cpp as llama
import numpy as np

from helpers_embedders import EMBEDDERS, VECTORS
from helpers_relatives import TOKENS, E, write_relative
from make_relatives_peer import record, stepped


def vector_of(path: Path) -> np.ndarray:
    """float32 (E,): pooled as the file says, not normalised."""
    with stepped(path, TOKENS, llama.llama_encode, embeddings=True, pooling_type=-1) as context:
        vector = llama.llama_get_embeddings_seq(context, 0)
        return np.ctypeslib.as_array(vector, shape=(E,)).copy()


if __name__ == "__main__":
    record(VECTORS, {name: lambda path, name=name, one=one: vector_of(
        write_relative(path, name, one)) for name, one in EMBEDDERS.items()})
