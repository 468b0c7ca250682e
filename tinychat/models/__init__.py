"""From a GGUF file to a program: one row an architecture, the numbers from metadata and tensors."""
from functools import partial

from tinychat.errors import ModelFileError
from tinychat.gguf_file import GGUFFile
from tinychat.models import llama
from tinychat.models.config import ModelConfig
from tinychat.models.layers import Weights
from tinychat.ops.program import Program
from tinychat.ops.recorder import Recorder

__all__ = ["ARCHITECTURES", "ModelConfig", "build_program"]

# GGUF name: describe(g, weights, config) -> logits, with what the file itself does not say
ARCHITECTURES = {
    "granite": partial(llama.describe, rope_layout="adjacent", rope_switch=True),
    "llama": partial(llama.describe, rope_layout="adjacent"),
    "qwen2": partial(llama.describe, rope_layout="halves"),
    "qwen3": partial(llama.describe, rope_layout="halves"),
}


def build_program(file: GGUFFile) -> Program:
    """The program of an open model; its weights are the file's own tensors.

    Raises: ModelFileError for an unknown architecture, a metadata key that is missing or absurd,
    and a tensor that is missing, misshapen or of no use.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        raise ModelFileError(f"architecture {name!r} is not supported; "
                             f"known are {', '.join(sorted(ARCHITECTURES))}")
    config = ModelConfig.from_metadata(file.metadata)
    weights, g = Weights(file.tensors), Recorder()
    logits = ARCHITECTURES[name](g, weights, config)
    weights.check_all_asked(name)
    return g.finish(name, logits)
