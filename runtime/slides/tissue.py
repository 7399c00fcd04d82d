"""Where the tissue is, and which tiles are kept (SPEC 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.grid import ReadPlan
from wsi_rt.runtime.slides.prefetch import prefetch_map
from wsi_rt.runtime.slides.reader import SlideReader
from wsi_rt.runtime.types import Provenance, SlideRef, TileGrid

MASK_MPP = 8.0  # um/px of the mask, about
MIN_FRACTION = 0.10  # foreground share of a kept tile
MIN_CONTRAST = 8.0  # grey levels between Otsu's class means, below which a slide is uniform
DARK_MEDIAN = 50.0  # a brightfield background is about 240; H&E tissue itself is hardly below 90
BLOCK_PX = (4096, 1024)  # (w, h) read at once: 4 Mpx, about 45 MB per thread while it is decoded

Block = tuple[int, int, int, int]  # x, y, w, h in px of the level read


@dataclass(frozen=True)
class TissueMask:
    """Foreground of one slide at about 8 um/px.

    foreground: bool [h, w]; the last column and row may reach past the slide.
    scale0: (x, y) level-0 px per mask px.     threshold: Otsu's, luminance 0..255.
    level, box: the level read and the edge of the box filter on it, px.
    mpp: um per mask px.                       dark_background: foreground is the bright side.
    """

    foreground: NDArray[np.bool_]
    scale0: tuple[float, float]
    threshold: float
    level: int
    box: int
    mpp: float
    dark_background: bool
    ref: SlideRef


def otsu_threshold(values: NDArray[np.float32], bins: int = 256) -> tuple[float, float]:
    """Otsu's threshold of finite values of any shape, and the distance between the two class means.

    Maximises the between-class variance over the bins of a histogram from min to max and returns
    the centre of the best bin, the first of equals (Otsu 1979; the convention of scikit-image's
    threshold_otsu, kept out of the base install). Values all equal give (that value, 0).
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low, 0.0
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    mass = counts * centres
    below = np.cumsum(counts)[:-1].astype(np.float64)  # bins 0..i
    above = counts.sum() - below  # bins i+1..; both >= 1: the end bins hold min and max
    mean_below = np.cumsum(mass)[:-1] / below
    mean_above = np.cumsum(mass[::-1])[::-1][1:] / above
    best = int(np.argmax(below * above * (mean_below - mean_above) ** 2))
    return float(centres[best]), float(mean_above[best] - mean_below[best])


def find_tissue(
    reader: SlideReader,
    *,
    allow_dark: bool = False,
    threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> TissueMask:
    """Luminance (mean of R, G, B) at about 8 um/px by box filter, split by Otsu: foreground is below it.

    Read is the coarsest level of at most 10 um/px (level 0 if all are coarser), reduced by the whole
    number that comes nearest 8 um/px. Memory: one block of 4 Mpx per thread (about 60 MB while it is
    decoded), the reader's cache and about 13 bytes per mask px (6,250 x 6,250 for 100,000 x 100,000 px
    at 0.5 um/px); measured: 350 MB for the process with 2 threads and a single level of 16,000 px.
    on_progress(done, total) counts blocks.

    Otsu always finds a threshold, also in noise. So a slide counts as all background, and raises
    SlideError "no tissue", when the two class means differ by less than 8 grey levels: scanner
    noise after the box filter is about 1, shading a few, and pale tissue 20 or more.

    A median luminance below 50 means a dark background, as in fluorescence: SlideError, unless
    `allow_dark`; then the bright side is the foreground.
    """
    level, box = _mask_level(reader)
    luminance = _read_luminance(reader, level, box, threads, on_progress)
    dark = float(np.median(luminance)) < DARK_MEDIAN
    if dark and not allow_dark:
        raise SlideError(
            f"{reader.path}: the background is dark (median luminance {float(np.median(luminance)):.0f} of 255), as in "
            "fluorescence; expected a brightfield H&E slide, which is what the model was trained on; to encode its "
            "bright side all the same, give --allow-dark"
        )
    threshold, contrast = otsu_threshold(luminance)
    if contrast < MIN_CONTRAST:
        raise SlideError(
            f"{reader.path}: no tissue: the slide is uniform (contrast {contrast:.1f} grey levels, expected at least "
            f"{MIN_CONTRAST:g}); expected a slide with stained tissue"
        )
    size = reader.levels[level]
    return TissueMask(
        foreground=luminance > threshold if dark else luminance < threshold,
        scale0=(box * reader.size0[0] / size.width, box * reader.size0[1] / size.height),
        threshold=threshold,
        level=level,
        box=box,
        mpp=reader.mpp0 * size.downsample * box,
        dark_background=dark,
        ref=reader.ref,
    )


def _mask_level(reader: SlideReader) -> tuple[int, int]:
    """(level, box edge): the coarsest level of at most 1.25 x 8 um/px, and the reduction to about 8 um/px."""
    mpps = [reader.mpp0 * level.downsample for level in reader.levels]
    usable = [i for i, mpp in enumerate(mpps) if mpp <= 1.25 * MASK_MPP] or [0]
    level = max(usable, key=lambda i: mpps[i])
    return level, max(1, round(MASK_MPP / mpps[level]))


def _blocks(width: int, height: int, box: int) -> Iterator[Block]:
    step_x, step_y = (max(box, edge - edge % box) for edge in BLOCK_PX)
    for y in range(0, height, step_y):
        for x in range(0, width, step_x):
            yield x, y, min(step_x, width - x), min(step_y, height - y)


def _read_luminance(
    reader: SlideReader, level: int, box: int, threads: int, on_progress: Callable[[int, int], None] | None
) -> NDArray[np.float32]:
    """f32 [ceil(h / box), ceil(w / box)], 0..255. Border px average what lies inside the slide only.

    Pillow's `reduce` is the box filter; it rounds each channel to a whole grey level.
    """
    from PIL import Image

    size = reader.levels[level]
    scale_x, scale_y = reader.size0[0] / size.width, reader.size0[1] / size.height

    def read(block: Block) -> NDArray[np.float32]:
        x, y, w, h = block
        rgb = reader.read_region((round(x * scale_x), round(y * scale_y)), level, (w, h))
        small = np.asarray(Image.fromarray(rgb).reduce(box)) if box > 1 else rgb
        return small.sum(axis=2, dtype=np.float32) / np.float32(3)

    blocks = list(_blocks(size.width, size.height, box))
    luminance = np.empty((-(-size.height // box), -(-size.width // box)), np.float32)
    parts = prefetch_map(read, blocks, threads=threads, depth=2 * threads)
    try:
        for done, ((x, y, _, _), part) in enumerate(zip(blocks, parts, strict=True), start=1):
            luminance[y // box : y // box + part.shape[0], x // box : x // box + part.shape[1]] = part
            if on_progress is not None:
                on_progress(done, len(blocks))
    finally:
        parts.close()
    return luminance


def tissue_fractions(plan: ReadPlan, mask: TissueMask) -> Iterator[NDArray[np.float64]]:
    """Row by row of the grid, f64 [cols]: the share of each tile's area that is foreground.

    Exact area weighting: a tile's edges cut mask px, which count in proportion. Area and not px
    count, so the part of a border tile outside the slide counts as background. One row costs the
    mask rows under it (weighted sum, then a running sum sampled at the tile edges).
    """
    width0, height0 = mask.ref.size0
    step = plan.patch_size_level0
    tile_area = (step / mask.scale0[0]) * (step / mask.scale0[1])  # mask px
    edges_x = np.minimum(np.arange(plan.cols + 1) * step, width0) / mask.scale0[0]
    columns = np.arange(mask.foreground.shape[1] + 1)
    for row in range(plan.rows):
        top, bottom = (min(v * step, height0) / mask.scale0[1] for v in (row, row + 1))
        first, last = math.floor(top), min(math.ceil(bottom), mask.foreground.shape[0])
        index = np.arange(first, last)
        weight = np.minimum(index + 1, bottom) - np.maximum(index, top)  # part of each mask row inside the tile
        running = np.concatenate(([0.0], np.cumsum(weight @ mask.foreground[first:last])))
        yield np.diff(np.interp(edges_x, columns, running)) / tile_area


def select_tiles(plan: ReadPlan, mask: TissueMask, *, min_fraction: float = MIN_FRACTION) -> TileGrid:
    """Keep the tiles of which at least `min_fraction` is foreground, row-major: by y, then x.

    Returns a TileGrid of int64 [N, 2] level-0 px, `cells` = cols x rows. Raises SlideError "no
    tissue" when none is kept.
    """
    step = plan.patch_size_level0
    kept: list[NDArray[np.int64]] = []
    best = 0.0
    for row, fractions in enumerate(tissue_fractions(plan, mask)):
        best = max(best, float(fractions.max()))
        cols = np.flatnonzero(fractions >= min_fraction - 1e-9)  # exactly 10 % stays, whatever the last bit
        kept.append(np.stack([cols * step, np.full(len(cols), row * step)], axis=1).astype(np.int64))
    xy0 = np.concatenate(kept)  # [N, 2]
    if not len(xy0):
        raise SlideError(
            f"{mask.ref.path}: no tissue: the fullest of {plan.cells} tiles is {best:.1%} foreground, expected at "
            f"least {min_fraction:.0%}; check that the slide holds tissue and that its resolution is right (--mpp)"
        )
    settings = {
        "target_mpp": plan.target_mpp,
        "mpp0": mask.ref.mpp0,
        "mpp_source": mask.ref.mpp_source,
        "level": plan.level,
        "resample": plan.resample,
        "mask_mpp": mask.mpp,
        "threshold": mask.threshold,
        "min_fraction": min_fraction,
        "dark_background": mask.dark_background,
    }
    provenance = Provenance(maker="wsi_rt otsu tissue", digest=mask.ref.provenance.digest, settings=settings)
    return TileGrid(xy0=xy0, patch_size_level0=step, cells=plan.cells, provenance=provenance)
