"""How each provider reads tiles, in the way its own documentation recommends; imported in the measured process only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_rt.benchmarks.tiles.cases import LIMIT, OURS, REFERENCE
from wsi_rt.benchmarks.tiles.limit import Limit, tiled_pages
from wsi_rt.benchmarks.tiles.work import Work
from wsi_rt.runtime.types import TILE_PX

BATCH = 64
Pixels = NDArray[np.uint8]


class Provider(Protocol):
    """Opened with (work, threads); `read` gives all of xy0's tiles, u8 [B, 256, 256, 3] batch by batch."""

    def read(self, xy0: NDArray[np.int64]) -> Iterator[Pixels]: ...


class Ours:
    """The loop that feeds the encoder."""

    def __init__(self, work: Work, threads: int) -> None:
        from wsi_rt.runtime.slides import open_slide

        self._reader, self._work, self._threads = open_slide(work.path), work, threads
        self.name = self._reader.name

    def read(self, xy0: NDArray[np.int64]) -> Iterator[Pixels]:
        from wsi_rt.runtime.slides import iter_tiles
        from wsi_rt.runtime.types import TileGrid

        grid = TileGrid(xy0, self._work.plan.patch_size_level0)
        for batch in iter_tiles(self._reader, grid, self._work.plan, BATCH, threads=self._threads):
            yield batch.pixels


class OneByOne:
    """Peers that read one region a call: consecutive tiles in batches, a batch per thread."""

    def __init__(self, work: Work, threads: int) -> None:
        self._plan, self._threads = work.plan, threads
        self._local = threading.local()
        self._open: Callable[[], Callable[[int, int], Any]] = lambda: self.opened(work)

    def opened(self, work: Work) -> Callable[[int, int], Any]:
        """A function (x0, y0) -> u8 [256, 256, 3] of a handle that one thread uses."""
        raise NotImplementedError

    def read(self, xy0: NDArray[np.int64]) -> Iterator[Pixels]:
        def batch(start: int) -> Pixels:
            if not hasattr(self._local, "tile"):
                self._local.tile = self._open()
            places = xy0[start : start + BATCH].tolist()
            out = np.empty((len(places), TILE_PX, TILE_PX, 3), np.uint8)  # [B, 256, 256, 3]
            for row, (x, y) in enumerate(places):
                out[row] = self._local.tile(x, y)
            return out

        with ThreadPoolExecutor(self._threads) as pool:
            yield from pool.map(batch, range(0, len(xy0), BATCH))


class OpenSlide(OneByOne):
    """openslide-python's read_region; resized with Pillow where the case asks for it (the published way)."""

    def opened(self, work: Work) -> Callable[[int, int], Any]:
        import openslide
        from PIL import Image

        slide, plan = openslide.OpenSlide(slide_file(work.path)), work.plan
        slide.set_cache(openslide.OpenSlideCache(128 << 20))  # its default of 32 MiB decodes off-grid tiles twice
        if not plan.resample:
            return lambda x, y: np.asarray(slide.read_region((x, y), plan.level, (TILE_PX, TILE_PX)))[..., :3]

        def resized(x: int, y: int) -> Any:
            d = plan.downsample
            first = (int(x / d), int(y / d))  # level px
            left, top = x / d - first[0], y / d - first[1]
            span = plan.patch_size_level0 / d
            edge = int(np.ceil(max(left, top) + span))
            square = slide.read_region((round(first[0] * d), round(first[1] * d)), plan.level, (edge, edge))
            box = (left, top, left + span, top + span)
            return square.convert("RGB").resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC, box=box)

        return resized


class TiffSlide(OneByOne):
    def opened(self, work: Work) -> Callable[[int, int], Any]:
        import tiffslide

        slide, level = tiffslide.TiffSlide(work.path), work.plan.level
        return lambda x, y: slide.read_region((x, y), level, (TILE_PX, TILE_PX), as_array=True)


class PyVips(OneByOne):
    """A region per thread of the level's page; libvips' own threads are switched off (VIPS_CONCURRENCY)."""

    def opened(self, work: Work) -> Callable[[int, int], Any]:
        import pyvips

        page = _tiff_page(work)
        region = pyvips.Region.new(pyvips.Image.tiffload(str(work.path), page=page, access="random"))
        d = work.plan.downsample

        def tile(x: int, y: int) -> Any:
            data = region.fetch(round(x / d), round(y / d), TILE_PX, TILE_PX)
            return np.frombuffer(data, np.uint8).reshape(TILE_PX, TILE_PX, -1)[..., :3]

        return tile


class FastSlide(OneByOne):
    def opened(self, work: Work) -> Callable[[int, int], Any]:
        import fastslide

        slide, level, d = fastslide.FastSlide.from_file_path(str(work.path)), work.plan.level, work.plan.downsample
        return lambda x, y: slide.read_region((round(x / d), round(y / d)), level, (TILE_PX, TILE_PX)).numpy()


class WsiDicom(OneByOne):
    """Its read_tile where the grid is that of the frames, else read_region."""

    def opened(self, work: Work) -> Callable[[int, int], Any]:
        import wsidicom

        slide, level, d = wsidicom.WsiDicom.open(work.path), work.plan.level, work.plan.downsample
        aligned = (slide.tile_size.width, slide.tile_size.height) == (TILE_PX, TILE_PX)

        def tile(x: int, y: int) -> Any:
            x, y = round(x / d), round(y / d)
            if aligned and x % TILE_PX == 0 and y % TILE_PX == 0:
                return slide.read_tile(level, (x // TILE_PX, y // TILE_PX), as_array=True)
            return slide.read_region((x, y), level, (TILE_PX, TILE_PX), as_array=True)

        return tile


class CuCim:
    """Its batch loader on the CPU with `threads` workers. The buffers are its own, reused: handed on as they are.

    Its cache of file tiles is left off: off the grid, "per_process" with 256 MiB cost as much per tile as none.
    """

    def __init__(self, work: Work, threads: int) -> None:
        from cucim import CuImage  # type: ignore[attr-defined]

        self._image, self._level, self._threads = CuImage(str(work.path)), work.plan.level, threads

    def read(self, xy0: NDArray[np.int64]) -> Iterator[Pixels]:
        places = [tuple(place) for place in xy0.tolist()]
        loader = self._image.read_region(
            places, (TILE_PX, TILE_PX), self._level,
            num_workers=self._threads, batch_size=BATCH, prefetch_factor=2,
        )  # fmt: skip
        for batch in loader:
            yield np.asarray(batch)


def slide_file(path: Path) -> Path:
    """What OpenSlide opens: of a folder of DICOM instances any of them."""
    return sorted(path.glob("*.dcm"))[0] if path.is_dir() else path


def _tiff_page(work: Work) -> int:
    """Which directory holds the level."""
    import tifffile

    with tifffile.TiffFile(work.path) as tiff:
        return int(tiled_pages(tiff)[work.plan.level].index)


def provider(name: str) -> Callable[[Work, int], Provider]:
    """The class of a provider."""
    table: dict[str, Callable[[Work, int], Provider]] = {
        OURS: Ours, REFERENCE: OpenSlide, "tiffslide": TiffSlide, "cucim": CuCim, "pyvips": PyVips,
        "fastslide": FastSlide, "wsidicom": WsiDicom, LIMIT: Limit,
    }  # fmt: skip
    return table[name]
