"""`wsi-rt synth-checkpoint`: synthetic weights as files, to try the path from a checkpoint without licensed ones."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from wsi_rt.runtime.errors import MachineError
from wsi_rt.runtime.progress import Progress


@click.command("synth-checkpoint")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it must not exist yet.")
@click.option("--preset", default="nano", show_default=True, help="Sizes of the model.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--layout", default="merged", show_default=True, help="merged, merged-bin, lora or projector.")
@click.option("--dtype", default="fp32", show_default=True, help="Of the stored weights: fp32, bf16 or fp16.")
def synth_checkpoint(out: Path, preset: str, seed: int, layout: str, dtype: str) -> None:
    """Write a deterministic synthetic checkpoint in a published layout; read from any, it is the same model."""
    try:
        from wsi_rt.export import layouts
    except ImportError as e:
        raise MachineError(
            f"writing checkpoints needs {e.name or e}: pip install '.[export]' in a checkout of wsi-rt"
        ) from e
    plan = layouts.plan_layout(preset, seed, layout, out, dtype)
    size = f"{plan.stored_bytes / 1e6:.0f} MB"
    click.echo(f"{out}: {size} of {dtype} weights in {len(plan.pieces)} files to write", err=True)
    with Progress() as progress:
        steps = len(plan.pieces) + len(plan.tokenizers)
        layouts.write_layout(plan, lambda file: progress.step(f"write: {file}", steps))
    bundle = out.with_name(f"{out.resolve().name}-engines")
    click.echo(f"wsi-rt build-engines --checkpoint {shlex.quote(str(out))} --out {shlex.quote(str(bundle))}")
