"""Otsu, the tissue mask and the choice of tiles, each against an independent oracle."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from skimage.filters import threshold_otsu

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import (
    SlideReader,
    TissueMask,
    find_tissue,
    open_slide,
    otsu_threshold,
    plan_reads,
    select_tiles,
    tissue_read,
    tissue_tiles,
)
from wsi_rt.runtime.slides.grid import ReadPlan
from wsi_rt.runtime.types import Provenance, SlideRef

Make = Callable[..., SlideReader]


@pytest.mark.parametrize("seed", range(12))
def test_otsu_is_skimages(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(50, 4000))
    dark = rng.normal(rng.uniform(80, 150), rng.uniform(2, 30), count)
    bright = rng.normal(rng.uniform(190, 240), rng.uniform(1, 10), int(rng.integers(50, 4000)))
    values = np.clip(np.concatenate([dark, bright]), 0, 255).astype(np.float32)
    threshold, contrast = otsu_threshold(values.reshape(-1, 1))
    assert threshold == pytest.approx(threshold_otsu(values), abs=1e-3)
    below = values < threshold
    bin_width = float(values.max() - values.min()) / 256
    assert contrast == pytest.approx(float(values[~below].mean() - values[below].mean()), abs=2 * bin_width)


def test_otsu_of_two_values_puts_them_apart() -> None:
    values = np.array([100] * 3 + [240] * 5, np.float32)
    threshold, contrast = otsu_threshold(values)
    assert 100 < threshold < 240
    assert contrast == pytest.approx(140, abs=1)
    assert otsu_threshold(np.full((3, 4), 7, np.float32)) == (7.0, 0.0)


def overlap(a0: Fraction, a1: Fraction, b0: Fraction, b1: Fraction) -> Fraction:
    return max(Fraction(0), min(a1, b1) - max(a0, b0))


def brute_force(foreground: np.ndarray, scale: tuple[Fraction, Fraction], size: tuple[int, int], step: int) -> dict:
    """Exact foreground share of every tile, by summing rectangle overlaps in rational numbers."""
    shares = {}
    marked = [(int(x), int(y)) for y, x in np.argwhere(foreground)]
    for row in range(-(-size[1] // step)):
        for col in range(-(-size[0] // step)):
            x0, x1 = Fraction(col * step), Fraction(min((col + 1) * step, size[0]))
            y0, y1 = Fraction(row * step), Fraction(min((row + 1) * step, size[1]))
            area = sum(
                overlap(x0, x1, x * scale[0], (x + 1) * scale[0]) * overlap(y0, y1, y * scale[1], (y + 1) * scale[1])
                for x, y in marked
            )
            shares[col * step, row * step] = area / (step * step)
    return shares


def plan_for(size: tuple[int, int], step: int) -> ReadPlan:
    return ReadPlan(0, 1.0, step, step, -(-size[0] // step), -(-size[1] // step), True, 0.5, 0.5)


def mask_for(foreground: np.ndarray, scale: tuple[Fraction, Fraction], size: tuple[int, int]) -> TissueMask:
    ref = SlideRef(Path("x.svs"), size, 0.5, "test", Provenance("test", "d1"))
    return TissueMask(foreground, (float(scale[0]), float(scale[1])), 200.0, 0, 16, 8.0, False, ref)


@pytest.mark.parametrize("seed", range(15))
def test_selection_is_the_brute_force_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask_w, mask_h = (int(v) for v in rng.integers(1, 14, 2))
    scale = tuple(Fraction(int(rng.integers(9, 40)), int(rng.integers(1, 4))) for _ in range(2))
    # the slide ends somewhere inside the last mask pixel
    size = tuple(max(1, int((n - 1) * s + s * Fraction(2, 3))) for n, s in zip((mask_w, mask_h), scale, strict=True))
    step = int(rng.integers(5, 90))
    foreground = rng.random((mask_h, mask_w)) < rng.choice([0.05, 0.2, 0.5])
    shares = brute_force(foreground, scale, size, step)
    expected = [xy for xy in sorted(shares, key=lambda v: (v[1], v[0])) if shares[xy] >= Fraction(1, 10)]
    plan, mask = plan_for(size, step), mask_for(foreground, scale, size)
    got = np.concatenate(list(tissue_tiles.tissue_fractions(plan, mask)))
    np.testing.assert_allclose(got, [float(v) for v in shares.values()], atol=1e-9)
    if not expected:
        with pytest.raises(SlideError, match="no tissue"):
            select_tiles(plan, mask)
        return
    grid = select_tiles(plan, mask)
    assert grid.xy0.tolist() == [list(xy) for xy in expected]
    assert grid.xy0.dtype == np.int64
    assert (grid.cells, grid.patch_size_level0, grid.order) == (plan.cells, step, "row-major")
    assert grid.provenance.digest == "d1"
    assert grid.provenance.settings["threshold"] == 200.0


def test_exactly_ten_percent_is_kept() -> None:
    foreground = np.zeros((10, 20), bool)
    foreground[0, :10] = True  # tile 0: 10 of 100 mask px
    foreground[0, 10:19] = True  # tile 1: 9 of 100
    size, scale = (140, 70), (Fraction(7), Fraction(7))
    grid = select_tiles(plan_for(size, 70), mask_for(foreground, scale, size))
    assert grid.xy0.tolist() == [[0, 0]]


def test_outside_counts_as_background() -> None:
    """A border tile with 20 of 256 columns inside, all tissue: 7.8 % of its area, dropped."""
    size, scale = (256 + 20, 256), (Fraction(4), Fraction(4))
    foreground = np.ones((64, 69), bool)
    assert select_tiles(plan_for(size, 256), mask_for(foreground, scale, size)).xy0.tolist() == [[0, 0]]
    size = (256 + 26, 256)  # 10.2 %: kept
    foreground = np.ones((64, 71), bool)
    assert len(select_tiles(plan_for(size, 256), mask_for(foreground, scale, size))) == 2


def test_mask_of_a_real_slide(slides: Path) -> None:
    """Against a plain numpy box mean of the whole slide, skimage's threshold and rational areas."""
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        mask = find_tissue(reader)
        plan = plan_reads(reader, SlideSettings())
        grid = select_tiles(plan, mask)
        whole = reader.read_region((0, 0), 0, reader.size0).astype(np.float64).mean(axis=2)
    assert (mask.level, mask.box, mask.foreground.shape) == (0, 16, (186, 139))
    assert mask.scale0 == (16.0, 16.0)
    assert mask.mpp == pytest.approx(7.984)
    rows, cols = np.arange(0, 2967, 16), np.arange(0, 2220, 16)
    sums = np.add.reduceat(np.add.reduceat(whole, rows, axis=0), cols, axis=1)
    box_mean = sums / (np.diff([*rows, 2967])[:, None] * np.diff([*cols, 2220])[None, :])
    assert mask.threshold == pytest.approx(threshold_otsu(box_mean), abs=1.5)
    clear = np.abs(box_mean - mask.threshold) > 1  # Pillow rounds each channel
    np.testing.assert_array_equal(mask.foreground[clear], (box_mean < mask.threshold)[clear])
    painted = np.kron(mask.foreground, np.ones((16, 16), bool))[:2967, :2220]  # 16 divides 256: no cut px
    padded = np.pad(painted, ((0, 12 * 256 - 2967), (0, 9 * 256 - 2220)))
    shares = padded.reshape(12, 256, 9, 256).mean(axis=(1, 3))
    np.testing.assert_array_equal(grid.xy0, np.argwhere(shares >= 0.1)[:, ::-1] * 256)
    assert grid.cells == 108
    assert 40 < len(grid) < 70
    order = np.lexsort((grid.xy0[:, 0], grid.xy0[:, 1]))
    np.testing.assert_array_equal(order, np.arange(len(grid)))


def test_mask_does_not_depend_on_blocks_or_threads(synth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SlideSettings(mpp=4.0)  # forces level 0 and a box of 2
    with open_slide(synth, settings) as reader:
        seen: list[tuple[int, int]] = []
        whole = find_tissue(reader, threads=1)
        assert (whole.level, whole.box) == (0, 2)
        monkeypatch.setattr(tissue_read, "BLOCK_PX", (301, 127))
        parts = find_tissue(reader, threads=2, on_progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(whole.foreground, parts.foreground)
    assert whole.threshold == parts.threshold
    assert seen == [(i, 77) for i in range(1, 78)]  # ceil(2000 / 300) x ceil(1300 / 126)


@pytest.mark.parametrize(
    ("mpp", "downsamples", "expected"),
    [
        (0.5, (1, 4, 16), (2, 1)),
        (0.25, (1, 4, 16), (2, 2)),
        (0.25, (1, 2, 4, 8, 16, 32, 64), (5, 1)),
        (0.5, (1,), (0, 16)),
        (0.28, (1, 32), (1, 1)),
        (0.5, (1, 64), (0, 16)),
        (28.97, (1, 2), (0, 1)),
    ],
)
def test_mask_level(level_slide: Make, mpp: float, downsamples: tuple, expected: tuple[int, int]) -> None:
    assert tissue_read.mask_level(level_slide(50_000, 40_000, mpp, downsamples)) == expected


def test_foreground_is_the_dark_side(array_slide: Make) -> None:
    pixels = np.full((512, 768, 3), 240, np.uint8)
    pixels[256:, 512:] = (200, 100, 180)
    reader = array_slide(pixels)
    mask = find_tissue(reader)
    assert mask.foreground.shape == (32, 48)
    assert mask.foreground[16:, 32:].all()
    assert mask.foreground.sum() == 16 * 16
    assert select_tiles(plan_reads(reader, SlideSettings()), mask).xy0.tolist() == [[512, 256]]


@pytest.mark.parametrize("kind", ["white", "noise", "shading", "uniform-pink"])
def test_uniform_slides_hold_no_tissue(array_slide: Make, kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((800, 1000, 3), 255, np.float64)
    if kind == "noise":
        pixels = 238 + rng.normal(0, 6, pixels.shape)
    elif kind == "shading":
        pixels = pixels - 10 - 8 * np.linspace(0, 1, 1000)[None, :, None] + rng.normal(0, 2, pixels.shape)
    elif kind == "uniform-pink":
        pixels = np.broadcast_to([230.0, 170.0, 200.0], pixels.shape)
    reader = array_slide(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    with pytest.raises(SlideError, match="no tissue: the slide is uniform"):
        find_tissue(reader)


def test_pale_tissue_is_found(array_slide: Make) -> None:
    rng = np.random.default_rng(0)
    pixels = 238 + rng.normal(0, 3, (1024, 1024, 3))
    pixels[300:700, 300:700] -= 20
    mask = find_tissue(array_slide(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)))
    assert mask.foreground[20:43, 20:43].all()
    assert mask.foreground.mean() == pytest.approx((400 / 1024) ** 2, rel=0.1)


def test_specks_alone_are_no_tissue(array_slide: Make) -> None:
    pixels = np.full((1024, 1024, 3), 240, np.uint8)
    pixels[100:140, 100:140] = 60
    reader = array_slide(pixels)
    with pytest.raises(SlideError, match=r"no tissue: the fullest of 16 tiles is \d\.\d% foreground.*10%"):
        select_tiles(plan_reads(reader, SlideSettings()), find_tissue(reader))


def test_dark_background(slides: Path) -> None:
    with open_slide(slides / "slideio_test3-DAPI-2-387.ndpi") as reader:
        with pytest.raises(SlideError, match=r"background is dark .*fluorescence.*H&E.*--allow-dark"):
            find_tissue(reader)
        mask = find_tissue(reader, allow_dark=True)
        assert mask.dark_background
        small = reader.read_region(
            (0, 0), mask.level, (reader.levels[mask.level].width, reader.levels[mask.level].height)
        )
    luminance = small.mean(axis=2)
    assert luminance[mask.foreground].min() >= luminance[~mask.foreground].max()
    assert 0 < mask.foreground.mean() < 0.5


def test_smaller_than_a_tile(array_slide: Make) -> None:
    pixels = np.full((150, 150, 3), 240, np.uint8)
    pixels[:, :100] = (190, 90, 150)
    reader = array_slide(pixels)
    grid = select_tiles(plan_reads(reader, SlideSettings()), find_tissue(reader))
    assert (grid.xy0.tolist(), grid.cells) == ([[0, 0]], 1)
