"""cuCIM on the CPU against OpenSlide, and what it must not be given. Decoding on a GPU needs one (marked)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import MachineError, SlideError
from wsi_rt.runtime.slides import SlideReader, open_slide
from wsi_rt.runtime.slides.readers.cucim import open_with_cucim

PINNED = SlideSettings(reader="cucim", mpp=0.5)
needs_cucim = pytest.mark.skipif(
    not any((Path(folder) / "cucim").is_dir() for folder in sys.path), reason="cucim-cu12 is not installed"
)
pytest.importorskip("imagecodecs", reason="tifffile writes these slides with imagecodecs")


@pytest.fixture
def pyramid(tmp_path: Path) -> Callable[..., Path]:
    """pyramid(compression, ...) -> a tiled TIFF of two levels; the second's px lie between those of the first."""

    def make(compression: str | None, sizes: tuple[tuple[int, int], ...] = ((700, 500), (233, 166)), **options) -> Path:
        coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        path = tmp_path / f"{compression}.tif"
        with tifffile.TiffWriter(path) as file:
            for level, size in enumerate(sizes):
                level_pixels = np.asarray(Image.fromarray(coarse).resize(size))
                file.write(
                    level_pixels,
                    tile=(256, 256),
                    compression=compression,
                    photometric="rgb",
                    subfiletype=int(level > 0),
                    metadata=None,
                    **options,
                )
        return path

    return make


def check_against_openslide(reader: SlideReader, path: Path, tolerance: float) -> None:
    random = np.random.default_rng(3)
    with openslide.OpenSlide(path) as slide:
        for level, (width, height) in enumerate(slide.level_dimensions):
            for _ in range(12):
                px = random.integers((-40, -40), (width, height))
                xy0 = tuple(int(v) for v in np.rint(px * slide.level_downsamples[level]))
                size = tuple(int(v) for v in random.integers(1, 300, 2))
                rgba = np.asarray(slide.read_region(xy0, level, size)).astype(np.float64)
                alpha = rgba[..., 3:] / 255
                expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
                np.testing.assert_allclose(reader.read_region(xy0, level, size), expected, atol=tolerance, rtol=0)


@needs_cucim
@pytest.mark.parametrize(
    ("compression", "options"),
    [
        ("jpeg", {"compressionargs": {"level": 80, "outcolorspace": "YCbCr"}, "subsampling": (2, 2)}),
        ("jpeg", {"compressionargs": {"level": 80}}),
        (None, {}),
        ("lzw", {}),
    ],
    ids=["jpeg-420", "jpeg-444", "raw", "lzw"],
)
def test_pixels_are_openslides(pyramid: Callable[..., Path], compression: str | None, options: dict) -> None:
    path = pyramid(compression, **options)
    with open_slide(path, PINNED) as reader:
        assert reader.name.startswith("cucim ")
        assert "openslide 4" in reader.name
        check_against_openslide(reader, path, tolerance=1)  # Pillow rounds partly transparent px of the second level


@needs_cucim
def test_aperio(shared_slides: Path) -> None:
    """RGB JPEG without a marker, 240-px tiles, and the associated images."""
    path = shared_slides / "CMU-1-Small-Region.svs"
    with open_slide(path, SlideSettings(reader="cucim")) as reader, openslide.OpenSlide(path) as slide:
        assert reader.mpp0 == 0.499
        check_against_openslide(reader, path, tolerance=0)
        label = np.asarray(slide.associated_images["label"])[..., :3]
        np.testing.assert_array_equal(reader.read_associated("label"), label)


@needs_cucim
def test_a_batch_is_the_same_pixels(shared_slides: Path) -> None:
    """The path of the GPU, decoded on the CPU: its buffers are reused, so a copy that is missed shows here."""
    with open_with_cucim(shared_slides / "CMU-1-Small-Region.svs", SlideSettings()) as reader:
        corners = [(x, y) for y in (0, 300, 2000) for x in (0, 256, 1900)]
        batch = reader._decode(corners, 0, (256, 256))
        again = reader._decode([(50, 60)] * 9, 0, (256, 256))
        for pixels, corner in zip(batch, corners, strict=True):
            np.testing.assert_array_equal(pixels, reader.read_region(corner, 0, (256, 256)))
        assert (again == again[0]).all()


@needs_cucim
@pytest.mark.parametrize(
    ("compression", "options", "message"),
    [
        ("deflate", {"predictor": 2}, "compression 8|compression 32946"),
        ("jpeg2000", {}, "compression|OpenSlide"),
    ],
    ids=["predictor", "jpeg2000"],
)
def test_what_it_would_die_of_or_read_wrongly_is_refused(
    pyramid: Callable[..., Path], compression: str, options: dict, message: str
) -> None:
    path = pyramid(compression, sizes=((300, 200),), **options)
    with pytest.raises(SlideError, match=message):
        open_slide(path, PINNED)


@needs_cucim
def test_other_formats_are_refused_with_the_reason(shared_slides: Path) -> None:
    with pytest.raises(SlideError, match=r"not for the reader cucim: it is a hamamatsu file.*leave out --reader"):
        open_slide(shared_slides / "slideio_test3-DAPI-2-387.ndpi", PINNED)
    with pytest.raises(SlideError, match="not for the reader cucim: OpenSlide does not know it"):
        open_slide(shared_slides / "histolab_broken.svs", PINNED)


def test_it_is_never_chosen_unasked(shared_slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cucim", None)
    with open_slide(shared_slides / "CMU-1-Small-Region.svs") as reader:
        assert "cucim" not in reader.name
    with pytest.raises(MachineError, match="pip install --no-deps cucim-cu12 click lazy-loader"):
        open_with_cucim(shared_slides / "CMU-1-Small-Region.svs", PINNED)


@needs_cucim
def test_without_cupy_the_gpu_says_what_is_missing(shared_slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MachineError, match="pip install cupy-cuda12x"):
        open_with_cucim(shared_slides / "CMU-1-Small-Region.svs", SlideSettings(), device="cuda")
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        open_with_cucim(shared_slides / "CMU-1-Small-Region.svs", SlideSettings(), device="tpu")


@needs_cucim
@pytest.mark.gpu
def test_tiles_decoded_on_a_gpu(shared_slides: Path) -> None:
    """nvJPEG's DCT is its own: within a few grey levels of libjpeg-turbo's, exact outside the slide (white)."""
    cupy = pytest.importorskip("cupy", reason="cuCIM's pixels come from the GPU through cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    path = shared_slides / "CMU-1-Small-Region.svs"
    xy0s = np.array([(0, 0), (300, 400), (2100, 2900), (-100, 50), (5000, 5000)], np.int64)
    out = np.empty((2, len(xy0s), 256, 256, 3), np.uint8)
    for number, device in enumerate(("cpu", "cuda")):
        with open_with_cucim(path, SlideSettings(), device=device) as reader:
            assert reader.read_tiles(xy0s, 0, (256, 256), out[number]) == []
    difference = np.abs(out[0].astype(int) - out[1])
    assert difference.mean() < 1
    assert (out[1, 4] == 255).all()
