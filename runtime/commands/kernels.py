"""`wsi-rt kernels`: every shipped GPU kernel compiled without a GPU, and checked against the committed table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from wsi_rt.runtime.commands.options import JSON, SM
from wsi_rt.runtime.errors import InputError, MachineError, ParityError
from wsi_rt.runtime.progress import Progress

if TYPE_CHECKING:
    from wsi_rt.kernels.aot import Resources

NOTE = "predicted, not run on a GPU yet"
SHOWN = 3  # findings in the error line; all of them are on stdout
WORKERS = 2  # a compilation is one thread and about 0.3 GB


@click.command()
@click.option("--check", is_flag=True, help="Fail (exit 5) on drift from the committed table, spills or limits.")
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Only this operator; repeatable.")
@SM
@click.option("--update", is_flag=True, help="Write the committed table (kernels/resources.json) anew.")
@JSON
def kernels(check: bool, ops: tuple[str, ...], sms: tuple[int, ...] | None, update: bool, as_json: bool) -> None:
    """Compile the GPU kernels at the published sizes and dtypes, without a GPU: registers, spills, predicted time."""
    from wsi_rt.kernels import aot

    if check and update:
        raise InputError("--check compares with the committed table, --update rewrites it: give one of them")
    try:
        version, cases = aot.triton_version(), aot.all_cases(ops or aot.OPS, sms or aot.SHIPPED_SM)
    except ImportError as e:
        raise MachineError(f"compiling kernels needs {e.name or e}: pip install torch triton") from e
    whole = not ops and sms is None
    committed = _committed(version) if check or (update and not whole and aot.TABLE.exists()) else {}
    chosen = {name for name in committed if _is_chosen(name, ops, sms)}
    with Progress() as progress:
        found, failed = aot.measure(cases, WORKERS, lambda done: progress.update("compile", done, len(cases)))
    wrong = [f"{name}: does not compile: {why}" for name, why in failed.items()]
    wrong += [line for case in cases if case.name in found for line in aot.broken_rules(case, found[case.name])]
    wrong += aot.drift(committed, found, chosen - failed.keys()) if check else []
    _show(version, found, aot.roofline(cases), wrong, as_json)
    if wrong and (check or update or failed):
        raise ParityError(f"{len(wrong)} findings in {len(cases)} kernels: {'; '.join(wrong[:SHOWN])}{_more(wrong)}")
    if update:
        kept = {name: r for name, r in committed.items() if name not in chosen}
        aot.write_table(version, {**kept, **found})
        click.echo(f"{aot.TABLE}: {len(kept) + len(found)} kernels", err=True)
    elif check:
        click.echo(f"{len(found)} kernels as committed, Triton {version}", err=True)


def _committed(version: str) -> dict[str, Resources]:
    """The committed table; a MachineError where it is absent or was made with another Triton."""
    from wsi_rt.kernels.aot import TABLE, read_table

    try:
        was, committed = read_table()
    except OSError as e:
        raise MachineError(f"{TABLE}: {e.strerror}; make it: wsi-rt kernels --update") from e
    if was != version:
        raise MachineError(
            f"the committed table was made with Triton {was}, this is {version}: pip install triton=={was}, "
            "or make it anew: wsi-rt kernels --update"
        )
    return committed


def _show(
    version: str,
    found: Mapping[str, Resources],
    roofline: Sequence[Mapping[str, Any]],
    wrong: Sequence[str],
    as_json: bool,
) -> None:
    if as_json:
        rows = {name: asdict(r) for name, r in found.items()}
        report = {"triton": version, "note": NOTE, "kernels": rows, "roofline": roofline, "findings": wrong}
        click.echo(json.dumps(report, indent=1))
        return
    click.echo(f"{_resource_table(found)}\n\n{_roofline_table(roofline)}")
    for line in wrong:
        click.echo(f"finding: {line}")


def _more(wrong: Sequence[str]) -> str:
    return f"; and {len(wrong) - SHOWN} more on stdout" if len(wrong) > SHOWN else ""


def _is_chosen(name: str, ops: tuple[str, ...], sms: tuple[int, ...] | None) -> bool:
    op, _, sm = name.split("/")
    return (not ops or op in ops) and (sms is None or int(sm.removeprefix("sm")) in sms)


def _resource_table(found: Mapping[str, Resources]) -> str:
    head = (
        f"{'kernel':44}{'warps':>6}{'regs':>6}{'stack B':>9}{'spills':>8}{'shared B':>10}"
        f"{'blocks/SM':>11}{'occupancy':>11}  tensor cores"
    )
    lines = [
        f"{name:44}{r.warps:6}{r.registers:6}{r.stack_bytes:9}{r.spills:8}{r.shared_bytes:10}"
        f"{r.blocks_per_sm:11}{r.occupancy:10.0%}   {', '.join(r.tensor_cores) or '-'}"
        for name, r in found.items()
    ]
    return "\n".join([head, *lines])


def _roofline_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = f"roofline of one fp16 call at the published sizes: {NOTE}\n"
    head += f"{'operator':24}{'GPU':>22}{'size':>18}{'GFLOP':>12}{'MB':>10}{'ms':>11}  bound by"
    lines = [
        f"{r['op']:24}{r['gpu'] + ' (sm_' + str(r['sm']) + ')':>22}{r['size']:8} {r['unit']:9}{r['flops'] / 1e9:12.3f}"
        f"{r['bytes'] / 1e6:10.1f}{r['predicted_ms']:11.5f}  {r['bound']}"
        for r in rows
    ]
    return "\n".join([head, *lines])
