"""`wsi-rt encode`: a slide becomes files of tile features and slide tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from wsi_rt.runtime.commands.cache import CACHE, store_of
from wsi_rt.runtime.commands.options import ENGINES, JSON, SLIDE, TARGET, THREADS, require_place, show
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.progress import Progress


@click.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@ENGINES
@click.option(
    "--out",
    "outs",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Repeatable; .h5 gets tile features, .pt slide tokens.",
)
@click.option(
    "--coords",
    type=click.Path(path_type=Path),
    help="Encode a slide's tiles at the coordinates of this .h5 of CLAM, TRIDENT or AtlasPatch.",
)
@SLIDE
@CACHE
@TARGET
@THREADS
@JSON
def encode(
    source: Path,
    engines: Path,
    outs: tuple[Path, ...],
    coords: Path | None,
    cache: Path | None,
    no_cache: bool,
    target: str | None,
    threads: int | None,
    as_json: bool,
    **slide: Any,
) -> None:
    """Encode a slide (or an .h5 of tile features) into files."""
    from wsi_rt.runtime.encode import input_kind
    from wsi_rt.runtime.features import write_slide_tokens, write_tile_features
    from wsi_rt.runtime.pipeline import Pipeline

    settings = SlideSettings(**slide)
    for out in outs:
        if out.suffix.lower() not in {".h5", ".pt"}:
            raise InputError(f"--out is {out}, expected a name ending in .h5 (tile features) or .pt (slide tokens)")
        if out.suffix.lower() == ".h5" and input_kind(source) == "slide_tokens":
            raise InputError(f"{source} holds slide tokens: no tile features can be made from it for {out}")
        require_place(out)
    wants_tokens, wants_features = (any(out.suffix.lower() == suffix for out in outs) for suffix in (".pt", ".h5"))
    with Pipeline.open(engines, threads, store_of(cache, no_cache), target=target) as pipeline, Progress() as progress:
        encoded = pipeline.encode(
            source,
            settings,
            tokens=wants_tokens,
            features=wants_features,
            coords=coords,
            on_progress=progress.update,
        )
    for out in outs:
        if out.suffix.lower() == ".pt" and encoded.tokens is not None:
            write_slide_tokens(out, encoded.tokens)
        elif encoded.features is not None:
            size0, attributes = encoded.slide.size0 if encoded.slide else None, encoded.file_attributes
            write_tile_features(out, encoded.features, name=source.stem, size0=size0, attributes=attributes)
    if as_json:
        timings = {k: round(v, 3) for k, v in encoded.timings_ms.items()}
        result = {"out": [str(o) for o in outs], "tiles": dict(encoded.tiles), "timings_ms": timings}
        failed = [{"index": f.index, "xy0": list(f.xy0), "reason": f.reason} for f in encoded.failures]
        click.echo(json.dumps({**result, "failed_tiles": failed, "notes": list(encoded.notes)}, indent=1))
        return
    show(encoded.tiles, encoded.timings_ms, encoded.notes)
    for out in outs:
        click.echo(str(out))
