"""A reader over a file that stores each level as a grid of encoded tiles: TIFF, DICOM."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.codecs import CodecError
from wsi_rt.runtime.slides.reader import Level, SlideReader
from wsi_rt.runtime.slides.readers.segment_cache import SegmentCache

CACHE_BYTES = 192 << 20  # one row of 240-px tiles of a slide 280,000 px wide, or three of one 93,000 px wide
# OpenSlide interpolates where a region starts between px; cairo takes less than 1/512 px for none. Half of that.
MAX_PX_OFFSET = 1 / 1024
OPENSLIDE_BLOCK_PX = 4096  # OpenSlide reads larger regions in blocks, each rounded to a level-0 px of its own


class ReadElsewhereError(CodecError):
    """Not broken: the segment needs what only `_read_otherwise` does. Not counted as read again."""


@dataclass(frozen=True)
class Tiling:
    """How one level is stored: tiles of tile_w x tile_h px, cols x rows of them from its top-left corner."""

    tile_w: int
    tile_h: int
    cols: int
    rows: int


class TiledReader(SlideReader):
    """Decodes each stored tile once, straight into the caller's array where both grids coincide.

    tilings: one per level. A subclass gives `_decode`, `_read_otherwise` and `_close`. What a border tile holds
    beyond the level is painted white here.

    Memory: decoded tiles up to CACHE_BYTES, only while regions share them.
    """

    def __init__(self, path: Path, settings: SlideSettings, *, tilings: tuple[Tiling, ...], **facts: Any) -> None:
        """facts: as `SlideReader` takes them."""
        super().__init__(path, settings, **facts)
        self.tilings = tilings
        self._cache = SegmentCache(CACHE_BYTES)

    @property
    def decoded(self) -> int:
        """Stored tiles decoded for regions off the stored grid since opening."""
        return self._cache.decoded

    @abstractmethod
    def _decode(self, level: int, col: int, row: int, out: NDArray[np.uint8]) -> bool:
        """Decode one stored tile into `out`, u8 [tile_h, tile_w, 3]; False where the file has none (white).

        Called from several threads. Raises CodecError or OSError when it cannot be decoded, ReadElsewhereError when it
        can but not here.
        """

    @abstractmethod
    def _read_otherwise(
        self, xy0: tuple[int, int], level: int, size: tuple[int, int], error: Exception | None
    ) -> NDArray[np.uint8]:
        """A region that starts between px of its level (error is None), or that `_decode` failed on.

        Returns u8 [h, w, 3]; raises SlideError naming slide and place. It is the second and last try.
        """

    def announce(self, xy0s: NDArray[np.int64], level: int, size: tuple[int, int]) -> None:
        uses = np.zeros(self.tilings[level].cols * self.tilings[level].rows, np.uint16)
        corners, exact = level_px(xy0s, self.levels[level], size)
        for numbers in self._segments_under(corners[exact], level, size):
            np.add.at(uses, numbers, 1)
        self._cache.announce(level, uses)

    def _segments_under(self, corners: NDArray[np.int64], level: int, size: tuple[int, int]):  # type: ignore[no-untyped-def]
        """Yield int64 [<= B] numbers of stored tiles; together, those under every region that is off the grid."""
        tiling, edge = self.tilings[level], np.array((self.levels[level].width, self.levels[level].height))
        tile = np.array((tiling.tile_w, tiling.tile_h))
        corners = corners[~_aligned(corners, tiling, size)]
        first = np.maximum(corners, 0) // tile  # [B, 2]
        last = (np.minimum(corners + size, edge) - 1) // tile
        spans = (last - first).max(axis=0, initial=-1) + 1
        for down in range(spans[1]):
            for across in range(spans[0]):
                at = first + np.array((across, down))
                inside = (at <= last).all(axis=1)
                yield at[inside, 1] * tiling.cols + at[inside, 0]

    def _read(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        out = np.empty((1, size[1], size[0], 3), np.uint8)
        failures = self._read_tiles(np.array([xy0], np.int64), level, size, out)
        if failures:
            raise failures[0][1]
        return out[0]

    def _read_tiles(
        self, xy0s: NDArray[np.int64], level: int, size: tuple[int, int], out: NDArray[np.uint8]
    ) -> list[tuple[int, SlideError]]:
        corners, exact = level_px(xy0s, self.levels[level], size)
        whole = _aligned(corners, self.tilings[level], size) & exact
        errors: dict[int, Exception | None] = dict.fromkeys(np.flatnonzero(~exact).tolist())
        for row in np.flatnonzero(whole).tolist():
            try:
                self._decode_into(level, int(corners[row, 0]), int(corners[row, 1]), out[row])
            except (CodecError, OSError) as error:
                errors[row] = error
        by_y: dict[int, list[tuple[int, int]]] = {}
        for row in np.flatnonzero(exact & ~whole).tolist():
            by_y.setdefault(int(corners[row, 1]), []).append((row, int(corners[row, 0])))
        for y, regions in by_y.items():
            self._assemble(level, y, regions, out, errors)
        return self._second_try(errors, xy0s, level, size, out)

    def _second_try(
        self,
        errors: dict[int, Exception | None],
        xy0s: NDArray[np.int64],
        level: int,
        size: tuple[int, int],
        out: NDArray[np.uint8],
    ) -> list[tuple[int, SlideError]]:
        failures: list[tuple[int, SlideError]] = []
        for row, error in sorted(errors.items()):
            place = int(xy0s[row, 0]), int(xy0s[row, 1])
            try:
                out[row] = self._read_otherwise(place, level, size, error)
            except SlideError as failed:
                out[row] = 255
                failures.append((row, failed))
                continue
            if error is not None and not isinstance(error, ReadElsewhereError):
                with self._lock:
                    self.rereads += 1
        return failures

    def _decode_into(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> None:
        """The stored tile whose corner is level px (x, y), into `out`, u8 [tile_h, tile_w, 3]."""
        size, tiling = self.levels[level], self.tilings[level]
        col, row = x // tiling.tile_w, y // tiling.tile_h
        if not (0 <= col < tiling.cols and 0 <= row < tiling.rows and self._decode(level, col, row, out)):
            out[:] = 255
            return
        if x + tiling.tile_w > size.width:
            out[:, size.width - x :] = 255
        if y + tiling.tile_h > size.height:
            out[size.height - y :] = 255

    def _assemble(
        self,
        level: int,
        y: int,
        regions: list[tuple[int, int]],
        out: NDArray[np.uint8],
        errors: dict[int, Exception | None],
    ) -> None:
        """Regions (row of `out`, x) that start at the same y, level px, from the stored tiles under them.

        Stored tile by stored tile, so that neighbours take their parts while it is in the CPU's cache. The rows
        that a tile fails go into `errors`.
        """
        place, tiling = self.levels[level], self.tilings[level]
        height, width = out.shape[1:3]
        across: dict[int, list[tuple[int, slice, slice]]] = {}  # column of stored tiles -> (row of `out`, from, to)
        for row, x in regions:
            if x < 0 or y < 0 or x + width > place.width or y + height > place.height:
                out[row] = 255
            for col, cols_from, cols_to in _spans(x, width, place.width, tiling.tile_w):
                across.setdefault(col, []).append((row, cols_from, cols_to))
        parts, shape = list(across.values()), (tiling.tile_h, tiling.tile_w, 3)
        counts = [len(p) for p in parts]

        def decode(number: int, pixels: NDArray[np.uint8]) -> bool:
            stored_row, col = divmod(number, tiling.cols)
            return self._decode(level, col, stored_row, pixels)

        for stored_row, rows_from, rows_to in _spans(y, height, place.height, tiling.tile_h):
            numbers = [stored_row * tiling.cols + col for col in across]
            for i, segment in self._cache.borrow(level, numbers, counts, shape, decode):
                pixels, error = segment.pixels, segment.error
                for row, cols_from, cols_to in parts[i]:
                    if error is None:
                        out[row, rows_to, cols_to] = pixels[rows_from, cols_from]
                    else:
                        errors[row] = error


def _spans(start: int, length: int, edge: int, tile: int) -> list[tuple[int, slice, slice]]:
    """Along one axis, the stored tiles under [start, start + length) inside [0, edge): (number, the part of the tile,
    where it goes in the region)."""
    first, stop = max(start, 0), min(start + length, edge)
    spans = []
    while first < stop:
        number = first // tile
        origin = number * tile
        end = min(origin + tile, stop)
        spans.append((number, slice(first - origin, end - origin), slice(first - start, end - start)))
        first = end
    return spans


def level_px(
    xy0s: NDArray[np.int64], level: Level, size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """int64 [B, 2] px of the level at which the regions start, and bool [B]: they start there exactly.

    A region that starts left of or above the slide has its whole px moved by OpenSlide, the fraction dropped.
    """
    at = xy0s / level.downsample
    at = np.where(at < 0, np.ceil(at), at)
    corners = np.rint(at)
    exact = np.all(np.abs(at - corners) < MAX_PX_OFFSET, axis=1)
    if max(size) > OPENSLIDE_BLOCK_PX and not level.downsample.is_integer():
        exact = np.zeros(len(xy0s), np.bool_)
    return corners.astype(np.int64), exact


def _aligned(corners: NDArray[np.int64], tiling: Tiling, size: tuple[int, int]) -> NDArray[np.bool_]:
    """bool [B]: the region is exactly one place of the stored grid."""
    if size != (tiling.tile_w, tiling.tile_h):
        return np.zeros(len(corners), np.bool_)
    return (corners % (tiling.tile_w, tiling.tile_h) == 0).all(axis=1)
