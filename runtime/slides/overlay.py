"""The picture to check a tiling by: the slide small, tissue outlined, kept tiles, regions of interest, a scale bar.

Only pyramid levels are read, never a label or macro image, and no name is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.slides.outlines import mask_polygons
from wsi_rt.runtime.slides.reader import SlideReader
from wsi_rt.runtime.slides.regions import Regions, origin0
from wsi_rt.runtime.slides.tissue import TissueMask
from wsi_rt.runtime.slides.tissue_read import box_reduce, read_blocks
from wsi_rt.runtime.types import TileGrid

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

EDGE_PX = 2000  # longest edge of the picture of the slide
BAR_PX = 44  # height of the strip below it
MIN_WIDTH = 480  # of the whole picture, so that the strip's text has room

Colour = tuple[int, int, int]
TILE, OUTLINE, LEFT_OUT, REGION, INK = (0, 110, 200), (0, 120, 60), (230, 120, 0), (190, 0, 140), (40, 40, 40)
TILE_TINT = 0.16  # share of TILE in the pixels of a kept tile: colours of the stain stay readable
LINE_TILE_PX = 7.0  # tiles narrower than this in the picture get no lines of their own


def write_overlay(
    path: str | Path,
    reader: SlideReader,
    mask: TissueMask,
    grid: TileGrid,
    *,
    regions: Regions | None = None,
    threads: int = 2,
) -> None:
    """Write the PNG, at most EDGE_PX wide and high for the slide. Raises SlideError, MachineError, InputError."""
    image = draw_overlay(reader, mask, grid, regions=regions, threads=threads)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def draw_overlay(
    reader: SlideReader, mask: TissueMask, grid: TileGrid, *, regions: Regions | None = None, threads: int = 2
) -> Image.Image:
    """The picture as an RGB image: kept tiles tinted and gridded, tissue outlined, areas left out shaded.

    Memory: the picture (12 MB), a block of the level it is read from per thread, the outlines.
    """
    from PIL import Image, ImageDraw

    pixels = read_thumbnail(reader, EDGE_PX, threads=threads)
    scale = np.array([pixels.shape[1] / reader.size0[0], pixels.shape[0] / reader.size0[1]])  # px per level-0 px
    _tint_tiles(pixels, grid, scale)
    if mask.left_out is not None:
        _shade(pixels, mask.left_out != 0)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    width = max(1, round(max(image.size) / 1000))
    tissue = (np.array(ring) * mask.scale0 for polygon in mask_polygons(mask.foreground) for ring in polygon)
    _draw_rings(draw, tissue, scale, OUTLINE, width)
    if regions is not None:
        rings = (ring + origin0(mask.ref) for r in regions.regions for polygon in r.polygons for ring in polygon)
        _draw_rings(draw, rings, scale, REGION, width + 1)
    return _with_strip(image, reader, mask, grid, regions)


def read_thumbnail(reader: SlideReader, edge_px: int, *, threads: int = 2) -> NDArray[np.uint8]:
    """u8 [h, w, 3], the whole slide with a longest edge of `edge_px` or less: from the coarsest level that is larger,
    in blocks, box-filtered and then resized (antialiased)."""
    from PIL import Image

    longest = [max(level.width, level.height) for level in reader.levels]
    level = max((i for i, edge in enumerate(longest) if edge >= edge_px), default=0)
    size, box = reader.levels[level], max(1, longest[level] // edge_px)
    small = np.empty((-(-size.height // box), -(-size.width // box), 3), np.uint8)
    with closing(read_blocks(reader, level, box, lambda rgb: box_reduce(rgb, box), threads=threads)) as blocks:
        for place, part in blocks:
            small[place] = part
    shrink = min(1.0, edge_px * box / longest[level])
    out = (max(1, round(size.width / box * shrink)), max(1, round(size.height / box * shrink)))
    exact = (0, 0, size.width / box, size.height / box)  # the last box may reach past the slide
    return np.array(Image.fromarray(small).resize(out, Image.Resampling.BICUBIC, box=exact))


def _tint_tiles(pixels: NDArray[np.uint8], grid: TileGrid, scale: NDArray[np.float64]) -> None:
    tint = np.array(TILE) * TILE_TINT
    edge = grid.patch_size_level0
    lined = edge * scale.min() >= LINE_TILE_PX
    corners = np.rint(np.stack([grid.xy0, grid.xy0 + edge], axis=1) * scale).astype(int)  # [N, 2, 2]
    for (left, top), (right, bottom) in corners.tolist():
        part = pixels[top:bottom, left:right]
        part[:] = np.rint(part * (1 - TILE_TINT) + tint)
        if lined and part.size:
            for line in (part[0], part[:, 0], part[-1], part[:, -1]):
                line[:] = (line.astype(np.uint16) + np.array(TILE, np.uint16)) // 2


def _shade(pixels: NDArray[np.uint8], where: NDArray[np.bool_]) -> None:
    """Half LEFT_OUT over the part of the picture that `where` (of the whole slide) covers."""
    rows, cols = (np.arange(n) * m // n for n, m in zip(pixels.shape[:2], where.shape, strict=True))
    shaded = where[rows[:, None], cols]
    pixels[shaded] = (pixels[shaded].astype(np.uint16) + np.array(LEFT_OUT, np.uint16)) // 2


def _draw_rings(
    draw: ImageDraw.ImageDraw,
    rings: Iterable[NDArray[np.float64]],
    scale: NDArray[np.float64],
    colour: Colour,
    width: int,
) -> None:
    for ring in rings:
        points = ring * scale
        draw.line([*map(tuple, points.tolist()), tuple(points[0].tolist())], fill=colour, width=width, joint="curve")


def _with_strip(
    image: Image.Image, reader: SlideReader, mask: TissueMask, grid: TileGrid, regions: Regions | None
) -> Image.Image:
    """The picture above a white strip with the scale bar and the key."""
    from PIL import Image, ImageDraw, ImageFont

    whole = Image.new("RGB", (max(image.width, MIN_WIDTH), image.height + BAR_PX), "white")
    whole.paste(image, (0, 0))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=15)
    um_per_px = reader.mpp0 * reader.size0[0] / image.width
    length_um = _round_length(image.width * um_per_px / 5)
    middle, x = image.height + BAR_PX // 2, 12.0
    bar = length_um / um_per_px
    draw.rectangle((x, middle - 3, x + bar, middle + 3), fill=INK)
    x = _write(draw, font, (x + bar + 8, middle), _length_text(length_um), INK) + 24
    share = f"{len(grid)} of {grid.cells} tiles, {grid.patch_size_level0 * reader.mpp0:.0f} um"
    keys = [(TILE, share), (OUTLINE, "tissue")]
    keys += [(LEFT_OUT, "left out")] if mask.left_out is not None else []
    keys += [(REGION, "region of interest")] if regions is not None else []
    for colour, text in keys:
        if x + 20 + font.getlength(text) > whole.width:
            break
        draw.rectangle((x, middle - 6, x + 12, middle + 6), outline=colour, width=3)
        x = _write(draw, font, (x + 20, middle), text, INK) + 24
    return whole


def _write(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    at: tuple[float, float],
    text: str,
    colour: Colour,
) -> float:  # x of the text's end
    draw.text(at, text, fill=colour, font=font, anchor="lm")
    return at[0] + draw.textlength(text, font=font)


def _round_length(um: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is at most `um`."""
    power = 10.0 ** floor(log10(um))
    return max(step * power for step in (1, 2, 5) if step * power <= um)


def _length_text(um: float) -> str:
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} um"
