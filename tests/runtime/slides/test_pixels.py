"""Every reader of ours against OpenSlide, region by region: real slides, and written ones of every layout and codec."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import SlideReader, open_slide
from wsi_rt.runtime.slides.synth import SlideSpec, write_synth_slide

Region = tuple[tuple[int, int], int, tuple[int, int]]  # xy0, level, (w, h)
PLAIN: dict[str, Any] = {"width": 910, "height": 670, "tissue": 0.6}

# id -> (what differs from PLAIN, the reader that the automatic choice gives)
WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "jpeg-420": ({}, "tiff"),
    "jpeg-422": ({"subsampling": "4:2:2"}, "tiff"),
    "jpeg-444": ({"subsampling": "4:4:4"}, "tiff"),
    "jpeg-shared-tables": ({"shared_tables": True}, "tiff"),
    "jpeg-rgb-without-adobe": ({"codec": "jpeg-rgb"}, "tiff"),
    "jpeg-rgb-240": ({"codec": "jpeg-rgb", "tile": 240}, "tiff"),
    "jpeg2000": ({"codec": "jpeg2000"}, "tiff"),
    "jpeg2000-ycc": ({"codec": "jpeg2000-ycc"}, "tiff"),
    "jpeg2000-240-odd-levels": ({"codec": "jpeg2000", "tile": 240, "levels": (1, 3, 6)}, "tiff"),
    "deflate": ({"codec": "deflate"}, "tiff"),
    "deflate-predictor": ({"codec": "deflate", "predictor": True, "format": "tiff"}, "tiff"),
    "lzw": ({"codec": "lzw"}, "tiff"),
    "lzw-predictor": ({"codec": "lzw", "predictor": True, "tile": 512, "levels": (1, 4)}, "tiff"),
    "raw": ({"codec": "raw", "tile": 128, "levels": (1, 2)}, "tiff"),
    "classic": ({"bigtiff": False}, "tiff"),
    "big-endian": ({"big_endian": True}, "tiff"),
    "big-endian-generic-lzw": ({"big_endian": True, "format": "tiff", "codec": "lzw"}, "tiff"),
    "generic": ({"format": "tiff"}, "tiff"),
    "generic-jpeg-rgb": ({"format": "tiff", "codec": "jpeg-rgb", "bigtiff": False}, "tiff"),
    "sparse-one-level": ({"sparse": True, "tissue": 0.2, "levels": (1,)}, "tiff"),
    "sparse-generic": ({"sparse": True, "tissue": 0.2, "format": "tiff"}, "tiff"),
    "mpp-0.2280": ({"mpp": 0.228}, "tiff"),
    "mpp-0.2528": ({"mpp": 0.2528}, "tiff"),
    "mpp-0.9990": ({"mpp": 0.999}, "tiff"),
    "smaller-than-a-tile": ({"width": 100, "height": 60, "levels": (1, 2)}, "tiff"),
    "a-column": ({"width": 3, "height": 700, "levels": (1,)}, "tiff"),
    "dicom-jpeg": ({"format": "dicom"}, "dicom"),
    "dicom-jpeg-rgb": ({"format": "dicom", "codec": "jpeg-rgb"}, "dicom"),
    "dicom-jpeg2000": ({"format": "dicom", "codec": "jpeg2000"}, "dicom"),
    "dicom-raw": ({"format": "dicom", "codec": "raw"}, "dicom"),
    "dicom-sparse": ({"format": "dicom", "sparse": True, "tissue": 0.2, "levels": (1,)}, "dicom"),
    "dicom-240": ({"format": "dicom", "tile": 240}, "dicom"),
}  # fmt: skip


class Oracle:
    """OpenSlide on white. A handle per region, since one error spoils a handle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with openslide.OpenSlide(path) as slide:
            self.levels = list(zip(slide.level_dimensions, map(float, slide.level_downsamples), strict=True))

    def region(self, region: Region) -> NDArray[np.uint8]:
        with openslide.OpenSlide(self.path) as slide:
            image = slide.read_region(*region)
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return np.array(canvas)


def regions(oracle: Oracle, seed: int, count: int = 6) -> Iterator[Region]:
    """Corners, what lies across and beyond the edges, one px, and random places and sizes, at whole px of each level;
    then a few places between px."""
    rng = np.random.default_rng(seed)
    for level, ((width, height), downsample) in enumerate(oracle.levels):
        fixed = [(0, 0, 256, 256), (-40, -30, 90, 70), (width - 20, height - 10, 64, 64), (width - 1, 0, 1, 1)]
        fixed += [(width + 5, 10, 16, 16), (-10, height // 2, width + 20, 7)]
        for _ in range(count):
            x, y = int(rng.integers(-20, width)), int(rng.integers(-20, height))
            fixed.append((x, y, int(rng.integers(1, 400)), int(rng.integers(1, 400))))
        for x, y, w, h in fixed:
            yield (round(x * downsample), round(y * downsample)), level, (w, h)
        if downsample > 1:
            for x0, y0 in rng.integers(0, [width * downsample, height * downsample], (2, 2)):
                yield (int(x0), int(y0)), level, (77, 50)


def check(reader: SlideReader, oracle: Oracle, seed: int = 0) -> None:
    """Levels and every region; then tiles of one size at once, as the loop over a grid reads them."""
    assert [((v.width, v.height), v.downsample) for v in reader.levels] == oracle.levels
    for region in regions(oracle, seed):
        np.testing.assert_array_equal(reader.read_region(*region), oracle.region(region), err_msg=str(region))
    rng = np.random.default_rng(seed)
    for level, ((width, height), downsample) in enumerate(oracle.levels):
        for size, step in (((256, 256), 256), ((256, 256), 1), ((100, 60), 13)):
            place = rng.integers(-1, np.maximum(1, np.array([width, height]) // step) + 1, (9, 2)) * step
            xy0s = np.rint(place * downsample).astype(np.int64)
            out = np.zeros((9, size[1], size[0], 3), np.uint8)
            assert reader.read_tiles(xy0s, level, size, out) == []
            for xy0, got in zip(xy0s.tolist(), out, strict=True):
                region = (tuple(xy0), level, size)
                np.testing.assert_array_equal(got, oracle.region(region), err_msg=f"tiles {region}")


def file_of(path: Path) -> Path:
    return path / "level-0.dcm" if path.is_dir() else path


@pytest.mark.parametrize("name", WRITTEN)
def test_written_slides(tmp_path: Path, name: str) -> None:
    changes, reader_name = WRITTEN[name]
    if reader_name == "dicom":
        pytest.importorskip("pydicom", reason="the DICOM writer needs pydicom")
    path = write_synth_slide(tmp_path / "slide.svs", **{**PLAIN, **changes})
    with open_slide(path) as reader:
        assert reader.name.split()[0] == reader_name
        check(reader, Oracle(file_of(path)))
    with open_slide(file_of(path), SlideSettings(reader="openslide")) as reader:
        assert reader.name.startswith("openslide")
        check(reader, Oracle(file_of(path)))


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "slideio_test3-DAPI-2-387.ndpi", "ospy_small.svs",
                                  "ospy_boxes.tiff", "ezwsi_multiframe_camelyon.dcm"])  # fmt: skip
@pytest.mark.parametrize("reader_name", [None, "openslide"], ids=["automatic", "openslide"])
def test_real_slides(slides: Path, name: str, reader_name: str | None) -> None:
    with open_slide(slides / name, SlideSettings(mpp=0.5, reader=reader_name)) as reader:
        check(reader, Oracle(slides / name), seed=1)


@pytest.mark.parametrize("name", ["jpeg-420", "jpeg-rgb-240", "deflate", "generic", "mpp-0.2528"])
def test_cucim(tmp_path: Path, name: str) -> None:
    pytest.importorskip("cucim", reason="cuCIM is an optional reader")
    path = write_synth_slide(tmp_path / "slide.svs", **{**PLAIN, **WRITTEN[name][0]})
    with open_slide(path, SlideSettings(reader="cucim")) as reader:
        check(reader, Oracle(path))


def test_every_reader_gives_the_same_features_of_the_slide(tmp_path: Path) -> None:
    """Resolution, levels, flags: what ends up in provenance beside the reader's own name."""
    path = write_synth_slide(tmp_path / "s.svs", **PLAIN, codec="jpeg-rgb", tile=240, mpp=0.2528)
    with open_slide(path) as direct, open_slide(path, SlideSettings(reader="openslide")) as other:
        for fact in ("size0", "levels", "mpp0", "mpp_source", "notes", "background", "icc", "associated", "bounds0"):
            assert getattr(direct, fact) == getattr(other, fact), fact


def test_a_classic_big_endian_tiff_that_openslide_refuses(tmp_path: Path) -> None:
    """OpenSlide 4.0.1 does not open those of any writer. Either an error that says so, or the pixels tifffile reads."""
    path = write_synth_slide(tmp_path / "s.svs", **PLAIN, codec="raw", bigtiff=False, big_endian=True)
    assert openslide.OpenSlide.detect_format(path) is None
    with tifffile.TiffFile(path) as tiff:
        whole = tiff.pages[0].asarray()
    try:
        reader = open_slide(path)
    except SlideError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    with reader:
        np.testing.assert_array_equal(reader.read_region((0, 0), 0, reader.size0), whole)


Damage = Callable[[tifffile.TiffPage, bytearray], None]


def zero_tile(page: tifffile.TiffPage, data: bytearray) -> None:
    offset, count = page.dataoffsets[1], page.databytecounts[1]
    data[offset : offset + count] = bytes(count)


def cut_file(page: tifffile.TiffPage, data: bytearray) -> None:
    del data[page.dataoffsets[1] + 100 :]


def other_size(page: tifffile.TiffPage, data: bytearray) -> None:
    """The tile's own header states half the height."""
    at = data.index(b"\xff\xc0", page.dataoffsets[1])
    data[at + 5 : at + 7] = (128).to_bytes(2, "big")


def far_offset(page: tifffile.TiffPage, data: bytearray) -> None:
    """The second tile lies beyond the end of the file."""
    at = page.tags[324].valueoffset + 8
    data[at : at + 8] = (len(data) + 1000).to_bytes(8, "little")


def huge_count(page: tifffile.TiffPage, data: bytearray) -> None:
    at = page.tags[325].valueoffset + 4
    data[at : at + 4] = (0xFFFFFFF0).to_bytes(4, "little")


@pytest.mark.parametrize("damage", [zero_tile, cut_file, other_size, far_offset, huge_count], ids=lambda f: f.__name__)
@pytest.mark.parametrize("reader_name", [None, "openslide"], ids=["automatic", "openslide"])
def test_a_damaged_tile_is_an_error_that_names_slide_and_place(
    tmp_path: Path, damage: Damage, reader_name: str | None
) -> None:
    """Or OpenSlide's pixels, where OpenSlide reads it all the same. Other tiles stay readable."""
    path = write_synth_slide(tmp_path / "bad.svs", width=1024, height=300, levels=(1,), tissue=0.6)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        damage(tiff.pages[0], data)
    path.write_bytes(data)
    bad = ((256, 0), 0, (256, 256))
    try:
        reader = open_slide(path, SlideSettings(reader=reader_name))
    except SlideError as error:
        assert "bad.svs" in str(error)  # noqa: PT017
        with pytest.raises(openslide.OpenSlideError):
            Oracle(path)
        return
    with reader:
        oracle = Oracle(path)
        try:
            expected = oracle.region(bad)
        except openslide.OpenSlideError:
            with pytest.raises(SlideError, match=r"bad\.svs: .*\(256, 0\)"):
                reader.read_region(*bad)
        else:
            np.testing.assert_array_equal(reader.read_region(*bad), expected)
        good = ((0, 0), 0, (256, 256))
        np.testing.assert_array_equal(reader.read_region(*good), oracle.region(good))


@pytest.mark.parametrize("codec", ["jpeg", "jpeg2000", "raw"])
@pytest.mark.parametrize("reader_name", [None, "openslide"], ids=["automatic", "openslide"])
def test_a_giant_tile_is_an_error_and_no_crash(tmp_path: Path, codec: str, reader_name: str | None) -> None:
    """Two header fields say 2^20 x 2^20: OpenSlide 4.0.1 asks for 4 TB and aborts its process."""
    path = write_synth_slide(tmp_path / "giant.svs", width=700, height=500, levels=(1,), codec=codec)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for tag in (322, 323):
            at = tiff.pages[0].tags[tag].valueoffset
            data[at : at + 4] = (1 << 20).to_bytes(4, "little")
    path.write_bytes(data)
    code = (
        "import sys\nfrom wsi_rt.runtime.config import SlideSettings\nfrom wsi_rt.runtime.errors import SlideError\n"
        "from wsi_rt.runtime.slides import open_slide\n"
        f"try:\n    open_slide(sys.argv[1], SlideSettings(reader={reader_name!r})).read_region((0, 0), 0, (256, 256))\n"
        "except SlideError as error:\n    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr  # this process would have been the one that died
    assert "refused:" in done.stdout
    assert "giant.svs" in done.stdout


def test_malformed_slides_are_refused_in_one_line(tmp_path: Path, slides: Path) -> None:
    whole = (slides / "CMU-1-Small-Region.svs").read_bytes()
    for name, data in {"empty.svs": b"", "header.svs": whole[:8], "text.svs": b"no slide at all\n" * 100}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SlideError) as caught:
            open_slide(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(SlideError, match=r"ospy_unopenable\.tiff"):
        open_slide(slides / "ospy_unopenable.tiff")


def test_a_slide_read_from_many_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = write_synth_slide(tmp_path / "s.svs", **PLAIN, tile=240, codec="jpeg-rgb")
    oracle = Oracle(path)
    wanted = list(regions(oracle, 3, count=20))
    with open_slide(path) as reader, ThreadPoolExecutor(4) as pool:
        for region, got in zip(wanted, pool.map(lambda r: reader.read_region(*r), wanted), strict=True):
            np.testing.assert_array_equal(got, oracle.region(region), err_msg=str(region))


def test_the_specs_are_all_different() -> None:
    specs = [SlideSpec(**{**PLAIN, **changes}) for changes, _ in WRITTEN.values()]
    assert len(set(specs)) == len(specs)


def test_a_slide_in_a_folder_with_an_odd_name(tmp_path: Path, slides: Path) -> None:
    folder = tmp_path / "ü n%20 'x'"
    folder.mkdir()
    path = Path(shutil.copyfile(slides / "CMU-1-Small-Region.svs", folder / "slide α.svs"))
    with open_slide(path) as reader:
        region: Region = ((100, 100), 0, (300, 300))
        np.testing.assert_array_equal(reader.read_region(*region), Oracle(path).region(region))
