"""Towers with a class row: LLaVA's CLIP, and InternVL's, which cuts large pictures into tiles.

Source: LLaVA-1.5 and InternVL 2.5 reports; transformers: models/clip, models/llava.
"""
import math

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.models.vision.config import VisionConfig
from tinychat.models.vision.pixels import MAX_SQUARE, Tile, padded_square
from tinychat.models.vision.tower import Tower, block, mlp, norm
from tinychat.models.weights import Weights
from tinychat.ops.program import Buffer
from tinychat.ops.recorder import Recorder

CLIP_MEAN_COLOUR = (122, 116, 104)
MAX_TILES = 100


class Llava(Tower):
    """The picture in the middle of a square of CLIP's mean colour.

    All blocks of the file are run: the converter has left out the one behind the features that
    LLaVA was trained on. NOTE: llama.cpp (of mid 2026) leaves out one more, and takes the class row
    for the last, not the first, so its features are others. Of LLaVA-1.6 only the whole picture is
    seen, not its tiles.
    """

    def __init__(self, config: VisionConfig, w: Weights):
        super().__init__(config, w)
        self.taken = feature_layers(config)
        self.n_run = max(self.taken)
        unused = tuple(f"v.blk.{i}." for i in range(self.n_run, config.n_layer))
        w.ignore(*(name for name in w.names() if name.startswith(unused)))

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        return padded_square(pixels, CLIP_MEAN_COLOUR)

    def through(self, g: Recorder, w: Weights, x: Buffer) -> Buffer:
        """States before the blocks that are taken, side by side; behind the last its norm."""
        c, out = self.config, None
        for i in range(self.n_run + 1):
            if i in self.taken:
                state = g.outputs(x)
                if i == self.n_run and w.has("post_ln.weight"):
                    state = norm(g, w, "post_ln", state, c.norm_eps)
                out = state if out is None else g.join(out, state)
            if i < self.n_run:
                x = block(g, w.layer(i), c, x, self.heads, None)
        return out

    def merged_width(self) -> int:
        return self.config.n_embd * len(self.taken)

    def project(self, g: Recorder, x: Buffer) -> Buffer:
        if self.w.has("mm.3.weight"):  # Yi's: both products are normed
            x = norm(g, self.w, "mm.1", mlp(g, self.w, ("mm.0",), x), self.config.norm_eps)
            x = mlp(g, self.w, ("mm.3",), g.activate("gelu_erf", x))
            return norm(g, self.w, "mm.4", x, self.config.norm_eps)
        names = ("mm.0", "mm.2") if self.w.has("mm.2.weight") else ("mm.0",)
        return mlp(g, self.w, names, x)


def feature_layers(config: VisionConfig) -> tuple[int, ...]:
    """After how many blocks a state is taken, in order; after all where the file does not say."""
    value = config.keys.metadata.get("clip.vision.feature_layer")
    if value is None:
        return (config.n_layer,)
    items = sorted({int(x) for x in value}) if isinstance(value, (list, np.ndarray)) and all(
        isinstance(x, (int, np.integer)) for x in value) else []
    if not items or not 0 <= items[0] <= items[-1] <= config.n_layer:
        raise ModelFileError("metadata key clip.vision.feature_layer: expected numbers from 0 to "
                             f"{config.n_layer}, got {str(value)[:80]}")
    return tuple(items)


class InternVL(Tower):
    placeholder = "<IMG_CONTEXT>"
    gelu = "gelu_erf"

    def __init__(self, config: VisionConfig, w: Weights):
        super().__init__(config, w)
        keys = config.keys
        self.n_merge = keys.integer("projector.scale_factor", 1, 64, 2)
        self.least = keys.integer("preproc_min_tiles", 1, MAX_TILES, 1)
        self.most = keys.integer("preproc_max_tiles", self.least, MAX_TILES, 12)
        if self.most * config.image_size ** 2 > MAX_SQUARE ** 2:
            raise ModelFileError(f"metadata key clip.vision.preproc_max_tiles: {self.most} tiles of"
                                 f" {config.image_size} pixels a side are too many")

    def layout(self, height: int, width: int) -> list[str | Tile]:
        """Tiles row by row, then the whole picture where they are several."""
        side = self.config.image_size
        n_rows, n_columns = self._tiling(height, width)
        size = (n_rows * side, n_columns * side)
        tiles = [Tile((size,), (top, left, top + side, left + side))
                 for top in range(0, size[0], side) for left in range(0, size[1], side)]
        whole = [Tile(((side, side),))] if len(tiles) > 1 else []
        return ["<img>", *tiles, *whole, "</img>"]

    def _tiling(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tiling whose shape is nearest to the picture's.

        Source: InternVL: dynamic_preprocess, find_closest_aspect_ratio.
        """
        side, best, nearest = self.config.image_size, (1, 1), math.inf
        tilings = [(n_rows, n_columns) for n_rows in range(1, self.most + 1)
                   for n_columns in range(1, self.most + 1)
                   if self.least <= n_rows * n_columns <= self.most]
        for n_rows, n_columns in sorted(tilings, key=lambda tiling: tiling[0] * tiling[1]):
            off = abs(width / height - n_columns / n_rows)
            if off < nearest:
                best, nearest = (n_rows, n_columns), off
            elif off == nearest and height * width > 0.5 * side * side * n_rows * n_columns:
                best = (n_rows, n_columns)
        return best

    def project(self, g: Recorder, x: Buffer) -> Buffer:
        x = norm(g, self.w, "mm.model.mlp.0", x, 1e-5)
        return mlp(g, self.w, ("mm.model.mlp.1", "mm.model.mlp.3"), x)
