"""Tiny models with random weights of families that have no golden file: what they are made of.

They are made here, the same on every machine, as llama.cpp's converter writes such files, in
float32. `golden/relatives.npz` has, by their names, what llama.cpp made of them (llama-cpp-python
0.3.36: float32 weights and cache, one step, no flash attention): the logits of some of
TOKENS.
"""
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

PEER = Path(__file__).parent / "golden" / "relatives.npz"
TOKENS = np.random.RandomState(7).randint(0, 96, 48).astype(np.int32)
ROWS = np.array([0, 5, 19, 33, 47])  # whose logits are kept

V, E, L = 96, 48, 4
H, HKV, D = 4, 2, 16
X, U, F = 6, 2, 24  # experts, those used, their width

BASE = {"block_count": L, "context_length": 512, "embedding_length": E, "feed_forward_length": 64,
        "attention.head_count": H, "attention.head_count_kv": HKV, "attention.key_length": D,
        "attention.value_length": D, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0, "rope.dimension_count": D, "vocab_size": V}
EXPERTS = {"expert_count": X, "expert_used_count": U, "expert_feed_forward_length": F}
MAMBA = {"ssm.conv_kernel": 4, "ssm.inner_size": 96, "ssm.state_size": 8, "ssm.time_step_rank": 6,
         "ssm.group_count": 2}


def attention(n_q=H * D, n_kv=HKV * D, bias=(), norms=None, fused=False) -> dict:
    """Tensors of one layer; norms: the shape of the heads' norms."""
    shapes = {"attn_norm.weight": (E,), "attn_output.weight": (E, H * D)}
    sizes = {"qkv": n_q + 2 * n_kv} if fused else {"q": n_q, "k": n_kv, "v": n_kv}
    for name, size in sizes.items():
        shapes[f"attn_{name}.weight"] = (size, E)
        if name in bias:
            shapes[f"attn_{name}.bias"] = (size,)
    if "output" in bias:
        shapes["attn_output.bias"] = (E,)
    if norms:
        shapes.update({"attn_q_norm.weight": norms, "attn_k_norm.weight": norms})
    return shapes


def dense(n=64, suffix="", gated=True) -> dict:
    up = {f"ffn_up{suffix}.weight": (n, E), f"ffn_down{suffix}.weight": (E, n)}
    return up | ({f"ffn_gate{suffix}.weight": (n, E)} if gated else {})


def experts(n=F, width=E, *, shared=0, gated=True, choice_bias=False) -> dict:
    shapes = {"ffn_gate_inp.weight": (X, E), "ffn_up_exps.weight": (X, n, width),
              "ffn_down_exps.weight": (X, width, n)}
    if gated:
        shapes["ffn_gate_exps.weight"] = (X, n, width)
    if choice_bias:
        shapes["exp_probs_b.bias"] = (X,)
    return shapes | (dense(shared, "_shexp", gated) if shared else {})


def mamba2(inner=96, n_state=8, n_head=6, n_group=2, *, norm=True) -> dict:
    n_conv = inner + 2 * n_group * n_state
    shapes = {"attn_norm.weight": (E,), "ssm_in.weight": (inner + n_conv + n_head, E),
              "ssm_conv1d.weight": (n_conv, 4), "ssm_conv1d.bias": (n_conv,),
              "ssm_dt.bias": (n_head,), "ssm_a": (n_head, 1), "ssm_d": (n_head, 1),
              "ssm_out.weight": (E, inner)}
    return shapes | ({"ssm_norm.weight": (n_group, inner // n_group)} if norm else {})


FFN_NORM = {"ffn_norm.weight": (E,)}
THREE_HEADS = {"attention.head_count": 3, "attention.head_count_kv": 3}


def square(n_kv: int) -> dict:
    """Attention of 3 heads of 16, as wide as the embedding, and n_kv of keys."""
    return {"attn_norm.weight": (E,), "attn_q.weight": (E, E), "attn_k.weight": (n_kv * D, E),
            "attn_v.weight": (n_kv * D, E), "attn_output.weight": (E, E)}


def model(layers, *, output=True, **more) -> dict:
    """Tensors of a whole model from those of its layers; more: others, by underscored names."""
    shapes = {"token_embd.weight": (V, E), "output_norm.weight": (E,)}
    if output:
        shapes["output.weight"] = (V, E)
    for i, layer in enumerate(layers):
        shapes.update({f"blk.{i}.{name}": shape for name, shape in layer.items()})
    return shapes | more


def values(rng: np.random.RandomState, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms near 1, matrices that keep a row's size, a negative `ssm_a`."""
    x = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name and not name.endswith(".bias"):
        return 1 + np.float32(0.3) * x
    if name.endswith("ssm_a"):
        return -np.exp(np.float32(0.5) * x)
    if name.endswith("rope_freqs.weight"):  # the first ones turn, the others do not
        return np.where(np.arange(len(x)) < 4, 1, 1e30).astype(np.float32)
    if name.startswith("rope_factors"):
        return 1 + 3 * np.abs(x)
    if name.endswith(("ssm_d", "scale", "scale.weight")):
        return 1 + np.float32(0.3) * x
    if name.endswith("token_embd.weight"):
        return x
    if name.endswith(".bias"):
        return np.float32(0.2) * x
    return x * np.float32((2.5 if "gate_inp" in name else 1.2) / np.sqrt(shape[-1]))


def write_relative(path: Path, name: str, relative: tuple[str, dict, dict]) -> Path:
    """relative: GGUF architecture, keys beyond BASE (None takes one away), shapes of tensors."""
    arch, own, shapes = relative
    rng = np.random.RandomState(sum(name.encode()))
    writer = GGUFWriter(path, arch)
    writer.add_string("tokenizer.ggml.model", "none")
    writer.add_uint32("tokenizer.ggml.token_type_count", 2)
    for key, value in (BASE | own).items():
        add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
               str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    for tensor, shape in shapes.items():
        writer.add_tensor(tensor, values(rng, tensor, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
