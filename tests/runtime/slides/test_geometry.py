"""SPEC 1 over written pyramids: which level, which tiles, which pixels. Expected values are worked out by hand.

The oracle of pixels is TIFF's own decoding of the level and the resampling formula in float64; no reader of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import iter_tiles, open_slide, plan_reads
from wsi_rt.runtime.slides.synth import write_synth_slide
from wsi_rt.runtime.types import TileGrid

WIDTH, HEIGHT = 2400, 1328  # level-0 px


class Case(NamedTuple):
    mpp0: float
    levels: tuple[int, ...]
    settings: dict[str, object]
    level: int
    patch: int  # level-0 px
    cols: int
    rows: int
    resample: bool


CASES = {
    # 256 x 1 = 256; 2400 / 256 = 9.4, 1328 / 256 = 5.2
    "20x": Case(0.5, (1, 4), {}, 0, 256, 10, 6, False),
    # 0.2 % off the target: as it is
    "0.499": Case(0.499, (1, 4), {}, 0, 256, 10, 6, False),
    # level 1 has 0.5 um/px: 256 x 2 = 512; 2400 / 512 = 4.7, 1328 / 512 = 2.6
    "40x": Case(0.25, (1, 2, 4), {}, 1, 512, 5, 3, False),
    # 0.25 and 1.0 um/px: level 0, resampled; 256 x 0.5 / 0.25 = 512
    "40x-without-20x": Case(0.25, (1, 4), {}, 0, 512, 5, 3, True),
    # level 1 has 0.5056 um/px, 1.1 % off: as it is, 256 x 2
    "0.2528": Case(0.2528, (1, 2, 4), {}, 1, 512, 5, 3, False),
    # 256 x 0.5 / 0.2528 = 506.33; 2400 / 506 = 4.7, 1328 / 506 = 2.6
    "0.2528-without-20x": Case(0.2528, (1, 4), {}, 0, 506, 5, 3, True),
    # 0.456 um/px is 8.8 % off: level 1 resampled; 256 x 0.5 / 0.228 = 561.40; 561 / 2 = 280.5 px of the level
    "0.228": Case(0.228, (1, 2, 4), {}, 1, 561, 5, 3, True),
    "0.228-without-20x": Case(0.228, (1, 4), {}, 0, 561, 5, 3, True),
    # 10x is coarser than the target; read at its own resolution, 256 x 1, or enlarged, 256 x 0.5 / 1 = 128
    "10x-own": Case(1.0, (1, 4), {"target_mpp": 1.0}, 0, 256, 10, 6, False),
    "10x-enlarged": Case(1.0, (1, 4), {"allow_upsample": True}, 0, 128, 19, 11, True),
    # 20x asked of a 40x slide with a 10x level: 0.25 um/px is nearest below 0.8; 256 x 0.8 / 0.25 = 819.2
    "0.8-of-40x": Case(0.25, (1, 2, 4), {"target_mpp": 0.8}, 1, 819, 3, 2, True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("geometry")


def written(folder: Path, case: Case) -> Path:
    """A deflate pyramid (lossless, so that TIFF's decoding is the truth) with tissue right up to its borders."""
    path = folder / f"{case.mpp0}-{'-'.join(map(str, case.levels))}.svs"
    if not path.exists():
        write_synth_slide(
            path, width=WIDTH, height=HEIGHT, mpp=case.mpp0, levels=case.levels, codec="deflate", tissue=0.9, seed=7
        )
    return path


def level_pixels(path: Path, level: int) -> NDArray[np.uint8]:
    with tifffile.TiffFile(path) as tiff:
        pages = sorted((p for p in tiff.pages if p.is_tiled), key=lambda p: -p.imagewidth)
        return pages[level].asarray()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_level_tile_and_grid(folder: Path, case: Case) -> None:
    settings = SlideSettings(**case.settings)
    with open_slide(written(folder, case), settings) as reader:
        assert (reader.size0, reader.mpp0) == ((WIDTH, HEIGHT), pytest.approx(case.mpp0))
        plan = plan_reads(reader, settings)
    assert (plan.level, plan.patch_size_level0, plan.cols, plan.rows, plan.resample) == case[3:]


def bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -0.5, as Pillow's."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(size: int, offset: float, span: float) -> NDArray[np.float64]:
    """[256, size]: how much each of `size` px counts in each output px of the stretch [offset, offset + span)."""
    scale = span / 256
    centres = offset + (np.arange(256) + 0.5) * scale
    table = bicubic((np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1.0))
    return table / table.sum(axis=1, keepdims=True)


def expected_tile(level: NDArray[np.uint8], downsample: float, x0: int, y0: int, patch: int) -> NDArray[np.float64]:
    """The tile at level-0 (x0, y0): the square cut out of the white-padded level, resampled in float64."""
    left, top, span = x0 / downsample, y0 / downsample, patch / downsample
    first_x, first_y = int(left), int(top)
    edge = int(np.ceil(max(left - first_x, top - first_y) + span))
    square = np.full((edge, edge, 3), 255.0)
    part = level[first_y : first_y + edge, first_x : first_x + edge]
    square[: part.shape[0], : part.shape[1]] = part
    across, down = weights(edge, left - first_x, span), weights(edge, top - first_y, span)
    return np.einsum("yr,rsc,xs->yxc", down, square, across, optimize=True)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_pixels_of_inner_and_border_tiles(folder: Path, case: Case) -> None:
    path, settings = written(folder, case), SlideSettings(**case.settings)
    level = level_pixels(path, case.level)
    places = {(0, 0), (1, 1), (case.cols - 1, 0), (0, case.rows - 1), (case.cols - 1, case.rows - 1)}
    xy0 = np.array(sorted((row * case.patch, col * case.patch) for col, row in places), np.int64)[:, ::-1].copy()
    with open_slide(path, settings) as reader:
        plan = plan_reads(reader, settings)
        (batch,) = iter_tiles(reader, TileGrid(xy0, case.patch), plan, 8)
    for (x0, y0), tile in zip(xy0.tolist(), batch.pixels, strict=True):
        wanted = expected_tile(level, case.levels[case.level], x0, y0, case.patch)
        if not case.resample:
            np.testing.assert_array_equal(tile, wanted)
            continue
        error = np.abs(tile - np.clip(wanted, 0, 255))
        # Pillow rounds to 8 bits after each pass: half a level through the second pass's weights, and another half.
        second = np.abs(weights(plan.read_px, 0, case.patch / case.levels[case.level])).sum(axis=1).max()
        assert error.max() <= 0.5 * second + 0.5 + 0.01
        assert error.mean() < 0.35


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if not c.resample], ids=[k for k, c in CASES.items() if not c.resample]
)
def test_border_tiles_are_white_beyond_the_slide(folder: Path, case: Case) -> None:
    with open_slide(written(folder, case), SlideSettings(**case.settings)) as reader:
        plan = plan_reads(reader, SlideSettings(**case.settings))
        corner = np.array([[(case.cols - 1) * case.patch, (case.rows - 1) * case.patch]], np.int64)
        (batch,) = iter_tiles(reader, TileGrid(corner, case.patch), plan, 1)
    inside = [
        (edge - at) // case.levels[case.level] for edge, at in zip((WIDTH, HEIGHT), corner[0].tolist(), strict=True)
    ]
    tile = batch.pixels[0]
    assert (tile[:, inside[0] :] == 255).all()
    assert (tile[inside[1] :] == 255).all()
    assert (tile[: inside[1], : inside[0]].min(axis=2) < 255).mean() > 0.9


def test_a_10x_scan_names_both_ways_out(folder: Path) -> None:
    ways_out = r"1 um/px, expected 0\.5 or finer.*--target-mpp 1.*--allow-upsample"
    with open_slide(written(folder, CASES["10x-own"])) as reader, pytest.raises(SlideError, match=ways_out):
        plan_reads(reader, SlideSettings())
