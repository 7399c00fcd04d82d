"""Runs and connected areas, against SciPy's labels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from wsi_rt.runtime.slides.areas import find_runs


@pytest.mark.parametrize("diagonal", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("seed", range(40))
def test_areas_are_scipys(seed: int, diagonal: bool) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 40, 2)) < rng.uniform(0.1, 0.9)
    labels, count = ndimage.label(mask, np.ones((3, 3)) if diagonal else None)
    runs = find_runs(mask, diagonal=diagonal)
    assert runs.count == count
    y, x = np.nonzero(mask)
    pairs = set(zip(labels[y, x].tolist(), runs.at(x, y).tolist(), strict=True))
    assert len(pairs) == count  # one to one
    values = rng.integers(0, 9, mask.shape)
    expected = ndimage.sum_labels(values, labels, range(1, count + 1)).astype(int)
    sums = runs.sums(values)
    assert all(sums[ours] == expected[theirs - 1] for theirs, ours in pairs)
    chosen = rng.random(count) < 0.5
    np.testing.assert_array_equal(
        runs.paint(chosen, mask.shape[0]), np.isin(labels, [theirs for theirs, ours in pairs if chosen[ours]])
    )


def test_a_spiral_is_one_area() -> None:
    """The case that makes a label travel furthest."""
    mask = np.zeros((201, 201), bool)
    for k in range(0, 100, 2):
        mask[k, max(k - 2, 0) : 201 - k] = True
        mask[k : 201 - k, 200 - k] = True
        mask[200 - k, k : 201 - k] = True
        mask[k + 2 : 201 - k, k] = True
    assert ndimage.label(mask)[1] == find_runs(mask, diagonal=False).count == 1


def test_no_foreground() -> None:
    runs = find_runs(np.zeros((4, 5), bool), diagonal=True)
    assert runs.count == 0
    assert not runs.paint(np.zeros(0, bool), 4).any()
