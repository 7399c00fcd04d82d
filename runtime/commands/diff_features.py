"""`wsi-rt diff-features`: where and why two feature files differ."""

from __future__ import annotations

import json
from pathlib import Path

import click

from wsi_rt.runtime.commands.options import JSON

_FILE = click.Path(path_type=Path)


@click.command("diff-features")
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Relative error of a tile or token (L2) that counts as equal; 0: every bit.",
)
@JSON
def diff_features(a: Path, b: Path, tolerance: float, as_json: bool) -> None:
    """Say where and why two feature files differ: order, mpp, crop, encoder, precision, values.

    Tile features (.h5 of wsi-rt, TRIDENT, CLAM, AtlasPatch) or slide tokens (.pt). Exit code 0: equal, 1: they differ,
    2: bad input.
    """
    from wsi_rt.runtime.features.diff.report import render
    from wsi_rt.runtime.features.diff.run import diff_files

    report = diff_files(a, b, tolerance)
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else render(report))
    if not report.equal:
        click.get_current_context().exit(1)
