"""Synthetic H&E slides of any size, for demos, tests and benchmarks: deterministic, streamed, no patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.config import MPP_RANGE, TARGET_MPP
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.slides.stain import TissuePainter
from wsi_rt.runtime.slides.tiff import COMPRESSIONS, JPEG_QUALITY, PyramidWriter, encode_tile

MAX_EDGE = 1_000_000


def write_synth_slide(
    path: str | Path,
    *,
    width: int = 6144,
    height: int = 4096,
    mpp: float = TARGET_MPP,
    tile: int = 256,
    seed: int = 0,
    tissue: float = 0.3,
    levels: Sequence[int] = (1, 4, 16),
    compression: str = "jpeg",
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write an Aperio-style pyramidal BigTIFF that OpenSlide opens, resolution included; return its path.

    width, height: level-0 px.  mpp: um/px.  tile: stored tile edge, a multiple of 16.
    tissue: share of the area, 0 (blank glass) to 0.9.  compression: jpeg, jpeg2000, deflate or none.
    levels: downsample of each level, the first 1, each a multiple of the one before; coarser levels
    are box averages. The same arguments give the same bytes (with the same numpy and Pillow).

    Memory: about 60 MB plus one tile row per coarser level (100,000 px wide: 26 MB). The file is
    written beside its place and renamed, replacing an older one; whatever interrupts it, nothing is
    left behind. on_progress(done, total) counts level-0 tiles.

    Raises InputError (arguments, missing folder) and MachineError (disk full, not writable).
    """
    path = Path(path)
    _check(path, width, height, mpp, tile, tissue, levels, compression)
    sizes = [(max(1, width // d), max(1, height // d)) for d in levels]
    codec = {"jpeg": f"JPEG/RGB Q={JPEG_QUALITY}", "jpeg2000": "J2K/RGB"}.get(compression, compression)
    description = (
        f"Aperio Image Library (synthetic, wsi-rt) \r\n{width}x{height} [0,0 {width}x{height}] ({tile}x{tile}) {codec}"
        f"|AppMag = {10 / mpp:.3g}|MPP = {mpp:.6g}"
    )
    painter = TissuePainter(width, height, mpp, seed, tissue)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        writer = PyramidWriter(file, sizes, tile, compression, description)
        _Cascade(writer, sizes, tuple(levels), tile, compression).run(painter, on_progress)
        writer.finish()
    return path


def _check(
    path: Path, width: int, height: int, mpp: float, tile: int, tissue: float, levels: Sequence[int], compression: str
) -> None:
    def require(ok: bool, name: str, given: object, expected: str) -> None:
        if not ok:
            raise InputError(f"synthetic slide: {name} is {given!r}, expected {expected}")

    for name, edge in (("width", width), ("height", height)):
        require(1 <= edge <= MAX_EDGE, name, edge, f"1 to {MAX_EDGE} px")
    low, high = MPP_RANGE
    require(low <= mpp <= high, "mpp", mpp, f"um/px between {low:g} and {high:g}")
    require(16 <= tile <= 4096 and tile % 16 == 0, "tile", tile, "a multiple of 16 px up to 4096")
    require(0 <= tissue <= 0.9, "tissue", tissue, "a share between 0 and 0.9")
    require(compression in COMPRESSIONS, "compression", compression, " or ".join(COMPRESSIONS))
    steps = [b / a for a, b in pairwise(levels) if a > 0]
    fits = len(levels) > 0 and levels[0] == 1 and all(s > 1 and s.is_integer() and tile % s == 0 for s in steps)
    require(fits, "levels", tuple(levels), f"1 first, then multiples whose steps divide the tile of {tile} px")
    require(path.parent.is_dir(), "folder", str(path.parent), "an existing folder")
    require(not path.is_dir(), "path", str(path), "a file name, not a folder")


class _Cascade:
    """Paints level 0 tile by tile and averages each tile row into the next level's row as it goes.

    A level's row is written once it is complete; so only one tile row per coarser level is held.
    """

    def __init__(
        self,
        writer: PyramidWriter,
        sizes: list[tuple[int, int]],
        downsamples: tuple[int, ...],
        tile: int,
        compression: str,
    ) -> None:
        self._writer = writer
        self._tile = tile
        self._compression = compression
        self._counts = [(-(-w // tile), -(-h // tile)) for w, h in sizes]
        self._sizes = sizes
        self._steps = [b // a for a, b in pairwise(downsamples)]
        # strips[i]: the unfinished tile row of level i + 1, u8 [tile, cols * tile, 3]; white where no slide is
        self._strips = [np.full((tile, cols * tile, 3), 255, np.uint8) for cols, _ in self._counts[1:]]

    def run(self, painter: TissuePainter, on_progress: Callable[[int, int], None] | None) -> None:
        tile, (cols, rows) = self._tile, self._counts[0]
        glass = painter.background(tile, tile)
        glass_data = encode_tile(glass, self._compression)
        for row in range(rows):
            for col in range(cols):
                place = (col * tile, row * tile, tile, tile)
                bare = painter.is_background(*place)
                pixels = glass if bare else painter.paint(*place)
                data = glass_data if bare else encode_tile(pixels, self._compression)
                self._writer.write_tile(0, col, row, data)
                self._average(0, col, row, pixels)
                if on_progress is not None:
                    on_progress(row * cols + col + 1, rows * cols)
            self._row_done(0, row)

    def _average(self, level: int, col: int, row: int, pixels: NDArray[np.uint8]) -> None:
        """Box-average one tile of `level` into the strip of the next level."""
        if level == len(self._steps):
            return
        step, strip = self._steps[level], self._strips[level]
        edge = self._tile // step
        y, x = row * edge % self._tile, col * edge
        mean = pixels.reshape(edge, step, edge, step, 3).mean(axis=(1, 3), dtype=np.float32)
        target = strip[y : y + edge, x : x + edge]  # the last column may be cut off
        target[:] = np.rint(mean).astype(np.uint8)[:, : target.shape[1]]

    def _row_done(self, level: int, row: int) -> None:
        """After a tile row of `level`: write the next level's row if this completed it."""
        if level == len(self._steps):
            return
        step = self._steps[level]
        last = row == self._counts[level][1] - 1
        if (row + 1) % step and not last:
            return
        cols, rows = self._counts[level + 1]
        strip, up = self._strips[level], row // step
        if up < rows:
            for col in range(cols):
                pixels = np.ascontiguousarray(strip[:, col * self._tile : (col + 1) * self._tile])
                self._writer.write_tile(level + 1, col, up, encode_tile(pixels, self._compression))
                self._average(level + 1, col, up, pixels)
            self._row_done(level + 1, up)
        strip[:] = 255
