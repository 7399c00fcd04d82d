"""DICOM whole-slide images against OpenSlide, region by region; what is refused, and that nothing private travels."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from PIL import Image

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import SlideReader, open_slide

pydicom = pytest.importorskip("pydicom", reason="DICOM slides are written with pydicom")
dicom = pytest.importorskip("wsi_rt.runtime.slides.synth.dicom")

SIZES = ((1000, 700), (500, 350))
TILE = 256


def scene(width: int, height: int, seed: int) -> np.ndarray:
    """u8 [h, w, 3]: smooth colours, so that chroma errors and misplaced px both show."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, codec: str, **options: Any) -> bytes:
    if codec == "raw":
        return pixels.tobytes()
    out = io.BytesIO()
    how: dict[str, dict[str, Any]] = {
        "jpeg": {"format": "JPEG", "quality": 80, "subsampling": 2},
        "jpeg-rgb": {"format": "JPEG", "quality": 80, "subsampling": 0, "keep_rgb": True},
        "jpeg2000": {"format": "JPEG2000", "no_jp2": True, "irreversible": True, "mct": 1},
        "jpeg2000-lossless": {"format": "JPEG2000", "no_jp2": True, "irreversible": False, "mct": 1},
    }
    Image.fromarray(pixels).save(out, **{**how[codec], **options})
    return out.getvalue()


@dataclass
class Series:
    """Writes a series into a folder; borders are padded with grey, which must never show."""

    folder: Path
    codec: str = "jpeg"
    sizes: tuple[tuple[int, int], ...] = SIZES
    holes: frozenset[tuple[int, int, int]] = frozenset()  # (level, col, row)
    associated: tuple[str, ...] = ()
    encoding: dict[str, Any] = field(default_factory=dict)
    writer: dict[str, Any] = field(default_factory=dict)

    def write(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        writer = dicom.DicomWriter(self.folder, self.sizes, TILE, self.codec, mpp=0.25, **self.writer)
        for level, (width, height) in enumerate(self.sizes):
            cols, rows = -(-width // TILE), -(-height // TILE)
            padded = np.full((rows * TILE, cols * TILE, 3), 77, np.uint8)
            padded[:height, :width] = scene(width, height, level)
            for row in range(rows):
                for col in range(cols):
                    if (level, col, row) not in self.holes:
                        tile = padded[row * TILE : (row + 1) * TILE, col * TILE : (col + 1) * TILE]
                        data = encode(np.ascontiguousarray(tile), self.codec, **self.encoding)
                        writer.write_tile(level, col, row, data)
        for number, kind in enumerate(self.associated):
            writer.write_associated(kind, scene(120, 90 + number, number))
        writer.finish()
        writer.close()
        return self.folder


@pytest.fixture
def series(tmp_path: Path) -> Callable[..., Path]:
    """series(codec, ...) -> the folder of a new series."""
    return lambda *args, name="series", **kwargs: Series(tmp_path / name, *args, **kwargs).write()


def on_white(slide: openslide.OpenSlide, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
    rgba = np.asarray(slide.read_region(xy0, level, size)).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def check_against_openslide(reader: SlideReader, path: Path, regions: int = 10, tolerance: int = 0) -> None:
    """Levels, resolution and pixels: random regions of every level, across its borders too, and all tiles."""
    random = np.random.default_rng(7)
    with openslide.OpenSlide(path) as slide:
        assert [(v.width, v.height) for v in reader.levels] == list(slide.level_dimensions)
        assert tuple(v.downsample for v in reader.levels) == slide.level_downsamples
        stated = [float(slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy"]
        assert reader.mpp0 == pytest.approx(sum(stated) / 2, rel=1e-12)
        assert reader.icc == (slide.properties.get("openslide.icc-size", "0") != "0")
        for level, (width, height) in enumerate(slide.level_dimensions):
            for _ in range(regions):
                px = random.integers((-60, -60), (width, height))
                xy0 = tuple(int(v) for v in np.rint(px * slide.level_downsamples[level]))
                size = tuple(int(v) for v in random.integers(1, 400, 2))
                expected = on_white(slide, xy0, level, size)
                np.testing.assert_allclose(reader.read_region(xy0, level, size), expected, atol=tolerance, rtol=0)
        width, height = reader.size0
        xy0s = np.array([(x, y) for y in range(0, height, TILE) for x in range(0, width, TILE)], np.int64)
        out = np.zeros((len(xy0s), TILE, TILE, 3), np.uint8)
        assert reader.read_tiles(xy0s, 0, (TILE, TILE), out) == []
        for pixels, (x, y) in zip(out, xy0s.tolist(), strict=True):
            np.testing.assert_array_equal(pixels, on_white(slide, (x, y), 0, (TILE, TILE)))


CODECS = {"jpeg": "simplejpeg", "jpeg-rgb": "simplejpeg", "jpeg2000": "imagecodecs", "jpeg2000-lossless": "imagecodecs"}


@pytest.mark.parametrize(
    ("codec", "table"),
    [
        *((codec, "basic") for codec in (*CODECS, "raw")),
        *((c, t) for c in ("jpeg", "jpeg2000") for t in ("extended", "none")),
    ],
)
def test_pixels_are_openslides(series: Callable[..., Path], codec: str, table: str) -> None:
    folder = series(codec, writer={"table": table})
    with open_slide(folder) as reader:
        assert reader.name.startswith("dicom ")
        assert CODECS.get(codec, "dicom") in reader.name
        assert reader.ref.provenance.maker == reader.name
        assert reader.mpp_source == "DICOM PixelSpacing"
        assert (reader.notes, reader.associated) == ((), {})
        assert reader.files == (folder / "level-0.dcm", folder / "level-1.dcm")
        check_against_openslide(reader, folder / "level-0.dcm")


def test_frames_stand_where_the_scene_has_them(series: Callable[..., Path]) -> None:
    """The oracle of the oracle: raw pixels are the scene itself."""
    with open_slide(series("raw")) as reader:
        for level, (width, height) in enumerate(SIZES):
            np.testing.assert_array_equal(
                reader.read_region((0, 0), level, (width, height)), scene(width, height, level)
            )


@pytest.mark.parametrize("codec", ["jpeg", "jpeg2000", "raw"])
def test_sparse(series: Callable[..., Path], codec: str) -> None:
    folder = series(codec, holes=frozenset({(0, 1, 1), (1, 0, 0)}), writer={"sparse": True})
    with open_slide(folder) as reader:
        check_against_openslide(reader, folder / "level-0.dcm")
        assert (reader.read_region((TILE, TILE), 0, (TILE, TILE)) == 255).all()


def test_sparse_without_holes_equals_full(series: Callable[..., Path]) -> None:
    full, sparse = series(name="full"), series(name="sparse", writer={"sparse": True})
    with open_slide(full) as a, open_slide(sparse) as b:
        np.testing.assert_array_equal(a.read_region((0, 0), 0, SIZES[0]), b.read_region((0, 0), 0, SIZES[0]))


@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
def test_concatenation(series: Callable[..., Path], sparse: bool) -> None:
    """A level in several instances; one of them missing is an error, never white tissue."""
    folder = series(writer={"frames_per_file": 5, "sparse": sparse})
    parts = sorted(path.name for path in folder.glob("level-0*"))
    assert parts == ["level-0-part-0.dcm", "level-0-part-1.dcm", "level-0-part-2.dcm"]
    with open_slide(folder / parts[1]) as reader:
        check_against_openslide(reader, folder / parts[1])
    for part in parts:
        (folder / part).rename(folder.with_name("away"))
        with pytest.raises(SlideError, match="1000 x 700 px is split into 3 files, of which 2 are there; download"):
            open_slide(folder)
        folder.with_name("away").rename(folder / part)


def test_a_level_whose_px_lie_between(series: Callable[..., Path]) -> None:
    """Sizes that do not divide: OpenSlide interpolates where a region begins between px, and so do we, by it."""
    folder = series(sizes=((1000, 700), (333, 233)))
    with open_slide(folder) as reader:
        assert "openslide 4" in reader.name
        assert reader.levels[1].downsample == pytest.approx(3.0036, abs=1e-4)
        check_against_openslide(reader, folder / "level-0.dcm", tolerance=1)  # Pillow rounds partly transparent px


def test_between_px_without_openslide(series: Callable[..., Path]) -> None:
    """Where OpenSlide would show other colours the nearest px are taken, and that is noted."""
    folder = series("jpeg-rgb", sizes=((1000, 700), (333, 233)))
    with open_slide(folder) as reader:
        interpolated = reader.read_region((301, 202), 1, (150, 90))
        assert reader.notes == ()
    for path in folder.iterdir():
        edit(path, PhotometricInterpretation="YBR_FULL")  # OpenSlide takes YBR_FULL_422 only
    with open_slide(folder) as reader:
        assert reader.read_region((-50, 0), 1, (40, 40)).shape == (40, 40, 3)
        got = reader.read_region((301, 202), 1, (150, 90))
        assert reader.notes == ("regions that begin between px of a level are read from the nearest px",)
        step = reader.levels[1].downsample
        whole = reader.read_region((0, 0), 1, (333, 233))
        x, y = round(301 / step), round(202 / step)
        np.testing.assert_array_equal(got, whole[y : y + 90, x : x + 150])
    assert got.shape == interpolated.shape


def test_any_file_or_the_folder_is_the_same_slide(series: Callable[..., Path]) -> None:
    folder = series(associated=("label",))
    with open_slide(folder) as whole, open_slide(folder / "level-1.dcm") as named:
        assert named.levels == whole.levels
        assert named.ref.provenance.digest == whole.ref.provenance.digest
        np.testing.assert_array_equal(named.read_region((9, 9), 0, (50, 50)), whole.read_region((9, 9), 0, (50, 50)))


def test_the_fingerprint_covers_every_instance(series: Callable[..., Path]) -> None:
    folder = series(associated=("label",))
    with open_slide(folder / "level-0.dcm") as reader:
        before = reader.ref.provenance.digest
    for name in ("level-0.dcm", "level-1.dcm", "label.dcm"):
        intact = (folder / name).read_bytes()
        (folder / name).write_bytes(intact + b"\0\0")
        with open_slide(folder / "level-0.dcm") as reader:
            assert reader.ref.provenance.digest != before
        (folder / name).write_bytes(intact)
    shutil.move(folder, folder.with_name("elsewhere"))
    with open_slide(folder.with_name("elsewhere")) as reader:
        assert reader.ref.provenance.digest == before


def test_associated_images(series: Callable[..., Path]) -> None:
    folder = series(associated=("label", "overview", "thumbnail"))
    with open_slide(folder) as reader, openslide.OpenSlide(folder / "level-0.dcm") as slide:
        assert reader.associated == {"label": (120, 90), "macro": (120, 91), "thumbnail": (120, 92)}
        assert {name: image.size for name, image in slide.associated_images.items()} == reader.associated
        for name, image in slide.associated_images.items():
            np.testing.assert_array_equal(reader.read_associated(name), np.asarray(image)[..., :3])
        assert len(reader.files) == 5


@pytest.mark.parametrize(("file", "what"), [("label", "label"), ("overview", "macro"), ("thumbnail", "thumbnail")])
def test_an_associated_image_is_no_slide(series: Callable[..., Path], file: str, what: str) -> None:
    folder = series(associated=("label", "overview", "thumbnail"))
    with pytest.raises(SlideError, match=rf"{file}\.dcm: is the {what} image of the slide.*; give level-0\.dcm or"):
        open_slide(folder / f"{file}.dcm")


def test_labels_alone_are_no_slide(series: Callable[..., Path]) -> None:
    folder = series(associated=("label",))
    for path in folder.glob("level-*"):
        path.unlink()
    with pytest.raises(SlideError, match=r"series: holds no image of the slide itself, only its label"):
        open_slide(folder)
    with pytest.raises(SlideError, match="give a VOLUME instance"):
        open_slide(folder / "label.dcm")


def test_several_series_in_a_folder_are_listed(series: Callable[..., Path], tmp_path: Path) -> None:
    one, two = series(name="one"), series(name="two", writer={"seed": 1}, sizes=((300, 200),))
    both = tmp_path / "both"
    both.mkdir()
    for prefix, folder in (("a", one), ("b", two)):
        for path in folder.iterdir():
            shutil.copy(path, both / f"{prefix}-{path.name}")
    with pytest.raises(SlideError) as caught:
        open_slide(both)
    assert "holds 2 slides (DICOM series), expected one" in str(caught.value)
    assert "a-level-0.dcm (1000 x 700 px, 2 instances)" in str(caught.value)
    assert "b-level-0.dcm (300 x 200 px, 1 instances)" in str(caught.value)
    with open_slide(both / "b-level-0.dcm") as reader:
        assert reader.size0 == (300, 200)


def test_folders_without_dicom(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(SlideError, match="is a folder, expected a slide file"):
        open_slide(tmp_path)


def test_a_copy_and_a_broken_neighbour(series: Callable[..., Path]) -> None:
    folder = series()
    shutil.copy(folder / "level-1.dcm", folder / "copy.dcm")
    (folder / "broken.dcm").write_bytes((folder / "level-0.dcm").read_bytes()[:300])
    (folder / "notes.txt").write_text("not DICOM: left alone without a word")
    with open_slide(folder / "level-0.dcm") as reader:
        assert len(reader.levels) == 2
        assert reader.notes == ("1 DICOM files of the folder are malformed and were left out: broken.dcm",)
    with pytest.raises(SlideError, match=r"broken\.dcm: the DICOM header is malformed"):
        open_slide(folder)


def test_a_broken_finest_level_never_hides(series: Callable[..., Path]) -> None:
    """OpenSlide leaves an instance out that it cannot parse: the next level would pass for the slide."""
    folder = series()
    data = (folder / "level-0.dcm").read_bytes()
    (folder / "level-0.dcm").write_bytes(data.replace(b"LO\x06\x00wsi-rt", b"LO\x00\x00wsi-rt"))
    for path in (folder, folder / "level-0.dcm", folder / "level-1.dcm"):
        with pytest.raises(SlideError, match=r"level-0\.dcm: the DICOM header is malformed"):
            open_slide(path)


def edit(path: Path, **attributes: Any) -> None:
    """Set attributes of an instance, its frames untouched."""
    instance = pydicom.dcmread(path)
    for keyword, value in attributes.items():
        if value is None:
            delattr(instance, keyword)
        else:
            setattr(instance, keyword, value)
    instance.save_as(path)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"TotalPixelMatrixFocalPlanes": 3}, r"it has 3 focal planes, expected one"),
        ({"NumberOfOpticalPaths": 4}, r"it has 4 optical paths, expected one"),
        ({"SamplesPerPixel": 1}, r"it has 1 samples per pixel \(fluorescence has one\), expected 3: RGB"),
        ({"BitsAllocated": 16, "BitsStored": 12}, r"it has 12 bits per sample in 16, expected 8 in 8"),
        ({"PlanarConfiguration": 1}, r"plane by plane"),
        ({"PhotometricInterpretation": "MONOCHROME2"}, r"declared MONOCHROME2, expected YBR_FULL_422 or"),
        ({"Rows": 9000, "Columns": 9000}, r"frames have 9000 x 9000 px, expected at most"),
        ({"TotalPixelMatrixColumns": 1300}, r"1300 x 700 px has 12 frames in a row, expected 18"),
        ({"TotalPixelMatrixColumns": None}, r"malformed \(TotalPixelMatrixColumns is missing or 0\)"),
        (
            {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]},
            r"of the kind LOCALIZER, not the slide itself",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_is_not_supported_is_named(series: Callable[..., Path], attributes: dict[str, Any], message: str) -> None:
    path = series(sizes=((1000, 700),)) / "level-0.dcm"
    edit(path, **attributes)
    with pytest.raises(SlideError, match=message) as caught:
        open_slide(path)
    assert "level-0.dcm" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("syntax", "told"),
    [
        ("1.2.840.10008.1.2.4.80", "encoded as JPEG-LS"),
        ("1.2.840.10008.1.2.4.70", "encoded as lossless JPEG"),
        ("1.2.840.10008.1.2.5", "run lengths"),
        ("1.2.3.4", "transfer syntax 1.2.3.4"),
        ("1.2.840.10008.1.2.1.99", "deflated"),
    ],
)
def test_other_transfer_syntaxes_are_named(series: Callable[..., Path], syntax: str, told: str) -> None:
    path = series(sizes=((300, 200),)) / "level-0.dcm"
    known = b"1.2.840.10008.1.2.4.50"
    place = path.read_bytes().index(known)
    header = bytearray(path.read_bytes())
    header[place : place + len(known)] = syntax.encode().ljust(len(known), b"\0")[: len(known)]
    path.write_bytes(header)
    with pytest.raises(SlideError, match=told):
        open_slide(path)


def test_two_images_of_one_size_are_refused(series: Callable[..., Path]) -> None:
    """One instance per focal plane or stain channel: no choice is made silently."""
    folder = series(sizes=((300, 200),))
    shutil.copy(folder / "level-0.dcm", folder / "plane-1.dcm")
    edit(folder / "plane-1.dcm", SOPInstanceUID="2.25.7")
    with pytest.raises(SlideError, match=r"another image of 300 x 200 px \(several focal planes"):
        open_slide(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [(1, r"do not lie on a grid of 256 x 256 px"), (-256, r"several frames lie at column 0, row 0"), (4096, "grid")],
    ids=["off-grid", "twice", "outside"],
)
def test_sparse_frames_off_the_grid(series: Callable[..., Path], change: int, message: str) -> None:
    path = series(sizes=((600, 200),), writer={"sparse": True}) / "level-0.dcm"
    instance = pydicom.dcmread(path)
    place = instance.PerFrameFunctionalGroupsSequence[1].PlanePositionSlideSequence[0]
    place.ColumnPositionInTotalImagePixelMatrix += change
    instance.save_as(path)
    with pytest.raises(SlideError, match=message):
        open_slide(path)


def test_resolution_from_the_imaged_volume_or_the_flag(series: Callable[..., Path]) -> None:
    path = series(sizes=((1000, 700),)) / "level-0.dcm"
    edit(path, SharedFunctionalGroupsSequence=None)
    with open_slide(path) as reader:
        assert reader.mpp_source == "DICOM ImagedVolumeWidth"
        assert reader.mpp0 == pytest.approx(0.25, rel=1e-6)
    edit(path, ImagedVolumeWidth=None)
    with pytest.raises(SlideError, match=r"states no resolution \(DICOM PixelSpacing is absent\).*--mpp"):
        open_slide(path)
    with open_slide(path, SlideSettings(mpp=0.5)) as reader:
        assert (reader.mpp0, reader.mpp_source) == (0.5, "--mpp")


def test_levels_that_contradict_their_size_are_noted(series: Callable[..., Path]) -> None:
    folder = series()
    edit(folder / "level-1.dcm", SharedFunctionalGroupsSequence=None, ImagedVolumeWidth=0.5)
    with open_slide(folder) as reader:
        assert reader.notes == ("level 1 states 1 um/px, its size says 0.5; its size is used",)


def test_jpeg2000_declared_transformed_without_a_transform(series: Callable[..., Path]) -> None:
    """Conversions of Aperio's 33003. OpenSlide shows Y, Cb, Cr as R, G, B (its issue 772); the note says what we do."""
    folder = series("jpeg2000", sizes=((256, 256),), encoding={"mct": 0})
    ycc = np.asarray(Image.fromarray(scene(256, 256, 0)).convert("YCbCr"))
    writer = dicom.DicomWriter(folder, ((256, 256),), TILE, "jpeg2000", mpp=0.25)
    writer.write_tile(0, 0, 0, encode(ycc, "jpeg2000", mct=0))
    writer.finish()
    edit(folder / "level-0.dcm", PhotometricInterpretation="YBR_ICT")
    with open_slide(folder) as reader:
        got = reader.read_region((0, 0), 0, (256, 256))
        assert reader.notes == ("JPEG 2000 frames are declared YBR_ICT, but have no colour transform: read as YCbCr",)
    assert np.abs(got.astype(int) - scene(256, 256, 0)).mean() < 1.5


def test_jpeg_declared_rgb_with_subsampled_colours(series: Callable[..., Path]) -> None:
    folder = series("jpeg", sizes=((256, 256),))
    with open_slide(folder) as reader:
        expected = reader.read_region((0, 0), 0, (256, 256))
    edit(folder / "level-0.dcm", PhotometricInterpretation="RGB")
    with open_slide(folder) as reader:
        np.testing.assert_array_equal(reader.read_region((0, 0), 0, (256, 256)), expected)
        assert reader.notes == ("JPEG frames are declared RGB, but their colours are subsampled: read as YCbCr",)


def test_frames_in_several_fragments(series: Callable[..., Path]) -> None:
    """Old writers cut frames into pieces; with and without an offset table."""
    from pydicom.encaps import encapsulate, generate_frames

    path = series(sizes=((600, 200),)) / "level-0.dcm"
    with open_slide(path) as reader:
        expected = reader.read_region((0, 0), 0, (600, 200))
    instance = pydicom.dcmread(path)
    frames = list(generate_frames(instance.PixelData, number_of_frames=3))
    for with_table in (True, False):
        instance.PixelData = encapsulate(frames, fragments_per_frame=3, has_bot=with_table)
        instance.save_as(path)
        with open_slide(path) as reader:
            np.testing.assert_array_equal(reader.read_region((0, 0), 0, (600, 200)), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
def test_extended_table_with_either_kind_of_length(series: Callable[..., Path], padded: bool) -> None:
    """The standard's lengths leave a padding byte out, those of most writers count it."""
    path = series(sizes=((600, 200),), writer={"table": "extended"}) / "level-0.dcm"
    with open_slide(path) as reader:
        expected = reader.read_region((0, 0), 0, (600, 200))
    instance = pydicom.dcmread(path)
    lengths = np.frombuffer(instance.ExtendedOffsetTableLengths, "<u8")
    assert not (lengths % 2).any()
    instance.ExtendedOffsetTableLengths = (lengths - (0 if padded else 1)).tobytes()
    instance.save_as(path)
    with open_slide(path) as reader:
        np.testing.assert_array_equal(reader.read_region((0, 0), 0, (600, 200)), expected)


def test_implicit_types(series: Callable[..., Path]) -> None:
    path = series("raw", sizes=((300, 200),)) / "level-0.dcm"
    instance = pydicom.dcmread(path)
    instance.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    instance.save_as(path, implicit_vr=True, little_endian=True)
    with open_slide(path) as reader:
        np.testing.assert_array_equal(reader.read_region((0, 0), 0, (300, 200)), scene(300, 200, 0))


def test_a_broken_frame_is_named_and_the_others_are_read(series: Callable[..., Path]) -> None:
    path = series(sizes=((1000, 700),)) / "level-0.dcm"
    with open_slide(path) as reader:
        good = reader.read_region((0, 0), 0, (256, 256))
    data = bytearray(path.read_bytes())
    second = data.index(b"\xff\xd8\xff", data.index(b"\xff\xd8\xff") + 3)
    data[second : second + 400] = bytes(400)
    path.write_bytes(data)
    with open_slide(path) as reader:
        np.testing.assert_array_equal(reader.read_region((0, 0), 0, (256, 256)), good)
        with pytest.raises(SlideError, match=r"level-0\.dcm: 256 x 256 px at level 0, level-0 position \(256, 0\)"):
            reader.read_region((256, 0), 0, (256, 256))
        out = np.empty((2, 256, 256, 3), np.uint8)
        failures = reader.read_tiles(np.array([(0, 0), (256, 0)]), 0, (256, 256), out)
        assert [row for row, _ in failures] == [1]
        assert (out[1] == 255).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(series: Callable[..., Path], share: float) -> None:
    path = series(sizes=((1000, 700),)) / "level-0.dcm"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(SlideError, match=r"level-0\.dcm.*intact"):
        open_slide(path)


def test_cut_off_while_open(series: Callable[..., Path]) -> None:
    path = series(sizes=((1000, 700),)) / "level-0.dcm"
    with open_slide(path) as reader:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(SlideError, match=r"position \(768, 512\) cannot be read"):
            reader.read_region((768, 512), 0, (100, 100))


def test_threads_share_a_reader(series: Callable[..., Path]) -> None:
    folder = series("jpeg", sizes=((1000, 700),))
    corners = [(x, y) for y in range(-40, 700, 130) for x in range(-40, 1000, 130)]
    with open_slide(folder) as reader, ThreadPoolExecutor(4) as pool:
        alone = [reader.read_region(corner, 0, (150, 150)) for corner in corners]
        together = pool.map(lambda corner: reader.read_region(corner, 0, (150, 150)), corners * 3)
        for number, pixels in enumerate(together):
            np.testing.assert_array_equal(pixels, alone[number % len(corners)])


PATIENT = {
    "PatientName": "Hidden^Secret",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19010203",
    "AccessionNumber": "ACC-0815",
    "StudyDate": "20200202",
    "InstitutionName": "General Hospital of Nowhere",
}


def test_nothing_private_travels(
    series: Callable[..., Path], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    folder = series(associated=("label",))
    for path in folder.iterdir():
        edit(path, **PATIENT)
    recwarn.clear()
    told = []
    with caplog.at_level(logging.DEBUG):
        with open_slide(folder) as reader:
            reader.read_region((0, 0), 0, (300, 300))
            told.append(repr((reader.ref, reader.notes, reader.name, reader.associated, vars(reader))))
        for broken in (folder / "label.dcm", folder / "level-0.dcm"):
            edit(folder / "level-0.dcm", SamplesPerPixel=1)
            with pytest.raises(SlideError) as caught:
                open_slide(broken)
            told.append(str(caught.value))
    told += [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in recwarn]
    assert [value for value in PATIENT.values() if any(value in text for text in told)] == []


def test_a_patients_name_of_the_wrong_kind_is_not_quoted(series: Callable[..., Path], capfd: Any) -> None:
    """pydicom would warn and quote it."""
    path = series(sizes=((300, 200),)) / "level-0.dcm"
    edit(path, PatientName="Hidden^Secret")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PN\x0e\x00Hidden^Secret", b"UI\x0e\x00Hidden^Secret"))
    with open_slide(path) as reader:
        assert reader.size0 == (300, 200)
    assert "Hidden" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("name", "size", "mpp", "icc"),
    [("ezwsi_multiframe_camelyon.dcm", (1152, 700), 28.9685, False), ("highdicom_sm_image.dcm", (50, 50), 0.499, True)],
)
def test_real_files(shared_slides: Path, name: str, size: tuple[int, int], mpp: float, icc: bool) -> None:
    with open_slide(shared_slides / name) as reader:
        assert reader.name.startswith("dicom ")
        assert (reader.size0, reader.icc, reader.notes) == (size, icc, ())
        assert reader.mpp0 == pytest.approx(mpp)
        check_against_openslide(reader, shared_slides / name)


def test_pinning(series: Callable[..., Path], shared_slides: Path) -> None:
    path = series() / "level-0.dcm"
    with open_slide(path, SlideSettings(reader="openslide")) as theirs, open_slide(path) as ours:
        assert theirs.name.startswith("openslide")
        assert theirs.levels == ours.levels
    with pytest.raises(SlideError, match="not a slide that dicom can read"):
        open_slide(shared_slides / "CMU-1-Small-Region.svs", SlideSettings(reader="dicom"))
