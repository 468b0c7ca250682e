"""Pixtral, Mistral Small 3.1: pictures of any size, patches that turn by row and column, and the
embedding of [IMG_BREAK] between the rows of tokens.

Source: Pixtral 12B report; transformers: models/pixtral, models/mistral3.
"""
import math
from dataclasses import replace

import numpy as np

from tinychat.models.vision.any_size import AnySize
from tinychat.models.vision.config import VisionConfig
from tinychat.models.vision.pixels import Tile
from tinychat.models.vision.tower import ImageBlock, Rows, mlp, norm
from tinychat.models.weights import Weights
from tinychat.ops.meaning import dequantize
from tinychat.ops.program import Buffer
from tinychat.ops.recorder import Recorder

ROPE_BASE = 10000.0


class Pixtral(AnySize):
    placeholder = "[IMG]"
    gelu = "gelu_erf"

    def __init__(self, config: VisionConfig, w: Weights):
        super().__init__(config, w)
        inv_freq = ROPE_BASE ** (-np.arange(config.head_dim // 2) * 2 / config.head_dim)
        self.rope = self.turning("adjacent", np.r_[inv_freq[::2], inv_freq[1::2]])

    def layout(self, height: int, width: int) -> list[str | Tile]:
        """No larger than the trained square, never enlarged; sides go up to whole tokens.

        Source: transformers: image_processing_pixtral.py.
        """
        c = self.config
        unit, edge = c.patch_size * self.n_merge, max(c.image_size, c.patch_size * self.n_merge)
        most = self.max_rows // self.n_merge ** 2                             # tokens
        shrink = max(height / edge, width / edge, math.sqrt(height * width / most) / unit, 1)
        tokens = [max(1, math.ceil(int(n / shrink) / unit)) for n in (height, width)]
        longest = most // min(tokens)
        size = tuple(min(n, longest) * unit for n in tokens)
        return [Tile((size,)), "[IMG_END]"]

    def rows(self, pixels: np.ndarray, grid: tuple[int, int]) -> Rows:
        axes = np.indices(grid, np.int32).reshape(2, -1).T
        return replace(super().rows(pixels, grid), axes=np.ascontiguousarray(axes))

    def n_tokens(self, tile: Tile) -> int:
        return super().n_tokens(tile) + self.grid(tile)[0] // self.n_merge - 1

    def merge(self, hidden: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Value by value, the patches of a square side by side."""
        squares = super().merge(hidden, grid)
        squares = squares.reshape(len(squares), -1, hidden.shape[1]).swapaxes(1, 2)
        return squares.reshape(len(squares), -1)

    def image_block(self, rows: np.ndarray, grid: tuple[int, int]) -> ImageBlock:
        """A break behind each row but the last."""
        height, width = grid[0] // self.n_merge, grid[1] // self.n_merge
        out = np.empty((height, width + 1, rows.shape[1]), np.float32)
        out[:, :width] = rows.reshape(height, width, -1)
        out[:, width] = self._break_row(rows.shape[1])
        return super().image_block(out.reshape(-1, rows.shape[1])[:-1], grid)

    def _break_row(self, n_embd: int) -> np.ndarray:
        return dequantize(self.w.tensor("v.token_embd.img_break", n_embd))

    def through(self, g: Recorder, w: Weights, x: Buffer) -> Buffer:
        x = super().through(g, w, x)
        if self.w.has("mm.input_norm.weight"):
            x = norm(g, self.w, "mm.input_norm", x, self.config.norm_eps)
        return x

    def project(self, g: Recorder, x: Buffer) -> Buffer:
        if self.n_merge > 1:
            x = mlp(g, self.w, ("mm.patch_merger",), x)
        x = mlp(g, self.w, ("mm.1", "mm.2"), x)
        self._break_row(x.width)  # that it is there and fits is known before the first picture
        return x
