"""The picture to check a tiling by: what it shows, where, and what it never shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.slides import SlideReader, find_tissue, open_slide, overlay, plan_reads, read_regions, select_tiles
from wsi_rt.runtime.slides.overlay import draw_overlay, read_thumbnail, write_overlay

Make = Callable[..., SlideReader]


@pytest.fixture
def two_pieces(array_slide: Make) -> SlideReader:
    """2,560 x 1,280 px, 10 x 5 tiles: tissue in tiles (1..3, 1..3), a pen mark of 1 mm below (6..8, 1..2)."""
    pixels = np.full((1280, 2560, 3), (244, 243, 242), np.uint8)
    pixels[256:1024, 256:1024] = (200, 120, 180)
    pixels[256:768, 1536:2304] = (60, 160, 90)
    return array_slide(pixels)


def draw(reader: SlideReader, roi: Path | None = None) -> np.ndarray:
    regions = read_regions(roi) if roi else None
    mask = find_tissue(reader)
    grid = select_tiles(plan_reads(reader, SlideSettings()), mask, regions=regions)
    return np.asarray(draw_overlay(reader, mask, grid, regions=regions)).astype(int)


def tinted(colour: tuple[int, int, int], tint: tuple[int, int, int], share: float) -> np.ndarray:
    return np.rint(np.array(colour) * (1 - share) + np.array(tint) * share)


def test_what_is_where(two_pieces: SlideReader) -> None:
    picture = draw(two_pieces)
    assert picture.shape == (1000 + overlay.BAR_PX, 2000, 3)  # 1/1.28
    at = lambda x0, y0: picture[round(y0 / 1.28), round(x0 / 1.28)]  # noqa: E731
    np.testing.assert_array_equal(at(640, 640), tinted((200, 120, 180), overlay.TILE, overlay.TILE_TINT))
    np.testing.assert_array_equal(at(1280, 640), (244, 243, 242))  # glass, not kept
    np.testing.assert_array_equal(at(1920, 500), (np.array((60, 160, 90)) + overlay.LEFT_OUT) // 2)  # the pen mark
    for x0, y0 in ((512, 640), (640, 512)):  # lines between kept tiles
        near = picture[round(y0 / 1.28) - 2 : round(y0 / 1.28) + 3, round(x0 / 1.28) - 2 : round(x0 / 1.28) + 3]
        assert (near[..., 0] < tinted((200, 120, 180), overlay.TILE, overlay.TILE_TINT)[0] - 20).any()
    edge = picture[round(640 / 1.28), round(256 / 1.28) - 2 : round(256 / 1.28) + 3]
    assert (edge == overlay.OUTLINE).all(axis=1).any()


def test_the_scale_bar_is_as_long_as_it_says(two_pieces: SlideReader) -> None:
    """2,560 px at 0.5 um/px are 1.28 mm over 2,000 px: a fifth is 256 um, so the bar says 200 um, 312.5 px."""
    assert overlay._round_length(256) == 200
    strip = draw(two_pieces)[1000 + overlay.BAR_PX // 2]
    dark = np.flatnonzero((strip[:400] == overlay.INK).all(axis=1))
    assert np.all(np.diff(dark[:300]) == 1)
    bar = dark[: np.flatnonzero(np.diff(dark) > 1)[0] + 1] if (np.diff(dark) > 1).any() else dark
    assert len(bar) == pytest.approx(312.5, abs=2)
    assert [overlay._length_text(v) for v in (50, 200, 1000, 2000)] == ["50 um", "200 um", "1 mm", "2 mm"]


def test_regions_are_drawn(two_pieces: SlideReader, tmp_path: Path) -> None:
    ring = [[300, 300], [900, 300], [900, 900], [300, 900], [300, 300]]
    (tmp_path / "roi.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    picture = draw(two_pieces, tmp_path / "roi.geojson")
    line = picture[round(600 / 1.28), round(300 / 1.28) - 3 : round(300 / 1.28) + 4]
    assert (line == overlay.REGION).all(axis=1).any()


@pytest.mark.parametrize("blocks", [(4096, 1024), (640, 96)])
def test_the_thumbnail_is_a_mean_of_the_slide(
    array_slide: Make, monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int]
) -> None:
    from wsi_rt.runtime.slides import tissue_read

    monkeypatch.setattr(tissue_read, "BLOCK_PX", blocks)
    ramp = np.linspace(0, 250, 2400)[None, :, None] * np.ones((1000, 1, 3))
    reader = array_slide(np.rint(ramp).astype(np.uint8))
    small = read_thumbnail(reader, 480)
    assert small.shape == (200, 480, 3)
    np.testing.assert_allclose(small[100, :, 0], ramp[0, :, 0].reshape(480, 5).mean(axis=1), atol=1)


def test_the_coarsest_level_that_suffices_is_read(level_slide: Make) -> None:
    seen = []
    reader = level_slide(40_000, 20_000, 0.5, (1, 4, 16, 64))
    read = reader.read_region
    reader.read_region = lambda xy0, level, size: seen.append(level) or read(xy0, level, size)  # type: ignore[method-assign]
    assert read_thumbnail(reader, 2000).shape[:2] == (1000, 2000)
    assert set(seen) == {2}


def test_smaller_than_the_picture_is_not_enlarged(slides: Path, tmp_path: Path) -> None:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        assert read_thumbnail(reader, 4000).shape == (2967, 2220, 3)
        mask = find_tissue(reader)
        write_overlay(tmp_path / "o.png", reader, mask, select_tiles(plan_reads(reader, SlideSettings()), mask))
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.size == (1496, 2000 + overlay.BAR_PX)
        assert picture.info == {}  # no text chunk: no name, no path


def test_label_and_macro_are_never_read(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        assert {"label", "macro"} <= set(reader.associated)
        monkeypatch.setattr(reader, "read_associated", lambda name: pytest.fail(f"{name} was read"))
        mask = find_tissue(reader)
        write_overlay(tmp_path / "o.png", reader, mask, select_tiles(plan_reads(reader, SlideSettings()), mask))
