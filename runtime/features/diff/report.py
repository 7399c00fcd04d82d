"""What two files differ in, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 5  # of the rows farthest apart; `--json` has all


@dataclass(frozen=True)
class Finding:
    """One difference. kind: not_finite, mpp, tiles, crop, offset, axes, scale, order, encoder, width, precision,
    values; says: one clause; figures: the numbers behind it."""

    kind: str
    says: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """a, b: what the files are (Side.told). findings: the first is the one to look at first. worst: tiles or tokens
    farthest apart. records: what the files say of themselves and disagree on; alone they make no difference."""

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    findings: tuple[Finding, ...]
    worst: tuple[Mapping[str, Any], ...] = ()
    records: tuple[Mapping[str, Any], ...] = ()
    compared: Mapping[str, Any] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "a": dict(self.a),
            "b": dict(self.b),
            "findings": [asdict(f) for f in self.findings],
            "compared": dict(self.compared),
            "worst": [dict(w) for w in self.worst],
            "records": [dict(r) for r in self.records],
        }


def render(report: Report) -> str:
    lines = [f"{name}: {_side(side)}" for name, side in (("A", report.a), ("B", report.b))]
    lines += [f"{f.kind}: {f.says}" for f in report.findings]
    if report.worst:
        lines.append("farthest apart:")
        lines += [_worst(w) for w in report.worst[:SHOWN]]
    lines += [f"record: {r['what']} is {r['a']} in A, {r['b']} in B" for r in report.records]
    kinds = ", ".join(dict.fromkeys(f.kind for f in report.findings))
    return "\n".join([*lines, "equal" if report.equal else f"differ: {kinds}"])


def _side(told: Mapping[str, Any]) -> str:
    width = f" x {told['width']}" if told["width"] else ", no features"
    parts = [f"{told['path']}: {told['rows']} {told['kind']}{width}"]
    parts += [told["storage"]] if told["storage"] else []
    parts += [told["order"]] if told["order"] else []
    parts += [f"{told['patch_size_level0']} level-0 px"] if told["patch_size_level0"] else []
    return ", ".join([*parts, told["maker"]])


def _worst(worst: Mapping[str, Any]) -> str:
    xy0 = worst["xy0"]
    place = f"({xy0[0]}, {xy0[1]})" if xy0 else f"row {worst['row_a']}"
    return f"  {place}: cosine {worst['cosine']:.6f}, relative error {worst['error']:.2e}"
