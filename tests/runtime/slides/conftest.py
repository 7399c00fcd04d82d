"""Slides for these tests: real ones from the shared folder, and a reader over plain arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.slides import Level, SlideReader
from wsi_rt.runtime.slides.prefetch import THREAD_NAME
from wsi_rt.runtime.slides.reader import DeclaredMpp
from wsi_rt.runtime.slides.synth import write_synth_slide

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "slides"


@pytest.fixture(scope="session")
def slides() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"real slides are not there: {DATA}")
    return DATA


class ArraySlide(SlideReader):
    """Levels held as arrays u8 [h, w, 3]; level px = round(level-0 px / downsample). Counts its reads."""

    def __init__(
        self,
        path: Path,
        arrays: Sequence[NDArray[np.uint8]],
        downsamples: Sequence[float],
        mpp: float | None,
        settings: SlideSettings | None = None,
    ) -> None:
        self.arrays = arrays
        self.reads = 0
        levels = tuple(Level(a.shape[1], a.shape[0], float(d)) for a, d in zip(arrays, downsamples, strict=True))
        super().__init__(
            path,
            settings or SlideSettings(),
            name="array 1",
            levels=levels,
            declared_mpp=DeclaredMpp(mpp, mpp, "array.mpp"),
        )

    def _read(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        with self._lock:
            self.reads += 1
        source, downsample = self.arrays[level], self.levels[level].downsample
        x, y = (round(v / downsample) for v in xy0)
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        inside = source[max(y, 0) : max(y + size[1], 0), max(x, 0) : max(x + size[0], 0)]
        top, left = max(-y, 0), max(-x, 0)
        out[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return out

    def _close(self) -> None:
        self.arrays = ()


@pytest.fixture
def array_slide(tmp_path: Path) -> Callable[..., ArraySlide]:
    """array_slide(array or arrays, mpp=..., downsamples=(1,)) -> reader."""

    def make(
        arrays: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
        mpp: float | None = 0.5,
        downsamples: Sequence[float] = (1,),
    ) -> ArraySlide:
        path = tmp_path / "array.slide"
        path.write_bytes(b"array")
        return ArraySlide(path, [arrays] if isinstance(arrays, np.ndarray) else arrays, downsamples, mpp)

    return make


@pytest.fixture
def level_slide(array_slide: Callable[..., ArraySlide]) -> Callable[..., ArraySlide]:
    """level_slide(width, height, mpp, downsamples) -> reader with sizes only (one stored px per level)."""

    def make(width: int, height: int, mpp: float, downsamples: Sequence[float] = (1,)) -> ArraySlide:
        pixel = np.zeros((1, 1, 3), np.uint8)
        views = [np.broadcast_to(pixel, (max(1, int(height / d)), max(1, int(width / d)), 3)) for d in downsamples]
        return array_slide(views, mpp=mpp, downsamples=downsamples)

    return make


@pytest.fixture(scope="session")
def synth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic slide with odd sizes: 2,000 x 1,300 px, 0.5 um/px, three levels."""
    return write_synth_slide(tmp_path_factory.mktemp("synth") / "small.svs", width=2000, height=1300, seed=3)


@pytest.fixture
def reader_threads() -> Callable[[], list[str]]:
    """The names of the read-ahead threads that are alive."""
    return lambda: [t.name for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]
