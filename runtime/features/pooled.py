"""What pooled slide tokens still tell of their tiles (SPEC 3, pooling)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.types import POOLED_TOKENS

TELLING_TILES = POOLED_TOKENS // 2  # up to here, which tokens repeat tells how many tiles there were


def tile_count(tokens: NDArray[Any]) -> int | None:
    """How many tiles were pooled, from which neighbouring tokens are equal; None above 288."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    changes = (rows[1:] != rows[:-1]).any(axis=1)
    for tiles in range(1, TELLING_TILES + 1):
        if np.array_equal(changes, _changes(tiles)):
            return tiles
    return None


def _changes(tiles: int) -> NDArray[np.bool_]:
    i = np.arange(POOLED_TOKENS, dtype=np.int64)
    start, end = i * tiles // POOLED_TOKENS, -(-(i + 1) * tiles // POOLED_TOKENS)  # bins of adaptive pooling
    return (np.diff(start) != 0) | (np.diff(end) != 0)
