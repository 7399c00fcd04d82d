"""Where a TIFF's tiles lie: a strict parser of the tags that tiled RGB levels need.

Our own, because tifffile (2 MB, not in the base install) is made to read as much as it can, allocating from sizes that
a header states; here everything is checked against the file's size first, and what is not plain is refused, so that
OpenSlide decides about it. TIFF 6.0, and https://libtiff.gitlab.io/libtiff/specification/bigtiff.html
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_DIRECTORIES = 256
MAX_ENTRIES = 1024  # per directory
MAX_EDGE_PX = 1 << 24
MAX_TILE_PX = 1 << 24  # 4096 x 4096: 48 MiB decoded
MAX_TABLES_BYTES = 1 << 16
MAX_SAMPLES = 64  # per px; more than 3 are no RGB, but no damage either

_DTYPES = {1: "u1", 3: "u2", 4: "u4", 7: "u1", 16: "u8"}  # BYTE, SHORT, LONG, UNDEFINED, LONG8
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_FILL_ORDER, _ORIENTATION, _SAMPLES, _PLANAR, _PREDICTOR = 266, 274, 277, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _COUNTS, _FORMAT, _TABLES = 322, 323, 324, 325, 339, 347
_DESCRIPTION, _X_RESOLUTION, _Y_RESOLUTION, _UNIT, _DEPTH, _ICC = 270, 282, 283, 296, 32997, 34675
_KNOWN = frozenset(v for k, v in globals().items() if k.startswith("_") and isinstance(v, int))
_ASCII, _RATIONAL = 2, 5  # types of values
MAX_DESCRIPTION_BYTES = 1 << 20


class TiffError(ValueError):
    """Not a TIFF, or one that this parser does not take."""


@dataclass(frozen=True)
class TiffLevel:
    """A tiled 8-bit RGB or YCbCr directory.

    offsets, counts: u64 [rows * cols], bytes; a count of 0 is a tile that the file leaves out.
    compression, photometric, predictor: the tags' values.    tables: JPEGTables.
    """

    width: int
    height: int
    tile_w: int
    tile_h: int
    compression: int
    photometric: int
    predictor: int
    tables: bytes | None
    offsets: NDArray[np.uint64]
    counts: NDArray[np.uint64]

    @property
    def cols(self) -> int:
        return -(-self.width // self.tile_w)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_h)


@dataclass(frozen=True)
class TiffImage:
    """A directory of any kind.

    description: ImageDescription up to its first NUL, Latin-1 so that every byte counts.
    per_unit: px per unit along x and y, None where absent.  unit: ResolutionUnit, 1 none, 2 inch, 3 centimetre.
    subfile: NewSubfileType.  depth: px.  icc: it has a profile.  level: None where it is not a tiled 8-bit RGB image.
    """

    width: int
    height: int
    tiled: bool
    subfile: int
    compression: int
    description: str | None
    per_unit: tuple[float | None, float | None]
    unit: int
    depth: int
    icc: bool
    level: TiffLevel | None


@dataclass(frozen=True)
class _Tag:
    kind: int
    count: int
    value: bytes  # the value field: the data itself if it fits, else its offset


class TiffFile:
    """An open TIFF or BigTIFF, of either byte order. Raises TiffError; OSError where the file cannot be read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._bytes = os.fstat(descriptor).st_size
        head = self.read(0, min(16, self._bytes))
        self._order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        version = struct.unpack(f"{self._order}H", head[2:4])[0] if self._order and len(head) >= 8 else 0
        if version not in (42, 43) or (version == 43 and head[4:8] != struct.pack(f"{self._order}HH", 8, 0)):
            raise TiffError("is no TIFF")
        self._big = version == 43
        self._first = self._unpack("Q", head[8:16]) if self._big else self._unpack("I", head[4:8])

    def levels(self) -> list[TiffLevel | None]:
        """Every directory of the main chain in file order; None for one that is not a tiled 8-bit RGB image."""
        return [self._level(tags) for tags in self._directories()]

    def images(self) -> list[TiffImage]:
        """Every directory of the main chain in file order, with what it says of itself."""
        return [self._image(tags) for tags in self._directories()]

    def _directories(self) -> Iterator[dict[int, _Tag]]:
        at = self._first
        seen: set[int] = set()
        while at:
            if at in seen or len(seen) >= MAX_DIRECTORIES:
                raise TiffError(f"has directories that form a loop, or more than {MAX_DIRECTORIES}")
            seen.add(at)
            tags, at = self._directory(at)
            yield tags

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes. Raises TiffError where they reach past the end."""
        if offset < 0 or count < 0 or offset + count > self._bytes:
            raise TiffError(f"ends at byte {self._bytes}, {count} bytes at {offset} expected")
        data = os.pread(self._descriptor, count, offset)
        if len(data) != count:
            raise TiffError(f"ends before byte {offset + count}; was it cut off while open?")
        return data

    def holds(self, level: TiffLevel) -> bool:
        """The file reaches to the end of every tile of a level."""
        size = np.uint64(self._bytes)
        return bool(np.all((level.offsets <= size) & (level.counts <= size - np.minimum(level.offsets, size))))

    def _unpack(self, code: str, data: bytes) -> int:
        if len(data) != struct.calcsize(f"={code}"):
            raise TiffError("ends inside its header")
        return int(struct.unpack(f"{self._order}{code}", data)[0])

    def _directory(self, at: int) -> tuple[dict[int, _Tag], int]:
        """Tags of interest of the directory at byte `at`, and where the next one is (0: none)."""
        number, entry, link = ("Q", "HHQ8s", "Q") if self._big else ("H", "HHI4s", "I")
        head, size, tail = (struct.calcsize(f"={code}") for code in (number, entry, link))
        entries = self._unpack(number, self.read(at, head))
        if not 1 <= entries <= MAX_ENTRIES:
            raise TiffError(f"has a directory of {entries} entries, expected 1 to {MAX_ENTRIES}")
        data = self.read(at + head, entries * size + tail)
        tags: dict[int, _Tag] = {}
        for tag, kind, count, value in struct.iter_unpack(f"{self._order}{entry}", data[:-tail]):
            if tag in _KNOWN:
                if tag in tags:
                    raise TiffError(f"has tag {tag} twice in one directory")
                tags[tag] = _Tag(kind, count, value)
        return tags, self._unpack(link, data[-tail:])

    def _image(self, tags: dict[int, _Tag]) -> TiffImage:
        return TiffImage(
            width=self._one(tags, _WIDTH),
            height=self._one(tags, _HEIGHT),
            tiled=_TILE_WIDTH in tags,
            subfile=self._one(tags, _SUBFILE, 0),
            compression=self._one(tags, _COMPRESSION, 1),
            description=self._text(tags[_DESCRIPTION]) if _DESCRIPTION in tags else None,
            per_unit=(self._rational(tags, _X_RESOLUTION), self._rational(tags, _Y_RESOLUTION)),
            unit=self._one(tags, _UNIT, 2),
            depth=self._one(tags, _DEPTH, 1),
            icc=_ICC in tags and tags[_ICC].count > 0,
            level=self._level(tags),
        )

    def _level(self, tags: dict[int, _Tag]) -> TiffLevel | None:
        if _TILE_WIDTH not in tags:
            return None
        plain = (
            self._values(tags, _BITS, MAX_SAMPLES, (1,)) == (8, 8, 8)
            and self._one(tags, _SAMPLES, 1) == 3
            and self._one(tags, _PLANAR, 1) == 1
            and self._one(tags, _FILL_ORDER, 1) == 1
            and self._one(tags, _ORIENTATION, 1) == 1
            and set(self._values(tags, _FORMAT, MAX_SAMPLES, (1,))) == {1}
        )
        if not plain:
            return None
        width, height, tile_w, tile_h = (self._one(tags, t) for t in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT))
        if not (0 < width <= MAX_EDGE_PX and 0 < height <= MAX_EDGE_PX):
            raise TiffError(f"states {width} x {height} px")
        if not (tile_w > 0 and tile_h > 0 and tile_w * tile_h <= MAX_TILE_PX):
            raise TiffError(f"states tiles of {tile_w} x {tile_h} px")
        tiles = -(-width // tile_w) * -(-height // tile_h)
        tables = self._array(tags[_TABLES], MAX_TABLES_BYTES).tobytes() if _TABLES in tags else None
        return TiffLevel(
            width=width,
            height=height,
            tile_w=tile_w,
            tile_h=tile_h,
            compression=self._one(tags, _COMPRESSION, 1),
            photometric=self._one(tags, _PHOTOMETRIC),
            predictor=self._one(tags, _PREDICTOR, 1),
            tables=tables,
            offsets=self._exactly(tags, _OFFSETS, tiles),
            counts=self._exactly(tags, _COUNTS, tiles),
        )

    def _exactly(self, tags: dict[int, _Tag], tag: int, count: int) -> NDArray[np.uint64]:
        if tag not in tags or tags[tag].count != count:
            held = tags[tag].count if tag in tags else 0
            raise TiffError(f"has {held} values of tag {tag}, expected one for each of {count} tiles")
        return self._array(tags[tag], count).astype(np.uint64)

    def _one(self, tags: dict[int, _Tag], tag: int, default: int | None = None) -> int:
        (value,) = self._values(tags, tag, 1, None if default is None else (default,))
        return value

    def _values(
        self, tags: dict[int, _Tag], tag: int, most: int, default: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        if tag not in tags:
            if default is None:
                raise TiffError(f"lacks tag {tag}")
            return default
        values = self._array(tags[tag], most)
        if not len(values):
            raise TiffError(f"has no value for tag {tag}")
        return tuple(int(v) for v in values)

    def _text(self, tag: _Tag) -> str:
        if tag.kind != _ASCII or tag.count > MAX_DESCRIPTION_BYTES:
            raise TiffError(f"has a text of {tag.count} values of type {tag.kind}")
        return self._data(tag, tag.count).partition(b"\0")[0].decode("latin-1")

    def _rational(self, tags: dict[int, _Tag], name: int) -> float | None:
        if name not in tags:
            return None
        if (tags[name].kind, tags[name].count) != (_RATIONAL, 1):
            raise TiffError(f"has {tags[name].count} values of type {tags[name].kind} for tag {name}")
        number, parts = struct.unpack(f"{self._order}II", self._data(tags[name], 8))
        if not number or not parts:
            raise TiffError(f"states {number}/{parts} for tag {name}")
        return float(number / parts)

    def _array(self, tag: _Tag, most: int) -> NDArray[np.unsignedinteger]:
        """A tag's values. They are in the file, so its size bounds them too."""
        if tag.kind not in _DTYPES or tag.count > most:
            raise TiffError(f"has {tag.count} values of type {tag.kind} in a tag, expected at most {most} integers")
        dtype = np.dtype(f"{self._order}{_DTYPES[tag.kind]}")
        return np.frombuffer(self._data(tag, tag.count * dtype.itemsize), dtype)

    def _data(self, tag: _Tag, length: int) -> bytes:
        if length <= len(tag.value):
            return tag.value[:length]
        return self.read(self._unpack("Q" if self._big else "I", tag.value), length)
