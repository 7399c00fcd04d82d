"""`wsi-rt doctor`: what this machine has and lacks, from `runtime/doctor.py`."""

from __future__ import annotations

import json

import click

from wsi_rt.runtime.commands.options import JSON


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say what this machine has and lacks."""
    from wsi_rt.runtime.doctor import examine, render

    report = examine()
    click.echo(json.dumps(report, indent=1) if as_json else render(report))
    if not report["ok"]:
        click.get_current_context().exit(3)
