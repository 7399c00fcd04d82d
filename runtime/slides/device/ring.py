"""The ring: N slots of device memory, each free, decoding, ready, encoding, and free again."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from wsi_rt.runtime.slides.device.device import Event, TileDevice
from wsi_rt.runtime.types import TILE_PX

if TYPE_CHECKING:
    from torch import Tensor

SLOTS = 3  # one encoded, one decoded, and one whose features are on their way back


class SlotState(Enum):
    FREE = "free"
    DECODING = "decoding"  # being read and copied to the device
    READY = "ready"  # its tiles are queued on the decode stream: `decoded` is recorded
    ENCODING = "encoding"  # queued on the encode and copy streams: `encoded` and `copied` are recorded


_NEXT = {
    SlotState.FREE: SlotState.DECODING,
    SlotState.DECODING: SlotState.READY,
    SlotState.READY: SlotState.ENCODING,
    SlotState.ENCODING: SlotState.FREE,
}


@dataclass(frozen=True)
class RingShape:
    """What a ring holds. batch: tiles of a slot. image_px: edge after the crop. width: C. dtype: of normalised tiles.
    pinned: tiles are decoded on the host, into pinned memory."""

    slots: int
    batch: int
    image_px: int
    width: int
    dtype: torch.dtype
    pinned: bool

    def __post_init__(self) -> None:
        if self.slots < 1 or self.batch < 1:
            raise ValueError(f"slots is {self.slots} and batch is {self.batch}, expected 1 or more")

    @property
    def tiles(self) -> tuple[int, ...]:
        return (self.batch, TILE_PX, TILE_PX, 3)

    @property
    def normalised(self) -> tuple[int, ...]:
        return (self.batch, 3, self.image_px, self.image_px)

    @property
    def features(self) -> tuple[int, ...]:
        return (self.batch, self.width)

    def device_bytes(self) -> int:
        """Of all slots: tiles (192 KiB each), normalised tiles (294 KiB in 16 bits at 224 px), features."""
        normalised = math.prod(self.normalised) * self.dtype.itemsize
        return self.slots * (math.prod(self.tiles) + normalised + 4 * math.prod(self.features))

    def pinned_bytes(self) -> int:
        """Of all slots: features, and tiles where they are decoded on the host."""
        return self.slots * (4 * math.prod(self.features) + (math.prod(self.tiles) if self.pinned else 0))


class Slot:
    """One batch's memory and where it stands. rows: of the grid, no more than the ring's batch.

    tiles: u8 [B, 256, 256, 3]; normalised: [B, 3, px, px]; features: f32 [B, C], all on the device. results: f32 [B, C]
    and pinned: u8 [B, 256, 256, 3] (None where tiles are decoded on the device), on the host.
    """

    decoded: Event
    encoded: Event
    copied: Event

    def __init__(self, number: int, shape: RingShape, device: TileDevice) -> None:
        self.number, self.state, self.rows = number, SlotState.FREE, range(0)
        self.tiles: Tensor = device.empty(shape.tiles, torch.uint8)
        self.normalised: Tensor = device.empty(shape.normalised, shape.dtype)
        self.features: Tensor = device.empty(shape.features, torch.float32)
        self.results: Tensor = device.empty_pinned(shape.features, torch.float32)
        self.pinned: Tensor | None = device.empty_pinned(shape.tiles, torch.uint8) if shape.pinned else None

    def to(self, state: SlotState) -> None:
        """Raises RuntimeError for a step that is not the next one."""
        if _NEXT[self.state] is not state:
            raise RuntimeError(f"slot {self.number} is {self.state.value}, which {state.value} does not follow")
        self.state = state

    def drop(self) -> None:
        """Lets go of the memory, whoever still holds the slot: the traceback of what ended the run does."""
        del self.tiles, self.normalised, self.features, self.results, self.pinned


class TileRing:
    """The slots. The one that has been free for longest is taken next."""

    def __init__(self, shape: RingShape, device: TileDevice) -> None:
        """Raises MachineError when there is not enough memory."""
        self.slots = tuple(Slot(number, shape, device) for number in range(shape.slots))
        self._free = deque(self.slots)

    def take(self, rows: range) -> Slot:
        """A free slot for these rows, DECODING. Raises IndexError when none is free."""
        slot = self._free.popleft()
        slot.rows = rows
        slot.to(SlotState.DECODING)
        return slot

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def give_back(self, slot: Slot) -> None:
        """Its events are over: nothing reads or writes it any more."""
        slot.to(SlotState.FREE)
        self._free.append(slot)

    def drop(self) -> None:
        """Lets go of all memory. Nothing may be queued on it."""
        for slot in self.slots:
            slot.drop()
        self.slots = ()
        self._free.clear()
