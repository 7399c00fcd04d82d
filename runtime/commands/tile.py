"""`wsi-rt tile`: which tiles of a slide would be encoded, as files to check and to use elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_rt.runtime.commands.options import JSON, SLIDE, THREADS, show
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.progress import Progress

if TYPE_CHECKING:
    from wsi_rt.runtime.encode_slide import ChosenTiles

GRID, PICTURE, TISSUE = "tiles.h5", "overlay.png", "tissue.geojson"


@click.command()
@click.argument("source", metavar="SLIDE", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--tile-objects", is_flag=True, help=f"The kept tiles too in {TISSUE}, as QuPath tiles.")
@click.option("--force", is_flag=True, help="Replace what an earlier run wrote there.")
@SLIDE
@THREADS
@JSON
def tile(
    source: Path, out: Path, tile_objects: bool, force: bool, threads: int | None, as_json: bool, **slide: Any
) -> None:
    """Lay the grid and find the tissue of a slide, without any engine.

    Writes tiles.h5 (TRIDENT's patches layout), overlay.png (to look at) and tissue.geojson (for QuPath, or --roi).
    """
    from wsi_rt.runtime.encode import ignored_settings
    from wsi_rt.runtime.encode_slide import choose_tiles
    from wsi_rt.runtime.staging import staged_directory
    from wsi_rt.runtime.threads import resolve_threads
    from wsi_rt.runtime.timing import Stopwatch

    settings, clock = SlideSettings(**slide), Stopwatch()
    threads = resolve_threads(threads)
    with (
        Progress() as progress,
        staged_directory(out, lambda place: _may_replace(place, force)) as work,
        choose_tiles(source, settings, threads, clock, progress.update) as chosen,
    ):
        with clock.measure("pictures"):
            _write(work, chosen, source.stem, threads, tile_objects)
        result = _result(out, chosen)
    idle = ("--on-bad-tile given, but tiles are not read here: no effect",) if settings.on_bad_tile != "fail" else ()
    notes = [*ignored_settings("slide", settings), *idle, *chosen.notes]
    tiles = {"grid": chosen.grid.cells, "kept": len(chosen.grid), "distinct_tokens": None}
    if as_json:
        timings = {k: round(v, 3) for k, v in clock.ms.items()}
        click.echo(json.dumps({**result, "timings_ms": timings, "notes": notes}, indent=1))
        return
    show(tiles, clock.ms, notes)
    for path in result["out"]:
        click.echo(path)


def _may_replace(place: Path, force: bool) -> None:
    if not place.exists():
        return
    others = sorted(p.name for p in place.iterdir() if p.name not in (GRID, PICTURE, TISSUE)) if place.is_dir() else []
    if others or not place.is_dir():
        what = f"also holds {others[0]!r}" if others else "is no folder"
        raise InputError(f"--out is {place}, which {what}; expected a new folder, or one that `wsi-rt tile` wrote")
    if any(place.iterdir()) and not force:
        raise InputError(f"--out is {place}, which holds an earlier run; replace it with --force")


def _write(work: Path, chosen: ChosenTiles, name: str, threads: int, tile_objects: bool) -> None:
    from wsi_rt.runtime.features import write_tile_grid
    from wsi_rt.runtime.slides.outlines import write_tissue_geojson
    from wsi_rt.runtime.slides.overlay import write_overlay

    reader, grid, mask = chosen.reader, chosen.grid, chosen.mask
    if mask is None:
        raise ValueError("tiles were chosen without a tissue mask")
    write_tile_grid(
        work / GRID,
        grid,
        name=name,
        size0=reader.size0,
        target_magnification=_magnification(chosen.plan.target_mpp),
        level0_magnification=_magnification(reader.mpp0),
    )
    write_overlay(work / PICTURE, reader, mask, grid, regions=chosen.regions, threads=threads)
    write_tissue_geojson(work / TISSUE, mask, grid if tile_objects else None)


def _magnification(mpp: float) -> float:
    """TRIDENT's attribute; 10 um/px is 1x by convention (0.5 is 20x)."""
    return round(10 / mpp, 2)


def _result(out: Path, chosen: ChosenTiles) -> dict[str, Any]:
    reader, grid, mask, plan = chosen.reader, chosen.grid, chosen.mask, chosen.plan
    return {
        "out": [str(out / name) for name in (GRID, PICTURE, TISSUE)],
        "slide": {
            "reader": reader.name,
            "size0": list(reader.size0),
            "mpp0": reader.mpp0,
            "mpp_source": reader.mpp_source,
            "icc": reader.icc,
        },
        "tiles": {"grid": grid.cells, "kept": len(grid)},
        "patch_size_level0": grid.patch_size_level0,
        "level": plan.level,
        "resample": plan.resample,
        "tissue": {
            "threshold": mask.threshold if mask else None,
            "rule": mask.rule if mask else None,
            "share": round(float(mask.foreground.mean()), 4) if mask else None,
            "left_out": dict(grid.provenance.settings.get("left_out", {})),
        },
    }
