"""Where the frames of a DICOM instance lie in its file, and their bytes.

Encapsulated frames are items, or runs of items (fragments), after the PixelData attribute. Their places come from the
extended offset table, the basic one, or one walk over the items where neither is there or the basic one cannot be
right (its 32 bits wrap beyond 4 GiB). Format: DICOM PS3.5 A.4; PS3.3 C.7.6.3.1.8 (extended table).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.slides.readers.dicom_header import UNDEFINED, HeaderError
from wsi_rt.runtime.slides.readers.dicom_instance import NATIVE, Instance

_ITEM_HEAD = struct.Struct("<HHI")
_ITEM, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_PIXEL_DATA = (0x7FE0, 0x0010)
# A frame of pure noise at the best quality takes about 1.5 times its pixels; more than this is no frame.
_MAX_EXPANSION = 4
_SLACK_BYTES = 1 << 20
_FRAGMENTS_PER_FRAME = 64  # on average; bounds the walk over a file made of empty items
_FRAME_STARTS = (b"\xff\xd8", b"\xff\x4f", b"\x00\x00\x00\x0cjP")  # JPEG, JPEG 2000 codestream, JP2 file


class FrameError(ValueError):
    """A frame that is not where its table says, cut off, or impossibly long."""


@dataclass(frozen=True)
class FrameTable:
    """starts, ends: int64 [frames], byte offsets in the file; encapsulated: with the heads of the items."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    native: bool
    max_bytes: int


def read_table(fd: int, instance: Instance) -> FrameTable:
    """Find the frames of an open file. Reads no pixels. Raises HeaderError, OSError."""
    size = os.fstat(fd).st_size
    raw_bytes = instance.tile[0] * instance.tile[1] * 3
    head = os.pread(fd, 12, instance.data_at)
    if len(head) < 12 or struct.unpack_from("<HH", head) != _PIXEL_DATA:
        raise HeaderError("it holds no pixels")
    (length,) = struct.unpack_from("<I", head, 4 if instance.implicit else 8)
    if instance.frames > size // 8:
        raise HeaderError(f"{instance.frames} frames are stated, more than the file can hold")
    body = instance.data_at + (8 if instance.implicit else 12)
    if instance.codec == NATIVE:
        if length == UNDEFINED or length < raw_bytes * instance.frames or body + length > size:
            raise HeaderError(f"{instance.frames} frames of {raw_bytes} bytes are stated, {size - body} bytes follow")
        starts = body + raw_bytes * np.arange(instance.frames, dtype=np.int64)
        return FrameTable(starts, starts + raw_bytes, True, raw_bytes)
    if length != UNDEFINED:
        raise HeaderError("the frames are compressed, but not in items")
    starts, ends = _encapsulated(fd, body, size, instance)
    return FrameTable(starts, ends, False, _MAX_EXPANSION * raw_bytes + _SLACK_BYTES)


def read_frame(fd: int, table: FrameTable, index: int) -> bytes:
    """The encoded bytes of one frame (with a padding byte where its length is odd). Raises FrameError, OSError."""
    start, end = int(table.starts[index]), int(table.ends[index])
    if end - start > table.max_bytes:
        raise FrameError(f"it states {end - start} bytes, expected at most {table.max_bytes}")
    data = os.pread(fd, end - start, start)
    if len(data) < end - start:
        raise FrameError("the file is cut off before its end")
    if table.native:
        return data
    fragments = []
    at = 0
    while at + 8 <= len(data):
        group, element, length = _ITEM_HEAD.unpack_from(data, at)
        if (group, element) != _ITEM or at + 8 + length > len(data):
            break
        fragments.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    if at != len(data) or not fragments:
        raise FrameError("it is not where the offset table says")
    return b"".join(fragments)


def _encapsulated(fd: int, at: int, size: int, instance: Instance) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, ends) of the frames whose items follow the basic offset table at `at`."""
    head = os.pread(fd, 8, at)
    if len(head) < 8 or _ITEM_HEAD.unpack(head)[:2] != _ITEM:
        raise HeaderError("the offset table is missing")
    table_bytes = _ITEM_HEAD.unpack(head)[2]
    base = at + 8 + table_bytes  # offsets count from the first item after the table
    if base > size:
        raise HeaderError("the offset table is cut off")
    if instance.extended is not None:
        offsets, lengths = instance.extended
        if (offsets > size).any() or (lengths > size).any():
            raise HeaderError("the extended offset table points beyond the file")
        starts = base + offsets.astype(np.int64)
        return starts, starts + 8 + lengths.astype(np.int64) + (lengths & 1).astype(np.int64)
    if table_bytes == 4 * instance.frames:
        starts = base + np.frombuffer(os.pread(fd, table_bytes, at + 8), "<u4").astype(np.int64)
        if starts[0] == base and (np.diff(starts) > 0).all() and starts[-1] < size:
            end = _walk(fd, int(starts[-1]), instance.frames)[1]
            return starts, np.append(starts[1:], end)
    return _by_walking(fd, base, instance)


def _by_walking(fd: int, base: int, instance: Instance) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    items, end = _walk(fd, base, instance.frames)
    if instance.frames == 1:
        items = items[:1]
    elif len(items) > instance.frames:  # several items per frame: a frame begins where an image does
        items = [item for item in items if os.pread(fd, 14, item)[8:].startswith(_FRAME_STARTS)]
    if len(items) != instance.frames:
        raise HeaderError(f"{len(items)} frames are there, expected {instance.frames}")
    starts = np.array(items, np.int64)
    return starts, np.append(starts[1:], end)


def _walk(fd: int, at: int, frames: int) -> tuple[list[int], int]:
    """The offsets of the items from `at` on, and where the last one ends."""
    items: list[int] = []
    limit = 1024 + _FRAGMENTS_PER_FRAME * frames
    while True:
        head = os.pread(fd, 8, at)
        if len(head) < 8:
            return items, at  # no delimiter: the file is cut off; what is there can be read
        group, element, length = _ITEM_HEAD.unpack(head)
        if (group, element) == _SEQUENCE_END:
            return items, at
        if (group, element) != _ITEM or length == UNDEFINED:
            raise HeaderError("something other than items follows the frames")
        if len(items) == limit:
            raise HeaderError(f"it holds more than {limit} pieces for {frames} frames")
        items.append(at)
        at += 8 + length
