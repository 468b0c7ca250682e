"""Tiny models of dense families; see `helpers_relatives`."""
from helpers_relatives import D, E, FFN_NORM, L, THREE_HEADS, V, attention, dense, model, square

LAYER_NORM = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5}
ONE_KV = THREE_HEADS | {"attention.head_count_kv": 1}
LAYER_ONE_KV, LAYER_THREE = LAYER_NORM | ONE_KV, LAYER_NORM | THREE_HEADS
POST = {"post_attention_norm.weight": (E,), "post_ffw_norm.weight": (E,)}
ATTN_NORM = {"attn_norm.weight": (E,)}
TWO_BIASED = {"attn_norm.bias": (E,), "ffn_norm.bias": (E,)}
LAST_BIASED = {"output_norm.bias": (E,)}
QKV_BIASES = {"attn_q.bias": (E,), "attn_k.bias": (D,), "attn_v.bias": (D,)}
OWN_HEAD_NORMS = {"attn_q_norm.weight": (3, D), "attn_k_norm.weight": (1, D)}
GATE_IN_UP = {"ffn_up.weight": (128, E), "ffn_down.weight": (E, 64)}
WINDOW = {"attention.sliding_window": 16,
          "attention.sliding_window_pattern": [True] * (L - 1) + [False]}


def biased(shapes: dict) -> dict:
    """With a bias for every matrix and norm."""
    return shapes | {name.replace(".weight", ".bias"): shape[:1]
                     for name, shape in shapes.items()}


def layers(layer: dict, *, n=L, output=True, **more) -> dict:
    return model([layer] * n, output=output, **more)


def fused(n_kv: int) -> dict:
    """Attention of 3 heads and n_kv of keys, their matrices in one."""
    return {"attn_qkv.weight": ((3 + 2 * n_kv) * D, E), "attn_output.weight": (E, E)}


def after(norms: dict) -> dict:
    """A block of norms behind its branches."""
    block = square(1) | norms | POST | dense()
    del block["attn_norm.weight"]
    return block


POSITIONS = LAST_BIASED | {"position_embd.weight": (512, E)}
GPT = biased(ATTN_NORM | FFN_NORM | fused(3) | dense(gated=False))
PHI3 = layers(ATTN_NORM | fused(1) | FFN_NORM | GATE_IN_UP)
FALCON = LAYER_ONE_KV | {"feed_forward_length": 4 * E}
FALCON_REST = fused(1) | dense(n=4 * E, gated=False)
OLMO2 = layers(after({"attn_q_norm.weight": (E,), "attn_k_norm.weight": (D,)}))
PLAIN = attention() | FFN_NORM | dense()

EXAONE4 = after({"attn_q_norm.weight": (D,), "attn_k_norm.weight": (D,)})
LONGROPE = {f"rope_factors_{name}.weight": (D // 2,) for name in ("long", "short")}


def longrope(n_ctx_orig: int) -> dict:
    return ONE_KV | {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.19,
                     "rope.scaling.original_context_length": n_ctx_orig}


# name: (GGUF architecture, its keys beyond BASE, its tensors)
DENSE = {
    "arcee": ("arcee", {}, layers(attention() | FFN_NORM | dense(gated=False))),
    "chatglm": ("chatglm", ONE_KV | {"rope.dimension_count": 8},
                layers(ATTN_NORM | fused(1) | {"attn_qkv.bias": (80,)} | FFN_NORM | GATE_IN_UP)),
    "command-r": ("command-r", LAYER_ONE_KV | {"logit_scale": 0.0625},
                  layers(square(1) | dense(), output=False)),
    "ernie4_5": ("ernie4_5", {}, layers(PLAIN, output=False)),
    "exaone": ("exaone", {}, layers(PLAIN)),
    "exaone4": ("exaone4", ONE_KV, layers(EXAONE4)),
    # llama.cpp reads the window of files of 64 layers only
    "exaone4-windows": ("exaone4", ONE_KV | {"block_count": 64, "attention.sliding_window": 16},
                        layers(EXAONE4, n=64)),
    "falcon": ("falcon", FALCON, layers(biased(ATTN_NORM) | FALCON_REST, **LAST_BIASED)),
    "falcon-40b": ("falcon", FALCON, layers(
        biased(ATTN_NORM | {"attn_norm_2.weight": (E,)}) | FALCON_REST, **LAST_BIASED)),
    "gemma": ("gemma", {}, layers(PLAIN, output=False)),
    "gemma2": ("gemma2", {"attention.sliding_window": 16, "attn_logit_softcapping": 5.0,
                          "final_logit_softcapping": 10.0}, layers(PLAIN | POST, output=False)),
    "gemma3": ("gemma3", {"attention.sliding_window": 16, "block_count": 7, "rope.freq_base": 1e6,
                          "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
               layers(PLAIN | POST | {"attn_q_norm.weight": (D,), "attn_k_norm.weight": (D,)},
                      n=7, output=False)),
    "glm4": ("glm4", {"rope.dimension_count": 8},
             layers(attention(bias="qkv") | FFN_NORM | POST | GATE_IN_UP)),
    "gpt2": ("gpt2", LAYER_THREE, layers(GPT, **POSITIONS)),
    "gptneox": ("gptneox", LAYER_THREE | {"rope.dimension_count": 4,
                                          "use_parallel_residual": True},
                layers(GPT, **LAST_BIASED)),
    "gptneox-in-turn": ("gptneox", LAYER_THREE | {"rope.dimension_count": 4,
                                                  "use_parallel_residual": False},
                        layers(GPT, **LAST_BIASED)),
    "hunyuan-dense": ("hunyuan-dense", {}, layers(
        attention(norms=(D,)) | FFN_NORM | dense(), output=False)),
    "internlm2": ("internlm2", ONE_KV, layers(square(1) | FFN_NORM | dense())),
    "llama-linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
                     layers(PLAIN)),
    "minicpm": ("minicpm", {"embedding_scale": 12.0, "residual_scale": 0.3, "logit_scale": 3.0},
                layers(PLAIN, output=False)),
    "mistral3": ("mistral3", {
        "attention.temperature_scale": 0.1, "rope.scaling.type": "yarn",
        "rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_log_multiplier": 1.0}, layers(PLAIN)),
    "nemotron": ("nemotron", LAYER_ONE_KV | {"rope.dimension_count": 8},
                 layers(square(1) | FFN_NORM | TWO_BIASED | dense(gated=False), **LAST_BIASED)),
    "olmo": ("olmo", LAYER_THREE, {name: shape for name, shape in
                                   layers(square(3) | dense()).items() if "norm" not in name}),
    "olmo2": ("olmo2", ONE_KV, OLMO2),
    "olmo3": ("olmo2", ONE_KV | WINDOW | {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.2}, OLMO2),
    "orion": ("orion", LAYER_ONE_KV, layers(square(1) | FFN_NORM | TWO_BIASED | dense(),
                                            **LAST_BIASED)),
    "phi2": ("phi2", LAYER_THREE | {"rope.dimension_count": 8}, layers(
        biased(ATTN_NORM | fused(3) | dense(gated=False)), **LAST_BIASED,
        **{"output.bias": (V,)})),
    "phi3": ("phi3", ONE_KV, PHI3),
    "phi3-long": ("phi3", longrope(16), PHI3 | LONGROPE),
    "phi3-short": ("phi3", longrope(4096), PHI3 | LONGROPE),
    "qwen": ("qwen", THREE_HEADS, layers(
        ATTN_NORM | fused(3) | {"attn_qkv.bias": (3 * E,)} | FFN_NORM | dense(n=32))),
    "qwen2vl": ("qwen2vl", ONE_KV | {"rope.dimension_sections": [2, 3, 3, 0]},
                layers(square(1) | FFN_NORM | QKV_BIASES | dense())),
    "seed_oss": ("seed_oss", {}, layers(
        attention(bias="qkv") | {"post_attention_norm.weight": (E,)} | dense())),
    "smollm3": ("smollm3", {}, layers(PLAIN, output=False)),
    "stablelm": ("stablelm", LAYER_ONE_KV | {"rope.dimension_count": 4,
                                             "use_parallel_residual": True},
                 layers(square(1) | FFN_NORM | TWO_BIASED | QKV_BIASES | dense(), **LAST_BIASED)),
    "stablelm-12b": ("stablelm", LAYER_ONE_KV | {"rope.dimension_count": 4,
                                                 "use_parallel_residual": True},
                     layers(biased(ATTN_NORM) | square(1) | OWN_HEAD_NORMS | dense(),
                            **LAST_BIASED)),
    "starcoder": ("starcoder", LAYER_ONE_KV, layers(
        biased(ATTN_NORM | FFN_NORM | fused(1) | dense(gated=False)), **POSITIONS)),
    "starcoder2": ("starcoder2", LAYER_ONE_KV, layers(
        biased(square(1) | FFN_NORM | dense(gated=False)), output=False, **LAST_BIASED)),
    "xverse": ("xverse", ONE_KV, layers(square(1) | FFN_NORM | dense())),
}
