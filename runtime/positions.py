"""Where tiles lie on the slide encoder's position grid (SPEC 3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_rt.kernels.slide_embed import GRID
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.types import TileGrid


def grid_positions(grid: TileGrid, position_tile: int | None = None) -> NDArray[np.int64]:
    """[N, 2] int64 (col, row) = floor(xy0 / divisor); the divisor is `position_tile` or patch_size_level0.

    Raises InputError for a tile outside the 1000 x 1000 grid, which the published index would alias
    silently.
    """
    divisor = position_tile or grid.patch_size_level0
    positions = grid.xy0 // divisor
    outside = ((positions < 0) | (positions >= GRID)).any(axis=1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise InputError(
            f"{int(outside.sum())} tiles lie outside the {GRID} x {GRID} position grid (first at level-0 px "
            f"{tuple(grid.xy0[first].tolist())} with divisor {divisor}); use a larger --position-tile or --target-mpp"
        )
    return np.ascontiguousarray(positions)


def shared_cells(positions: NDArray[np.int64]) -> int:
    """Tiles beyond the first in their cell of the position grid, which the slide encoder cannot tell apart."""
    return len(positions) - len(np.unique(positions[:, 1] * GRID + positions[:, 0]))
