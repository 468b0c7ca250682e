"""Towers for pictures of any size, whose patches turn by their row and column."""
import numpy as np

from tinychat.errors import ModelFileError
from tinychat.models.vision.config import MAX_ROWS, VisionConfig
from tinychat.models.vision.tower import Tower
from tinychat.models.weights import Weights
from tinychat.ops.program import Rope


class AnySize(Tower):
    """n_merge x n_merge patches become one token; usual_merge: unless the file says how many."""

    usual_merge = 1

    def __init__(self, config: VisionConfig, w: Weights):
        super().__init__(config, w)
        self.n_merge = config.keys.integer("spatial_merge_size", 1, 8, self.usual_merge)
        if config.head_dim % 4:
            raise ModelFileError("metadata key clip.vision.attention.head_count: expected heads "
                                 f"of a multiple of 4 values, got {config.head_dim}")

    @property
    def max_rows(self) -> int:
        unit = self.n_merge ** 2
        return MAX_ROWS // unit * unit

    def turning(self, layout: str, inv_freq: np.ndarray) -> Rope:
        """A rope whose first half of the pairs turns by the row, the second by the column."""
        quarter = self.config.head_dim // 4
        return Rope(layout, inv_freq.astype(np.float32), axes=(0,) * quarter + (1,) * quarter)
