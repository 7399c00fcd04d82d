"""What must not pass for tissue, on painted slides at 8 um/px; and ordinary slides, whose mask stays Otsu's."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import (
    SlideReader,
    find_tissue,
    open_slide,
    otsu_threshold,
    plan_reads,
    select_tiles,
    selection_notes,
    tissue_artefacts,
    tissue_read,
)
from wsi_rt.runtime.slides.synth import write_synth_slide
from wsi_rt.runtime.types import TileGrid

Make = Callable[..., SlideReader]
MPP = 8.0  # of the arrays: the mask is the slide itself
TILE = 16  # px of a 128 um tile there
SETTINGS = SlideSettings(target_mpp=0.5, mpp=MPP, allow_upsample=True)
INKS = {"green": (20, 120, 70), "light-green": (90, 190, 120), "blue": (40, 70, 180), "turquoise": (0, 150, 170)}


@lru_cache
def he_slide(seed: int = 0, size: tuple[int, int] = (640, 480), *, glass: int = 244) -> NDArray[np.uint8]:
    """Two pieces of textured pink to purple tissue on glass, u8 [h, w, 3]; blurred edges, a little noise."""
    rng = np.random.default_rng(seed)
    width, height = size
    coarse = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6), np.uint8)).resize(size, 3)
    share = np.asarray(coarse, np.float64)[..., None] / 255  # eosin to hematoxylin
    tissue = (
        share * np.array([120, 70, 150])
        + (1 - share) * np.array([235, 160, 195])
        + rng.normal(0, 6, (height, width, 1))
    )
    shape = Image.new("L", size)
    draw = ImageDraw.Draw(shape)
    draw.ellipse((width * 0.12, height * 0.2, width * 0.42, height * 0.75), fill=255)
    draw.ellipse((width * 0.58, height * 0.3, width * 0.85, height * 0.8), fill=255)
    alpha = np.asarray(shape.filter(ImageFilter.GaussianBlur(1.2)), np.float64)[..., None] / 255
    pixels = alpha * tissue + (1 - alpha) * (glass + rng.normal(0, 0.7, (height, width, 1)) + np.array([0, -1, 1]))
    out = np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
    out.flags.writeable = False  # cached
    return out


def stroke(
    pixels: NDArray[np.uint8],
    points: list[tuple[int, int]],
    width: int,
    colour: tuple[int, int, int],
    opacity: float,
    *,
    even: bool = False,
) -> NDArray[np.uint8]:
    """A line multiplied over what is below, as ink and shadow are, with soft edges; uneven as a pen's unless `even`."""
    size = pixels.shape[1::-1]
    shape = Image.new("L", size)
    ImageDraw.Draw(shape).line(points, fill=255, width=width, joint="curve")
    alpha = np.asarray(shape.filter(ImageFilter.GaussianBlur(1.5)), np.float64) / 255 * opacity
    if not even:
        density = np.random.default_rng(1).integers(150, 256, (size[1] // 9, size[0] // 9), np.uint8)
        alpha *= np.asarray(Image.fromarray(density).resize(size, 3)) / 255
    inked = pixels * (np.array(colour) / 255.0)
    return np.rint(pixels * (1 - alpha[..., None]) + inked * alpha[..., None]).astype(np.uint8)


def tiles_of(reader: SlideReader, **how: bool) -> TileGrid:
    return select_tiles(plan_reads(reader, SETTINGS), find_tissue(reader, **how))


def cells(grid: TileGrid) -> set[tuple[int, int]]:
    return {(int(x), int(y)) for x, y in grid.xy0 // TILE}


def otsu_mask(reader: SlideReader) -> NDArray[np.bool_]:
    """SPEC 1 and nothing else, from the reader's pixels."""
    level, box = tissue_read.mask_level(reader)
    size = reader.levels[level]
    rgb = reader.read_region((0, 0), level, (size.width, size.height))
    small = np.asarray(Image.fromarray(rgb).reduce(box)) if box > 1 else rgb
    luminance = small.sum(axis=2, dtype=np.float32) / np.float32(3)
    return luminance < otsu_threshold(luminance)[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_clean_slide_is_otsus_to_the_bit(array_slide: Make, seed: int) -> None:
    reader = array_slide(he_slide(seed, glass=225 + 4 * seed), mpp=MPP)
    mask = find_tissue(reader)
    np.testing.assert_array_equal(mask.foreground, otsu_mask(reader))
    assert (mask.rule, mask.left_out, mask.notes) == ("otsu", None, ())
    assert selection_notes(tiles_of(reader)) == ()


def test_the_real_slide_is_otsus_to_the_bit(slides: Path) -> None:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        mask = find_tissue(reader)
        np.testing.assert_array_equal(mask.foreground, otsu_mask(reader))
        assert (mask.rule, mask.left_out, mask.notes) == ("otsu", None, ())


def test_a_synthetic_slide_is_otsus_to_the_bit(synth: Path) -> None:
    with open_slide(synth) as reader:
        mask = find_tissue(reader)
        np.testing.assert_array_equal(mask.foreground, otsu_mask(reader))
        assert (mask.rule, mask.left_out, mask.notes) == ("otsu", None, ())


def test_dust_and_pigment_are_left_to_otsu(array_slide: Make) -> None:
    """Black specks of 160 um and green ones of 120 um: below the area from which anything is left out."""
    pixels = he_slide().copy()
    for x, y in ((20, 20), (330, 100), (150, 220), (600, 460)):
        pixels[y : y + 20, x : x + 20] = 30
    for x, y in ((40, 300), (450, 250)):
        pixels[y : y + 15, x : x + 15] = INKS["green"]
    reader = array_slide(pixels, mpp=MPP)
    np.testing.assert_array_equal(find_tissue(reader).foreground, otsu_mask(reader))


@pytest.mark.parametrize("share", [0.03, 0.1])
def test_scattered_grey_in_tissue_is_no_dark_area(array_slide: Make, share: float) -> None:
    """Pigment of 8 um here and there, over both pieces."""
    pixels = he_slide().copy()
    pixels[(np.random.default_rng(5).random(pixels.shape[:2]) < share) & (pixels.max(axis=2) < 225)] = (60, 58, 62)
    reader = array_slide(pixels, mpp=MPP)
    np.testing.assert_array_equal(find_tissue(reader).foreground, otsu_mask(reader))


@pytest.mark.parametrize(("ink", "opacity"), [*((ink, o) for ink in INKS for o in (0.5, 0.95)), ("black", 0.95)])
def test_pen_marks_are_left_out(array_slide: Make, ink: str, opacity: float) -> None:
    """A circle drawn around a piece, 400 um wide: no tile of it stays, none of the tissue goes."""
    clean = he_slide()
    colour = INKS.get(ink, (25, 22, 28))
    circle = [(int(180 + 150 * np.cos(a)), int(230 + 190 * np.sin(a))) for a in np.linspace(0, 6.4, 90)]
    reader = array_slide(stroke(clean, circle, 50, colour, opacity), mpp=MPP)
    plain, kept = cells(tiles_of(reader, plain_otsu=True)), tiles_of(reader)
    expected = cells(tiles_of(array_slide(clean, mpp=MPP)))
    assert cells(kept) == expected
    assert len(plain - expected) > 100
    mask = find_tissue(reader)
    assert mask.left_out is not None
    either = (mask.foreground | (mask.left_out != 0)).reshape(480 // TILE, TILE, 640 // TILE, TILE).mean(axis=(1, 3))
    lost = int((either >= 0.1).sum()) - len(expected)
    assert 0.8 * len(plain - expected) < lost < 1.2 * len(plain - expected)
    name = "black or grey areas (ink, border, coverslip edge)" if ink == "black" else "pen marks"
    assert selection_notes(kept) == (f"{name}: {lost} tiles left out (--plain-otsu keeps them)",)


def test_ink_over_tissue_costs_the_ink_only(array_slide: Make) -> None:
    clean = he_slide()
    reader = array_slide(stroke(clean, [(60, 60), (300, 420)], 30, INKS["green"], 0.95), mpp=MPP)
    mask = find_tissue(reader)
    kept, before = cells(tiles_of(reader)), cells(tiles_of(array_slide(clean, mpp=MPP)))
    assert not kept - before
    assert len(before - kept) < 30  # the stroke covers about 60 tiles, of which those without tissue beside it go
    assert mask.left_out is not None
    far = np.ones(clean.shape[:2], bool)
    far[:480] = np.abs((np.mgrid[:480, :640][1] - 60) * 360 - (np.mgrid[:480, :640][0] - 60) * 240) > 45 * 433
    np.testing.assert_array_equal(mask.left_out[far], 0)


@pytest.mark.parametrize("share", [0.1, 0.6], ids=["narrow", "most-of-the-slide"])
def test_a_black_border_is_no_tissue_and_no_dark_background(array_slide: Make, share: float) -> None:
    clean = he_slide()
    add = round(clean.shape[0] * share / (1 - share) / 2 / TILE) * TILE
    pixels = np.pad(clean, ((add, add), (0, 0), (0, 0)))
    reader = array_slide(pixels, mpp=MPP)
    kept = tiles_of(reader)
    moved = {(x, y + add // TILE) for x, y in cells(tiles_of(array_slide(clean, mpp=MPP)))}
    assert cells(kept) == moved
    assert "black or grey areas" in selection_notes(kept)[0]


def test_black_stitching_areas_are_left_out(array_slide: Make) -> None:
    pixels = he_slide().copy()
    pixels[100:220, 290:380] = 0
    pixels[300:308] = 0  # a seam of 64 um across the slide
    clean = cells(tiles_of(array_slide(he_slide(), mpp=MPP)))
    assert cells(tiles_of(array_slide(pixels, mpp=MPP))) <= clean
    assert len(clean) - len(cells(tiles_of(array_slide(pixels, mpp=MPP)))) < 3


@pytest.mark.parametrize("width", [3, 8], ids=["24um", "64um"])
@pytest.mark.parametrize("tilt", [0.0, 0.02])
def test_the_edge_of_a_coverslip_is_left_out(array_slide: Make, width: int, tilt: float) -> None:
    clean = he_slide(size=(1440, 1280))
    lines = [[(40, 0), (round(40 + 1280 * tilt), 1279)], [(0, 1200), (1439, round(1200 + 1439 * tilt))]]
    pixels = clean
    for line in lines:
        pixels = stroke(pixels, line, width, (150, 150, 152), 1.0, even=True)
    reader = array_slide(pixels, mpp=MPP)
    assert cells(tiles_of(reader)) == cells(tiles_of(array_slide(clean, mpp=MPP)))


def test_a_slide_without_glass_is_all_tissue(array_slide: Make) -> None:
    pixels = he_slide(size=(1600, 1200))[400:800, 320:560]  # inside the first ellipse
    reader = array_slide(pixels, mpp=MPP)
    mask, grid = find_tissue(reader), tiles_of(reader)
    assert mask.foreground.all()
    assert len(grid) == grid.cells == 25 * 15
    assert mask.notes == ("no bare glass on the slide: all of it was taken as tissue",)
    assert grid.provenance.settings["rule"] == "all"
    assert 0.2 < find_tissue(reader, plain_otsu=True).foreground.mean() < 0.8  # what Otsu alone makes of it


def test_dim_glass_is_still_glass(array_slide: Make) -> None:
    """A badly exposed slide, glass at 175: nothing is nearly white, and yet it is flat."""
    reader = array_slide((he_slide() * 0.72).astype(np.uint8), mpp=MPP)
    mask = find_tissue(reader)
    assert mask.rule == "otsu"
    np.testing.assert_array_equal(mask.foreground, otsu_mask(reader))


@pytest.mark.parametrize("ink", ["green", "black"])
def test_ink_alone_is_no_tissue(array_slide: Make, ink: str) -> None:
    rng = np.random.default_rng(0)
    glass = np.clip(244 + rng.normal(0, 1, (480, 640, 3)), 0, 255).astype(np.uint8)
    glass[..., 2] -= 3  # a scan in colour, not in grey
    pixels = stroke(glass, [(100, 100), (500, 400)], 50, INKS.get(ink, (25, 22, 28)), 0.95)
    with pytest.raises(SlideError, match="no tissue: the slide is uniform apart from pen marks and black or grey"):
        find_tissue(array_slide(pixels, mpp=MPP))


def test_unscanned_white_does_not_make_glass_tissue(array_slide: Make) -> None:
    """Two scanned regions on a white canvas, little tissue: Otsu alone splits glass (234) from white (255)."""
    pixels = np.full((900, 1200, 3), 255, np.uint8)
    pixels[50:350, 40:740] = np.rint(np.random.default_rng(3).normal((234, 233, 235), 0.7, (300, 700, 3)))  # bare glass
    pixels[600:740, 500:800] = he_slide(size=(640, 480), glass=234)[320:460, 60:360]  # the lower end of a piece
    reader = array_slide(pixels, mpp=MPP)
    mask = find_tissue(reader)
    assert find_tissue(reader, plain_otsu=True).foreground[60:340, 50:730].mean() > 0.9
    assert mask.rule == "scanned"
    assert mask.notes == ("unscanned white areas were left out of the tissue threshold",)
    assert not mask.foreground[50:350, 40:740].any()
    assert not mask.foreground[pixels.min(axis=2) == 255].any()
    assert 0.001 < mask.foreground.mean() < 0.02


def test_areas_that_were_not_scanned_are_white_and_no_tissue(tmp_path: Path) -> None:
    """The same slide with and without its bare glass stored: several pieces apart, 255 between them instead of 244."""
    made = {"width": 4096, "height": 3072, "tissue": 0.25, "seed": 4, "codec": "deflate"}
    grids = []
    for sparse in (False, True):
        path = write_synth_slide(tmp_path / f"{sparse}.svs", sparse=sparse, **made)
        with open_slide(path) as reader:
            pixels = tissue_read.read_mask_pixels(reader, threads=1)
            assert (pixels.has(tissue_read.PURE).mean() > 0.15) == sparse
            grids.append(select_tiles(plan_reads(reader, SlideSettings()), find_tissue(reader)))
    np.testing.assert_array_equal(grids[0].xy0, grids[1].xy0)


def test_in_a_greyscale_scan_grey_is_tissue(array_slide: Make) -> None:
    grey = he_slide().mean(axis=2).astype(np.uint8)
    reader = array_slide(np.repeat(grey[..., None], 3, axis=2), mpp=MPP)
    mask = find_tissue(reader)
    np.testing.assert_array_equal(mask.foreground, otsu_mask(reader))
    assert mask.left_out is None


def test_fluorescence_stays_an_error_in_any_colours(array_slide: Make) -> None:
    rng = np.random.default_rng(0)
    spots = np.asarray(Image.fromarray(rng.integers(0, 256, (80, 60), np.uint8)).resize((480, 640), 3), np.float64)
    signal = np.clip(spots - 150, 0, None)[..., None] * np.array([0.4, 2.0, 1.2])
    reader = array_slide(np.clip(signal + 4, 0, 255).astype(np.uint8), mpp=MPP)
    with pytest.raises(SlideError, match=r"background is dark.*--allow-dark"):
        find_tissue(reader)
    mask = find_tissue(reader, allow_dark=True)
    assert (mask.rule, mask.dark_background) == ("dark", True)
    assert mask.notes == ("the background is dark: the bright side was taken as tissue (--allow-dark)",)


def test_real_tissue_hints_at_no_ink(slides: Path) -> None:
    """The inked margin of this slide is 0.2 % of its px, in specks."""
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        pixels = tissue_read.read_mask_pixels(reader, threads=1)
    assert 0 < pixels.has(tissue_read.INK).mean() < 0.003
    assert not tissue_artefacts.find_pen_marks(pixels).any()
    assert not tissue_artefacts.find_dark_areas(pixels, 255).any()
