"""Many slides, one stream of batches: order, failures, what is open when, and stopping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import SlideReader, find_tissue, open_slide, plan_reads, select_tiles
from wsi_rt.runtime.slides.cohort import FailedSlide, SlideBatch, iter_slide_batches
from wsi_rt.runtime.slides.grid import ReadPlan
from wsi_rt.runtime.slides.synth import write_synth_slide
from wsi_rt.runtime.types import TileGrid

Threads = Callable[[], list[str]]


@dataclass
class Found:
    reader: SlideReader
    plan: ReadPlan
    grid: TileGrid


class Opener:
    """Opens slides as `encode` does, and keeps a diary."""

    def __init__(self) -> None:
        self.diary: list[str] = []
        self.pause: Callable[[Path, Callable[..., None]], None] = lambda path, check: None

    @contextmanager
    def __call__(self, path: Path, check: Callable[..., None]) -> Iterator[Found]:
        self.diary.append(f"open {path.name}")
        self.pause(path, check)
        with open_slide(path, SlideSettings()) as reader:
            plan = plan_reads(reader, SlideSettings())
            grid = select_tiles(plan, find_tissue(reader, threads=1, on_progress=check))
            self.diary.append(f"ready {path.name}")
            yield Found(reader, plan, grid)
        self.diary.append(f"close {path.name}")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("cohort")
    return [
        write_synth_slide(folder / f"s{n}.svs", width=1200 + 300 * n, height=1000, seed=n, tissue=0.5) for n in range(3)
    ]


def test_every_slide_as_if_read_alone(cohort: list[Path], slides: Path, reader_threads: Threads) -> None:
    paths = [*cohort, slides / "CMU-1-Small-Region.svs"]
    opener, got = Opener(), {n: [] for n in range(4)}
    for item in iter_slide_batches(paths, opener, batch_size=8):
        assert isinstance(item, SlideBatch)
        got[item.number].append((item.batch.index.copy(), item.batch.pixels.copy(), item.last))
    for number, path in enumerate(paths):
        with Opener()(path, lambda *_: None) as found:
            expected = np.stack(
                [found.reader.read_region(tuple(xy), found.plan.level, (256, 256)) for xy in found.grid.xy0]
            )
        np.testing.assert_array_equal(np.concatenate([index for index, _, _ in got[number]]), np.arange(len(expected)))
        np.testing.assert_array_equal(np.concatenate([pixels for _, pixels, _ in got[number]]), expected)
        assert [last for _, _, last in got[number]] == [False] * (len(got[number]) - 1) + [True]
    assert [line for line in opener.diary if "close" in line] == [f"close {path.name}" for path in paths]
    assert reader_threads() == []


def test_the_next_slide_is_ready_before_the_last_batch_of_this_one(cohort: list[Path]) -> None:
    opener = Opener()
    batches = iter_slide_batches(cohort, opener, batch_size=4, threads=1)
    first = next(batches)
    assert isinstance(first, SlideBatch)
    assert not first.last
    for _ in range(100):  # while the caller is at work on the first batch
        if "ready s1.svs" in opener.diary:
            break
        time.sleep(0.05)
    assert opener.diary == ["open s0.svs", "ready s0.svs", "open s1.svs", "ready s1.svs"]  # and no further
    batches.close()
    assert sorted(opener.diary[4:]) == ["close s0.svs", "close s1.svs"]


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_bad_slide_comes_at_its_turn(cohort: list[Path], tmp_path: Path, bad: int) -> None:
    blank = write_synth_slide(tmp_path / "blank.svs", width=600, height=500, tissue=0.0, levels=(1,))
    paths = [*cohort[:bad], blank, *cohort[bad:]]
    seen: list[tuple[int, bool]] = []
    for item in iter_slide_batches(paths, Opener(), batch_size=16):
        failed = isinstance(item, FailedSlide)
        if failed:
            assert item.path == blank
            assert "no tissue" in str(item.error)
        if (item.number, failed) not in seen:
            seen.append((item.number, failed))
    assert seen == [(n, n == bad) for n in range(4)]


def test_all_bad_and_none(tmp_path: Path) -> None:
    missing = [tmp_path / "a.svs", tmp_path / "b.svs"]
    items = list(iter_slide_batches(missing, Opener(), batch_size=4))
    assert [(item.number, type(item)) for item in items] == [(0, FailedSlide), (1, FailedSlide)]
    assert list(iter_slide_batches([], Opener(), batch_size=4)) == []


def test_a_defect_is_not_taken_for_a_bad_slide(cohort: list[Path], reader_threads: Threads) -> None:
    opener = Opener()

    def break_down(path: Path, check: Callable[..., None]) -> None:
        if path.name == "s1.svs":
            raise ZeroDivisionError("a defect")

    opener.pause = break_down
    with pytest.raises(ZeroDivisionError):
        list(iter_slide_batches(cohort, opener, batch_size=8))
    assert "close s0.svs" in opener.diary
    assert reader_threads() == []


@pytest.mark.parametrize("how", ["close", "interrupt"])
def test_stopping_closes_slides_and_ends_preparation(cohort: list[Path], reader_threads: Threads, how: str) -> None:
    opener, preparing = Opener(), threading.Event()

    def endless(path: Path, check: Callable[..., None]) -> None:
        if path.name == "s1.svs":
            preparing.set()
            for _ in range(600):
                time.sleep(0.05)
                check("tissue", 1, 2)
            raise SlideError("was not told to stop")

    opener.pause = endless
    batches = iter_slide_batches(cohort, opener, batch_size=4)
    next(batches)
    preparing.wait(5)
    started = time.monotonic()
    if how == "close":
        batches.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt())
    assert time.monotonic() - started < 10
    assert opener.diary == ["open s0.svs", "ready s0.svs", "open s1.svs", "close s0.svs"]
    assert reader_threads() == []
