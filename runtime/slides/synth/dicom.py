"""A streaming writer of DICOM whole-slide images: a folder with one instance per level, as archives serve them.

Frames arrive encoded, level by level side by side or in any order; they wait in one unnamed file per level in the
target folder, since the header, which comes first, has to know them all. Needs pydicom, imported on use.
Format: DICOM PS3.3 A.32.8 (VL Whole Slide Microscopy Image), PS3.5 A.4 (encapsulated frames).
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import InputError, MachineError
from wsi_rt.runtime.slides.readers.dicom_colour import has_transform
from wsi_rt.runtime.slides.synth.dicom_header import CODECS, frame_groups, instance_header

if TYPE_CHECKING:
    from pydicom import Dataset

TABLES = ("basic", "extended", "none")
_COPY_BYTES = 1 << 20
_ITEM = struct.Struct("<HHI")
_MAX_32_BITS = (1 << 32) - 1


class DicomWriter:
    """Writes the frames of several levels in any order, then one instance per level.

    folder: an existing folder; `level-0.dcm`, `level-1.dcm`, ... are written into it by `finish`.
    sizes: (width, height) per level in px, finest first.  tile: frame edge, px.  codec: a key of CODECS.
    mpp: um per level-0 px.  sparse: TILED_SPARSE, where frames may be missing; else TILED_FULL, where none may.
    table: where the frames' offsets go: "basic" (32 bits), "extended" (64 bits) or "none".
    frames_per_file: split a level into a concatenation of instances of at most so many frames.
    seed: goes into the UIDs; the same arguments and frames give the same bytes.

    Memory: 16 bytes per frame, with `sparse` about 10 KB. Disk: the frames twice until `finish` returns.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Sequence[tuple[int, int]],
        tile: int,
        codec: str,
        *,
        mpp: float,
        sparse: bool = False,
        table: str = "basic",
        frames_per_file: int | None = None,
        seed: int = 0,
    ) -> None:
        """Raises InputError for an unknown codec or table, MachineError without pydicom."""
        for name, given, known in (("codec", codec, tuple(CODECS)), ("table", table, TABLES)):
            if given not in known:
                raise InputError(f"DICOM slide: {name} is {given!r}, expected {' or '.join(known)}")
        _require_pydicom()
        self._folder = folder
        self._tile = tile
        self._codec = codec
        self._mpp = mpp
        self._sparse = sparse
        self._table = table
        self._frames_per_file = frames_per_file
        self._identity = f"{seed} {list(sizes)} {tile} {codec} {mpp!r}"
        self._levels = [_Spool(folder, width, height, tile) for width, height in sizes]

    def write_tile(self, level: int, col: int, row: int, data: bytes | None) -> None:
        """Take one encoded frame of tile x tile px; None leaves it out. Each place is to be written once."""
        if data is not None:
            self._levels[level].add(col, row, data)

    def write_associated(self, kind: str, pixels: NDArray[np.uint8]) -> Path:
        """Write `<kind>.dcm` at once: kind is label, overview or thumbnail; pixels u8 [h, w, 3], stored raw."""
        height, width = pixels.shape[:2]
        last = "RESAMPLED" if kind == "thumbnail" else "NONE"
        header = instance_header(
            kind, ["ORIGINAL", "PRIMARY", kind.upper(), last], (width, height), self._mpp, "raw", self._uid
        )
        header.Rows, header.Columns, header.NumberOfFrames = height, width, 1
        header.DimensionOrganizationType = "TILED_FULL"
        header.SpecimenLabelInImage = "NO" if kind == "thumbnail" else "YES"
        path = self._folder / f"{kind}.dcm"
        with path.open("wb") as file:
            _write_header(file, header)
            _write_native(file, [np.ascontiguousarray(pixels).tobytes()])
        return path

    def finish(self) -> list[Path]:
        """Write the instances, finest level first; return their paths.

        Raises InputError for a level of TILED_FULL that lacks frames, or raw frames beyond 4 GiB.
        """
        return [path for level in range(len(self._levels)) for path in self._finish_level(level)]

    def close(self) -> None:
        """Drop the frames held on disk; harmless after `finish`, needed when it is not reached."""
        for spool in self._levels:
            spool.file.close()

    def _finish_level(self, level: int) -> list[Path]:
        spool = self._levels[level]
        count = spool.cols * spool.rows
        if not self._sparse and len(spool) != count:
            raise InputError(f"DICOM slide: level {level} has {len(spool)} frames, expected all {count}")
        order = spool.row_major()
        per_file = self._frames_per_file or len(order)
        parts = [order[start : start + per_file] for start in range(0, len(order), per_file)]
        paths = []
        for number, part in enumerate(parts):
            name = f"level-{level}" if len(parts) == 1 else f"level-{level}-part-{number}"
            header = self._level_header(level, name, part)
            if len(parts) > 1:
                header.SOPInstanceUIDOfConcatenationSource = self._uid(f"level-{level}")
                header.ConcatenationUID = self._uid(f"concatenation-{level}")
                header.InConcatenationNumber, header.InConcatenationTotalNumber = number + 1, len(parts)
                header.ConcatenationFrameOffsetNumber = number * per_file
            paths.append(self._folder / f"{name}.dcm")
            with paths[-1].open("wb") as file:
                self._write_instance(file, header, spool, part)
        spool.file.close()
        return paths

    def _write_instance(self, file: BinaryIO, header: Dataset, spool: _Spool, part: list[int]) -> None:
        lengths = [spool.lengths[i] for i in part]
        if self._codec == "raw":
            _write_header(file, header)
            _write_native(file, (spool.read(i) for i in part), sum(lengths))
            return
        starts, place = [], 0
        for length in lengths:
            starts.append(place)
            place += _ITEM.size + length + length % 2
        if self._table == "extended":
            header.ExtendedOffsetTable = struct.pack(f"<{len(part)}Q", *starts)
            # padded to even, as pydicom writes and wsidicom expects them
            header.ExtendedOffsetTableLengths = struct.pack(f"<{len(part)}Q", *(n + n % 2 for n in lengths))
        basic = starts if self._table == "basic" else []
        if basic and basic[-1] > _MAX_32_BITS:
            raise InputError(f"DICOM slide: {place} bytes of frames, expected less than 4 GiB; use table='extended'")
        _write_header(file, header)
        file.write(struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, _MAX_32_BITS))
        file.write(_ITEM.pack(0xFFFE, 0xE000, 4 * len(basic)) + struct.pack(f"<{len(basic)}I", *basic))
        for index, length in zip(part, lengths, strict=True):
            file.write(_ITEM.pack(0xFFFE, 0xE000, length + length % 2) + spool.read(index) + bytes(length % 2))
        file.write(_ITEM.pack(0xFFFE, 0xE0DD, 0))

    def _level_header(self, level: int, name: str, part: list[int]) -> Dataset:
        spool = self._levels[level]
        mpp = self._mpp * self._levels[0].width / spool.width
        image_type = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        if level:
            image_type = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
        header = instance_header(name, image_type, (spool.width, spool.height), mpp, self._codec, self._uid)
        if self._codec.startswith("jpeg2000") and part and not has_transform(spool.read(part[0])):
            header.PhotometricInterpretation = "RGB"
        header.Rows = header.Columns = self._tile
        header.NumberOfFrames = len(part)
        header.SpecimenLabelInImage = "NO"
        header.DimensionOrganizationType = "TILED_SPARSE" if self._sparse else "TILED_FULL"
        if self._sparse:
            header.PerFrameFunctionalGroupsSequence = [
                frame_groups(*spool.places[index], self._tile, mpp) for index in part
            ]
        return header

    def _uid(self, name: str) -> str:
        """A UID under 2.25 (a UUID as an integer), the same for the same slide and name."""
        digest = hashlib.sha256(f"{self._identity} {name}".encode()).digest()
        return f"2.25.{int.from_bytes(digest[:16], 'big')}"


class _Spool:
    """The encoded frames of one level, on disk in the order they came."""

    def __init__(self, folder: Path, width: int, height: int, tile: int) -> None:
        self.width, self.height = width, height
        self.cols, self.rows = -(-width // tile), -(-height // tile)
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by the writer)
        self.places: list[tuple[int, int]] = []
        self.lengths = array("I")
        self._starts = array("Q")

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, col: int, row: int, data: bytes) -> None:
        if not (0 <= col < self.cols and 0 <= row < self.rows):
            raise ValueError(f"frame ({col}, {row}), expected less than ({self.cols}, {self.rows})")
        self.places.append((col, row))
        self._starts.append(self.file.seek(0, 2))
        self.lengths.append(len(data))
        self.file.write(data)

    def row_major(self) -> list[int]:
        return sorted(range(len(self)), key=lambda i: (self.places[i][1], self.places[i][0]))

    def read(self, index: int) -> bytes:
        self.file.seek(self._starts[index])
        return self.file.read(self.lengths[index])


def _require_pydicom() -> None:
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise MachineError("pydicom is not installed, expected to write DICOM; run: pip install pydicom") from error


def _write_header(file: BinaryIO, header: Dataset) -> None:
    import pydicom

    pydicom.dcmwrite(file, header, enforce_file_format=True)


def _write_native(file: BinaryIO, frames: Any, total: int | None = None) -> None:
    """Uncompressed PixelData; `total` bytes, else those of `frames`, a list."""
    length = sum(len(frame) for frame in frames) if total is None else total
    if length > _MAX_32_BITS - 1:
        raise InputError(f"DICOM slide: {length} bytes of raw pixels, expected less than 4 GiB; use codec 'jpeg'")
    file.write(struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, length + length % 2))
    for frame in frames:
        file.write(frame)
    file.write(bytes(length % 2))
