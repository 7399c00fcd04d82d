"""Tiles from cuCIM's own buffers, taken by a stand-in device: decoded on the CPU, since there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.runtime.config import SlideSettings  # noqa: E402
from wsi_rt.runtime.errors import MachineError, SlideError  # noqa: E402
from wsi_rt.runtime.slides import open_slide, plan_reads, read_tile  # noqa: E402
from wsi_rt.runtime.slides.device import cucim_tiles  # noqa: E402
from wsi_rt.runtime.slides.device.cucim_tiles import CucimTiles  # noqa: E402
from wsi_rt.runtime.slides.device.features import iter_features, ring_shape  # noqa: E402
from wsi_rt.runtime.slides.readers.cucim import CucimReader, open_with_cucim  # noqa: E402
from wsi_rt.runtime.slides.tiles import TileSource  # noqa: E402
from wsi_rt.runtime.types import TileGrid  # noqa: E402

pytestmark = pytest.mark.skipif(
    not any((Path(folder) / "cucim").is_dir() for folder in sys.path), reason="cucim-cu12 is not installed"
)
Make = Callable[..., Any]


@pytest.fixture
def source(synth: Path) -> Iterator[TileSource]:
    """8 x 6 tiles of 2,000 x 1,300 px, those of the last column and row partly outside, and one wholly outside."""
    with open_with_cucim(synth, SlideSettings()) as reader:
        yield source_of(reader)


def source_of(reader: CucimReader, settings: SlideSettings | None = None) -> TileSource:
    plan = plan_reads(reader, settings or SlideSettings())
    xy0 = [(col * 256, row * 256) for row in range(6) for col in range(8)] + [(5120, 512)]
    return TileSource(reader, TileGrid(np.array(xy0, np.int64), 256), plan)


def pixels(source: TileSource) -> np.ndarray:
    """[N, 256, 256, 3], read one by one."""
    return np.stack([source.reader.read_region((int(x), int(y)), 0, (256, 256)) for x, y in source.grid.xy0])


def corner(x: Any) -> Any:
    """[b, 3, 224, 224] normalised -> [b, 3 * 256], an exact sample of the tile."""
    return x[:, :, ::14, ::14].flatten(1)


@pytest.fixture
def sampled(bands_engine: Make) -> Callable[[], Any]:
    from types import SimpleNamespace

    def make() -> Any:
        engine = bands_engine()
        engine._encode, engine._own = corner, torch.empty(64, 3 * 256)
        engine.manifest.outputs = [SimpleNamespace(dims=("batch", 3 * 256))]
        return engine

    return make


def samples(tiles: np.ndarray, engine: Any) -> np.ndarray:
    from wsi_rt.kernels.tile_normalize.reference import tile_normalize_reference

    config = engine.manifest.config
    return corner(tile_normalize_reference(torch.from_numpy(tiles), config["mean"], config["std"], 224)).numpy()


def run(source: TileSource, engine: Any, device: Any, batch_size: int, slots: int) -> list:
    tiles = CucimTiles(source, device)
    return list(iter_features(tiles, engine, device, ring_shape(tiles, engine, batch_size, slots)))


@pytest.mark.parametrize(("batch_size", "slots", "taken"), [(7, 3, 6), (8, 2, 5), (64, 1, 1)])
def test_pixels_are_the_readers(
    source: TileSource,
    stand_in: Make,
    sampled: Make,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    slots: int,
    taken: int,
) -> None:
    """White outside the slide, in order, over several of cuCIM's loaders, and nothing that races. taken: of cuCIM's
    batches; none where all tiles reach outside."""
    monkeypatch.setattr(cucim_tiles, "RUN_TILES", 16)
    engine, device = sampled(), stand_in(seed=batch_size)
    batches = run(source, engine, device, batch_size, slots)
    device.close()
    assert [row for batch in batches for row in batch.rows] == list(range(49))
    assert [f for batch in batches for f in batch.failures] == []
    features = np.concatenate([batch.features for batch in batches])
    np.testing.assert_array_equal(features, samples(pixels(source), engine))
    white = samples(np.full((1, 256, 256, 3), 255, np.uint8), engine)
    np.testing.assert_array_equal(features[48], white[0])
    assert [kind for kind, _, _ in device.issued].count("take") == taken
    del batches
    device.require_clean()
    assert device.peak["pinned"] == slots * batch_size * 3 * 256 * 4  # no tiles on the host


def test_a_batch_that_fails_is_read_tile_by_tile(
    source: TileSource, stand_in: Make, sampled: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader: Any = source.reader
    plain_batches, plain_read, loaders = reader.batches, reader._read, []

    def batches(corners: np.ndarray, *rest: Any) -> Iterator[Any]:
        loaders.append(tuple(corners[0].tolist()))
        for number, batch in enumerate(plain_batches(corners, *rest)):
            if len(loaders) == 1 and number == 1:
                raise SlideError("one of eight cannot be decoded")
            yield batch

    def read(xy0: tuple[int, int], *rest: Any) -> np.ndarray:
        if xy0 == (768, 256):  # tile 11, of batch 1
            raise SlideError("cannot be decoded")
        return plain_read(xy0, *rest)

    engine, device = sampled(), stand_in()
    wanted = pixels(source)
    monkeypatch.setattr(reader, "batches", batches)
    monkeypatch.setattr(reader, "_read", read)
    found = run(source, engine, device, 8, 3)
    assert loaders == [(0, 0), (0, 512)]  # the second goes on behind the batch that failed
    assert [(f.index, f.xy0, f.reason) for b in found for f in b.failures] == [(11, (768, 256), "cannot be decoded")]
    wanted[11] = 255
    np.testing.assert_array_equal(np.concatenate([b.features for b in found]), samples(wanted, engine))


def test_each_loader_has_a_decoder_of_its_own(source: TileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    reader: Any = source.reader
    opened: list[Any] = []
    plain = reader._cucim

    class Counting:
        @staticmethod
        def CuImage(path: str) -> Any:  # noqa: N802 - cuCIM's name
            opened.append(plain.CuImage(path))
            return opened[-1]

    monkeypatch.setattr(reader, "_cucim", Counting)
    corners = np.array([[0, 0], [256, 0], [512, 0]], np.int64)
    with closing(reader.batches(corners, 0, (256, 256), 1)) as batches:
        assert [np.asarray(batch).reshape(-1, 256, 256, 3).shape[0] for batch in batches] == [1] * 3
    (one,) = reader.batches(corners[:1], 0, (256, 256), 1)
    np.testing.assert_array_equal(np.asarray(one).reshape(256, 256, 3), reader.read_region((0, 0), 0, (256, 256)))
    assert len(opened) == 2
    for image in opened:
        with pytest.raises(RuntimeError, match="closed"):
            image.read_region((0, 0), (8, 8), 0)


def test_stopping_ends_the_thread(
    source: TileSource, stand_in: Make, sampled: Make, reader_threads: Callable[[], list[str]]
) -> None:
    engine, device = sampled(), stand_in(delay_s=0.01)
    tiles = CucimTiles(source, device)
    batches = iter_features(tiles, engine, device, ring_shape(tiles, engine, 4, 3))
    next(batches)
    assert len(reader_threads()) == 1
    batches.close()
    assert reader_threads() == []
    assert len(device.done) == len(device.issued)
    device.close()
    device.require_clean()


@pytest.mark.parametrize("mpp", [0.25, 0.2531])
def test_resampled_tiles_are_the_cpus(synth: Path, stand_in: Make, sampled: Make, mpp: float) -> None:
    """Squares of 512 and of 506 level-0 px; those that reach outside through the host. Within two grey levels of
    Pillow's, nearly all equal."""
    settings = SlideSettings(mpp=mpp)
    with open_with_cucim(synth, settings) as reader:
        plan = plan_reads(reader, settings)
        assert plan.resample
        step = plan.patch_size_level0
        xy0 = [(col * step, row * step) for row in range(plan.rows) for col in range(plan.cols)]
        source = TileSource(reader, TileGrid(np.array(xy0, np.int64), step), plan)
        engine, device = sampled(), stand_in()
        found = np.concatenate([batch.features for batch in run(source, engine, device, 4, 3)])
        wanted = samples(np.stack([read_tile(reader, plan, place) for place in xy0]), engine)
    level = 1 / (255 * min(engine.manifest.config["std"]))
    assert np.abs(found - wanted).max() < 2.01 * level
    assert (found != wanted).mean() < 2e-3
    assert "take" in {kind for kind, _, _ in device.issued}


def test_what_it_cannot_make_is_refused(
    synth: Path, stand_in: Make, array_slide: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cucim_tiles, "MAX_EDGE", 500)
    settings = SlideSettings(mpp=0.25)
    with (
        open_with_cucim(synth, settings) as reader,
        pytest.raises(SlideError, match=r"resampled from 512 px \(0\.25 to 0\.5 um/px\), expected at most 500 px"),
    ):
        CucimTiles(source_of(reader, settings), stand_in())
    other = array_slide(np.zeros((256, 256, 3), np.uint8))
    with pytest.raises(ValueError, match="array 1, expected cuCIM's"):
        CucimTiles(source_of(other), stand_in())


@pytest.mark.parametrize("at", range(3, 60, 8))
def test_cancelled_wherever_it_is(
    source: TileSource, stand_in: Make, sampled: Make, reader_threads: Callable[[], list[str]], at: int
) -> None:
    """In the caller's thread or in the reading one: the error comes out, and everything is freed."""
    engine, device = sampled(), stand_in(seed=at)

    def interrupt(kind: str, call: int) -> None:
        if call == at:
            raise MemoryError("call at which it ends")

    device.interrupt = interrupt
    with pytest.raises(MemoryError, match="call at which it ends") as caught:
        run(source, engine, device, 4, 3)
    caught.value.__traceback__ = None  # its frames hold what was being used
    del caught
    assert reader_threads() == []
    assert len(device.done) == len(device.issued)
    device.close()
    device.require_clean()


def test_the_gpu_reader_has_to_be_asked_for_and_needs_a_gpu(synth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    asked = SlideSettings(reader="cucim-cuda")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MachineError, match="pip install cupy"):
        open_slide(synth, asked)
    without = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "cupy", without)
    with pytest.raises(MachineError, match="cupy finds no NVIDIA GPU"):
        open_slide(synth, asked)
    with open_slide(synth) as reader:
        assert not isinstance(reader, CucimReader)
