"""The curve of the slide encoder as a picture: seconds and peak memory by number of tiles, measured and planned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wsi_rt.benchmarks.encoders.cases import PROVIDERS, TILES
from wsi_rt.benchmarks.report import Row
from wsi_rt.runtime.errors import InputError, MachineError

# metric measured, metric planned, what it is, its unit, in which it is shown
PANELS = (
    ("seconds", "planned_seconds", "Time of a slide", "s", 1.0),
    ("peak_rss_bytes", "planned_bytes", "Peak memory of the process", "GB", 1e9),
)
COLOURS = ("#6b7280", "#1d4ed8", "#c2410c")


def require_plots(path: Path) -> None:
    """Before the bench runs. Raises MachineError without matplotlib, InputError for a name that is no picture's."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise MachineError("--plot needs matplotlib: pip install '.[plots]' in a checkout of wsi-rt") from e
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path}, expected a name that ends in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: its folder does not exist; create it: mkdir -p {path.parent}")


def write_curve(rows: Sequence[Row], path: Path) -> None:
    """Measured medians as points, the plan as dashed lines. matplotlib: what the field's figures are made with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    threads = next((row.threads for row in rows if row.case in TILES), None)
    figure.suptitle(f"Slide encoder on the CPU, {threads} threads", fontsize=12)
    for axes, (measured, planned, title, unit, scale) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for provider, colour in zip(PROVIDERS, COLOURS, strict=True):
            for metric, style in ((measured, "o-"), (planned, "x--")):
                if points := _points(rows, provider, metric):
                    label = f"{provider}, planned" if metric == planned else provider
                    x, y = zip(*points, strict=True)
                    axes.plot(x, [v / scale for v in y], style, color=colour, label=label, linewidth=1.2, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="tiles", ylabel=unit, title=title)
        axes.set_xticks(list(TILES.values()), [f"{n:,}" for n in TILES.values()])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _points(rows: Sequence[Row], provider: str, metric: str) -> list[tuple[int, float]]:
    found = [(TILES[r.case], r.p50) for r in rows if (r.provider, r.metric) == (provider, metric) and r.case in TILES]
    return sorted((n, y) for n, y in found if y is not None)
