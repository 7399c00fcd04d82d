"""The DICOM writer: what other libraries read back from its files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_rt.runtime.errors import InputError, MachineError

pydicom = pytest.importorskip("pydicom", reason="DICOM slides are written with pydicom")
dicom = pytest.importorskip("wsi_rt.runtime.slides.synth.dicom")
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def jpeg(quality: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, "JPEG", quality=quality, subsampling=2)
    return out.getvalue()


def write(folder: Path, codec: str = "jpeg", **options: object) -> list[Path]:
    """Two levels of 3 x 2 and 2 x 1 frames, each of another quality, so that a frame in the wrong place shows."""
    folder.mkdir()
    writer = dicom.DicomWriter(folder, ((190, 128), (95, 64)), 64, codec, mpp=0.25, **options)
    for level, (cols, rows) in enumerate(((3, 2), (2, 1))):
        for row in reversed(range(rows)):  # any order
            for col in range(cols):
                data = jpeg(20 + 10 * (row * cols + col)) if codec == "jpeg" else PIXELS.tobytes()
                writer.write_tile(level, col, row, data)
    paths = writer.finish()
    writer.close()
    return paths


@pytest.mark.parametrize("table", ["basic", "extended", "none"])
def test_pydicom_reads_the_frames_in_their_order(tmp_path: Path, table: str) -> None:
    from pydicom.encaps import generate_frames

    paths = write(tmp_path / "slide", table=table)
    assert [path.name for path in paths] == ["level-0.dcm", "level-1.dcm"]
    instance = pydicom.dcmread(paths[0])
    assert instance.NumberOfFrames == 6
    offsets = instance.get("ExtendedOffsetTable"), instance.get("ExtendedOffsetTableLengths")
    assert (offsets[0] is not None) == (table == "extended")
    extended = offsets if table == "extended" else None
    frames = list(generate_frames(instance.PixelData, number_of_frames=6, extended_offsets=extended))
    assert [frame.rstrip(b"\0") for frame in frames] == [jpeg(20 + 10 * i).rstrip(b"\0") for i in range(6)]
    assert instance.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [0.00025, 0.00025]


def test_raw_pixels(tmp_path: Path) -> None:
    paths = write(tmp_path / "slide", "raw")
    np.testing.assert_array_equal(pydicom.dcmread(paths[0]).pixel_array[5], PIXELS)


@pytest.mark.parametrize("table", ["basic", "extended", "none"])
def test_wsidicom_reads_it(tmp_path: Path, table: str) -> None:
    wsidicom = pytest.importorskip("wsidicom")
    write(tmp_path / "slide", table=table)
    with wsidicom.WsiDicom.open(tmp_path / "slide") as slide:
        assert (slide.size.width, slide.size.height) == (190, 128)
        expected = np.asarray(Image.open(io.BytesIO(jpeg(60))))
        np.testing.assert_array_equal(np.asarray(slide.read_region((64, 64), 0, (64, 64))), expected)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    one, two, other = (write(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert one[0].read_bytes() != other[0].read_bytes()


def test_nothing_is_left_beside_the_instances(tmp_path: Path) -> None:
    paths = write(tmp_path / "slide", frames_per_file=4)
    assert sorted((tmp_path / "slide").iterdir()) == sorted(paths)
    assert [path.name for path in paths] == ["level-0-part-0.dcm", "level-0-part-1.dcm", "level-1.dcm"]


def test_frames_that_are_missing(tmp_path: Path) -> None:
    writer = dicom.DicomWriter(tmp_path, ((128, 64),), 64, "jpeg", mpp=0.5)
    writer.write_tile(0, 0, 0, jpeg(50))
    writer.write_tile(0, 1, 0, None)
    with pytest.raises(InputError, match="level 0 has 1 frames, expected all 2"):
        writer.finish()
    with pytest.raises(ValueError, match=r"frame \(2, 0\), expected less than \(2, 1\)"):
        writer.write_tile(0, 2, 0, jpeg(50))
    writer.close()


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="codec is 'lzw', expected jpeg or"):
        dicom.DicomWriter(tmp_path, ((64, 64),), 64, "lzw", mpp=0.5)
    with pytest.raises(InputError, match="table is 'big', expected basic or extended or none"):
        dicom.DicomWriter(tmp_path, ((64, 64),), 64, "jpeg", mpp=0.5, table="big")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(MachineError, match="pip install pydicom"):
        dicom.DicomWriter(tmp_path, ((64, 64),), 64, "jpeg", mpp=0.5)
