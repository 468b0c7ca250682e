"""Tiny embedding models, each with what its family may have beyond `helpers_families.ENCODERS`.

`golden/embedders.npz` has, by their names, llama.cpp's vector of TOKENS, pooled as the file says.
"""
from pathlib import Path

from helpers_families import (
    ADDED, BEFORE, BERT_EMBEDDING, ENCODERS, FUSED, GATED, PLAIN, THREE, E, F, L, encoder, fused,
    layer, split)

VECTORS = Path(__file__).parent / "golden" / "embedders.npz"
MEAN, CLS, LAST = ({"pooling_type": number} for number in (1, 2, 3))
CLASSIFIER = {"cls.weight": (E, E), "cls.bias": (E,), "cls.output.weight": (1, E)}
N_EXPERT = 4


def also(name: str, keys: dict, shapes: dict | None = None) -> tuple[str, dict, dict]:
    arch, own, tensors = ENCODERS[name]
    return arch, own | keys, tensors | (shapes or {})


def experts() -> dict:
    shapes = layer(fused(THREE), {}, bias="all") | ADDED
    return shapes | {"ffn_gate_inp.weight": (N_EXPERT, E), "ffn_up_exps.weight": (N_EXPERT, F, E),
                     "ffn_down_exps.weight": (N_EXPERT, E, F)}


_, BERT_KEYS, BERT = ENCODERS["bert"]
RMS = THREE | {"attention.causal": False}

# name: (GGUF architecture, its keys, its tensors)
EMBEDDERS = {
    "bert": also("bert", CLS, CLASSIFIER),
    "eurobert": ("eurobert", RMS | LAST, encoder([layer(split(THREE), GATED, *BEFORE)] * L, {
        "output_norm.weight": (E,)})),
    "gemma-embedding": also("gemma-embedding", MEAN | {
        "dense_2_feat_in": E, "dense_2_feat_out": 2 * E, "dense_3_feat_in": 2 * E,
        "dense_3_feat_out": E}, {"dense_2.weight": (2 * E, E), "dense_3.weight": (E, 2 * E)}),
    "jina-bert-v3": ("jina-bert-v3", BERT_KEYS | MEAN, {
        name: shape for name, shape in BERT.items() if name != "position_embd.weight"}),
    "modern-bert": also("modern-bert", CLS, {"cls.weight": (E, E), "cls.norm.weight": (E,)}),
    "modern-bert-silu": also("modern-bert", MEAN | {"hidden_activation": "silu"}),
    "neo-bert": ("neo-bert", RMS | CLS, encoder([layer(fused(THREE), FUSED, *BEFORE)] * L, {
        "enc.output_norm.weight": (E,)} | CLASSIFIER)),
    "nomic-bert": also("nomic-bert", MEAN),
    "nomic-bert-moe": ("nomic-bert-moe", BERT_KEYS | MEAN | {
        "expert_count": N_EXPERT, "expert_used_count": 2, "moe_every_n_layers": 2},
        encoder([layer(fused(THREE), PLAIN, bias="all") | ADDED, experts()] * 2, BERT_EMBEDDING)),
}
