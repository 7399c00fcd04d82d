"""What the ring needs of a device, and of a tile encoder that runs on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wsi_rt.runtime.manifest import EngineManifest
    from wsi_rt.runtime.slides.device.resample import Resampling

Stream = Literal["decode", "encode", "copy"]
STREAMS: tuple[Stream, ...] = ("decode", "encode", "copy")


@runtime_checkable
class DeviceTileEngine(Protocol):
    """A tile encoder that takes tiles on its device. dtype: of the normalised tiles."""

    manifest: EngineManifest
    precision: str

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def prepare_device(self, rows: Sequence[int]) -> None:
        """Compile and capture what batches of these sizes need, and wait for it: called before any other thread uses
        the device, since work of theirs would end up in, or break, a CUDA graph that is being captured."""

    def run_device(self, batch: Tensor) -> Tensor:
        """[b, 3, image_px, image_px] normalised, in `dtype` -> features [b, C] on the device: queued on the current
        stream, nothing waits. They may be the engine's own memory, whole until its next call."""


class Event(Protocol):
    """A place in a stream: everything queued before it."""

    def done(self) -> bool: ...

    def wait(self) -> None:
        """The calling thread waits until it is done. Raises what the device failed with."""


class TileDevice(ABC):
    """Memory, three streams, and the operations that are queued on them. May be called from several threads.

    A stream does its operations in order, while the host goes on; streams wait for each other only by events. Arrays
    are torch tensors, contiguous, and must live until what is queued on them is done. name: as provenance tells it.
    """

    name: str

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the device, not initialised. Raises MachineError when there is not enough."""

    @abstractmethod
    def empty_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory that copies need not wait for, not initialised. Raises MachineError."""

    @abstractmethod
    def copy(self, stream: Stream, source: Tensor, out: Tensor) -> None:
        """Between the device and the host, either way."""

    @abstractmethod
    def take(self, batch: Any, out: Tensor, how: Resampling | None) -> None:
        """Stream "decode": the first b tiles of a batch of cuCIM's, which `CucimReader.batches` gives, after what cuCIM
        itself queued for it; resampled where `how` is given. The batch must live until that is done."""

    @abstractmethod
    def normalise(self, tiles: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
        """Stream "encode": u8 [b, 256, 256, 3] -> centre crop, /255, (x - mean) / std -> [b, 3, px, px] of `out`."""

    @abstractmethod
    def encode(self, engine: DeviceTileEngine, batch: Tensor, out: Tensor) -> None:
        """Stream "encode": the engine's features, as f32 [b, C]."""

    @abstractmethod
    def record(self, stream: Stream) -> Event:
        """What is queued on the stream so far."""

    @abstractmethod
    def wait_for(self, stream: Stream, event: Event) -> None:
        """What is queued on the stream from here on begins after the event."""

    @abstractmethod
    def synchronize(self) -> None:
        """The host waits for all streams. Raises what the device failed with."""

    @abstractmethod
    def close(self) -> None:
        """Give the streams back; nothing may be queued."""

    def __enter__(self) -> TileDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
