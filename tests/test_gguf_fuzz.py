"""Thousands of damaged files: each opens or is a ModelFileError, in memory bounded by its size."""
import random
import struct
import tracemalloc

import pytest
from helpers_gguf import write_sample

from tinychat.errors import ModelFileError
from tinychat.gguf_file import open_gguf

LIES = [0, 1, 2, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1,
        2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
BYTES_PER_BYTE = 40  # what Python objects may cost for each byte of the file
SLACK_BYTES = 100_000


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> bytes:
    return write_sample(tmp_path_factory.mktemp("fuzz") / "sample.gguf").read_bytes()


def flips(raw: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(len(raw))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(damaged)


def truncation(raw: bytes, rng: random.Random) -> bytes:
    return raw[:rng.randrange(len(raw))]


def splice(raw: bytes, rng: random.Random) -> bytes:
    start, source = rng.randrange(len(raw)), rng.randrange(len(raw))
    piece = raw[source:source + rng.randrange(1, 200)]
    return raw[:start] + piece + raw[start + rng.choice((0, len(piece), rng.randrange(1, 200))):]


def length_lie(raw: bytes, rng: random.Random) -> bytes:
    form = rng.choice(("<Q", "<Q", "<I"))
    lie = struct.pack(form, rng.choice(LIES) % 2**(8 * struct.calcsize(form)))
    # lengths start anywhere, since nothing in the header is aligned
    at = rng.randrange(4, len(raw) - len(lie))
    return raw[:at] + lie + raw[at + len(lie):]


def outcome(path, raw: bytes) -> tuple[bool, int]:
    """(did it open, the most bytes that were allocated); any other error is a test failure."""
    path.write_bytes(raw)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with open_gguf(path) as file:
            for tensor in file.tensors.values():
                assert tensor.data.size <= len(raw)
                tensor.data[-1:].sum()  # the last byte is mapped
        opened = True
    except ModelFileError as error:
        assert str(path) in error.message
        opened = False
    return opened, tracemalloc.get_traced_memory()[1] - before


@pytest.mark.parametrize("mutate", [flips, truncation, splice, length_lie])
def test_damaged_files_open_or_are_model_file_errors(sample, tmp_path, mutate):
    rng = random.Random(mutate.__name__)
    path, n_opened = tmp_path / "damaged.gguf", 0
    tracemalloc.start()
    try:
        for case in range(1500):
            raw = mutate(sample, rng)
            opened, n_bytes = outcome(path, raw)
            n_opened += opened
            assert n_bytes < SLACK_BYTES + BYTES_PER_BYTE * len(raw), f"case {case}"
    finally:
        tracemalloc.stop()
    assert n_opened < 1500  # the damage reaches what is read


def test_every_truncation_of_the_header_is_refused(sample, tmp_path):
    path = tmp_path / "cut.gguf"
    for n_bytes in range(len(sample) - 32):  # the end is the padding of the last tensor
        path.write_bytes(sample[:n_bytes])
        with pytest.raises(ModelFileError):
            open_gguf(path)
