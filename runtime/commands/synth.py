"""`wsi-rt synth-slide`: a slide made up from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wsi_rt.runtime.commands.options import require_place
from wsi_rt.runtime.config import TARGET_MPP
from wsi_rt.runtime.progress import Progress


@click.command("synth-slide")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .svs to write.")
@click.option("--width", type=int, default=6144, show_default=True, help="Level-0 px.")
@click.option("--height", type=int, default=4096, show_default=True, help="Level-0 px.")
@click.option("--mpp", type=float, default=TARGET_MPP, show_default=True, help="um/px.")
@click.option("--tissue", type=float, default=0.3, show_default=True, help="Share of the area.")
@click.option("--compression", default="jpeg", show_default=True, help="jpeg, jpeg2000, deflate or none.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def synth_slide(out: Path, **flags: Any) -> None:
    """Write a deterministic, H&E-like pyramidal slide (no patient data) for trials and benchmarks."""
    from wsi_rt.runtime.slides import write_synth_slide

    require_place(out)
    with Progress() as progress:
        write_synth_slide(out, **flags, on_progress=lambda done, total: progress.update("write slide", done, total))
    click.echo(str(out))
