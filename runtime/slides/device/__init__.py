"""Tiles of a slide -> features, on a device: decoded, copied and encoded at the same time, in a ring of buffers.

Written for an NVIDIA GPU (`cuda.CudaTileDevice`) and not run on one yet; the tests drive it with a stand-in device.

The order. Every batch passes through three streams, each of which does what it is given in order:

    decode   the slot's tiles: one copy from pinned memory (`sources.HostTiles`), or from cuCIM's buffers
             (`cucim_tiles.CucimTiles`)                                              -> event `decoded`
    encode   waits for `decoded`; normalise (the Triton kernel), the tile encoder, its features into the slot
                                                                                     -> event `encoded`
    copy     waits for `encoded`; the features into pinned memory                    -> event `copied`

The host waits for `copied` before it reads the features, and only then is the slot free to be decoded into again: so
no buffer is written while anything still reads it. Batches are begun, encoded and handed out in grid order. While one
is encoded, the others of the ring are decoded and copied; when no slot is free, decoding waits (`features`).

Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.slides.device.device import DeviceTileEngine, TileDevice
from wsi_rt.runtime.slides.open import GPU_READER

if TYPE_CHECKING:
    from wsi_rt.runtime.slides.device.sources import DeviceTiles
    from wsi_rt.runtime.slides.tiles import TileSource


def on_device(engine: Any) -> bool:
    """Whether a tile encoder takes tiles that lie on a GPU already, and runs on one."""
    return isinstance(engine, DeviceTileEngine) and engine.device.type == "cuda"


def open_device(engine: DeviceTileEngine) -> TileDevice:
    """The device that an `on_device` engine runs on. Raises MachineError."""
    from wsi_rt.runtime.slides.device.cuda import CudaTileDevice

    return CudaTileDevice(engine.device)


def open_tiles(tiles: TileSource, reader: str | None, device: TileDevice, threads: int) -> DeviceTiles:
    """What decodes a slide's tiles for the ring. reader: `--reader`, which alone decides: cuCIM on the GPU where it
    says so, else `threads` threads on the CPU. Raises SlideError for tiles that cuCIM cannot make."""
    if reader == GPU_READER:
        from wsi_rt.runtime.slides.device.cucim_tiles import CucimTiles

        return CucimTiles(tiles, device)
    from wsi_rt.runtime.slides.device.sources import HostTiles

    return HostTiles(tiles, device, threads)


def refuse_gpu_reader(reader: str | None, engine: Any) -> None:
    """Raises InputError where tiles would be decoded on a GPU for a tile encoder that does not run on one."""
    if reader == GPU_READER and not on_device(engine):
        raise InputError(
            f"--reader is {GPU_READER}, which decodes on the GPU, but the tile encoder does not run on one; "
            "leave out --reader, or choose a target that takes tiles on the GPU (--target torch, with a GPU)"
        )
