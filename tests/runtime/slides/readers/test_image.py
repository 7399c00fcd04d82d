"""Plain images: the px that Pillow decodes, on white, with a resolution from the flag only."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import open_slide
from wsi_rt.runtime.slides.readers import image as image_reader

AT = SlideSettings(mpp=0.5)
FORMATS = {"png": {}, "jpg": {"quality": 90}, "tif": {}, "tiff": {"compression": "tiff_lzw"}}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((301, 203)))


@pytest.mark.parametrize("suffix", FORMATS)
def test_pixels(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"roi.{suffix}"
    Image.fromarray(pixels).save(path, dpi=(300, 300), **FORMATS[suffix])
    stored = np.asarray(Image.open(path))
    framed = np.full((203 + 60, 301 + 60, 3), 255, np.uint8)
    framed[30:-30, 30:-30] = stored
    with open_slide(path, AT) as reader:
        assert reader.name.startswith("pillow ")
        assert [(v.width, v.height, v.downsample) for v in reader.levels] == [(301, 203, 1.0)]
        assert (reader.mpp0, reader.mpp_source, reader.notes) == (0.5, "--mpp", ())
        np.testing.assert_array_equal(reader.read_region((-30, -30), 0, (361, 263)), framed)
        np.testing.assert_array_equal(reader.read_region((7, 11), 0, (50, 40)), stored[11:51, 7:57])
        assert (reader.read_region((301, 0), 0, (5, 5)) == 255).all()
        assert (reader.read_region((-900, -900), 0, (5, 5)) == 255).all()


@pytest.mark.parametrize("suffix", FORMATS)
def test_print_resolution_is_no_resolution(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    Image.fromarray(pixels).save(tmp_path / f"roi.{suffix}", dpi=(300, 300))
    with pytest.raises(SlideError, match=r"states no resolution .*--mpp"):
        open_slide(tmp_path / f"roi.{suffix}")


def test_transparent_is_white(tmp_path: Path, pixels: np.ndarray) -> None:
    alpha = np.zeros(pixels.shape[:2], np.uint8)
    alpha[:, 100:] = 255
    Image.fromarray(np.dstack([pixels, alpha])).save(tmp_path / "rgba.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    keyed = Image.new("RGB", (8, 8), (1, 2, 3))
    keyed.putpixel((5, 5), (9, 9, 9))
    keyed.save(tmp_path / "key.png", transparency=(1, 2, 3))
    with open_slide(tmp_path / "rgba.png", AT) as reader:
        got = reader.read_region((0, 0), 0, (301, 203))
    assert (got[:, :100] == 255).all()
    np.testing.assert_array_equal(got[:, 100:], pixels[:, 100:])
    with open_slide(tmp_path / "palette.png", AT) as reader:
        got = reader.read_region((0, 0), 0, (8, 8))
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[1, 1].tolist() == [200, 100, 50]
    with open_slide(tmp_path / "key.png", AT) as reader:
        got = reader.read_region((0, 0), 0, (8, 8))
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[5, 5].tolist() == [9, 9, 9]


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "CMYK", "1"])
def test_other_kinds_are_named(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 8)).save(path)
    with pytest.raises(SlideError, match=rf"image of the kind {mode} .*expected RGB"):
        open_slide(path, AT)


def test_a_turned_image_is_remarked(tmp_path: Path, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    with open_slide(tmp_path / "turned.jpg", AT) as reader:
        assert "EXIF orientation" in reader.notes[0]
        assert reader.size0 == (301, 203)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tiffinfo": {270: "Aperio Image Library v11.2.1 46000x32914"}}, "aperio"),
        ({"tiffinfo": {271: "Hamamatsu"}}, "hamamatsu"),
        ({"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}, "2 pages"),
        ({"tiffinfo": {65421: 1}}, "Hamamatsu's tags"),
    ],
    ids=["aperio", "hamamatsu", "pages", "private"],
)
def test_a_damaged_slide_is_no_plain_image(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, object], told: str
) -> None:
    """Its first page would pass for the slide, at another geometry."""
    Image.fromarray(pixels).save(tmp_path / "slide.tif", **options)
    with pytest.raises(SlideError, match=rf"is a TIFF with .*{told}.*download it again"):
        image_reader.open_image(tmp_path / "slide.tif", AT)


def test_a_tiled_tiff_is_no_plain_image(tmp_path: Path, pixels: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "tiled.tif", pixels, tile=(64, 64), photometric="rgb", metadata=None)
    with pytest.raises(SlideError, match="is a TIFF with tiles, but no slide that can be read"):
        image_reader.open_image(tmp_path / "tiled.tif", AT)


def test_an_icc_profile_is_recorded(tmp_path: Path, pixels: np.ndarray) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "icc.png", icc_profile=profile)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    with open_slide(tmp_path / "icc.png", AT) as with_icc, open_slide(tmp_path / "plain.png", AT) as without:
        assert (with_icc.icc, without.icc) == (True, False)


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    out = io.BytesIO()
    path = tmp_path / f"roi.{suffix}"
    Image.fromarray(pixels).save(out, {"png": "PNG", "jpg": "JPEG"}.get(suffix, "TIFF"))
    path.write_bytes(out.getvalue()[: len(out.getvalue()) // 2])
    with pytest.raises(SlideError, match=rf"roi\.{suffix}: (cannot be read .*intact image|not a slide)"):
        open_slide(path, AT)


def png_of(width: int, height: int) -> bytes:
    """A PNG that states a size, with no px behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(9460, 9460), (12_000, 12_000), (60_000, 60_000)])
def test_bombs_are_refused_by_their_header(tmp_path: Path, width: int, height: int, recwarn: object) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    with pytest.raises(SlideError, match=r"bomb\.png: has .*px, expected at most 89478485 .*vips tiffsave"):
        open_slide(tmp_path / "bomb.png", AT)
    assert not list(recwarn)  # type: ignore[call-overload]
    assert width * height > image_reader.MAX_PX


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of one process")
def test_memory_of_the_largest_image(tmp_path: Path) -> None:
    """The bound that the docstring states, measured: 4 bytes per px; 10 for a progressive JPEG while it is decoded."""
    path = tmp_path / "large.jpg"
    edge = 9_459
    Image.new("RGB", (edge, edge), (200, 150, 180)).save(path, progressive=True, subsampling=0)
    code = f"""
from pathlib import Path
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.slides import open_slide
with open_slide({str(path)!r}, SlideSettings(mpp=0.5)) as reader:
    reader.read_region((0, 0), 0, (256, 256))
status = Path("/proc/self/status").read_text().split()  # ru_maxrss would be that of the process that started this one
print(int(status[status.index("VmHWM:") + 1]) << 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * edge * edge + (150 << 20)


def test_only_when_no_other_reader_knows_the_file(shared_slides: Path, tmp_path: Path) -> None:
    with open_slide(shared_slides / "CMU-1-Small-Region.svs") as reader:
        assert not reader.name.startswith("pillow")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(SlideError, match="not a slide"):
        open_slide(tmp_path / "text.png", AT)
