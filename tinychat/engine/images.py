"""Images within a prompt: rows that stand in for the embeddings of some of its tokens."""
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinychat.errors import InvalidRequest
from tinychat.ops.program import Program


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """A run of a prompt's tokens, `first` … first + n - 1, whose embeddings are rows of an image.

    rows: float32 (n, program.input_width). axes: int32 (n, program.n_axes), what ropes turn by,
    counted from the run's own start, of which n_positions are passed; None: one after another.
    digest: of what was seen, at least 16 bytes; it stands for the tokens wherever prompts are
    compared. both_ways: whether its tokens attend to one another in both directions.
    """

    first: int
    rows: np.ndarray
    axes: np.ndarray | None
    n_positions: int
    digest: bytes
    both_ways: bool

    @property
    def end(self) -> int:
        return self.first + len(self.rows)


def check_images(images: Sequence[PlacedImage], n_prompt: int, program: Program,
                 max_tokens: int) -> None:
    """Raises: InvalidRequest when they do not fit the prompt or the model."""
    end = 0
    for image in images:
        if image.rows.ndim != 2 or image.rows.shape[1] != program.input_width:
            raise InvalidRequest("this model does not take these images", param="input")
        n_axes = program.n_axes if image.axes is None else image.axes.shape[1]
        if n_axes < program.n_axes:
            raise InvalidRequest("this model turns by other axes than these images have",
                                 param="input")
        if not end <= image.first < image.end <= n_prompt:
            raise InvalidRequest("images overlap or lie outside the prompt", param="input")
        if image.both_ways and len(image.rows) > max_tokens:
            raise InvalidRequest(f"an image of {len(image.rows)} tokens does not fit into one step "
                                 f"of {max_tokens}", param="input")
        end = image.end


def keys_of(ids: np.ndarray, images: Sequence[PlacedImage]) -> np.ndarray:
    """ids with the tokens of images replaced by negative numbers from their digests: int32 (n,)."""
    keys = ids.copy()
    for image in images:
        bits = hashlib.shake_256(image.digest).digest(4 * len(image.rows))
        keys[image.first:image.end] = np.frombuffer(bits, np.int32) | np.int32(-1 << 31)
    return keys


def axes_of(n_prompt: int, images: Sequence[PlacedImage], n_axes: int) -> tuple[np.ndarray, int]:
    """What ropes turn each of a prompt's tokens by, int32 (n_prompt, n_axes), and the next's.

    Text counts on by one on all axes; after an image it goes on behind the last that it took.
    """
    axes, at, turn = np.empty((n_prompt, n_axes), np.int32), 0, 0
    for image in images:
        axes[at:image.first] = (turn + np.arange(image.first - at))[:, None]
        turn += image.first - at
        own = np.arange(len(image.rows))[:, None] if image.axes is None else image.axes[:, :n_axes]
        axes[image.first:image.end] = turn + own
        turn, at = turn + image.n_positions, image.end
    axes[at:] = (turn + np.arange(n_prompt - at))[:, None]
    return axes, turn + n_prompt - at


def both_ways(images: Sequence[PlacedImage]) -> tuple[tuple[int, int], ...]:
    """[first, end) of the runs that must be computed in one step."""
    return tuple((image.first, image.end) for image in images if image.both_ways)
