"""The direct path for SVS and TIFF: what it reads itself, what it leaves to OpenSlide, what it refuses."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import SlideReader, open_slide
from wsi_rt.runtime.slides.readers.tiff import TiffReader
from wsi_rt.runtime.slides.readers.tiff_index import TiffError
from wsi_rt.runtime.slides.synth import write_synth_slide

OPENSLIDE = SlideSettings(reader="openslide")


def direct(path: Path) -> TiffReader:
    reader = open_slide(path)
    assert isinstance(reader, TiffReader)
    return reader


def alone(reader: TiffReader, monkeypatch: pytest.MonkeyPatch) -> TiffReader:
    """The reader without OpenSlide behind it."""

    def refuse(*_: object) -> None:
        raise AssertionError("OpenSlide was asked for pixels")

    monkeypatch.setattr(reader, "_open_whole", refuse)
    return reader


def on_grid(reader: SlideReader, level: int, rng: np.random.Generator) -> tuple[int, int]:
    """A level-0 position at a whole px of the level, inside the slide or a little outside."""
    d = reader.levels[level].downsample
    return tuple(round(rng.integers(-100, e + 100) // d * d) for e in reader.size0)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,001 x 1,303 px, so that level 1 has a downsample of 4.0056."""
    path = tmp_path_factory.mktemp("odd") / "odd.svs"
    return write_synth_slide(path, width=2001, height=1303, seed=3, tissue=0.8, levels=(1, 4))


def test_it_says_what_openslide_says(slides: Path) -> None:
    path = slides / "CMU-1-Small-Region.svs"
    with direct(path) as reader, open_slide(path, OPENSLIDE) as other:
        for fact in ("levels", "size0", "mpp0", "mpp_source", "notes", "background", "icc", "associated", "files"):
            assert getattr(reader, fact) == getattr(other, fact), fact
        assert reader.ref.provenance.digest == other.ref.provenance.digest
        assert set(reader.associated) == {"label", "macro", "thumbnail"}
        for name, (width, height) in reader.associated.items():
            image = reader.read_associated(name)
            assert image.shape == (height, width, 3)
            np.testing.assert_array_equal(image, other.read_associated(name))
        with pytest.raises(ValueError, match="expected label, macro, thumbnail"):
            reader.read_associated("nothing")


def test_the_direct_path_needs_no_openslide(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rng = slides / "CMU-1-Small-Region.svs", np.random.default_rng(1)
    with open_slide(path, OPENSLIDE) as other, alone(direct(path), monkeypatch) as reader:
        for _ in range(20):
            xy0, size = on_grid(reader, 0, rng), tuple(int(v) for v in rng.integers(1, 500, 2))
            np.testing.assert_array_equal(reader.read_region(xy0, 0, size), other.read_region(xy0, 0, size))
        xy0s = np.array([(240 * c, 240 * r) for r in range(-1, 14) for c in range(-1, 11)], np.int64)
        out = np.empty((len(xy0s), 240, 240, 3), np.uint8)
        assert reader.read_tiles(xy0s, 0, (240, 240), out) == []
        for xy0, tile in zip(xy0s.tolist(), out, strict=True):
            np.testing.assert_array_equal(tile, other.read_region(xy0, 0, (240, 240)))


@pytest.mark.parametrize("size", [(256, 256), (300, 77)], ids=["tile", "region"])
def test_between_px_it_is_openslides_interpolation(odd: Path, size: tuple[int, int]) -> None:
    with direct(odd) as reader, open_slide(odd, OPENSLIDE) as other:
        assert not reader.levels[1].downsample.is_integer()
        for xy0 in ((0, 0), (4, 0), (1025, 1025), (1026, 3), (7, 13), (-6, 1200), (512, 4 * 256)):
            np.testing.assert_array_equal(reader.read_region(xy0, 1, size), other.read_region(xy0, 1, size))


def test_a_whole_px_of_a_fractional_level_is_read_directly(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the slide's first column and row begin there exactly, whatever the downsample."""
    with open_slide(odd, OPENSLIDE) as other:
        expected = other.read_region((0, 0), 1, (500, 325))
    with alone(direct(odd), monkeypatch) as reader:
        np.testing.assert_array_equal(reader.read_region((0, 0), 1, (500, 325)), expected)


def test_a_region_larger_than_openslides_block(tmp_path: Path) -> None:
    """OpenSlide reads it in blocks of 4,096 px, each from a rounded place: level 1, downsample 2.0001."""
    path = write_synth_slide(tmp_path / "wide.tiff", width=9001, height=33, levels=(1, 2), format="tiff", tissue=0.9)
    with direct(path) as reader, open_slide(path, OPENSLIDE) as other:
        for level in (0, 1):
            size = (reader.levels[level].width, reader.levels[level].height)
            np.testing.assert_array_equal(
                reader.read_region((0, 0), level, size), other.read_region((0, 0), level, size)
            )


def test_each_stored_tile_is_decoded_once(tmp_path: Path) -> None:
    """256-px tiles over 240-px stored ones, in row-major order, from two threads."""
    path = write_synth_slide(tmp_path / "off.svs", width=2400, height=1200, tile=240, levels=(1,), tissue=0.8)
    xy0s = np.array([(256 * c, 256 * r) for r in range(5) for c in range(10)], np.int64)
    out = np.empty((len(xy0s), 256, 256, 3), np.uint8)
    with direct(path) as reader:
        reader.announce(xy0s, 0, (256, 256))
        for start in range(0, len(xy0s), 10):
            halves = [
                threading.Thread(target=reader.read_tiles, args=(xy0s[part], 0, (256, 256), out[part]))
                for part in (slice(start, start + 5), slice(start + 5, start + 10))
            ]
            for half in halves:
                half.start()
            for half in halves:
                half.join()
        assert reader.decoded == 10 * 5
        assert reader._cache._held_bytes == 0  # every one was dropped after its last use
    with open_slide(path, OPENSLIDE) as other:
        for xy0, tile in zip(xy0s.tolist(), out, strict=True):
            np.testing.assert_array_equal(tile, other.read_region(xy0, 0, (256, 256)))


def damage(path: Path, tile: int, how: str) -> None:
    """Damage one stored tile of level 0."""
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[tile], tiff.pages[0].databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(offset)
        data = file.read(count)
        broken = {"zeros": bytes(count), "half": data[: count // 2] + bytes(count - count // 2)}[how]
        file.seek(offset)
        file.write(broken)


@pytest.mark.parametrize("how", ["zeros", "half"])
@pytest.mark.parametrize("tile", [240, 256], ids=["off-grid", "aligned"])
def test_a_broken_tile_fails_alone(tmp_path: Path, tile: int, how: str) -> None:
    path = write_synth_slide(tmp_path / "bad.svs", width=1440, height=480, tile=tile, levels=(1,), tissue=0.8)
    xy0s = np.array([(256 * c, 0) for c in range(5)], np.int64)
    sound, out = np.empty((2, 5, 256, 256, 3), np.uint8)
    with direct(path) as reader:
        assert reader.read_tiles(xy0s, 0, (256, 256), sound) == []
    damage(path, 2, how)  # px 480 to 720, or 512 to 768
    with direct(path) as reader:
        failures = reader.read_tiles(xy0s, 0, (256, 256), out)
        assert reader.rereads == 0
    bad = [1, 2] if tile == 240 else [2]
    assert [row for row, _ in failures] == bad
    for row, error in failures:
        assert re.search(rf"bad\.svs: 256 x 256 px at level 0, level-0 position \({256 * row}, 0\)", str(error))
        assert (out[row] == 255).all()
    good = [row for row in range(5) if row not in bad]
    np.testing.assert_array_equal(out[good], sound[good])


def test_what_openslide_reads_on_the_second_try_is_counted(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with direct(odd) as reader:
        expected = reader.read_region((256, 256), 0, (256, 256))
        read = reader._file.read
        tries = iter([TiffError("a hiccup")])

        def hiccup(offset: int, count: int) -> bytes:
            for error in tries:
                raise error
            return read(offset, count)

        monkeypatch.setattr(reader._file, "read", hiccup)
        np.testing.assert_array_equal(reader.read_region((256, 256), 0, (256, 256)), expected)
        assert reader.rereads == 1


def test_a_file_replaced_by_a_shorter_one_while_open(tmp_path: Path) -> None:
    path = write_synth_slide(tmp_path / "cut.svs", width=1024, height=512, levels=(1,), tissue=0.8)
    with direct(path) as reader:
        os.truncate(path, 3000)
        with pytest.raises(SlideError, match=r"cut\.svs: .*position \(768, 256\)"):
            reader.read_region((768, 256), 0, (256, 256))


@pytest.mark.parametrize("holes", ["svs", "tiff"])
def test_tiles_left_out_are_white(tmp_path: Path, holes: str) -> None:
    """Aperio's: the levels above are rendered from the ones below, as OpenSlide does."""
    path = tmp_path / f"holes.{holes}"
    write_synth_slide(path, width=2300, height=1900, tissue=0.15, levels=(1, 2), sparse=True, format=holes)
    rng = np.random.default_rng(2)
    with direct(path) as reader, open_slide(path, OPENSLIDE) as other:
        assert not reader._stored[0].counts.all()
        empty = divmod(int(np.flatnonzero(reader._stored[0].counts == 0)[0]), reader._stored[0].cols)
        hole = (256 * empty[1], 256 * empty[0])
        assert (reader.read_region(hole, 0, (256, 256))[:100, :100] == 255).all()
        for _ in range(12):
            level = int(rng.integers(2))
            xy0 = on_grid(reader, level, rng)
            np.testing.assert_array_equal(
                reader.read_region(xy0, level, (400, 300)), other.read_region(xy0, level, (400, 300))
            )
        assert reader.rereads == 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("slideio_test3-DAPI-2-387.ndpi", "it is a hamamatsu file"),
        ("histolab_broken.svs", "not a slide that tiff can read"),
        ("ospy_unopenable.tiff", "Unsupported TIFF compression"),
    ],
)
def test_pinned_it_says_why_not(slides: Path, name: str, why: str) -> None:
    with pytest.raises(SlideError, match=why) as caught:
        open_slide(slides / name, SlideSettings(reader="tiff"))
    assert "\n" not in str(caught.value)


def test_an_unknown_reader_lists_the_choices(slides: Path) -> None:
    with pytest.raises(SlideError, match="--reader is 'svs', expected one of tiff, dicom, openslide"):
        open_slide(slides / "CMU-1-Small-Region.svs", SlideSettings(reader="svs"))


def test_what_is_not_plain_goes_to_openslide_and_says_so(tmp_path: Path) -> None:
    """RGBA: four samples."""
    path = tmp_path / "rgba.tiff"
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 4), np.uint8)
    pixels[..., 3] = 255
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", extrasamples=["unassalpha"])
    settings = SlideSettings(mpp=0.5)
    with open_slide(path, settings) as reader:
        assert reader.name.startswith("openslide ")
        np.testing.assert_array_equal(reader.read_region((0, 0), 0, (400, 300)), pixels[..., :3])
    with pytest.raises(SlideError, match=r"1 of its 1 levels are not 8-bit RGB; leave out --reader"):
        open_slide(path, SlideSettings(mpp=0.5, reader="tiff"))


def test_a_level_whose_tiles_the_codec_refuses_goes_to_openslide(tmp_path: Path) -> None:
    """Every tile would be tried twice: it is found on opening."""
    path = write_synth_slide(tmp_path / "first.svs", width=700, height=300, levels=(1,), tissue=0.8)
    damage(path, 0, "half")
    with open_slide(path) as reader:
        assert reader.name.startswith("openslide ")
    with pytest.raises(SlideError, match="level 0, first tile: JPEG"):
        open_slide(path, SlideSettings(reader="tiff"))
