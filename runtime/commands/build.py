"""`wsi-rt build-engines`: a checkpoint becomes an engine bundle, where the export extra is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wsi_rt.runtime.commands.options import THREADS, architectures
from wsi_rt.runtime.errors import InputError, MachineError
from wsi_rt.runtime.progress import Progress


@click.command("build-engines")
@click.option("--checkpoint", metavar="SRC", help="synthetic:<preset>?seed=N, or a folder with those below.")
@click.option("--tile-encoder", metavar="P", help="timm folder: config.json and weights.")
@click.option("--slide-encoder", metavar="P", help="LongNet weights (slide_encoder.pth), file or folder.")
@click.option("--llava", metavar="P", help="LLaVA folder: merged; LoRA adapter or projector with --llava-base.")
@click.option("--llava-base", metavar="P", help="Language model folder that --llava's adapter or projector goes over.")
@click.option("--tokenizer", metavar="P", help="tokenizer.model or tokenizer.json (default: from --llava).")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle folder to write.")
@click.option("--target", default="ort-cpu", show_default=True, help="What to compile for.")
@click.option(
    "--sm",
    "sms",
    metavar="LIST",
    callback=architectures,
    help="GPU architectures to compile for, where the target is compiled for one: 80,89 (default: this GPU's).",
)
@click.option("--precision", metavar="SPEC", help="fp32, fp16, ... where supported, or component=precision,...")
@click.option("--fast", is_flag=True, help="Also 8-bit layers for `ask --fast`: int8 or int4 language models only.")
@click.option("--components", metavar="LIST", help="Comma-separated subset of the checkpoint's components.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be built.")
@click.option("--force", is_flag=True, help="Replace another build in --out.")
@THREADS
def build_engines(
    out: Path,
    components: str | None,
    dry_run: bool,
    target: str,
    sms: tuple[int, ...] | None,
    precision: str | None,
    fast: bool,
    force: bool,
    threads: int | None,
    **sources: str | None,
) -> None:
    """Compile a checkpoint into an engine bundle."""
    from wsi_rt.runtime.bundle import Bundle
    from wsi_rt.runtime.plan_measure import measure

    names = _component_names(components)
    try:
        from wsi_rt.export import build
        from wsi_rt.export.sources.checkpoint import Sources
    except ImportError as e:
        if e.name and e.name.startswith("wsi_rt"):
            raise
        raise MachineError(
            f"building engines needs {e.name or e}: pip install '.[export]' in a checkout of wsi-rt"
        ) from e
    request = build.BuildRequest(Sources(**sources), out, target, precision, names, force, threads, fast, sms)
    plan = build.plan_build(request)
    if build.is_up_to_date(plan):
        click.echo(f"{out}: up to date", err=True)
        return
    if dry_run:
        build.check_place(plan)
        click.echo(_describe(plan))
        return
    with Progress() as progress:
        manifest = build.build_engines(plan, lambda step: progress.step(f"build: {step}", plan.steps()))
        engines = [t.parity["engine"] for c in manifest.components.values() for t in c.targets.values()]
        unrun = sorted({e for e in engines if isinstance(e, str)})
        runs_here = any(not isinstance(e, str) for e in engines)
        if runs_here and any("encoder" in name for name in manifest.components):
            progress.step("build: measure the encoders on this machine", plan.steps() + 1)
            measure(Bundle.open(out, threads))
    size = sum(f.size for f in manifest.files.values())
    click.echo(
        f"{out}: {', '.join(manifest.components)} for {', '.join(manifest.targets)}, {size / 1e6:.0f} MB", err=True
    )
    if unrun:
        click.echo(
            f"note: engines {', '.join(unrun)}; the ONNX that they were made from was held to the gate", err=True
        )


def _component_names(components: str | None) -> tuple[str, ...]:
    """--components as names; none when it was not given."""
    names = tuple(n.strip() for n in components.split(",") if n.strip()) if components is not None else ()
    if components is not None and not names:
        raise InputError(f"--components is {components!r}, expected a comma-separated list of components")
    return names


def _describe(plan: Any) -> str:
    from wsi_rt.export.arch import parameter_count

    lines = [f"would build {plan.request.out} for {', '.join(plan.targets)} from {plan.checkpoint.label}"]
    for name, part in plan.checkpoint.parts.items():
        params, tensors = parameter_count(part.config), len(part.config.tensors())
        ignored = f", {part.ignored} tensors left out" if part.ignored else ""
        lines.append(
            f"  {name:14}{plan.precision[name]:6}{params / 1e6:10.2f} M parameters in {tensors} tensors{ignored}"
        )
    lines.append(f"  about {plan.estimated_bytes / 1e6:.0f} MB on disk; nothing was written")
    return "\n".join(lines)
