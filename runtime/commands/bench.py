"""`wsi-rt bench`: measurements, each against its peers, the published way and the limit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_rt.runtime.commands.options import JSON, SM, THREADS
from wsi_rt.runtime.errors import MachineError, ParityError, WsiRtError
from wsi_rt.runtime.progress import Progress
from wsi_rt.runtime.threads import resolve_threads

if TYPE_CHECKING:
    from wsi_rt.benchmarks.report import Outcome

CACHE = Path("out/bench")  # engines and peers' files of `bench llm`: 20 GB for the 7 B model


@click.group()
def bench() -> None:
    """Measure: a table, or with --json one object of rows."""


@bench.command()
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case or operator; repeatable.")
@click.option("--quick", is_flag=True, help="The smallest case of each operator, 20 runs instead of 50.")
@SM
@JSON
def kernels(cases: tuple[str, ...], quick: bool, sms: tuple[int, ...] | None, as_json: bool) -> None:
    """GPU operators against flash-attn, SDPA, eager torch and the roofline (--sm: of which architectures)."""
    from wsi_rt.benchmarks.kernels.run import bench_kernels

    with Progress() as progress:
        found = bench_kernels(cases, sms, quick, lambda done, total: progress.update("bench", done, total))
    _show(found, as_json)


@bench.command()
@click.option("--case", "names", multiple=True, metavar="NAME", help="Only this case; repeatable.")
@click.option("--provider", "providers", multiple=True, metavar="NAME", help="Only this provider; repeatable.")
@click.option("--preset", "presets", multiple=True, help="Model size; repeatable. Default: 1 B and 7 B; quick: nano.")
@click.option("--engines", type=click.Path(path_type=Path), help="A bundle of a preset, instead of one built once.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=CACHE / "llm", show_default=True, help="What is built once."
)
@click.option("--quick", is_flag=True, help="The same shapes for less long: one round, short answers.")
@THREADS
@JSON
def llm(threads: int | None, as_json: bool, **chosen: Any) -> None:
    """The language model: prompts, steps, and a slide's twenty questions, against peers and the machine's limits."""
    try:
        from wsi_rt.benchmarks.llm.run import bench_llm, peer_versions
    except ImportError as e:
        raise MachineError(f"the bench needs {e.name}: pip install '.[export]' in a checkout of wsi-rt") from e

    with Progress() as progress:
        found = bench_llm(**chosen, threads=resolve_threads(threads), on_step=progress.update)
    _show(found, as_json, peer_versions())


@bench.command()
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case; repeatable.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=CACHE / "encoders",
    show_default=True,
    help="What is built once.",
)
@click.option("--quick", is_flag=True, help="1,000 tiles through a small encoder, one round: a trial, not a figure.")
@click.option("--plot", type=click.Path(path_type=Path), help="The curve over tiles as a picture: .png, .svg or .pdf.")
@THREADS
@JSON
def encoders(
    cases: tuple[str, ...], cache: Path, quick: bool, plot: Path | None, threads: int | None, as_json: bool
) -> None:
    """The slide encoder on 1,000 to 50,000 tiles against the published way in eager torch and the machine's limits."""
    try:
        from wsi_rt.benchmarks.encoders.plot import require_plots, write_curve
        from wsi_rt.benchmarks.encoders.run import bench_encoders
    except ImportError as e:
        raise MachineError(f"the bench needs {e.name}: pip install '.[export]' in a checkout of wsi-rt") from e

    if plot is not None:
        require_plots(plot)
    with Progress() as progress:
        found = bench_encoders(
            cases, quick=quick, cache=cache, threads=resolve_threads(threads), on_step=progress.update
        )
    if plot is not None:
        write_curve(found.rows, plot)
    _show(found, as_json)


@bench.command()
@click.argument("slide", required=False, type=click.Path(path_type=Path))
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case; repeatable.")
@click.option("--quick", is_flag=True, help="Small slides, two rounds instead of five: a trial, not a figure.")
@THREADS
@JSON
def tiles(slide: Path | None, cases: tuple[str, ...], quick: bool, threads: int | None, as_json: bool) -> None:
    """Tiles read from slides against other readers and the codec alone; with SLIDE, on that one.

    Slides of 10,000 tiles are written once into out/bench/tiles. --threads: of each reader (default 1).
    """
    from wsi_rt.benchmarks.tiles.run import CONDITIONS, bench_tiles, versions

    threads = 1 if threads is None else resolve_threads(threads)
    with Progress() as progress:
        found = bench_tiles(
            slide, cases, threads=threads, quick=quick, folder=CACHE / "tiles", on_progress=progress.update
        )
    _show(found, as_json, versions(), CONDITIONS)


def _show(found: Outcome, as_json: bool, versions: Mapping[str, str] | None = None, conditions: str = "") -> None:
    """The table or the object, then the exit code of what went wrong. versions: of packages beside the common ones."""
    from wsi_rt.benchmarks.machine import report

    shown = report(found.rows)
    machine = {**shown.machine, "conditions": conditions} if conditions else shown.machine
    shown = replace(shown, machine=machine, versions={**shown.versions, **(versions or {})})
    click.echo(json.dumps(shown.as_json(), indent=1) if as_json else f"{shown.table()}\n\n{conditions}".rstrip())
    if found.red:
        raise ParityError(f"{len(found.red)} wrong answers, not timed: {'; '.join(found.red)}")
    if found.broken:
        raise WsiRtError(f"{len(found.broken)} measurements of wsi-rt failed: {'; '.join(found.broken)}")
