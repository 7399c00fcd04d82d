"""Which tiles are kept: those with enough tissue inside the regions of interest (SPEC 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.grid import ReadPlan
from wsi_rt.runtime.slides.regions import Regions
from wsi_rt.runtime.slides.tissue import LEFT_OUT, TissueMask
from wsi_rt.runtime.types import Provenance, TileGrid

MIN_FRACTION = 0.10  # foreground share of a kept tile
_ROUNDING = 1e-9  # exactly 10 % stays, whatever the last bit


def tissue_fractions(
    plan: ReadPlan, mask: TissueMask, area: NDArray[np.bool_] | NDArray[np.float32] | None = None
) -> Iterator[NDArray[np.float64]]:
    """Row by row of the grid, f64 [cols]: the share of each tile's area that is foreground.

    area: [h, w] like the mask, the share of each mask px that counts, instead of its foreground.

    Exact area weighting: a tile's edges cut mask px, which count in proportion. Area and not px
    count, so the part of a border tile outside the slide counts as background. One row costs the
    mask rows under it (weighted sum, then a running sum sampled at the tile edges).
    """
    counted = mask.foreground if area is None else area
    width0, height0 = mask.ref.size0
    step = plan.patch_size_level0
    tile_area = (step / mask.scale0[0]) * (step / mask.scale0[1])  # mask px
    edges_x = np.minimum(np.arange(plan.cols + 1) * step, width0) / mask.scale0[0]
    columns = np.arange(counted.shape[1] + 1)
    for row in range(plan.rows):
        top, bottom = (min(v * step, height0) / mask.scale0[1] for v in (row, row + 1))
        first, last = math.floor(top), min(math.ceil(bottom), counted.shape[0])
        index = np.arange(first, last)
        weight = np.minimum(index + 1, bottom) - np.maximum(index, top)  # part of each mask row inside the tile
        running = np.concatenate(([0.0], np.cumsum(weight @ counted[first:last])))
        yield np.diff(np.interp(edges_x, columns, running)) / tile_area


def select_tiles(
    plan: ReadPlan, mask: TissueMask, *, regions: Regions | None = None, min_fraction: float = MIN_FRACTION
) -> TileGrid:
    """Keep the tiles of which at least `min_fraction` is foreground inside `regions`, row-major: by y, then x.

    Returns a TileGrid of int64 [N, 2] level-0 px, `cells` = cols x rows. Raises SlideError "no
    tissue" when none is kept.
    """
    area = None
    settings = _facts(plan, mask, min_fraction)
    if regions is not None:
        inside = regions.coverage(mask.foreground.shape, mask.scale0, mask.ref)
        settings["roi"] = regions.facts(mask.ref)
        area = np.where(mask.foreground, inside, np.float32(0))
    kept, best = _kept(plan, mask, area, min_fraction)
    if not kept.any():
        where = "" if regions is None else " inside the regions of --roi"
        raise SlideError(
            f"{mask.ref.path}: no tissue: the fullest of {plan.cells} tiles is {best:.1%} foreground{where}, expected "
            f"at least {min_fraction:.0%}; check that the slide holds tissue there and that its resolution is right "
            "(--mpp)"
        )
    if mask.left_out is not None:
        settings["left_out"] = _left_out(plan, mask, kept, min_fraction, None if regions is None else inside)
    row, col = np.nonzero(kept)
    step = plan.patch_size_level0
    provenance = Provenance(maker="wsi_rt otsu tissue", digest=mask.ref.provenance.digest, settings=settings)
    xy0 = np.stack([col * step, row * step], axis=1).astype(np.int64)  # [N, 2]
    return TileGrid(xy0=xy0, patch_size_level0=step, cells=plan.cells, provenance=provenance)


def selection_notes(grid: TileGrid) -> tuple[str, ...]:
    """What a user should know of how the tiles were chosen: areas left out, regions of interest."""
    facts = grid.provenance.settings
    notes = []
    for name, tiles in facts.get("left_out", {}).items():
        count = "no tile lost by it" if tiles == 0 else "1 tile left out" if tiles == 1 else f"{tiles} tiles left out"
        notes.append(f"{name}: {count} (--plain-otsu keeps them)")
    roi = facts.get("roi")
    if roi is not None:
        names = ", ".join(f"{name} {count}" for name, count in roi["classes"].items())
        notes.append(f"regions of interest: {roi['regions']} ({names})")
        notes += roi["notes"]
    return tuple(notes)


def _kept(
    plan: ReadPlan, mask: TissueMask, area: NDArray[Any] | None, min_fraction: float
) -> tuple[NDArray[np.bool_], float]:
    """(bool [rows, cols], share of the fullest tile)."""
    kept, best = np.zeros((plan.rows, plan.cols), bool), 0.0
    for row, fractions in enumerate(tissue_fractions(plan, mask, area)):
        kept[row] = fractions >= min_fraction - _ROUNDING
        best = max(best, float(fractions.max()))
    return kept, best


def _left_out(
    plan: ReadPlan, mask: TissueMask, kept: NDArray[np.bool_], min_fraction: float, inside: NDArray[np.float32] | None
) -> dict[str, int]:
    """Kind of area -> tiles that would be kept if it counted as tissue."""
    assert mask.left_out is not None
    counts = {}
    for kind, name in LEFT_OUT.items():
        where = mask.left_out == kind
        if where.any():
            both = mask.foreground | where
            area = both if inside is None else np.where(both, inside, np.float32(0))
            counts[name] = int((_kept(plan, mask, area, min_fraction)[0] & ~kept).sum())
    return counts


def _facts(plan: ReadPlan, mask: TissueMask, min_fraction: float) -> dict[str, Any]:
    return {
        "target_mpp": plan.target_mpp,
        "mpp0": mask.ref.mpp0,
        "mpp_source": mask.ref.mpp_source,
        "level": plan.level,
        "resample": plan.resample,
        "mask_mpp": mask.mpp,
        "threshold": mask.threshold,
        "rule": mask.rule,
        "min_fraction": min_fraction,
        "dark_background": mask.dark_background,
    }
