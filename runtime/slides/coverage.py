"""How much of each pixel lies inside a ring: exact areas, not samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Place = tuple[slice, slice]  # rows, columns
_CHUNK = 1 << 20  # px that the edges cut up together may cross: about 200 MB


def polygon_coverage(rings: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> tuple[Place, NDArray[np.float32]]:
    """(where, f32 [rows, cols] of that part, 0..1) for an outline and its holes, each like `ring_coverage`'s ring.

    Exact where no two rings share a px.
    """
    place, part = ring_coverage(rings[0], shape)
    for ring in rings[1:]:
        hole, gone = ring_coverage(ring, shape)
        # Both parts of the array, relative to each other; a hole may reach beyond its outline.
        ours, theirs = [], []
        for outer, inner in zip(place, hole, strict=True):
            first, last = max(outer.start, inner.start), min(outer.stop, inner.stop)
            ours.append(slice(first - outer.start, max(last, first) - outer.start))
            theirs.append(slice(first - inner.start, max(last, first) - inner.start))
        part[tuple(ours)] = np.maximum(part[tuple(ours)] - gone[tuple(theirs)], 0)
    return place, part


def ring_coverage(ring: NDArray[np.float64], shape: tuple[int, int]) -> tuple[Place, NDArray[np.float32]]:
    """(where, f32 [rows, cols] of that part, 0..1) for a ring [K, 2] of (x, y) in px of an array [h, w] = `shape`.

    `where` is the ring's bounding box inside the array, which may be empty.

    The method of font rasterisers: each edge, cut where it crosses px borders, adds the area between itself and the
    right end of its px, and a running sum along the row carries its height on. A ring that crosses itself counts
    where its winding number is not 0. Coordinates of any size are cut to the array first.
    """
    place = _bounding_box(ring, shape)
    height, width = (part.stop - part.start for part in place)
    signed = np.zeros((height, width + 1))
    if height and width:
        start = ring - (place[1].start, place[0].start)
        stop = np.roll(start, -1, axis=0)
        crossed = np.minimum(np.abs(stop - start), (width, height)).sum(axis=1) + 3
        chunks = np.flatnonzero(np.diff(np.cumsum(crossed) // _CHUNK)) + 1
        for part in zip(np.split(start, chunks), np.split(stop, chunks), strict=True):
            _add_edges(signed, *part)
    covered = np.abs(np.cumsum(signed[:, :width], axis=1))
    return place, np.minimum(covered, 1).astype(np.float32)


def _bounding_box(ring: NDArray[np.float64], shape: tuple[int, int]) -> Place:
    low = np.clip(np.floor(ring.min(axis=0)), 0, shape[::-1]).astype(int)
    high = np.clip(np.ceil(ring.max(axis=0)), 0, shape[::-1]).astype(int)
    return slice(low[1], max(high[1], low[1])), slice(low[0], max(high[0], low[0]))


def _add_edges(signed: NDArray[np.float64], start: NDArray[np.float64], stop: NDArray[np.float64]) -> None:
    height, width = signed.shape[0], signed.shape[1] - 1
    for axis, edges in ((1, (0, height)), (0, (0, width))):
        start, stop = _cut(start, stop, axis, np.array(edges, np.float64))
        if axis == 1:  # what lies above or below covers nothing
            inside = (np.minimum(start[:, 1], stop[:, 1]) >= 0) & (np.maximum(start[:, 1], stop[:, 1]) <= height)
            start, stop = start[inside], stop[inside]
    start[:, 0], stop[:, 0] = start[:, 0].clip(0, width), stop[:, 0].clip(0, width)  # left of it covers whole rows
    for axis in (1, 0):
        start, stop = _cut(start, stop, axis, None)
    middle = (start + stop) / 2
    x, y = (np.minimum(np.floor(middle[:, i]).astype(np.int64), n) for i, n in ((0, width), (1, height - 1)))
    rise, part = stop[:, 1] - start[:, 1], middle[:, 0] - x
    flat, index = signed.reshape(-1), y * (width + 1) + x
    np.add.at(flat, index, rise * (1 - part))
    inner = x < width
    np.add.at(flat, index[inner] + 1, (rise * part)[inner])


def _cut(
    start: NDArray[np.float64], stop: NDArray[np.float64], axis: int, at: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges [E, 2] cut where their coordinate `axis` is in `at`, or any whole number; directions stay."""
    a, b = start[:, axis], stop[:, axis]
    low, high = np.minimum(a, b), np.maximum(a, b)
    if at is None:
        first = np.floor(low) + 1
        inner = np.maximum(np.ceil(high) - first, 0).astype(np.int64)
        each = np.repeat(np.arange(len(a)), inner)
        order = np.arange(len(each)) - np.repeat(np.cumsum(inner) - inner, inner)
        value = first[each] + order
    else:
        each, which = np.nonzero((low[:, None] < at) & (at < high[:, None]))
        value = at[which]
    t = (value - a[each]) / (b[each] - a[each])
    points = start[each] + t[:, None] * (stop[each] - start[each])
    points[:, axis] = value
    # All points of an edge in the order of its direction: start, cuts, stop.
    edge = np.concatenate([np.arange(len(a)), each, np.arange(len(a))])
    along = np.concatenate([np.zeros(len(a)), t, np.ones(len(a))])
    rank = np.lexsort((along, edge))
    chain, edge = np.concatenate([start, points, stop])[rank], edge[rank]
    same = edge[:-1] == edge[1:]
    return chain[:-1][same], chain[1:][same]
