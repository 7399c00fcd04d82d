"""Connected areas of a mask, found on its horizontal runs (SciPy would do it, and is 113 MB)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Runs:
    """The horizontal runs of a mask, row by row from left to right, and the connected area of each.

    row, start, stop: i64 [R], px; stop is exclusive.    area: i64 [R], 0-based, < count.    width: of the mask, px.
    """

    row: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    area: NDArray[np.int64]
    count: int
    width: int

    def at(self, x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.int64]:
        """The area of each foreground px (x, y), i64 like x. Not checked: background gives any area."""
        keys = self.row * (self.width + 2) + self.start
        return self.area[np.searchsorted(keys, y * (self.width + 2) + x, side="right") - 1]

    def sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sum of `values` [h, w] over each area, i64 [count]."""
        running = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
        first = self.row * self.width
        per_run = running[first + self.stop] - running[first + self.start]
        return np.bincount(self.area, weights=per_run, minlength=self.count).astype(np.int64)

    def paint(self, chosen: NDArray[np.bool_], height: int) -> NDArray[np.bool_]:
        """bool [height, width]: the areas where `chosen` [count] is True."""
        runs = chosen[self.area]
        ends = np.zeros(height * self.width + 1, np.int8)
        np.add.at(ends, self.row[runs] * self.width + self.start[runs], 1)
        np.add.at(ends, self.row[runs] * self.width + self.stop[runs], -1)
        return np.cumsum(ends[:-1], dtype=np.int8).astype(bool).reshape(height, self.width)


def find_runs(mask: NDArray[np.bool_], *, diagonal: bool) -> Runs:
    """Runs and connected areas of bool [h, w]; `diagonal`: px that touch by a corner are connected too.

    Memory: 2 bytes per px and about 100 bytes per run.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).view(np.int8), axis=1)
    row, start = np.nonzero(edges == 1)
    stop = np.nonzero(edges == -1)[1]
    reach, stride = int(diagonal), mask.shape[1] + 2
    # The runs of the next row that overlap run i are those from `first` to `last`.
    starts, stops = row * stride + start, row * stride + stop
    first = np.searchsorted(stops, starts + stride - reach, side="right")
    last = np.searchsorted(starts, stops + stride + reach, side="left")
    touching = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(row)), touching)
    lower = np.arange(len(upper)) - np.repeat(np.cumsum(touching) - touching, touching) + first[upper]
    roots, area = np.unique(_roots(len(row), upper, lower), return_inverse=True)
    return Runs(row, start, stop, area.astype(np.int64), len(roots), mask.shape[1])


def _roots(count: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least member of each node's connected set, [count], for edges a-b.

    Every root is hooked to the least root it touches, then all paths are shortened: a few rounds, since each at
    least halves the roots that have a neighbour.
    """
    parent = np.arange(count)
    while True:
        left, right = parent[a], parent[b]
        apart = left != right
        if not apart.any():
            return parent
        low, high = np.minimum(left, right)[apart], np.maximum(left, right)[apart]
        np.minimum.at(parent, high, low)
        while not np.array_equal(shorter := parent[parent], parent):
            parent = shorter
