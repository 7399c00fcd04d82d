"""One DICOM whole-slide instance: what it shows, how it is tiled and encoded, as its header says.

Only the attributes named here are ever read: none that names a patient, so none can reach an error, a log or a cache.
Source: DICOM PS3.3 A.32.8 and C.8.12 (Whole Slide Microscopy), C.7.6.16 (multi-frame functional groups).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.reader import DeclaredMpp
from wsi_rt.runtime.slides.readers.dicom_header import (
    IMPLICIT_SYNTAX,
    PIXEL_DATA,
    Attributes,
    HeaderError,
    Wanted,
    read_attributes,
)

WSI_STORAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
NATIVE, JPEG, JPEG2000 = "native", "jpeg", "jpeg2000"
SYNTAXES = {
    IMPLICIT_SYNTAX: NATIVE,
    "1.2.840.10008.1.2.1": NATIVE,
    "1.2.840.10008.1.2.4.50": JPEG,
    "1.2.840.10008.1.2.4.90": JPEG2000,
    "1.2.840.10008.1.2.4.91": JPEG2000,
}
_UNREADABLE_HEADER = {"1.2.840.10008.1.2.2": "big endian", "1.2.840.10008.1.2.1.99": "deflated"}
_OTHER_CODECS = {
    f"1.2.840.10008.1.2.{last}": name
    for name, syntaxes in {
        "JPEG of 12 bits": ("4.51",),
        "lossless JPEG": ("4.57", "4.70"),
        "JPEG-LS": ("4.80", "4.81"),
        "JPEG XL": ("4.110", "4.111", "4.112"),
        "High-Throughput JPEG 2000": ("4.201", "4.202", "4.203"),
        "run lengths (RLE)": ("5",),
    }.items()
    for last in syntaxes
}
PHOTOMETRIC = {
    NATIVE: ("RGB",),
    JPEG: ("YBR_FULL_422", "YBR_FULL", "RGB"),
    JPEG2000: ("YBR_ICT", "YBR_RCT", "RGB"),
}
MAX_FRAME_PX = 1 << 26  # 8192 x 8192: 192 MiB decoded

_META_AT, _META_END = 132, 0x00030000
_MEDIA_SOP_CLASS, _SYNTAX = 0x00020002, 0x00020010
_IMAGE_TYPE, _SOP_UID, _SERIES_UID = 0x00080008, 0x00080018, 0x0020000E
_SOURCE_UID, _PARTS, _FIRST_FRAME = 0x00200242, 0x00209163, 0x00209228
_ORGANIZATION = 0x00209311
_SAMPLES, _PHOTOMETRIC, _PLANAR = 0x00280002, 0x00280004, 0x00280006
_FRAMES, _ROWS, _COLUMNS = 0x00280008, 0x00280010, 0x00280011
_BITS_ALLOCATED, _BITS_STORED, _HIGH_BIT, _SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_VOLUME_WIDTH, _VOLUME_HEIGHT = 0x00480001, 0x00480002  # mm
_MATRIX_COLUMNS, _MATRIX_ROWS = 0x00480006, 0x00480007
_OPTICAL_PATHS, _ICC = 0x00480105, 0x00282000
_PATH_COUNT, _FOCAL_PLANES = 0x00480302, 0x00480303
_SHARED_GROUPS, _FRAME_GROUPS = 0x52009229, 0x52009230
_PIXEL_MEASURES, _SPACING = 0x00289110, 0x00280030  # mm, row spacing first
_PLANE_POSITION, _FRAME_X, _FRAME_Y = 0x0048021A, 0x0048021E, 0x0048021F  # 1-based px
_EXTENDED_OFFSETS, _EXTENDED_LENGTHS = 0x7FE00001, 0x7FE00002
_GROUPS: Wanted = {
    _PIXEL_MEASURES: {_SPACING: None},
    _PLANE_POSITION: {_FRAME_X: None, _FRAME_Y: None},
}
_WANTED: Wanted = {
    **dict.fromkeys(
        (
            *(
                _IMAGE_TYPE,
                _SOP_UID,
                _SERIES_UID,
                _SOURCE_UID,
                _PARTS,
                _FIRST_FRAME,
                _ORGANIZATION,
                _SAMPLES,
                _PHOTOMETRIC,
            ),
            *(_PLANAR, _FRAMES, _ROWS, _COLUMNS, _BITS_ALLOCATED, _BITS_STORED, _HIGH_BIT, _SIGNED, _VOLUME_WIDTH),
            *(_VOLUME_HEIGHT, _MATRIX_COLUMNS, _MATRIX_ROWS, _PATH_COUNT, _FOCAL_PLANES, _EXTENDED_OFFSETS),
            _EXTENDED_LENGTHS,
        )
    ),
    _OPTICAL_PATHS: {_ICC: None},
    _SHARED_GROUPS: _GROUPS,
    _FRAME_GROUPS: _GROUPS,
}


@dataclass(frozen=True)
class Instance:
    """One file of a series.

    kind: VOLUME (a pyramid level), LABEL, OVERVIEW, THUMBNAIL or whatever else ImageType says.
    series, uid: SeriesInstanceUID, SOPInstanceUID; for a part of a concatenation, `uid` is that of the whole.
    unsupported: why its frames cannot be read; empty where they can.
    size: (width, height) of the whole image, px.    tile: (width, height) of a frame, px.
    frames: held by this file; the first of them is number `first_frame` of the whole, which has `parts` files.
    positions: int64 [frames, 2], 0-based (x, y) of each frame in the whole image, px; None for TILED_FULL.
    codec, photometric: how the frames are encoded and what colours they are declared to hold.
    implicit: the header's attributes come without types (of the native codec only).
    declared_mpp: um/px of this image.                icc: an ICC profile is embedded.
    data_at: byte offset of the PixelData attribute.  extended: (offsets, lengths), uint64 [frames], or None.
    """

    path: Path
    kind: str
    series: str
    uid: str
    unsupported: str
    size: tuple[int, int]
    tile: tuple[int, int]
    frames: int
    first_frame: int
    parts: int
    positions: NDArray[np.int64] | None
    codec: str
    photometric: str
    implicit: bool
    declared_mpp: DeclaredMpp
    icc: bool
    data_at: int
    extended: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None

    @property
    def grid(self) -> tuple[int, int]:
        """(columns, rows) of frames of the whole image."""
        return -(-self.size[0] // self.tile[0]), -(-self.size[1] // self.tile[1])


def find_series(path: Path) -> str | None:
    """The SeriesInstanceUID of a whole-slide instance, read from the beginning of the file; None for any other file.

    Raises SlideError for a DICOM file that breaks off or is malformed before that, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            meta = _read_meta(file)
            if meta is None:
                return None
            syntax, at = meta
            wanted = {_SERIES_UID: None}
            found, _ = read_attributes(file, at, wanted, implicit=syntax == IMPLICIT_SYNTAX, stop=_SERIES_UID + 1)
            if not found.text(_SERIES_UID):
                raise HeaderError("SeriesInstanceUID is missing")
            return found.text(_SERIES_UID)
    except HeaderError as error:
        raise _malformed(path, error) from error
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}), expected a readable slide file") from error


def read_instance(path: Path) -> Instance:
    """Read one header. Raises SlideError for a file that is no whole-slide instance, malformed or unreadable."""
    try:
        with path.open("rb") as file:
            meta = _read_meta(file)
            if meta is None:
                raise SlideError(f"{path}: is no DICOM whole-slide image, expected one")
            syntax, at = meta
            found, data_at = read_attributes(file, at, _WANTED, implicit=syntax == IMPLICIT_SYNTAX, stop=PIXEL_DATA)
        return _instance(path, syntax, found, data_at)
    except HeaderError as error:
        raise _malformed(path, error) from error
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}), expected a readable slide file") from error


def _malformed(path: Path, error: HeaderError) -> SlideError:
    return SlideError(f"{path}: the DICOM header is malformed ({error}), expected an intact file; download it again")


def _read_meta(file: BinaryIO) -> tuple[str, int] | None:
    """(transfer syntax, where the data set begins); None where the file is no DICOM whole-slide image."""
    if file.read(_META_AT)[128:] != b"DICM":
        return None
    # Group 2 is explicit little endian and uncompressed in every file.
    meta, at = read_attributes(file, _META_AT, {_MEDIA_SOP_CLASS: None, _SYNTAX: None}, implicit=False, stop=_META_END)
    if meta.text(_MEDIA_SOP_CLASS) != WSI_STORAGE:
        return None
    syntax = meta.text(_SYNTAX)
    if syntax in _UNREADABLE_HEADER:
        raise HeaderError(f"it is {_UNREADABLE_HEADER[syntax]}, which is not supported")
    return syntax, at


def _instance(path: Path, syntax: str, found: Attributes, data_at: int) -> Instance:
    def required(tag: int, what: str) -> int:
        value = found.integer(tag)
        if not value:
            raise HeaderError(f"{what} is missing or 0")
        return value

    frames = found.count(_FRAMES) or 1
    tile = (required(_COLUMNS, "Columns"), required(_ROWS, "Rows"))
    size = (required(_MATRIX_COLUMNS, "TotalPixelMatrixColumns"), required(_MATRIX_ROWS, "TotalPixelMatrixRows"))
    return Instance(
        path=path,
        kind=_kind(found.text(_IMAGE_TYPE)),
        series=found.text(_SERIES_UID),
        uid=found.text(_SOURCE_UID) or found.text(_SOP_UID),
        unsupported=_unsupported(syntax, found, tile),
        size=size,
        tile=tile,
        frames=frames,
        first_frame=found.integer(_FIRST_FRAME) or 0,
        parts=found.integer(_PARTS) or 1,
        positions=_positions(found, frames),
        codec=SYNTAXES.get(syntax, syntax),
        photometric=found.text(_PHOTOMETRIC),
        implicit=syntax == IMPLICIT_SYNTAX,
        declared_mpp=_declared_mpp(found, size),
        icc=any(path.values.get(_ICC) for path in found.items.get(_OPTICAL_PATHS, [])),
        data_at=data_at,
        extended=_extended(found, frames),
    )


def _kind(image_type: str) -> str:
    """The third of at least four values, as OpenSlide takes it; else all of them."""
    values = [part.strip() for part in image_type.split("\\")]
    return values[2] if len(values) > 3 else image_type


def _unsupported(syntax: str, found: Attributes, tile: tuple[int, int]) -> str:
    """Why the frames cannot be read, or an empty string."""
    codec = SYNTAXES.get(syntax)
    if codec is None:
        named = _OTHER_CODECS.get(syntax, f"transfer syntax {syntax or '(none)'}")
        return f"its frames are encoded as {named}, expected JPEG baseline, JPEG 2000 or none"
    if tile[0] * tile[1] > MAX_FRAME_PX:
        return f"its frames have {tile[0]} x {tile[1]} px, expected at most {MAX_FRAME_PX} px"
    planes, paths = found.integer(_FOCAL_PLANES) or 1, found.integer(_PATH_COUNT) or 1
    paths = max(paths, len(found.items.get(_OPTICAL_PATHS, [])))
    for count, what in ((planes, "focal planes"), (paths, "optical paths")):
        if count > 1:
            return f"it has {count} {what}, expected one"
    if found.integer(_SAMPLES) != 3:
        return f"it has {found.integer(_SAMPLES)} samples per pixel (fluorescence has one), expected 3: RGB"
    bits = tuple(found.integer(tag) for tag in (_BITS_ALLOCATED, _BITS_STORED, _HIGH_BIT))
    if bits != (8, 8, 7) or found.integer(_SIGNED):
        return f"it has {bits[1]} bits per sample in {bits[0]}, expected 8 in 8, unsigned"
    if found.integer(_PLANAR):
        return "its colours are stored plane by plane, expected interleaved ones"
    photometric = found.text(_PHOTOMETRIC)
    if photometric not in PHOTOMETRIC[codec]:
        return f"its colours are declared {photometric or '(nothing)'}, expected {' or '.join(PHOTOMETRIC[codec])}"
    return ""


def _positions(found: Attributes, frames: int) -> NDArray[np.int64] | None:
    if found.text(_ORGANIZATION) == "TILED_FULL":
        return None
    groups = found.items.get(_FRAME_GROUPS, [])
    if not groups and found.text(_ORGANIZATION) != "TILED_SPARSE":
        return None  # an older or single-frame image: its frames fill the grid, which the series checks
    if len(groups) != frames:
        raise HeaderError(f"{len(groups)} frames have a position, expected {frames}")
    packed = bytearray()
    for group in groups:
        planes = group.items.get(_PLANE_POSITION, [])
        raw = b"".join(planes[0].values.get(tag, b"") for tag in (_FRAME_X, _FRAME_Y)) if planes else b""
        if len(raw) != 8:
            raise HeaderError("a frame has no position")
        packed += raw
    return np.frombuffer(packed, "<i4").reshape(-1, 2).astype(np.int64) - 1  # [frames, 2]


def _declared_mpp(found: Attributes, size: tuple[int, int]) -> DeclaredMpp:
    """From PixelSpacing (shared, else of the first frame), else from the imaged volume's size; all in mm."""
    for groups in (_SHARED_GROUPS, _FRAME_GROUPS):
        for group in found.items.get(groups, [])[:1]:
            for measures in group.items.get(_PIXEL_MEASURES, [])[:1]:
                spacing = measures.decimals(_SPACING)
                if len(spacing) == 2:
                    y, x = (None if mm is None else mm * 1000 for mm in spacing)
                    return DeclaredMpp(x, y, "DICOM PixelSpacing")
    width, height = found.single(_VOLUME_WIDTH), found.single(_VOLUME_HEIGHT)
    if width is None or height is None:
        return DeclaredMpp(None, None, "DICOM PixelSpacing")
    return DeclaredMpp(width * 1000 / size[0], height * 1000 / size[1], "DICOM ImagedVolumeWidth")


def _extended(found: Attributes, frames: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]] | None:
    raw = [found.values.get(tag, b"") for tag in (_EXTENDED_OFFSETS, _EXTENDED_LENGTHS)]
    if not all(raw):
        return None
    if any(len(table) != 8 * frames for table in raw):
        sizes = " and ".join(str(len(table) // struct.calcsize("Q")) for table in raw)
        raise HeaderError(f"the extended offset table has {sizes} entries, expected {frames}")
    offsets, lengths = (np.frombuffer(table, "<u8") for table in raw)
    return offsets, lengths
