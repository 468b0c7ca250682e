"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, patches that turn by row and column.

Qwen2.5 sees windows in most layers. Qwen3 adds interpolated positions, and features of inner layers
that the text model takes in after its own first layers (deepstack).
Source: Qwen2-VL, Qwen2.5-VL and Qwen3-VL reports; transformers: models/qwen3_vl.
"""
from dataclasses import replace

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.models.vision.any_size import AnySize
from tinychat.models.vision.config import VisionConfig
from tinychat.models.vision.pixels import Tile, fitted_size, interpolated
from tinychat.models.vision.tower import ImageBlock, Rows, block, mlp, norm
from tinychat.models.weights import Weights
from tinychat.ops.program import Buffer, Heads
from tinychat.ops.recorder import Recorder

MIN_TOKENS = 8
ROPE_BASE = 10000.0
WINDOW_PIXELS = 112


class Qwen2(AnySize):
    placeholder = "<|image_pad|>"
    usual_merge = 2

    def __init__(self, config: VisionConfig, w: Weights):
        super().__init__(config, w)
        quarter = config.head_dim // 4
        inv_freq = ROPE_BASE ** (-np.arange(quarter) / quarter)
        self.rope = self.turning("halves", np.tile(inv_freq, 2))

    # Geometry

    def layout(self, height: int, width: int) -> list[str | Tile]:
        unit = self.config.patch_size * self.n_merge
        size = fitted_size(height, width, unit, MIN_TOKENS * unit * unit,
                           self.max_rows * self.config.patch_size ** 2)
        return ["<|vision_start|>", Tile((size,)), "<|vision_end|>"]

    def rows(self, pixels: np.ndarray, grid: tuple[int, int]) -> Rows:
        found = super().rows(pixels, grid)
        axes = np.indices(grid, np.int32).reshape(2, -1).T
        return replace(found, axes=np.ascontiguousarray(axes))

    def image_block(self, rows: np.ndarray, grid: tuple[int, int]) -> ImageBlock:
        height, width = grid[0] // self.n_merge, grid[1] // self.n_merge
        axes = np.indices((1, height, width), np.int32).reshape(3, -1).T
        return ImageBlock(rows, np.ascontiguousarray(axes), max(height, width))

    # Programs

    def project(self, g: Recorder, x: Buffer) -> Buffer:
        return mlp(g, self.w, ("mm.0", "mm.2"), x)


class Qwen25(Qwen2):
    """Rows are ordered by windows; every n-th layer sees the whole picture all the same."""

    def __init__(self, config: VisionConfig, w: Weights):
        super().__init__(config, w)
        self.period = config.keys.integer("n_wa_pattern", 0, config.n_layer, 0)
        pixels = config.keys.integer("window_size", 1, 1 << 16, WINDOW_PIXELS)
        self.window = max(1, pixels // (config.patch_size * self.n_merge)) * self.n_merge

    def heads_of(self, i: int) -> Heads:
        windowed = self.period and (i + 1) % self.period
        return replace(self.heads, span=1) if windowed else self.heads

    def rows(self, pixels: np.ndarray, grid: tuple[int, int]) -> Rows:
        found = super().rows(pixels, grid)
        if not self.period:
            return found
        y, x = found.axes.T // self.window
        window = y * -(-grid[1] // self.window) + x                           # of each patch
        order = np.argsort(window, kind="stable")
        ends = np.searchsorted(window[order], window[order], side="right")
        return replace(found, inputs=found.inputs[order], axes=found.axes[order], ends=ends,
                       order=order)


class Qwen3(Qwen2):

    def __init__(self, config: VisionConfig, w: Weights):
        super().__init__(config, w)
        self.stacked = [i for i in range(config.n_layer) if w.has(f"v.deepstack.{i}.fc1.weight")]
        self.n_deepstack = len(self.stacked)

    def _check_positions(self) -> None:
        n = self.w.tensor("v.position_embd.weight", None, self.config.n_embd).shape[0]
        if round(n ** 0.5) ** 2 != n:
            raise ModelFileError("tensor 'v.position_embd.weight': expected a square number of "
                                 f"rows, found {n}")

    def positions(self, table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        return interpolated(table, grid)

    def through(self, g: Recorder, w: Weights, x: Buffer) -> Buffer:
        c, states = self.config, []
        for i in range(c.n_layer):
            x = block(g, w.layer(i), c, x, self.heads, self.rope)
            if i in self.stacked:
                states.append(g.outputs(x))
        out = norm(g, w, "post_ln", g.outputs(x), c.norm_eps)
        for state in states:
            out = g.join(out, state)
        return out

    def merge(self, hidden: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Of each state by itself, side by side."""
        states = np.split(hidden, 1 + self.n_deepstack, 1)
        return np.concatenate([super(Qwen3, self).merge(state, grid) for state in states], 1)

    def project(self, g: Recorder, x: Buffer) -> Buffer:
        width = self.merged_width()
        out = super().project(g, g.columns(x, 0, width))
        for n, i in enumerate(self.stacked):
            w = self.w.under(f"v.deepstack.{i}.")
            state = norm(g, w, "norm", g.columns(x, (1 + n) * width, width), self.config.norm_eps)
            out = g.join(out, mlp(g, w, ("fc1", "fc2"), state))
        return out
