"""Where the tissue is: Otsu's threshold of SPEC 1, and what it must not be misled by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import tissue_artefacts as artefacts
from wsi_rt.runtime.slides.reader import SlideReader
from wsi_rt.runtime.slides.tissue_read import GLASSY, PURE, MaskPixels, read_mask_pixels
from wsi_rt.runtime.types import SlideRef

MIN_CONTRAST = 8.0  # grey levels between Otsu's class means, below which a slide is uniform
DARK_MEDIAN = 50.0  # a brightfield background is about 240; H&E tissue itself is hardly below 90
UNSCANNED = 0.05  # share of pure white from which it may outweigh glass and tissue in the histogram

TISSUE, PEN_MARKS, DARK_AREAS = 0, 1, 2  # values of TissueMask.left_out
LEFT_OUT = {PEN_MARKS: "pen marks", DARK_AREAS: "black or grey areas (ink, border, coverslip edge)"}
Rule = str  # "otsu", or what was done instead: keys of RULES
RULES = {
    "otsu": "",
    "dark": "the background is dark: the bright side was taken as tissue (--allow-dark)",
    "all": "no bare glass on the slide: all of it was taken as tissue",
    "scanned": "unscanned white areas were left out of the tissue threshold",
}


@dataclass(frozen=True)
class TissueMask:
    """Foreground of one slide at about 8 um/px.

    foreground: bool [h, w]; the last column and row may reach past the slide.
    scale0: (x, y) level-0 px per mask px.     threshold: Otsu's, luminance 0..255.
    level, box: the level read and the edge of the box filter on it, px.
    mpp: um per mask px.                       dark_background: foreground is the bright side.
    rule: how the foreground was told ("otsu", or a key of RULES).
    left_out: u8 [h, w], darker than the threshold and yet no tissue (PEN_MARKS, DARK_AREAS); None where there is none.
    """

    foreground: NDArray[np.bool_]
    scale0: tuple[float, float]
    threshold: float
    level: int
    box: int
    mpp: float
    dark_background: bool
    ref: SlideRef
    rule: Rule = "otsu"
    left_out: NDArray[np.uint8] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What deviates from Otsu's threshold over the whole slide. Areas left out are told with the tiles."""
        return (RULES[self.rule],) if RULES[self.rule] else ()


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
    plain_otsu: bool = False,
    threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> TissueMask:
    """Luminance (mean of R, G, B) at about 8 um/px by box filter, split by Otsu: foreground is below it.

    Read is the coarsest level of at most 10 um/px (level 0 if all are coarser), reduced by the whole
    number that comes nearest 8 um/px. Memory: one block of 4 Mpx per thread (about 60 MB while it is
    decoded), the reader's cache and about 15 bytes per mask px (6,250 x 6,250 for 100,000 x 100,000 px
    at 0.5 um/px). on_progress(done, total) counts blocks.

    Otsu always finds a threshold, also in noise. So a slide counts as all background, and raises
    SlideError "no tissue", when the two class means differ by less than 8 grey levels: scanner
    noise after the box filter is about 1, shading a few, and pale tissue 20 or more.

    Where nothing of the following is seen, the mask is Otsu's to the bit; `plain_otsu` looks for none of it:
    large areas of green or blue ink or of black and grey are left out, of threshold and foreground; a slide without
    bare glass is all tissue; pure white around the scanned regions does not count where it would make glass the
    foreground. `TissueMask.rule`, `left_out` and the notes tell.

    A median luminance below 50 means a dark background, as in fluorescence: SlideError, unless
    `allow_dark`; then the bright side is the foreground. Black around a brightfield scan is none.
    """
    pixels = read_mask_pixels(reader, threads=threads, on_progress=on_progress)
    median = float(np.median(pixels.luminance))
    dark = median < DARK_MEDIAN and (plain_otsu or not artefacts.has_black_surround(pixels))
    if dark and not allow_dark:
        raise _dark_background(reader, median)
    if dark or plain_otsu:
        threshold, contrast = otsu_threshold(pixels.luminance)
        foreground = pixels.luminance > threshold if dark else pixels.luminance < threshold
        rule, left_out = "dark" if dark else "otsu", None
    else:
        foreground, threshold, contrast, rule, left_out = _brightfield(pixels)
    if contrast < MIN_CONTRAST:
        rest = "" if left_out is None else " apart from pen marks and black or grey areas"
        raise SlideError(
            f"{reader.path}: no tissue: the slide is uniform{rest} (contrast {contrast:.1f} grey levels, expected at "
            f"least {MIN_CONTRAST:g}); expected a slide with stained tissue"
        )
    return TissueMask(
        foreground=foreground,
        scale0=pixels.scale0,
        threshold=threshold,
        level=pixels.level,
        box=pixels.box,
        mpp=pixels.mpp,
        dark_background=dark,
        ref=reader.ref,
        rule=rule,
        left_out=left_out,
    )


def _dark_background(reader: SlideReader, median: float) -> SlideError:
    return SlideError(
        f"{reader.path}: the background is dark (median luminance {median:.0f} of 255), as in fluorescence; expected a "
        "brightfield H&E slide, which is what the model was trained on; to encode its bright side all the same, give "
        "--allow-dark"
    )


def _brightfield(pixels: MaskPixels) -> tuple[NDArray[np.bool_], float, float, Rule, NDArray[np.uint8] | None]:
    """(foreground, threshold, contrast, rule, left_out) of a slide with a bright background."""
    left_out = np.where(artefacts.find_pen_marks(pixels), np.uint8(PEN_MARKS), np.uint8(TISSUE))
    threshold, contrast = _threshold(pixels, left_out == TISSUE)
    if not artefacts.is_greyscale(pixels):
        # A large black border draws the threshold between black and tissue; without it, grey shows below the next.
        for _ in range(3):
            new = artefacts.find_dark_areas(pixels, threshold) & (left_out == TISSUE)
            if not new.any():
                break
            left_out[new] = DARK_AREAS
            threshold, contrast = _threshold(pixels, left_out == TISSUE)
    seen, rule = left_out == TISSUE, "otsu"
    foreground = (pixels.luminance < threshold) & seen
    if contrast >= MIN_CONTRAST:
        if artefacts.is_all_tissue(pixels, threshold, ~seen):
            rule, foreground = "all", seen
        elif _glass_is_foreground(pixels, foreground):
            rule = "scanned"
            threshold, contrast = _threshold(pixels, seen & ~pixels.has(PURE))
            foreground = (pixels.luminance < threshold) & seen
    if rule != "all":
        left_out[pixels.luminance >= threshold] = TISSUE  # glass in the margin of an area was never foreground
    return foreground, threshold, contrast, rule, left_out if left_out.any() else None


def _threshold(pixels: MaskPixels, seen: NDArray[np.bool_]) -> tuple[float, float]:
    """Otsu over the px of `seen`; (0, 0), which is no contrast, where there is none."""
    if seen.all():
        return otsu_threshold(pixels.luminance)
    values = pixels.luminance[seen]
    return otsu_threshold(values) if values.size else (0.0, 0.0)


def _glass_is_foreground(pixels: MaskPixels, foreground: NDArray[np.bool_]) -> bool:
    """True when most of the foreground is flat glass, darker than the pure white of unscanned areas."""
    if pixels.has(PURE).mean() < UNSCANNED:
        return False
    glass = pixels.has(GLASSY) & foreground
    return bool(2 * glass.sum() > foreground.sum()) and artefacts.is_flat(pixels.luminance, glass)
