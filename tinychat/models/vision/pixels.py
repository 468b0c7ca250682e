"""From pixels to the rows of a vision tower: sizes, resizing, normalising, cutting into patches.

Pictures are uint8 (h, w, 3). Resizing is Pillow's, as the image processors of `transformers` do it.
"""
import math
from dataclasses import dataclass

import numpy as np

MAX_SQUARE = 8192  # pixels a side, 200 MB: round a strip of 32768 x 1 it would be 3 GB


@dataclass(frozen=True)
class Tile:
    """A part of the picture as the tower sees it.

    sizes: (height, width) that the picture is resized to, one after the other. box: top, left,
    bottom, right within the last of them; None: all of it.
    """

    sizes: tuple[tuple[int, int], ...]
    box: tuple[int, int, int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        if self.box is None:
            return self.sizes[-1]
        top, left, bottom, right = self.box
        return bottom - top, right - left


class Scaler:
    """One picture in the sizes that its tiles ask for, each made once."""

    def __init__(self, pixels: np.ndarray, resample: str):
        self._resample = resample
        self._made = {(): pixels}

    def cut(self, tile: Tile) -> np.ndarray:
        pixels = self._resized(tile.sizes)
        if tile.box is None:
            return pixels
        top, left, bottom, right = tile.box
        return pixels[top:bottom, left:right]

    def _resized(self, sizes) -> np.ndarray:
        if sizes not in self._made:
            self._made[sizes] = resized(self._resized(sizes[:-1]), sizes[-1], self._resample)
        return self._made[sizes]


def resized(pixels: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """resample: bilinear, bicubic or lanczos, as Pillow means it."""
    from PIL import Image  # with the first image, see images.py

    if pixels.shape[:2] == size:
        return pixels
    method = Image.Resampling[resample.upper()]
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], method))


def padded_square(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """In the middle of a square of that colour; a picture longer than `MAX_SQUARE` is shrunk."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    if height == width:
        return pixels
    if side > MAX_SQUARE:
        height, width = (max(1, n * MAX_SQUARE // side) for n in (height, width))
        pixels, side = resized(pixels, (height, width), "bicubic"), MAX_SQUARE
    out = np.empty((side, side, 3), np.uint8)
    out[:] = colour
    top, left = (side - height) // 2, (side - width) // 2
    out[top:top + height, left:left + width] = pixels
    return out


def fitted_size(height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """The size nearest to the picture's whose sides are multiples of `unit`, of least to most
    pixels; a picture too narrow for both loses some of its length.

    Source: transformers: image_processing_qwen2_vl.py: smart_resize.
    """
    new_height = max(unit, round(height / unit) * unit)
    new_width = max(unit, round(width / unit) * unit)
    if new_height * new_width > most:
        shrink = math.sqrt(height * width / most)
        new_height = max(unit, math.floor(height / shrink / unit) * unit)
        new_width = max(unit, math.floor(width / shrink / unit) * unit)
    elif new_height * new_width < least:
        grow = math.sqrt(least / (height * width))
        new_height = math.ceil(height * grow / unit) * unit
        new_width = math.ceil(width * grow / unit) * unit
    longest = max(unit, most // unit // min(new_height, new_width) * unit)
    return min(new_height, longest), min(new_width, longest)


def patches(pixels: np.ndarray, patch: int, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """float32 (n, 3 * patch * patch), row by row; each one's values by channel, y, x.

    What is left at the right and at the bottom is not seen.
    """
    height, width = (n // patch * patch for n in pixels.shape[:2])
    values = pixels[:height, :width].astype(np.float32) * np.float32(1 / 255)
    values = ((values - mean) / std).reshape(height // patch, patch, width // patch, patch, 3)
    return values.transpose(0, 2, 4, 1, 3).reshape(-1, 3 * patch * patch)


def windows(rows: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
    """Squares of side x side rows side by side: (h*w, E) -> (h*w / side², side² * E)."""
    (height, width), n = grid, rows.shape[1]
    rows = rows.reshape(height // side, side, width // side, side, n)
    return np.ascontiguousarray(rows.transpose(0, 2, 1, 3, 4)).reshape(-1, side * side * n)


def interpolated(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A square table (side * side, E) stretched over a grid of another size -> (h * w, E).

    Bilinear; its corners stay in the corners.
    """
    side = math.isqrt(len(table))
    if grid == (side, side):
        return table
    table = table.reshape(side, side, -1)
    (y0, y1, fy), (x0, x1, fx) = (_between(side, n) for n in grid)
    fy, fx = fy[:, None, None], fx[None, :, None]
    top = table[y0][:, x0] * (1 - fx) + table[y0][:, x1] * fx
    bottom = table[y1][:, x0] * (1 - fx) + table[y1][:, x1] * fx
    return (top * (1 - fy) + bottom * fy).reshape(-1, table.shape[2])


def _between(side: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of n points from 0 to side - 1: the entries before and after, and how far between."""
    at = np.linspace(0, side - 1, n, dtype=np.float32)
    before = at.astype(int)
    return before, np.minimum(before + 1, side - 1), at - before
