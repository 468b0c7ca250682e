"""Images of strangers: what is decoded, and that broken bytes are told of and nothing else."""
import base64
import io
import random
import struct
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tinychat import images
from tinychat.errors import InvalidRequest

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}


def picture(width=12, height=8):
    """Smooth, so that lossy kinds keep it."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)],
                    2).astype(np.uint8)


def written(image, kind="png", **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        out, FORMATS[kind], **options)
    return out.getvalue()


def png_of(*chunks):
    """A PNG of these (name, data), with right sums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks)


def header(width, height, depth=8, colour=2):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


@pytest.mark.parametrize("kind, options, off", [
    ("png", {}, 0), ("bmp", {}, 0), ("webp", {"lossless": True}, 0),
    ("jpeg", {"quality": 95, "subsampling": 0}, 12),
    ("gif", {}, 40)])
def test_each_kind_gives_its_pixels(kind, options, off):
    found = images.decode(written(picture(), kind, **options))
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found.astype(int) - picture()).max() <= off


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "I;16"])
def test_other_modes_become_rgb(mode):
    kind = "jpeg" if mode in ("CMYK", "YCbCr") else "png"
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 0x1234], [0x80FF, 0xFFFF]], np.uint16))
        expected = np.repeat(np.array([[0, 0x12], [0x80, 0xFF]], np.uint8)[:, :, None], 3, 2)
    else:
        image = Image.fromarray(picture()).convert(mode)
        expected = np.array(image.convert("RGB"))
    options = {"quality": 95, "subsampling": 0} if kind == "jpeg" else {}
    found = images.decode(written(image, kind, **options))
    assert np.abs(found.astype(int) - expected).max() <= (12 if kind == "jpeg" else 0)


def test_what_is_transparent_is_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    for image in (Image.fromarray(rgba), Image.fromarray(rgba).convert("LA")):
        assert images.decode(written(image)).tolist() == [[[255] * 3, [127] * 3, [0] * 3]]


def test_a_transparent_colour_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for kind in ("png", "gif"):
        found = images.decode(written(palette, kind, transparency=0))
        assert found.tolist() == [[[255] * 3, [40, 50, 60]]]
    colour = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    found = images.decode(written(colour, transparency=(1, 2, 3)))
    assert found.tolist() == [[[255] * 3, [4, 5, 6]]]


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_upright(kind, orientation):
    image, exif = Image.fromarray(picture(20, 12)), Image.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    data = written(image, kind, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(images.decode(data), expected)
    assert images.size_of(data) == expected.shape[:2]


def test_a_large_picture_takes_little_more_memory_than_its_pixels():
    tall = np.zeros((3000, 500, 4), np.uint8)
    tall[::7, :, 3] = 200
    data = written(Image.fromarray(tall))
    tracemalloc.start()
    try:
        found = images.decode(data)
        peak = tracemalloc.get_traced_memory()[1]    # NumPy's part of it
    finally:
        tracemalloc.stop()
    white = 255 - tall[:, :, 3:].astype(int)
    assert found.shape == (3000, 500, 3) and np.abs(found - white).max() <= 1
    assert peak < 1.2 * found.nbytes


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_only_the_first_frame_counts(kind):
    first, second = picture(), 255 - picture()
    options = {"lossless": True} if kind == "webp" else {}
    data = written(first, kind, save_all=True, append_images=[Image.fromarray(second)], **options)
    alone = images.decode(written(first, kind, **options))
    assert np.array_equal(images.decode(data), alone)


def test_broken_metadata_neither_warns_nor_spoils_the_picture():
    broken = b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(9)
    jpeg = written(picture(), "jpeg")
    hurt = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken + jpeg[2:]
    assert np.array_equal(images.decode(hurt), images.decode(jpeg))
    pixels = zlib.compress(b"\0" + bytes(3))
    png = png_of(header(1, 1), (b"acTL", bytes(8)), (b"zTXt", b"junk"), (b"iCCP", b"a\0\0junk"),
                 (b"IDAT", pixels), (b"IEND", b""))
    assert images.decode(png).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("data, says", [
    (b"", "got none"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected a PNG, JPEG, WebP, GIF or BMP"),
    (b"%!PS-Adobe-3.0 EPSF-3.0", "expected a PNG"),
    (b"II*\0" + bytes(40), "expected a PNG"),
    (written(picture())[:60], "broken PNG"),
    (written(picture(), "jpeg")[:-300], "broken JPEG"),
    (b"GIF89a", "broken GIF"), (b"BM", "broken BMP"), (b"RIFF\0\0\0\0WEBPVP8 ", "broken WEBP"),
    (png_of(header(50_000, 50_000), (b"IDAT", b"")), "50000x50000 pixels"),
    (png_of(header(1_000_000, 1), (b"IDAT", b"")), "1000000x1 pixels"),
    (b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3)
     + b",\0\0\0\0" + struct.pack("<HH", 65535, 65535) + b"\0\2\0;", "65535x65535 pixels"),
    (written(picture(), "jpeg") + b"\xff\xda" * 100, "101 scans"),
])
def test_what_cannot_be_taken_is_refused_in_one_line(data, says):
    with pytest.raises(InvalidRequest, match=says) as refused:
        images.decode(data)
    assert "\n" not in str(refused.value) and " object at 0x" not in str(refused.value)


def test_an_image_with_too_many_bytes_is_refused():
    data = written(picture())
    with pytest.raises(InvalidRequest, match=f"{len(data)} bytes; at most 10"):
        images.decode(data, limits=images.Limits(n_bytes=10))


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_bytes_are_an_image_or_refused(kind):
    rng = random.Random(5)
    other = Image.fromarray(picture(20, 14)).convert("P" if kind in ("gif", "png", "bmp") else "L")
    whole = [written(picture(20, 14), kind), written(other, kind)]
    limits = images.Limits(n_pixels=1 << 20)
    n_refused = 0
    for i in range(700):
        data = bytearray(whole[i % 2])
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            at = rng.randrange(len(data))
            action = rng.randrange(4)
            if action == 0:
                data[at] = rng.randrange(256)
            elif action == 1:
                data[at:at + 4] = rng.choice((bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff"))
            elif action == 2:
                del data[at:at + rng.randrange(1, 9)]
            else:
                data[at:at] = data[:rng.randrange(1, 40)]
            data = data or bytearray(b"x")
        try:
            found = images.decode(bytes(data), limits=limits)
            assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
        except InvalidRequest:
            n_refused += 1
    assert n_refused > 20


def test_many_threads_decode_at_once():
    data = written(picture(200, 150), "jpeg")
    expected, wrong = images.decode(data), []

    def work():
        for _ in range(10):
            if not np.array_equal(images.decode(data), expected):
                wrong.append(1)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", FORMATS)
def test_a_data_url_goes_there_and_back(kind):
    data = written(picture(), kind)
    url = images.data_url(data)
    assert url.startswith(f"data:image/{kind};base64,") and images.parse_data_url(url) == data


@pytest.mark.parametrize("url", [
    "", "data:", "http://example.com/a.png", "data:image/png,abc", "data:image/png;base64",
    "data:text/plain;base64,aGk=", "data:image/png;charset=utf-8;base64,aGk=",
    "data:image/png;base64,aGk", "data:image/png;base64,a Gk=", "data:image/png;base64,aGk=\n",
    "data:image/png;base64,\u00e4bcd", "data:image/;base64,aGk=", " data:image/png;base64,aGk=",
])
def test_another_url_is_refused(url):
    with pytest.raises(InvalidRequest):
        images.parse_data_url(url)


def test_images_are_loaded_from_files_bytes_and_data_urls(tmp_path):
    data = written(picture())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data), images.data_url(data)):
        assert images.load(source) == data


def test_a_file_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "large").write_bytes(bytes(11))
    for source, says in ((tmp_path / "none", "none: cannot be read"), (tmp_path, "not a regular"),
                         (tmp_path / "large", "larger than the 10"), ("a\0b", "null")):
        with pytest.raises(InvalidRequest, match=says):
            images.load(source, limits=images.Limits(n_bytes=10))


def test_the_base64_of_a_data_url_may_be_of_any_length():
    data = bytes(range(256)) * 4000
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert images.parse_data_url(url) == data
