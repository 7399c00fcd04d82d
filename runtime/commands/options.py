"""What commands share: options, the check of a place to write, and how a result is shown on stderr."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from wsi_rt.runtime.config import BAD_TILE, TARGET_MPP, SlideSettings
from wsi_rt.runtime.errors import InputError, MachineError

Command = Callable[..., Any]


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator, so that commands share them."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def architectures(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(sm.strip().removeprefix("sm_")) for sm in value.split(","))
    except ValueError as e:
        raise click.BadParameter(f"{value!r} is no list of architectures such as 80,90") from e


_FILE = click.Path(path_type=Path)
ENGINES = click.option("--engines", type=_FILE, required=True, help="Engine bundle.")
TARGET = click.option(
    "--target",
    metavar="NAME",
    help="Which of the bundle's targets runs (default: the first).",
)
THREADS = click.option("--threads", type=int, help="CPU threads (default: the CPUs this process may use).")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
SM = click.option("--sm", "sms", metavar="LIST", callback=architectures, help="Only these architectures: 80,90.")
SLIDE = options(
    click.option("--mpp", type=float, help="The slide's level-0 resolution in um/px, overriding its metadata."),
    click.option("--target-mpp", type=float, default=TARGET_MPP, show_default=True, help="Working resolution, um/px."),
    click.option("--allow-upsample", is_flag=True, help="Accept a slide coarser than the target."),
    click.option("--allow-dark", is_flag=True, help="Accept a dark background: the bright side counts as tissue."),
    click.option(
        "--plain-otsu", is_flag=True, help="Tissue by Otsu's threshold alone: pen marks and black borders count too."
    ),
    click.option("--reader", metavar="NAME", help="Pin the slide reader (default: the first that knows the format)."),
    click.option("--roi", type=_FILE, metavar="FILE.geojson", help="Tissue in these regions only (QuPath's GeoJSON)."),
    click.option(
        "--on-bad-tile",
        default=BAD_TILE[0],
        show_default=True,
        metavar="|".join(BAD_TILE),
        help="A tile that cannot be read twice: stop, leave it out, or take it as white.",
    ),
    click.option(
        "--position-tile", type=int, help="Divisor of the position grid in level-0 px (GigaPath's code: 256)."
    ),
    click.option("--patch-size-level0", type=int, help="For an .h5 that does not say: tile edge in level-0 px."),
    click.option("--keep-order", is_flag=True, help="Leave an .h5's tiles in the file's order (default: row-major)."),
)
# What SLIDE sets, as names of parameters.
SLIDE_FLAGS = tuple(f.name for f in fields(SlideSettings))


def require_place(out: Path) -> None:
    """Refuse a place that cannot be written before the long work, not after. A device is not a place: as root,
    the rename that puts a finished file there would replace /dev/null for everyone."""
    if out.exists() and not out.is_file():
        raise InputError(f"--out is {out}, which is no regular file; expected the path of a file to write")
    if not out.parent.is_dir():
        make = f"mkdir -p {shlex.quote(str(out.parent))}"
        raise InputError(f"--out is {out}: there is no folder {out.parent}; make it first: {make}")
    if not os.access(out.parent, os.W_OK):
        raise MachineError(f"--out is {out}: {out.parent} is not writable; choose another folder")


def show(tiles: Mapping[str, int | None], timings_ms: Mapping[str, float], notes: Sequence[str]) -> None:
    """Tiles, stage timings and notes, on stderr."""
    if tiles["kept"] is not None:
        distinct = f", {tiles['distinct_tokens']} distinct slide tokens" if tiles["distinct_tokens"] else ""
        click.echo(f"tiles: {tiles['kept']} kept of {tiles['grid']}{distinct}", err=True)
    ran = [f"{stage} {ms:.0f}" for stage, ms in timings_ms.items() if ms]
    if ran:
        click.echo(f"ms: {', '.join(ran)}", err=True)
    for note in notes:
        click.echo(f"note: {note}", err=True)
