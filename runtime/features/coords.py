"""Tiles that another tool chose: coordinates out of CLAM, TRIDENT and AtlasPatch files, and how to read them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wsi_rt.runtime.config import MPP_RANGE, SlideSettings
from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features.order import sorted_rows
from wsi_rt.runtime.features.tile_features import checked_coordinates, patch_size_of
from wsi_rt.runtime.features.tile_h5 import read_raw_coords
from wsi_rt.runtime.slides import ReadPlan, SlideReader, plan_reads
from wsi_rt.runtime.slides.reader import same_mpp
from wsi_rt.runtime.types import TILE_PX, Provenance, TileGrid


@dataclass(frozen=True)
class TileCoords:
    """grid: row-major unless it was told to stay; size0: (width, height) of the slide the file says, or None."""

    grid: TileGrid
    path: Path
    size0: tuple[int, int] | None
    notes: tuple[str, ...] = ()


def read_coords(path: str | os.PathLike[str], *, sort: bool = True, patch_size_level0: int | None = None) -> TileCoords:
    """Tile coordinates of an `.h5` file, with or without features beside them.

    The tile's edge at level 0 is its `patch_size_level0`; of CLAM's files, which say `patch_size` px of level
    `patch_level`, it is round(patch_size x downsample); else `patch_size_level0` has to be given. Sorted to row-major
    (y, x) unless `sort` is False; a note says when that moved any.

    Raises: FeatureFileError. Source: SPEC 1 and 6.
    """
    where = Path(path)
    raw = read_raw_coords(where)
    xy0 = checked_coordinates(raw.xy0, where)
    made = patch_size_level0 if patch_size_level0 is not None else _clam_size0(raw.attrs)
    size0, notes = patch_size_of(raw.attrs, made, where)
    order, moved = sorted_rows(xy0)
    if sort and moved:
        xy0 = xy0[order]
        notes.append(f"coordinates sorted to row-major (y, x): {moved} of {len(order)} tiles changed place")
    elif moved:
        notes.append("coordinates kept in the file's order, which is not row-major (y, x)")
    twice = len(xy0) - len(np.unique(xy0, axis=0))
    if twice:
        notes.append(f"{twice} of {len(xy0)} tiles lie where another one does")
    grid = TileGrid(
        xy0,
        size0,
        order="row-major" if sort or not moved else "file",
        cells=len(xy0),
        provenance=Provenance(f"external {raw.layout} coordinates", raw.digest, {"patch_size_level0": size0}),
    )
    return TileCoords(grid, where, _slide_size(raw.attrs), tuple(notes))


def _clam_size0(attrs: Mapping[str, Any]) -> int | None:
    """None where the file is not CLAM's, or its level is not scaled alike on both axes."""
    if "patch_size_level0" in attrs or "patch_level" not in attrs:
        return None
    try:
        patch = float(np.asarray(attrs.get("patch_size")).ravel()[0])
        factors = np.asarray(attrs.get("downsample"), np.float64).ravel()
    except (TypeError, ValueError, IndexError):
        return None
    fits = factors.size in (1, 2) and np.isfinite(factors).all() and factors.min() >= 1 and patch >= 1
    if not fits or not math.isfinite(patch) or abs(factors.max() / factors.min() - 1) > 0.01:
        return None
    return round(patch * float(factors.mean()))


def _slide_size(attrs: Mapping[str, Any]) -> tuple[int, int] | None:
    sides = [np.asarray(attrs.get(f"level0_{side}")).ravel() for side in ("width", "height")]
    if any(s.dtype.kind not in "iuf" or s.size != 1 or not 0 < float(s[0]) < 2**31 for s in sides):
        return None
    return int(sides[0][0]), int(sides[1][0])


def plan_coords(reader: SlideReader, coords: TileCoords, settings: SlideSettings) -> tuple[ReadPlan, TileGrid]:
    """How to read the file's tiles of that slide as 256 px.

    A level is read as it is where a tile is 256 of its px, else the next finer one is resampled, as for tiles of ours.

    Raises FeatureFileError: of another slide (size, or tiles outside), of another mpp than `settings.target_mpp`;
    SlideError: coarser than the slide (plan_reads).
    """
    grid, size0 = coords.grid, coords.grid.patch_size_level0
    if coords.size0 is not None and coords.size0 != reader.size0:
        raise FeatureFileError(
            f"{coords.path}: its slide has {coords.size0[0]} x {coords.size0[1]} px, this one {reader.size0[0]} x "
            f"{reader.size0[1]}: coordinates of another slide; give the file that belongs to it"
        )
    outside = (grid.xy0 >= np.array(reader.size0)).any(axis=1)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise FeatureFileError(
            f"{coords.path}: {int(outside.sum())} of {len(grid)} tiles lie outside the slide of {reader.size0[0]} x "
            f"{reader.size0[1]} px, first (x, y) = {tuple(grid.xy0[row].tolist())}: coordinates of another slide, or "
            "not in level-0 px"
        )
    mpp = size0 * reader.mpp0 / TILE_PX
    if not same_mpp(mpp, settings.target_mpp):
        raise FeatureFileError(
            f"{coords.path}: its tiles of {size0} level-0 px have {mpp:.4g} um/px as {TILE_PX} px, expected "
            f"{settings.target_mpp:g}: coordinates of another mpp; make them again with tiles of "
            f"{round(TILE_PX * settings.target_mpp / reader.mpp0)} level-0 px, or say that this is meant with "
            f"--target-mpp {mpp:.4g}"
        )
    low, high = MPP_RANGE
    plan = plan_reads(reader, replace(settings, target_mpp=min(max(mpp, low), high)))
    width, height = reader.size0
    if plan.patch_size_level0 != size0:
        plan = replace(
            plan,
            patch_size_level0=size0,
            read_px=math.ceil(size0 / plan.downsample),
            resample=True,
        )
    plan = replace(plan, target_mpp=settings.target_mpp, cols=-(-width // size0), rows=-(-height // size0))
    facts = {**grid.provenance.settings, "mpp0": reader.mpp0, "mpp_source": reader.mpp_source}
    facts |= {"target_mpp": settings.target_mpp, "level": plan.level, "resample": plan.resample}
    made_by = Provenance(grid.provenance.maker, grid.provenance.digest, facts)
    return plan, replace(grid, cells=max(plan.cells, len(grid)), provenance=made_by)
