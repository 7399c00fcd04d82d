"""Opening slides, their resolution, and the pixels they give."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import MachineError, SlideError
from wsi_rt.runtime.slides import open_slide
from wsi_rt.runtime.slides.reader import DeclaredMpp, fingerprint, resolve_mpp
from wsi_rt.runtime.slides.synth import write_synth_slide


def on_white(path: Path, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
    """The oracle: OpenSlide's own region, composited on white in floating point."""
    with openslide.OpenSlide(path) as slide:
        rgba = np.asarray(slide.read_region(xy0, level, size)).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def test_aperio_facts(slides: Path) -> None:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        assert re.fullmatch(r"tiff 1 \(simplejpeg 1\..+, openslide 4\..+\)", reader.name)
        assert reader.size0 == (2220, 2967)
        assert [(v.width, v.height, v.downsample) for v in reader.levels] == [(2220, 2967, 1.0)]
        assert (reader.mpp0, reader.mpp_source, reader.notes) == (0.499, "openslide.mpp-x", ())
        assert reader.ref.mpp0 == 0.499
        assert reader.ref.size0 == (2220, 2967)
        assert reader.ref.provenance.maker == reader.name
        assert reader.ref.provenance.settings == SlideSettings().to_json()


def test_nothing_private_travels(slides: Path) -> None:
    """The scanner's user, dates and names in the file's description stay in the file."""
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        carried = repr((reader.ref, reader.notes, reader.name, reader.background))
    assert not [word for word in ("CPAPERIOCS", "12/29/09", "b414003d", "1004486") if word in carried]


@pytest.mark.parametrize(
    ("xy0", "size"),
    [((700, 900), (256, 256)), ((-100, -50), (300, 200)), ((2100, 2900), (256, 256)), ((13, 7), (241, 3))],
    ids=["inside", "top-left", "bottom-right", "odd"],
)
def test_region_is_openslides_on_white(slides: Path, xy0: tuple[int, int], size: tuple[int, int]) -> None:
    path = slides / "CMU-1-Small-Region.svs"
    with open_slide(path) as reader:
        got = reader.read_region(xy0, 0, size)
    assert got.dtype == np.uint8
    assert got.shape == (size[1], size[0], 3)
    np.testing.assert_array_equal(got, on_white(path, xy0, 0, size))


def test_region_of_a_coarser_level(synth: Path) -> None:
    with open_slide(synth) as reader:
        got = reader.read_region((800, 400), 1, (200, 150))
    # at fractional alpha (the last half pixel of a level) Pillow rounds, so 1 grey level
    np.testing.assert_allclose(got, on_white(synth, (800, 400), 1, (200, 150)), atol=1)


def test_outside_is_white(slides: Path) -> None:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        corner = reader.read_region((2220 - 10, 2967 - 20), 0, (64, 64))
        assert (corner[20:] == 255).all()
        assert (corner[:, 10:] == 255).all()
        assert (corner[:20, :10] < 255).any()
        assert (reader.read_region((-500, 90_000), 0, (32, 16)) == 255).all()


def test_dicom(slides: Path) -> None:
    with open_slide(slides / "ezwsi_multiframe_camelyon.dcm") as reader:
        assert reader.size0 == (1152, 700)
        assert reader.mpp0 == pytest.approx(28.9685)
        assert reader.read_region((0, 0), 0, (1152, 700)).std() > 10


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("missing.svs", ["missing.svs", "no such file"]),
        (".", ["holds 2 slides", "ezwsi_multiframe_camelyon.dcm"]),
        ("histolab_broken.svs", ["histolab_broken.svs", "not a slide", "expected SVS"]),
        ("ospy_unopenable.tiff", ["ospy_unopenable.tiff", "cannot be opened", "52479"]),
        ("ospy_boxes.tiff", ["ospy_boxes.tiff", "352.8 um/px", "0.05 to 100", "--mpp"]),
    ],
)
def test_open_errors(slides: Path, name: str, parts: list[str]) -> None:
    with pytest.raises(SlideError) as caught:
        open_slide(slides / name)
    message = str(caught.value)
    assert [p for p in parts if p not in message] == []
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_no_mpp_names_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "plain.tiff"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), tile=(64, 64), photometric="rgb", metadata=None)
    with pytest.raises(SlideError, match=r"states no resolution .*--mpp"):
        open_slide(path)
    with open_slide(path, SlideSettings(mpp=0.25)) as reader:
        assert (reader.mpp0, reader.mpp_source) == (0.25, "--mpp")


def test_empty_file_is_no_slide(tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    with pytest.raises(SlideError, match="not a slide"):
        open_slide(tmp_path / "empty.svs")


def test_mpp_overrides_absurd_and_own(slides: Path) -> None:
    with open_slide(slides / "ospy_boxes.tiff", SlideSettings(mpp=0.5)) as reader:
        assert reader.ref.mpp0 == 0.5
        assert reader.notes == ("--mpp 0.5 replaces the slide's own 352.8 um/px",)
    with open_slide(slides / "CMU-1-Small-Region.svs", SlideSettings(mpp=0.5)) as reader:
        assert (reader.ref.mpp0, reader.notes) == (0.5, ())  # within 5 %: nothing to remark


def resolve(x: float | None, y: float | None, **settings: float) -> tuple[float, str, tuple[str, ...]]:
    return resolve_mpp(Path("s"), DeclaredMpp(x, y, "src"), SlideSettings(**settings))


def test_resolve_mpp() -> None:
    assert resolve(0.25, 0.26) == (pytest.approx(0.255), "src", ())
    for axes in ((None, 0.3), (0.3, None)):
        mpp, _, notes = resolve(*axes)
        assert mpp == 0.3
        assert "one axis only (0.3 um/px), used for both" in notes[0]
    assert resolve(0.05, 0.05)[0] == 0.05
    assert resolve(100.0, 100.0)[0] == 100.0


@pytest.mark.parametrize("bad", [0.0, -0.1, 0.049, 100.5, float("nan"), float("inf")])
def test_an_absurd_mpp_of_either_axis_is_refused(bad: float) -> None:
    """The mean with a good axis may look reasonable."""
    for axes in ((bad, bad), (0.5, bad), (bad, 0.5), (bad, None), (None, bad)):
        with pytest.raises(SlideError, match=r"states .* um/px \(src\), expected 0.05 to 100; .*--mpp"):
            resolve(*axes)
        mpp, source, notes = resolve(*axes, mpp=0.5)
        assert (mpp, source) == (0.5, "--mpp")
        assert "replaces the slide's own" in notes[0]


def test_axes_that_differ_are_refused() -> None:
    assert resolve(0.5, 0.525) == (pytest.approx(0.5125), "src", ())  # 5 % counts as the same
    for axes in ((0.5, 0.526), (0.526, 0.5), (0.25, 0.5)):
        with pytest.raises(SlideError, match=r"x and y resolutions differ \(0\.\d+ x 0\.\d+ um/px, src\).*--mpp"):
            resolve(*axes)
    assert resolve(0.25, 0.5, mpp=0.25) == (0.25, "--mpp", ("--mpp 0.25 replaces the slide's own 0.25 x 0.5 um/px",))


def test_fingerprint_sees_both_ends_and_the_size(tmp_path: Path) -> None:
    mib = 1 << 20
    path = tmp_path / "f"

    def of(data: bytes) -> str:
        path.write_bytes(data)
        return fingerprint(path)

    data = bytearray(3 * mib)
    base = of(data)
    assert base == hashlib.sha256((3 * mib).to_bytes(8, "little") + data[:mib] + data[-mib:]).hexdigest()
    variants = {base, of(b"\1" + data[1:]), of(data[:-1] + b"\1"), of(data + b"\0")}
    assert len(variants) == 4


@pytest.mark.parametrize(("reader", "rereads"), [("tiff", 0), ("openslide", 1)])
def test_a_bad_tile_is_named_and_the_others_stay_readable(tmp_path: Path, reader: str, rereads: int) -> None:
    """OpenSlide's errors latch; neither reader may blame a good region or stop reading."""
    path = write_synth_slide(tmp_path / "s.svs", width=1024, height=512, levels=(1,), tissue=0.6)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[2], page.databytecounts[2]  # column 2, row 0
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    with open_slide(path, SlideSettings(reader=reader)) as slide:
        good = slide.read_region((0, 256), 0, (256, 256))
        with pytest.raises(SlideError, match=r"s\.svs: 256 x 256 px at level 0, level-0 position \(512, 0\)"):
            slide.read_region((512, 0), 0, (256, 256))
        np.testing.assert_array_equal(slide.read_region((0, 256), 0, (256, 256)), good)
        assert slide.rereads == rereads  # OpenSlide's good region met the latched error once


def test_a_file_cut_off_while_open(tmp_path: Path, slides: Path) -> None:
    path = tmp_path / "cut.svs"
    shutil.copyfile(slides / "CMU-1-Small-Region.svs", path)
    path.chmod(0o644)
    with open_slide(path) as reader:
        with path.open("r+b") as file:
            file.truncate(300_000)
        with pytest.raises(SlideError, match=r"cut\.svs: .* position \(1500, 2500\) cannot be read .*intact slide"):
            reader.read_region((1500, 2500), 0, (256, 256))


def test_wrong_use_is_a_value_error(synth: Path) -> None:
    reader = open_slide(synth)
    for xy0, level, size in (((0, 0), 3, (1, 1)), ((0, 0), -1, (1, 1)), ((0, 0), 0, (0, 5))):
        with pytest.raises(ValueError, match="expected"):
            reader.read_region(xy0, level, size)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read_region((0, 0), 0, (1, 1))


def test_without_permission(synth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")  # tests may run as root, whom chmod does not stop

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(SlideError, match=r"small\.svs: cannot be read \(Permission denied\)"):
        open_slide(synth)


def test_without_openslide(synth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(MachineError, match="pip install openslide-python openslide-bin"):
        open_slide(synth)


def test_import_is_light() -> None:
    """OpenSlide, Pillow and the rest load when a slide is opened."""
    code = (
        "import sys, wsi_rt.runtime.slides; "
        "print([m for m in ('openslide', 'PIL', 'tifffile', 'skimage', 'scipy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
