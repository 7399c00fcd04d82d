"""What the commands of `cli` do: call the library, show progress on stderr, print the result."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import InputError, MachineError, ParityError
from wsi_rt.runtime.progress import Progress

SLIDE_FLAGS = tuple(f.name for f in fields(SlideSettings))


def build(
    out: Path,
    components: tuple[str, ...],
    dry_run: bool,
    target: str,
    precision: str | None,
    force: bool,
    threads: int | None,
    **sources: str | None,
) -> None:
    try:
        from wsi_rt.export.build import BuildRequest, build_engines, check_place, is_up_to_date, plan_build
        from wsi_rt.export.sources.checkpoint import Sources
    except ImportError as e:
        raise MachineError(
            f"building engines needs {e.name or e}: pip install '.[export]' in a checkout of wsi-rt"
        ) from e
    request = BuildRequest(Sources(**sources), out, target, precision, components, force, threads)
    plan = plan_build(request)
    if is_up_to_date(plan):
        click.echo(f"{out}: up to date", err=True)
        return
    if dry_run:
        check_place(plan)
        click.echo(describe_plan(plan))
        return
    with Progress() as progress:
        manifest = build_engines(plan, lambda step: progress.step(f"build: {step}", plan.steps()))
    size = sum(f.size for f in manifest.files.values())
    click.echo(f"{out}: {', '.join(manifest.components)} for {target}, {size / 1e6:.0f} MB", err=True)


def describe_plan(plan: Any) -> str:
    from wsi_rt.export.arch import parameter_count

    lines = [f"would build {plan.request.out} for {plan.request.target} from {plan.checkpoint.label}"]
    for name, part in plan.checkpoint.parts.items():
        params, tensors = parameter_count(part.config), len(part.config.tensors())
        ignored = f", {part.ignored} tensors left out" if part.ignored else ""
        lines.append(
            f"  {name:14}{plan.precision[name]:6}{params / 1e6:10.2f} M parameters in {tensors} tensors{ignored}"
        )
    lines.append(f"  about {plan.estimated_bytes / 1e6:.0f} MB on disk; nothing was written")
    return "\n".join(lines)


def inspect(engines: Path, as_json: bool) -> None:
    from wsi_rt.runtime.manifest import load_manifest

    manifest = load_manifest(engines)
    if as_json:
        click.echo(json.dumps(manifest.to_json(), indent=1))
        return
    made_of = f"{manifest.source['label']}{' (synthetic weights)' if manifest.source['synthetic'] else ''}"
    click.echo(f"{engines}: wsi-rt {manifest.version}, target {', '.join(manifest.targets)}, from {made_of}")
    for name, c in manifest.components.items():
        size = sum(f.size for path, f in manifest.files.items() if path.startswith(f"{name}/"))
        ins, outs = (
            ", ".join(f"{s.name} {s.dtype} [{', '.join(map(str, s.dims))}]" for s in specs[:4])
            for specs in (c.inputs, c.outputs)
        )
        precision = ", ".join(dict.fromkeys(t.precision for t in c.targets.values()))
        click.echo(f"\n{name}  {precision}  {size / 1e6:.1f} MB  sha256 {c.digest[:16]}")
        click.echo(f"  in   {ins}{' ...' if len(c.inputs) > 4 else ''}")
        click.echo(f"  out  {outs}{' ...' if len(c.outputs) > 4 else ''}")
        for target, t in c.targets.items():
            p, gate = t.parity["engine"], t.parity["gate"]
            of = f" of {target} {t.precision}" if len(c.targets) > 1 else ""
            click.echo(
                f"  parity{of} against fp32 torch: relative error {p['max_rel']:.1e} (gate {gate['max_rel']:.0e}), "
                f"cosine {p['min_cosine']:.7f} (gate {gate['min_cosine']})"
            )
    tools = ", ".join(f"{k} {v}" for k, v in manifest.build["toolchain"].items())
    click.echo(f"\nbuilt with {tools} on {manifest.build['isa']}")
    click.echo(f"template {manifest.generation['template']}, {len(manifest.files)} files")


def verify(engines: Path, threads: int | None, as_json: bool) -> None:
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


def encode(
    source: Path, engines: Path, outs: tuple[Path, ...], threads: int | None, as_json: bool, slide: Mapping[str, Any]
) -> None:
    from wsi_rt.runtime.encode import input_kind
    from wsi_rt.runtime.features import write_slide_tokens, write_tile_features
    from wsi_rt.runtime.pipeline import Pipeline

    settings = SlideSettings(**slide)
    for out in outs:
        if out.suffix.lower() not in {".h5", ".pt"}:
            raise InputError(f"--out is {out}, expected a name ending in .h5 (tile features) or .pt (slide tokens)")
        if out.suffix.lower() == ".h5" and input_kind(source) == "slide_tokens":
            raise InputError(f"{source} holds slide tokens: no tile features can be made from it for {out}")
        _require_place(out)
    with Pipeline.open(engines, threads) as pipeline, Progress() as progress:
        wants_tokens = any(out.suffix.lower() == ".pt" for out in outs)
        encoded = pipeline.encode(source, settings, tokens=wants_tokens, on_progress=progress.update)
    for out in outs:
        if out.suffix.lower() == ".pt" and encoded.tokens is not None:
            write_slide_tokens(out, encoded.tokens)
        elif encoded.features is not None:
            size0, attributes = encoded.slide.size0 if encoded.slide else None, encoded.file_attributes
            write_tile_features(out, encoded.features, name=source.stem, size0=size0, attributes=attributes)
    if as_json:
        timings = {k: round(v, 3) for k, v in encoded.timings_ms.items()}
        result = {"out": [str(o) for o in outs], "tiles": dict(encoded.tiles), "timings_ms": timings}
        click.echo(json.dumps({**result, "notes": list(encoded.notes)}, indent=1))
        return
    _show(encoded.tiles, encoded.timings_ms, encoded.notes)
    for out in outs:
        click.echo(str(out))


def _require_place(out: Path) -> None:
    """Refuse a place that cannot be written before the long work, not after. A device is not a place: as root,
    the rename that puts a finished file there would replace /dev/null for everyone."""
    if out.exists() and not out.is_file():
        raise InputError(f"--out is {out}, which is no regular file; expected the path of a file to write")
    if not out.parent.is_dir():
        make = f"mkdir -p {shlex.quote(str(out.parent))}"
        raise InputError(f"--out is {out}: there is no folder {out.parent}; make it first: {make}")
    if not os.access(out.parent, os.W_OK):
        raise MachineError(f"--out is {out}: {out.parent} is not writable; choose another folder")


def ask(
    source: Path, question: str, engines: Path, threads: int | None, as_json: bool, flags: Mapping[str, Any]
) -> None:
    from wsi_rt.runtime.pipeline import Pipeline

    slide = SlideSettings(**{k: flags[k] for k in SLIDE_FLAGS})
    chosen = {k: v for k, v in flags.items() if k not in SLIDE_FLAGS and v not in (None, ())}
    with Pipeline.open(engines, threads) as pipeline, Progress() as progress:
        settings = pipeline.default_generation().with_overrides(**chosen)

        def stream(text: str) -> None:
            progress.close()
            click.echo(_for_terminal(text), nl=False)

        answer = pipeline.ask(
            source, question, settings, slide, on_text=None if as_json else stream, on_progress=progress.update
        )
    if as_json:
        click.echo(json.dumps(answer.to_json(), indent=1))
        return
    click.echo()
    _show(answer.tiles, answer.timings_ms, answer.notes)
    generated, decode_s = len(answer.token_ids), answer.timings_ms["decode"] / 1e3
    rate = f", {(generated - 1) / decode_s:.1f} tokens/s" if generated > 1 and decode_s > 0 else ""
    click.echo(f"answer: {generated} tokens{rate}, stopped by {answer.stop_reason}", err=True)


def _for_terminal(text: str) -> str:
    """A model may write control characters; a terminal would obey them, a file or pipe gets them as they are."""
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _show(tiles: Mapping[str, int | None], timings_ms: Mapping[str, float], notes: Sequence[str]) -> None:
    """Tiles, stage timings and notes, on stderr."""
    if tiles["kept"] is not None:
        distinct = f", {tiles['distinct_tokens']} distinct slide tokens" if tiles["distinct_tokens"] else ""
        click.echo(f"tiles: {tiles['kept']} kept of {tiles['grid']}{distinct}", err=True)
    ran = [f"{stage} {ms:.0f}" for stage, ms in timings_ms.items() if ms]
    if ran:
        click.echo(f"ms: {', '.join(ran)}", err=True)
    for note in notes:
        click.echo(f"note: {note}", err=True)


def synth_slide(out: Path, flags: Mapping[str, Any]) -> None:
    from wsi_rt.runtime.slides import write_synth_slide

    _require_place(out)
    with Progress() as progress:
        write_synth_slide(out, **flags, on_progress=lambda done, total: progress.update("write slide", done, total))
    click.echo(str(out))
