"""GGUF bytes for tests: `gguf`'s own writer for whole files, structs for broken ones."""
import struct
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGUFValueType


def write_sample(path: Path) -> Path:
    """Every kind of value and tensors of four types, by the gguf package's writer."""
    writer = GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"test.{kind}", 7)
    writer.add_float32("test.float32", 0.5)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.yes", True)
    writer.add_bool("test.no", False)
    writer.add_string("test.text", "naïve ☃")
    writer.add_array("test.texts", ["a", "", "ü", "<|im_end|>"])
    writer.add_array("test.floats", [1.5, -2.0])
    writer.add_array("test.ints", [1, -2, 3])
    writer.add_array("test.flags", [True, False, True])
    writer.add_key_value("test.nested", [[1, 2], [3]], GGUFValueType.ARRAY, GGUFValueType.ARRAY)
    writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("f16", np.arange(5, dtype=np.float16))
    writer.add_tensor("q8_0", np.arange(3 * 2 * 34, dtype=np.uint8).reshape(3, 68),
                      raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("q4_k", np.arange(144, dtype=np.uint8).reshape(1, 144),
                      raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: GGUFValueType, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def array(kind: GGUFValueType, n: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, n) + values


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_bytes(keys=(), tensors=(), data=b"", *, version=3, n_keys=None, n_tensors=None,
               alignment=32) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors) if n_tensors is None else n_tensors,
                       len(keys) if n_keys is None else n_keys) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % alignment) + data
