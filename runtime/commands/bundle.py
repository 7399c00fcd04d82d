"""`wsi-rt inspect` and `wsi-rt verify`: what a bundle holds, and whether it still gives its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_rt.runtime.commands.options import JSON, THREADS
from wsi_rt.runtime.errors import ParityError
from wsi_rt.runtime.progress import Progress

if TYPE_CHECKING:
    from wsi_rt.runtime.bundle import Bundle
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
        p, gate, layers = t.measured(), t.parity["gate"], t.parity["layers"]
        not_run = t.parity["engine"] if isinstance(t.parity["engine"], str) else ""
        of = f" of {target} {t.precision}" if len(c.targets) > 1 else ""
        lines += [
            f"  weights{of}: {f['layers']} Linear layers in {f['bits']} bits, one scale per {f['block'] or 'row'}, "
            f"{'symmetric' if f['symmetric'] else 'asymmetric'}{', for many rows (--fast)' if 'wide' in form else ''}"
            for form, f in t.formats.items()
        ]
        if not_run:
            lines.append(f"  engine{of} {not_run}; what follows is of the ONNX that it was made from, on the CPU")
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
@click.option("--target", metavar="NAME", help="Run this one's engines, or fail (default: all that run here).")
@THREADS
@JSON
def verify(engines: Path, target: str | None, threads: int | None, as_json: bool) -> None:
    """Hash every file of a bundle and check every component's numbers again.

    Engines that this machine cannot run are told, and the ONNX files that they were made from are run on the CPU.
    """
    from wsi_rt.runtime.bundle import Bundle

    bundle = Bundle.open(engines, threads, target, to_run=target is not None)
    bundle.verify_files()
    chosen = bundle.manifest.targets if target is None else (bundle.target,)
    report: dict[str, dict[str, Any]] = {name: {} for name in bundle.manifest.components}
    with Progress() as progress:
        for name, component in bundle.manifest.components.items():
            progress.step(f"verify: {name}", len(report))
            for t in [t for t in chosen if t in component.targets]:
                report[name][t] = _check(bundle.for_target(t), component)
    components = {
        name: {"ok": all(r["ok"] is not False for r in rows.values()), "targets": rows} for name, rows in report.items()
    }
    if as_json:
        click.echo(json.dumps({"files": len(bundle.manifest.files), "components": components}, indent=1))
    else:
        click.echo("\n".join([f"{len(bundle.manifest.files)} files intact", *_rows(report)]))
    failed = [name for name, c in components.items() if not c["ok"]]
    if failed:
        raise ParityError(
            f"{engines}: {', '.join(failed)} differ from the fp32 reference on this machine; "
            f"rebuild here: {bundle.manifest.rebuild_command(engines)}"
        )
    if not any("max_rel" in r for rows in report.values() for r in rows.values()):
        bundle.require_machine()  # nothing was checked but files: why


def _check(bundle: Bundle, component: EngineManifest) -> dict[str, Any]:
    """Of one target of a component: what was checked, its figures where anything was, and whether they hold."""
    from wsi_rt.runtime.engines.machine import lacking
    from wsi_rt.runtime.manifest import NOT_RUN
    from wsi_rt.runtime.parity import GATES, Gate, check_component, check_source

    compiled = component.compiled(bundle.target)
    flaw = lacking(bundle.target, compiled.requires)
    if flaw is not None and not compiled.source:
        return {"engine": NOT_RUN + flaw, "checked": "nothing", "ok": None}
    check = check_component if flaw is None else check_source
    with bundle.unreplaced():
        parity = check(bundle.root, bundle.target, component, bundle.threads)
    ran = {"engine": "ran", "checked": "engine"} if flaw is None else {"engine": NOT_RUN + flaw, "checked": "onnx"}
    # The recorded gate is twice what the engine was off by, where it ran at build time: not the ONNX's.
    gate = Gate(**compiled.parity["gate"]) if flaw is None else GATES[compiled.precision]
    return {**ran, **parity.to_json(), "ok": parity.passes(gate)}


def _rows(report: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """A line for each component and target; the target is named where there are several, or it did not run."""
    several = any(len(rows) > 1 for rows in report.values())
    for name, rows in report.items():
        for target, r in rows.items():
            of = f"  {target}" if several or r["checked"] != "engine" else ""
            if r["checked"] == "nothing":
                yield f"{name:14} not checked{of}: engine {r['engine']}"
                continue
            told = f"relative error {r['max_rel']:.1e}, cosine {r['min_cosine']:.7f}"
            if r["checked"] == "onnx":
                told += f", of the ONNX on the CPU; engine {r['engine']}"
            yield f"{name:14} {'ok' if r['ok'] else 'FAILED'}{of}  {told}"
