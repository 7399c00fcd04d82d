"""SVS and generic pyramidal TIFF, read directly: `pread` and one codec call per stored tile.

Levels, resolution and associated images are those that OpenSlide states (`tiff_facts.py`), so that they are the same
with either reader. OpenSlide reads what the direct path does not, in a process of its own that is started when it is
first needed: regions that begin between px of a level (which it interpolates), tiles that a strict decoder rejects,
levels that Aperio left holes in, associated images; and every slide that is not plain.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import codecs
from wsi_rt.runtime.slides.codecs import CodecError
from wsi_rt.runtime.slides.open import open_with
from wsi_rt.runtime.slides.reader import SlideReader
from wsi_rt.runtime.slides.readers.openslide import load_openslide
from wsi_rt.runtime.slides.readers.tiff_facts import VENDORS, NotDirectError, TiffFacts, facts_of
from wsi_rt.runtime.slides.readers.tiff_index import TiffError, TiffFile, TiffLevel
from wsi_rt.runtime.slides.readers.tiled import ReadElsewhereError, TiledReader, Tiling

VERSION = 1  # counts changes of the pixels that this reader gives
_RGB, _YCBCR = 2, 6
_NONE, _LZW, _JPEG, _DEFLATE, _OLD_DEFLATE, _J2K_YCC, _J2K_RGB = 1, 5, 7, 8, 32946, 33003, 33005

Decode = Callable[[bytes, NDArray[np.uint8]], None]


def open_tiff(path: Path, settings: SlideSettings) -> SlideReader | None:
    """Open `path` directly, or with OpenSlide where it knows the file but the direct path does not take it.

    None when OpenSlide does not know it, or leaves it to another reader (not a TIFF). Raises SlideError (also when
    `settings.reader` pins this one and the file is not for it), MachineError.
    """
    pinned = settings.reader is not None
    vendor = load_openslide().OpenSlide.detect_format(path)
    if vendor not in VENDORS:
        if pinned and vendor is not None:
            raise _not_for_us(path, f"it is a {vendor} file")
        return None
    try:
        return _open_directly(path, vendor, settings)
    except (NotDirectError, TiffError) as reason:
        whole = open_with("openslide", path, settings)
        if whole is None or not pinned:
            return whole
        whole.close()
        raise _not_for_us(path, str(reason)) from reason
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}), expected a readable slide file") from error


def _not_for_us(path: Path, reason: str) -> SlideError:
    return SlideError(
        f"{path}: not for the reader tiff, which reads Aperio's and generic tiled 8-bit RGB TIFF: {reason}; "
        "leave out --reader"
    )


def _open_directly(path: Path, vendor: str, settings: SlideSettings) -> TiffReader:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        file = TiffFile(descriptor)
        reader = TiffReader(path, vendor, settings, descriptor, file, facts_of(file.images(), vendor))
        reader.probe()
    except BaseException:
        os.close(descriptor)
        raise
    return reader


def _decoder(level: TiffLevel) -> tuple[Decode, str]:
    """How to decode a level's tiles, and with which library."""
    if level.compression == _JPEG and level.photometric in (_RGB, _YCBCR):
        rgb = level.photometric == _RGB
        return partial(codecs.decode_jpeg, tables=level.tables, rgb=rgb), "simplejpeg"
    if level.compression in (_J2K_YCC, _J2K_RGB):
        return partial(codecs.decode_jpeg2000, ycc=level.compression == _J2K_YCC), "imagecodecs"
    plain: dict[int, Callable[..., None]] = {
        _NONE: codecs.decode_raw,
        _LZW: codecs.decode_lzw,
        _DEFLATE: codecs.decode_deflate,
        _OLD_DEFLATE: codecs.decode_deflate,
    }
    if level.compression in plain and level.photometric == _RGB and level.predictor in (1, 2):
        return partial(plain[level.compression], predictor=level.predictor), "imagecodecs"
    raise NotDirectError(
        f"a level has compression {level.compression}, photometric {level.photometric}, predictor {level.predictor}"
    )


class TiffReader(TiledReader):
    """A slide whose every level is one tiled 8-bit RGB directory."""

    def __init__(
        self, path: Path, vendor: str, settings: SlideSettings, descriptor: int, file: TiffFile, facts: TiffFacts
    ) -> None:
        decoders = [_decoder(level) for level in facts.stored]
        libraries = sorted({codecs.library(name) for _, name in decoders})
        super().__init__(
            path,
            settings,
            name=f"tiff {VERSION} ({', '.join(libraries)}, openslide {load_openslide().__library_version__})",
            tilings=tuple(Tiling(v.tile_w, v.tile_h, v.cols, v.rows) for v in facts.stored),
            levels=facts.levels,
            declared_mpp=facts.declared_mpp,
            icc=facts.icc,
            associated=facts.associated,
        )
        self._settings = settings
        self._whole: SlideReader | SlideError | None = None
        self._descriptor = descriptor
        self._file = file
        self._stored = facts.stored
        self._decoders = [decode for decode, _ in decoders]
        holed = [bool((level.counts == 0).any()) for level in facts.stored]
        # Where Aperio's scanner left a tile out, OpenSlide renders the coarser levels from the finer ones.
        self._rendered_from = max(1, holed.index(True)) if vendor == "aperio" and any(holed) else len(self.levels)

    def probe(self) -> None:
        """Decode the first tile of every level. Raises NotDirectError: no tile of such a level would be for us.

        Also for a file that ends before its coarsest level does: OpenSlide hashes that level, and refuses the slide.
        """
        if not self._file.holds(self._stored[-1]):
            raise NotDirectError("the file ends before its coarsest level does")
        for number, level in enumerate(self._stored):
            present = np.flatnonzero(level.counts)
            if len(present):
                row, col = divmod(int(present[0]), level.cols)
                try:
                    self._decode(number, col, row, np.empty((level.tile_h, level.tile_w, 3), np.uint8))
                except ReadElsewhereError:
                    continue
                except (CodecError, OSError) as error:
                    raise NotDirectError(f"level {number}, first tile: {error}") from error

    def _decode(self, level: int, col: int, row: int, out: NDArray[np.uint8]) -> bool:
        stored = self._stored[level]
        number = row * stored.cols + col
        count = int(stored.counts[number])
        if level >= self._rendered_from:
            raise ReadElsewhereError("above a level with holes")
        if not count:
            return False
        if count > 2 * out.nbytes + codecs.MAX_HEADER_BYTES:
            raise CodecError(f"{count} bytes for a tile of {out.nbytes}")
        try:
            data = self._file.read(int(stored.offsets[number]), count)
        except TiffError as error:
            raise CodecError(str(error)) from error
        self._decoders[level](data, out)
        return True

    def _read_otherwise(
        self, xy0: tuple[int, int], level: int, size: tuple[int, int], error: Exception | None
    ) -> NDArray[np.uint8]:
        try:
            whole = self._open_whole()
        except SlideError as failed:
            raise SlideError(
                f"{self.path}: {size[0]} x {size[1]} px at level {level}, level-0 position {xy0} cannot be read "
                f"({error or failed}), expected an intact slide; download it again"
            ) from failed
        return whole.read_region(xy0, level, size)

    def _open_whole(self) -> SlideReader:
        """The slide opened by OpenSlide, once. Raises SlideError, again each time, where it cannot or differs."""
        with self._lock:
            if self._whole is None:
                try:
                    self._whole = self._open_alike()
                except SlideError as error:
                    self._whole = error
            if isinstance(self._whole, SlideError):
                raise self._whole
            return self._whole

    def _open_alike(self) -> SlideReader:
        whole = open_with("openslide", self.path, replace(self._settings, mpp=self.mpp0))
        if whole is None or whole.levels != self.levels:
            if whole is not None:
                whole.close()
            raise SlideError(f"{self.path}: OpenSlide sees other levels than {len(self.levels)} of {self.size0}")
        return whole

    def _read_associated(self, name: str) -> NDArray[np.uint8]:
        whole = self._open_whole()
        if whole.associated.get(name) != self.associated[name]:
            raise SlideError(f"{self.path}: its {name} image cannot be read by OpenSlide, expected an intact slide")
        return whole.read_associated(name)

    def _close(self) -> None:
        os.close(self._descriptor)
        self._cache.clear()
        if isinstance(self._whole, SlideReader):
            self._whole.close()
