"""A GGUF file as a metadata dict and memory-mapped tensors, opened in milliseconds.

A file comes from strangers: each count is held against the bytes that are left before anything is
allocated for it, and whatever is wrong ends in a `ModelFileError` that names the file and the byte.

    "GGUF" u32 version | u64 n_tensors | u64 n_keys | keys | tensor infos | padding | tensor data
    key:    string name | u32 value type | value
    tensor: string name | u32 n_dims | u64 dims[n_dims], innermost first | u32 type | u64 offset
    string: u64 n_bytes | UTF-8
    array:  u32 value type | u64 n | values

Source: ggml-org/ggml: docs/gguf.md.
"""
import math
import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct, error as StructError
from typing import Any

import numpy as np

from tinychat.errors import ModelFileError
from tinychat.gguf_tables import (
    GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType)

try:
    from tinychat._kernels import read_strings
except ImportError:                    # said when a model is loaded
    read_strings = None

__all__ = ["GGML_QUANT_SIZES", "GGMLQuantizationType", "GGUFFile", "LlamaFileType", "QTensor",
           "open_gguf"]

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")

_U32, _U64 = Struct("<I"), Struct("<Q")
_MIN_KEY_BYTES = 8 + 4 + 1             # an empty name, a type, one byte of value
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8      # an empty name, no dims, a type, an offset
_CODES = {                             # value type: its letter in `struct` and in NumPy
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}
_SCALARS = {kind: Struct("<" + code) for kind, code in _CODES.items()}
_DTYPES = {kind: np.dtype("<" + code) for kind, code in _CODES.items()}


@dataclass(frozen=True, eq=False)
class QTensor:
    """One tensor as it is stored; nothing is dequantised here.

    shape: NumPy order, (rows, columns) for a matrix; a row is whole blocks of `qtype`.
    data: uint8 (n_bytes,), a read-only view on the map.
    """

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def n_bytes(self) -> int:
        return self.data.size

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of `shape[-1]` values."""
        return _row_bytes(self.qtype, self.shape)


@dataclass(eq=False)
class GGUFFile:
    """An open model. Arrays taken from `tensors` stay valid after `close`: they keep the map alive.

    metadata: str, int, float, bool; arrays of numbers as `np.ndarray`, other arrays as lists.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, QTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise ModelFileError(f"{self.path}: expected a string under general.architecture, "
                                 f"got {name!r}")
        return name

    def close(self) -> None:
        """Let go of the tensors; the map goes with the last array that looks into it."""
        self.tensors = {}

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file, or all parts of a split one through its first part.

    Raises: ModelFileError for anything that is not a well-formed little-endian GGUF 2 or 3.
    """
    path = Path(path)
    first = _read_file(path)
    n_parts = _split_number(first, "split.count", 1)
    if n_parts > 1:
        for part_path in _other_parts(first, n_parts):
            _merge_part(first, _read_file(part_path), n_parts)
        _check_split_total(first)
    return first


# Split files

def _split_number(file: GGUFFile, key: str, default: int) -> int:
    number = file.metadata.get(key, default)
    if type(number) is not int:
        raise ModelFileError(f"{file.path}: expected an integer under {key}, got {number!r}")
    return number


def _other_parts(first: GGUFFile, n_parts: int) -> list[Path]:
    """Paths of parts 2..n_parts, from the name of the first."""
    path, part = first.path, _split_number(first, "split.no", 0) + 1
    match = PART_NAME.fullmatch(path.name)
    if not match or int(match["count"]) != n_parts or int(match["part"]) != part:
        raise ModelFileError(f"{path}: holds part {part} of {n_parts}, so its name must end in "
                             f"-{part:05d}-of-{n_parts:05d}.gguf for the other parts to be found")
    if part != 1:
        raise ModelFileError(f"{path}: is part {part} of {n_parts}; open the first, "
                             f"{match['stem']}-00001-of-{n_parts:05d}.gguf")
    return [path.with_name(f"{match['stem']}-{i:05d}-of-{n_parts:05d}.gguf")
            for i in range(2, n_parts + 1)]


def _merge_part(first: GGUFFile, part: GGUFFile, n_parts: int) -> None:
    found = _split_number(part, "split.no", -1) + 1, _split_number(part, "split.count", 1)
    expected = int(PART_NAME.fullmatch(part.path.name)["part"]), n_parts
    if found != expected:
        raise ModelFileError(f"{part.path}: expected part {expected[0]} of {expected[1]}, "
                             f"its metadata says {found[0]} of {found[1]}")
    twice = first.tensors.keys() & part.tensors.keys()
    if twice:
        raise ModelFileError(f"{part.path}: tensor {min(twice)!r} is in an earlier part too")
    first.tensors.update(part.tensors)


def _check_split_total(first: GGUFFile) -> None:
    total = _split_number(first, "split.tensors.count", len(first.tensors))
    if total != len(first.tensors):
        raise ModelFileError(f"{first.path}: split.tensors.count is {total}, "
                             f"the parts hold {len(first.tensors)} tensors")


# One file

def _read_file(path: Path) -> GGUFFile:
    reader = _Reader(path, _map(path))
    version = reader.header()
    n_tensors = reader.count("tensors", _MIN_TENSOR_BYTES)
    n_keys = reader.count("metadata keys", _MIN_KEY_BYTES)
    metadata = reader.metadata(n_keys)
    tensors = reader.tensors(n_tensors, _alignment(reader, metadata))
    return GGUFFile(path, version, metadata, tensors)


def _map(path: Path) -> mmap.mmap:
    # NOTE: a file that shrinks while it is mapped ends the process (SIGBUS): replace a model, never
    # rewrite it in place.
    try:
        if not path.is_file():  # before open(): a pipe would block there
            problem = "not a regular file" if path.exists() else "no such file"
            raise ModelFileError(f"{path}: {problem}")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # what mmap says of no bytes at all
        raise ModelFileError(f"{path}: the file is empty") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None


def _alignment(reader: "_Reader", metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        reader.fail(f"expected a power of two under general.alignment, got {alignment!r}")
    return alignment


def _row_bytes(qtype: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    return (shape[-1] if shape else 1) // block * block_bytes


class _Reader:
    """A position in the mapped bytes; every read is checked against their end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.pos, self.end = path, data, 0, len(data)

    def fail(self, problem: str, pos: int | None = None):
        raise ModelFileError(f"{self.path}: byte {self.pos if pos is None else pos}: {problem}")

    def need(self, n_bytes: int, what: str) -> None:
        left = self.end - self.pos
        if n_bytes > left:
            self.fail(f"{what} needs {n_bytes} bytes, {left} are left")

    def number(self, form: Struct, what: str):
        self.need(form.size, what)
        self.pos += form.size
        return form.unpack_from(self.data, self.pos - form.size)[0]

    def count(self, what: str, min_bytes: int) -> int:
        """A u64 count of things of at least `min_bytes` each, judged before it sizes anything."""
        pos, n = self.pos, self.number(_U64, f"the number of {what}")
        left = self.end - self.pos
        if n > left // min_bytes:
            self.fail(f"{n} {what} cannot be in the {left} bytes that are left", pos)
        return n

    def header(self) -> int:
        magic = self.data[:4]
        if magic != b"GGUF":
            self.fail(f"not a GGUF file: expected b'GGUF', got {magic!r}")
        self.pos = 4
        version = self.number(_U32, "the version")
        if version and not version & 0xFFFF:
            self.fail("the file is big-endian; gguf-convert-endian makes it little-endian", 4)
        if version not in (2, 3):
            self.fail(f"GGUF version {version} is not supported, only 2 and 3", 4)
        return version

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, n: int, what: str) -> list[str]:
        """n strings in a row: 150,000 in a vocabulary, hence the compiled loop (60 ns for each, and
        400 in this one), and here the locals and few checks."""
        if n > 1 and read_strings and (read := read_strings(self.data, self.pos, n)):
            texts, self.pos = read
            return texts
        data, end, pos, length_at = self.data, self.end, self.pos, _U64.unpack_from
        texts = []
        append = texts.append
        try:
            for _ in range(n):
                start = pos + 8
                stop = start + length_at(data, pos)[0]
                if stop > end:
                    break
                append(data[start:stop].decode())
                pos = stop
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}", start + error.start)
        except StructError:
            self.fail(f"{what} ends before its length is told", pos)
        if len(texts) < n:
            self.fail(f"{what} of {stop - start} bytes, {end - start} are left", pos)
        self.pos = pos
        return texts

    def metadata(self, n_keys: int) -> dict[str, Any]:
        values = {}
        for _ in range(n_keys):
            pos, key = self.pos, self.string("a metadata key")
            if key in values:
                self.fail(f"metadata key {key!r} comes twice", pos)
            values[key] = self.value(self.value_type(key), key)
        return values

    def value_type(self, key: str) -> GGUFValueType:
        pos, number = self.pos, self.number(_U32, f"the type of {key!r}")
        try:
            return GGUFValueType(number)
        except ValueError:
            self.fail(f"{key!r} has the unknown value type {number}", pos)

    def value(self, kind: GGUFValueType, key: str, depth: int = 0):
        if kind == GGUFValueType.STRING:
            return self.string(f"the text of {key!r}")
        if kind == GGUFValueType.ARRAY:
            return self.array(key, depth + 1)
        if kind == GGUFValueType.BOOL:
            return bool(self.numbers(kind, 1, key)[0])
        return self.number(_SCALARS[kind], f"the value of {key!r}")

    def array(self, key: str, depth: int) -> list | np.ndarray:
        if depth > MAX_ARRAY_DEPTH:
            self.fail(f"{key!r} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        kind = self.value_type(key)
        if kind == GGUFValueType.STRING:
            return self.strings(self.count(f"texts of {key!r}", 8), f"a text of {key!r}")
        if kind == GGUFValueType.ARRAY:
            n = self.count(f"arrays of {key!r}", 4 + 8)
            return [self.array(key, depth + 1) for _ in range(n)]
        return self.numbers(kind, self.count(f"values of {key!r}", _DTYPES[kind].itemsize), key)

    def numbers(self, kind: GGUFValueType, n: int, key: str) -> np.ndarray:
        """A copy, so that metadata is aligned, native and does not pin the map."""
        dtype = _DTYPES[kind]
        self.need(n * dtype.itemsize, f"the value of {key!r}")
        values = np.frombuffer(self.data, dtype, n, self.pos).astype(dtype.newbyteorder("="))
        if kind == GGUFValueType.BOOL and (values.view(np.uint8) > 1).any():
            self.fail(f"{key!r} has a boolean that is neither 0 nor 1")
        self.pos += n * dtype.itemsize
        return values

    def tensors(self, n_tensors: int, alignment: int) -> dict[str, QTensor]:
        infos = [self.tensor_info(alignment) for _ in range(n_tensors)]
        base = -(-self.pos // alignment) * alignment
        mapped = np.frombuffer(self.data, np.uint8)
        found, extents = {}, []
        for pos, name, qtype, shape, offset in infos:
            if name in found:
                self.fail(f"tensor {name!r} comes twice", pos)
            start = base + offset
            stop = start + math.prod(shape[:-1]) * _row_bytes(qtype, shape)
            if start < stop:
                extents.append((start, stop, name, pos))
            found[name] = QTensor(name, qtype, shape, mapped[start:stop])
        self.check_extents(extents)
        return found

    def tensor_info(self, alignment: int) -> tuple:
        """(byte position of this entry, name, qtype, shape in NumPy order, offset into the data)"""
        pos, name = self.pos, self.string("a tensor name")
        n_dims = self.number(_U32, f"the number of dimensions of {name!r}")
        if n_dims > MAX_DIMS:
            self.fail(f"tensor {name!r} has {n_dims} dimensions, at most {MAX_DIMS} are known", pos)
        dims = [self.number(_U64, f"a dimension of {name!r}") for _ in range(n_dims)]
        qtype = self.tensor_type(name)
        offset = self.number(_U64, f"the offset of {name!r}")
        block, n_cols = GGML_QUANT_SIZES[qtype][0], dims[0] if dims else 1
        if n_cols % block:
            self.fail(f"tensor {name!r} has rows of {n_cols} values, "
                      f"{qtype.name} stores blocks of {block}", pos)
        if offset % alignment:
            self.fail(f"tensor {name!r} has the offset {offset}, no multiple of {alignment}", pos)
        return pos, name, qtype, tuple(reversed(dims)), offset

    def tensor_type(self, name: str) -> GGMLQuantizationType:
        pos, number = self.pos, self.number(_U32, f"the type of {name!r}")
        try:
            return GGMLQuantizationType(number)
        except ValueError:
            self.fail(f"tensor {name!r} has the unknown type {number}", pos)

    def check_extents(self, extents: list[tuple[int, int, str, int]]) -> None:
        """extents: (first byte, byte after the last, tensor, where it says so), none empty."""
        for start, stop, name, pos in extents:
            if stop > self.end:
                self.fail(f"tensor {name!r} lies at bytes {start} to {stop}, "
                          f"the file ends at {self.end}", pos)
        extents.sort()
        for (_, stop, before, _), (start, _, name, pos) in zip(extents, extents[1:]):
            if start < stop:
                self.fail(f"tensor {name!r} overlaps {before!r}", pos)
