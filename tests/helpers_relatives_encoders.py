"""Tiny encoders; see `helpers_relatives`. `helpers_embedders` has what they make of a text."""
from helpers_relatives import (
    E, EXPERTS, FFN_NORM, L, THREE_HEADS, attention, dense, experts, model, square)
from helpers_relatives_dense import GATE_IN_UP, LAYER_NORM, POST, biased, fused

NO_OUTPUT = dict(output=False)
ENCODER = LAYER_NORM | THREE_HEADS | {"attention.causal": False, "pooling_type": 0}
EMBEDDING = {"token_types.weight": (2, E), "token_embd_norm.weight": (E,),
             "token_embd_norm.bias": (E,)}
ADDED = biased({f"{name}_output_norm.weight": (E,) for name in ("attn", "layer")})
SPLIT = {name: shape for name, shape in square(3).items() if name != "attn_norm.weight"}
ROUTED = experts(n=64, gated=False)
CLASSIFIER = {"cls.weight": (E, E), "cls.bias": (E,), "cls.output.weight": (1, E)}


def without_last_norm(layers: list[dict], **more) -> dict:
    """more: other tensors, the last norm among them if there is one after all."""
    shapes = model(layers, **NO_OUTPUT)
    del shapes["output_norm.weight"]
    return shapes | more


ENCODERS = {
    "bert": ("bert", ENCODER, without_last_norm(
        [biased(SPLIT | dense(gated=False)) | ADDED] * L, **EMBEDDING,
        **{"position_embd.weight": (512, E)})),
    "gemma-embedding": ("gemma-embedding", {
        "block_count": 7, "attention.sliding_window": 16, "rope.freq_base": 1e6,
        "pooling_type": 0}, model([attention(norms=(16,)) | POST | FFN_NORM | dense()] * 7,
                                  **NO_OUTPUT)),
    "modern-bert": ("modern-bert", ENCODER | {
        "block_count": 7, "attention.sliding_window": 9, "rope.freq_base": 160000.0,
        "rope.freq_base_swa": 10000.0}, model(
            [fused(3) | FFN_NORM | GATE_IN_UP | ({"attn_norm.weight": (E,)} if i else {})
             for i in range(7)], **NO_OUTPUT, **{"token_embd_norm.weight": (E,)})),
    "nomic-bert": ("nomic-bert", ENCODER, without_last_norm(
        [fused(3) | dense() | ADDED] * L, **EMBEDDING)),
    "nomic-bert-moe": ("nomic-bert-moe", ENCODER | EXPERTS | {"moe_every_n_layers": 2},
                       without_last_norm([biased(fused(3)) | ADDED | (
                           ROUTED if i % 2 else biased(dense(gated=False))) for i in range(L)],
                           **EMBEDDING)),
}
