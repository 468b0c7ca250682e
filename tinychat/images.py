"""Images of strangers: their bytes from a file or a data URL, and the pixels in them.

Pillow decodes PNG, JPEG, WebP, GIF and BMP. Only what draws the picture reaches it: of PNG and
JPEG the parts that hold metadata or further frames are left out, and the sizes are judged before a
pixel is decoded. Any thread may call it at any time; one picture is decoded after the other, since
40 million pixels take some 300 MB while they are.
"""
import base64
import binascii
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tinychat.errors import InvalidRequest

URL_HEAD = re.compile(r"data:image/[a-z0-9][a-z0-9.+-]{0,63};base64", re.IGNORECASE)

# name in a data URL: how the bytes begin
KINDS = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "gif": re.compile(rb"GIF8[79]a"),
    "bmp": re.compile(rb"BM"),
}
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # what draws the picture
JPEG_METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)  # APP1 … APP15 and comments, but for Adobe's APP14
ORIENTATION_TAG = 0x0112
STRIP_ROWS = 64  # that are converted at a time

_decoding = threading.Lock()

# EXIF orientation: what makes the picture upright
UPRIGHT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}
SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Limits:
    """What is taken from a stranger. n_scans: passes over a JPEG's pixels, each as long as one."""

    n_bytes: int = 64 << 20
    n_pixels: int = 40_000_000
    side: int = 32_768
    n_scans: int = 20


LIMITS = Limits()


def decode(data: bytes, *, limits: Limits = LIMITS) -> np.ndarray:
    """The picture, upright, its first frame, over white where it is transparent: uint8 (h, w, 3).

    Raises: InvalidRequest for anything that is no image of a known kind, or too large a one.
    """
    with _decoding:
        pixels, orientation = _read(data, limits, _rgb)
    upright = UPRIGHT.get(orientation)
    return np.ascontiguousarray(upright(pixels) if upright else pixels)


def size_of(data: bytes, *, limits: Limits = LIMITS) -> tuple[int, int]:
    """Height and width of the picture, upright; no pixel of it is decoded. Raises: as `decode`."""
    (width, height), orientation = _read(data, limits, lambda image: image.size)
    return (width, height) if orientation in SIDEWAYS else (height, width)


def _read(data: bytes, limits: Limits, read: Callable) -> tuple[Any, int]:
    """What `read` makes of Pillow's image, and the picture's orientation."""
    if len(data) > limits.n_bytes:
        raise InvalidRequest(f"an image of {len(data)} bytes; at most {limits.n_bytes} are taken")
    kind = kind_of(data)
    try:
        drawing, exif = _stripped(kind, data, limits)
        with _readers()[kind](io.BytesIO(drawing)) as image:
            _check_size(image.size, limits)
            found = read(image)
            return found, _orientation(exif or image.info.get("exif", b""))  # the latter of WebP
    except InvalidRequest:
        raise
    except MemoryError:
        raise InvalidRequest("no memory for an image of this size") from None
    except Exception as error:  # noqa: BLE001 - broken bytes make Pillow raise whatever it likes
        raise InvalidRequest(f"a broken {kind.upper()} image: {_short(error)}") from None


def kind_of(data: bytes) -> str:
    """Its name in a data URL, judged by how the bytes begin. Raises: InvalidRequest."""
    for kind, beginning in KINDS.items():
        if beginning.match(data):
            return kind
    found = f"bytes that begin with {bytes(data[:8])!r}" if data else "none"
    raise InvalidRequest(f"expected a PNG, JPEG, WebP, GIF or BMP image, got {found}")


def parse_data_url(url: str) -> bytes:
    """The bytes in `data:image/<subtype>;base64,<data>`. Raises: InvalidRequest."""
    head, comma, data = url.partition(",")
    if not comma or not URL_HEAD.fullmatch(head):
        raise InvalidRequest(f"expected data:image/<subtype>;base64,<data>, got {url[:40]!r}")
    try:
        return base64.b64decode(data.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise InvalidRequest(f"a data URL whose base64 is broken: {_short(error)}") from None


def data_url(data: bytes) -> str:
    """The other way round, with the kind that the bytes begin as. Raises: InvalidRequest."""
    return f"data:image/{kind_of(data)};base64,{base64.b64encode(data).decode()}"


def load(source: str | os.PathLike | bytes, *, limits: Limits = LIMITS) -> bytes:
    """The bytes of an image file, or of a data URL; bytes as they are.

    Raises: InvalidRequest for a file that cannot be read, or is too large to be taken.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return parse_data_url(source)
    path = Path(source)
    try:
        if path.exists() and not path.is_file():  # before open(): a pipe would block there
            raise InvalidRequest(f"{path}: not a regular file")
        with path.open("rb") as file:
            data = file.read(limits.n_bytes + 1)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a path with a zero byte
        raise InvalidRequest(f"{str(path)!r}: {error}") from None
    if len(data) > limits.n_bytes:
        raise InvalidRequest(f"{path}: larger than the {limits.n_bytes} bytes that are taken")
    return data


# Pixels

@cache
def _readers() -> dict[str, type]:
    """Pillow's class of each kind: used directly, because Image.open warns and keeps limits for the
    whole process. Imported with the first image: who shows none does not wait for it."""
    from PIL import (
        BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin)
    return {"png": PngImagePlugin.PngImageFile, "jpeg": JpegImagePlugin.JpegImageFile,
            "webp": WebPImagePlugin.WebPImageFile, "gif": GifImagePlugin.GifImageFile,
            "bmp": BmpImagePlugin.BmpImageFile}


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InvalidRequest(f"an image of {width}x{height} pixels")
    if width * height > limits.n_pixels or max(width, height) > limits.side:
        raise InvalidRequest(f"an image of {width}x{height} pixels; at most {limits.n_pixels} are "
                             f"taken, and {limits.side} a side")


def _rgb(image) -> np.ndarray:
    """A Pillow image -> uint8 (h, w, 3), over white where the picture is transparent."""
    image.load()
    out = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, STRIP_ROWS):
        end = min(top + STRIP_ROWS, image.height)
        with image.crop((0, top, image.width, end)) as strip:
            out[top:end] = _rgb_strip(strip)
    return out


def _rgb_strip(image) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16-bit grey: the upper byte
        grey = np.clip(np.asarray(image), 0, 0xFFFF).astype(np.uint16) >> 8
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, 2)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        with image.convert("RGBA") as drawn, Image.new("RGBA", image.size, "white") as white:
            white.alpha_composite(drawn)
            return np.array(white)[:, :, :3]
    with image.convert("RGB") as drawn:
        return np.array(drawn)


# What draws the picture, and its EXIF

def _stripped(kind: str, data: bytes, limits: Limits) -> tuple[bytes, bytes]:
    """(what reaches Pillow, EXIF)"""
    if kind == "png":
        return _stripped_png(data)
    if kind == "jpeg":
        n_scans = data.count(b"\xff\xda")
        if n_scans > limits.n_scans:
            raise InvalidRequest(f"a JPEG image in {n_scans} scans; at most {limits.n_scans} are "
                                 "taken")
        return _stripped_jpeg(data)
    return data, b""


def _stripped_png(data: bytes) -> tuple[bytes, bytes]:
    kept, exif = [data[:8]], b""
    for name, chunk in _png_chunks(data):
        if name in PNG_CHUNKS:
            kept.append(chunk)
        elif name == b"eXIf":
            exif = chunk[8:-4]
    return b"".join(kept), exif


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, whole chunk): u32 n_bytes | name | data[n_bytes] | u32 CRC, big-endian."""
    pos = 8
    while pos + 8 <= len(data):
        end = pos + 12 + int.from_bytes(data[pos:pos + 4], "big")
        yield data[pos + 4:pos + 8], data[pos:end]
        pos = end


def _stripped_jpeg(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, pos = [data[:2]], b"", 2
    # FF marker | u16 n_bytes, itself included, big-endian | data; the pixels follow SOS (DA)
    while pos + 4 <= len(data) and data[pos] == 0xFF and data[pos + 1] != 0xDA:
        if data[pos + 1] == 0xFF:  # padding
            pos += 1
            continue
        end = pos + 2 + int.from_bytes(data[pos + 2:pos + 4], "big")
        segment = data[pos:end]
        if segment[1] not in JPEG_METADATA:
            kept.append(segment)
        elif segment[4:10] == b"Exif\0\0":
            exif = exif or segment[4:]
        pos = end
    return b"".join([*kept, data[pos:]]), exif


def _orientation(exif: bytes) -> int:
    """1 to 8; 1, upright, where nothing readable is said.

    "II" or "MM" | u16 42 | u32 offset of: u16 n | n * (u16 tag | u16 type | u32 n | u32 value)
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1
    first = int.from_bytes(tiff[4:8], order)
    for i in range(int.from_bytes(tiff[first:first + 2], order)):
        entry = tiff[first + 2 + 12 * i:first + 14 + 12 * i]
        if int.from_bytes(entry[:2], order) == ORIENTATION_TAG:
            return int.from_bytes(entry[8:10], order)
    return 1


def _short(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__
