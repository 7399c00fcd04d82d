"""The parser of TIFF headers: both kinds and byte orders, and headers that lie."""

from __future__ import annotations

import io
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from wsi_rt.runtime.slides.readers.tiff_index import TiffError, TiffFile
from wsi_rt.runtime.slides.synth import write_synth_slide


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    handle = os.open(tmp_path / "t.tif", os.O_RDWR | os.O_CREAT)
    yield handle
    os.close(handle)


def parsed(descriptor: int, data: bytes) -> list[object]:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
    return list(TiffFile(descriptor).levels())


@pytest.mark.parametrize("big", [False, True], ids=["classic", "bigtiff"])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
def test_index_of_both_kinds_and_orders(descriptor: int, big: bool, order: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (100, 200, 3), np.uint8)
    out = io.BytesIO()
    with tifffile.TiffWriter(out, bigtiff=big, byteorder=order) as writer:
        writer.write(pixels, tile=(32, 48), photometric="rgb", compression="zlib", predictor=True)
        writer.write(pixels[..., 0], tile=(32, 48))
        writer.write(pixels, photometric="rgb")
    level, *others = parsed(descriptor, out.getvalue())
    assert others == [None, None]  # grey; stripes
    with tifffile.TiffFile(io.BytesIO(out.getvalue())) as tiff:
        page = tiff.pages[0]
        assert (level.width, level.height, level.tile_w, level.tile_h, level.cols, level.rows) == (
            200,
            100,
            48,
            32,
            5,
            4,
        )
        assert (level.compression, level.photometric, level.predictor, level.tables) == (8, 2, 2, None)
        assert level.offsets.tolist() == list(page.dataoffsets)
        assert level.counts.tolist() == list(page.databytecounts)


def classic(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A little-endian TIFF of one directory at byte 16; an entry is (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHI4HH", b"II", 42, 16, 8, 8, 8, 0, len(entries)) + body + struct.pack("<I", following)


RGB = ((258, 3, 3, 8), (277, 3, 1, 3))  # the three 8s stand at byte 8
HOSTILE = {
    "empty": (b"", "no TIFF"),
    "short": (b"II*\0", "no TIFF"),
    "bigtiff-cut": (b"II+\0\x08\0\0\0\x10\0", "ends"),
    "far-directory": (struct.pack("<2sHI", b"II", 42, 1 << 31), "ends at byte 8"),
    "loop": (classic((256, 4, 1, 1), following=16), "loop"),
    "no-entries": (classic(), "0 entries"),
    "many-entries": (struct.pack("<2sHIH", b"II", 42, 8, 65535) + bytes(900_000), "65535 entries"),
    "twice": (classic((256, 4, 1, 1), (256, 4, 1, 2)), "twice"),
    "no-size": (classic(*RGB, (322, 4, 1, 16), (323, 4, 1, 16)), "lacks tag 256"),
    "no-value": (classic(*RGB, (256, 4, 0, 16), (322, 4, 1, 16)), "no value for tag 256"),
    "floats": (classic(*RGB, (256, 11, 1, 16), (322, 4, 1, 16)), "type 11"),
}
HOSTILE |= {
    name: (
        classic(*RGB, (256, 4, 1, w), (257, 4, 1, h), (262, 3, 1, 2), (322, 4, 1, tw), (323, 4, 1, th), *arrays),
        why,
    )
    for name, w, h, tw, th, arrays, why in (
        ("no-width", 0, 9, 16, 16, (), "states 0 x 9 px"),
        ("huge", 1 << 31, 1 << 31, 16, 16, (), "states"),
        ("no-tile", 64, 64, 0, 16, (), "tiles of 0 x 16"),
        ("huge-tile", 64, 64, 1 << 30, 1 << 30, (), "tiles of"),
        ("few-offsets", 64, 64, 16, 16, ((324, 4, 4, 8),), "4 values of tag 324, expected one for each of 16"),
        ("no-offsets", 64, 64, 16, 16, (), "0 values of tag 324"),
        ("far-offsets", 1 << 20, 1 << 20, 16, 16, ((324, 4, 16, 1 << 30),), "expected one for each of 4294967296"),
        ("offsets-beyond", 64, 64, 16, 16, ((324, 4, 16, 1 << 30),), "64 bytes at 1073741824 expected"),
    )
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(descriptor: int, name: str) -> None:
    data, why = HOSTILE[name]
    with pytest.raises(TiffError, match=why):
        parsed(descriptor, data)


def test_mutated_headers_give_levels_or_a_tiff_error(descriptor: int, tmp_path: Path) -> None:
    path = write_synth_slide(tmp_path / "s.svs", width=600, height=300, levels=(1, 2), codec="jpeg", shared_tables=True)
    data = path.read_bytes()
    rng = random.Random(7)
    directories = len(data) - 2000
    outcomes = set()
    for _ in range(500):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.choice((rng.randrange(16), rng.randrange(directories, len(data))))
            mutated[at] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            del mutated[rng.randrange(len(mutated)) :]
        try:
            parsed(descriptor, bytes(mutated))
            outcomes.add("levels")
        except TiffError:
            outcomes.add("error")
    assert outcomes == {"levels", "error"}
