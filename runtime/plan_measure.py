"""What the encoders of a bundle cost on this machine: measured once, kept beside the manifest.

Not in it: a manifest is the same, byte for byte, for every build of a checkpoint, and a copied bundle meets another
machine. Each is measured in a process of its own, since a heap that has been used hides what an engine takes; peaks of
memory are the kernel's own (Linux, VmHWM), and 0 where there are none.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.devices import gpus
from wsi_rt.runtime.engines.base import Engine
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.types import TILE_PX

FILE_NAME = ".measured.json"
ENCODERS = ("tile_encoder", "slide_encoder")
BATCHES = (1, 2, 4, 8, 16, 32)
GOOD_ENOUGH = 1.03  # a smaller batch within 3 % of the best: less memory, the first tiles earlier
WORSE = 1.10  # no larger batch is tried beyond this
SECONDS = 20.0  # of measuring one number of threads; what is begun is finished
RUNS = 3
LONG = 1.0  # seconds; a run that takes longer is not repeated
SLIDE_TILES = (576, 1152, 2304, 4608, 9216)  # a constant, a cost per tile and one per pair are to be told apart
SLIDE_SECONDS = 20.0  # the first three aside, no slide is begun that twice the last one's time puts beyond this


@dataclass(frozen=True)
class TileCost:
    """threads, batch: the fastest. seconds: of one tile, by batch, with `threads`. open_bytes: weights, as opened;
    batch_bytes: what a run adds to them, by batch."""

    threads: int
    batch: int
    seconds: Mapping[int, float]
    open_bytes: int
    batch_bytes: Mapping[int, int]


@dataclass(frozen=True)
class SlideCost:
    """seconds, run_bytes: by number of tiles."""

    threads: int
    seconds: Mapping[int, float]
    open_bytes: int
    run_bytes: Mapping[int, int]


@dataclass(frozen=True)
class Measured:
    """machine: where; none of the rest holds on another. process_bytes: of a process with everything imported and no
    engine open."""

    machine: Mapping[str, Any]
    process_bytes: int = 0
    tile_encoder: TileCost | None = None
    slide_encoder: SlideCost | None = None


def this_machine(target: str) -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        model = platform.processor()
    gpu = {"gpu": gpus()[0].name} if target != "ort-cpu" and gpus() else {}
    return {"cpu": model, "isa": platform.machine(), "cpus": os.cpu_count(), "target": target, **gpu}


def stored(bundle: Bundle) -> Measured | None:
    """What was measured of this very bundle on this machine; None: nothing, or of another."""
    try:
        data = json.loads((bundle.root / FILE_NAME).read_text())
        mine = data.pop("engines") == _engines(bundle) and data["machine"] == this_machine(bundle.target)
        return _from_json(data) if mine else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def measure(bundle: Bundle) -> Measured:
    """Measure what the bundle has of encoders, each in a process of its own, and keep it where the folder can be
    written.

    Raises WsiRtError when such a process fails.
    """
    measured = Measured(this_machine(bundle.target))
    for name in ENCODERS:
        if name in bundle.manifest.components:
            found = _from_json(json.loads(_measure_apart(bundle, name)))
            tile = found.tile_encoder or measured.tile_encoder
            slide = found.slide_encoder or measured.slide_encoder
            measured = replace(found, tile_encoder=tile, slide_encoder=slide)
    _keep(bundle, measured)
    return measured


def _measure_apart(bundle: Bundle, name: str) -> str:
    command = [sys.executable, "-m", "wsi_rt.runtime.plan_measure", str(bundle.root), str(bundle.threads)]
    done = subprocess.run([*command, bundle.target, name], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise WsiRtError(f"{bundle.root}: its {name} cannot be measured ({reason}); check it: wsi-rt verify")
    return done.stdout


def measure_here(bundle: Bundle, name: str) -> Measured:
    """One of ENCODERS, in this process; nothing is kept."""
    # What a run has imported.
    import onnxruntime  # noqa: F401

    import wsi_rt.runtime.pipeline
    import wsi_rt.runtime.slides  # noqa: F401

    held = resident_bytes()
    found = Measured(this_machine(bundle.target), held)
    if name == "tile_encoder":
        return replace(found, tile_encoder=_measure_tiles(bundle))
    return replace(found, slide_encoder=_measure_slides(bundle))


def _from_json(data: Mapping[str, Any]) -> Measured:
    tile, slide = data["tile_encoder"], data["slide_encoder"]
    return Measured(
        data["machine"],
        data["process_bytes"],
        TileCost(**{**tile, **_by_number(tile, "seconds", "batch_bytes")}) if tile else None,
        SlideCost(**{**slide, **_by_number(slide, "seconds", "run_bytes")}) if slide else None,
    )


def fastest_threads(bundle: Bundle, name: str) -> int:
    """Of the bundle's threads, those that a component runs fastest with, where that was measured here."""
    found = stored(bundle) if name == "tile_encoder" else None
    if found is None or found.tile_encoder is None:
        return bundle.threads
    return min(bundle.threads, found.tile_encoder.threads)


def _engines(bundle: Bundle) -> dict[str, str]:
    return {name: c.digest for name, c in bundle.manifest.components.items()}


def _by_number(data: Mapping[str, Any], *names: str) -> dict[str, dict[int, Any]]:
    return {name: {int(k): v for k, v in data[name].items()} for name in names}


def _keep(bundle: Bundle, measured: Measured) -> None:
    temporary = bundle.root / f"{FILE_NAME}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps({**asdict(measured), "engines": _engines(bundle)}, indent=1) + "\n")
        temporary.replace(bundle.root / FILE_NAME)
    except OSError:  # a bundle that cannot be written to is measured every time
        temporary.unlink(missing_ok=True)


def _measure_tiles(bundle: Bundle) -> TileCost:
    """With all threads; or with half of them where that is faster by a tenth: two threads of one core may get in each
    other's way."""
    cost = _tile_cost(bundle, bundle.threads)
    if bundle.threads == 1:
        return cost
    half = _tile_cost(bundle, bundle.threads // 2)
    return half if WORSE * half.seconds[half.batch] < cost.seconds[cost.batch] else cost


def _tile_cost(bundle: Bundle, threads: int) -> TileCost:
    def inputs(batch: int) -> dict[str, Any]:
        return {"tiles": np.random.default_rng(0).integers(0, 256, (batch, TILE_PX, TILE_PX, 3), np.uint8)}

    with _Watch(bundle, "tile_encoder", threads) as watch:
        seconds: dict[int, float] = {}
        added: dict[int, int] = {}
        started = perf_counter()
        for batch in BATCHES:
            took, added[batch] = watch.run(inputs(batch))
            seconds[batch] = took / batch
            best = min(seconds.values())
            if seconds[batch] > WORSE * best or perf_counter() - started > SECONDS:
                break
        chosen = next(b for b, s in seconds.items() if s <= GOOD_ENOUGH * min(seconds.values()))
        return TileCost(threads, chosen, seconds, watch.open_bytes, added)


def _measure_slides(bundle: Bundle) -> SlideCost:
    width = int(bundle.component("slide_encoder").config["in_width"])
    seconds: dict[int, float] = {}
    added: dict[int, int] = {}
    with _Watch(bundle, "slide_encoder", bundle.threads) as watch:
        for tiles in SLIDE_TILES:
            if len(seconds) >= 3 and 2 * seconds[max(seconds)] > SLIDE_SECONDS:
                break
            index, side = np.arange(tiles), int(tiles**0.5) + 1
            positions = np.stack([index % side, index // side], axis=1).astype(np.int64)
            features = np.random.default_rng(0).standard_normal((tiles, width), np.float32)
            # Once, as a user's slide is: buffers that are there already make it a tenth faster.
            seconds[tiles], added[tiles] = watch.run({"features": features, "positions": positions}, runs=1)
        return SlideCost(bundle.threads, seconds, watch.open_bytes, added)


class _Watch:
    """An engine of the bundle, opened and run under watch of memory and time."""

    def __init__(self, bundle: Bundle, name: str, threads: int) -> None:
        self._open = lambda: backend(bundle.target).open_engine(bundle.root, bundle.component(name), threads)

    def __enter__(self) -> _Watch:
        before = _reset_peak()
        self._engine: Engine = self._open()
        self._opened = resident_bytes()
        self.open_bytes = max(0, self._opened - before)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def run(self, inputs: Mapping[str, Any], runs: int = RUNS) -> tuple[float, int]:
        """Seconds of the fastest of some runs (one, where that takes long), and bytes at most beyond those of the open
        engine and its inputs, buffers that it keeps for the next run included."""
        took = float("inf")
        extra = _reset_peak() - self._opened - sum(x.nbytes for x in inputs.values())  # kept from smaller runs
        for _ in range(runs):
            started = perf_counter()
            self._engine.run(inputs)
            took = min(took, perf_counter() - started)
            if took > LONG:
                break
        inputs_bytes = sum(x.nbytes for x in inputs.values())
        return took, max(0, extra, peak_bytes() - self._opened - inputs_bytes)


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most this process ever had resident, or since `_reset_peak`."""
    return _status("VmHWM")


def _reset_peak() -> int:
    """-> bytes resident now; 0 where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return resident_bytes()


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{field}:"))
    except (OSError, StopIteration, ValueError):
        return 0


def line_through(points: Mapping[int, float], at: int) -> float:
    """Linear between and beyond measured points, never below 0; their only one, in proportion."""
    xs: Sequence[int] = sorted(points)
    if at in points:
        return float(points[at])
    if len(xs) == 1:
        return float(points[xs[0]] * at / xs[0])
    right = next((i for i, x in enumerate(xs) if x > at and i > 0), len(xs) - 1)
    low, high = xs[right - 1], xs[right]
    slope = (points[high] - points[low]) / (high - low)
    return max(0.0, points[low] + slope * (at - low))


if __name__ == "__main__":
    folder, threads, target, encoder = sys.argv[1:]
    sys.stdout.write(json.dumps(asdict(measure_here(Bundle.open(folder, int(threads), target), encoder))))
