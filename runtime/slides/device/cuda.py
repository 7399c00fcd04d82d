"""The ring's device on an NVIDIA GPU, through torch.cuda. Not run on one yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from wsi_rt.runtime.errors import MachineError
from wsi_rt.runtime.slides.device.device import STREAMS, DeviceTileEngine, Event, Stream, TileDevice
from wsi_rt.runtime.slides.device.resample import Resampling, take_tiles
from wsi_rt.runtime.types import TILE_PX

if TYPE_CHECKING:
    from torch import Tensor


class CudaTileDevice(TileDevice):
    """Three streams of torch's beside the default one, which they do not wait for unless told.

    Memory comes from torch's allocators, and goes back to them (for the next slide), not to the driver.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises MachineError when torch has no such GPU."""
        if not torch.cuda.is_available():
            raise MachineError("torch finds no NVIDIA GPU, expected one; run doctor: wsi-rt doctor")
        self._device = device
        self.name = f"{device} ({torch.cuda.get_device_name(device)})"
        self._streams = {name: torch.cuda.Stream(device) for name in STREAMS}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            memory = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        except torch.OutOfMemoryError as error:
            raise _no_room("GPU", shape, dtype) from error
        # The allocator gives what the current stream let go of: that stream may still be using it.
        for stream in self._streams.values():
            stream.wait_stream(torch.cuda.current_stream(self._device))
        return memory

    def empty_pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            raise _no_room("pinned host", shape, dtype) from error

    def copy(self, stream: Stream, source: Tensor, out: Tensor) -> None:
        with torch.cuda.stream(self._streams[stream]):
            out.copy_(source, non_blocking=True)

    def take(self, batch: Any, out: Tensor, how: Resampling | None) -> None:
        if not hasattr(batch, "__cuda_array_interface__"):  # cuCIM decodes on the CPU where it finds no GPU
            raise MachineError("cuCIM decoded on the CPU, expected on the GPU; run doctor: wsi-rt doctor")
        decode = self._streams["decode"]
        # Its last copies into the batch are queued on the legacy default stream: "stream": 1 in that interface.
        decode.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(decode):
            take_tiles(torch.as_tensor(batch, device=self._device), out, how)  # as_tensor copies nothing

    def normalise(self, tiles: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
        with torch.cuda.stream(self._streams["encode"]):
            normalise_into(tiles, mean, std, out)

    def encode(self, engine: DeviceTileEngine, batch: Tensor, out: Tensor) -> None:
        with torch.cuda.stream(self._streams["encode"]), torch.no_grad():
            out.copy_(engine.run_device(batch), non_blocking=True)

    def record(self, stream: Stream) -> Event:
        event = torch.cuda.Event(blocking=True)  # a host that waits leaves its core to the threads that decode
        event.record(self._streams[stream])
        return _CudaEvent(event)

    def wait_for(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, _CudaEvent)  # made by `record`
        self._streams[stream].wait_event(event.event)

    def synchronize(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        self._streams.clear()


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


def normalise_into(tiles: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    """The kernel of `kernels.tile_normalize`, into memory that is there: u8 [b, 256, 256, 3] -> [b, 3, px, px]."""
    import triton

    from wsi_rt.kernels.checks import shipped_sm
    from wsi_rt.kernels.tile_normalize.triton import launch_options, tile_normalize_kernel

    constexprs, options = launch_options(shipped_sm(tiles), mean, std, TILE_PX, out.shape[-1], hwc=True)
    grid = (len(tiles), triton.cdiv(out.shape[-1] ** 2, constexprs["BLOCK"]))
    tile_normalize_kernel[grid](tiles, out, **constexprs, **options)


def _no_room(kind: str, shape: Sequence[int], dtype: torch.dtype) -> MachineError:
    mib = torch.Size(shape).numel() * dtype.itemsize / (1 << 20)
    return MachineError(
        f"{mib:.0f} MiB of {kind} memory for a batch of tiles cannot be had, expected enough for the ring's; "
        "end other programs that hold it"
    )
