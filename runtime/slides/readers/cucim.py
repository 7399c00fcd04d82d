"""SVS and tiled TIFF through cuCIM (https://github.com/rapidsai/cucim): optional, only where `--reader cucim` asks
(`--reader cucim-cuda`: decoded on an NVIDIA GPU).

On the CPU it decodes baseline JPEG, Aperio's JPEG 2000, LZW, deflate and uncompressed tiles to OpenSlide's pixels; on
a GPU nvJPEG decodes JPEG (written after cuCIM's documentation, not run on a GPU yet). Seen with cuCIM 26.10: it
crashes the process on a predictor, cannot read generic JPEG 2000, pads black outside the slide, and its batches
share buffers. So what it does not read is refused before it sees the file, regions are cut to the slide, and pixels
are copied at once.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import MachineError, SlideError
from wsi_rt.runtime.slides.reader import Level, SlideReader
from wsi_rt.runtime.slides.readers.openslide import OpenSlideReader, open_with_openslide
from wsi_rt.runtime.slides.readers.tiff_index import TiffError, TiffFile
from wsi_rt.runtime.slides.readers.tiled import level_px

VERSION = 1  # counts changes of the pixels that this reader gives
DEVICES = ("cpu", "cuda")
VENDORS = ("aperio", "generic-tiff")
# TIFF compression -> name. Aperio's 33003 (JPEG 2000 in YCbCr) comes out one grey level off.
_COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 33005: "JPEG 2000"}
_GPU_COMPRESSION = 7
_LENIENT = "cuCIM decodes damaged JPEG tiles without an error; the other readers do not"
# Its plugin cuslide2 counts them on stderr and hands out memory as it was: nvimgcodec_processor.cpp, wait_batch.
_LENIENT_ON_GPU = "on a GPU cuCIM may tell of a tile that it cannot decode on stderr only; the tile is then noise"
_LOADERS = 1  # cuCIM threads per batch; our own threads read several batches at once


def open_with_cucim(path: Path, settings: SlideSettings, device: str = "cpu") -> CucimReader:
    """Open `path`; device: cpu, or cuda for decoding on the GPU (pixels are copied back to the host).

    Raises SlideError: not a slide cuCIM reads right, with the reason. MachineError: cuCIM, cupy or a GPU is missing.
    """
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}, expected {' or '.join(DEVICES)}")
    cucim = _load_cucim()
    whole = open_with_openslide(path, settings)
    if whole is None:
        raise _not_for_us(path, "OpenSlide does not know it")
    try:
        _require_plain(whole, device)
        return CucimReader(whole, settings, cucim, device)
    except BaseException:
        whole.close()
        raise


def open_with_cucim_on_gpu(path: Path, settings: SlideSettings) -> CucimReader:
    """`open_with_cucim` on the GPU, in this process: what is decoded there stays there for the tile encoder."""
    return open_with_cucim(path, settings, device="cuda")


def _load_cucim() -> ModuleType:
    try:
        cucim = import_module("cucim")
        _ = cucim.CuImage  # absent where the native half cannot be loaded
    except (ImportError, OSError, AttributeError) as error:
        raise MachineError(
            "cuCIM is not installed, expected for --reader cucim; run: "
            "pip install --no-deps cucim-cu12 click lazy-loader"
        ) from error
    return cucim


def _load_cupy() -> Any:
    try:
        import cupy
    except (ImportError, OSError) as error:
        raise MachineError(
            "cupy is not installed, expected to take cuCIM's pixels from the GPU; run: pip install cupy-cuda12x"
        ) from error
    if not cupy.cuda.is_available():  # cuCIM would decode on the CPU then, and not say so
        raise MachineError("cupy finds no NVIDIA GPU, expected one for cuCIM to decode on; give --reader cucim")
    return cupy


def _not_for_us(path: Path, reason: str) -> SlideError:
    return SlideError(f"{path}: not for the reader cucim: {reason}; leave out --reader")


def _require_plain(whole: OpenSlideReader, device: str) -> None:
    """Refuse what cuCIM reads wrongly or dies of. Every tiled directory counts: it looks at them all on opening."""
    vendor = whole.properties.get("openslide.vendor", "")
    if vendor not in VENDORS:
        raise _not_for_us(whole.path, f"it is a {vendor} file, expected Aperio's or generic tiled TIFF")
    descriptor = os.open(whole.path, os.O_RDONLY)
    try:
        directories = TiffFile(descriptor).levels()
    except (TiffError, OSError) as error:
        raise _not_for_us(whole.path, str(error)) from error
    finally:
        os.close(descriptor)
    tiled = [directory for directory in directories if directory is not None]
    if len(tiled) < len(whole.levels):
        raise _not_for_us(whole.path, "not all of its levels are tiled 8-bit RGB")
    for directory in tiled:
        if directory.compression not in _COMPRESSIONS or directory.predictor != 1:
            raise _not_for_us(
                whole.path, f"a level has compression {directory.compression}, predictor {directory.predictor}"
            )
        if device == "cuda" and directory.compression != _GPU_COMPRESSION:
            raise _not_for_us(whole.path, f"{_COMPRESSIONS[directory.compression]} is not decoded on a GPU, only JPEG")
        if not directory.counts.all():
            raise _not_for_us(whole.path, "it leaves out tiles, which cuCIM paints black")


class CucimReader(SlideReader):
    """A slide whose pixels cuCIM decodes; what it is (levels, resolution, associated images) OpenSlide says.

    Regions that begin between px of a level are OpenSlide's, which interpolates them. device: cpu or cuda.
    """

    def __init__(self, whole: OpenSlideReader, settings: SlideSettings, cucim: ModuleType, device: str) -> None:
        """Takes over `whole`. Raises SlideError: cuCIM cannot open the file, or sees other levels."""
        super().__init__(
            whole.path,
            settings,
            name=f"cucim {VERSION} ({device}, cucim {cucim.__version__}, {whole.name})",
            levels=whole.levels,
            declared_mpp=whole.declared_mpp,
            background=whole.background,
            icc=whole.icc,
            associated=whole.associated,
            bounds0=whole.ref.bounds0,
        )
        self.notes += (_LENIENT, _LENIENT_ON_GPU) if device == "cuda" else (_LENIENT,)
        self.device = device
        self._whole = whole
        self._cucim = cucim
        self._cupy = _load_cupy() if device == "cuda" else None
        try:
            self._image = cucim.CuImage(str(whole.path))
            sizes = [tuple(size) for size in self._image.resolutions["level_dimensions"]]
        except RuntimeError as error:
            raise _not_for_us(whole.path, _one_line(error)) from error
        if sizes != [(level.width, level.height) for level in self.levels]:
            raise _not_for_us(whole.path, f"cuCIM sees levels of {sizes} px, OpenSlide others")

    def level_px(
        self, xy0s: NDArray[np.int64], level: int, size: tuple[int, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """int64 [B, 2] px of the level at which regions start, and bool [B]: they start there exactly."""
        return level_px(xy0s, self.levels[level], size)

    def batches(
        self, corners: NDArray[np.int64], level: int, size: tuple[int, int], batch_size: int
    ) -> Generator[Any, None, None]:
        """cuCIM's own batches, u8 [batch_size or less, h, w, 3] ([h, w, 3] in batches of one) on `device`, of regions
        inside the slide from level px `corners` [B, 2]; each is good until the next is asked for. Decoded ahead, by a
        decoder of this iterator's own: for one thread.

        Raises SlideError, which ends it and does not tell which region it was.
        """
        places = [_level0((int(x), int(y)), self.levels[level]) for x, y in corners]
        try:
            image = self._cucim.CuImage(str(self.path))
            try:
                found = image.read_region(
                    places, size, level, batch_size=batch_size, num_workers=_LOADERS, device=self.device
                )
                # One region in a batch of one comes as an image, not as an iterator.
                yield from [found] if len(places) == batch_size == 1 else found
            finally:
                image.close()
        except RuntimeError as error:
            raise SlideError(
                f"{self.path}: {len(places)} regions of level {level} from level-0 position {places[0]} on cannot be "
                f"read ({_one_line(error)}), expected an intact slide; leave out --reader"
            ) from error

    def _read(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        corners, exact = level_px(np.array([xy0], np.int64), self.levels[level], size)
        if not exact[0]:
            return self._whole.read_region(xy0, level, size)
        x, y = (int(v) for v in corners[0])
        edge = self.levels[level]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + size[0], edge.width), min(y + size[1], edge.height)
        if (left, top, right, bottom) == (x, y, x + size[0], y + size[1]):
            return self._decode([(x, y)], level, size)[0]
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        if left < right and top < bottom:
            inside = self._decode([(left, top)], level, (right - left, bottom - top))[0]
            out[top - y : bottom - y, left - x : right - x] = inside
        return out

    def _read_tiles(
        self, xy0s: NDArray[np.int64], level: int, size: tuple[int, int], out: NDArray[np.uint8]
    ) -> list[tuple[int, SlideError]]:
        """On a GPU one batch for the regions that lie inside the slide; the others, and a failed batch, one by one."""
        if self.device == "cpu":
            return super()._read_tiles(xy0s, level, size, out)
        corners, exact = level_px(xy0s, self.levels[level], size)
        edge = (self.levels[level].width, self.levels[level].height)
        inside = exact & (corners >= 0).all(axis=1) & (corners + size <= edge).all(axis=1)
        try:
            if inside.any():
                out[inside] = self._decode(corners[inside].tolist(), level, size)
        except SlideError:
            inside[:] = False  # the batch does not say which region failed
        rest = np.flatnonzero(~inside)
        failures = []
        for row in rest.tolist():
            try:
                out[row] = self._read((int(xy0s[row, 0]), int(xy0s[row, 1])), level, size)
            except SlideError as error:
                out[row] = 255
                failures.append((row, error))
        return failures

    def _decode(self, corners: list[tuple[int, int]], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Regions inside the slide, u8 [B, h, w, 3], from level px `corners`. Raises SlideError."""
        places = [_level0(corner, self.levels[level]) for corner in corners]
        try:
            if len(places) == 1:  # without cuCIM's thread pool
                batches = [self._image.read_region(places[0], size, level, device=self.device)]
            else:
                batches = self._image.read_region(
                    places, size, level, batch_size=len(places), num_workers=_LOADERS, device=self.device
                )
            pixels = [self._to_host(batch).reshape(-1, size[1], size[0], 3) for batch in batches]
        except RuntimeError as error:
            raise SlideError(
                f"{self.path}: {size[0]} x {size[1]} px at level {level}, level-0 position {places[0]} cannot be read "
                f"({_one_line(error)}), expected an intact slide; leave out --reader"
            ) from error
        return pixels[0] if len(pixels) == 1 else np.concatenate(pixels)

    def _to_host(self, batch: Any) -> NDArray[np.uint8]:
        """A copy: cuCIM reuses the batch's buffer."""
        if self._cupy is not None:
            return np.asarray(self._cupy.asnumpy(self._cupy.asarray(batch)))
        return np.array(batch)

    def _read_associated(self, name: str) -> NDArray[np.uint8]:
        return self._whole.read_associated(name)

    def _close(self) -> None:
        self._image.close()
        self._whole.close()


def _level0(corner: tuple[int, int], level: Level) -> tuple[int, int]:
    """The level-0 place for a level px: cuCIM divides by its downsample (float32) and cuts, so the middle is safe."""
    if level.downsample == 1:
        return corner
    x, y = (round((v + 0.5) * level.downsample) for v in corner)
    return x, y


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
