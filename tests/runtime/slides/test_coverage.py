"""Areas of rings in pixels, against GEOS and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_rt.runtime.slides import coverage
from wsi_rt.runtime.slides.coverage import polygon_coverage, ring_coverage

shapely = pytest.importorskip("shapely", reason="the oracle of exact areas")


def covered(ring: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    place, part = ring_coverage(np.asarray(ring, float), shape)
    whole = np.zeros(shape)
    whole[place] = part
    return whole


def exact(polygon: object, shape: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return shapely.area(shapely.intersection(shapely.box(x, y, x + 1, y + 1), polygon))


def test_by_hand() -> None:
    """A square from (0.5, 0.25) to (2, 1.75), and one half of a px."""
    square = [(0.5, 0.25), (2, 0.25), (2, 1.75), (0.5, 1.75)]
    np.testing.assert_allclose(covered(square, (2, 3)), [[0.375, 0.75, 0], [0.375, 0.75, 0]])
    np.testing.assert_allclose(covered([(0, 0), (1, 0), (0, 1)], (1, 1)), [[0.5]])


@pytest.mark.parametrize("seed", range(60))
def test_stars_are_geos_areas(seed: int) -> None:
    """Simple rings with dents, either way around, partly outside the array; every third on whole px."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(v) for v in rng.integers(1, 14, 2))
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 14)))
    radius = rng.uniform(0.5, 9, len(angle))
    ring = np.stack([shape[1] / 2 + radius * np.cos(angle), shape[0] / 2 + radius * np.sin(angle)], axis=1)
    ring = np.round(ring) if seed % 3 == 0 else ring
    polygon = shapely.Polygon(ring)
    if not polygon.is_valid:  # the centre is outside, and rounding made it cross itself
        polygon = polygon.convex_hull
        ring = shapely.get_coordinates(polygon)[:-1]
    for way in (ring, ring[::-1]):
        np.testing.assert_allclose(covered(way, shape), exact(polygon, shape), atol=2e-6)


def test_many_vertices_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    angle = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    ring = np.stack([30 + 25 * np.cos(angle), 20 + 30 * np.sin(angle)], axis=1)  # reaches out above and below
    whole = covered(ring, (41, 62))
    monkeypatch.setattr(coverage, "_CHUNK", 50)
    np.testing.assert_allclose(covered(ring, (41, 62)), whole, atol=1e-6)
    np.testing.assert_allclose(whole, exact(shapely.Polygon(ring), (41, 62)), atol=2e-6)


def test_a_figure_of_eight_counts_on_both_sides() -> None:
    ring = [(0, 0), (4, 4), (4, 0), (0, 4)]
    np.testing.assert_allclose(covered(ring, (4, 4)).sum(), 8, atol=1e-6)


@pytest.mark.parametrize(
    "ring", [[(-9, -9), (-1, -9), (-1, 50)], [(20, 20), (30, 20), (30, 30)]], ids=["left", "right"]
)
def test_outside_covers_nothing(ring: list) -> None:
    assert not covered(ring, (10, 10)).any()


def test_far_coordinates_are_cut_first() -> None:
    """2^31 px wide: as many pieces as the array has px, no more."""
    far = 2.0**31
    np.testing.assert_allclose(covered([(-far, -far), (far, -far), (far, far), (-far, far)], (50, 40)), 1)
    np.testing.assert_allclose(covered([(-far, 10), (far, 10), (far, 20.5), (-far, 20.5)], (50, 40)).sum(), 10.5 * 40)


def test_holes() -> None:
    """One inside, and one that reaches beyond the outline's bounding box."""
    outline, inner = [(1, 1), (9, 1), (9, 7), (1, 7)], [(2, 2), (4.5, 2), (4.5, 3), (2, 3)]
    beyond = [(8, 5), (12, 5), (12, 12), (8, 12)]
    place, part = polygon_coverage([np.array(r, float) for r in (outline, inner, beyond)], (10, 11))
    whole = np.zeros((10, 11))
    whole[place] = part
    polygon = shapely.difference(shapely.Polygon(outline, [inner]), shapely.Polygon(beyond))
    np.testing.assert_allclose(whole, exact(polygon, (10, 11)), atol=1e-6)
