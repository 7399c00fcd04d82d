"""Outlines of masks, against GEOS; and the GeoJSON made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.slides import SlideReader, find_tissue, open_slide, plan_reads, read_regions, select_tiles
from wsi_rt.runtime.slides.outlines import mask_polygons, write_tissue_geojson

shapely = pytest.importorskip("shapely", reason="the oracle of valid polygons")
Make = Callable[..., SlideReader]


def polygons(mask: np.ndarray) -> list:
    return [shapely.Polygon(rings[0], rings[1:]) for rings in mask_polygons(mask)]


@pytest.mark.parametrize("seed", range(60))
def test_outlines_are_the_px_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 16, 2)) < rng.choice([0.2, 0.5, 0.65, 0.85])
    found = polygons(mask)
    assert all(p.is_valid for p in found), [shapely.is_valid_reason(p) for p in found]
    assert len(found) == ndimage.label(mask)[1]
    y, x = np.nonzero(mask)
    together = shapely.union_all(shapely.box(x, y, x + 1, y + 1))
    assert shapely.MultiPolygon(found).is_valid
    assert sum(p.area for p in found) == mask.sum()
    assert together.symmetric_difference(shapely.union_all(found)).area == 0


@pytest.mark.parametrize(
    ("rows", "holes"),
    [
        (["###", "#.#", "###"], 1),
        (["####", "#.##", "##.#", "####"], 2),  # two holes that touch by a corner
        (["###.", "#.##", "####"], 1),
        (["##.", "#.#", "###"], 1),  # a bay closed by a corner: a hole that touches the outline
        (["#.", ".#"], 0),
    ],
)
def test_touching_corners(rows: list[str], holes: int) -> None:
    mask = np.array([[c == "#" for c in row] for row in rows])
    found = polygons(mask)
    assert all(p.is_valid for p in found)
    assert sum(len(p.interiors) for p in found) == holes
    assert sum(p.area for p in found) == mask.sum()


def test_only_corners_are_vertices() -> None:
    ((ring,),) = mask_polygons(np.ones((40, 70), bool))
    assert sorted(ring) == [(0, 0), (0, 40), (70, 0), (70, 40)]
    assert mask_polygons(np.zeros((3, 3), bool)) == []


@pytest.fixture
def tissue_file(slides: Path, tmp_path: Path) -> Path:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        mask = find_tissue(reader)
        grid = select_tiles(plan_reads(reader, SlideSettings()), mask)
        write_tissue_geojson(tmp_path / "tissue.geojson", mask, grid)
    return tmp_path / "tissue.geojson"


def test_tissue_of_a_real_slide_as_qupath_reads_it(slides: Path, tissue_file: Path) -> None:
    data = json.loads(tissue_file.read_text())
    assert data["type"] == "FeatureCollection"
    tissue, *tiles = data["features"]
    assert tissue["properties"]["objectType"] == "annotation"
    assert tissue["properties"]["classification"]["name"] == "Tissue"
    assert {t["properties"]["objectType"] for t in tiles} == {"tile"}
    assert len({f["id"] for f in data["features"]}) == 1 + len(tiles)
    shape = shapely.from_geojson(json.dumps(tissue["geometry"]))
    assert shape.is_valid
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        mask = find_tissue(reader)
        inside = mask.foreground
        grid = select_tiles(plan_reads(reader, SlideSettings()), mask)
    # 16 level-0 px a mask px; the last column and row end with the slide: 2220 = 138 x 16 + 12, 2967 = 185 x 16 + 7
    area = np.full(inside.shape, 256.0)
    area[:, -1] *= 12 / 16
    area[-1] *= 7 / 16
    assert shape.area == pytest.approx((area * inside).sum())
    assert shape.bounds[0] >= 0
    assert shape.bounds[3] <= 2967
    squares = [shapely.from_geojson(json.dumps(t["geometry"])).bounds for t in tiles]
    assert squares == [(x, y, x + 256, y + 256) for x, y in grid.xy0.tolist()]


def test_tissue_as_region_selects_the_same_tiles(slides: Path, tissue_file: Path) -> None:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        plan, mask = plan_reads(reader, SlideSettings()), find_tissue(reader)
        regions = read_regions(tissue_file)
        assert regions.ignored == {"tile": 54}
        again = select_tiles(plan, mask, regions=regions)
        np.testing.assert_array_equal(again.xy0, select_tiles(plan, mask).xy0)
        covered = regions.coverage(mask.foreground.shape, mask.scale0, mask.ref)
    np.testing.assert_allclose(covered, mask.foreground, atol=1e-3)


def test_bounds_are_counted_from_and_read_back(array_slide: Make, tmp_path: Path) -> None:
    """A slide that declares its scanned area: QuPath's (0, 0) is the corner of it."""
    pixels = np.full((1024, 1536, 3), 240, np.uint8)
    pixels[512:768, 512:1024] = (200, 100, 180)
    reader = array_slide(pixels)
    mask = find_tissue(reader)
    object.__setattr__(mask.ref, "bounds0", (256, 128, 1024, 768))
    write_tissue_geojson(tmp_path / "t.geojson", mask)
    (feature,) = json.loads((tmp_path / "t.geojson").read_text())["features"]
    assert shapely.from_geojson(json.dumps(feature["geometry"])).bounds == (256, 384, 768, 640)
    covered = read_regions(tmp_path / "t.geojson").coverage(mask.foreground.shape, mask.scale0, mask.ref)
    np.testing.assert_array_equal(covered, mask.foreground)
