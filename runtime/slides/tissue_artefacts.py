"""What looks dark to Otsu and is no tissue: pen marks, black borders, coverslip edges. And slides without glass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.slides.areas import find_runs
from wsi_rt.runtime.slides.tissue_read import COLOURLESS, GLASSY, GREY, INK, PALE, STAINED, MaskPixels

# 0.064 mm2, a square of 250 um. A felt pen's dot is 0.3 mm2, a coverslip's edge 0.02 mm x many mm; dust, and pigment
# in tissue, stay below and are left to Otsu.
MIN_AREA_UM2 = 64_000.0
CELL_PX = 4  # areas are connected over squares of 4 x 4 px, 32 um: pen strokes are streaky
CELL_FILL = 4  # px of the 16 that make a square part of an area; a line of 2 px has as many wherever it falls
MIN_DENSITY = 0.2  # share of squares with such px: 0.3 and more in a line of 2 px, 0.15 where 10 % of px are scattered
DARK_SHARE = 0.2  # of a colourless area's px that are clearly dark: fat and mucus are pale, a shadow has a dark core
BLACK = 70.0  # luminance of ink and unscanned black; H&E tissue itself is hardly below 90
BRIGHT = 128.0  # luminance of most of a brightfield slide; a fluorescence channel alone cannot pass 85
FLAT = 1.5  # grey levels between neighbours at 8 um, median: glass has under 1, tissue 4 and more
NO_GLASS = 0.005  # share of glass-like px below which a slide may be all tissue
GREY_SCAN = 0.999  # share of colourless px from which a scan is greyscale, and colour tells nothing


def is_greyscale(pixels: MaskPixels) -> bool:
    """True for a scan without colour, in which grey is no sign of ink or a border."""
    return float(pixels.has(COLOURLESS).mean()) >= GREY_SCAN


def find_pen_marks(pixels: MaskPixels) -> NDArray[np.bool_]:
    """bool [h, w]: areas of green, blue or turquoise ink of at least MIN_AREA_UM2, with a margin of 32 to 64 um.

    Px stained pink to purple stay tissue, in the margin too. Red ink is not told from eosin and blood.
    """
    ink = pixels.has(INK)
    return _large_areas(ink, ink, pixels) & ~pixels.has(STAINED)


def find_dark_areas(pixels: MaskPixels, threshold: float) -> NDArray[np.bool_]:
    """bool [h, w]: areas without colour below `threshold`, a fifth of them clearly dark, of at least MIN_AREA_UM2, with
    the same margin: black ink, black borders, areas a scanner left black, the shadow of a coverslip's edge."""
    below = pixels.luminance < threshold
    grey = pixels.has(GREY) & below
    return _large_areas(grey | (pixels.has(PALE) & below), grey, pixels) & ~pixels.has(STAINED)


def has_black_surround(pixels: MaskPixels) -> bool:
    """True when what is not black is bright: brightfield with black around it, and not fluorescence."""
    bright = pixels.luminance[~(pixels.has(GREY) & (pixels.luminance < BLACK))]
    return bright.size >= 0.01 * pixels.luminance.size and float(np.median(bright)) >= BRIGHT


def is_all_tissue(pixels: MaskPixels, threshold: float, left_out: NDArray[np.bool_]) -> bool:
    """True when the bright class is no glass: hardly any px is nearly white, and the class is textured.

    Otsu would then split the tissue itself, into stroma and nuclei.
    """
    seen = ~left_out
    if (pixels.has(GLASSY) & seen).sum() >= NO_GLASS * seen.sum():
        return False
    return not is_flat(pixels.luminance, (pixels.luminance >= threshold) & seen)


def is_flat(luminance: NDArray[np.float32], where: NDArray[np.bool_]) -> bool:
    """True when the px of `where` hardly differ from their right neighbours in `where`, as those of glass."""
    pairs = where[:, :-1] & where[:, 1:]
    steps = np.abs(luminance[:, 1:][pairs] - luminance[:, :-1][pairs])
    return bool(steps.size) and float(np.median(steps)) < FLAT


def _large_areas(where: NDArray[np.bool_], sure: NDArray[np.bool_], pixels: MaskPixels) -> NDArray[np.bool_]:
    """Connected areas of `where` with at least MIN_AREA_UM2 of its px, DARK_SHARE of them `sure`.

    Squares of CELL_PX that hold enough px are widened by one square on each side, which bridges the gaps of a streaky
    stroke and is the margin of the result; where too few squares of an area held any, its px are merely scattered.
    """
    counts = _cell_counts(where)
    cells = counts >= CELL_FILL
    around, wide = np.pad(cells, 1), np.zeros_like(cells)
    for y in range(3):
        for x in range(3):
            wide |= around[y : y + cells.shape[0], x : x + cells.shape[1]]
    runs = find_runs(wide, diagonal=True)
    area = runs.sums(counts)
    chosen = (area >= MIN_AREA_UM2 / pixels.mpp**2) & (runs.sums(_cell_counts(sure)) >= DARK_SHARE * area)
    chosen &= runs.sums(cells.astype(np.int64)) >= MIN_DENSITY * runs.sums(wide.astype(np.int64))
    large = runs.paint(chosen, len(cells))
    return large.repeat(CELL_PX, axis=0).repeat(CELL_PX, axis=1)[: where.shape[0], : where.shape[1]]


def _cell_counts(where: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Px of each square of CELL_PX, i64 [ceil(h / CELL_PX), ceil(w / CELL_PX)]."""
    padded = np.pad(where, ((0, -where.shape[0] % CELL_PX), (0, -where.shape[1] % CELL_PX)))
    rows, cols = padded.shape[0] // CELL_PX, padded.shape[1] // CELL_PX
    return padded.reshape(rows, CELL_PX, cols, CELL_PX).sum(axis=(1, 3), dtype=np.int64)
