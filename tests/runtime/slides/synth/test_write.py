"""Synthetic slides: deterministic, readable by others, streamed, and nothing left when stopped."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import InputError, MachineError, SlideError
from wsi_rt.runtime.slides import find_tissue, open_slide, plan_reads, select_tiles
from wsi_rt.runtime.slides.synth import CODECS, SlideSpec, write_synth_slide
from wsi_rt.runtime.slides.synth.stain import TissuePainter
from wsi_rt.runtime.slides.synth.tiff import CLASSIC_LIMIT, PyramidWriter


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    small = {"width": 700, "height": 520, "tissue": 0.5}
    first = write_synth_slide(tmp_path / "a.svs", seed=7, **small).read_bytes()
    again = write_synth_slide(tmp_path / "b.svs", seed=7, **small).read_bytes()
    other = write_synth_slide(tmp_path / "c.svs", seed=8, **small).read_bytes()
    assert first == again
    assert first != other


def test_defaults_keep_their_bytes(tmp_path: Path) -> None:
    """What earlier versions wrote. Another Pillow or numpy may code otherwise: then both numbers change together."""
    given = {"width": 1100, "height": 700, "mpp": 0.2528}
    data = write_synth_slide(tmp_path / "s.svs", **given).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == (58696, "926afe8b441766a8")
    assert write_synth_slide(tmp_path / "t.svs", **given, threads=3).read_bytes() == data


@pytest.mark.parametrize("layout", [{}, {"bigtiff": False}, {"big_endian": True}], ids=["big", "classic", "big-endian"])
@pytest.mark.parametrize(
    ("format", "codec"), [(f, c) for f in ("svs", "tiff") for c in CODECS if f == "svs" or "2000" not in c]
)
def test_opens_with_its_resolution(tmp_path: Path, format: str, codec: str, layout: dict) -> None:
    made = {"width": 1100, "height": 700, "mpp": 0.2528, "codec": codec, "format": format, **layout}
    path = write_synth_slide(tmp_path / "s.tif", **made)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == {"svs": "aperio", "tiff": "generic-tiff"}[format]
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.2528, rel=1e-5)
        assert slide.level_dimensions == ((1100, 700), (275, 175), (68, 43))
        np.asarray(slide.read_region((0, 0), 2, (68, 43)))
    with open_slide(path) as reader:
        assert (reader.mpp0, reader.size0) == (0.2528, (1100, 700))


@pytest.mark.parametrize(("tile", "levels"), [(256, (1, 4, 16)), (240, (1, 2, 4)), (128, (1,))])
def test_pyramid_is_the_box_average(tmp_path: Path, tile: int, levels: tuple[int, ...]) -> None:
    """Read by tifffile: level 0 is what the painter paints, each other level the mean of the one above."""
    path = write_synth_slide(
        tmp_path / "s.svs", width=1501, height=1030, tile=tile, levels=levels, codec="raw", tissue=0.5, seed=1
    )
    with tifffile.TiffFile(path) as tiff:
        arrays = [page.asarray() for page in tiff.pages]
    assert [a.shape for a in arrays] == [(1030 // d, 1501 // d, 3) for d in levels]
    np.testing.assert_array_equal(arrays[0], TissuePainter(1501, 1030, 0.5, 1, 0.5).paint(0, 0, 1501, 1030))
    for finer, coarser, step in zip(arrays, arrays[1:], np.divide(levels[1:], levels[:-1]).astype(int), strict=False):
        height, width = coarser.shape[:2]
        blocks = finer[: height * step, : width * step].astype(np.float64).reshape(height, step, width, step, 3)
        np.testing.assert_allclose(coarser, blocks.mean(axis=(1, 3)), atol=0.51)


def test_looks_like_tissue_on_glass(synth: Path) -> None:
    with open_slide(synth) as reader:
        mask = find_tissue(reader)
        grid = select_tiles(plan_reads(reader, SlideSettings()), mask)
        whole = reader.read_region((0, 0), 0, reader.size0).astype(np.float64)
    assert 0.15 < mask.foreground.mean() < 0.45
    assert 0.2 < len(grid) / grid.cells < 0.9
    full = np.kron(mask.foreground, np.ones((16, 16), bool))[: whole.shape[0], : whole.shape[1]]
    glass, tissue = whole[: full.shape[0], : full.shape[1]][~full], whole[: full.shape[0], : full.shape[1]][full]
    assert np.median(glass) > 235
    red, green, blue = np.median(tissue, axis=0)
    assert green < blue < red  # pink
    nuclei = (tissue[:, 0] < 170) & (tissue[:, 2] > tissue[:, 0])  # blue-violet
    assert 0.02 < nuclei.mean() < 0.4


def test_share_of_tissue_is_what_was_asked(tmp_path: Path) -> None:
    shares = []
    for tissue in (0.1, 0.4):
        path = write_synth_slide(tmp_path / f"{tissue}.svs", width=4096, height=3072, tissue=tissue)
        with open_slide(path) as reader:
            shares.append(find_tissue(reader).foreground.mean())
    assert shares == [pytest.approx(0.1, abs=0.05), pytest.approx(0.4, abs=0.08)]


def test_blank_slide_has_no_tissue(tmp_path: Path) -> None:
    path = write_synth_slide(tmp_path / "blank.svs", width=1024, height=768, tissue=0)
    with open_slide(path) as reader, pytest.raises(SlideError, match="no tissue"):
        find_tissue(reader)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_nothing_left_when_stopped(tmp_path: Path, stop: type[BaseException]) -> None:
    path = tmp_path / "s.svs"
    path.write_bytes(b"an older file")

    def on_progress(done: int, total: int) -> None:
        assert total == 12
        if done == 5:
            raise stop

    with pytest.raises(stop):
        write_synth_slide(path, width=1024, height=768, on_progress=on_progress)
    assert [p.name for p in tmp_path.iterdir()] == ["s.svs"]
    assert path.read_bytes() == b"an older file"


def test_disk_full_is_an_environment_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(self: object, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PyramidWriter, "write_tile", no_space)
    with pytest.raises(MachineError, match=r"no room to write .*s\.svs \(No space left.*free disk space"):
        write_synth_slide(tmp_path / "s.svs", width=300, height=300)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_tiles(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_synth_slide(tmp_path / "s.svs", width=600, height=300, on_progress=lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"height": 2_000_000}, "height is 2000000"),
        ({"mpp": 0.01}, "mpp is 0.01"),
        ({"tile": 100}, "tile is 100"),
        ({"tissue": 1.5}, "tissue is 1.5"),
        ({"codec": "webp"}, "codec is 'webp'"),
        ({"format": "png"}, "format is 'png'"),
        ({"subsampling": "4:1:1"}, "subsampling is '4:1:1'"),
        ({"format": "tiff", "codec": "jpeg2000"}, "JPEG 2000 is Aperio's"),
        ({"format": "dicom", "big_endian": True}, "format is 'dicom', expected svs or tiff"),
        ({"format": "dicom", "codec": "lzw"}, "codec is 'lzw', expected jpeg"),
        ({"predictor": True}, "predictor is 'jpeg', expected deflate or lzw"),
        ({"shared_tables": True, "codec": "raw"}, "shared_tables is 'raw', expected codec jpeg"),
        ({"levels": ()}, "levels"),
        ({"levels": (2, 4)}, "levels"),
        ({"levels": (1, 3)}, "levels"),
        ({"levels": (1, 4, 4)}, "levels"),
        ({"levels": (1, 4, 6)}, "levels"),
    ],
)
def test_bad_arguments(tmp_path: Path, bad: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_synth_slide(tmp_path / "s.svs", **bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("predictor", [False, True], ids=["plain", "predictor"])
@pytest.mark.parametrize("codec", ["deflate", "lzw", "raw"])
def test_lossless_codecs_keep_every_pixel(tmp_path: Path, codec: str, predictor: bool) -> None:
    """Read by tifffile, a big-endian classic TIFF: OpenSlide 4.0.1 does not open those."""
    spec = {"width": 700, "height": 500, "tissue": 0.6, "seed": 2}
    layout = {"codec": codec, "predictor": predictor and codec != "raw", "bigtiff": False, "big_endian": True}
    path = write_synth_slide(tmp_path / "s.tif", **spec, **layout, format="tiff")
    with tifffile.TiffFile(path) as tiff:
        assert (tiff.byteorder, tiff.is_bigtiff) == (">", False)
        pixels = tiff.pages[0].asarray()
    np.testing.assert_array_equal(pixels, TissuePainter(700, 500, 0.5, 2, 0.6).paint(0, 0, 700, 500))


@pytest.mark.parametrize(
    ("choice", "most"),
    # mean error in grey levels; a decoder that takes R, G, B for Y, Cb, Cr is 60 or more off
    [({"codec": "jpeg-rgb"}, 1.8), ({"codec": "jpeg2000"}, 1.5), ({"codec": "jpeg2000-ycc"}, 1.7)]
    + [({"subsampling": s, "shared_tables": t}, 2.2) for s in ("4:4:4", "4:2:2", "4:2:0") for t in (False, True)],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_lossy_codecs_keep_the_colours(tmp_path: Path, choice: dict, most: float) -> None:
    path = write_synth_slide(tmp_path / "s.svs", width=700, height=500, tissue=0.6, **choice)
    with openslide.OpenSlide(path) as slide:
        pixels = np.asarray(slide.read_region((0, 0), 0, (700, 500)))[..., :3]
    want = TissuePainter(700, 500, 0.5, 0, 0.6).paint(0, 0, 700, 500)
    assert np.abs(pixels.astype(int) - want).mean() < most


def test_rgb_jpeg_is_as_aperio_writes_it(tmp_path: Path, slides: Path) -> None:
    """Neither an Adobe nor a JFIF marker, components 0, 1, 2, tables in the directory: as in the real slide."""

    def first_tile(path: Path) -> tuple[bytes, bytes, int]:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            tiff.filehandle.seek(page.dataoffsets[0])
            return tiff.filehandle.read(page.databytecounts[0]), page.tags[347].value, int(page.photometric)

    real = first_tile(slides / "CMU-1-Small-Region.svs")
    ours = first_tile(write_synth_slide(tmp_path / "s.svs", width=480, height=480, tile=240, codec="jpeg-rgb"))
    scan = real[0].index(b"\xff\xda")
    assert ours[0][: scan + 14] == real[0][: scan + 14]  # frame and scan headers
    assert len(ours[1]) == len(real[1])
    assert ours[2] == real[2] == 2


@pytest.mark.parametrize("codec", ["jpeg", "jpeg-rgb", "jpeg2000", "raw"])
@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
def test_dicom_series(tmp_path: Path, codec: str, sparse: bool) -> None:
    """OpenSlide opens the folder's instances as one slide, with the same pixels as the TIFF of the same spec."""
    pytest.importorskip("pydicom", reason="the DICOM writer needs pydicom")
    spec = {"width": 900, "height": 700, "mpp": 0.25, "tissue": 0.4, "codec": codec, "sparse": sparse}
    folder = write_synth_slide(tmp_path / "series", **spec, format="dicom")
    assert sorted(p.name for p in folder.iterdir()) == ["level-0.dcm", "level-1.dcm", "level-2.dcm"]
    tiff = write_synth_slide(tmp_path / "s.svs", **spec)
    with openslide.OpenSlide(folder / "level-0.dcm") as slide, openslide.OpenSlide(tiff) as same:
        assert slide.level_dimensions == same.level_dimensions == ((900, 700), (225, 175), (56, 43))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        for level, size in enumerate(slide.level_dimensions[:1] if sparse else slide.level_dimensions):
            ours, theirs = (np.asarray(s.read_region((0, 0), level, size)).astype(int) for s in (slide, same))
            covered = (ours[..., 3] == 255) & (theirs[..., 3] == 255)  # sparse: glass is transparent
            assert covered.mean() > 0.4
            np.testing.assert_array_equal(ours[covered], theirs[covered])


def test_dicom_replaces_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="the DICOM writer needs pydicom")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "a").write_bytes(b"x")
    with pytest.raises(InputError, match="new or empty folder"):
        write_synth_slide(taken, format="dicom")

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synth_slide(tmp_path / "new", format="dicom", on_progress=stop)
    assert list(tmp_path.iterdir()) == [taken]


def test_a_sparse_slide_leaves_glass_out(tmp_path: Path) -> None:
    spec = {"width": 3000, "height": 2000, "tissue": 0.2, "seed": 5}
    with tifffile.TiffFile(write_synth_slide(tmp_path / "s.svs", **spec, sparse=True)) as tiff:
        counts = np.array(tiff.pages[0].databytecounts)
    with tifffile.TiffFile(write_synth_slide(tmp_path / "d.svs", **spec)) as tiff:
        glass = np.array(tiff.pages[0].databytecounts)
    assert 10 < (counts == 0).sum() < len(counts)
    assert len(set(glass[counts == 0])) == 1
    np.testing.assert_array_equal(counts[counts > 0], glass[counts > 0])


def test_a_classic_tiff_ends_at_4_gib(tmp_path: Path) -> None:
    class Far(io.BytesIO):
        def tell(self) -> int:
            return CLASSIC_LIMIT - 10

    writer = PyramidWriter(Far(), SlideSpec(bigtiff=False), None)
    with pytest.raises(InputError, match=r"4 GiB.*--bigtiff"):
        writer.write_tile(0, 0, 0, bytes(10))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="existing folder"):
        write_synth_slide(tmp_path / "nowhere" / "s.svs")


def test_the_command_writes_what_it_is_asked_for(tmp_path: Path, wsi_rt: Callable) -> None:
    path = tmp_path / "s.svs"
    flags = {"--width": 700, "--height": 500, "--mpp": 0.25, "--codec": "lzw", "--tile-size": 240, "--levels": "1,4",
             "--tissue": 0.5, "--seed": 3}  # fmt: skip
    result = wsi_rt("synth-slide", "--out", path, "--no-bigtiff", *(word for pair in flags.items() for word in pair))
    assert (result.code, result.out) == (0, f"{path}\n")
    same = {"width": 700, "height": 500, "mpp": 0.25, "codec": "lzw", "tile": 240, "levels": (1, 4), "tissue": 0.5}
    want = write_synth_slide(tmp_path / "t.svs", **same, seed=3, bigtiff=False)
    assert path.read_bytes() == want.read_bytes()
