"""The header parser against pydicom, and against headers that lie."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_rt.runtime.slides.readers.dicom_header import (
    MAX_HEADER_BYTES,
    PIXEL_DATA,
    UNDEFINED,
    Attributes,
    HeaderError,
    Wanted,
    read_attributes,
)

ROWS, SERIES, SEQUENCE, INNER = 0x00280010, 0x0020000E, 0x52009229, 0x00289110
NESTED: Wanted = {ROWS: None, SEQUENCE: {INNER: {ROWS: None}, ROWS: None}}


def parse(data: bytes, wanted: Wanted = NESTED, *, implicit: bool = False, stop: int = PIXEL_DATA) -> Attributes:
    return read_attributes(io.BytesIO(data), 0, wanted, implicit=implicit, stop=stop)[0]


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    stated = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if vr in (b"SQ", b"OB", b"UN"):
        return head + vr + struct.pack("<HI", 0, stated) + value
    return head + vr + struct.pack("<H", stated) + value


def item(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value) if length is None else length) + value


ITEM_END, SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE00D, 0), struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
US7 = element(ROWS, b"US", struct.pack("<H", 7))


@pytest.mark.parametrize("undefined_sequence", [False, True], ids=["sized", "open-sequence"])
@pytest.mark.parametrize("undefined_item", [False, True], ids=["sized-item", "open-item"])
def test_sequences_of_every_kind(undefined_sequence: bool, undefined_item: bool) -> None:
    """Also around ones nobody asked for, whose items hold sequences themselves."""

    def sequence(tag: int, *contents: bytes) -> bytes:
        items = b"".join(item(c + ITEM_END, UNDEFINED) if undefined_item else item(c) for c in contents)
        if undefined_sequence:
            return element(tag, b"SQ", items + SEQUENCE_END, UNDEFINED)
        return element(tag, b"SQ", items)

    inner = sequence(INNER, US7)
    data = sequence(0x00400555, inner + US7, b"") + sequence(SEQUENCE, US7 + inner, inner) + US7
    found = parse(data)
    assert found.integer(ROWS) == 7
    first, second = found.items[SEQUENCE]
    assert (first.integer(ROWS), second.integer(ROWS)) == (7, None)
    assert [v.integer(ROWS) for v in (*first.items[INNER], *second.items[INNER])] == [7, 7]


def test_an_icon_with_encapsulated_pixels_is_stepped_over() -> None:
    """The one place where items hold bytes instead of attributes before the frames begin."""
    pixels = element(PIXEL_DATA, b"OB", item(b"") + item(b"\xff\xd8 no attributes here") + SEQUENCE_END, UNDEFINED)
    icon = element(0x00880200, b"SQ", item(pixels + ITEM_END, UNDEFINED) + SEQUENCE_END, UNDEFINED)
    assert parse(icon + US7).integer(ROWS) == 7


def test_it_stops_where_told_and_says_where() -> None:
    data = US7 + element(PIXEL_DATA, b"OB", b"xx")
    found, end = read_attributes(io.BytesIO(b"head" + data), 4, NESTED, implicit=False, stop=PIXEL_DATA)
    assert (found.integer(ROWS), end) == (7, 4 + len(US7))
    assert parse(US7, stop=ROWS).values == {}


@pytest.mark.filterwarnings("ignore:The value length")  # of a UID in one of the files
@pytest.mark.parametrize("name", ["ezwsi_multiframe_camelyon.dcm", "highdicom_sm_image.dcm"])
def test_values_are_pydicoms(shared_slides: Path, name: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.dcmread(shared_slides / name, stop_before_pixels=True)
    at = 132 + 12 + header.file_meta.FileMetaInformationGroupLength
    wanted: Wanted = {int(e.tag): {ROWS: None} if e.VR == "SQ" else None for e in header}
    with (shared_slides / name).open("rb") as file:
        found, end = read_attributes(file, at, wanted, implicit=False, stop=PIXEL_DATA)
        file.seek(end)
        assert file.read(4) == struct.pack("<HH", 0x7FE0, 0x0010)
    compared = 0
    for e in header:
        tag = int(e.tag)
        if e.VR == "SQ":
            assert len(found.items[tag]) == len(e.value)
        elif e.VR in ("US", "UL"):
            assert found.integer(tag) == e.value
        elif e.VR == "IS" or (e.VR in ("CS", "UI") and e.VM == 1):
            assert found.text(tag) == str(e.value)
        elif e.VR == "FL":
            assert found.single(tag) == e.value
        else:
            continue
        compared += 1
    assert compared > 20


def nest(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = element(SEQUENCE, b"SQ", item(data + ITEM_END, UNDEFINED) + SEQUENCE_END, UNDEFINED)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (US7[:-1], "cut off"),
        (US7 + b"\x28\x00", "cut off"),
        (element(SERIES, b"UI", b"1.2", length=900), "cut off"),
        (element(SEQUENCE, b"SQ", item(US7), length=900), "cut off|something other"),
        (element(SEQUENCE, b"SQ", item(US7, length=900)), "an item is longer than the sequence"),
        (element(SEQUENCE, b"SQ", item(US7[:6])), "longer than the item|cut off"),
        (element(SEQUENCE, b"SQ", item(element(SERIES, b"UI", b"1.2", length=9))), "longer than the item"),
        (element(SEQUENCE, b"SQ", US7), "something other than items"),
        (element(SEQUENCE, b"SQ", item(US7), UNDEFINED), "cut off"),
        (struct.pack("<HH", 0x28, 0x10) + b"\0\0\2\0ab", r"attribute \(0028,0010\) has no type"),
        (nest(40), "nested more than 16 deep"),
    ],
    ids=[
        *("value", "tag", "length", "sequence", "item", "item-short", "inside", "no-item", "open", "type", "depth"),
    ],
)
def test_headers_that_lie(data: bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=message):
        parse(data)


def test_values_of_the_wrong_kind() -> None:
    found = parse(element(ROWS, b"US", b"abc ") + element(SERIES, b"IS", b"12x4"), {ROWS: None, SERIES: None})
    assert found.integer(ROWS) == int.from_bytes(b"abc ", "little")
    with pytest.raises(HeaderError, match=r"\(0020,000e\) is no count"):
        found.count(SERIES)
    assert parse(element(SERIES, b"DS", b"1.5\\x\\2 "), {SERIES: None}).decimals(SERIES) == [1.5, None, 2.0]
    with pytest.raises(HeaderError, match=r"\(0028,0010\) is no integer"):
        parse(element(ROWS, b"US", b"abc")).integer(ROWS)


class HugeFile(io.BytesIO):
    """States a size of 1 TiB without having it."""

    def seek(self, offset: int, whence: int = 0) -> int:
        return 1 << 40 if whence == 2 else super().seek(offset, whence)


def test_memory_is_bounded_by_what_is_there() -> None:
    """A length of 2 GiB in a file that claims to hold it: refused before a byte of it is allocated."""
    data = element(0x00091001, b"UN", b"", length=MAX_HEADER_BYTES) + US7
    with pytest.raises(HeaderError, match="larger than 256 MiB"):
        read_attributes(HugeFile(data), 0, NESTED, implicit=False, stop=PIXEL_DATA)


@settings(max_examples=300, deadline=1000)
@given(st.data(), st.booleans())
def test_no_bytes_break_it(data: st.DataObject, implicit: bool) -> None:
    """HeaderError or a result, whatever is changed in a valid header."""
    header = bytearray(element(SEQUENCE, b"SQ", item(US7 + nest(3)) + SEQUENCE_END, UNDEFINED) + nest(2) + US7)
    for _ in range(data.draw(st.integers(0, 6))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse(bytes(header[: data.draw(st.integers(0, len(header)))]), implicit=implicit)
    except HeaderError:
        return
    assert set(found.values) <= {ROWS}
    assert set(found.items) <= {SEQUENCE}
