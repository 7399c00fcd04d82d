"""Tiles through the ring on a stand-in device: order, what may overlap and what must not, values, and every way out."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.tile_normalize.reference import tile_normalize_reference  # noqa: E402
from wsi_rt.runtime.config import SlideSettings  # noqa: E402
from wsi_rt.runtime.slides import SlideReader, iter_tiles, open_slide, plan_reads  # noqa: E402
from wsi_rt.runtime.slides.device.features import FeatureBatch, iter_features, ring_shape  # noqa: E402
from wsi_rt.runtime.slides.device.ring import RingShape, SlotState, TileRing  # noqa: E402
from wsi_rt.runtime.slides.device.sources import HostTiles  # noqa: E402
from wsi_rt.runtime.slides.grid import ReadPlan  # noqa: E402
from wsi_rt.runtime.slides.synth import write_synth_slide  # noqa: E402
from wsi_rt.runtime.slides.tiles import TileSource  # noqa: E402
from wsi_rt.runtime.types import TileGrid  # noqa: E402

Make = Callable[..., Any]
Threads = Callable[[], list[str]]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def whole_grid(plan: ReadPlan) -> TileGrid:
    step = plan.patch_size_level0
    xy0 = [(col * step, row * step) for row in range(plan.rows) for col in range(plan.cols)]
    return TileGrid(np.array(xy0, np.int64), step, cells=plan.cells)


def source_of(reader: SlideReader, settings: SlideSettings | None = None) -> TileSource:
    plan = plan_reads(reader, settings or SlideSettings())
    return TileSource(reader, whole_grid(plan), plan)


def numbered(array_slide: Make, tiles: int) -> SlideReader:
    """A slide of `tiles` tiles, 8 in a row; each has a texture of its own."""
    rows = -(-tiles // 8)
    pixels = np.random.default_rng(0).integers(0, 256, (256 * rows, 2048, 3), np.uint8)
    return array_slide(pixels)


def expected(source: TileSource, engine: Any, batch_size: int) -> np.ndarray:
    """The same on the CPU: iter_tiles, plain normalisation, the engine."""
    parts = []
    for batch in iter_tiles(source.reader, source.grid, source.plan, batch_size, raise_bad=False):
        x = tile_normalize_reference(torch.from_numpy(batch.pixels), MEAN, STD, 224).to(engine.dtype)
        parts.append(engine.run_device(x).numpy().copy())
    return np.concatenate(parts)


def run(source: TileSource, engine: Any, device: Any, batch_size: int, slots: int, threads: int = 2) -> list:
    tiles = HostTiles(source, device, threads)
    return list(iter_features(tiles, engine, device, ring_shape(tiles, engine, batch_size, slots)))


def watch_writes(reader: SlideReader, device: Any, monkeypatch: pytest.MonkeyPatch, delay_s: float = 0) -> None:
    """Tells the device what the reading threads write into its pinned memory, and slows them."""
    plain = reader.read_tiles

    def watched(xy0s: np.ndarray, level: int, size: tuple[int, int], out: np.ndarray) -> list:
        device.host_access(out.ctypes.data)
        time.sleep(delay_s)
        return plain(xy0s, level, size, out)

    monkeypatch.setattr(reader, "read_tiles", watched)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("slots", "batch_size", "threads"), [(1, 3, 1), (2, 5, 2), (3, 4, 3), (4, 3, 2), (3, 64, 2)])
def test_features_are_the_cpus_in_order(
    array_slide: Make,
    stand_in: Make,
    bands_engine: Make,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    slots: int,
    batch_size: int,
    threads: int,
) -> None:
    """Bit for bit, with nothing that races, whatever the delays."""
    source, engine = source_of(numbered(array_slide, 24)), bands_engine()
    wanted = expected(source, engine, batch_size)
    device = stand_in(seed=seed, delay_s=0.004)
    watch_writes(source.reader, device, monkeypatch, delay_s=0.002 * (seed % 3))
    batches = run(source, engine, device, batch_size, slots, threads)
    device.close()
    assert [row for batch in batches for row in batch.rows] == list(range(24))
    assert {len(batch.rows) for batch in batches[:-1]} <= {batch_size}
    assert all(batch.failures == () for batch in batches)
    np.testing.assert_array_equal(np.concatenate([batch.features for batch in batches]), wanted)
    del batches
    device.require_clean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalised_in_the_engines_type(array_slide: Make, stand_in: Make, bands_engine: Make, dtype: Any) -> None:
    source, engine = source_of(numbered(array_slide, 8)), bands_engine(dtype=dtype)
    device = stand_in()
    batches = run(source, engine, device, 4, 2)
    wanted = expected(source, engine, 4)
    np.testing.assert_array_equal(np.concatenate([batch.features for batch in batches]), wanted)
    assert engine.prepared == [4]


def test_sizes_to_prepare_are_told_before_anything_is_queued(
    array_slide: Make, stand_in: Make, bands_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, engine, device = source_of(numbered(array_slide, 8)), bands_engine(), stand_in()
    told: list[tuple[list[int], int, int]] = []

    def prepare(rows: list[int]) -> None:
        told.append((rows, len(device.issued), len(threading.enumerate())))

    monkeypatch.setattr(engine, "prepare_device", prepare)
    alive = len(threading.enumerate())
    run(source, engine, device, 3, 2)
    assert told == [([2, 3], 0, alive)]


def test_resampled_tiles(synth: Path, stand_in: Make, bands_engine: Make) -> None:
    settings = SlideSettings(mpp=0.25)
    with open_slide(synth, settings) as reader:
        source, engine, device = source_of(reader, settings), bands_engine(), stand_in()
        assert source.plan.resample
        batches = run(source, engine, device, 4, 3)
        wanted = expected(source, engine, 4)
    np.testing.assert_array_equal(np.concatenate([batch.features for batch in batches]), wanted)


def test_streams_overlap(
    array_slide: Make, stand_in: Make, monkeypatch: pytest.MonkeyPatch, bands_engine: Make
) -> None:
    """While batch 0 is encoded, batch 1 is read, copied to the device and queued for the encoder; and with two slots
    batch 2 has to wait."""
    source, engine, device = source_of(numbered(array_slide, 24)), bands_engine(), stand_in(delay_s=0)
    plain, plain_read, reads, seen = engine.run_device, source.reader.read_tiles, [], []

    def state() -> tuple[int, int, int]:
        uploads = [i for i, op in enumerate(device.issued) if op[:2] == ("copy", "decode") and i in device.done]
        return len(reads), len(uploads), sum(kind == "encode" for kind, _, _ in device.issued)

    def encode(batch: Any) -> Any:
        deadline = time.monotonic() + 60
        while not engine.ended and state() != (2, 2, 2) and time.monotonic() < deadline:
            time.sleep(0.005)
        seen.append(state())
        return plain(batch)

    def read(*arguments: Any) -> list:
        reads.append(len(engine.ended))
        return plain_read(*arguments)

    monkeypatch.setattr(engine, "run_device", encode)
    monkeypatch.setattr(source.reader, "read_tiles", read)
    run(source, engine, device, 8, 2, threads=1)
    assert seen[0] == (2, 2, 2)
    assert reads[:2] == [0, 0]
    assert reads[2] >= 1


def test_exactly_n_slots(array_slide: Make, stand_in: Make, bands_engine: Make) -> None:
    """The memory is what `RingShape` says, whatever the slide's size, and every slot is used."""
    sizes = []
    for tiles in (8, 40):
        source, engine, device = source_of(numbered(array_slide, tiles)), bands_engine(), stand_in(delay_s=0)
        host = HostTiles(source, device, 2)
        shape = ring_shape(host, engine, 4, 3)
        batches = list(iter_features(host, engine, device, shape))
        assert device.allocated == 3 * 5
        assert device.peak == {"device": shape.device_bytes(), "pinned": shape.pinned_bytes()}
        assert len(batches) == tiles // 4
        sizes.append(device.peak)
    assert sizes[0] == sizes[1]
    shape = RingShape(3, 32, 224, 1536, torch.float16, pinned=True)  # what the docstring of iter_features states
    assert round(shape.device_bytes() / (1 << 20)) == 46
    assert round(shape.pinned_bytes() / (1 << 20)) == 19
    assert round(RingShape(3, 32, 224, 1536, torch.float16, pinned=False).pinned_bytes() / (1 << 20), 1) == 0.6


def test_reading_waits_for_a_free_slot(array_slide: Make, stand_in: Make, bands_engine: Make) -> None:
    """Back-pressure: while the caller works on a batch, no more than the ring is read."""
    source, engine, device = source_of(numbered(array_slide, 64)), bands_engine(), stand_in(delay_s=0)
    reader: Any = source.reader
    tiles = HostTiles(source, device, 2)
    with closing(iter_features(tiles, engine, device, ring_shape(tiles, engine, 4, 3))) as batches:
        assert reader.reads == 0
        next(batches)
        for _ in range(200):
            if reader.reads >= 4 + 3 * 4:
                break
            time.sleep(0.05)
        time.sleep(0.2)  # time enough to read all 64, if nothing held it back
        assert reader.reads == 4 + 3 * 4  # the one handed out, and three in the ring


def test_slots_go_round(array_slide: Make, stand_in: Make) -> None:
    device = stand_in()
    ring = TileRing(RingShape(2, 4, 224, 8, torch.float32, pinned=True), device)
    first, second = ring.take(range(4)), ring.take(range(4, 8))
    assert (first.state, ring.has_free) == (SlotState.DECODING, False)
    with pytest.raises(IndexError):
        ring.take(range(8, 12))
    with pytest.raises(RuntimeError, match="slot 0 is decoding, which free does not follow"):
        ring.give_back(first)
    for slot in (second, first):
        slot.to(SlotState.READY)
        slot.to(SlotState.ENCODING)
        ring.give_back(slot)
    assert [ring.take(range(1)).number for _ in range(2)] == [1, 0]
    ring.drop()
    device.close()
    device.require_clean()  # `first` and `second` are held here, their memory is not
    with pytest.raises(ValueError, match="slots is 0"):
        RingShape(0, 4, 224, 8, torch.float32, pinned=True)


def test_tiles_that_cannot_be_read(tmp_path: Path, stand_in: Make, bands_engine: Make) -> None:
    path = write_synth_slide(tmp_path / "bad.svs", width=1024, height=512, levels=(1,), tissue=0.6)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    with open_slide(path) as reader:
        source, engine, device = source_of(reader), bands_engine(), stand_in()
        told = [batch.failures for batch in iter_tiles(reader, source.grid, source.plan, 3, raise_bad=False)]
        batches = run(source, engine, device, 3, 2)
        wanted = expected(source, engine, 3)
    assert [batch.failures for batch in batches] == told
    assert [(f.index, f.xy0) for batch in batches for f in batch.failures] == [(5, (256, 256))]
    features = np.concatenate([batch.features for batch in batches])
    np.testing.assert_array_equal(features, wanted)
    white = tile_normalize_reference(torch.full((1, 256, 256, 3), 255, dtype=torch.uint8), MEAN, STD, 224)
    np.testing.assert_array_equal(features[5], engine.run_device(white)[0].numpy())


@pytest.mark.parametrize("how", ["close", "error", "interrupt", "drop"])
def test_stopping_waits_and_frees(
    array_slide: Make, stand_in: Make, bands_engine: Make, reader_threads: Threads, how: str
) -> None:
    source, engine, device = source_of(numbered(array_slide, 40)), bands_engine(), stand_in(delay_s=0.01)
    tiles = HostTiles(source, device, 2)
    batches = iter_features(tiles, engine, device, ring_shape(tiles, engine, 4, 3))
    next(batches)
    assert reader_threads()
    if how == "close":
        batches.close()
    elif how == "drop":
        del batches
    else:
        error = RuntimeError("consumer failed") if how == "error" else KeyboardInterrupt()
        with pytest.raises(type(error)):
            batches.throw(error)
    assert reader_threads() == []
    assert len(device.done) == len(device.issued)  # nothing is queued
    device.close()
    device.require_clean()


def test_stopping_before_the_first_batch(
    array_slide: Make, stand_in: Make, bands_engine: Make, reader_threads: Threads
) -> None:
    source, engine, device = source_of(numbered(array_slide, 8)), bands_engine(), stand_in()
    tiles = HostTiles(source, device, 2)
    iter_features(tiles, engine, device, ring_shape(tiles, engine, 4, 3)).close()
    assert reader_threads() == []
    device.close()
    device.require_clean()


def interrupted(source: TileSource, engine: Any, device: Any, at: int, error: BaseException) -> bool:
    """A run that is interrupted in call `at` of the device. Whether it was."""

    def interrupt(kind: str, call: int) -> None:
        if call == at:
            raise error

    device.interrupt = interrupt
    tiles = HostTiles(source, device, 2)
    try:
        for batch in iter_features(tiles, engine, device, ring_shape(tiles, engine, 2, 2)):
            del batch
    except (KeyboardInterrupt, RuntimeError) as caught:
        if caught is not error:
            raise
        caught.__traceback__ = None  # its frames hold what was being used
        return True
    return False


def test_cancelled_at_every_point(
    array_slide: Make,
    stand_in: Make,
    bands_engine: Make,
    reader_threads: Threads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every allocation, copy, record, wait, ... of a run of four batches in two slots."""
    source, engine = source_of(numbered(array_slide, 8)), bands_engine()
    at, was = 0, True
    while was:
        at += 1
        device = stand_in(seed=at, delay_s=0.0005)
        error = KeyboardInterrupt() if at % 2 else RuntimeError()
        with monkeypatch.context() as patched:
            watch_writes(source.reader, device, patched)
            was = interrupted(source, engine, device, at, error)
        assert reader_threads() == []
        assert len(device.done) == len(device.issued)
        device.close()
        device.require_clean()
    assert at > 10 + 4 * 10  # 10 allocations, and 10 or more calls for each batch


def test_the_devices_own_failure_comes_out(
    array_slide: Make, stand_in: Make, bands_engine: Make, reader_threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails on a stream is raised where the host waits next, and everything is freed all the same."""
    source, engine, device = source_of(numbered(array_slide, 16)), bands_engine(), stand_in()
    plain = engine.run_device

    def fail(batch: Any) -> Any:
        if len(engine.ended) == 1:
            raise RuntimeError("illegal memory access")
        return plain(batch)

    monkeypatch.setattr(engine, "run_device", fail)
    with pytest.raises(RuntimeError, match="the device failed: illegal memory access"):
        run(source, engine, device, 4, 2)
    assert reader_threads() == []
    device.close()
    gc.collect()
    assert device.races == []


def test_an_unexpected_error_of_the_reader_comes_out(
    array_slide: Make, stand_in: Make, bands_engine: Make, reader_threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, engine, device = source_of(numbered(array_slide, 16)), bands_engine(), stand_in()
    plain = source.reader.read_tiles

    def fail(xy0s: np.ndarray, *rest: Any) -> list:
        if (xy0s == (512, 256)).all(axis=1).any():
            raise ZeroDivisionError
        return plain(xy0s, *rest)

    monkeypatch.setattr(source.reader, "read_tiles", fail)
    seen: list[FeatureBatch] = []
    tiles = HostTiles(source, device, 2)
    with pytest.raises(ZeroDivisionError):
        seen.extend(iter_features(tiles, engine, device, ring_shape(tiles, engine, 4, 3)))
    assert reader_threads() == []


def test_the_stand_in_finds_what_is_not_ordered(stand_in: Make) -> None:
    """The test of the tests: a missing wait is found although nothing went wrong."""
    device = stand_in(delay_s=0)
    a, b, c = (device.empty((2, 3), torch.float32) for _ in range(3))
    device.copy("decode", a, b)
    event = device.record("decode")
    device.wait_for("encode", event)
    device.copy("encode", b, c)
    assert device.races == []
    device.copy("decode", a, b)  # encode may still be reading it
    device.copy("copy", c, a)  # decode may still be reading it, encode still writing c
    assert len(device.races) == 3
    device.synchronize()
    device.copy("decode", b, a)
    assert len(device.races) == 3
    device.host_access(c.data_ptr())
    assert len(device.races) == 3
    device.copy("encode", a, c)
    device.host_access(c.data_ptr())
    assert len(device.races) == 5  # `a` is being written by decode, `c` by encode
