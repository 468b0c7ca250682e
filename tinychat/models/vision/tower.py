"""The transformer that all vision towers are, and what a family adds to it.

Shapes: T patches of the picture, a class row included; E n_embd of the tower, P values of a patch,
D width of a head. The presence of a tensor is the flag: a norm without a bias is an RMS norm.
"""
import math
from dataclasses import dataclass, replace

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.gguf_file import GGMLQuantizationType, QTensor
from tinychat.models.layers import linear, linear_parts
from tinychat.models.vision.config import MAX_ROWS, VisionConfig
from tinychat.models.vision.pixels import Tile, patches, windows
from tinychat.models.weights import Weights, reshaped
from tinychat.ops.meaning import dequantize
from tinychat.ops.program import Buffer, Heads, Rope
from tinychat.ops.recorder import Recorder

# Tensors of an mmproj file that belong to another encoder, or to nothing that is run
FOREIGN = ("a.", "mm.a.", "v.head.", "v.image_newline", "v.view_seperator")


@dataclass(frozen=True, eq=False)
class ImageBlock:
    """What the text model sees in the place of n tokens.

    rows: float32 (n, width). axes: int32 (n, 3), each token's (time, row, column) from the block's
    own start; None: they take consecutive positions. n_positions: how many the block takes.
    """

    rows: np.ndarray
    axes: np.ndarray | None
    n_positions: int


@dataclass(frozen=True, eq=False)
class Rows:
    """One tile as the tower takes it: inputs float32 (T, width), and where each patch is.

    axes: int32 (T, 2), row and column, for towers that turn by them. ends: the row after the
    last of each patch's window, where there are windows. order: which patch each row is, None: as
    they stand in the tile. n_first: rows before the patches.
    """

    inputs: np.ndarray
    axes: np.ndarray | None = None
    ends: np.ndarray | None = None
    order: np.ndarray | None = None
    n_first: int = 0


class Tower:
    """One projector type: how a picture becomes tiles, a tile rows, and rows image tokens.

    Families say what differs from a square picture seen whole, with learned positions.
    placeholder: the special token that stands for an image token in the text, if there is one.
    both_ways: an image's tokens see one another in both directions.
    Raises: ModelFileError naming the key or tensor that does not fit.
    """

    placeholder: str | None = None
    both_ways = False
    resample = "bicubic"
    gelu = "gelu"              # what the file means by it, in the blocks
    n_merge = 1                # a token is made of n_merge x n_merge patches
    n_deepstack = 0            # feature vectors of inner layers that follow a token's own
    rope: Rope | None = None

    def __init__(self, config: VisionConfig, w: Weights):
        self.config, self.w = config, w
        self.patch_values = 3 * config.patch_size ** 2
        self.heads = Heads(config.n_head, config.n_head, config.head_dim, config.head_dim,
                           1 / math.sqrt(config.head_dim), causal=False, span=0)
        if config.activation == "gelu":
            self.config = replace(config, activation=self.gelu)

    # Geometry

    def layout(self, height: int, width: int) -> list[str | Tile]:
        """Texts and tiles of a picture of that size, in order."""
        side = self.config.image_size
        return [Tile(((side, side),))]

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Before anything is resized."""
        return pixels

    def grid(self, tile: Tile) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = tile.size
        return height // self.config.patch_size, width // self.config.patch_size

    def n_tokens(self, tile: Tile) -> int:
        height, width = self.grid(tile)
        return height // self.n_merge * (width // self.n_merge)

    @property
    def max_rows(self) -> int:
        """Rows of the largest tile."""
        side = self._square_side()
        return side * side + self.has_class

    def _square_side(self) -> int:
        """Patches a side of a tower that sees squares of one size."""
        size, patch = self.config.image_size, self.config.patch_size
        side = size // patch
        if not side or side % self.n_merge or side * side >= MAX_ROWS:
            raise ModelFileError(
                f"metadata key clip.vision.image_size: expected a multiple of {self.n_merge} "
                f"patches of {patch}, fewer than {MAX_ROWS} in all, got {size}")
        return side

    # Rows

    @property
    def has_class(self) -> bool:
        return self.w.has("v.class_embd")

    def rows(self, pixels: np.ndarray, grid: tuple[int, int]) -> Rows:
        """Patches and their positions side by side, behind the class row if there is one."""
        values = patches(pixels, self.config.patch_size, self.config.mean, self.config.std)
        if not self.w.has("v.position_embd.weight"):
            return Rows(values)
        table = self.position_table()
        if self.has_class:
            first = np.zeros((1, self.patch_values), np.float32)
            values = np.concatenate([first, values])
        return Rows(np.concatenate([values, self.positions(table, grid)], 1),
                    n_first=int(self.has_class))

    def position_table(self) -> np.ndarray:
        """float32 (n, E); the class row's comes first, with the class itself in it."""
        w, n_embd = self.w, self.config.n_embd
        table = dequantize(w.tensor("v.position_embd.weight", None, n_embd)).astype(np.float32)
        if self.has_class:
            table = table.copy()
            table[0] += dequantize(w.tensor("v.class_embd", *w.shape("v.class_embd"))).reshape(-1)
            if w.has("v.patch_embd.bias"):  # it is added to every row
                table[0] -= dequantize(w.tensor("v.patch_embd.bias", n_embd))
        return table

    def positions(self, table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """The position embedding of each row."""
        return table

    def merge(self, hidden: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Patches (h * w, E) -> what each token is made of (n, K)."""
        return windows(hidden, grid, self.n_merge)

    def image_block(self, rows: np.ndarray, grid: tuple[int, int]) -> ImageBlock:
        """A tile's tokens, where they stand."""
        return ImageBlock(rows, None, len(rows))

    # Programs

    def describe(self, g: Recorder) -> Buffer:
        """The rows of a tile -> (T, E), with the states of deepstack layers behind."""
        w, c = self.w.under("v."), self.config
        x = self._embed(g, w)
        if w.has("pre_ln.weight"):
            x = norm(g, w, "pre_ln", x, c.norm_eps)
        return self.through(g, w, x)

    def _embed(self, g: Recorder, w: Weights) -> Buffer:
        """A patch's values through one matrix, or two of Qwen's: for two moments of one picture."""
        c = self.config
        given = g.given(self.patch_values)
        x = g.linear(given, self._patch_matrix(w, "patch_embd.weight"),
                     w.optional("patch_embd.bias", c.n_embd))
        if w.has("patch_embd.weight.1"):
            x = g.add(x, g.linear(given, self._patch_matrix(w, "patch_embd.weight.1")))
        if w.has("position_embd.weight"):
            self._check_positions()
            x = g.add(x, g.given(c.n_embd, self.patch_values))
        return x

    def _patch_matrix(self, w: Weights, name: str) -> QTensor:
        side, n_embd = self.config.patch_size, self.config.n_embd
        return reshaped(w.tensor(name, n_embd, 3, side, side), n_embd, self.patch_values)

    def _check_positions(self) -> None:
        """A table of one row for each of a square tile."""
        self.w.tensor("v.position_embd.weight", self.max_rows, self.config.n_embd)
        if self.has_class:
            shape = self.w.shape("v.class_embd")
            self.w.tensor("v.class_embd", *shape)
            if math.prod(shape) != self.config.n_embd:
                raise ModelFileError(f"tensor 'v.class_embd': expected {self.config.n_embd} "
                                     f"values, found the shape {shape}")

    def through(self, g: Recorder, w: Weights, x: Buffer) -> Buffer:
        """All blocks, and the norm after them."""
        c = self.config
        for i in range(c.n_layer):
            x = block(g, w.layer(i), c, x, self.heads_of(i), self.rope)
        x = g.outputs(x)
        return norm(g, w, "post_ln", x, c.norm_eps) if w.has("post_ln.weight") else x

    def heads_of(self, i: int) -> Heads:
        return self.heads

    def merged_width(self) -> int:
        return self.config.n_embd * self.n_merge ** 2

    def project(self, g: Recorder, x: Buffer) -> Buffer:
        """What tokens are made of (n, K) -> (n, n_embd of the text model)."""
        raise NotImplementedError

    def check_all_asked(self, name: str) -> None:
        """As `Weights.check_all_asked`, but for what belongs to other encoders."""
        self.w.ignore(*(tensor for tensor in self.w.names() if tensor.startswith(FOREIGN)))
        self.w.check_all_asked(name)


def norm(g: Recorder, w: Weights, name: str, x: Buffer, eps: float, group: int = 0) -> Buffer:
    """The kind of norm that the file has the tensors of."""
    n = group or x.width
    weight, bias = w.tensor(f"{name}.weight", n), w.optional(f"{name}.bias", n)
    return g.layernorm(x, weight, bias, eps) if bias else g.rmsnorm(x, weight, eps)


def block(g: Recorder, w: Weights, c: VisionConfig, x: Buffer, heads: Heads,
          rope: Rope | None) -> Buffer:
    """Transformer block: x (T, E) -> (T, E)."""
    h = attention(g, w, c, norm(g, w, "ln1", x, c.norm_eps), heads, rope)
    x = g.add(x, _scaled(g, w, "ls1", h))
    return g.add(x, _scaled(g, w, "ls2", ffn(g, w, c, norm(g, w, "ln2", x, c.norm_eps))))


def _scaled(g: Recorder, w: Weights, name: str, x: Buffer) -> Buffer:
    weight = w.optional(f"{name}.weight", x.width)
    return g.mul_vector(x, weight) if weight else x


def attention(g: Recorder, w: Weights, c: VisionConfig, x: Buffer, heads: Heads,
              rope: Rope | None) -> Buffer:
    """Each row sees its span -> (T, E)."""
    n = heads.n_head * heads.key_length
    if w.has("attn_qkv.weight"):
        q, k, v = linear_parts(g, w, "attn_qkv", x, n, n, n)
    else:
        q, k, v = (linear(g, w, f"attn_{name}", x, n) for name in "qkv")
    q, k = (_head_norm(g, w, f"attn_{name}_norm", y, c.norm_eps) for name, y in zip("qk", (q, k)))
    if rope:
        q, k = (g.rope(y, heads.key_length, rope) for y in (q, k))
    return linear(g, w, "attn_out", g.attend(q, k, v, heads), c.n_embd)


def _head_norm(g: Recorder, w: Weights, name: str, x: Buffer, eps: float) -> Buffer:
    """Over a head or the whole row, as the weight is long; x where there is none."""
    if not w.has(f"{name}.weight"):
        return x
    length = w.shape(f"{name}.weight")[-1] if w.shape(f"{name}.weight") else 0
    if not length or x.width % length:
        length = x.width
    return norm(g, w, name, x, eps, length)


def ffn(g: Recorder, w: Weights, c: VisionConfig, x: Buffer) -> Buffer:
    """down(fn(up(x))), or down(fn(gate(x)) * up(x)) where there is a gate -> (T, E)."""
    up, down = _up_and_down(w, c.n_embd)
    n_ff = w.tensor(f"{up}.weight", None, c.n_embd).shape[0]
    h = linear(g, w, up, x, n_ff)
    if w.has("ffn_gate.weight"):
        h = g.gate(c.activation, linear(g, w, "ffn_gate", x, n_ff), h)
    else:
        h = g.activate(c.activation, h)
    return linear(g, w, down, h, c.n_embd)


def _up_and_down(w: Weights, n_embd: int) -> tuple[str, str]:
    """Their names: files of old converters have them the other way round."""
    swapped = (w.has("ffn_down.weight") and w.has("ffn_up.weight")
               and w.shape("ffn_down.weight")[1:] == (n_embd,)
               and w.shape("ffn_up.weight")[1:] != (n_embd,))
    return ("ffn_down", "ffn_up") if swapped else ("ffn_up", "ffn_down")


def mlp(g: Recorder, w: Weights, names: tuple[str, ...], x: Buffer) -> Buffer:
    """Matrices with a GELU between each two, of whatever widths the file has."""
    for i, name in enumerate(names):
        n_out = w.tensor(f"{name}.weight", None, x.width).shape[0]
        x = linear(g, w, name, g.activate("gelu_erf", x) if i else x, n_out)
    return x


def transposed(tensor: QTensor) -> QTensor:
    """A matrix stored the other way round: a float32 copy."""
    values = np.ascontiguousarray(dequantize(tensor).T, np.float32)
    return QTensor(f"{tensor.name}ᵀ", GGMLQuantizationType.F32, values.shape,
                   values.reshape(-1).view(np.uint8))
