"""`wsi-rt doctor`: what this machine has and lacks, from `runtime/doctor.py`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from wsi_rt.runtime.commands.options import JSON


@click.command()
@click.option("--engines", type=click.Path(path_type=Path), help="Also which targets of this bundle run here.")
@JSON
def doctor(engines: Path | None, as_json: bool) -> None:
    """Say what this machine has and lacks, and what fixes it."""
    from wsi_rt.runtime.doctor import examine, render

    report = examine(engines)
    click.echo(json.dumps(report, indent=1) if as_json else render(report))
    if not report["ok"]:
        click.get_current_context().exit(3)
