"""A streaming writer of tiled pyramidal BigTIFF.

tifffile refuses JPEG without imagecodecs, which is no part of the base install, even for tiles that
are already encoded, and it writes one level after the other; here Pillow encodes, and the levels
grow side by side. Format: https://libtiff.gitlab.io/libtiff/specification/bigtiff.html
"""

from __future__ import annotations

import io
import struct
import zlib
from array import array
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

COMPRESSIONS = ("jpeg", "jpeg2000", "deflate", "none")
JPEG_QUALITY = 80
JPEG2000_RATE = 12  # compression ratio
_TAG_VALUES = {"jpeg": 7, "jpeg2000": 33005, "deflate": 8, "none": 1}  # 33005: Aperio's RGB JPEG 2000
_RGB, _YCBCR = 2, 6
_ASCII, _SHORT, _LONG, _LONG8 = 2, 3, 4, 16
_STRUCT = {_ASCII: "B", _SHORT: "H", _LONG: "I", _LONG8: "Q"}


def encode_tile(pixels: NDArray[np.uint8], compression: str) -> bytes:
    """u8 [tile, tile, 3] RGB to the bytes of one TIFF tile (JPEG: YCbCr 4:2:0)."""
    if compression == "none":
        return pixels.tobytes()
    if compression == "deflate":
        return zlib.compress(pixels.tobytes(), 6)
    from PIL import Image

    out = io.BytesIO()
    image = Image.fromarray(pixels)
    if compression == "jpeg":
        image.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=2)
    else:
        image.save(
            out, "JPEG2000", no_jp2=True, irreversible=True, quality_mode="rates", quality_layers=[JPEG2000_RATE]
        )
    return out.getvalue()


class PyramidWriter:
    """Writes tiles of several levels in any order, then one directory per level.

    file: a new seekable binary file.  sizes: (width, height) per level, finest first.
    Memory: 12 bytes per tile.
    """

    def __init__(
        self, file: BinaryIO, sizes: list[tuple[int, int]], tile: int, compression: str, description: str
    ) -> None:
        self._file = file
        self._sizes = sizes
        self._tile = tile
        self._compression = compression
        self._description = description.encode("ascii") + b"\0"
        self._counts = [(-(-width // tile), -(-height // tile)) for width, height in sizes]
        self._offsets = [array("Q", bytes(8 * cols * rows)) for cols, rows in self._counts]
        self._lengths = [array("I", bytes(4 * cols * rows)) for cols, rows in self._counts]
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))  # the last field is patched by finish()

    def write_tile(self, level: int, col: int, row: int, data: bytes) -> None:
        """Append one encoded tile. Each (level, col, row) is to be written once."""
        index = row * self._counts[level][0] + col
        self._offsets[level][index] = self._file.tell()
        self._lengths[level][index] = len(data)
        self._file.write(data)

    def finish(self) -> None:
        """Write the directories, chained from the header, finest level first."""
        link = 8  # where the offset of the next directory belongs
        for level in range(len(self._sizes)):
            tags = self._tags(level)
            values = [self._place(kind, data) for _, kind, data in tags]
            self._pad()
            start = self._file.tell()
            self._file.write(struct.pack("<Q", len(tags)))
            for (tag, kind, data), value in zip(tags, values, strict=True):
                self._file.write(struct.pack("<HHQ8s", tag, kind, len(data), value))
            end = self._file.tell()
            self._file.write(struct.pack("<Q", 0))
            self._file.seek(link)
            self._file.write(struct.pack("<Q", start))
            self._file.seek(0, io.SEEK_END)
            link = end

    def _tags(self, level: int) -> list[tuple[int, int, bytes | array[int] | tuple[int, ...]]]:
        width, height = self._sizes[level]
        tags: list[tuple[int, int, bytes | array[int] | tuple[int, ...]]] = [
            (254, _LONG, (0 if level == 0 else 1,)),  # NewSubfileType: reduced image
            (256, _LONG, (width,)),
            (257, _LONG, (height,)),
            (258, _SHORT, (8, 8, 8)),
            (259, _SHORT, (_TAG_VALUES[self._compression],)),
            (262, _SHORT, (_YCBCR if self._compression == "jpeg" else _RGB,)),
            (270, _ASCII, self._description),
            (277, _SHORT, (3,)),
            (284, _SHORT, (1,)),  # R, G, B interleaved
            (322, _LONG, (self._tile,)),
            (323, _LONG, (self._tile,)),
            (324, _LONG8, self._offsets[level]),
            (325, _LONG, self._lengths[level]),
        ]
        if self._compression == "jpeg":
            tags.append((530, _SHORT, (2, 2)))  # YCbCrSubSampling
        return tags

    def _place(self, kind: int, data: bytes | array[int] | tuple[int, ...]) -> bytes:
        """The 8-byte value field of a tag: the data itself if it fits, else its offset in the file."""
        packed = struct.pack(f"<{len(data)}{_STRUCT[kind]}", *data)
        if len(packed) <= 8:
            return packed.ljust(8, b"\0")
        self._pad()
        offset = self._file.tell()
        self._file.write(packed)
        return struct.pack("<Q", offset)

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % 8))
