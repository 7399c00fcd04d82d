"""`wsi-rt synth-slide`: a slide made up from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wsi_rt.runtime.commands.options import THREADS, require_place
from wsi_rt.runtime.config import TARGET_MPP
from wsi_rt.runtime.progress import Progress
from wsi_rt.runtime.threads import resolve_threads


def _levels(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(level) for level in value.split(","))
    except ValueError as e:
        raise click.BadParameter(f"{value!r} is no list of downsamples such as 1,4,16") from e


@click.command("synth-slide")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write; DICOM: a new folder.")
@click.option("--width", type=int, default=6144, show_default=True, help="Level-0 px.")
@click.option("--height", type=int, default=4096, show_default=True, help="Level-0 px.")
@click.option("--mpp", type=float, default=TARGET_MPP, show_default=True, help="um/px.")
@click.option("--tissue", type=float, default=0.3, show_default=True, help="Share of the area.")
@click.option("--format", default="svs", show_default=True, help="svs (Aperio), tiff (generic pyramid) or dicom.")
@click.option(
    "--codec", default="jpeg", show_default=True,
    help="jpeg (4:2:0), jpeg-rgb (as Aperio writes it), jpeg2000, jpeg2000-ycc, deflate, lzw or raw.",
)  # fmt: skip
@click.option("--tile-size", "tile", type=int, default=256, show_default=True, help="Edge of a stored tile, px.")
@click.option(
    "--levels", callback=_levels, default="1,4,16", show_default=True, metavar="LIST", help="Downsample of each level."
)
@click.option("--bigtiff/--no-bigtiff", default=True, show_default=True, help="64-bit offsets, or a file below 4 GiB.")
@click.option("--sparse", is_flag=True, help="Leave tiles of bare glass out of the file.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@THREADS
def synth_slide(out: Path, threads: int | None, **flags: Any) -> None:
    """Write a deterministic, H&E-like pyramidal slide (no patient data) for trials and benchmarks."""
    from wsi_rt.runtime.slides.synth import write_synth_slide

    if flags["format"] != "dicom":
        require_place(out)
    with Progress() as progress:
        write_synth_slide(
            out,
            **flags,
            threads=resolve_threads(threads),
            on_progress=lambda done, total: progress.update("write slide", done, total),
        )
    click.echo(str(out))
