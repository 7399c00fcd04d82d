"""A mask as polygons with holes, along its pixel edges, and tissue and tiles as GeoJSON for QuPath."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.slides.areas import find_runs
from wsi_rt.runtime.slides.regions import origin0
from wsi_rt.runtime.slides.tissue import TissueMask
from wsi_rt.runtime.types import TileGrid

Corner = tuple[int, int]  # x, y in px edges: (0, 0) is the top-left corner of the first px
Ring = list[Corner]  # closed implicitly; clockwise on the screen around foreground, the other way around a hole

TISSUE_CLASS = {"name": "Tissue", "color": [40, 120, 60]}
TILE_CLASS = {"name": "Tile", "color": [60, 90, 200]}


def mask_polygons(mask: NDArray[np.bool_]) -> list[list[Ring]]:
    """Polygons of bool [h, w], one per area connected by px edges: the outline, then its holes.

    Valid in the sense of OGC (no ring crosses or touches itself; rings touch each other in points at most), and as
    large as the foreground to the px: a library that interpolates (marching squares) cuts corners instead.
    Time and memory go with the number of corners: about 3 s for a million.
    """
    if not mask.any():
        return []
    runs = find_runs(mask, diagonal=False)
    outlines: list[list[Ring]] = [[] for _ in range(runs.count)]
    for ring in _simple_rings(mask):
        hole = _twice_area(ring) < 0
        # The px inside the ring's first edge, which is horizontal: below it going right, above it going left.
        (x, y), (x_next, _) = ring[0], ring[1]
        px = (x, y) if x_next > x else (x - 1, y - 1)
        area = int(runs.at(np.array([px[0]]), np.array([px[1]]))[0])
        outlines[area].insert(len(outlines[area]) if hole else 0, ring)
    return outlines


def _simple_rings(mask: NDArray[np.bool_]) -> Iterator[Ring]:
    start, stop, after = _horizontal_edges(mask)
    done = bytearray(len(after))
    for first in range(len(after)):
        if done[first]:
            continue
        ring: Ring = []
        edge = first
        while not done[edge]:
            done[edge] = 1
            ring += (start[edge], stop[edge])
            edge = after[edge]
        yield from _split(ring)


def _horizontal_edges(mask: NDArray[np.bool_]) -> tuple[list[Corner], list[Corner], list[int]]:
    """(start, stop, next) of the maximal horizontal edges, with the foreground to their right as one walks.

    Every corner ends one horizontal edge, or two where px touch by a corner only. In a column of corners, sorted by
    y, each odd one is joined to the next by a vertical edge; of two corners in one place the edge that has its px
    above goes up, which keeps px that only touch apart.
    """
    padded = np.pad(mask, 1)
    above, below = padded[:-1, 1:-1], padded[1:, 1:-1]
    rows, starts, stops, kinds = [], [], [], []
    for side, edges in enumerate((above & ~below, below & ~above)):  # px above: walked left; px below: right
        ends = np.diff(np.pad(edges, ((0, 0), (1, 1))).view(np.int8), axis=1)
        row, left = np.nonzero(ends == 1)
        right = np.nonzero(ends == -1)[1]
        rows.append(row)
        starts.append(left if side else right)
        stops.append(right if side else left)
        kinds.append(np.full(len(row), side))
    row, start, stop, kind = (np.concatenate(parts) for parts in (rows, starts, stops, kinds))
    count = len(row)
    x = np.concatenate([start, stop])
    order = np.lexsort((np.tile(kind, 2), np.tile(row, 2), x))  # by x, then y, then px above first
    pairs = order.reshape(-1, 2)
    ends, begins = np.where(pairs[:, :1] >= count, pairs, pairs[:, ::-1]).T  # one of the two ends an edge
    after = np.empty(count, np.int64)
    after[ends - count] = begins
    corners = [list(zip(v.tolist(), row.tolist(), strict=True)) for v in (start, stop)]
    return corners[0], corners[1], after.tolist()


def _split(ring: Ring) -> Iterator[Ring]:
    """The loops of a ring that comes back to a corner, each starting with a horizontal edge."""
    if len(set(ring)) == len(ring):
        yield ring
        return
    path: Ring = []
    place: dict[Corner, int] = {}
    for corner in ring:
        if corner in place:
            loop = path[place[corner] :]
            for gone in loop[1:]:
                del place[gone]
            del path[place[corner] + 1 :]
            yield _from_horizontal(loop)
            continue
        place[corner] = len(path)
        path.append(corner)
    yield _from_horizontal(path)


def _from_horizontal(ring: Ring) -> Ring:
    return ring if ring[0][1] == ring[1][1] else ring[1:] + ring[:1]


def _twice_area(ring: Ring) -> int:
    return sum(x * v - u * y for (x, y), (u, v) in zip(ring, ring[1:] + ring[:1], strict=True))


def write_tissue_geojson(path: str | Path, mask: TissueMask, grid: TileGrid | None = None) -> None:
    """Write the tissue as QuPath reads it: one annotation of class "Tissue", level-0 px; atomic, same bytes each time.

    grid: its tiles too, as objects of the kind "tile". Slides that declare scanned bounds: counted from their corner,
    as QuPath does (`regions.origin0`). Read back as regions of interest, it selects the same tiles.

    Raises MachineError, InputError (disk).
    """
    corner = origin0(mask.ref)
    features: list[dict[str, Any]] = []
    polygons = [[_scaled(ring, mask, corner) for ring in polygon] for polygon in mask_polygons(mask.foreground)]
    if polygons:
        geometry: dict[str, Any] = {"type": "MultiPolygon", "coordinates": polygons}
        features.append(_feature("annotation", TISSUE_CLASS, geometry, mask.ref.provenance.digest))
    if grid is not None:
        for left, top in (grid.xy0 - corner.astype(np.int64)).tolist():
            right, bottom = left + grid.patch_size_level0, top + grid.patch_size_level0
            square = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
            geometry = {"type": "Polygon", "coordinates": [square]}
            features.append(_feature("tile", TILE_CLASS, geometry, f"{mask.ref.provenance.digest} {left} {top}"))
    text = json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":"))
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="ascii")


def _scaled(ring: Ring, mask: TissueMask, corner: NDArray[np.float64]) -> list[list[float]]:
    """Level-0 px, cut to the slide (the last mask px may reach past it), closed."""
    xy0 = np.minimum(np.array([*ring, ring[0]]) * mask.scale0, mask.ref.size0) - corner
    return [[round(x, 2), round(y, 2)] for x, y in xy0.tolist()]


def _feature(kind: str, classification: dict[str, Any], geometry: dict[str, Any], key: str) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"wsi-rt {kind} {key}")),
        "geometry": geometry,
        "properties": {"objectType": kind, "classification": classification},
    }
