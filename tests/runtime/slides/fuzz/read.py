"""What is done with a damaged slide, in a process of its own: by our readers, and by OpenSlide alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 30  # a read that takes longer hangs
MEMORY_BYTES = 2 << 30
ADDRESS_SPACE = 12 << 30  # keeps a runaway from taking the machine down; findings are what exceeds MEMORY_BYTES
REGIONS_PER_LEVEL = 4
LEVELS = 4


@dataclass
class Outcome:
    """How a process ended. ended: "done", a signal's name, "hang" or "exit N"; bytes: its peak memory."""

    ended: str
    seconds: float
    bytes: int
    found: dict[str, Any] = field(default_factory=dict)


def apart(work: Callable[[], dict[str, Any]], result: Path) -> Outcome:
    """Fork, run `work`, and take what it returns from the file `result`."""
    start = time.monotonic()
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _child(work, result)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        seconds = time.monotonic() - start
        if done:
            break
        if seconds > SECONDS + 5:  # a worker's own limit is SECONDS
            os.kill(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            return Outcome("hang", seconds, 0)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and result.exists():
        found = pickle.loads(result.read_bytes())
        return Outcome("done", seconds, max(usage.ru_maxrss * 1024, found.pop("children_bytes")), found)
    return Outcome(signal.Signals(-code).name if code < 0 else f"exit {code}", seconds, usage.ru_maxrss * 1024)


def _child(work: Callable[[], dict[str, Any]], result: Path) -> None:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        devnull = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(devnull, descriptor)
        try:
            found = work()
        except BaseException as error:
            found = {"raised": f"{type(error).__name__}: {str(error)[:300]}", "trace": _trace(error)}
        found["children_bytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        result.write_bytes(pickle.dumps(found))
        code = 0
    finally:
        os._exit(code)


def _trace(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error)[-4:])[-1500:]


def places(levels: list[tuple[int, int, float]], seed: int) -> list[tuple[tuple[int, int], int, tuple[int, int]]]:
    """Regions (xy0, level, size) over the slide and its borders, at whole px of the level."""
    rng = np.random.default_rng(seed)
    wanted = []
    for level, (width, height, downsample) in enumerate(levels[:LEVELS]):
        corners = [(0, 0), (width - 200, height - 150)]
        corners += [(int(rng.integers(-50, max(1, width))), int(rng.integers(-50, max(1, height)))) for _ in range(2)]
        for x, y in corners[:REGIONS_PER_LEVEL]:
            xy0 = (round(x * downsample), round(y * downsample))
            wanted.append((xy0, level, (256, 256)))
    return wanted


def read_ours(path: Path, reader: str | None, seed: int) -> dict[str, Any]:
    """Levels and pixels as our readers give them; a SlideError is an answer, anything else raised is not."""
    from wsi_rt.runtime.config import SlideSettings
    from wsi_rt.runtime.errors import SlideError
    from wsi_rt.runtime.slides import open_slide

    try:
        with open_slide(path, SlideSettings(mpp=0.5, reader=reader)) as slide:
            levels = [(v.width, v.height, v.downsample) for v in slide.levels]
            regions = []
            for place in places(levels, seed):
                try:
                    regions.append((place, slide.read_region(*place)))
                except SlideError as error:
                    regions.append((place, str(error)))
            for name, (width, height) in slide.associated.items():
                if width * height <= 16 << 20:
                    with contextlib.suppress(SlideError):
                        slide.read_associated(name)
            return {"name": slide.name, "levels": levels, "regions": regions}
    except SlideError as error:
        return {"refused": str(error)}


def read_openslide(path: Path, levels: list[tuple[int, int, float]], seed: int) -> dict[str, Any]:
    """The same by OpenSlide alone, at those of `levels` that it lists. A handle per region: one error spoils it."""
    import openslide
    from PIL import Image

    def region(place: tuple[tuple[int, int], int, tuple[int, int]]) -> np.ndarray | str:
        try:
            with openslide.OpenSlide(path) as slide:
                image = slide.read_region(*place)
        except openslide.OpenSlideError as error:
            return str(error)
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return np.array(canvas)

    try:
        with openslide.OpenSlide(path) as slide:
            found = [
                (w, h, float(d)) for (w, h), d in zip(slide.level_dimensions, slide.level_downsamples, strict=True)
            ]
    except openslide.OpenSlideError as error:
        return {"refused": str(error)}
    shared = {level: found.index(shape) for level, shape in enumerate(levels) if shape in found}
    regions = [
        (place, region((place[0], shared[place[1]], place[2]))) for place in places(levels, seed) if place[1] in shared
    ]
    return {"levels": found, "regions": regions}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
