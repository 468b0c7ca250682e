"""How fast a vision tower encodes, beside the float32 products that the machine can do.

    python -m tinychat.bench.sight [--layers 27] [--runs 3] [--threads N]

A picture of 448x448 in a tower of SigLIP-so400m's shape (Gemma 3's), with random float16 weights.
The machine's figure is NumPy's matrix product of the tower's largest layer on as many threads as
BLAS takes; the two take turns.
"""
import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from tinychat.gguf_file import GGMLQuantizationType, GGUFFile, QTensor
from tinychat.models.vision import VisionEncoder

SIDE, PATCH, N_LAYER, N_EMBD, N_HEAD, N_FF, N_TEXT = 448, 14, 27, 1152, 16, 4304, 2560
N_PATCHES = (SIDE // PATCH) ** 2
PRODUCTS = 8  # of one measurement of the machine


def random_tower(n_layer: int) -> GGUFFile:
    """An mmproj file that is only in memory: float16 matrices, 15 million weights a layer."""
    rng, tensors = np.random.default_rng(0), {}

    def add(name: str, *shape: int, around: float = 0.0, dtype=np.float16) -> None:
        values = rng.standard_normal(int(np.prod(shape)), np.float32) * np.float32(
            shape[-1] ** -0.5) + np.float32(around)
        kind = GGMLQuantizationType.F16 if dtype == np.float16 else GGMLQuantizationType.F32
        tensors[name] = QTensor(name, kind, shape, values.astype(dtype).view(np.uint8))

    def vector(name: str, n: int, around: float = 0.0) -> None:
        add(name, n, around=around, dtype=np.float32)

    add("v.patch_embd.weight", N_EMBD, 3, PATCH, PATCH)
    vector("v.patch_embd.bias", N_EMBD)
    add("v.position_embd.weight", N_PATCHES, N_EMBD, dtype=np.float32)
    add("mm.input_projection.weight", N_EMBD, N_TEXT)
    vector("mm.soft_emb_norm.weight", N_EMBD, around=1.0)
    for name in ("v.post_ln", *(f"v.blk.{i}.{norm}" for i in range(n_layer)
                                for norm in ("ln1", "ln2"))):
        vector(f"{name}.weight", N_EMBD, around=1.0)
        vector(f"{name}.bias", N_EMBD)
    shapes = {"ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}
    shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (N_EMBD, N_EMBD))
    for i in range(n_layer):
        for name, shape in shapes.items():
            add(f"v.blk.{i}.{name}.weight", *shape)
            vector(f"v.blk.{i}.{name}.bias", shape[0])
    half = np.full(3, 0.5, np.float32)
    return GGUFFile(Path("random"), 3, {
        "general.architecture": "clip", "clip.projector_type": "gemma3", "clip.use_gelu": True,
        "clip.vision.image_size": SIDE, "clip.vision.patch_size": PATCH,
        "clip.vision.embedding_length": N_EMBD, "clip.vision.block_count": n_layer,
        "clip.vision.attention.head_count": N_HEAD,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": half, "clip.vision.image_std": half}, tensors)


def tower_flops(n_layer: int) -> float:
    """Multiplications and additions of the tower; the projector has less than a thousandth."""
    products = 2 * N_PATCHES * (4 * N_EMBD * N_EMBD + 2 * N_EMBD * N_FF)
    scores_and_values = 4 * N_PATCHES * N_PATCHES * N_EMBD
    return n_layer * (products + scores_and_values) + 2 * N_PATCHES * 3 * PATCH * PATCH * N_EMBD


def measure(n_layer: int = N_LAYER, n_runs: int = 3, threads: int | None = None) -> dict:
    """Medians: seconds of one picture, its FLOP/s, and those of the machine's float32 product."""
    encoder = VisionEncoder(random_tower(n_layer), n_embd=N_TEXT, threads=threads)
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    try:
        encoder.encode(pixels)  # touches everything once
        seconds, peaks = [], []
        for _ in range(n_runs):
            start = time.perf_counter()
            encoder.encode(pixels)
            seconds.append(time.perf_counter() - start)
            peaks.append(product_flops_per_second())
    finally:
        encoder.close()
    median = statistics.median(seconds)
    return {"layers": n_layer, "seconds": median, "flops_per_second": tower_flops(n_layer) / median,
            "product_flops_per_second": statistics.median(peaks)}


def product_flops_per_second() -> float:
    """Of NumPy's float32 (patches, n_embd) by (n_ff, n_embd), transposed."""
    rng = np.random.default_rng(2)
    x, w = (rng.standard_normal((n, N_EMBD), np.float32) for n in (N_PATCHES, N_FF))
    x @ w.T
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        x @ w.T
    return PRODUCTS * 2 * N_PATCHES * N_EMBD * N_FF / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=N_LAYER)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args(arguments)
    found = measure(asked.layers, asked.runs, asked.threads)
    ours, machine = found["flops_per_second"], found["product_flops_per_second"]
    print(f"{found['seconds']:.2f} s for a picture of {SIDE}x{SIDE} in {found['layers']} layers: "
          f"{ours / 1e9:.0f} GFLOP/s, {ours / machine:.0%} of the {machine / 1e9:.0f} GFLOP/s of "
          "NumPy's float32 products")


if __name__ == "__main__":
    main()
