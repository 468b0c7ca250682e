"""Tiny dense models with random weights, of families that have no golden file of their own.

They are made here, the same on every machine, as llama.cpp's converter writes such files, in
float32. `golden/families.npz` has, by their names, what llama.cpp made of them (llama-cpp-python
0.3.36: float32 weights and cache, one step, no flash attention): the logits of some of TOKENS, or
the hidden states of encoders.
"""
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

EXPECTED = Path(__file__).parent / "golden" / "families.npz"
TOKENS = np.random.RandomState(7).randint(0, 96, 48).astype(np.int32)
ROWS = np.array([0, 19, 47])  # whose results are kept

V, E, L, F = 96, 48, 4, 64
H, HKV, D = 4, 2, 16

# of four heads, wider together than the embedding
WIDE = {"block_count": L, "context_length": 512, "embedding_length": E, "feed_forward_length": F,
        "attention.head_count": H, "attention.head_count_kv": HKV, "attention.key_length": D,
        "attention.value_length": D, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0, "rope.dimension_count": D, "vocab_size": V}
# of three heads, as wide as it, that share one of keys
ONE = WIDE | {"attention.head_count": 3, "attention.head_count_kv": 1}
THREE = ONE | {"attention.head_count_kv": 3}
WINDOW = {"attention.sliding_window": 16}
AROUND = ("post_attention_norm", "post_ffw_norm")


def mean(keys: dict, **more) -> dict:
    """With norms that take the mean off. more: keys of rope, by their last names."""
    own = {name: value for name, value in keys.items() if "rms_epsilon" not in name}
    return own | {"attention.layer_norm_epsilon": 1e-5} | {f"rope.{k}": v for k, v in more.items()}


def split(keys: dict, *, head_norms=False, bias=False) -> dict:
    """Queries, keys and values in matrices of their own."""
    n_q, n_kv = keys["attention.head_count"] * D, keys["attention.head_count_kv"] * D
    shapes = {"attn_output.weight": (E, n_q)}
    for name, n in (("q", n_q), ("k", n_kv), ("v", n_kv)):
        shapes[f"attn_{name}.weight"] = (n, E)
        if bias:
            shapes[f"attn_{name}.bias"] = (n,)
    if head_norms:
        shapes |= {"attn_q_norm.weight": (D,), "attn_k_norm.weight": (D,)}
    return shapes


def fused(keys: dict) -> dict:
    n_q, n_kv = keys["attention.head_count"] * D, keys["attention.head_count_kv"] * D
    return {"attn_qkv.weight": (n_q + 2 * n_kv, E), "attn_output.weight": (E, n_q)}


GATED = {"ffn_gate.weight": (F, E), "ffn_up.weight": (F, E), "ffn_down.weight": (E, F)}
FUSED = {"ffn_up.weight": (2 * F, E), "ffn_down.weight": (E, F)}
PLAIN = {"ffn_up.weight": (F, E), "ffn_down.weight": (E, F)}


def layer(attention: dict, ffn: dict, *norms: str, bias="") -> dict:
    """bias: of "norms", or of "all"."""
    shapes = attention | ffn | {f"{name}.weight": (E,) for name in norms}
    if bias:
        shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items()
                   if name.endswith(".weight") and (bias == "all" or "norm" in name)}
    return shapes


def model(layers: list[dict], *, output=True, **more) -> dict:
    """Tensors of a whole model; more: others, by names with __ for a dot."""
    shapes = {"token_embd.weight": (V, E), "output_norm.weight": (E,)}
    if output:
        shapes["output.weight"] = (V, E)
    for i, tensors in enumerate(layers):
        shapes.update({f"blk.{i}.{name}": shape for name, shape in tensors.items()})
    return shapes | {name.replace("__", "."): shape for name, shape in more.items()}


BIASED = {"output_norm__bias": (E,)}
POSITIONS = {"position_embd__weight": (512, E)}
BEFORE = ("attn_norm", "ffn_norm")


def usual(keys: dict, *, output=True, **given) -> dict:
    return model([layer(split(keys, **given), GATED, *BEFORE)] * L, output=output)


def longrope(n_ctx_orig: int) -> tuple[str, dict, dict]:
    keys = ONE | {"rope.dimension_count": 8, "rope.scaling.type": "longrope",
                  "rope.scaling.original_context_length": n_ctx_orig,
                  "rope.scaling.attn_factor": 1.19}
    return "phi3", keys, model([layer(fused(ONE), FUSED, *BEFORE)] * L, output=False,
                               rope_factors_long__weight=(4,), rope_factors_short__weight=(4,))


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}
GEMMA = [layer(split(WIDE, head_norms=True), GATED, *BEFORE, *AROUND)] * 7
AFTER = layer(split(ONE) | {"attn_q_norm.weight": (E,), "attn_k_norm.weight": (D,)}, GATED, *AROUND)
EXAONE4 = layer(split(ONE, head_norms=True), GATED, *AROUND)
NEOX = model([layer(fused(THREE), PLAIN, *BEFORE, bias="all")] * L, **BIASED)

# name: (GGUF architecture, its keys, its tensors)
FAMILIES = {
    "arcee": ("arcee", WIDE, model([layer(split(WIDE), PLAIN, *BEFORE)] * L)),
    "chatglm": ("chatglm", ONE | {"rope.dimension_count": 8}, model(
        [layer(fused(ONE) | {"attn_qkv.bias": (E + 2 * D,)}, FUSED, *BEFORE)] * L)),
    "cohere2": ("cohere2", mean(ONE) | WINDOW | {"logit_scale": 0.25}, model(
        [layer(split(ONE), GATED, "attn_norm")] * L, output=False)),
    "command-r": ("command-r", mean(ONE) | {"logit_scale": 0.5}, model(
        [layer(split(ONE), GATED, "attn_norm")] * L, output=False)),
    "ernie4_5": ("ernie4_5", WIDE, usual(WIDE, output=False)),
    "exaone": ("exaone", WIDE, usual(WIDE) | {"rope_freqs.weight": (D // 2,)}),
    "exaone4": ("exaone4", ONE, model([EXAONE4] * L)),
    "exaone4-windows": ("exaone4", ONE | WINDOW | {
        "block_count": 64, "attention.sliding_window_pattern": 4}, model([EXAONE4] * 64)),
    "falcon": ("falcon", mean(ONE), model(
        [layer(fused(ONE), PLAIN, "attn_norm", bias="norms")] * L, **BIASED)),
    "falcon-40b": ("falcon", mean(ONE), model(
        [layer(fused(ONE), PLAIN, "attn_norm", "attn_norm_2", bias="norms")] * L, output=False,
        **BIASED)),
    "gemma": ("gemma", WIDE, usual(WIDE, output=False)),
    "gemma2": ("gemma2", WIDE | WINDOW | {"attn_logit_softcapping": 5.0,
                                          "final_logit_softcapping": 3.0},
               model([layer(split(WIDE), GATED, *BEFORE, *AROUND)] * L, output=False)),
    "gemma3": ("gemma3", WIDE | WINDOW | {
        "block_count": 7, "rope.freq_base": 1e5, "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0}, model(GEMMA, output=False)),
    "glm4": ("glm4", WIDE | {"rope.dimension_count": 8}, model(
        [layer(split(WIDE, bias=True), FUSED, *BEFORE, *AROUND)] * L)),
    "gpt2": ("gpt2", mean(THREE), model(
        [layer(fused(THREE), PLAIN, *BEFORE, bias="all")] * L, **BIASED, **POSITIONS)),
    "gptneox": ("gptneox", mean(THREE, dimension_count=4) | {"use_parallel_residual": False}, NEOX),
    "gptneox-beside": ("gptneox", mean(THREE, dimension_count=4) | {
        "use_parallel_residual": True}, NEOX),
    "hunyuan-dense": ("hunyuan-dense", WIDE, usual(WIDE, output=False, head_norms=True)),
    "internlm2": ("internlm2", ONE, usual(ONE)),
    "llama-linear": ("llama", WIDE | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
                     usual(WIDE) | {"rope_freqs.weight": (D // 2,)}),
    "minicpm": ("minicpm", WIDE | {"embedding_scale": 3.0, "residual_scale": 0.5,
                                   "logit_scale": 2.0}, usual(WIDE)),
    "mistral3": ("mistral3", WIDE | YARN | {
        "rope.scaling.original_context_length": 16, "rope.scaling.yarn_log_multiplier": 1.0,
        "rope.scaling.yarn_beta_fast": 8.0, "attention.temperature_scale": 0.1}, usual(WIDE)),
    "nemotron": ("nemotron", mean(ONE, dimension_count=8), model(
        [layer(split(ONE), PLAIN, *BEFORE, bias="norms")] * L, **BIASED)),
    "olmo": ("olmo", mean(THREE), {name: shape for name, shape in usual(THREE).items()
                                   if "norm" not in name}),
    "olmo2": ("olmo2", ONE, model([AFTER] * L)),
    "olmo3": ("olmo2", ONE | WINDOW | YARN | {
        "attention.sliding_window_pattern": [True, True, True, False],
        "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.2},
        model([AFTER] * L)),
    "orion": ("orion", mean(THREE), model(
        [layer(split(THREE), GATED, *BEFORE, bias="norms")] * L, **BIASED)),
    "phi2": ("phi2", mean(THREE, dimension_count=8), model(
        [layer(fused(THREE), PLAIN, "attn_norm", bias="all")] * L, output__bias=(V,), **BIASED)),
    "phi3-long": longrope(64),
    "phi3-short": longrope(512),
    "qwen": ("qwen", THREE | {"feed_forward_length": 2 * F}, model(
        [layer(fused(THREE) | {"attn_qkv.bias": (3 * E,)}, GATED, *BEFORE)] * L)),
    "qwen2vl": ("qwen2vl", ONE | {"rope.dimension_sections": [2, 3, 3, 0]}, usual(ONE, bias=True)),
    "qwen3vl": ("qwen3vl", WIDE | {"rope.dimension_sections": [3, 3, 2, 0]},
                usual(WIDE, head_norms=True)),
    "seed_oss": ("seed_oss", WIDE, model([layer(
        split(WIDE, bias=True), GATED, "attn_norm", "post_attention_norm")] * L)),
    "smollm3": ("smollm3", WIDE, usual(WIDE, output=False)),
    "stablelm": ("stablelm", mean(THREE, dimension_count=4) | {"use_parallel_residual": False},
                 model([layer(split(THREE), GATED, *BEFORE, bias="norms")
                        | {f"attn_{name}.bias": (E,) for name in "qkv"}] * L, **BIASED)),
    "stablelm-12b": ("stablelm", mean(ONE, dimension_count=4) | {"use_parallel_residual": True},
                     model([layer(split(ONE), GATED, "attn_norm", bias="norms") | {
                         "attn_q_norm.weight": (3, D), "attn_k_norm.weight": (1, D)}] * L,
                         **BIASED)),
    "starcoder": ("starcoder", mean(ONE), model(
        [layer(fused(ONE), PLAIN, *BEFORE, bias="all")] * L, **BIASED, **POSITIONS)),
    "starcoder2": ("starcoder2", mean(ONE), model(
        [layer(split(ONE), PLAIN, *BEFORE, bias="all")] * L, output=False, **BIASED)),
    "xverse": ("xverse", THREE, usual(THREE)),
}

ADDED = {f"{name}_output_norm.{kind}": (E,) for name in ("attn", "layer")
         for kind in ("weight", "bias")}
BERT_EMBEDDING = {"token_types.weight": (2, E), "token_embd_norm.weight": (E,),
                  "token_embd_norm.bias": (E,)}
BERT = mean(THREE) | {"attention.causal": False, "pooling_type": 0}


def encoder(layers: list[dict], more: dict) -> dict:
    shapes = model(layers, output=False)
    return {name: shape for name, shape in shapes.items() if name != "output_norm.weight"} | more


MODERN = [layer(fused(THREE), FUSED, *(("ffn_norm",) if i == 0 else BEFORE)) for i in range(7)]

ENCODERS = {
    "bert": ("bert", BERT, encoder([layer(split(THREE), PLAIN, bias="all") | ADDED] * L, {
        **BERT_EMBEDDING, "position_embd.weight": (512, E)})),
    "nomic-bert": ("nomic-bert", BERT, encoder([layer(fused(THREE), GATED) | ADDED] * L,
                                               BERT_EMBEDDING)),
    "modern-bert": ("modern-bert", BERT | {
        "block_count": 7, "attention.sliding_window": 9, "rope.freq_base": 160000.0,
        "rope.freq_base_swa": 10000.0}, encoder(MODERN, {
            "token_embd_norm.weight": (E,), "output_norm.weight": (E,)})),
    "gemma-embedding": ("gemma-embedding", WIDE | WINDOW | {
        "block_count": 7, "rope.freq_base": 1e6, "pooling_type": 0}, model(GEMMA, output=False)),
}


def values(rng: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms near 1, matrices that keep a row's size, positive divisors of frequencies."""
    x = rng.standard_normal(shape).astype(np.float32)
    if name.startswith("rope_f"):
        return 1 + 3 * np.abs(x)
    if "norm" in name and not name.endswith(".bias"):
        return 1 + np.float32(0.3) * x
    if name.endswith(".bias"):
        return np.float32(0.2) * x
    if "embd" in name:
        return x
    return x * np.float32(1.2 / np.sqrt(shape[-1]))


def write_family(path: Path, name: str, family: tuple[str, dict, dict] | None = None) -> Path:
    """The file of that family, or of that name in FAMILIES or ENCODERS."""
    arch, keys, shapes = family or (FAMILIES | ENCODERS)[name]
    rng = np.random.RandomState(sum(name.encode()))
    writer = GGUFWriter(path, arch)
    writer.add_string("tokenizer.ggml.model", "none")
    writer.add_uint32("tokenizer.ggml.token_type_count", 2)
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
           str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        add[type(value)](f"{arch}.{key}", value)
    for tensor, shape in shapes.items():
        writer.add_tensor(tensor, values(rng, tensor, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
