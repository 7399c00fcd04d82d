"""Reading tiles ahead: pixels, order, memory, and what happens when it is stopped or fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import (
    SlideReader,
    find_tissue,
    iter_tiles,
    open_slide,
    plan_reads,
    read_tile,
    select_tiles,
)
from wsi_rt.runtime.slides.grid import ReadPlan
from wsi_rt.runtime.slides.synth import SlideSpec, write_synth_slide
from wsi_rt.runtime.slides.synth.tiff import PyramidWriter
from wsi_rt.runtime.types import TileGrid

Make = Callable[..., SlideReader]
Threads = Callable[[], list[str]]


def whole_grid(plan: ReadPlan) -> TileGrid:
    step = plan.patch_size_level0
    xy0 = [(col * step, row * step) for row in range(plan.rows) for col in range(plan.cols)]
    return TileGrid(np.array(xy0, np.int64), step, cells=plan.cells)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tiles_in_order_and_equal_to_direct_reads(slides: Path, threads: int) -> None:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        plan = plan_reads(reader, SlideSettings())
        grid = select_tiles(plan, find_tissue(reader))
        seen: list[tuple[int, int]] = []
        batches = list(iter_tiles(reader, grid, plan, 10, threads, lambda *at: seen.append(at)))
        direct = [reader.read_region((int(x), int(y)), 0, (256, 256)) for x, y in grid.xy0]
    total = len(grid)
    sizes = [10] * (total // 10) + ([total % 10] if total % 10 else [])
    assert [len(b.index) for b in batches] == sizes
    assert seen == [(done, total) for done in np.cumsum(sizes).tolist()]
    np.testing.assert_array_equal(np.concatenate([b.index for b in batches]), np.arange(total))
    pixels = np.concatenate([b.pixels for b in batches])
    assert pixels.shape == (total, 256, 256, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.stack(direct))


def test_order_holds_when_early_tiles_are_slow(array_slide: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.repeat(np.arange(8, dtype=np.uint8), 256)[None, :, None] * np.ones((256, 1, 3), np.uint8)
    reader = array_slide(pixels.astype(np.uint8))
    quick = reader._read

    def slow_first(xy0: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        time.sleep(0.03 if xy0[0] % 512 == 0 else 0)
        return quick(xy0, level, size)

    monkeypatch.setattr(reader, "_read", slow_first)
    plan = plan_reads(reader, SlideSettings())
    batches = list(iter_tiles(reader, whole_grid(plan), plan, 3, threads=4))
    assert [int(v) for b in batches for v in b.pixels[:, 0, 0, 0]] == list(range(8))


def test_border_tile_is_white_outside(slides: Path) -> None:
    with open_slide(slides / "CMU-1-Small-Region.svs") as reader:
        plan = plan_reads(reader, SlideSettings())
        tile = read_tile(reader, plan, (8 * 256, 11 * 256))
    assert (tile[:, 2220 - 8 * 256 :] == 255).all()
    assert (tile[2967 - 11 * 256 :] == 255).all()
    assert (tile[: 2967 - 11 * 256, : 2220 - 8 * 256] < 255).mean() > 0.5


def test_slide_smaller_than_a_tile(slides: Path) -> None:
    with open_slide(slides / "ospy_small.svs") as reader:
        plan = plan_reads(reader, SlideSettings())
        (batch,) = iter_tiles(reader, whole_grid(plan), plan, 4)
        inside = reader.read_region((0, 0), 0, (16, 16))
    assert batch.pixels.shape == (1, 256, 256, 3)
    np.testing.assert_array_equal(batch.pixels[0, :16, :16], inside)
    assert (batch.pixels[0, 16:] == 255).all()
    assert (batch.pixels[0, :, 16:] == 255).all()


def test_resampled_tile_is_pillows_bicubic(slides: Path) -> None:
    """0.25 um/px: a square of 512 px at the tile's corner, halved."""
    settings = SlideSettings(mpp=0.25)
    with open_slide(slides / "CMU-1-Small-Region.svs", settings) as reader:
        tile = read_tile(reader, plan_reads(reader, settings), (1024, 1536))
        square = Image.fromarray(reader.read_region((1024, 1536), 0, (512, 512)))
    np.testing.assert_array_equal(tile, np.asarray(square.resize((256, 256), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    ("mpp", "widths"),
    [(0.2281750559, (2600, 1300)), (0.2, (2600, 1280)), (0.17, (2600,)), (0.3, (2600,))],
    ids=["half-px", "odd-downsample", "level0-reduced-3x", "level0-reduced-1.7x"],
)
def test_resampled_tile_lies_where_it_should(tmp_path: Path, mpp: float, widths: tuple[int, ...]) -> None:
    """On a linear ramp every output px must hold the ramp's value at its own centre; through OpenSlide.

    Tiles of 561 level-0 px start at half px of a level with downsample 2: a tile read from the
    rounded corner would be off by half a px there, here by 0.09 grey levels.
    """
    path = tmp_path / "ramp.svs"
    sizes = [(width, width * 1040 // 2600) for width in widths]  # the same ratio in x and y
    with path.open("wb") as file:
        writer = PyramidWriter(file, SlideSpec(tile=512, codec="raw"), f"Aperio |AppMag = 40|MPP = {mpp}", sizes=sizes)
        for level, width in enumerate(widths):
            for col in range(-(-width // 512)):
                centres = (col * 512 + np.arange(512) + 0.5) * 2600 / width
                # rounded by a dither over 32 rows, so that the mean of a column keeps the fraction
                dither = (np.arange(512) % 32 + 0.5) / 32
                tile = np.floor(0.09 * centres[None, :] + dither[:, None]).astype(np.uint8)
                for row in range(-(-sizes[level][1] // 512)):
                    writer.write_tile(level, col, row, np.repeat(tile[..., None], 3, axis=2).tobytes())
        writer.finish()
    with open_slide(path) as reader:
        plan = plan_reads(reader, SlideSettings())
        assert plan.resample
        assert plan.level == len(widths) - 1
        for col in range(3):
            x0 = col * plan.patch_size_level0
            tile = read_tile(reader, plan, (x0, 0)).astype(np.float64)
            inner = tile[16:-16, 16:-16].mean(axis=(0, 2))
            centres = x0 + (np.arange(16, 240) + 0.5) * plan.patch_size_level0 / 256
            error = inner - 0.09 * centres
            assert abs(error.mean()) < 0.03
            assert np.abs(error).max() < 0.25


def test_upsampled_tile(array_slide: Make) -> None:
    pixels = np.zeros((128, 256, 3), np.uint8)
    pixels[:, 128:] = 200
    reader = array_slide(pixels, mpp=1.0)
    settings = SlideSettings(allow_upsample=True)
    plan = plan_reads(reader, settings)
    left, right = (read_tile(reader, plan, (x, 0)) for x in (0, 128))
    assert left.shape == right.shape == (256, 256, 3)
    assert (left == 0).all()
    assert (right == 200).all()


@pytest.mark.parametrize("how", ["close", "break", "error", "interrupt", "interrupt-in-progress"])
def test_stopping_leaves_no_threads(synth: Path, reader_threads: Threads, how: str) -> None:
    def on_progress(done: int, total: int) -> None:
        if how == "interrupt-in-progress" and done >= 8:
            raise KeyboardInterrupt

    with open_slide(synth) as reader:
        plan = plan_reads(reader, SlideSettings())
        batches = iter_tiles(reader, whole_grid(plan), plan, 4, threads=2, on_progress=on_progress)
        next(batches)
        assert len(reader_threads()) == 2
        if how == "close":
            batches.close()
        elif how == "break":
            for _ in batches:
                break
            del batches
        elif how == "error":
            with pytest.raises(RuntimeError):
                batches.throw(RuntimeError("consumer failed"))
        elif how == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                batches.throw(KeyboardInterrupt())
        else:
            with pytest.raises(KeyboardInterrupt):
                list(batches)
        assert reader_threads() == []


def test_threads_end_with_the_last_tile(synth: Path, reader_threads: Threads) -> None:
    with open_slide(synth) as reader:
        plan = plan_reads(reader, SlideSettings())
        assert sum(len(b.index) for b in iter_tiles(reader, whole_grid(plan), plan, 7)) == plan.cells
    assert reader_threads() == []


@pytest.mark.parametrize(("batch_size", "ahead"), [(4, 64), (48, 96), (60, 120), (64, 64), (70, 70)])
def test_read_ahead_is_bounded(array_slide: Make, batch_size: int, ahead: int) -> None:
    """64 tiles, in whole batches, at least one."""
    reader = array_slide(np.zeros((256 * 16, 256 * 16, 3), np.uint8))
    plan = plan_reads(reader, SlideSettings())
    with closing(iter_tiles(reader, whole_grid(plan), plan, batch_size, threads=2)) as batches:
        assert reader.reads == 0
        next(batches)
        for _ in range(40):
            time.sleep(0.05)
            if reader.reads >= batch_size + ahead:
                break
        time.sleep(0.3)  # time enough to read all 256, if nothing held it back
        assert reader.reads == batch_size + ahead


def test_a_batch_keeps_its_pixels_while_anything_of_it_is_held(array_slide: Make) -> None:
    """Batches' memory serves again; each tile here has a grey level of its own."""
    levels = np.repeat(np.repeat(np.arange(100, dtype=np.uint8).reshape(10, 10), 256, axis=0), 256, axis=1)
    reader = array_slide(np.repeat(levels[..., None], 3, axis=2))
    plan = plan_reads(reader, SlideSettings())
    held: list[tuple[int, np.ndarray]] = []
    memories = set()
    for number, batch in enumerate(iter_tiles(reader, whole_grid(plan), plan, 4, threads=2)):
        memories.add(batch.pixels.ctypes.data)
        assert (batch.pixels[:, 100, 100, 0] == batch.index).all()
        if number % 5 == 0:
            held.append((int(batch.index[1]), batch.pixels[1][5:9]))  # a view of a view
    assert [(view == index).all() for index, view in held] == [True] * 5
    assert len(memories) <= 5 + 18  # those held, the one handed out, 16 ahead, and one being begun


def test_failures_are_told_and_white(tmp_path: Path) -> None:
    path = write_synth_slide(tmp_path / "bad.svs", width=1024, height=512, levels=(1,), tissue=0.6)
    with open_slide(path) as reader:
        plan = plan_reads(reader, SlideSettings())
        sound = [batch.pixels for batch in iter_tiles(reader, whole_grid(plan), plan, 3)]
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    with open_slide(path) as reader:
        batches = list(iter_tiles(reader, whole_grid(plan), plan, 3, raise_bad=False))
    assert [len(batch.failures) for batch in batches] == [0, 1, 0]
    (failure,) = batches[1].failures
    assert (failure.index, failure.xy0) == (5, (256, 256))
    assert "bad.svs: 256 x 256 px at level 0, level-0 position (256, 256) cannot be read" in failure.reason
    for number, batch in enumerate(batches):
        expected = sound[number].copy()
        if number == 1:
            expected[2] = 255
        np.testing.assert_array_equal(batch.pixels, expected)


@pytest.mark.parametrize("tile", [240, 256])
def test_resampled_tiles_decode_each_stored_tile_once(tmp_path: Path, tile: int) -> None:
    """0.2528 um/px: squares of 506 level-0 px."""
    path = write_synth_slide(tmp_path / "40x.svs", width=2530, height=1518, tile=tile, levels=(1,), mpp=0.2528)
    with open_slide(path) as reader:
        plan = plan_reads(reader, SlideSettings())
        assert (plan.resample, plan.patch_size_level0) == (True, 506)
        tiles = np.concatenate([batch.pixels for batch in iter_tiles(reader, whole_grid(plan), plan, 4)])
        assert reader.decoded == -(-2530 // tile) * -(-1518 // tile)
    with open_slide(path, SlideSettings(reader="openslide")) as reader:
        for xy0, got in zip(whole_grid(plan).xy0.tolist(), tiles, strict=True):
            np.testing.assert_array_equal(got, read_tile(reader, plan, tuple(xy0)))


def test_close_does_not_read_the_rest(
    array_slide: Make, monkeypatch: pytest.MonkeyPatch, reader_threads: Threads
) -> None:
    reader = array_slide(np.zeros((256 * 4, 256 * 10, 3), np.uint8))
    quick, gate = reader._read, threading.Event()

    def gated(xy0: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        if xy0 != (0, 0):
            gate.wait(5)
        return quick(xy0, level, size)

    monkeypatch.setattr(reader, "_read", gated)
    plan = plan_reads(reader, SlideSettings())
    batches = iter_tiles(reader, whole_grid(plan), plan, 1, threads=2)
    next(batches)
    threading.Timer(0.1, gate.set).start()
    batches.close()  # returns once the reads in progress are over
    assert reader_threads() == []
    assert reader.reads <= 3  # the first, and the two in progress; those queued behind were dropped


BAD_TILE = r"tile 5 at level-0 position \(256, 256\).*bad\.svs"


def test_a_bad_tile_is_named(tmp_path: Path, reader_threads: Threads) -> None:
    path = write_synth_slide(tmp_path / "bad.svs", width=1024, height=512, levels=(1,), tissue=0.6)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    with open_slide(path) as reader:
        plan = plan_reads(reader, SlideSettings())
        batches = iter_tiles(reader, whole_grid(plan), plan, 2, threads=2)
        assert [next(batches).index.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(SlideError, match=BAD_TILE):
            next(batches)
    for _ in range(30):  # a neighbour read at the same moment must not be blamed: OpenSlide's errors stick to a handle
        with open_slide(path) as reader, pytest.raises(SlideError, match=BAD_TILE):
            list(iter_tiles(reader, whole_grid(plan), plan, 8, threads=4))
    assert reader_threads() == []


def test_no_tiles_no_batches(synth: Path) -> None:
    with open_slide(synth) as reader:
        plan = plan_reads(reader, SlideSettings())
        assert list(iter_tiles(reader, TileGrid(np.zeros((0, 2), np.int64), 256), plan, 4)) == []


def test_wrong_use_is_a_value_error(synth: Path) -> None:
    with open_slide(synth) as reader:
        plan = plan_reads(reader, SlideSettings())
        grid = whole_grid(plan)
        for batch_size, threads in ((0, 1), (1, 0)):
            with pytest.raises(ValueError, match="expected 1 or more"):
                iter_tiles(reader, grid, plan, batch_size, threads)
        with pytest.raises(ValueError, match="512"):
            iter_tiles(reader, TileGrid(grid.xy0, 512), plan, 1)
