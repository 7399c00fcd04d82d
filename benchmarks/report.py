"""What every bench reports: rows of one shape, as a table and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 20, 80, 90, 99)


@dataclass(frozen=True)
class Row:
    """One provider's figure in one case.

    provider: "wsi-rt" and variants, a peer's package, "reference" (the published way) or "limit" (a ceiling). unit:
    that of the percentiles; n: how many runs they are of, 0 for a prediction, which is p50 alone. threads: None where
    the work is not on the CPU. A provider that did not run has `skipped`: why.
    """

    bench: str
    case: str
    provider: str
    metric: str
    unit: str
    threads: int | None = None
    device: str | None = None
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    p90: float | None = None
    p99: float | None = None
    n: int = 0
    note: str | None = None
    skipped: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All fields but device, note and skipped where they say nothing."""
        return {k: v for k, v in asdict(self).items() if v is not None or k not in ("device", "note", "skipped")}


def percentiles(samples: Sequence[float]) -> dict[str, Any]:
    """p50, p20, p80, p90, p99 (linear between samples) and n, as `Row` takes them. At least one sample."""
    found = np.percentile(np.asarray(samples, np.float64), PERCENTILES)
    return {**{f"p{p}": float(x) for p, x in zip(PERCENTILES, found, strict=True)}, "n": len(samples)}


@dataclass
class Outcome:
    """What a bench found: rows, and why figures of ours are missing: wrong answers (`red`), or none at all
    (`broken`)."""

    rows: list[Row] = field(default_factory=list)
    red: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Rows, and where they were measured."""

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.as_json() for row in self.rows]}

    def table(self) -> str:
        """For a terminal: the machine, then one line a row."""
        return f"{self._heading()}\n\n{table(self.rows)}"

    def _heading(self) -> str:
        where = ", ".join(self.machine.get("gpus") or ["no GPU"])
        cpus = f"{self.machine.get('usable_cpus')} of {self.machine.get('cpus')} CPUs"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{where}; {cpus}; commit {self.commit or 'unknown'}\n{versions}"


def table(rows: Sequence[Row]) -> str:
    """Columns as wide as what they hold; a skipped row says why instead of figures."""
    head = ("case", "provider", "device", "metric", "p50", "p20", "p80", "p90", "p99", "n", "")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = range(4, 10)
    shown = (
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in shown)


def _cells(row: Row) -> tuple[str, ...]:
    figures = [_with_unit(x, row.unit) for x in (row.p50, row.p20, row.p80, row.p90, row.p99)]
    remark = row.skipped or row.note or ""
    return (row.case, row.provider, row.device or "", row.metric, *figures, str(row.n) if row.n else "", remark)


def _with_unit(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "s":  # from microseconds to minutes in one column
        scale, unit = (1e6, "us") if value < 1e-3 else (1e3, "ms") if value < 1 else (1.0, "s")
        value *= scale
    return f"{value:.4g} {unit}"
