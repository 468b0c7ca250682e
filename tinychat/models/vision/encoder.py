"""Runs a tower: tiles through the transformer, merged rows through the projector."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.gguf_file import GGUFFile
from tinychat.models.vision.clip import InternVL, Llava
from tinychat.models.vision.config import VisionConfig, projector_of
from tinychat.models.vision.pixels import Scaler, Tile
from tinychat.models.vision.pixtral import Pixtral
from tinychat.models.vision.qwen import Qwen2, Qwen3, Qwen25
from tinychat.models.vision.siglip import Gemma3, Idefics3
from tinychat.models.vision.tower import ImageBlock, Rows, Tower
from tinychat.models.weights import Weights
from tinychat.ops import open_executor
from tinychat.ops.batch import Batch
from tinychat.ops.program import PAGE_TOKENS, Program
from tinychat.ops.recorder import Recorder

TOWER_PART = 0.95       # of a tile's time; the projector takes the rest
PROJECTOR_ROWS = 256    # tokens of one of the projector's steps

# projector type: how it sees
TOWERS: dict[str, type[Tower]] = {
    "gemma3": Gemma3,
    "idefics3": Idefics3,
    "internvl": InternVL,
    "mlp": Llava,
    "pixtral": Pixtral,
    "qwen2.5o": Qwen25,
    "qwen2.5vl_merger": Qwen25,
    "qwen2vl_merger": Qwen2,
    "qwen3vl_merger": Qwen3,
}
KNOWN = tuple(sorted(TOWERS))


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """parts: in order, blocks of image tokens, and the texts that the family writes round them,
    special tokens as text. both_ways: a block's tokens see one another in both directions.
    """

    parts: tuple[str | ImageBlock, ...]
    both_ways: bool


class VisionEncoder:
    """The vision tower and projector of an mmproj file. One image at a time.

    n_embd: width of the text model. kind, threads, isa: as `open_executor` takes them.
    Raises: ModelFileError for a projector of an unknown type, or one of another model, and naming
    the key or tensor that is missing or misshapen.
    """

    def __init__(self, file: GGUFFile, *, n_embd: int, kind: str | None = None,
                 threads: int | None = None, isa: str | None = None):
        tower, stages = read_tower(file)
        self.n_deepstack = tower.n_deepstack
        self.width = stages[1][0].result.width
        if self.width != n_embd * (1 + tower.n_deepstack):
            raise ModelFileError(f"{file.path}: its projector makes {self.width} values a token, "
                                 f"the model takes {n_embd * (1 + tower.n_deepstack)}")
        how = dict(kind=kind, threads=threads, isa=isa)
        self._tower, self._stages = tower, []
        try:
            for program, n_rows in stages:
                self._stages.append(Stage(program, n_rows, **how))
        except BaseException:
            self.close()
            raise

    @property
    def placeholder(self) -> str | None:
        """The special token that stands for image tokens in the text; None: there is none."""
        return self._tower.placeholder

    def count(self, height: int, width: int) -> int:
        """Image tokens of a picture of that size."""
        return sum(self._tower.n_tokens(part) for part in self._tower.layout(height, width)
                   if isinstance(part, Tile))

    def encode(self, pixels: np.ndarray,
               report: Callable[[float], None] = lambda part: None) -> EncodedImage:
        """pixels: uint8 (h, w, 3); report: gets 0 to 1, and may raise to stop."""
        layout = self._tower.layout(*pixels.shape[:2])
        scaler = Scaler(self._tower.prepare(pixels), self._tower.resample)
        n_tiles, n_done, parts = sum(isinstance(part, Tile) for part in layout), 0, []
        for part in layout:
            if isinstance(part, str):
                parts.append(part)
                continue
            parts.append(self._encode_tile(
                scaler, part, lambda done: report((n_done + TOWER_PART * done) / n_tiles)))
            n_done += 1
            report(n_done / n_tiles)
        return EncodedImage(tuple(parts), self._tower.both_ways)

    def _encode_tile(self, scaler: Scaler, tile: Tile, report) -> ImageBlock:
        tower, (see, project), grid = self._tower, self._stages, self._tower.grid(tile)
        merged = tower.merge(see.run(tower.rows(scaler.cut(tile), grid)), grid)
        report(1.0)
        projected = [project.run(Rows(merged[at:at + PROJECTOR_ROWS]))
                     for at in range(0, len(merged), PROJECTOR_ROWS)]
        return tower.image_block(np.concatenate(projected), grid)

    def close(self) -> None:
        """May be called again."""
        for stage in self._stages:
            stage.executor.close()
        self._stages = []


def read_tower(file: GGUFFile) -> tuple[Tower, list[tuple[Program, int]]]:
    """What an mmproj file describes, and each program that it runs with the most rows of a step.

    Raises: ModelFileError, as `VisionEncoder` does.
    """
    name = projector_of(file.metadata)
    if name not in TOWERS:
        found = f"projector type {name!r} is not supported" if name else "no vision tower"
        raise ModelFileError(f"{file.path}: {found}; known are {', '.join(KNOWN)}")
    tower = TOWERS[name](VisionConfig.from_metadata(file.metadata), Weights(file.tensors))
    seen, projected = record(tower, name)
    return tower, [(seen, tower.max_rows), (projected, PROJECTOR_ROWS)]


def record(tower: Tower, name: str) -> tuple[Program, Program]:
    """The programs of the tower and of its projector."""
    g = Recorder(keeps_kv=False)
    seen = g.finish(f"{name} tower", tower.describe(g))
    g = Recorder(keeps_kv=False)
    given = g.given(tower.merged_width() * (1 + tower.n_deepstack))
    projected = g.finish(f"{name} projector", tower.project(g, g.outputs(given)))
    tower.check_all_asked(name)
    return seen, projected


class Stage:
    """An executor whose every step is one tile, or a part of its tokens, its rows in order."""

    def __init__(self, program: Program, max_rows: int, **how):
        n_pages = -(-max_rows // PAGE_TOKENS)
        self.executor = open_executor(program, n_pages=n_pages, max_tokens=max_rows,
                                      max_outputs=max_rows, max_sequences=1, kv_type="f32", **how)
        self._pages = np.arange(n_pages, dtype=np.int32)[None]

    def run(self, rows: Rows) -> np.ndarray:
        """The program's result for the patches, as they stand in the tile: float32 (n, width)."""
        n, program = len(rows.inputs), self.executor.program
        at = np.arange(n, dtype=np.int32)
        spans = np.zeros((n, 2, 2), np.int32)
        spans[:, 0, 1] = n - 1
        if rows.ends is not None:
            begins = np.searchsorted(rows.ends, rows.ends, side="left")
            spans[:, 1] = np.stack([begins, rows.ends - 1], 1)
        result = self.executor.step(Batch(
            np.zeros(n, np.int32), at, np.zeros(n, np.int32), self._pages, at[rows.n_first:],
            inputs=np.ascontiguousarray(rows.inputs, np.float32), input_rows=at,
            axes=rows.axes if program.n_axes else None,
            spans=np.ascontiguousarray(spans[:, :program.n_spans]) if program.n_spans else None))
        if rows.order is None:
            return result.copy()
        out = np.empty_like(result)
        out[rows.order] = result
        return out
