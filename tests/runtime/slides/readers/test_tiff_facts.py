"""What the direct path takes from a TIFF itself, against what OpenSlide states for the same file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import ImageCms

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.slides import SlideReader, open_slide
from wsi_rt.runtime.slides.readers import tiff
from wsi_rt.runtime.slides.readers.tiff import TiffReader
from wsi_rt.runtime.slides.synth import write_synth_slide
from wsi_rt.runtime.slides.worker import WorkerReader

FACTS = ("levels", "size0", "declared_mpp", "mpp0", "mpp_source", "notes", "background", "icc", "associated", "bounds0",
         "files")  # fmt: skip
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
APERIO = "Aperio Image Library v11.2.1 \n400x300 (128x128) JPEG/RGB Q=30"
Directory = tuple[tuple[int, int], dict[str, Any]]  # (w, h) px, tifffile's options


def write(path: Path, *directories: Directory) -> Path:
    """Tiled unless the options say `tile=None`."""
    rng = np.random.default_rng(0)
    with tifffile.TiffWriter(path) as writer:
        for (width, height), options in directories:
            pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
            writer.write(pixels, **{"photometric": "rgb", "tile": (128, 128), "metadata": None, **options})
    return path


def check_alike(path: Path, reader: SlideReader, settings: SlideSettings) -> None:
    assert isinstance(reader, TiffReader)
    pinned = SlideSettings(mpp=settings.mpp, reader="openslide")
    with open_slide(path, pinned) as other:
        for fact in FACTS:
            assert getattr(reader, fact) == getattr(other, fact), fact
        for name in reader.associated:
            np.testing.assert_array_equal(reader.read_associated(name), other.read_associated(name))


REDUCED = {"subfiletype": 1}
PLAIN_STRIPS = {"tile": None, "rowsperstrip": 16}
GENERIC: dict[str, list[Directory]] = {
    "centimetre": [((400, 300), {"resolution": (20000.0, 20000.0), "resolutionunit": "CENTIMETER"})],
    "inch": [((400, 300), {"resolution": (101600.0, 101000.0), "resolutionunit": "INCH"})],
    "thirds": [((400, 300), {"resolution": ((40000, 3), (40001, 3)), "resolutionunit": "CENTIMETER"})],
    "no-unit": [((400, 300), {"resolution": (20000.0, 20000.0), "resolutionunit": "NONE"})],
    "profile": [((400, 300), {"iccprofile": PROFILE})],
    "levels": [((400, 300), {}), ((201, 151), REDUCED), ((100, 75), {**REDUCED, "iccprofile": PROFILE})],
    "levels-unsorted": [((400, 300), {}), ((100, 75), REDUCED), ((200, 150), REDUCED)],
    "other-image": [((400, 300), {}), ((120, 90), {}), ((200, 150), REDUCED), ((64, 64), PLAIN_STRIPS)],
    "described": [((400, 300), {"description": "a slide|MPP = 0.25"})],
}  # fmt: skip
DESCRIPTIONS: dict[str, str] = {
    "plain": f"{APERIO}|AppMag = 20|MPP = 0.4990|Left = 25.69",
    "twice": f"{APERIO}|MPP = 0.4990|MPP = 0.2500",
    "tight": f"{APERIO}|MPP=0.2528",
    "no-mpp": f"{APERIO}|AppMag = 20",
    "other-mpp": f"{APERIO}|xMPP = 3|MPPx = 4",
    "latin-1": f"{APERIO}|User = x|MPP = 0.4990",
}


@pytest.mark.parametrize("name", GENERIC)
def test_generic_tiff(tmp_path: Path, name: str) -> None:
    path, settings = write(tmp_path / "s.tiff", *GENERIC[name]), SlideSettings(mpp=0.5)
    with open_slide(path, settings) as reader:
        check_alike(path, reader, settings)


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_aperios_description(tmp_path: Path, name: str) -> None:
    path, settings = write(tmp_path / "s.svs", ((400, 300), {"description": DESCRIPTIONS[name]})), SlideSettings(mpp=1)
    with open_slide(path, settings) as reader:
        check_alike(path, reader, settings)


@pytest.mark.parametrize("second", ["thumbnail", "level"])
def test_aperios_other_images(tmp_path: Path, second: str) -> None:
    """Told apart by NewSubfileType, not by what their descriptions call them."""
    first = {"description": DESCRIPTIONS["plain"]}
    thumbnail: Directory = ((80, 60), {**PLAIN_STRIPS, **first})
    level: Directory = ((200, 150), first)
    path = write(
        tmp_path / "s.svs",
        ((400, 300), {**first, "iccprofile": PROFILE}),
        *((thumbnail, level) if second == "thumbnail" else (level, thumbnail)),
        ((90, 50), {**PLAIN_STRIPS, "subfiletype": 1, "description": "Aperio Image Library\r\nmacro 90x50"}),
        ((70, 20), {**PLAIN_STRIPS, "subfiletype": 9}),
        ((30, 20), {**PLAIN_STRIPS, "description": "Aperio Image Library\nother 30x20"}),
        ((31, 20), {**PLAIN_STRIPS, "subfiletype": 17}),
    )
    with open_slide(path) as reader:
        assert len(reader.levels) == 2
        assert set(reader.associated) == {"label", "macro", *({"thumbnail"} if second == "thumbnail" else ())}
        check_alike(path, reader, SlideSettings())


@pytest.mark.parametrize("mpp", [0.2280, 0.2528, 0.499])
@pytest.mark.parametrize("format", ["svs", "tiff"])
def test_written_slides(tmp_path: Path, format: str, mpp: float) -> None:
    path = write_synth_slide(tmp_path / "s", width=910, height=671, mpp=mpp, format=format, levels=(1, 4, 16))
    with open_slide(path) as reader:
        check_alike(path, reader, SlideSettings())


@pytest.mark.parametrize(
    "directories",
    [
        [((400, 300), {"description": f"{APERIO}|MPP = 0,4990"})],
        [((400, 300), {"description": f"{APERIO}|MPP = about 0.5"})],
        [((400, 300), {"description": f"{APERIO}|MPP = 0.5"}), ((200, 150), {"photometric": "minisblack", "gray": 1})],
        [((400, 300), {"description": f"{APERIO}|MPP = 0.5"}), ((80, 60), {**PLAIN_STRIPS, "compression": "lzma"})],
    ],
    ids=["comma", "words", "grey-level", "odd-compression"],
)
def test_what_leaves_doubt_openslide_decides(tmp_path: Path, directories: list[Directory]) -> None:
    """It opens the slide or refuses it, as it does alone."""
    path = tmp_path / "s.svs"
    rng = np.random.default_rng(0)
    with tifffile.TiffWriter(path) as writer:
        for (width, height), options in directories:
            shape = (height, width) if options.pop("gray", 0) else (height, width, 3)
            options = {"photometric": "rgb", "tile": (128, 128), "metadata": None, **options}
            writer.write(rng.integers(0, 255, shape, np.uint8), **options)
    answers = []
    for reader_name in (None, "openslide"):
        try:
            with open_slide(path, SlideSettings(mpp=0.5, reader=reader_name)) as reader:
                assert isinstance(reader, WorkerReader)
                answers.append([getattr(reader, fact) for fact in FACTS])
        except Exception as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


def test_a_plain_slide_starts_no_process(synth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a region between px does."""
    started = []
    real = tiff.open_with
    monkeypatch.setattr(tiff, "open_with", lambda *arguments: started.append(arguments[0]) or real(*arguments))
    with open_slide(synth) as reader:
        reader.read_region((0, 0), 0, (300, 300))
        assert started == []
        expected = reader.read_region((3, 5), 1, (100, 100))
        reader.read_region((3, 5), 1, (50, 50))
        assert started == ["openslide"]
    with open_slide(synth, SlideSettings(reader="openslide")) as other:
        np.testing.assert_array_equal(other.read_region((3, 5), 1, (100, 100)), expected)


def test_the_worker_imports_no_engine() -> None:
    import subprocess

    code = (
        "import sys, wsi_rt.runtime.slides.worker_main, wsi_rt.runtime.slides.readers.openslide; "
        "print([m for m in ('torch', 'onnxruntime', 'onnx', 'tokenizers', 'imagecodecs', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
