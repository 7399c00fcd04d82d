"""Where the ring's tiles come from: one interface, and the CPU's readers behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.device.device import TileDevice
from wsi_rt.runtime.slides.device.ring import Slot
from wsi_rt.runtime.slides.prefetch import THREAD_NAME
from wsi_rt.runtime.slides.tiles import Failures, TileSource, announce, read_unit, units_of
from wsi_rt.runtime.types import TileFailure


class DeviceTiles(ABC):
    """Reads a slide's tiles into slots, ahead of what encodes them; in grid order.

    name: as provenance tells it. pinned: slots need pinned memory, into which tiles are decoded.
    Tiles that cannot be read are told, and are white.
    """

    name: str
    pinned: bool

    def __init__(self, tiles: TileSource, device: TileDevice, threads: int) -> None:
        self.tiles, self._device, self._threads = tiles, device, threads
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=THREAD_NAME)

    @abstractmethod
    def begin(self, slot: Slot) -> None:
        """Begin to read `slot.rows`; does not wait. Nothing may be queued on the slot."""

    @abstractmethod
    def finish(self, slot: Slot) -> tuple[TileFailure, ...]:
        """Wait until they are read and queued on the decode stream, and record `slot.decoded`."""

    def close(self) -> None:
        """Drop what is not begun, and join the threads. Twice is harmless."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def failure(self, index: int, error: SlideError) -> TileFailure:
        x0, y0 = (int(v) for v in self.tiles.grid.xy0[index])
        return TileFailure(index, (x0, y0), str(error))


class HostTiles(DeviceTiles):
    """`threads` threads decode into the slots' pinned memory, then one copy takes a batch to the device.

    As `tiles.iter_tiles` reads: the same pixels, in the same units. Reading threads do not touch the device.
    """

    pinned = True

    def __init__(self, tiles: TileSource, device: TileDevice, threads: int) -> None:
        super().__init__(tiles, device, threads)
        self.name = f"{threads} threads of the CPU, into pinned memory"
        self._parts: dict[int, list[tuple[int, Future[Failures]]]] = {}  # by slot; first row of the grid, reading
        if len(tiles.grid):
            announce(tiles)

    def close(self) -> None:
        super().close()
        self._parts.clear()

    def begin(self, slot: Slot) -> None:
        assert slot.pinned is not None  # as `pinned` says
        pixels, (reader, grid, plan) = slot.pinned.numpy(), self.tiles
        self._parts[slot.number] = []
        for first, stop in units_of(len(slot.rows), self._threads):
            xy0s = grid.xy0[slot.rows.start + first : slot.rows.start + stop]
            read = partial(read_unit, reader, plan, xy0s, pixels[first:stop])
            self._parts[slot.number].append((slot.rows.start + first, self._pool.submit(read)))

    def finish(self, slot: Slot) -> tuple[TileFailure, ...]:
        assert slot.pinned is not None
        failures: list[TileFailure] = []
        for first, part in self._parts.pop(slot.number):
            failures += [self.failure(first + row, error) for row, error in part.result()]
        count = len(slot.rows)
        self._device.copy("decode", slot.pinned[:count], slot.tiles[:count])
        slot.decoded = self._device.record("decode")
        return tuple(failures)
