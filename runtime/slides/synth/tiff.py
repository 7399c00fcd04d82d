"""A streaming writer of tiled pyramidal TIFF and BigTIFF.

tifffile refuses JPEG without imagecodecs, which is no part of the base install, even for tiles that
are already encoded, and it writes one level after the other; here Pillow encodes, and the levels
grow side by side. Formats: TIFF 6.0 and https://libtiff.gitlab.io/libtiff/specification/bigtiff.html
"""

from __future__ import annotations

import io
import struct
from array import array
from fractions import Fraction
from typing import BinaryIO, Union

from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.slides.synth.spec import SlideSpec

_COMPRESSIONS = {
    "jpeg": 7, "jpeg-rgb": 7, "jpeg2000": 33005, "jpeg2000-ycc": 33003, "deflate": 8, "lzw": 5, "raw": 1,
}  # fmt: skip
_RGB, _YCBCR = 2, 6
_ASCII, _SHORT, _LONG, _RATIONAL, _UNDEFINED, _LONG8 = 2, 3, 4, 5, 7, 16
_STRUCT = {_ASCII: "B", _SHORT: "H", _LONG: "I", _RATIONAL: "I", _UNDEFINED: "B", _LONG8: "Q"}
_CENTIMETRE = 3
CLASSIC_LIMIT = 1 << 32  # bytes that 32-bit offsets reach

_Values = Union[bytes, "array[int]", tuple[int, ...]]
_Tag = tuple[int, int, _Values]


class PyramidWriter:
    """Writes tiles of several levels in any order, then one directory per level.

    file: a new seekable binary file.  spec: size, codec and layout.  sizes: (width, height) per level, finest first,
    where the spec's own are not meant.  description: the ImageDescription; without one the resolution is written as
    tags.  tables: shared JPEG tables. Memory: 12 bytes per tile.
    """

    def __init__(
        self,
        file: BinaryIO,
        spec: SlideSpec,
        description: str | None,
        tables: bytes | None = None,
        sizes: list[tuple[int, int]] | None = None,
    ) -> None:
        self._file = file
        self._spec = spec
        self._sizes = sizes or spec.sizes
        self._description = description
        self._tables = tables
        self._order = ">" if spec.big_endian else "<"
        self._offset = "Q" if spec.bigtiff else "I"
        self._counts = [(-(-width // spec.tile), -(-height // spec.tile)) for width, height in self._sizes]
        self._offsets = [array("Q", bytes(8 * cols * rows)) for cols, rows in self._counts]
        self._lengths = [array("I", bytes(4 * cols * rows)) for cols, rows in self._counts]
        mark = b"MM" if spec.big_endian else b"II"
        # the last field of either header is patched by finish()
        header = self._pack("HHHQ", 43, 8, 0, 0) if spec.bigtiff else self._pack("HI", 42, 0)
        file.write(mark + header)

    def write_tile(self, level: int, col: int, row: int, data: bytes) -> None:
        """Append one encoded tile. Each (level, col, row) is to be written once, or not at all in a sparse file.

        Raises InputError where a classic TIFF's offsets end.
        """
        index = row * self._counts[level][0] + col
        start = self._file.tell()
        if not self._spec.bigtiff and start + len(data) >= CLASSIC_LIMIT:
            raise InputError("synthetic slide: it takes 4 GiB or more, which a classic TIFF cannot hold; use --bigtiff")
        self._offsets[level][index] = start
        self._lengths[level][index] = len(data)
        self._file.write(data)

    def finish(self) -> None:
        """Write the directories, chained from the header, finest level first."""
        link = 8 if self._spec.bigtiff else 4  # where the offset of the next directory belongs
        entry = f"HH{self._offset}"
        for level in range(len(self._sizes)):
            tags = self._tags(level)
            values = [self._place(kind, data) for _, kind, data in tags]
            self._pad()
            start = self._file.tell()
            self._file.write(self._pack("Q" if self._spec.bigtiff else "H", len(tags)))
            for (tag, kind, data), value in zip(tags, values, strict=True):
                count = len(data) // 2 if kind == _RATIONAL else len(data)
                self._file.write(self._pack(entry, tag, kind, count) + value)
            end = self._file.tell()
            self._file.write(self._pack(self._offset, 0))
            self._file.seek(link)
            self._file.write(self._pack(self._offset, start))
            self._file.seek(0, io.SEEK_END)
            link = end

    def _tags(self, level: int) -> list[_Tag]:
        width, height = self._sizes[level]
        spec, offsets = self._spec, self._offsets[level]
        ycc = spec.codec == "jpeg"
        tags: list[_Tag] = [
            (254, _LONG, (0 if level == 0 else 1,)),  # NewSubfileType: reduced image
            (256, _LONG, (width,)),
            (257, _LONG, (height,)),
            (258, _SHORT, (8, 8, 8)),
            (259, _SHORT, (_COMPRESSIONS[spec.codec],)),
            (262, _SHORT, (_YCBCR if ycc else _RGB,)),
            (277, _SHORT, (3,)),
            (284, _SHORT, (1,)),  # R, G, B interleaved
            (322, _LONG, (spec.tile,)),
            (323, _LONG, (spec.tile,)),
            (324, _LONG8, offsets) if spec.bigtiff else (324, _LONG, offsets),
            (325, _LONG, self._lengths[level]),
        ]
        if self._description is not None:
            tags.append((270, _ASCII, self._description.encode("ascii") + b"\0"))
        else:
            tags += self._resolution(level)
        if spec.predictor:
            tags.append((317, _SHORT, (2,)))
        if self._tables is not None:
            tags.append((347, _UNDEFINED, self._tables))
        if ycc:
            horizontal, vertical = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}[spec.subsampling]
            tags.append((530, _SHORT, (horizontal, vertical)))  # YCbCrSubSampling
        return sorted(tags, key=lambda tag: tag[0])

    def _resolution(self, level: int) -> list[_Tag]:
        """XResolution, YResolution and ResolutionUnit: px per centimetre."""
        per_cm = Fraction(10_000 / (self._spec.mpp * self._sizes[0][0] / self._sizes[level][0])).limit_denominator(
            10**4
        )
        rational = (per_cm.numerator, per_cm.denominator)
        return [(282, _RATIONAL, rational), (283, _RATIONAL, rational), (296, _SHORT, (_CENTIMETRE,))]

    def _place(self, kind: int, data: _Values) -> bytes:
        """The value field of a tag (8 bytes, classic 4): the data itself if it fits, else its offset in the file."""
        room = 8 if self._spec.bigtiff else 4
        packed = self._pack(f"{len(data)}{_STRUCT[kind]}", *data)
        if len(packed) <= room:
            return packed.ljust(room, b"\0")
        self._pad()
        offset = self._file.tell()
        self._file.write(packed)
        return self._pack(self._offset, offset)

    def _pack(self, fields: str, *values: int) -> bytes:
        return struct.pack(self._order + fields, *values)

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % 8))
