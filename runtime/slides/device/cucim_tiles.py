"""Tiles that cuCIM decodes on the GPU: from its buffers into the ring's, on the device.

Not run on a GPU yet: written after cuCIM's documentation and source, and tested with cuCIM on the CPU.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.device.device import Event, TileDevice
from wsi_rt.runtime.slides.device.resample import Resampling
from wsi_rt.runtime.slides.device.ring import Slot
from wsi_rt.runtime.slides.device.sources import DeviceTiles
from wsi_rt.runtime.slides.readers.cucim import CucimReader
from wsi_rt.runtime.slides.tiles import read_tile, squares
from wsi_rt.runtime.types import TILE_PX, TileFailure

if TYPE_CHECKING:
    from wsi_rt.runtime.slides.tiles import TileSource

MAX_BATCH = 64  # regions that cuCIM 26.10 decodes in one go; of a larger batch of its own it may leave out the rest
MAX_SQUARES = 16  # resampled in one go, in some 10 MiB each at 512 px
MAX_EDGE = 2048  # px of a square to be resampled: 16 take some 1.4 GiB
RUN_TILES = 1024  # per loader of cuCIM's, which reads the file from its first to its last tile into memory

_Read = tuple[list[tuple[int, SlideError]], Event]  # (row of the grid, why), and what the slot's tiles wait for


class CucimTiles(DeviceTiles):
    """One thread, one decoder: cuCIM's loader decodes a batch of tiles at a time, ahead of the ring too.

    Its buffers are used again, so each batch is copied or resampled, on the decode stream, and that waited for before
    the next is asked for. A tile that is not wholly inside the slide, or that begins between px of the level, is read
    on its own by `tiles.read_tile` (white outside, where cuCIM is black), and copied from the host. So is every tile of
    a batch that fails, since the batch does not tell which of them it was.
    """

    pinned = False

    def __init__(self, tiles: TileSource, device: TileDevice) -> None:
        """Raises SlideError for tiles too large to be resampled there, ValueError for a reader that is not cuCIM's."""
        if not isinstance(tiles.reader, CucimReader):
            raise ValueError(f"the reader is {tiles.reader.name}, expected cuCIM's")
        super().__init__(tiles, device, threads=1)
        self.name = f"cuCIM on {tiles.reader.device}"
        self._reader = tiles.reader
        self._loader: Generator[Any, None, None] | None = None
        self._at = 0  # the row of the grid that its next batch begins with
        self._reading: dict[int, Future[_Read]] = {}
        self._edges, self._offsets, edge = np.zeros(0, np.int64), np.zeros((0, 2)), TILE_PX
        xy0s = tiles.grid.xy0
        if tiles.plan.resample:
            xy0s, self._edges, self._offsets = squares(tiles.plan, xy0s)
            edge = int(self._edges.max(initial=1))
            if edge > MAX_EDGE:
                raise SlideError(
                    f"{tiles.reader.path}: its tiles are resampled from {edge} px ({tiles.plan.mpp_read:.4g} to "
                    f"{tiles.plan.target_mpp:g} um/px), expected at most {MAX_EDGE} px on the GPU; leave out --reader"
                )
        self._size = (edge, edge)
        corners, exact = self._reader.level_px(xy0s, tiles.plan.level, self._size)
        level = self._reader.levels[tiles.plan.level]
        last = np.array([level.width, level.height]) - edge
        self._alone = ~(exact & (corners >= 0).all(axis=1) & (corners <= last).all(axis=1))  # bool [N]
        # So that batches of the loader are batches of the ring, it decodes something in the place of these too.
        self._corners = np.clip(corners, 0, np.maximum(last, 0))  # int64 [N, 2] level px

    def begin(self, slot: Slot) -> None:
        self._reading[slot.number] = self._pool.submit(self._read, slot)

    def finish(self, slot: Slot) -> tuple[TileFailure, ...]:
        failures, slot.decoded = self._reading.pop(slot.number).result()
        return tuple(self.failure(row, error) for row, error in failures)

    def close(self) -> None:
        super().close()
        self._reading.clear()
        self._end_loader()

    def _read(self, slot: Slot) -> _Read:
        alone = self._alone[slot.rows.start : slot.rows.stop]
        if not alone.all() and not self._take_batch(slot):
            alone = np.ones_like(alone)
        failures = self._read_alone(slot, np.flatnonzero(alone))
        return failures, self._device.record("decode")

    def _take_batch(self, slot: Slot) -> bool:
        """All rows of the slot, by the loader. False when it failed."""
        unit, taken = self._unit(len(slot.tiles)), 0
        while taken < len(slot.rows):
            try:
                batch = self._next(slot.rows.start + taken, unit)
            except SlideError:
                self._end_loader()
                return False
            count = min(unit, len(slot.rows) - taken)
            rows = slice(slot.rows.start + taken, slot.rows.start + taken + count)
            self._device.take(batch, slot.tiles[taken : taken + count], self._how(rows))
            self._device.record("decode").wait()  # its buffer is cuCIM's again with the next one
            taken += count
        return True

    def _next(self, start: int, unit: int) -> Any:
        """cuCIM's batch from row `start` of the grid on; a new loader's where the old one does not go on there."""
        batch = next(self._loader, None) if self._loader is not None and self._at == start else None
        if batch is None:
            self._end_loader()
            stop = start + unit * max(1, RUN_TILES // unit)
            self._loader = self._reader.batches(self._corners[start:stop], self.tiles.plan.level, self._size, unit)
            batch = next(self._loader)
        self._at = start + unit
        return batch

    def _end_loader(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _how(self, rows: slice) -> Resampling | None:
        plan = self.tiles.plan
        if not plan.resample:
            return None
        return Resampling(self._offsets[rows], self._edges[rows], plan.patch_size_level0 / plan.downsample)

    def _unit(self, batch: int) -> int:
        """Tiles of cuCIM's batch: the most that a ring's batch is a multiple of."""
        most = MAX_SQUARES if self.tiles.plan.resample else MAX_BATCH
        return max(n for n in range(1, most + 1) if batch % n == 0)

    def _read_alone(self, slot: Slot, rows: NDArray[np.intp]) -> list[tuple[int, SlideError]]:
        """Rows of the slot, one by one, through the host."""
        failures = []
        for row in rows.tolist():
            x0, y0 = self.tiles.grid.xy0[slot.rows.start + row].tolist()
            try:
                tile = read_tile(self._reader, self.tiles.plan, (x0, y0))
            except SlideError as error:
                tile = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
                failures.append((slot.rows.start + row, error))
            self._device.copy("decode", torch.from_numpy(tile), slot.tiles[row])
            self._device.record("decode").wait()  # `tile` is let go
        return failures
