"""The codec alone: each stored segment under the tiles is read and decoded once into one buffer, nothing else.

No reader that decodes with the same libraries is faster. JPEG through simplejpeg (libjpeg-turbo), JPEG 2000 through
imagecodecs (OpenJPEG); segments by `pread`; the index comes from tifffile or pydicom, before the clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from wsi_rt.benchmarks.tiles.work import Work
from wsi_rt.runtime.errors import SlideError

if TYPE_CHECKING:
    import tifffile

BATCH = 64
JPEG, J2K = "jpeg", "jpeg2000"
_TIFF_CODECS = {7: JPEG, 33003: J2K, 33005: J2K}
_DICOM_CODECS = {"1.2.840.10008.1.2.4.50": JPEG, "1.2.840.10008.1.2.4.90": J2K, "1.2.840.10008.1.2.4.91": J2K}


@dataclass(frozen=True)
class Segments:
    """The stored tiles of one level: where they are, and how they are coded."""

    file: Path
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    tile: tuple[int, int]  # (w, h) px
    cols: int
    codec: str
    rgb: bool
    tables: bytes = b""


def segments(work: Work) -> Segments:
    """Raises SlideError for a slide whose codec has no floor here."""
    return _dicom(work) if work.path.is_dir() or work.path.suffix.lower() == ".dcm" else _tiff(work)


def tiled_pages(tiff: tifffile.TiffFile) -> list[Any]:
    """The directories that may be levels: tiled, largest first."""
    pages: list[Any] = [page for page in tiff.pages if getattr(page, "is_tiled", False)]
    return sorted(pages, key=lambda page: -page.imagewidth)


def _tiff(work: Work) -> Segments:
    import tifffile

    with tifffile.TiffFile(work.path) as tiff:
        page = tiled_pages(tiff)[work.plan.level]
        codec = _TIFF_CODECS.get(int(page.compression))
        if codec is None:
            raise SlideError(f"{work.path}: compression {page.compression!s}, expected JPEG or JPEG 2000 for a floor")
        tables = bytes(page.tags[347].value) if 347 in page.tags else b""
        return Segments(
            work.path, np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64),
            (page.tilewidth, page.tilelength), -(-page.imagewidth // page.tilewidth),
            codec, int(page.photometric) == 2, tables,
        )  # fmt: skip


def _dicom(work: Work) -> Segments:
    import pydicom

    files = sorted(work.path.glob("*.dcm")) if work.path.is_dir() else [work.path]
    headers = [(file, pydicom.dcmread(file, stop_before_pixels=True)) for file in files]
    headers.sort(key=lambda pair: -pair[1].TotalPixelMatrixColumns)
    path, header = headers[work.plan.level]
    codec = _DICOM_CODECS.get(header.file_meta.TransferSyntaxUID)
    if codec is None or header.get("DimensionOrganizationType") != "TILED_FULL":
        raise SlideError(f"{path}: expected JPEG or JPEG 2000 frames, TILED_FULL, for a floor")
    with path.open("rb") as file:
        pydicom.dcmread(file, stop_before_pixels=True)
        file.seek(file.tell() + 12 + 4)  # tag, VR, reserved and length of the pixels; tag of the first item
        basic = np.frombuffer(file.read(int.from_bytes(file.read(4), "little")), np.uint32)
        first = file.tell()
        starts = np.frombuffer(header.ExtendedOffsetTable, np.uint64) if "ExtendedOffsetTable" in header else basic
        if not len(starts):
            raise SlideError(f"{path}: expected a table of offsets of the frames, for a floor")
        offsets = starts.astype(np.int64) + first + 8
        lengths = np.array([_item_length(file, place) for place in offsets.tolist()], np.int64)
    cols = -(-header.TotalPixelMatrixColumns // header.Columns)
    rgb = header.PhotometricInterpretation == "RGB"
    return Segments(path, offsets, lengths, (header.Columns, header.Rows), cols, codec, rgb)


def _item_length(file: BinaryIO, place: int) -> int:
    file.seek(place - 4)
    return int.from_bytes(file.read(4), "little")


def decoder(stored: Segments) -> Callable[[bytes, NDArray[np.uint8]], object]:
    """(segment, out u8 [h, w, 3]) of the codec library, and nothing around it."""
    if stored.codec == J2K:
        import imagecodecs

        return lambda data, out: imagecodecs.jpeg2k_decode(data, out=out)
    import simplejpeg

    if not stored.rgb:
        head = stored.tables[:-2]  # without EOI; a segment then goes on behind its SOI
        if head:
            return lambda data, out: simplejpeg.decode_jpeg(head + data[2:], buffer=out)
        return lambda data, out: simplejpeg.decode_jpeg(data, buffer=out)
    # R, G, B components: an Adobe marker that says so, in front
    head = (stored.tables[:-2] or b"\xff\xd8") + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    return lambda data, out: simplejpeg.decode_jpeg(head + data[2:], buffer=out)


class Limit:
    """Decodes the segments under the tiles, in their order, each once; gives no tiles, only their number."""

    def __init__(self, work: Work, threads: int) -> None:
        self._plan, self._threads = work.plan, threads
        self.stored = segments(work)
        self._descriptor = os.open(self.stored.file, os.O_RDONLY)
        self._decode = decoder(self.stored)

    def indices(self, xy0: NDArray[np.int64]) -> NDArray[np.int64]:
        """The segments under the tiles, row-major, each once."""
        (w, h), d = self.stored.tile, self._plan.downsample
        edge = round(self._plan.patch_size_level0 / d)
        first = np.rint(xy0 / d).astype(np.int64)
        found: set[int] = set()
        for x, y in first.tolist():
            for row in range(y // h, (y + edge - 1) // h + 1):
                found.update(row * self.stored.cols + col for col in range(x // w, (x + edge - 1) // w + 1))
        return np.array(sorted(found), np.int64)

    def decode(self, index: int, out: NDArray[np.uint8]) -> None:
        data = os.pread(self._descriptor, int(self.stored.lengths[index]), int(self.stored.offsets[index]))
        self._decode(data, out)

    def read(self, xy0: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        wanted = self.indices(xy0)
        shape = (self.stored.tile[1], self.stored.tile[0], 3)

        def chunk(start: int) -> None:
            out = np.empty(shape, np.uint8)
            for index in wanted[start : start + BATCH].tolist():
                self.decode(index, out)

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(chunk, range(0, len(wanted), BATCH)))
        yield np.empty((len(xy0), 0, 0, 0), np.uint8)
