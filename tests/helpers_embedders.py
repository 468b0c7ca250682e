"""Tiny embedding models, each with what its family may have beyond `helpers_relatives_encoders`.

`golden/embedders.npz` has, by their names, llama.cpp's vector of TOKENS, pooled as the file says.
"""
from pathlib import Path

from helpers_relatives import E, FFN_NORM, L, THREE_HEADS, dense, square
from helpers_relatives_dense import fused
from helpers_relatives_encoders import CLASSIFIER, ENCODERS, GATE_IN_UP, without_last_norm

VECTORS = Path(__file__).parent / "golden" / "embedders.npz"
MEAN, CLS, LAST = ({"pooling_type": number} for number in (1, 2, 3))
RMS = THREE_HEADS | {"attention.causal": False}
ATTN_NORM = {"attn_norm.weight": (E,)}


def also(name: str, keys: dict, shapes: dict | None = None) -> tuple[str, dict, dict]:
    arch, own, tensors = ENCODERS[name]
    return arch, own | keys, tensors | (shapes or {})


_, BERT_KEYS, BERT = ENCODERS["bert"]

# name: (GGUF architecture, its keys, its tensors)
EMBEDDERS = {
    "bert": also("bert", CLS, CLASSIFIER),
    "eurobert": ("eurobert", RMS | LAST, without_last_norm(
        [square(3) | FFN_NORM | dense()] * L, **{"output_norm.weight": (E,)})),
    "gemma-embedding": also("gemma-embedding", MEAN | {
        "dense_2_feat_in": E, "dense_2_feat_out": 2 * E, "dense_3_feat_in": 2 * E,
        "dense_3_feat_out": E}, {"dense_2.weight": (2 * E, E), "dense_3.weight": (E, 2 * E)}),
    "jina-bert-v3": ("jina-bert-v3", BERT_KEYS | MEAN, {
        name: shape for name, shape in BERT.items() if name != "position_embd.weight"}),
    "modern-bert": also("modern-bert", CLS, {"cls.weight": (E, E), "cls.norm.weight": (E,)}),
    "modern-bert-silu": also("modern-bert", MEAN | {"hidden_activation": "silu"}),
    "neo-bert": ("neo-bert", RMS | CLS, without_last_norm(
        [ATTN_NORM | fused(3) | FFN_NORM | GATE_IN_UP] * L,
        **{"enc.output_norm.weight": (E,)}, **CLASSIFIER)),
    "nomic-bert": also("nomic-bert", MEAN),
    "nomic-bert-moe": also("nomic-bert-moe", MEAN),
}
