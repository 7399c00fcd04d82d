"""DICOM whole-slide images, read frame by frame: a folder of one series, or any level of it by name.

Levels, downsamples, resolution and pixels are OpenSlide's for the same files, but for the two wrong declarations of
colour in `dicom_colour.py`, which are seen through and noted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import codecs
from wsi_rt.runtime.slides.codecs import CodecError
from wsi_rt.runtime.slides.open import open_with
from wsi_rt.runtime.slides.reader import Level, SlideReader
from wsi_rt.runtime.slides.readers.dicom_colour import holds_ycc
from wsi_rt.runtime.slides.readers.dicom_frames import FrameError, FrameTable, read_frame, read_table
from wsi_rt.runtime.slides.readers.dicom_header import HeaderError
from wsi_rt.runtime.slides.readers.dicom_instance import JPEG, JPEG2000, MAX_FRAME_PX, NATIVE, Instance
from wsi_rt.runtime.slides.readers.dicom_series import Series, read_series
from wsi_rt.runtime.slides.readers.openslide import load_openslide
from wsi_rt.runtime.slides.readers.tiled import TiledReader, Tiling

VERSION = 1  # counts changes of the pixels that this reader gives
_NEAREST = "regions that begin between px of a level are read from the nearest px"


def open_dicom(path: Path, settings: SlideSettings) -> DicomReader | None:
    """Open a folder of one series or a file of it; None where there is no whole-slide DICOM. Raises SlideError."""
    series = read_series(path)
    return None if series is None else DicomReader(path, settings, series)


@dataclass(frozen=True)
class _Frames:
    """The frames of one open file. note: where the colours it declares are overruled, else empty."""

    fd: int
    table: FrameTable
    codec: str
    ycc: bool
    note: str

    def decode(self, index: int, out: NDArray[np.uint8]) -> None:
        """Frame `index` of the file into `out`, u8 [h, w, 3]. Raises CodecError, OSError."""
        try:
            data = read_frame(self.fd, self.table, index)
        except FrameError as error:
            raise CodecError(f"frame {index}: {error}") from error
        if self.codec == JPEG:
            codecs.decode_jpeg(data, out, rgb=not self.ycc)
        elif self.codec == JPEG2000:
            codecs.decode_jpeg2000(data, out, ycc=self.ycc)
        else:
            codecs.decode_raw(data, out)


def _open_frames(instance: Instance) -> _Frames:
    """Raises SlideError."""
    try:
        fd = os.open(instance.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise SlideError(
            f"{instance.path}: cannot be read ({error.strerror}), expected a readable slide file"
        ) from error
    try:
        table = read_table(fd, instance)
        try:
            first = b"" if instance.codec == NATIVE else read_frame(fd, table, 0)
        except FrameError:
            first = b""  # a bad frame is an error of its own place, not of the slide
    except (HeaderError, OSError) as error:
        os.close(fd)
        raise SlideError(
            f"{instance.path}: its frames cannot be found ({error}), expected an intact file; download it again"
        ) from error
    ycc, note = holds_ycc(instance.codec, instance.photometric, first)
    return _Frames(fd, table, instance.codec, ycc, note)


def _libraries(series: Series, levels: tuple[Level, ...]) -> str:
    """What makes the pixels besides this reader: the codecs, and OpenSlide where tiles may begin between px."""
    codec_of = {JPEG: "simplejpeg", JPEG2000: "imagecodecs"}
    used = {codec_of[part.codec] for level in series.levels for part in level.parts if part.codec in codec_of}
    names = [codecs.library(name) for name in sorted(used)]
    if any(not level.downsample.is_integer() for level in levels):
        names.append(f"openslide {load_openslide().__library_version__}")
    return f" ({', '.join(names)})" if names else ""


def _level(finest: Instance, instance: Instance) -> Level:
    (width0, height0), (width, height) = finest.size, instance.size
    return Level(width, height, (height0 / height + width0 / width) / 2)  # OpenSlide's rule


class DicomReader(TiledReader):
    """An open series. Reads are positioned (pread), so threads share the file descriptors."""

    def __init__(self, path: Path, settings: SlideSettings, series: Series) -> None:
        """Opens the files of the levels. Raises SlideError: a file that cannot be read, unknown resolution."""
        self._series = series
        self._whole: SlideReader | None = None
        self._ours_alone = False
        self._frames: list[list[_Frames]] = []  # of each part of each level
        try:
            for level in series.levels:
                self._frames.append([])
                for part in level.parts:
                    self._frames[-1].append(_open_frames(part))
            finest = series.levels[0].parts[0]
            levels = tuple(_level(finest, level.parts[0]) for level in series.levels)
            super().__init__(
                path,
                settings,
                name=f"dicom {VERSION}{_libraries(series, levels)}",
                levels=levels,
                tilings=tuple(Tiling(*level.parts[0].tile, *level.parts[0].grid) for level in series.levels),
                declared_mpp=finest.declared_mpp,
                icc=finest.icc,
                associated={name: instance.size for name, instance in series.associated.items()},
                files=series.files,
            )
        except BaseException:
            self._close()
            raise
        self._settings = settings
        seen = dict.fromkeys(frames.note for parts in self._frames for frames in parts if frames.note)
        self._ours_alone = bool(seen)
        self.notes += (*series.notes, *seen)

    def _decode(self, level: int, col: int, row: int, out: NDArray[np.uint8]) -> bool:
        """Decode the frame at a place into `out`, u8 [h, w, 3]; False where a sparse level has none."""
        place = self._series.levels[level].find(col, row)
        if place is None:
            return False
        part, index = place
        self._frames[level][part].decode(index, out)
        return True

    def _read_otherwise(
        self, xy0: tuple[int, int], level: int, size: tuple[int, int], error: Exception | None
    ) -> NDArray[np.uint8]:
        """By OpenSlide, where it reads the slide as we do; else the nearest px (noted), or the error."""
        whole = self._open_whole()
        if whole is not None:
            return whole.read_region(xy0, level, size)
        place = self.levels[level]
        x, y = (round(v / place.downsample) for v in xy0)
        try:
            decode = partial(self._decode, level)
            out = _paint(decode, self.tilings[level], (place.width, place.height), (x, y), size)
        except (CodecError, OSError) as failed:
            raise SlideError(
                f"{self.path}: {size[0]} x {size[1]} px at level {level}, level-0 position {xy0} cannot be read "
                f"({failed}), expected an intact slide; download it again"
            ) from failed
        if error is None and _NEAREST not in self.notes:
            self.notes += (_NEAREST,)
        return out

    def _open_whole(self) -> SlideReader | None:
        """The slide opened by OpenSlide, once; None where it cannot, or shows other colours."""
        with self._lock:
            if self._whole is None and not self._ours_alone:
                settings = replace(self._settings, mpp=self.mpp0)
                try:
                    self._whole = open_with("openslide", self._series.levels[0].parts[0].path, settings)
                except SlideError:
                    self._whole = None
                same = self._whole is not None and self._whole.levels == self.levels
                self._ours_alone = not same
            return None if self._ours_alone else self._whole

    def _read_associated(self, name: str) -> NDArray[np.uint8]:
        instance = self._series.associated[name]
        (cols, rows), (w, h) = instance.grid, instance.tile
        if cols * rows != instance.frames or cols * rows * w * h > MAX_FRAME_PX:
            raise SlideError(
                f"{instance.path}: its {name} image has {instance.frames} frames of {w} x {h} px, expected "
                f"{cols} x {rows} of them, together at most {MAX_FRAME_PX} px"
            )
        frames = _open_frames(instance)

        def decode(col: int, row: int, out: NDArray[np.uint8]) -> bool:
            frames.decode(row * cols + col, out)
            return True

        try:
            return _paint(decode, Tiling(w, h, cols, rows), instance.size, (0, 0), instance.size)
        except (CodecError, OSError) as error:
            raise SlideError(f"{instance.path}: its {name} image cannot be read ({error})") from error
        finally:
            os.close(frames.fd)

    def _close(self) -> None:
        for parts in self._frames:
            for frames in parts:
                os.close(frames.fd)
        self._frames = []
        if self._whole is not None:
            self._whole.close()


def _paint(
    decode: Callable[[int, int, NDArray[np.uint8]], bool],
    tiling: Tiling,
    edge: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
) -> NDArray[np.uint8]:
    """The region of `size` at px `corner` of an image of `edge` px, u8 [h, w, 3], white outside; frames one by one.

    decode: (column, row, u8 [tile_h, tile_w, 3]) -> False where there is no frame.
    """
    out = np.full((size[1], size[0], 3), 255, np.uint8)
    frame = np.empty((tiling.tile_h, tiling.tile_w, 3), np.uint8)
    left, top = (max(v, 0) for v in corner)
    right, bottom = (min(v + n, end) for v, n, end in zip(corner, size, edge, strict=True))
    for row in range(top // tiling.tile_h, -(-bottom // tiling.tile_h) if left < right else 0):
        y, y0, y1 = row * tiling.tile_h, max(top, row * tiling.tile_h), min(bottom, (row + 1) * tiling.tile_h)
        for col in range(left // tiling.tile_w, -(-right // tiling.tile_w)):
            x, x0, x1 = col * tiling.tile_w, max(left, col * tiling.tile_w), min(right, (col + 1) * tiling.tile_w)
            if decode(col, row, frame):
                target = out[y0 - corner[1] : y1 - corner[1], x0 - corner[0] : x1 - corner[0]]
                target[:] = frame[y0 - y : y1 - y, x0 - x : x1 - x]
    return out
