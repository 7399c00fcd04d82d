"""`wsi-rt plan`: time and memory of encoding a slide, before it is done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from wsi_rt.runtime.commands.options import ENGINES, JSON, SLIDE, TARGET, THREADS
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.progress import Progress

SAMPLE = 32  # tiles read to see how long reading takes


@click.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@ENGINES
@SLIDE
@click.option("--again", is_flag=True, help="Measure the engines anew, whatever is known of them.")
@TARGET
@THREADS
@JSON
def plan(
    source: Path, engines: Path, again: bool, target: str | None, threads: int | None, as_json: bool, **slide: Any
) -> None:
    """Predict time and memory of encoding a slide (or an .h5 of tile features), stage by stage.

    Refuses (exit 2) what would not fit into memory. Engines are measured on this machine once.
    """
    from wsi_rt.runtime.bundle import Bundle
    from wsi_rt.runtime.encode import input_kind
    from wsi_rt.runtime.plan import StagePlan, plan_encode
    from wsi_rt.runtime.plan_measure import measure, resident_bytes, stored

    bundle, settings, kind = Bundle.open(engines, threads, target), SlideSettings(**slide), input_kind(source)
    if kind == "slide_tokens":
        raise InputError(f"{source} holds slide tokens: nothing is left to encode; expected a slide or tile features")
    bundle.component("tile_encoder" if kind == "slide" else "slide_encoder")
    with Progress() as progress:
        measured = None if again else stored(bundle)
        if measured is None:
            progress.step("measure the engines", 1)
            measured = measure(bundle)
        if kind == "tile_features":
            measured = replace(measured, tile_encoder=None)
        before = resident_bytes()
        tiles, reading = _tiles(source, settings, bundle.threads, progress)
        held = measured.process_bytes + max(0, resident_bytes() - before)  # an open slide, its tissue
    found = plan_encode(bundle, measured, tiles, held_bytes=held)
    if as_json:
        click.echo(json.dumps({**found.to_json(), "read_seconds": reading}, indent=1))
        return
    of = ", ".join(f"{name} {precision}" for name, precision in found.precision.items())
    batch = f", {found.batch} at a time" if found.batch else ""
    click.echo(f"{source}: {found.tiles} tiles{batch}, {found.threads} threads; {of}")
    read = (StagePlan("tiles (read beside the encoder)", reading, 0),) if reading else ()
    for stage in (*read, *found.stages):
        peak = f"{stage.peak_bytes / 1e9:8.2f} GB" if stage.peak_bytes else ""
        click.echo(f"  {stage.name:32}{stage.seconds:10.1f} s{peak}")
    click.echo(f"  {'in all':32}{found.seconds:10.1f} s{found.peak_bytes / 1e9:8.2f} GB")
    click.echo(f"  {found.available_bytes / 1e9:.2f} GB can be had")


def _tiles(source: Path, settings: SlideSettings, threads: int, progress: Progress) -> tuple[int, float]:
    """How many, and seconds to read them all, from a sample."""
    from wsi_rt.runtime.encode import input_kind, load_tiles
    from wsi_rt.runtime.encode_slide import choose_tiles
    from wsi_rt.runtime.slides import iter_tiles
    from wsi_rt.runtime.timing import Stopwatch

    if input_kind(source) == "tile_features":
        return load_tiles(source, settings).tiles["kept"] or 0, 0.0
    with choose_tiles(source, settings, threads, Stopwatch(), progress.update) as chosen:
        count = len(chosen.grid)
        some = replace(chosen.grid, xy0=chosen.grid.xy0[: min(SAMPLE, count)])
        started = perf_counter()
        for _ in iter_tiles(chosen.reader, some, chosen.plan, 8, threads=max(1, threads // 2), raise_bad=False):
            pass
        return count, (perf_counter() - started) / len(some) * count
