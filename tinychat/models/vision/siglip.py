"""SigLIP towers that see squares: Gemma 3 averages patches, Idefics 3 (SmolVLM) shuffles them.

Source: Gemma 3 report, section 2; transformers: models/gemma3, models/idefics3.
"""
import math

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.models.vision.config import VisionConfig
from tinychat.models.vision.pixels import Tile, windows
from tinychat.models.vision.tower import Tower, mlp, norm, transposed
from tinychat.models.weights import Weights
from tinychat.ops.program import Buffer
from tinychat.ops.recorder import Recorder

MAX_EDGE = 4096     # Idefics 3: pixels of the longer side
MAX_TILES = 100


class Gemma3(Tower):
    placeholder = "<image_soft_token>"
    both_ways = True
    resample = "bilinear"

    def __init__(self, config: VisionConfig, w: Weights):
        super().__init__(config, w)
        self.n_merge = config.keys.integer("projector.scale_factor", 1, 64, 4)

    def layout(self, height: int, width: int) -> list[str | Tile]:
        return ["\n\n<start_of_image>", *super().layout(height, width), "<end_of_image>\n\n"]

    def merge(self, hidden: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """The mean of each square of patches."""
        squares = windows(hidden, grid, self.n_merge)
        return squares.reshape(len(squares), -1, hidden.shape[1]).mean(1)

    def merged_width(self) -> int:
        return self.config.n_embd

    def project(self, g: Recorder, x: Buffer) -> Buffer:
        x = norm(g, self.w, "mm.soft_emb_norm", x, self.config.norm_eps)
        return g.linear(x, transposed(self.w.tensor("mm.input_projection.weight", x.width, None)))


class Idefics3(Tower):
    placeholder = "<image>"
    resample = "lanczos"

    def __init__(self, config: VisionConfig, w: Weights):
        super().__init__(config, w)
        self.n_merge = config.keys.integer("projector.scale_factor", 1, 64, 1)
        self.longest_edge = config.keys.integer("preproc_image_size", 0, MAX_EDGE, 0)
        if math.ceil(self.longest_edge / max(config.image_size, 1)) ** 2 > MAX_TILES:
            raise ModelFileError("metadata key clip.vision.preproc_image_size: "
                                 f"{self.longest_edge} makes more than {MAX_TILES} tiles of "
                                 f"{config.image_size}")

    def layout(self, height: int, width: int) -> list[str | Tile]:
        """Tiles row by row, and the picture as a whole; small models see only the latter.

        Source: transformers: image_processing_idefics3.py, processing_idefics3.py.
        """
        side = self.config.image_size
        around, whole = "<fake_token_around_image>", "<global-img>"
        if not self.longest_edge:
            return [around + whole, Tile(((side, side),)), around]
        sizes = self._sizes(height, width)
        n_rows, n_columns = (n // side for n in sizes[-1])
        if n_rows == n_columns == 1:
            return [around + whole, Tile(sizes), around]
        parts, before = [], ""
        for row in range(n_rows):
            for column in range(n_columns):
                top, left = row * side, column * side
                parts += [f"{before}{around}<row_{row + 1}_col_{column + 1}>",
                          Tile(sizes, (top, left, top + side, left + side))]
                before = ""
            before = "\n"
        return [*parts, f"\n\n{around}{whole}", Tile((*sizes, (side, side))), around]

    def _sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """First the longer edge as it must be, then both to whole tiles."""
        longest, side = self.longest_edge, self.config.image_size
        aspect = width / height
        if width >= height:
            first = (_even(longest / aspect), longest)
            ratio = first[1] / first[0]
            wide = math.ceil(first[1] / side) * side
            second = (math.ceil(max(1, int(wide / ratio)) / side) * side, wide)
        else:
            first = (longest, _even(longest * aspect))
            ratio = first[1] / first[0]
            high = math.ceil(first[0] / side) * side
            second = (high, math.ceil(max(1, int(high * ratio)) / side) * side)
        return first, second

    def project(self, g: Recorder, x: Buffer) -> Buffer:
        return mlp(g, self.w, ("mm.model.fc",), x)


def _even(length: float) -> int:
    """The next even number, at least 2."""
    whole = max(1, int(length))
    return whole + whole % 2
