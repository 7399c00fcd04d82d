"""Tile geometry, against values worked out by hand from SPEC 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import SlideReader, open_slide, plan_reads

Make = Callable[..., SlideReader]

# mpp0, downsamples, target -> level, patch_size_level0, read_px, resample
CASES = {
    "20x": ((0.5, (1,), 0.5), (0, 256, 256, False)),
    "20x-aperio": ((0.499, (1, 4, 16), 0.5), (0, 256, 256, False)),
    "40x-one-level": ((0.25, (1,), 0.5), (0, 512, 512, True)),
    "40x-with-20x-level": ((0.25, (1, 2, 4), 0.5), (1, 512, 256, False)),
    "40x-aperio": ((0.25, (1, 4, 16), 0.5), (0, 512, 512, True)),
    "0.2528-one-level": ((0.2528, (1, 4), 0.5), (0, 506, 506, True)),
    "0.2528-with-level": ((0.2528, (1, 2, 4), 0.5), (1, 512, 256, False)),
    "0.228-ndpi": ((0.2281750559, (1, 2, 4, 8), 0.5), (1, 561, 281, True)),
    "odd-downsample": ((0.1252, (1, 4.0003), 0.5), (1, 1024, 256, False)),
    "5-percent-coarser": ((0.525, (1,), 0.5), (0, 256, 256, False)),
    "5-percent-finer": ((0.475, (1,), 0.5), (0, 256, 256, False)),
    "6-percent-finer": ((0.47, (1,), 0.5), (0, 272, 272, True)),
    "nearest-of-two": ((0.48, (1, 1.06), 0.5), (1, 271, 256, False)),
    "own-resolution": ((28.9685, (1,), 28.97), (0, 256, 256, False)),
    "target-1": ((0.25, (1, 2, 4), 1.0), (2, 1024, 256, False)),
    "target-0.8": ((0.25, (1, 2, 4), 0.8), (1, 819, 410, True)),
}


@pytest.mark.parametrize(("given", "expected"), CASES.values(), ids=CASES.keys())
def test_level_and_tile(level_slide: Make, given: tuple, expected: tuple) -> None:
    mpp0, downsamples, target = given
    reader = level_slide(10_000, 7_000, mpp0, downsamples)
    plan = plan_reads(reader, SlideSettings(target_mpp=target))
    assert (plan.level, plan.patch_size_level0, plan.read_px, plan.resample) == expected
    assert plan.mpp_read == pytest.approx(mpp0 * downsamples[plan.level])
    assert plan.downsample == downsamples[plan.level]


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((2220, 2967), (9, 12)),
        ((2304, 2816), (9, 11)),
        ((2305, 2817), (10, 12)),
        ((16, 16), (1, 1)),
        ((1, 257), (1, 2)),
    ],
)
def test_grid_covers_the_slide(level_slide: Make, size: tuple[int, int], grid: tuple[int, int]) -> None:
    plan = plan_reads(level_slide(*size, 0.5), SlideSettings())
    assert (plan.cols, plan.rows) == grid
    assert plan.cells == grid[0] * grid[1]


def test_step_is_the_integer_tile(level_slide: Make) -> None:
    """0.2528 um/px: 506 px and not 506.33, so 1,000 columns do not drift."""
    plan = plan_reads(level_slide(506_000, 507, 0.2528), SlideSettings())
    assert (plan.patch_size_level0, plan.cols, plan.rows) == (506, 1000, 2)


def test_coarser_than_the_target(level_slide: Make) -> None:
    reader = level_slide(1000, 600, 1.0)
    with pytest.raises(SlideError) as caught:
        plan_reads(reader, SlideSettings())
    for part in ("1 um/px", "expected 0.5", "--target-mpp 1", "--allow-upsample"):
        assert part in str(caught.value)
    with pytest.raises(SlideError, match="--allow-upsample"):
        plan_reads(level_slide(1000, 600, 0.5255), SlideSettings())


def test_allow_upsample(level_slide: Make) -> None:
    plan = plan_reads(level_slide(1000, 600, 1.0, (1, 2)), SlideSettings(allow_upsample=True))
    assert (plan.level, plan.patch_size_level0, plan.read_px, plan.resample) == (0, 128, 128, True)
    assert (plan.cols, plan.rows) == (8, 5)


def test_allow_upsample_changes_nothing_when_not_needed(level_slide: Make) -> None:
    reader = level_slide(1000, 600, 0.25)
    assert plan_reads(reader, SlideSettings(allow_upsample=True)) == plan_reads(reader, SlideSettings())


def test_a_tile_below_one_pixel(level_slide: Make) -> None:
    with pytest.raises(SlideError, match=r"smaller than one pixel.*--target-mpp 60"):
        plan_reads(level_slide(1000, 600, 60), SlideSettings(target_mpp=0.1, allow_upsample=True))


def test_a_tile_that_would_not_fit_memory(level_slide: Make) -> None:
    with pytest.raises(SlideError, match=r"needs 51200 x 51200 px of level 0.*--target-mpp 7.92 or less"):
        plan_reads(level_slide(100_000, 100_000, 0.25), SlideSettings(target_mpp=50))
    assert plan_reads(level_slide(100_000, 100_000, 0.25), SlideSettings(target_mpp=8)).read_px == 8192


@pytest.mark.parametrize("mpp", [0.2499, 0.2312, 0.0521, 1.5702])
def test_the_advised_target_fits_memory(level_slide: Make, mpp: float) -> None:
    reader = level_slide(100_000, 100_000, mpp)
    with pytest.raises(SlideError) as caught:
        plan_reads(reader, SlideSettings(target_mpp=99))
    advised = float(str(caught.value).split("--target-mpp ")[1].split()[0])
    assert 8000 < plan_reads(reader, SlideSettings(target_mpp=advised)).read_px <= 8192


def test_real_slides(slides: Path) -> None:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        plan = plan_reads(reader, SlideSettings())
        assert (plan.patch_size_level0, plan.cols, plan.rows, plan.resample) == (256, 9, 12, False)
    with open_slide(slides / "slideio_test3-DAPI-2-387.ndpi") as reader:
        plan = plan_reads(reader, SlideSettings())
        assert (plan.level, plan.patch_size_level0, plan.cols, plan.rows) == (1, 561, 8, 9)
    with open_slide(slides / "ezwsi_multiframe_camelyon.dcm") as reader, pytest.raises(SlideError, match=r"28\.97"):
        plan_reads(reader, SlideSettings())
