"""Reading the kept tiles of a slide, ahead of the consumer and in grid order."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.grid import ReadPlan
from wsi_rt.runtime.slides.prefetch import prefetch_map
from wsi_rt.runtime.slides.reader import SlideReader
from wsi_rt.runtime.types import TILE_PX, TileBatch, TileGrid


def iter_tiles(
    reader: SlideReader,
    grid: TileGrid,
    plan: ReadPlan,
    batch_size: int,
    threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> Generator[TileBatch, None, None]:
    """Yield the grid's tiles as batches of u8 [B, 256, 256, 3], in grid order; the last may be smaller.

    Tiles are read ahead by `threads` threads while the caller works on a batch. Memory: the batch
    handed out, the batch being filled and at most batch_size + 2 x threads tiles read ahead, 192 KiB
    each, plus per thread one square of plan.read_px (about 11 bytes per px while it is decoded) and
    OpenSlide's cache. Batches are never reused. on_progress(done, total) is called in the caller's
    thread, once per batch, before it is handed out.

    Closing the iterator, an exception or KeyboardInterrupt stops and joins the threads; close it (or
    let it run out) before closing the reader.

    Raises SlideError naming slide and tile at the turn of a tile that cannot be read, and ValueError
    for batch_size or threads below 1, or a plan made for another grid.
    """
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size is {batch_size} and threads is {threads}, expected 1 or more")
    if grid.patch_size_level0 != plan.patch_size_level0:
        raise ValueError(f"the grid's tile is {grid.patch_size_level0} px, the plan's {plan.patch_size_level0}")
    return _iter_tiles(reader, grid, plan, batch_size, threads, on_progress)


def _iter_tiles(
    reader: SlideReader,
    grid: TileGrid,
    plan: ReadPlan,
    batch_size: int,
    threads: int,
    on_progress: Callable[[int, int], None] | None,
) -> Generator[TileBatch, None, None]:
    total = len(grid)

    def read(index: int) -> NDArray[np.uint8]:
        x0, y0 = (int(v) for v in grid.xy0[index])
        try:
            return read_tile(reader, plan, (x0, y0))
        except SlideError as error:
            raise SlideError(f"tile {index} at level-0 position ({x0}, {y0}): {error}") from error

    tiles = prefetch_map(read, range(total), threads=threads, depth=batch_size + 2 * threads)
    try:
        for start in range(0, total, batch_size):
            count = min(batch_size, total - start)
            pixels = np.empty((count, TILE_PX, TILE_PX, 3), np.uint8)  # [B, 256, 256, 3]
            for row in range(count):
                pixels[row] = next(tiles)
            if on_progress is not None:
                on_progress(start + count, total)
            yield TileBatch(pixels=pixels, index=np.arange(start, start + count, dtype=np.int64))
    finally:
        tiles.close()


def read_tile(reader: SlideReader, plan: ReadPlan, xy0: tuple[int, int]) -> NDArray[np.uint8]:
    """One tile, u8 [256, 256, 3] RGB, its top-left corner at level-0 px `xy0`; white outside the slide.

    A level within 5 % of the target is used as it is. Otherwise the square is resized with Pillow's
    bicubic filter, whose support grows with the reduction (antialiasing): the convention of the
    published preprocessing. Nearest or plain bilinear would alias chromatin texture, Lanczos rings
    at nuclear borders. Where a tile starts between level px, whole level px are read and the resize
    takes the exact fractional box (OpenSlide would round the start, by up to 0.6 px in trials).

    Raises SlideError naming slide and place.
    """
    if not plan.resample:
        return reader.read_region(xy0, plan.level, (plan.read_px, plan.read_px))
    from PIL import Image

    first = [math.floor(v / plan.downsample) for v in xy0]  # the level px the tile starts in
    offset = [v / plan.downsample - k for v, k in zip(xy0, first, strict=True)]  # level px, 0 <= offset < 1
    span = plan.patch_size_level0 / plan.downsample  # level px
    edge = math.ceil(max(offset) + span)
    corner0 = (round(first[0] * plan.downsample), round(first[1] * plan.downsample))
    square = reader.read_region(corner0, plan.level, (edge, edge))
    box = (offset[0], offset[1], offset[0] + span, offset[1] + span)
    resized = Image.fromarray(square).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC, box=box)
    return np.array(resized)
