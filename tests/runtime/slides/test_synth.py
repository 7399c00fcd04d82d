"""Synthetic slides: deterministic, readable by others, streamed, and nothing left when stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import InputError, MachineError, SlideError
from wsi_rt.runtime.slides import find_tissue, open_slide, plan_reads, select_tiles, write_synth_slide
from wsi_rt.runtime.slides import synth as synth_module
from wsi_rt.runtime.slides.stain import TissuePainter


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    small = {"width": 700, "height": 520, "tissue": 0.5}
    first = write_synth_slide(tmp_path / "a.svs", seed=7, **small).read_bytes()
    again = write_synth_slide(tmp_path / "b.svs", seed=7, **small).read_bytes()
    other = write_synth_slide(tmp_path / "c.svs", seed=8, **small).read_bytes()
    assert first == again
    assert first != other


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "deflate", "none"])
def test_opens_with_its_resolution(tmp_path: Path, compression: str) -> None:
    path = write_synth_slide(tmp_path / "s.svs", width=1100, height=700, mpp=0.2528, compression=compression)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.2528
        assert slide.level_dimensions == ((1100, 700), (275, 175), (68, 43))
        np.asarray(slide.read_region((0, 0), 2, (68, 43)))
    with open_slide(path) as reader:
        assert (reader.mpp0, reader.size0) == (0.2528, (1100, 700))


@pytest.mark.parametrize(("tile", "levels"), [(256, (1, 4, 16)), (240, (1, 2, 4)), (128, (1,))])
def test_pyramid_is_the_box_average(tmp_path: Path, tile: int, levels: tuple[int, ...]) -> None:
    """Read by tifffile: level 0 is what the painter paints, each other level the mean of the one above."""
    path = write_synth_slide(
        tmp_path / "s.svs", width=1501, height=1030, tile=tile, levels=levels, compression="none", tissue=0.5, seed=1
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

    monkeypatch.setattr(synth_module.PyramidWriter, "write_tile", no_space)
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
        ({"compression": "webp"}, "compression is 'webp'"),
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


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="existing folder"):
        write_synth_slide(tmp_path / "nowhere" / "s.svs")
