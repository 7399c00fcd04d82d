"""Reading the kept tiles of slides, ahead of the consumer and in grid order."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.grid import ReadPlan
from wsi_rt.runtime.slides.prefetch import THREAD_NAME
from wsi_rt.runtime.slides.reader import SlideReader
from wsi_rt.runtime.types import TILE_PX, TileBatch, TileFailure, TileGrid

UNIT_TILES = 32  # read by one thread in one go: handing over costs some 100 us, 3 us a tile
AHEAD_TILES = 64  # read while the caller works on a batch, and at least one batch

Failures = list[tuple[int, SlideError]]  # (row, why)


class TileSource(NamedTuple):
    """The tiles of one open slide: read `grid` from `reader` as `plan` says."""

    reader: SlideReader
    grid: TileGrid
    plan: ReadPlan


def iter_tiles(
    reader: SlideReader,
    grid: TileGrid,
    plan: ReadPlan,
    batch_size: int,
    threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    raise_bad: bool = True,
) -> Generator[TileBatch, None, None]:
    """Yield the grid's tiles as batches of u8 [B, 256, 256, 3], in grid order; the last may be smaller.

    Tiles are read ahead by `threads` threads while the caller works on a batch, then the threads pause.
    Memory: the batch handed out and `ahead_batches` more, 192 KiB a tile (batches of 32: 18 MiB); per thread one
    square of plan.read_px where tiles are resampled (about 11 bytes per px); the reader's cache (decoded file tiles
    that later tiles share, 192 MiB at most; OpenSlide's, 128 MiB). A batch's memory serves again only
    once the caller holds neither it nor a view of it. on_progress(done, total) is called in the
    caller's thread, once per batch, before it is handed out.

    A tile that cannot be read, tried twice, raises SlideError naming slide and tile at the turn of its
    batch; with raise_bad=False the batch says so in `failures`, and the tile's pixels are white.

    Closing the iterator, an exception or KeyboardInterrupt drops what is not begun and joins the threads;
    close it (or let it run out) before closing the reader.

    Raises SlideError, and ValueError for batch_size or threads below 1, or a plan made for another grid.
    """
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size is {batch_size} and threads is {threads}, expected 1 or more")
    if grid.patch_size_level0 != plan.patch_size_level0:
        raise ValueError(f"the grid's tile is {grid.patch_size_level0} px, the plan's {plan.patch_size_level0}")
    return _iter_tiles(TileSource(reader, grid, plan), batch_size, threads, on_progress, raise_bad)


def _iter_tiles(
    source: TileSource,
    batch_size: int,
    threads: int,
    on_progress: Callable[[int, int], None] | None,
    raise_bad: bool,
) -> Generator[TileBatch, None, None]:
    batches = iter_batches([source], batch_size, threads)
    try:
        for _, batch in batches:
            if raise_bad and batch.failures:
                bad = batch.failures[0]
                raise SlideError(f"tile {bad.index} at level-0 position {bad.xy0}: {bad.reason}")
            if on_progress is not None:
                on_progress(int(batch.index[-1]) + 1, len(source.grid))
            yield batch
            del batch  # else its memory would not serve again while the caller works on the next one
    finally:
        batches.close()


def read_tile(reader: SlideReader, plan: ReadPlan, xy0: tuple[int, int]) -> NDArray[np.uint8]:
    """One tile, u8 [256, 256, 3] RGB, its top-left corner at level-0 px `xy0`; white outside the slide.

    A level within 5 % of the target is used as it is. Otherwise the square is resized with Pillow's
    bicubic filter, whose support grows with the reduction (antialiasing): the convention of the
    published preprocessing. Nearest or plain bilinear would alias chromatin texture, Lanczos rings
    at nuclear borders. Where a tile starts between level px, whole level px are read and the resize
    takes the exact fractional box (OpenSlide would round the start, by up to 0.6 px in trials).

    Raises SlideError naming slide and place.
    """
    out = np.empty((1, TILE_PX, TILE_PX, 3), np.uint8)
    failures = read_unit(reader, plan, np.array([xy0], np.int64), out)
    if failures:
        raise failures[0][1]
    return out[0]


@dataclass
class _Pending:
    """A batch being read. parts: (first row, reading) of its units."""

    source: TileSource
    start: int
    pixels: NDArray[np.uint8]  # [B, 256, 256, 3]
    parts: list[tuple[int, Future[Failures]]]

    def finish(self) -> tuple[TileSource, TileBatch]:
        failures = [
            self._failure(self.start + first + row, error) for first, part in self.parts for row, error in part.result()
        ]
        index = np.arange(self.start, self.start + len(self.pixels), dtype=np.int64)
        return self.source, TileBatch(self.pixels, index, tuple(failures))

    def _failure(self, index: int, error: SlideError) -> TileFailure:
        x0, y0 = (int(v) for v in self.source.grid.xy0[index])
        return TileFailure(index, (x0, y0), str(error))


def iter_batches(
    sources: Iterable[TileSource | Future[Any]], batch_size: int, threads: int
) -> Generator[tuple[TileSource, TileBatch], None, None]:
    """Batches of one slide after the other, read ahead across slides too; failures are in the batches.

    The next source is taken, in the caller's thread, once the last batch of the one before is being read: at that
    moment `ahead_batches` are still to be handed out, or UNIT_TILES tiles less: small batches are begun together, since
    a reader that wakes up takes the caller's core, and the caller then waits for 2 ms. A future among the sources is
    what the next one waits for: until it is done, the batches that are read already are handed out. Memory and
    clean-up as in `iter_tiles`.
    """
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=THREAD_NAME)
    memory, pending = _BatchMemory(batch_size), deque[_Pending]()
    ahead, together = ahead_batches(batch_size, threads), max(1, UNIT_TILES // batch_size)
    try:
        for source in sources:
            if isinstance(source, Future):
                while pending and not source.done():
                    yield pending.popleft().finish()
                continue
            if len(source.grid):
                announce(source)
            for start in range(0, len(source.grid), batch_size):
                pending.append(
                    _begin(pool, source, start, memory.take(min(batch_size, len(source.grid) - start)), threads)
                )
                if len(pending) > ahead:
                    for _ in range(together):
                        yield pending.popleft().finish()
        while pending:
            yield pending.popleft().finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(
    pool: ThreadPoolExecutor, source: TileSource, start: int, pixels: NDArray[np.uint8], threads: int
) -> _Pending:
    parts = [
        (first, pool.submit(_read_part, source, start, pixels, first, stop))
        for first, stop in units_of(len(pixels), threads)
    ]
    return _Pending(source, start, pixels, parts)


def ahead_batches(batch_size: int, threads: int) -> int:
    """How many batches are read ahead of the one handed out."""
    units = len(units_of(batch_size, threads))  # of one batch; two for every thread keep them busy
    return max(1, -(-AHEAD_TILES // batch_size), -(-2 * threads // units) - 1)


def units_of(count: int, threads: int) -> list[tuple[int, int]]:
    """(first, stop) rows of a batch that one thread reads in one go: at most UNIT_TILES, and work for every thread."""
    size = max(1, min(UNIT_TILES, -(-count // threads)))
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def _read_part(source: TileSource, start: int, pixels: NDArray[np.uint8], first: int, stop: int) -> Failures:
    return read_unit(source.reader, source.plan, source.grid.xy0[start + first : start + stop], pixels[first:stop])


def read_unit(reader: SlideReader, plan: ReadPlan, xy0s: NDArray[np.int64], out: NDArray[np.uint8]) -> Failures:
    """Tiles at int64 [B, 2] level-0 px into u8 [B, 256, 256, 3]."""
    if not plan.resample:
        return reader.read_tiles(xy0s, plan.level, (plan.read_px, plan.read_px), out)
    return _read_resampled(reader, plan, xy0s, out)


def squares(
    plan: ReadPlan, xy0s: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Where tiles to be resampled are read: corners, int64 [B, 2] level-0 px; edges, int64 [B] level px; and the
    offset of each tile in its square, f64 [B, 2] level px, 0 <= offset < 1."""
    at = xy0s / plan.downsample
    first = np.floor(at)  # the level px the tile starts in
    offset = at - first
    edges = np.ceil(offset.max(axis=1) + plan.patch_size_level0 / plan.downsample).astype(np.int64)
    return np.rint(first * plan.downsample).astype(np.int64), edges, offset


def _read_resampled(reader: SlideReader, plan: ReadPlan, xy0s: NDArray[np.int64], out: NDArray[np.uint8]) -> Failures:
    from PIL import Image

    span = plan.patch_size_level0 / plan.downsample  # level px
    corners, edges, offsets = squares(plan, xy0s)
    memory = np.empty(3 * int(edges.max(initial=0)) ** 2, np.uint8)
    failures: Failures = []
    for row, (edge, (left, top)) in enumerate(zip(edges.tolist(), offsets.tolist(), strict=True)):
        square = memory[: 3 * edge * edge].reshape(1, edge, edge, 3)
        bad = reader.read_tiles(corners[row : row + 1], plan.level, (edge, edge), square)
        if bad:
            out[row] = 255
            failures.append((row, bad[0][1]))
            continue
        box = (left, top, left + span, top + span)
        resized = Image.fromarray(square[0]).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC, box=box)
        out[row] = np.asarray(resized)
    return failures


def announce(source: TileSource) -> None:
    """Tell the reader what will be read, in grid order."""
    reader, grid, plan = source
    if plan.resample:
        corners, edges, _ = squares(plan, grid.xy0)
        reader.announce(corners, plan.level, (int(edges.max()), int(edges.max())))
    else:
        reader.announce(grid.xy0, plan.level, (plan.read_px, plan.read_px))


class _BatchMemory:
    """Memory for batches that serves again once nobody refers to the batch or a view of it.

    A fresh 6 MiB array costs 1,500 page faults, some 10 % of reading its 32 tiles.
    """

    def __init__(self, batch_size: int) -> None:
        self._bytes = batch_size * TILE_PX * TILE_PX * 3
        self._free: list[memoryview] = []

    def take(self, count: int) -> NDArray[np.uint8]:
        """u8 [count, 256, 256, 3], uninitialised."""
        memory = self._free.pop() if self._free else np.empty(self._bytes, np.uint8).data
        # The base of every view that numpy makes of `root`, and of views of those, is `root`: it goes last.
        root = np.frombuffer(memory, np.uint8)
        weakref.finalize(root, self._free.append, memory).atexit = False
        return root[: count * TILE_PX * TILE_PX * 3].reshape(count, TILE_PX, TILE_PX, 3)
