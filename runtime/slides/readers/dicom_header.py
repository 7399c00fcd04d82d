"""A strict parser of DICOM headers that takes out a few named attributes and never looks at the others.

pydicom would do, at a price: 3.3 s for the 20,000 per-frame items of a TILED_SPARSE level (0.2 s here), memory by
lengths that a hostile header states, recursion without bound, and warnings that quote values, among them a patient's.
Tests hold this parser against pydicom. Format: DICOM PS3.5 section 7 (data elements, sequences) and PS3.10 (files).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, TypeAlias

# What to take: tag -> None for a value, or the attributes to take from the items of a sequence.
Wanted: TypeAlias = "Mapping[int, Wanted | None]"

PIXEL_DATA = 0x7FE00010
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
IMPLICIT_SYNTAX = "1.2.840.10008.1.2"
MAX_HEADER_BYTES = 256 << 20  # a TILED_SPARSE level of 300,000 frames has about that much
_MAX_DEPTH = 16  # of sequences in sequences; whole-slide images have 6
_CHUNK_BYTES = 64 << 10
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT = struct.Struct("<HH2sH")  # group, element, VR, length
_IMPLICIT = struct.Struct("<HHI")  # group, element, length; also the head of an item
_LENGTH = struct.Struct("<I")


class HeaderError(ValueError):
    """The header is malformed, cut off, or larger than MAX_HEADER_BYTES. Carries no value of it."""


def name(tag: int) -> str:
    """(gggg,eeee), as the standard writes a tag."""
    return f"({tag >> 16:04x},{tag & 0xFFFF:04x})"


@dataclass(slots=True)
class Attributes:
    """What was taken from one data set: tag -> raw little-endian bytes, tag -> items of a sequence."""

    values: dict[int, bytes] = field(default_factory=dict)
    items: dict[int, list[Attributes]] = field(default_factory=dict)

    def text(self, tag: int) -> str:
        """The value as text without its padding; empty where it is absent."""
        return self.values.get(tag, b"").decode("ascii", "replace").strip(" \0")

    def integer(self, tag: int) -> int | None:
        """The value of a US or UL attribute; None where it is absent. Raises HeaderError for another size."""
        raw = self.values.get(tag)
        if not raw:
            return None
        if len(raw) not in (2, 4):
            raise HeaderError(f"attribute {name(tag)} is no integer")
        return int.from_bytes(raw, "little")

    def count(self, tag: int) -> int | None:
        """The value of an IS attribute (digits), at least 0; None where it is absent."""
        text = self.text(tag)
        if not text:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= 12):
            raise HeaderError(f"attribute {name(tag)} is no count")
        return int(text)

    def decimals(self, tag: int) -> list[float | None]:
        """The values of a DS attribute; None for a part that is no number."""

        def number(text: str) -> float | None:
            try:
                return float(text)
            except ValueError:
                return None

        return [number(part) for part in self.text(tag).split("\\")] if tag in self.values else []

    def single(self, tag: int) -> float | None:
        """The value of an FL attribute; None where it is absent or of another size."""
        raw = self.values.get(tag, b"")
        return float(struct.unpack("<f", raw)[0]) if len(raw) == 4 else None


def read_attributes(file: BinaryIO, at: int, wanted: Wanted, *, implicit: bool, stop: int) -> tuple[Attributes, int]:
    """Take `wanted` from the data set that begins at byte `at`, up to the first attribute of tag `stop` or above.

    Returns the attributes and the offset of the one it stopped at (or of the end of the file). Memory: the header's
    bytes as far as they had to be read, at most MAX_HEADER_BYTES. Raises HeaderError.
    """
    parser = _Parser(file, at, stop)
    found = Attributes()
    end = parser.data_set(0, None, wanted, found, implicit=implicit, depth=0)
    return found, at + end


class _Parser:
    """Positions are relative to the data set's beginning; bytes are read when a position needs them."""

    def __init__(self, file: BinaryIO, at: int, stop: int) -> None:
        self._file = file
        self._size = file.seek(0, 2) - at
        self._data = bytearray()
        self._stop = stop
        file.seek(at)

    def _need(self, end: int) -> None:
        """Make the bytes before `end` available."""
        missing = end - len(self._data)
        if missing <= 0:
            return
        if end > min(self._size, MAX_HEADER_BYTES):
            raise HeaderError("cut off" if end > self._size else f"larger than {MAX_HEADER_BYTES >> 20} MiB")
        self._data += self._file.read(max(missing, _CHUNK_BYTES))
        if len(self._data) < end:
            raise HeaderError("cut off")

    def data_set(
        self, at: int, end: int | None, wanted: Wanted, found: Attributes, *, implicit: bool, depth: int
    ) -> int:
        """Parse the attributes in at ... end into `found`; return where they end.

        end None: up to the item's delimiter, or on top (depth 0) up to `stop` or the end of the file.
        """
        if depth > _MAX_DEPTH:
            raise HeaderError(f"sequences are nested more than {_MAX_DEPTH} deep")
        top = depth == 0
        while end is None or at < end:
            if top and (at == self._size or self._tag(at) >= self._stop):
                break
            tag, vr, length, body = self._element(at, implicit)
            if tag == ITEM_END and end is None and not top:
                return at + 8
            known = tag in wanted
            inner = wanted[tag] if known else None
            if length != UNDEFINED and (not known or inner is None):
                at = body + length
                if end is not None and at > end:
                    raise HeaderError(f"attribute {name(tag)} is longer than the item that holds it")
                if known:
                    self._need(at)
                    found.values[tag] = bytes(self._data[body:at])
                continue
            items: list[Attributes] = []
            # Undefined length under UN: what is inside has no explicit types (PS3.5 6.2.2, note 2).
            at = self._sequence(
                body,
                None if length == UNDEFINED else body + length,
                inner or {},
                items,
                implicit=implicit or vr == b"UN",
                depth=depth + 1,
            )
            if end is not None and at > end:
                raise HeaderError(f"sequence {name(tag)} is longer than the item that holds it")
            if inner is not None:
                found.items[tag] = items
        return at

    def _tag(self, at: int) -> int:
        self._need(at + 8)
        group, element, _ = _IMPLICIT.unpack_from(self._data, at)
        return int(group << 16 | element)

    def _element(self, at: int, implicit: bool) -> tuple[int, bytes, int, int]:
        """(tag, VR, length, where the value begins) of the attribute at `at`."""
        self._need(at + 8)
        if not implicit:
            group, element, vr, length = _SHORT.unpack_from(self._data, at)
            if group != 0xFFFE:
                if vr in _LONG_VRS:
                    self._need(at + 12)
                    return group << 16 | element, vr, _LENGTH.unpack_from(self._data, at + 8)[0], at + 12
                if not (vr.isalpha() and vr.isupper()):
                    raise HeaderError(f"attribute {name(group << 16 | element)} has no type")
                return group << 16 | element, vr, length, at + 8
        group, element, length = _IMPLICIT.unpack_from(self._data, at)
        return group << 16 | element, b"", length, at + 8

    def _sequence(
        self, at: int, end: int | None, wanted: Wanted, items: list[Attributes], *, implicit: bool, depth: int
    ) -> int:
        """Parse a sequence's items in at ... end (None: up to its delimiter); return where it ends.

        With nothing wanted, items of a stated length (those of encapsulated pixels too) are stepped over.
        """
        while end is None or at < end:
            self._need(at + 8)
            group, element, length = _IMPLICIT.unpack_from(self._data, at)
            tag = group << 16 | element
            if tag == SEQUENCE_END and end is None:
                return at + 8
            if tag != ITEM:
                raise HeaderError("a sequence holds something other than items")
            item_end = None if length == UNDEFINED else at + 8 + length
            if item_end is not None and end is not None and item_end > end:
                raise HeaderError("an item is longer than the sequence that holds it")
            if item_end is not None and not wanted:
                at = item_end
                continue
            found = Attributes()
            at = self.data_set(at + 8, item_end, wanted, found, implicit=implicit, depth=depth)
            items.append(found)
        return at
