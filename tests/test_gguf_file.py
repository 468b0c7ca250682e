"""The mapping reader against the gguf package's writer and reader, and against malformed files."""
import struct
import time

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGUFEndian, GGUFValueType
from helpers_gguf import array, file_bytes, key, string, tensor, write_sample

from tinychat.errors import ModelFileError
from tinychat.gguf_file import open_gguf

F32, F16, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))
U8, U16, U32, U64, I32, BOOL, STRING, ARRAY = (GGUFValueType[name] for name in (
    "UINT8", "UINT16", "UINT32", "UINT64", "INT32", "BOOL", "STRING", "ARRAY"))


@pytest.fixture
def sample(tmp_path):
    return write_sample(tmp_path / "sample.gguf")


def opened(tmp_path, raw: bytes):
    path = tmp_path / "made.gguf"
    path.write_bytes(raw)
    return open_gguf(path)


# Well-formed files

def test_every_value_type_arrives(sample):
    metadata = open_gguf(sample).metadata
    for bits in (8, 16, 32, 64):
        assert metadata[f"test.int{bits}"] == metadata[f"test.uint{bits}"] == 7
    assert (metadata["test.float32"], metadata["test.float64"]) == (0.5, 0.1)
    assert metadata["test.yes"] is True and metadata["test.no"] is False
    assert metadata["test.text"] == "naïve ☃"
    assert metadata["test.texts"] == ["a", "", "ü", "<|im_end|>"]
    for name, dtype, values in (("floats", np.float32, [1.5, -2]), ("ints", np.int32, [1, -2, 3]),
                                ("flags", np.bool_, [True, False, True])):
        found = metadata[f"test.{name}"]
        assert found.dtype == dtype and found.tolist() == values
    assert [inner.tolist() for inner in metadata["test.nested"]] == [[1, 2], [3]]


def test_tensors_are_the_bytes_that_the_gguf_package_reads(sample):
    ours, theirs = open_gguf(sample).tensors, GGUFReader(sample).tensors
    assert list(ours) == [tensor.name for tensor in theirs]
    for expected in theirs:
        found = ours[expected.name]
        assert found.qtype == expected.tensor_type
        assert found.shape == tuple(int(dim) for dim in reversed(expected.shape))
        assert found.data.tobytes() == expected.data.tobytes()
        assert found.n_bytes == expected.n_bytes
        assert found.n_bytes == found.row_bytes * np.prod(found.shape[:-1], dtype=int)


def test_golden_files_read_as_the_gguf_package_reads_them(shared):
    paths = sorted((shared / "golden").glob("*-a.gguf"))
    assert paths
    for path in paths[::4]:
        file, reader = open_gguf(path), GGUFReader(path)
        for name, field in reader.fields.items():
            if not name.startswith("GGUF."):
                value, expected = file.metadata[name], field.contents()
                value = value.tolist() if isinstance(value, np.ndarray) else value
                assert value == expected, name
        assert {name: tensor.data.tobytes() for name, tensor in file.tensors.items()} == {
            tensor.name: tensor.data.tobytes() for tensor in reader.tensors}


def test_version_2_reads_like_version_3(sample, tmp_path):
    raw = bytearray(sample.read_bytes())
    raw[4] = 2
    file = opened(tmp_path, bytes(raw))
    assert file.version == 2 and file.metadata["test.text"] == "naïve ☃" and len(file.tensors) == 4


def test_another_alignment_moves_the_tensors(tmp_path):
    path = tmp_path / "aligned.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    for name in ("a", "b"):
        writer.add_tensor(name, np.full(3, ord(name), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert {name: tensor.data.view("<f4").tolist() for name, tensor in file.tensors.items()} == {
        "a": [97] * 3, "b": [98] * 3}


def test_a_vocabulary_alone_is_a_file(tmp_path):
    file = opened(tmp_path, file_bytes([key("general.architecture", STRING, string("llama"))]))
    assert file.architecture == "llama" and file.tensors == {}


def test_empty_tensors_and_scalars_have_their_bytes(tmp_path):
    infos = [tensor("none", (0, 4), F32, 0), tensor("one", (), F32, 0)]
    tensors = opened(tmp_path, file_bytes(tensors=infos, data=struct.pack("<f", 2.5))).tensors
    assert tensors["none"].shape == (4, 0) and tensors["none"].n_bytes == 0
    assert tensors["one"].shape == () and tensors["one"].data.view("<f4").tolist() == [2.5]


def test_tensors_outlive_the_file_and_cannot_be_written(sample):
    with open_gguf(sample) as file:
        data = file.tensors["f32"].data
    file.close()
    assert data.view("<f4").tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError):
        data[0] = 1
    with pytest.raises(ValueError):
        data.flags.writeable = True


def test_a_file_without_write_permission_opens(sample):
    sample.chmod(0o400)
    assert open_gguf(sample).architecture == "llama"


def test_a_large_vocabulary_opens_at_once(tmp_path):
    """Measured: 0.07 s for 150,000 tokens and as many merges; the bound is for a busy machine."""
    path, n = tmp_path / "large.gguf", 150_000
    writer = GGUFWriter(path, "qwen2")
    writer.add_token_list([f"Ġtoken{i}" for i in range(n)])
    writer.add_token_types([1] * n)
    writer.add_token_scores([0.5] * n)
    writer.add_token_merges([f"Ġtok en{i}" for i in range(n)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        metadata = open_gguf(path).metadata
        times.append(time.perf_counter() - start)
    assert metadata["tokenizer.ggml.tokens"][-1] == "Ġtoken149999"
    assert metadata["tokenizer.ggml.scores"].shape == (n,)
    assert metadata["tokenizer.ggml.token_type"].shape == (n,)
    assert min(times) < 1.0


# Split files

def write_split(folder, n_parts=3):
    """One tensor in each part, the way llama-gguf-split numbers them."""
    paths = [folder / f"model-{part + 1:05d}-of-{n_parts:05d}.gguf" for part in range(n_parts)]
    for part, path in enumerate(paths):
        keys = [key("split.no", U16, struct.pack("<H", part)),
                key("split.count", U16, struct.pack("<H", n_parts)),
                key("split.tensors.count", I32, struct.pack("<i", n_parts))]
        if part == 0:
            keys.append(key("general.architecture", STRING, string("llama")))
        info = tensor(f"t{part}", (1,), F32, 0)
        path.write_bytes(file_bytes(keys, [info], struct.pack("<f", part)))
    return paths


def test_a_split_file_is_one_model(tmp_path):
    file = open_gguf(write_split(tmp_path)[0])
    assert file.architecture == "llama"
    assert {name: tensor.data.view("<f4").item() for name, tensor in file.tensors.items()} == {
        "t0": 0, "t1": 1, "t2": 2}


def test_opening_a_later_part_names_the_first(tmp_path):
    with pytest.raises(ModelFileError, match="part 2 of 3; open the first, model-00001"):
        open_gguf(write_split(tmp_path)[1])


def test_a_missing_part_is_named(tmp_path):
    first, second, _ = write_split(tmp_path)
    second.unlink()
    with pytest.raises(ModelFileError, match="model-00002-of-00003.gguf: no such file"):
        open_gguf(first)


def test_a_renamed_part_says_what_its_name_must_be(tmp_path):
    renamed = write_split(tmp_path)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelFileError, match="must end in -00001-of-00003.gguf"):
        open_gguf(renamed)


def test_a_part_in_the_place_of_another_is_refused(tmp_path):
    paths = write_split(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ModelFileError, match="expected part 2 of 3, its metadata says 3 of 3"):
        open_gguf(paths[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    paths = write_split(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes().replace(b"t1", b"t0"))
    with pytest.raises(ModelFileError, match="tensor 't0' is in an earlier part too"):
        open_gguf(paths[0])


def test_a_wrong_total_of_tensors_is_refused(tmp_path):
    first = write_split(tmp_path)[0]
    three, four = (key("split.tensors.count", I32, struct.pack("<i", n)) for n in (3, 4))
    first.write_bytes(first.read_bytes().replace(three, four))
    with pytest.raises(ModelFileError, match="split.tensors.count is 4, the parts hold 3"):
        open_gguf(first)


# Malformed files: what is wrong, and at which byte

def many_arrays(depth: int) -> bytes:
    return array(ARRAY, 1, b"") * depth + array(U8, 0, b"")


def one_key(kind, value: bytes) -> bytes:
    return file_bytes([key("a", kind, value)])


def one_tensor(*info, n_bytes: int = 64) -> bytes:
    return file_bytes(tensors=[tensor("t", *info)], data=bytes(n_bytes))


HUGE = 2**64 - 1
MALFORMED = [
    (b"", "the file is empty"),
    (b"version https://git-lfs", "byte 0: not a GGUF file: expected b'GGUF', got b'vers'"),
    (file_bytes(version=1), "byte 4: GGUF version 1 is not supported"),
    (file_bytes(version=4), "byte 4: GGUF version 4 is not supported"),
    (b"GGUF\x03\0\0\0", "byte 8: the number of tensors needs 8 bytes, 0 are left"),
    (file_bytes(n_tensors=HUGE), f"byte 8: {HUGE} tensors cannot be in"),
    (file_bytes(n_keys=HUGE), f"byte 16: {HUGE} metadata keys cannot be in"),
    (file_bytes([struct.pack("<Q", 2**63) + b"abcdefgh"]), f"byte 24: a metadata key of {2**63}"),
    (file_bytes([key(b"a\xffb", U8, b"\1")]), "byte 33: a metadata key is not UTF-8"),
    (file_bytes([key("a", U8, b"\1")] * 2), "byte 38: metadata key 'a' comes twice"),
    (one_key(13, b"\1"), "byte 33: 'a' has the unknown value type 13"),
    (one_key(STRING, string(b"x\xc3")), "byte 46: the text of 'a' is not UTF-8"),
    (one_key(ARRAY, array(STRING, 2, string("x") + string(b"\x80"))),
     "byte 66: a text of 'a' is not UTF-8"),
    (one_key(ARRAY, array(99, 1, b"\1")), "byte 37: 'a' has the unknown value type 99"),
    (one_key(ARRAY, array(U64, HUGE, b"")), f"byte 41: {HUGE} values of 'a' cannot be"),
    (one_key(ARRAY, array(STRING, 2**40, b"")), f"byte 41: {2**40} texts of 'a' cannot be"),
    (one_key(ARRAY, array(ARRAY, 2**40, b"")), f"byte 41: {2**40} arrays of 'a' cannot be"),
    (one_key(ARRAY, many_arrays(4)), "byte 85: 'a' nests arrays deeper than 4"),
    (one_key(BOOL, b"\2"), "byte 37: 'a' has a boolean that is neither 0 nor 1"),
    (one_key(ARRAY, array(BOOL, 2, b"\1\xff")), "'a' has a boolean that is neither 0 nor 1"),
    (file_bytes([key("general.alignment", U32, struct.pack("<I", 48))]),
     "expected a power of two under general.alignment, got 48"),
    (file_bytes([key("general.alignment", STRING, string("32"))]), "general.alignment, got '32'"),
    (file_bytes([key("general.architecture", U8, b"\1")]), "under general.architecture, got 1"),
    (file_bytes(), "under general.architecture, got None"),
    (one_tensor((1,) * 5, F32, 0), "byte 24: tensor 't' has 5 dimensions"),
    (one_tensor((1,), 4, 0), "byte 45: tensor 't' has the unknown type 4"),
    (one_tensor((33,), Q8_0, 0), "rows of 33 values, Q8_0 stores blocks of 32"),
    (one_tensor((), Q8_0, 0), "rows of 1 values, Q8_0 stores blocks of 32"),
    (one_tensor((1,), F32, 4), "offset 4, no multiple of 32"),
    (one_tensor((9,), F32, 0, n_bytes=35),
     "byte 24: tensor 't' lies at bytes 64 to 100, the file ends at 99"),
    (one_tensor((1,), F32, 2**63), "the file ends at"),
    (one_tensor((2**62, 2**62, 4), F32, 0), "the file ends at"),
    (file_bytes(tensors=[tensor("t", (1,), F32, 0)] * 2), "byte 57: tensor 't' comes twice"),
    (file_bytes(tensors=[tensor("a", (9,), F32, 0), tensor("b", (1,), F32, 32)], data=bytes(64)),
     "byte 57: tensor 'b' overlaps 'a'"),
]


@pytest.mark.parametrize(("raw", "problem"), MALFORMED, ids=[problem for _, problem in MALFORMED])
def test_malformed_files_say_what_and_where(tmp_path, raw, problem):
    with pytest.raises(ModelFileError) as raised:
        _ = opened(tmp_path, raw).architecture
    assert problem in raised.value.message and "made.gguf" in raised.value.message


def test_a_big_endian_file_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "big.gguf"
    writer = GGUFWriter(path, "llama", endianess=GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match="big-endian; gguf-convert-endian"):
        open_gguf(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="no such file"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        open_gguf(tmp_path)
    with pytest.raises(ModelFileError, match="no such file"):
        open_gguf("nul\0.gguf")
