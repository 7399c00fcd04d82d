"""What the cases of the tile encoder take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.types import TILE_PX

VITG, PIPELINE = TILE_CASES = ("tile-vitg", "pipeline-2000")
REFERENCE, INT8 = "reference", "wsi-rt:int8"
PROVIDERS = (REFERENCE, INT8)
SMALL_PRESET = "nano"  # of the pipeline's encoders
TIMM = "vit_giant_patch14_dinov2"
VITG_TILES, QUICK_TILES, ROUNDS = 16, 2, 5
REFERENCE_BATCH = 8  # eager torch is as fast from 4 tiles on
MIN_COSINE = 0.999  # per tile
# 2,000 tissue tiles and some more, in one minute.
SLIDE: dict[str, Any] = {"width": 14336, "height": 11264, "tissue": 0.9, "levels": (1, 4, 16)}


def stained_tiles(count: int) -> NDArray[np.uint8]:
    """[count, 256, 256, 3]: neighbours on a painted slide."""
    from wsi_rt.runtime.slides.synth.stain import TissuePainter

    side = math.isqrt(count - 1) + 1
    painter = TissuePainter(2 * side * TILE_PX, 2 * side * TILE_PX, 0.5, 0, 0.9)
    start = side * TILE_PX // 2
    corners = [divmod(i, side) for i in range(count)]
    return np.stack([painter.paint(start + c * TILE_PX, start + r * TILE_PX, TILE_PX, TILE_PX) for r, c in corners])


def flops(word: str) -> int:
    """Of one tile: two for each multiply-add of Linear layers, patches and attention."""
    from wsi_rt.benchmarks.encoders.tile_worker import tile_part
    from wsi_rt.export.arch import linear_shapes

    c = tile_part(word)[0]
    patches, tokens = c.grid**2, c.grid**2 + c.prefix_tokens
    linear = tokens * sum(math.prod(s) for s in linear_shapes(c).values())
    attention = c.depth * 2 * tokens**2 * c.width
    return 2 * (linear + attention + patches * 3 * c.patch_px**2 * c.width)
