"""`wsi-rt cache`: what the feature store holds, and making it smaller. `CACHE`, the options of commands that use it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_rt.runtime.commands.options import JSON, options
from wsi_rt.runtime.errors import InputError

if TYPE_CHECKING:
    from wsi_rt.runtime.features.store import FeatureStore

_DIR = click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="WSI_RT_CACHE",
    show_envvar=True,
    help="Folder where encoded slides are kept (default: the platform's).",
)
CACHE = options(_DIR, click.option("--no-cache", is_flag=True, help="Encode, whatever was kept, and keep nothing."))
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def store_of(cache: Path | None, no_cache: bool) -> FeatureStore | None:
    """The store of `CACHE`'s options. Raises InputError, MachineError (a folder asked for that cannot be used)."""
    from wsi_rt.runtime.features.store import FeatureStore
    from wsi_rt.runtime.features.store_place import bound_from_environment

    if no_cache:
        if click.get_current_context().get_parameter_source("cache") == click.core.ParameterSource.COMMANDLINE:
            raise InputError("--cache and --no-cache given, expected one of them")
        return None
    store = FeatureStore(cache, bound_from_environment())
    if cache is not None:
        store.require_usable()
    return store


def _bytes(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    from wsi_rt.runtime.features.store_place import parse_bytes

    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _age(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r}, expected an age such as 12h, 30d or 8w")
    return float(match[1]) * _SECONDS[match[2]]


@click.group()
def cache() -> None:
    """List and prune what is kept of encoded slides."""


@cache.command("path")
@_DIR
def path_(cache: Path | None) -> None:
    """Print the folder."""
    from wsi_rt.runtime.features.store_place import default_root

    click.echo(str(cache or default_root()))


@cache.command("list")
@_DIR
@JSON
def list_(cache: Path | None, as_json: bool) -> None:
    """List the entries, most recently used first. Slides are told by digest: no names are kept."""
    from wsi_rt.runtime.features.store_entries import listed
    from wsi_rt.runtime.features.store_place import bound_from_environment, default_root

    root, bound = cache or default_root(), bound_from_environment()
    entries = [_row(item) for item in listed(root)]
    total = sum(e["bytes"] for e in entries)
    if as_json:
        told = {"path": str(root), "entries": entries, "bytes": total, "max_bytes": bound}
        click.echo(json.dumps(told, indent=1))
        return
    for e in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(e["used"]))
        what = f"{e['tiles']} tiles" if e["kind"] == "tiles" else f"tokens of {e['tiles']} tiles"
        made = f"{e['encoder'][:12]} {e['precision']}, {e['reader']}"
        click.echo(f"{used}  slide {e['slide'][:12]}  {what} x {e['width']}  {_size(e['bytes'])}  {made}")
    count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
    click.echo(f"{count}, {_size(total)} of at most {_size(bound)}, in {root}", err=True)


def _row(item: Any) -> dict[str, Any]:
    entry = item.entry
    tiles = entry.key if entry.kind == "tiles" else entry.key["tiles"]
    return {
        "kind": entry.kind,
        "slide": str(tiles["slide"]),
        "reader": str(tiles["reader"]),
        "encoder": str(entry.key["encoder"]),
        "precision": str(entry.key["precision"]),
        "tiles": entry.facts.get("tiles"),
        "width": entry.facts.get("width"),
        "bytes": item.size_bytes,
        "used": round(item.used, 3),
        "name": entry.name,
    }


@cache.command("prune")
@_DIR
@click.option("--max-bytes", metavar="SIZE", callback=_bytes, help="Keep at most 500M, 20G ...; 0 empties it.")
@click.option("--older-than", metavar="AGE", callback=_age, help="Remove what was not used for 12h, 30d, 8w ...")
@JSON
def prune_(cache: Path | None, max_bytes: int | None, older_than: float | None, as_json: bool) -> None:
    """Remove the least recently used entries, and what interrupted runs left (default: down to the usual bound)."""
    from wsi_rt.runtime.features.store_entries import prune
    from wsi_rt.runtime.features.store_place import bound_from_environment, default_root

    root = cache or default_root()
    if max_bytes is None and older_than is None:
        max_bytes = bound_from_environment()
    done = prune(root, max_bytes=max_bytes, older_than_s=older_than)
    if as_json:
        click.echo(json.dumps({"path": str(root), **done.to_json()}, indent=1))
        return
    rubbish = f" and {done.rubbish} unfinished files" if done.rubbish else ""
    click.echo(f"removed {done.entries} entries{rubbish}, {_size(done.freed_bytes)}", err=True)
    click.echo(f"{done.left} entries left, {_size(done.left_bytes)}, in {root}", err=True)


def _size(size_bytes: int) -> str:
    power = min((max(size_bytes, 1).bit_length() - 1) // 10, 4)
    return f"{size_bytes / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
