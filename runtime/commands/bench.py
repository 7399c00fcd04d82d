"""`wsi-rt bench`: measurements, each against its peers, the published way and the limit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from wsi_rt.runtime.commands.options import JSON, SM, THREADS
from wsi_rt.runtime.errors import MachineError, ParityError, WsiRtError
from wsi_rt.runtime.progress import Progress
from wsi_rt.runtime.threads import resolve_threads

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
    from wsi_rt.benchmarks.machine import report

    with Progress() as progress:
        found = bench_kernels(cases, sms, quick, lambda done, total: progress.update("bench", done, total))
    shown = report(found.rows)
    click.echo(json.dumps(shown.as_json(), indent=1) if as_json else shown.table())
    if found.red:
        raise ParityError(f"{len(found.red)} wrong answers, not timed: {'; '.join(found.red)}")
    if found.broken:
        raise WsiRtError(f"{len(found.broken)} cases of wsi-rt did not run: {'; '.join(found.broken)}")


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
        from wsi_rt.benchmarks.machine import report
    except ImportError as e:
        raise MachineError(f"the bench needs {e.name}: pip install '.[export]' in a checkout of wsi-rt") from e

    with Progress() as progress:
        found = bench_llm(**chosen, threads=resolve_threads(threads), on_step=progress.update)
    shown = report(found.rows)
    shown = replace(shown, versions={**shown.versions, **peer_versions()})
    click.echo(json.dumps(shown.as_json(), indent=1) if as_json else shown.table())
    if found.red:
        raise ParityError(f"{len(found.red)} wrong answers, not timed: {'; '.join(found.red)}")
    if found.broken:
        raise WsiRtError(f"{len(found.broken)} measurements of wsi-rt failed: {'; '.join(found.broken)}")


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
    from dataclasses import replace

    from wsi_rt.benchmarks.machine import report
    from wsi_rt.benchmarks.tiles.run import CONDITIONS, bench_tiles, versions

    threads = 1 if threads is None else resolve_threads(threads)
    with Progress() as progress:
        found = bench_tiles(
            slide, cases, threads=threads, quick=quick, folder=CACHE / "tiles", on_progress=progress.update
        )
    shown = report(found.rows)
    shown = replace(
        shown, machine={**shown.machine, "conditions": CONDITIONS}, versions={**shown.versions, **versions()}
    )
    click.echo(json.dumps(shown.as_json(), indent=1) if as_json else f"{shown.table()}\n\n{CONDITIONS}")
    if found.red:
        raise ParityError(f"pixels differ, not timed: {'; '.join(found.red)}")
    if found.broken:
        raise WsiRtError(f"{len(found.broken)} cases of wsi-rt did not run: {'; '.join(found.broken)}")
