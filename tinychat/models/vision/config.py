"""A vision tower's numbers, from the metadata of an mmproj file."""
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.models.config import MAX_LAYERS, Keys

MAX_SIDE = 8192           # pixels of a tower's square
MAX_WIDTH = 1 << 16
# Patches in one step: 1280 tokens where 2x2 of them make one. The largest towers known have 60 to
# 110 KB of buffers for each, so 300 to 570 MB; a smaller picture only touches what it needs.
MAX_ROWS = 5120
PROJECTOR_KEYS = ("clip.projector_type", "clip.vision.projector_type")


def projector_of(metadata: dict[str, Any]) -> str | None:
    """The name of its kind of projector; None where the file is no vision tower."""
    if metadata.get("general.architecture") != "clip" or not metadata.get(
            "clip.has_vision_encoder", True):
        return None
    for key in PROJECTOR_KEYS:
        name = metadata.get(key)
        if isinstance(name, str) and name:
            return name
    return None


@dataclass(frozen=True)
class VisionConfig:
    """What all towers share. A family reads keys of its own from `keys`.

    mean, std: float32 (3,), of the colours. activation: of the blocks; what "gelu" is, the family
    says.
    """

    n_layer: int
    n_embd: int
    n_head: int
    head_dim: int
    image_size: int        # pixels a side; of towers that take any size, what they were trained on
    patch_size: int
    norm_eps: float
    activation: str        # gelu | gelu_quick | silu
    mean: np.ndarray
    std: np.ndarray
    keys: Keys

    @staticmethod
    def from_metadata(metadata: dict[str, Any]) -> "VisionConfig":
        """Raises: ModelFileError naming the key that is missing, of the wrong type or absurd."""
        keys, general = Keys(metadata, "clip.vision"), Keys(metadata, "clip")
        n_embd = keys.integer("embedding_length", 1, MAX_WIDTH)
        n_head = keys.integer("attention.head_count", 1, n_embd)
        head_dim = keys.integer("attention.head_dim", 1, MAX_WIDTH, None)
        if head_dim is None and n_embd % n_head:
            raise ModelFileError("metadata key clip.vision.embedding_length: expected a multiple "
                                 f"of the {n_head} heads, got {n_embd}")
        image_size = keys.integer("image_size", 0, MAX_SIDE)
        use_gelu = general.boolean("use_gelu", False)
        use_silu = general.boolean("use_silu", False)
        return VisionConfig(
            n_layer=keys.integer("block_count", 1, MAX_LAYERS), n_embd=n_embd, n_head=n_head,
            head_dim=head_dim or n_embd // n_head, image_size=image_size,
            patch_size=keys.integer("patch_size", 1, 64),
            norm_eps=keys.number("attention.layer_norm_epsilon", 0, 1),
            activation="silu" if use_silu else "gelu" if use_gelu else "gelu_quick",
            mean=_colour(metadata, "clip.vision.image_mean", -10, 10),
            std=_colour(metadata, "clip.vision.image_std", 1e-3, 10), keys=keys)


def _colour(metadata: dict[str, Any], key: str, low: float, high: float) -> np.ndarray:
    value = metadata.get(key)
    items = list(value) if isinstance(value, (list, np.ndarray)) else []
    fits = len(items) == 3 and all(
        isinstance(x, (int, float, np.number)) and math.isfinite(x) and low <= x <= high
        for x in items)
    if not fits:
        raise ModelFileError(f"metadata key {key}: expected 3 numbers from {low:g} to {high:g}, "
                             f"got {str(value)[:80]}")
    return np.array(items, np.float32)
