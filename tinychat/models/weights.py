"""A file's tensors by name, checked for their shapes, and parts of them by their rows."""
import re
from dataclasses import replace

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.gguf_file import GGML_QUANT_SIZES, QTensor

# Scales of the quantisation of others, frequencies of ropes that a program does not use
SPARE = re.compile(r"(^|\.)(rope_(freqs|factors_(long|short))\.weight|input_scale"
                   r"|attn_rot_embd\.weight)$")


class Weights:
    """A file's tensors by name, checked for their shapes; remembers which were asked for."""

    def __init__(self, tensors: dict[str, QTensor], prefix: str = "",
                 asked: set[str] | None = None):
        self._tensors, self._prefix = tensors, prefix
        self._asked = set() if asked is None else asked

    def layer(self, i: int) -> "Weights":
        """The tensors of transformer block i, by their names within it."""
        return self.under(f"blk.{i}.")

    def under(self, prefix: str) -> "Weights":
        """The tensors whose names begin so, by the rest of their names."""
        return Weights(self._tensors, self._prefix + prefix, self._asked)

    def has(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def names(self) -> list[str]:
        """Of the tensors that are there, by the rest of their names."""
        return [name.removeprefix(self._prefix) for name in self._tensors
                if name.startswith(self._prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there; it does not count as asked for."""
        return self._tensors[self._prefix + name].shape

    def tensor(self, name: str, *shape: int | None) -> QTensor:
        """The tensor of that shape, none of it 0; None stands for any size.

        Raises: ModelFileError naming the tensor, and the expected and found shape.
        """
        name = self._prefix + name
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"tensor {name!r} is missing; expected shape {_shape(shape)}")
        fits = len(shape) == len(tensor.shape) and all(
            found > 0 and size in (None, found) for size, found in zip(shape, tensor.shape))
        if not fits:
            raise ModelFileError(f"tensor {name!r}: expected shape {_shape(shape)}, "
                                 f"found {_shape(tensor.shape)}")
        self._asked.add(name)
        return tensor

    def optional(self, name: str, *shape: int | None) -> QTensor | None:
        return self.tensor(name, *shape) if self.has(name) else None

    def ignore(self, *names: str) -> None:
        """These have a meaning, but not for this program."""
        self._asked.update(self._prefix + name for name in names)

    def ignore_layers(self, layers: range) -> None:
        """Those whose layers this program does not run."""
        prefixes = tuple(f"blk.{i}." for i in layers)
        self._asked.update(name for name in self._tensors if name.startswith(prefixes))

    def check_all_asked(self, architecture: str) -> None:
        """A tensor that the description never asked for means a model other than the one described.

        Raises: ModelFileError naming the first few of them.
        """
        left = sorted(name for name in self._tensors.keys() - self._asked
                      if not SPARE.search(name))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ModelFileError(f"architecture {architecture!r} has no use for tensor "
                                 f"{', '.join(map(repr, left[:3]))}{more}, "
                                 "so this build would not compute what the file means")


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def part(tensor: QTensor, begin: int, end: int) -> QTensor:
    """Rows begin … end-1 of a matrix, elements of a vector: a view, nothing is copied.

    Raises: ModelFileError for a vector in blocks.
    """
    assert 0 <= begin < end <= tensor.shape[0]
    _check_rows(tensor, tensor.shape)
    n_bytes = tensor.n_bytes // tensor.shape[0]
    return replace(tensor, name=f"{tensor.name}[{begin}:{end}]",
                   shape=(end - begin, *tensor.shape[1:]),
                   data=tensor.data[begin * n_bytes:end * n_bytes])


def gathered(tensor: QTensor, rows: np.ndarray, what: str) -> QTensor:
    """These rows of a matrix, or elements of a vector, in this order: a copy of their bytes.

    what: a name for the part. Raises: ModelFileError for a vector in blocks.
    """
    _check_rows(tensor, tensor.shape)
    data = tensor.data.reshape(tensor.shape[0], -1)[rows].reshape(-1)
    return replace(tensor, name=f"{tensor.name}[{what}]", shape=(len(rows), *tensor.shape[1:]),
                   data=data)


def reshaped(tensor: QTensor, *shape: int) -> QTensor:
    """The same bytes in another shape. Raises: ModelFileError where its rows are no whole blocks."""
    _check_rows(tensor, shape)
    return replace(tensor, shape=shape)


def _check_rows(tensor: QTensor, shape: tuple[int, ...]) -> None:
    """Each row by itself, or each element of a vector, has to begin at a byte."""
    per_block = GGML_QUANT_SIZES[tensor.qtype][0]
    if (shape[-1] if len(shape) > 1 else 1) % per_block:
        raise ModelFileError(f"tensor {tensor.name!r}: expected rows of whole blocks of {per_block}"
                             f", found {tensor.qtype.name} of shape {_shape(tensor.shape)}")
