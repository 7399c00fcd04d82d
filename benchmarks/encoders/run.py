"""The bench: tokens of every provider are held against the published module's, then it is timed, in fresh processes
whose rounds are interleaved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_rt.benchmarks.encoders.cases import (
    INT8,
    LIMIT,
    OURS,
    PROVIDERS,
    QUICK_ROUNDS,
    REFERENCE,
    ROUNDS,
    TILES,
    attention_flops,
    chosen,
    linear_flops,
    repeats,
)  # fmt: skip
from wsi_rt.benchmarks.encoders.tile import TileBench, tile_cases
from wsi_rt.benchmarks.report import Outcome, Row, percentiles
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.errors import EngineMismatchError, InputError, WsiRtError
from wsi_rt.runtime.parity import row_cosines
from wsi_rt.runtime.plan_measure import measure as measure_engines

if TYPE_CHECKING:
    from wsi_rt.export.arch import LongNetConfig
    from wsi_rt.export.sources.weights import WeightSource

PRESET, QUICK_PRESET = "wsi-llava-7b", "nano"
PRECISIONS = {OURS: "fp32", INT8: "int8"}
PLANNED, FIRST = "what wsi-rt plan says", "of the first run of a process, as a user's is"
MAX_ERROR, MIN_COSINE = 2e-4, 0.999  # of slide tokens in fp32 (SPEC 10), and in int8
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """preset: of the weights. cache: keeps the bundles that are built."""

    cases: Sequence[str]
    preset: str
    cache: Path
    threads: int
    rounds: int

    @property
    def word(self) -> str:
        return f"synthetic:{self.preset}?seed=0"


def bench_encoders(
    names: Sequence[str], *, quick: bool, cache: Path, threads: int, on_step: Progress = lambda what, done, total: None
) -> Outcome:
    """Raises InputError, and WsiRtError where a bundle cannot be built."""
    preset, rounds = (QUICK_PRESET, QUICK_ROUNDS) if quick else (PRESET, ROUNDS)
    plan = Plan(chosen(names, quick), preset, cache, threads, rounds)
    total, done = 2 + sum(repeats(case, rounds)[0] for case in plan.cases) * len(PROVIDERS) + 1, 0

    def step(what: str) -> None:
        nonlocal done
        on_step(what, done, total)
        done += 1

    bundles, outcome = {}, Outcome()
    for provider, precision in PRECISIONS.items() if plan.cases else ():
        step(f"build {precision}")
        bundles[provider] = build(plan, precision)
        measure_engines(Bundle.open(bundles[provider], threads))  # in this very run, whatever is known of them
    c, _ = source_of(plan.word)
    for case in plan.cases:
        outcome.rows += bench_case(plan, c, case, bundles, outcome, step)
    tiles = TileBench(plan.word, cache, threads, quick, measure, partial(build, plan))
    for case in tile_cases(names, quick):
        outcome.rows += tiles.run(case, step)
    outcome.red += tiles.red
    outcome.broken += tiles.broken
    step(LIMIT)
    outcome.rows += _limits(plan)
    return outcome


def source_of(word: str) -> tuple[LongNetConfig, WeightSource]:
    """The slide encoder of a synthetic checkpoint."""
    from wsi_rt.export.arch import LongNetConfig
    from wsi_rt.export.sources.checkpoint import Sources, resolve

    part = resolve(Sources(checkpoint=word)).parts[LongNetConfig.component]
    if not isinstance(part.config, LongNetConfig):
        raise TypeError(f"slide_encoder is a {type(part.config).__name__}")
    return part.config, part.source


def build(plan: Plan, precision: str, components: str = "slide_encoder", preset: str | None = None) -> Path:
    """A bundle kept in the cache, of the slide encoder alone unless told; built again where other code made it."""
    preset, alone = preset or plan.preset, components == "slide_encoder"
    out = plan.cache / "-".join([preset, *(() if alone else components.split(",")), *precision.split(",")])
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "wsi_rt.runtime.cli",
        "build-engines",
        "--checkpoint",
        f"synthetic:{preset}?seed=0",
        "--out",
        str(out),
    ]
    command += ["--components", components, "--precision", precision, "--threads", str(plan.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (InputError.exit_code, EngineMismatchError.exit_code) and out.is_dir():
        done = subprocess.run([*command, "--force"], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise WsiRtError(f"building the {precision} bundle failed: {said[-1][:200]}")
    return out


def bench_case(
    plan: Plan, c: LongNetConfig, case: str, bundles: dict[str, Path], outcome: Outcome, step: Callable[[str], None]
) -> list[Row]:
    """The rows of one case."""
    samples: dict[str, list[float]] = defaultdict(list)
    last: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    gate: list[Row] = []
    rounds, runs = repeats(case, plan.rounds)
    with TemporaryDirectory() as aside:
        for turn in range(rounds):
            for provider in PROVIDERS:
                step(f"{case}: {provider}")
                if provider in skipped:
                    continue
                tokens = Path(aside) / f"{PROVIDERS.index(provider)}.npy"
                job = {"provider": provider, "tiles": TILES[case], "word": plan.word, "tokens": str(tokens)}
                found = measure({**job, "bundle": str(bundles.get(provider, "")), "runs": runs}, plan.threads, aside)
                if "skipped" in found:
                    skipped[provider] = found["skipped"]
                    continue
                samples[provider] += found["seconds"]
                peak = last.get(provider, found)["peak_rss_bytes"]
                last[provider] = {**found, "peak_rss_bytes": max(peak, found["peak_rss_bytes"])}
                if turn == 0 and provider != REFERENCE:
                    rows, why = _gate(plan, case, provider, tokens, Path(aside) / f"{PROVIDERS.index(REFERENCE)}.npy")
                    gate += rows
                    if why:
                        skipped[provider] = why
                        outcome.red.append(f"{case}: {provider}: {why}")
    outcome.broken += [
        f"{case}: {p}: {why}" for p, why in skipped.items() if not any(f"{p}: {why}" in red for red in outcome.red)
    ]
    return gate + _rows(plan, c, case, samples, last, skipped)


def _gate(plan: Plan, case: str, provider: str, path: Path, reference: Path) -> tuple[list[Row], str | None]:
    """How far tokens are from the published module's, and why that is too far."""
    if not reference.exists():
        return [], "nothing to hold its tokens against: the reference did not run"
    actual, expected = (np.load(p).astype(np.float64) for p in (path, reference))
    error, cosine = float(np.abs(actual - expected).max()), float(row_cosines(actual, expected).min())
    bad = not (error <= MAX_ERROR if PRECISIONS[provider] == "fp32" else cosine >= MIN_COSINE)
    bound = f"at most {MAX_ERROR}" if PRECISIONS[provider] == "fp32" else f"cosine at least {MIN_COSINE}"
    why = f"its tokens are off by {error:.2e}, cosine {cosine:.6f} ({bound})" if bad else None
    row = _row(plan, case, provider)
    return [row("max_error", "", p50=error), row("min_cosine", "", p50=cosine)], why


def _row(plan: Plan, case: str, provider: str) -> Callable[..., Row]:
    def row(metric: str, unit: str, **rest: Any) -> Row:
        return Row("encoders", case, provider, metric, unit, threads=plan.threads, **rest)

    return row


def _rows(
    plan: Plan,
    c: LongNetConfig,
    case: str,
    samples: dict[str, list[float]],
    last: dict[str, dict[str, Any]],
    skipped: dict[str, str],
) -> list[Row]:
    """last: by provider, its last process, with the largest peak of all of them."""
    rows = []
    flops = linear_flops(c, TILES[case]) + attention_flops(c, TILES[case])
    base = float(np.median(samples[REFERENCE])) if samples[REFERENCE] else None
    for provider in PROVIDERS:
        row = _row(plan, case, provider)
        if provider in skipped:
            rows.append(row("seconds", "s", skipped=skipped[provider]))
            continue
        seconds = samples[provider]
        rows.append(row("seconds", "s", **percentiles(seconds)))
        rows.append(row("tiles_per_s", "1/s", **percentiles([TILES[case] / s for s in seconds])))
        rows.append(row("gflops", "GFLOP/s", **percentiles([flops / s / 1e9 for s in seconds])))
        peak = last[provider]["peak_rss_bytes"]
        rows.append(row("peak_rss_bytes", "B", p50=peak, n=repeats(case, plan.rounds)[0]))
        if provider != REFERENCE and base is not None:
            rows.append(row("speedup", "x", **percentiles([base / s for s in seconds])))
        if "planned_seconds" in last[provider]:
            found = last[provider]
            rows.append(row("planned_seconds", "s", p50=found["planned_seconds"], note=PLANNED))
            rows.append(row("over_planned", "x", p50=found["first_seconds"] / found["planned_seconds"], note=FIRST))
            rows.append(row("planned_bytes", "B", p50=found["planned_bytes"], note=PLANNED))
            over = found["first_peak_bytes"] / found["planned_bytes"]
            rows.append(row("bytes_over_planned", "x", p50=over, note=FIRST))
    return rows


def _limits(plan: Plan) -> list[Row]:
    with TemporaryDirectory() as aside:
        found = measure({"provider": LIMIT, "runs": 5 * plan.rounds}, plan.threads, aside)
    if "skipped" in found:
        return [_row(plan, "gemm", LIMIT)("gflops", "GFLOP/s", skipped=found["skipped"])]
    note = "one matrix product in onnxruntime, [640, 4096] by [4096, 11008]"
    rows = {f"gemm_{kind}_gflops": percentiles(samples) for kind, samples in found.items()}
    return [_row(plan, "gemm", LIMIT)(metric, "GFLOP/s", note=note, **figures) for metric, figures in rows.items()]


def measure(job: dict[str, Any], threads: int, aside: str) -> dict[str, Any]:
    """One process; {"skipped": why} where it dies."""
    out = Path(aside) / "found.json"
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "wsi_rt.benchmarks.encoders.worker"],
        input=json.dumps({**job, "threads": threads, "out": str(out)}), capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode or not out.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
        return {"skipped": f"its process ended with exit code {done.returncode}: {said[-1][:200]}"}
    return dict(json.loads(out.read_text()))
