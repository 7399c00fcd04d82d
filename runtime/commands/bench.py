"""`wsi-rt bench`: measurements, each against its peers, the published way and the limit."""

from __future__ import annotations

import json

import click

from wsi_rt.runtime.commands.options import JSON, SM
from wsi_rt.runtime.errors import ParityError, WsiRtError
from wsi_rt.runtime.progress import Progress


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
