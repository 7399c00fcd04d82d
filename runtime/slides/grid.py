"""Tile geometry: which level is read, how large a tile is there, and how the grid lies (SPEC 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.reader import SlideReader, same_mpp
from wsi_rt.runtime.types import TILE_PX

# One tile's read is held in memory as RGBA and RGB: 8192 px is about 0.5 GB per thread.
MAX_READ_PX = 8192


@dataclass(frozen=True)
class ReadPlan:
    """How the tiles of one slide are read.

    level: the level read.                       downsample: level-0 px per px of that level.
    read_px: edge of the square read there, px (one more where a tile starts between level px).
    mpp_read: um/px of that level, before resampling.
    patch_size_level0: tile edge and grid step, level-0 px (integer).
    cols, rows: the whole grid, ceil(W / step) x ceil(H / step), anchored at the level-0 origin.
    resample: the square read is resized to 256 px; else read_px is 256 and pixels are used as they are.
    target_mpp: um/px asked for.
    """

    level: int
    downsample: float
    read_px: int
    patch_size_level0: int
    cols: int
    rows: int
    resample: bool
    mpp_read: float
    target_mpp: float

    @property
    def cells(self) -> int:
        """Tiles of the whole grid, tissue or not."""
        return self.cols * self.rows


def plan_reads(reader: SlideReader, settings: SlideSettings) -> ReadPlan:
    """Choose the level and lay the grid (SPEC 1).

    A level within 5 % of the target is read as it is (the nearest one if several are), and the tile
    is round(256 x its downsample) level-0 px. Otherwise the coarsest finer level is read and
    resampled, and the tile is round(256 x target_mpp / mpp0). A slide that is coarser than the
    target throughout is refused unless `allow_upsample`; then level 0 is read and enlarged.
    The limit of 1000 columns and rows belongs to the slide encoder and is checked there.

    Raises SlideError: coarser than the target, or a level so fine that one tile would not fit memory.
    """
    target = settings.target_mpp
    mpps = [reader.mpp0 * level.downsample for level in reader.levels]
    near = [i for i, mpp in enumerate(mpps) if same_mpp(mpp, target)]
    finer = [i for i, mpp in enumerate(mpps) if mpp < target]
    if near:
        level = min(near, key=lambda i: abs(math.log(mpps[i] / target)))
        return _plan(reader, level, settings, round(TILE_PX * reader.levels[level].downsample), resample=False)
    if finer:
        level = max(finer, key=lambda i: mpps[i])
    elif settings.allow_upsample:
        level = 0
    else:
        raise SlideError(
            f"{reader.path}: the finest level has {mpps[0]:.4g} um/px, expected {target:g} or finer; read it at its "
            f"own resolution with --target-mpp {mpps[0]:.4g}, or enlarge it with --allow-upsample"
        )
    return _plan(reader, level, settings, round(TILE_PX * target / reader.mpp0), resample=True)


def _plan(reader: SlideReader, level: int, settings: SlideSettings, step: int, *, resample: bool) -> ReadPlan:
    downsample = reader.levels[level].downsample
    if step < 1:
        raise SlideError(
            f"{reader.path}: a tile at {settings.target_mpp:g} um/px is smaller than one pixel of the slide "
            f"({reader.mpp0:.4g} um/px); read it with --target-mpp {reader.mpp0:.4g}"
        )
    read_px = math.ceil(step / downsample) if resample else TILE_PX
    if read_px > MAX_READ_PX:
        finest = 0.99 * reader.mpp0 * downsample * MAX_READ_PX / TILE_PX  # short of the limit, as it is rounded below
        raise SlideError(
            f"{reader.path}: a tile at {settings.target_mpp:g} um/px needs {read_px} x {read_px} px of level {level}, "
            f"expected at most {MAX_READ_PX}; give --target-mpp {finest:.3g} or less, or a slide with coarser levels"
        )
    width, height = reader.size0
    return ReadPlan(
        level=level,
        downsample=downsample,
        read_px=read_px,
        patch_size_level0=step,
        cols=-(-width // step),
        rows=-(-height // step),
        resample=resample,
        mpp_read=reader.mpp0 * downsample,
        target_mpp=settings.target_mpp,
    )
