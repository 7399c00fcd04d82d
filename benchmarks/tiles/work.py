"""What is read: the slide of a case, made once and kept, and the tiles of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_rt.benchmarks.tiles.cases import Case
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides import ReadPlan, find_tissue, open_slide, plan_reads, select_tiles
from wsi_rt.runtime.slides.synth import write_synth_slide
from wsi_rt.runtime.types import TileGrid

WARM_UP = 64  # tiles read before the clock starts: libraries load, pools and caches start


@dataclass(frozen=True)
class Work:
    """path: the slide.  xy0: int64 [N, 2], the tiles in grid order, the first WARM_UP not timed.

    level, read_px: what is read.  step0: grid step, level-0 px.  resample: to 256 px afterwards.
    """

    path: Path
    xy0: NDArray[np.int64]
    plan: ReadPlan

    @property
    def timed(self) -> int:
        return len(self.xy0) - WARM_UP

    @property
    def grid(self) -> TileGrid:
        return TileGrid(self.xy0, self.plan.patch_size_level0)


def make_slide(case: Case, quick: bool, folder: Path, threads: int, on_progress: Callable[[int, int], None]) -> Path:
    """The case's slide in `folder`, named after what it is made of; written only when it is not there."""
    if case.slide is not None:
        return case.slide
    spec = case.spec(quick)
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"{case.name}-{digest}{case.suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_synth_slide(path, **spec, threads=threads, on_progress=on_progress)
    return path


def plan_work(path: Path, most: int, threads: int) -> Work:
    """The tissue tiles of the slide as `wsi-rt encode` would read them, `most` of them from the middle.

    Tiles that reach beyond the slide are left out: there the readers disagree. Raises SlideError when too few are left.
    """
    with open_slide(path) as reader:
        plan = plan_reads(reader, SlideSettings())
        xy0 = select_tiles(plan, find_tissue(reader, threads=threads)).xy0
        inside = (xy0 + plan.patch_size_level0 <= np.array(reader.size0)).all(axis=1)
    xy0 = xy0[inside]
    if len(xy0) < 2 * WARM_UP:
        raise SlideError(f"{path}: {len(xy0)} whole tiles of tissue, expected at least {2 * WARM_UP} to time")
    count = min(len(xy0), most + WARM_UP)
    start = (len(xy0) - count) // 2
    return Work(path, np.ascontiguousarray(xy0[start : start + count]), plan)


def warm_page_cache(path: Path) -> None:
    """Read every byte once, so that no provider pays for the disk."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
