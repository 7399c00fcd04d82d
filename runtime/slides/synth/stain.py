"""Procedural H&E: tissue islands with fibres, glands and nuclei on a near-white background.

Colours come from Beer-Lambert absorption with the reference stain vectors of Macenko et al. 2009.
Any rectangle can be painted by itself and fits its neighbours, so a slide of any size is made tile
by tile. It looks the part for throughput tests and screenshots; it carries no pathology.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FIELD_PX = 256  # longer side of the map that says where tissue is
PERIODS = (1024, 896)  # px; two textures of different period do not repeat together within a tile row
WHITE = 244.0
GRAIN_PX = 16  # divides every stored tile, so that all bare tiles are the same bytes
HAEMATOXYLIN = np.array((0.5626, 0.7201, 0.4062), np.float32)  # optical density of R, G, B per unit of stain
EOSIN = np.array((0.2159, 0.8012, 0.5581), np.float32)
RAGGED = 0.35  # how far noise moves the tissue border, in standard deviations of the field
RAGGED_LIMIT = 2.5  # the noise is cut off there
BORDER = 8  # steepness of the border, per standard deviation of the field

F32 = NDArray[np.float32]


def _enlarge(lattice: F32, width: int, height: int, margin: int) -> F32:
    """Bicubic enlargement of the lattice inside `margin` to f32 [height, width]."""
    from PIL import Image

    rows, cols = lattice.shape
    box = (margin, margin, cols - margin, rows - margin)
    return np.array(Image.fromarray(lattice).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _periodic_noise(rng: np.random.Generator, period: int, cells_y: int, cells_x: int) -> F32:
    """Smooth noise f32 [period, period] about N(0, 1) that tiles without a seam."""
    lattice = np.pad(rng.standard_normal((cells_y, cells_x)).astype(np.float32), 2, mode="wrap")
    noise = _enlarge(lattice, period, period, 2)
    return (noise - noise.mean()) / noise.std()


def _nuclei(rng: np.random.Generator, period: int, radius: float, spacing: float) -> F32:
    """Haematoxylin of randomly placed elliptic nuclei, f32 [period, period] in 0..1, without a seam.

    radius, spacing: px, floored so that a coarse slide does not ask for millions of nuclei.
    """
    radius, spacing = max(radius, 1.5), max(spacing, 10.0)
    stain = np.zeros((period, period), np.float32)
    reach = math.ceil(1.5 * radius) + 2
    offset = np.arange(-reach, reach + 1)
    for _ in range(int((period / spacing) ** 2)):
        (x, y), angle = rng.uniform(0, period, 2), rng.uniform(0, math.pi)
        long, short = radius * rng.uniform(0.9, 1.4), radius * rng.uniform(0.6, 0.95)
        dx, dy = offset[None, :] - x % 1, offset[:, None] - y % 1
        along = (dx * math.cos(angle) + dy * math.sin(angle)) / long
        across = (dy * math.cos(angle) - dx * math.sin(angle)) / short
        distance = np.hypot(along, across)
        rim = 0.75 + 0.25 * np.clip(distance, 0, 1)  # chromatin is denser at the border
        disc = np.clip((1 - distance) * short, 0, 1) * rim * rng.uniform(0.65, 1.0)
        place = np.ix_((int(y) + offset) % period, (int(x) + offset) % period)
        stain[place] = np.maximum(stain[place], disc)
    return stain


class TissuePainter:
    """Paints any rectangle of one imaginary slide; the same arguments give the same pixels.

    width, height: level-0 px.  mpp: um/px, which sets the size of nuclei and glands.
    tissue: share of the slide that is tissue, 0..0.9.  Memory about 45 MB.
    """

    def __init__(self, width: int, height: int, mpp: float, seed: int, tissue: float) -> None:
        rng = np.random.default_rng(seed)
        self._size = (width, height)
        self._field = self._make_field(rng, tissue)
        first, second = PERIODS
        cells = max(4, round(first * mpp / 25))  # noise cells of about 25 um
        self._ragged = _periodic_noise(rng, first, cells, cells)
        fine = min(first // 4, 6 * cells)
        fibres = _periodic_noise(rng, first, fine, max(4, fine // 4)) + 0.6 * _periodic_noise(rng, first, cells, cells)
        self._fibres = fibres / fibres.std()
        large = max(3, round(second * mpp / 90))
        self._glands = _periodic_noise(rng, second, large, large)
        self._sparse = _nuclei(rng, first, radius=2.8 / mpp, spacing=17 / mpp)
        self._dense = _nuclei(rng, second, radius=3.6 / mpp, spacing=8.5 / mpp)
        self._grain = rng.normal(0, 1.2, (GRAIN_PX, GRAIN_PX, 3)).astype(np.float32)

    def _make_field(self, rng: np.random.Generator, tissue: float) -> F32:
        """f32 map over the slide: tissue where it is above 0; unit: its own standard deviation."""
        width, height = self._size
        scale = FIELD_PX / max(width, height)
        cols, rows = max(8, round(width * scale)), max(8, round(height * scale))
        field = np.zeros((rows, cols), np.float32)
        for cells, weight in ((5, 1.0), (11, 0.5), (25, 0.2)):
            cells_y, cells_x = (max(2, round(cells * v / max(rows, cols))) for v in (rows, cols))
            lattice = rng.standard_normal((cells_y + 4, cells_x + 4)).astype(np.float32)
            field += weight * _enlarge(lattice, cols, rows, 2)
        field /= field.std()
        y, x = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, cols)[None, :]
        field -= (3 * np.maximum(np.abs(x), np.abs(y)) ** 8).astype(np.float32)  # glass around the tissue
        threshold = np.quantile(field, 1 - tissue) if tissue > 0 else field.max() + 10
        return (field - threshold).astype(np.float32)

    def _sample(self, x0: int, y0: int, width: int, height: int) -> F32:
        """The field at level-0 px, bilinear, f32 [height, width]."""
        rows, cols = self._field.shape

        def axis(start: int, count: int, full: int, nodes: int) -> tuple[NDArray[np.intp], F32]:
            at = np.clip((np.arange(start, start + count) + 0.5) / full, 0, 1) * (nodes - 1)
            node = np.minimum(at.astype(np.intp), nodes - 2)
            return node, (at - node).astype(np.float32)

        node_x, part_x = axis(x0, width, self._size[0], cols)
        node_y, part_y = axis(y0, height, self._size[1], rows)
        left = node_x[0]
        band = self._field[:, left : node_x[-1] + 2]
        band = band[node_y] * (1 - part_y)[:, None] + band[node_y + 1] * part_y[:, None]
        return band[:, node_x - left] * (1 - part_x) + band[:, node_x - left + 1] * part_x

    def is_background(self, x0: int, y0: int, width: int, height: int) -> bool:
        """True when the rectangle surely holds no tissue (judged by the nodes of the field around it)."""
        spans = []
        for start, count, full, nodes in ((y0, height, *self._shape(0)), (x0, width, *self._shape(1))):
            first, last = (min(max(v / full, 0), 1) * (nodes - 1) for v in (start, start + count))
            spans.append(slice(math.floor(first), math.floor(last) + 2))
        return bool(self._field[spans[0], spans[1]].max() < -RAGGED_LIMIT * RAGGED - 0.5 / BORDER)

    def _shape(self, axis: int) -> tuple[int, int]:
        """(level-0 px, field nodes) of axis 0 (y) or 1 (x)."""
        return self._size[1 - axis], self._field.shape[axis]

    def background(self, width: int, height: int) -> NDArray[np.uint8]:
        """u8 [height, width, 3] of bare glass: near-white with a little grain; repeats every 16 px."""
        rows, cols = np.arange(height) % GRAIN_PX, np.arange(width) % GRAIN_PX
        return np.rint(WHITE + self._grain[np.ix_(rows, cols)]).astype(np.uint8)

    def paint(self, x0: int, y0: int, width: int, height: int) -> NDArray[np.uint8]:
        """u8 [height, width, 3] RGB of the rectangle at level-0 px (x0, y0); glass outside the slide too."""

        def texture(source: F32) -> F32:
            period = source.shape[0]
            return source[np.ix_(np.arange(y0, y0 + height) % period, np.arange(x0, x0 + width) % period)]

        field = self._sample(x0, y0, width, height) + RAGGED * np.clip(
            texture(self._ragged), -RAGGED_LIMIT, RAGGED_LIMIT
        )
        cover = np.clip(field * BORDER + 0.5, 0, 1)  # a soft border
        rows, cols = np.arange(y0, y0 + height) % GRAIN_PX, np.arange(x0, x0 + width) % GRAIN_PX
        grain = self._grain[np.ix_(rows, cols)]
        if not cover.any():
            return np.rint(WHITE + grain).astype(np.uint8)
        gland = np.clip(texture(self._glands) * 4 - 1.2, 0, 1)  # 1 inside epithelium
        fibres = texture(self._fibres)
        lumen = 1 - np.clip((texture(self._glands) - 1.75) * 6, 0, 1) * (1 - 0.1 * gland)
        nuclei = np.maximum(texture(self._sparse) * (1 - gland), texture(self._dense) * gland)
        eosin = (0.42 + 0.09 * fibres - 0.14 * gland) * lumen * (1 - 0.5 * nuclei)
        haematoxylin = (0.04 + 0.12 * gland + 0.02 * fibres + 1.1 * nuclei) * lumen
        density = np.clip(haematoxylin, 0, 2)[..., None] * HAEMATOXYLIN + np.clip(eosin, 0, 2)[..., None] * EOSIN
        light = WHITE * np.exp(-density * cover[..., None]) + grain
        return np.rint(np.clip(light, 0, 255)).astype(np.uint8)
