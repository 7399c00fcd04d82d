"""Batches through the ring: what is begun when, what waits for what, and how it ends (the order: see the package)."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.slides.device.device import DeviceTileEngine, TileDevice
from wsi_rt.runtime.slides.device.ring import SLOTS, RingShape, Slot, SlotState, TileRing
from wsi_rt.runtime.slides.device.sources import DeviceTiles
from wsi_rt.runtime.types import TileFailure


@dataclass(frozen=True)
class FeatureBatch:
    """Features of a batch, f32 [b, C], one row per tile of `rows`. failures: tiles among them that could not be read,
    taken as white. waited_ms: how long the host waited for its tiles to be decoded."""

    rows: range
    features: NDArray[np.float32]
    failures: tuple[TileFailure, ...]
    waited_ms: float


def ring_shape(tiles: DeviceTiles, engine: DeviceTileEngine, batch_size: int, slots: int = SLOTS) -> RingShape:
    """The ring for an engine and where its tiles come from. Raises ValueError for sizes below 1."""
    width = engine.manifest.outputs[0].dims[-1]
    return RingShape(slots, batch_size, engine.manifest.config["image_px"], int(width), engine.dtype, tiles.pinned)


def iter_features(
    tiles: DeviceTiles, engine: DeviceTileEngine, device: TileDevice, ring: RingShape
) -> Generator[FeatureBatch, None, None]:
    """Yield the features of all tiles in batches, in grid order; the last may be smaller. Takes over `tiles`.

    Memory: the ring's (`RingShape.device_bytes`, `pinned_bytes`), whatever the slide; one batch of features for the
    caller; and what the engine, the reader or cuCIM keep for themselves. 3 slots of 32 tiles in 16 bits with 1,536
    features: 46 MiB of the device, 19 MiB pinned (0.6 where cuCIM decodes on the device).

    While the caller works on a batch, what was queued goes on, and the reading into all free slots. However the
    generator ends (exhausted, closed, an exception, KeyboardInterrupt): reading that is not begun is dropped, what is
    in progress is waited for, then the ring's memory is let go.

    Raises what the reader or the engine raises (a SlideError is a failure of its tile), and MachineError (memory).
    """
    return _Run(tiles, engine, device, ring).batches()


class _Run:
    def __init__(self, tiles: DeviceTiles, engine: DeviceTileEngine, device: TileDevice, shape: RingShape) -> None:
        self._tiles, self._engine, self._device, self._shape = tiles, engine, device, shape
        total, size = len(tiles.tiles.grid), shape.batch
        self._to_begin = deque(range(start, min(start + size, total)) for start in range(0, total, size))
        self._decoding: deque[Slot] = deque()
        self._encoding: deque[tuple[Slot, tuple[TileFailure, ...], float]] = deque()

    def batches(self) -> Generator[FeatureBatch, None, None]:
        with ExitStack() as ending:  # last in, first out: threads, then streams, then memory
            ending.callback(self._tiles.close)  # also when there will be no ring
            self._engine.prepare_device(sorted({len(rows) for rows in self._to_begin}))
            ring = TileRing(self._shape, self._device)
            ending.callback(ring.drop)
            ending.callback(self._device.synchronize)
            ending.callback(self._tiles.close)
            while self._begin_all(ring) or self._encoding:
                if self._encoding and (not self._decoding or self._encoding[0][0].copied.done()):
                    batch = self._hand_out(ring)
                    self._begin_all(ring)
                    yield batch
                    del batch  # else it would be held while the next one is waited for
                else:
                    self._encode(self._decoding.popleft())

    def _begin_all(self, ring: TileRing) -> bool:
        """Reads into every free slot. Whether any slot is being read into."""
        while self._to_begin and ring.has_free:
            slot = ring.take(self._to_begin.popleft())
            self._decoding.append(slot)
            self._tiles.begin(slot)
        return bool(self._decoding)

    def _encode(self, slot: Slot) -> None:
        """Waits for the slot's tiles to be read; then queues all the rest."""
        started, count, device, config = perf_counter(), len(slot.rows), self._device, self._engine.manifest.config
        failures = self._tiles.finish(slot)
        waited_ms = (perf_counter() - started) * 1e3
        slot.to(SlotState.READY)
        device.wait_for("encode", slot.decoded)
        device.normalise(slot.tiles[:count], config["mean"], config["std"], slot.normalised[:count])
        device.encode(self._engine, slot.normalised[:count], slot.features[:count])
        slot.encoded = device.record("encode")
        device.wait_for("copy", slot.encoded)
        device.copy("copy", slot.features[:count], slot.results[:count])
        slot.copied = device.record("copy")
        slot.to(SlotState.ENCODING)
        self._encoding.append((slot, failures, waited_ms))

    def _hand_out(self, ring: TileRing) -> FeatureBatch:
        """Waits for the oldest batch's features, and frees its slot."""
        slot, failures, waited_ms = self._encoding.popleft()
        slot.copied.wait()
        batch = FeatureBatch(slot.rows, slot.results[: len(slot.rows)].numpy().copy(), failures, waited_ms)
        ring.give_back(slot)
        return batch
