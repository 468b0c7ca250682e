"""From a GGUF file to a program: one row an architecture, the numbers from metadata and tensors."""
from functools import partial

from tinychat.errors import ModelFileError
from tinychat.gguf_file import GGUFFile
from tinychat.models import deepseek2, gemma4, llama, llama4, recurrent, single
from tinychat.models.config import ModelConfig, Use
from tinychat.models.experts import Experts
from tinychat.models.llama import Family
from tinychat.models.weights import Weights
from tinychat.ops.program import Program
from tinychat.ops.recorder import Recorder

__all__ = ["ARCHITECTURES", "ModelConfig", "build_program"]

_GEMMA3 = Family(norms="around", activation="gelu", window_period=6, local_base=10000.0,
                 local_is_scaled=False, root_scaled=True, wide_head_layers=62, both_ways=True)
_LATENT = Family(rope="adjacent", mixer=deepseek2.latent_attention,
                 experts=Experts(normalise=False))
_CLASSIFIER = tuple(f"cls.{name}" for name in (
    "weight", "bias", "norm.weight", "output.weight", "output.bias"))
_NEMOTRON_H = Family(activation="relu2", experts=Experts("sigmoid", normalise=False))

# GGUF name: what the files of a family do not say themselves
FAMILIES = {
    "arcee": Family(rope="adjacent", activation="relu2"),
    "bailingmoe": Family(rope="adjacent", experts=Experts(normalise=False)),
    "bailingmoe2": Family(experts=Experts("sigmoid", normalise=False)),
    "bert": Family(norms="added", rope="learned", activation="gelu_erf", ignored=_CLASSIFIER),
    "chatglm": Family(rope="adjacent"),
    "cohere2": Family(norms="beside", rope="adjacent", window_period=4, local_rope_only=True,
                      multiplied_logits=True),
    "command-r": Family(norms="beside", rope="adjacent", multiplied_logits=True),
    "deepseek": Family(rope="adjacent", experts=Experts(normalise=False)),
    "dots1": Family(experts=Experts("sigmoid", normalise=False)),
    "ernie4_5": Family(rope="adjacent"),
    "ernie4_5-moe": Family(rope="adjacent"),
    "eurobert": Family(),
    "exaone": Family(),
    "exaone4": Family(norms="after", window_period=4, local_rope_only=True),
    "exaone-moe": Family(window_period=4, default_window=128, local_rope_only=True,
                         experts=Experts("sigmoid", normalise=False)),
    "falcon": Family(norms="beside", activation="gelu_erf"),
    "falcon-h1": Family(mixer=recurrent.falcon_h1),
    "gemma": Family(activation="gelu", root_scaled=True),
    "gemma-embedding": _GEMMA3,
    "gemma2": Family(norms="around", activation="gelu", window_period=2, default_window=4096,
                     root_scaled=True, wide_head_layers=46),
    "gemma3": _GEMMA3,
    "glm4": Family(norms="around", rope="adjacent"),
    "glm4moe": Family(ffn_norm="post_attention_norm", experts=Experts("sigmoid")),
    "gpt-oss": Family(ffn_norm="post_attention_norm", window_period=2,
                      experts=Experts("chosen", activation="silu_clamped")),
    "gpt2": Family(rope="learned", activation="gelu"),
    "gptneox": Family(norms="told", activation="gelu_erf"),
    "granite": Family(rope="adjacent", rope_switch=True),
    "granitehybrid": Family(rope="adjacent", rope_switch=True, mixer=recurrent.granite_hybrid),
    "granitemoe": Family(rope="adjacent", rope_switch=True),
    "hunyuan-dense": Family(norm_after_rope=True),
    "hunyuan-moe": Family(norm_after_rope=True),
    "internlm2": Family(rope="adjacent"),
    "jina-bert-v3": Family(norms="added", activation="gelu_erf"),
    "lfm2": Family(mixer=recurrent.lfm2, output_norm="token_embd_norm", window_period=1),
    "lfm2moe": Family(mixer=recurrent.lfm2, output_norm="token_embd_norm",
                      experts=Experts("sigmoid")),
    "llama": Family(rope="adjacent"),
    "llama4": Family(rope="adjacent", no_rope_every=4, mixer=llama4.attention,
                     experts=Experts("sigmoid", normalise=False, weighted_inputs=True)),
    "minicpm": Family(rope="adjacent", scales_by_size=True),
    "minimax-m2": Family(experts=Experts("sigmoid")),
    "mistral3": Family(rope="adjacent"),
    "modern-bert": Family(bare_first=True, activation="gelu_erf", window_period=3,
                          global_first=True, told_activation=True, ignored=_CLASSIFIER),
    "nemotron": Family(activation="relu2"),
    "neo-bert": Family(rope="adjacent", output_norm="enc.output_norm", ignored=_CLASSIFIER),
    "nomic-bert": Family(norms="added"),
    "nomic-bert-moe": Family(norms="added", activation="gelu_erf",
                             experts=Experts(normalise=False)),
    "olmo": Family(rope="adjacent", output_norm=""),
    "olmo2": Family(norms="after", window_period=4, local_is_scaled=False),
    "olmoe": Family(experts=Experts(normalise=False)),
    "orion": Family(),
    "phi2": Family(norms="beside", activation="gelu"),
    "phi3": Family(window_period=1),
    "phimoe": Family(window_period=1),
    "qwen": Family(n_ff_parts=2),
    "qwen2": Family(),
    "qwen2moe": Family(experts=Experts(normalise=False)),
    "qwen2vl": Family(axes="blocks"),
    "qwen3": Family(),
    "qwen35": Family(ffn_norm="post_attention_norm", axes="interleaved", mixer=recurrent.qwen35),
    "qwen35moe": Family(ffn_norm="post_attention_norm", axes="interleaved",
                        mixer=recurrent.qwen35),
    "qwen3moe": Family(),
    "qwen3next": Family(ffn_norm="post_attention_norm", mixer=recurrent.qwen3_next),
    "qwen3vl": Family(axes="interleaved"),
    "qwen3vlmoe": Family(axes="interleaved"),
    "seed_oss": Family(ffn_norm="post_attention_norm"),
    "smollm3": Family(rope="adjacent", no_rope_every=4),
    "stablelm": Family(norms="found"),
    "starcoder": Family(rope="learned", activation="gelu"),
    "starcoder2": Family(activation="gelu"),
    "xverse": Family(rope="adjacent"),
}
ENCODERS = {"gemma-embedding"}  # also where the file does not say so

# GGUF name: describe(g, weights, config) -> the result
ARCHITECTURES = {
    **{name: partial(llama.describe, family=family) for name, family in FAMILIES.items()},
    "deepseek2": partial(deepseek2.describe, family=_LATENT),
    "gemma4": gemma4.describe,
    "mamba2": partial(single.describe, family=Family()),
    "nemotron_h": partial(single.describe, family=_NEMOTRON_H),
    "nemotron_h_moe": partial(single.describe, family=_NEMOTRON_H),
}


def build_program(file: GGUFFile, *, n_ctx: int | None = None, hidden: bool = False,
                  sees: bool = False) -> Program:
    """The program of an open model; its weights are the file's own tensors.

    n_ctx: the context it will be used with, None: the trained length. hidden: the result is the
    last hidden state (T, n_embd), not logits, and each text comes whole, in one step. sees: images
    may stand in prompts.
    Raises: ModelFileError for an unknown architecture, a metadata key that is missing or absurd,
    and a tensor that is missing, misshapen or of no use.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        raise ModelFileError(f"architecture {name!r} is not supported; "
                             f"known are {', '.join(sorted(ARCHITECTURES))}")
    use = Use(n_ctx or 0, hidden, sees)
    config = ModelConfig.from_metadata(file.metadata, use, is_encoder=name in ENCODERS)
    weights, g = Weights(file.tensors), Recorder(keeps_kv=config.causal and not hidden)
    result = ARCHITECTURES[name](g, weights, config)
    weights.ignore_layers(range(config.n_layer, config.n_layer + config.n_ahead))
    weights.check_all_asked(name)
    return g.finish(name, result)
