"""`wsi-rt inspect` and `wsi-rt verify`: what a bundle holds, and whether it still gives its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wsi_rt.runtime.commands.options import JSON, THREADS
from wsi_rt.runtime.errors import ParityError
from wsi_rt.runtime.progress import Progress

if TYPE_CHECKING:
    from wsi_rt.runtime.manifest import EngineManifest


@click.command()
@click.argument("engines", metavar="DIR", type=click.Path(path_type=Path))
@JSON
def inspect(engines: Path, as_json: bool) -> None:
    """Say what a bundle holds and what made it."""
    from wsi_rt.runtime.manifest import load_manifest

    manifest = load_manifest(engines)
    if as_json:
        click.echo(json.dumps(manifest.to_json(), indent=1))
        return
    made_of = f"{manifest.source['label']}{' (synthetic weights)' if manifest.source['synthetic'] else ''}"
    click.echo(f"{engines}: wsi-rt {manifest.version}, target {', '.join(manifest.targets)}, from {made_of}")
    for name, c in manifest.components.items():
        size = sum(f.size for path, f in manifest.files.items() if path.startswith(f"{name}/"))
        click.echo("\n" + "\n".join(_component(name, c, size)))
    tools = ", ".join(f"{k} {v}" for k, v in manifest.build["toolchain"].items())
    click.echo(f"\nbuilt with {tools} on {manifest.build['isa']}")
    click.echo(f"template {manifest.generation['template']}, {len(manifest.files)} files")


def _component(name: str, c: EngineManifest, size: int) -> list[str]:
    """What inspect says of one component, line by line; `size` in bytes."""
    precision = ", ".join(dict.fromkeys(t.precision for t in c.targets.values()))
    lines = [f"{name}  {precision}  {size / 1e6:.1f} MB  sha256 {c.digest[:16]}"]
    for what, specs in (("in ", c.inputs), ("out", c.outputs)):
        told = ", ".join(f"{s.name} {s.dtype} [{', '.join(map(str, s.dims))}]" for s in specs[:4])
        lines.append(f"  {what}  {told}{' ...' if len(specs) > 4 else ''}")
    for target, t in c.targets.items():
        p, gate, layers = t.parity["engine"], t.parity["gate"], t.parity["layers"]
        of = f" of {target} {t.precision}" if len(c.targets) > 1 else ""
        lines += [
            f"  weights{of}: {f['layers']} Linear layers in {f['bits']} bits, one scale per {f['block'] or 'row'}, "
            f"{'symmetric' if f['symmetric'] else 'asymmetric'}{', for many rows (--fast)' if 'wide' in form else ''}"
            for form, f in t.formats.items()
        ]
        lines.append(
            f"  parity{of} against fp32 torch: relative error {p['max_rel']:.1e} (gate {gate['max_rel']:.0e}), "
            f"cosine {p['min_cosine']:.7f} (gate {gate['min_cosine']:.6g})"
        )
        if layers:
            lines.append(
                f"  worst of {layers['count']} layers: {layers['worst']}, off by {layers['error']:.1e} of what it adds "
                f"(gate {gate['max_layer']:.0e})"
            )
    if c.rounding:
        moved = c.rounding["outputs"]
        lines.append(
            f"  rounded weights: off by {c.rounding['error']:.1e} at most ({c.rounding['worst']}), which moves the "
            f"outputs by {moved['max_rel']:.1e}, cosine {moved['min_cosine']:.4f}"
        )
    return lines


@click.command()
@click.argument("engines", metavar="DIR", type=click.Path(path_type=Path))
@THREADS
@JSON
def verify(engines: Path, threads: int | None, as_json: bool) -> None:
    """Hash every file of a bundle and check every component's numbers again."""
    from wsi_rt.runtime.bundle import Bundle
    from wsi_rt.runtime.parity import Gate, check_component

    bundle = Bundle.open(engines, threads)
    bundle.verify_files()
    failed, report = [], {}
    with Progress() as progress:
        for name, component in bundle.manifest.components.items():
            progress.step(f"verify: {name}", len(bundle.manifest.components))
            with bundle.unreplaced():
                parity = check_component(bundle.root, bundle.target, component, bundle.threads)
            ok = parity.passes(Gate(**component.compiled(bundle.target).parity["gate"]))
            report[name] = {**parity.to_json(), "ok": ok}
            failed += [] if ok else [name]
    if as_json:
        click.echo(json.dumps({"files": len(bundle.manifest.files), "components": report}, indent=1))
    else:
        click.echo(f"{len(bundle.manifest.files)} files intact")
        for name, r in report.items():
            told = f"relative error {r['max_rel']:.1e}, cosine {r['min_cosine']:.7f}"
            click.echo(f"{name:14} {'ok' if r['ok'] else 'FAILED'}  {told}")
    if failed:
        raise ParityError(
            f"{engines}: {', '.join(failed)} differ from the fp32 reference on this machine; "
            f"rebuild here: {bundle.manifest.rebuild_command(engines)}"
        )
