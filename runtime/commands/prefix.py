"""`wsi-rt prefix`: slide prefixes kept on disk. `MODEL`, the options of commands that run the language model."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_rt.runtime.commands.options import JSON, options
from wsi_rt.runtime.errors import InputError

if TYPE_CHECKING:
    from wsi_rt.runtime.llm.language_model import ModelSettings
    from wsi_rt.runtime.llm.prefix_disk import PrefixDisk, Stored


def _bytes(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    from wsi_rt.runtime.features.store_place import parse_bytes

    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _prefixes(required: bool, help_text: str) -> Any:
    return click.option(
        "--prefixes",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="WSI_RT_PREFIXES",
        show_envvar=True,
        required=required,
        help=help_text,
    )


MODEL = options(
    click.option("--kv-bytes", callback=_bytes, metavar="SIZE", help="Memory for keys and values, such as 4G."),
    _prefixes(False, "Folder that keeps slide prefixes: a later run skips their prefill (640 MB per slide at 7 B)."),
    click.option(
        "--prefix-dtype",
        default="fp32",
        show_default=True,
        metavar="fp32|fp16",
        help="fp16 rounds slide prefixes: half the disk.",
    ),
    click.option("--fast", is_flag=True, help="Many questions faster, in 8 bits: a bundle of `build-engines --fast`."),
    click.option("--no-speculation", is_flag=True, help="Verify no guessed tokens; answers are the same."),
)
# What MODEL sets, as names of parameters.
MODEL_FLAGS = ("kv_bytes", "prefixes", "prefix_dtype", "fast", "no_speculation")


def model_settings(flags: dict[str, Any]) -> ModelSettings:
    """Of MODEL's options, taken out of `flags`."""
    from wsi_rt.runtime.llm.language_model import ModelSettings

    kv_bytes, prefixes, dtype, fast, no_speculation = (flags.pop(name) for name in MODEL_FLAGS)
    disk = _disk(prefixes) if prefixes is not None else None
    return ModelSettings(kv_bytes, disk, dtype, speculate=not no_speculation, fast=fast)


def _disk(folder: Path) -> PrefixDisk:
    from wsi_rt.runtime.features.store_place import parse_bytes
    from wsi_rt.runtime.llm.prefix_disk import ENVIRONMENT_BOUND, MAX_BYTES, PrefixDisk

    text = os.environ.get(ENVIRONMENT_BOUND)
    try:
        return PrefixDisk(folder, parse_bytes(text) if text else MAX_BYTES)
    except ValueError as error:
        raise InputError(f"{ENVIRONMENT_BOUND} is {error}") from error


@click.group()
def prefix() -> None:
    """Slide prefixes kept on disk by --prefixes: what is there, dropping it, keeping it."""


_WHERE = _prefixes(True, "Folder of prefixes.")
_KEY = click.argument("key")


@prefix.command("list")
@_WHERE
@JSON
def list_prefixes(prefixes: Path, as_json: bool) -> None:
    """Say what is kept, most recently used first."""
    found = _disk(prefixes).listed()
    if as_json:
        click.echo(json.dumps({"prefixes": [_to_json(s) for s in found]}, indent=1))
        return
    for s in found:
        state = s.problem or f"{s.length} tokens  {'fp16' if s.dtype == '<f2' else 'fp32'}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(s.used))
        click.echo(f"{s.key[:16]}  {s.nbytes / 1e6:8.1f} MB  {used}  {state}{'  pinned' if s.pinned else ''}")
    click.echo(f"prefixes: {len(found)}, {sum(s.nbytes for s in found) / 1e6:.1f} MB", err=True)


@prefix.command("drop")
@click.argument("keys", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every prefix, pinned ones too.")
@_WHERE
@JSON
def drop_prefixes(keys: tuple[str, ...], everything: bool, prefixes: Path, as_json: bool) -> None:
    """Remove prefixes; a KEY may be cut to its first characters."""
    if bool(keys) == everything:
        raise click.UsageError("expected KEYs or --all, not both")
    disk = _disk(prefixes)
    freed = [disk.drop(key) for key in ([s.key for s in disk.listed()] if everything else keys)]
    _tell({"dropped": len(freed), "freed_bytes": sum(freed)}, as_json)


@prefix.command("pin")
@_KEY
@click.option("--unpin", is_flag=True, help="Let it go again when room is needed.")
@_WHERE
@JSON
def pin_prefix(key: str, unpin: bool, prefixes: Path, as_json: bool) -> None:
    """Keep a prefix when others need room; KEY may be cut to its first characters."""
    _disk(prefixes).pin(key, pinned=not unpin)
    _tell({"pinned": not unpin}, as_json)


def _to_json(s: Stored) -> dict[str, Any]:
    out: dict[str, Any] = {"key": s.key, "bytes": s.nbytes, "used": s.used, "pinned": s.pinned}
    if s.problem is not None:
        return {**out, "problem": s.problem}
    return {
        **out,
        "tokens": s.length,
        "dtype": "fp16" if s.dtype == "<f2" else "fp32",
        "made_of": dict(s.made_of or {}),
    }


def _tell(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in result.items()))
