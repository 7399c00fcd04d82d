"""The pixels that tissue is found on: luminance and what the colours hint at, at about 8 um/px (SPEC 1)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.slides.prefetch import prefetch_map
from wsi_rt.runtime.slides.reader import SlideReader

MASK_MPP = 8.0  # um/px of the mask, about
BLOCK_PX = (4096, 1024)  # (w, h) read at once: 4 Mpx, about 45 MB per thread while it is decoded

# Bits of MaskPixels.hints. Grey levels of a box mean over 8 um, 0..255. H&E absorbs green most: over 8 um green exceeds
# red by at most 7 in the tissue tiles at hand (8 in an IHC section with a blue counterstain), and by 20 to 160 in ink.
INK = 1  # green, blue or turquoise: green - red >= 20, or >= 8 where blue - red >= 40 or luminance < 100 (over tissue)
GREY = 2  # dark without colour: max - min <= 10 and luminance < 200, or <= 20 and < 70 (black ink is never quite black)
PALE = 4  # nearly without colour, however bright: max - min <= 12
STAINED = 8  # pink to purple: max - min > 20, and red >= green
GLASSY = 16  # bright and nearly white: luminance >= 190, max - min <= 30
PURE = 32  # 255, 255, 255: what unscanned areas are painted
COLOURLESS = 64  # max - min <= 1: as all of a greyscale scan

Part = TypeVar("Part")
Place = tuple[slice, slice]  # rows, columns
Block = tuple[int, int, int, int]  # x, y, w, h in px of the level read


@dataclass(frozen=True)
class MaskPixels:
    """luminance: f32 [h, w], 0..255.    hints: u8 [h, w], bits as above.    level, box: see `mask_level`.
    scale0: (x, y) level-0 px per px of these arrays.    mpp: um per px of these arrays."""

    luminance: NDArray[np.float32]
    hints: NDArray[np.uint8]
    level: int
    box: int
    scale0: tuple[float, float]
    mpp: float

    def has(self, bit: int) -> NDArray[np.bool_]:
        """bool [h, w]: where the hint is set."""
        return (self.hints & bit) != 0


def mask_level(reader: SlideReader) -> tuple[int, int]:
    """(level, box edge): the coarsest level of at most 1.25 x 8 um/px, and the reduction to about 8 um/px."""
    mpps = [reader.mpp0 * level.downsample for level in reader.levels]
    usable = [i for i, mpp in enumerate(mpps) if mpp <= 1.25 * MASK_MPP] or [0]
    level = max(usable, key=lambda i: mpps[i])
    return level, max(1, round(MASK_MPP / mpps[level]))


def read_mask_pixels(
    reader: SlideReader, *, threads: int, on_progress: Callable[[int, int], None] | None = None
) -> MaskPixels:
    """Luminance (mean of R, G, B) and hints of the whole slide, box-filtered.

    Border px average what lies inside the slide only. Pillow's `reduce` is the box filter; it rounds each channel to a
    whole grey level. on_progress(done, total) counts blocks. Raises SlideError of the reader.
    """
    level, box = mask_level(reader)
    size = reader.levels[level]
    shape = (-(-size.height // box), -(-size.width // box))
    luminance, hints = np.empty(shape, np.float32), np.empty(shape, np.uint8)

    def work(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        small = box_reduce(rgb, box)
        part = small.sum(axis=2, dtype=np.float32) / np.float32(3)
        return part, _hints(small, part)

    with closing(read_blocks(reader, level, box, work, threads=threads, on_progress=on_progress)) as blocks:
        for place, (part, bits) in blocks:
            luminance[place], hints[place] = part, bits
    mpp = reader.mpp0 * size.downsample * box
    scale0 = (box * reader.size0[0] / size.width, box * reader.size0[1] / size.height)
    return MaskPixels(luminance, hints, level, box, scale0, mpp)


def read_blocks(
    reader: SlideReader,
    level: int,
    box: int,
    work: Callable[[NDArray[np.uint8]], Part],
    *,
    threads: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Generator[tuple[Place, Part], None, None]:
    """Read a whole level in blocks of whole boxes; yield (rows and columns in boxes, work(u8 [h, w, 3])).

    `work` runs in `threads` threads, so memory is bounded by the block, not by the level. Close the generator.
    """
    size = reader.levels[level]
    scale_x, scale_y = reader.size0[0] / size.width, reader.size0[1] / size.height

    def read(block: Block) -> Part:
        x, y, w, h = block
        return work(reader.read_region((round(x * scale_x), round(y * scale_y)), level, (w, h)))

    blocks = list(_blocks(size.width, size.height, box))
    parts = prefetch_map(read, blocks, threads=threads, depth=2 * threads)
    try:
        for done, ((x, y, w, h), part) in enumerate(zip(blocks, parts, strict=True), start=1):
            yield np.s_[y // box : -(-(y + h) // box), x // box : -(-(x + w) // box)], part
            if on_progress is not None:
                on_progress(done, len(blocks))
    finally:
        parts.close()


def _blocks(width: int, height: int, box: int) -> Iterator[Block]:
    step_x, step_y = (max(box, edge - edge % box) for edge in BLOCK_PX)
    for y in range(0, height, step_y):
        for x in range(0, width, step_x):
            yield x, y, min(step_x, width - x), min(step_y, height - y)


def box_reduce(rgb: NDArray[np.uint8], box: int) -> NDArray[np.uint8]:
    """u8 [h, w, 3] -> [ceil(h / box), ceil(w / box), 3], the mean of each box, rounded."""
    from PIL import Image

    return np.asarray(Image.fromarray(rgb).reduce(box)) if box > 1 else rgb


def _hints(rgb: NDArray[np.uint8], luminance: NDArray[np.float32]) -> NDArray[np.uint8]:
    red, green, blue = (rgb[..., i].astype(np.int16) for i in range(3))
    low, high = rgb.min(axis=2), rgb.max(axis=2)
    chroma = high - low
    tests = {
        INK: (green - red >= 20) | ((green - red >= 8) & ((blue - red >= 40) | (luminance < 100))),
        GREY: ((chroma <= 10) & (luminance < 200)) | ((chroma <= 20) & (luminance < 70)),
        PALE: chroma <= 12,
        STAINED: (chroma > 20) & (red >= green),
        GLASSY: (luminance >= 190) & (chroma <= 30),
        PURE: low == 255,
        COLOURLESS: chroma <= 1,
    }
    bits = np.zeros(rgb.shape[:2], np.uint8)
    for bit, where in tests.items():
        bits |= np.where(where, np.uint8(bit), np.uint8(0))
    return bits
