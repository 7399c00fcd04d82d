"""The numbers of paired rows: how far apart, and which known reason makes them so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.features.diff.report import Finding
from wsi_rt.runtime.features.diff.side import Side
from wsi_rt.runtime.features.rounding import HALF_MEDIAN, HALF_WORST, ROUNDING, rounded
from wsi_rt.runtime.features.stamp import maker_digest
from wsi_rt.runtime.parity import GATES, row_cosines, short

Rows = NDArray[np.int64]
_BLOCK = 4096  # rows looked at together, as float64
WORST = 10
SAMPLE = 64  # rows of A that are looked for among all of B
FP32 = GATES["fp32"].max_rel  # what another order of summation changes
SAME = 1 - 1e-4  # a cosine from here on is the same direction
# Correlation of the columns' means over many rows. Seen on real tiles with synthetic encoders: other weights 0.08 at
# most, other pixels 0.87 at least.
UNLIKE, ALIKE = 0.4, 0.8


@dataclass(frozen=True)
class Distances:
    """Of M paired rows: cosine; error: relative L2; same: bit for bit; max_abs of all; ratio: |B| / |A|."""

    cosine: NDArray[np.float64]
    error: NDArray[np.float64]
    same: NDArray[np.bool_]
    ratio: NDArray[np.float64]
    max_abs: float

    def told(self) -> dict[str, Any]:
        return {
            "pairs": len(self.cosine),
            "same": int(self.same.sum()),
            "max_abs": short(self.max_abs),
            "cosine": {"min": short(float(self.cosine.min())), "median": short(float(np.median(self.cosine)))},
            "error": {"median": short(float(np.median(self.error))), "max": short(float(self.error.max()))},
        }


def distances(a: NDArray[np.float32], b: NDArray[np.float32], rows_a: Rows, rows_b: Rows) -> Distances:
    """Both [N, C] of one width, finite in the rows given."""
    parts: list[tuple[NDArray[Any], ...]] = []
    max_abs = 0.0
    for i in range(0, len(rows_a), _BLOCK):
        x, y = a[rows_a[i : i + _BLOCK]], b[rows_b[i : i + _BLOCK]]
        same = (x == y).all(axis=1)
        p, q = x.astype(np.float64), y.astype(np.float64)
        norm_a, norm_b = (np.maximum(np.linalg.norm(v, axis=1), 1e-30) for v in (p, q))
        error = np.linalg.norm(p - q, axis=1) / norm_a
        parts.append((row_cosines(p, q), error, same, norm_b / norm_a))
        max_abs = max(max_abs, float(np.abs(p - q).max(initial=0.0)))
    cosine, error, same, ratio = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Distances(cosine, error, same, ratio, max_abs)


def finite_rows(x: NDArray[np.float32]) -> NDArray[np.bool_]:
    blocks = range(0, len(x), _BLOCK)
    return np.concatenate([np.isfinite(x[i : i + _BLOCK]).all(axis=1) for i in blocks])


def explain(a: Side, b: Side, rows_a: Rows, rows_b: Rows, tolerance: float) -> tuple[list[Finding], Distances | None]:
    """Why paired rows differ, most telling first; none when every row is within `tolerance` (relative L2 error)."""
    if a.x is None or b.x is None or not len(rows_a):
        return [], None
    findings = list(_not_finite(a, b))
    good = finite_rows(a.x)[rows_a] & finite_rows(b.x)[rows_b]
    rows_a, rows_b = rows_a[good], rows_b[good]
    x, y, widths = a.x, b.x, (a.x.shape[1], b.x.shape[1])
    if widths[0] != widths[1]:
        common = min(widths)
        wider, name = (x, "A") if widths[0] > common else (y, "B")
        padded = not wider[:, common:].any()
        findings.append(_widths(widths, padded, name))
        if not padded:
            return findings, None
        x, y = x[:, :common], y[:, :common]
    if not len(rows_a):
        return findings, None
    far = distances(x, y, rows_a, rows_b)
    if far.error.max() > tolerance or (tolerance == 0 and not far.same.all()):
        findings += _reasons(x, y, rows_a, rows_b, far, _one_maker(a, b))
    return findings, far


def _not_finite(a: Side, b: Side) -> Iterator[Finding]:
    for name, side in (("A", a), ("B", b)):
        bad = np.flatnonzero(~finite_rows(side.x)) if side.x is not None else np.empty(0, np.int64)
        if len(bad):
            first = int(bad[0])
            at = f" at {tuple(side.xy0[first].tolist())}" if side.xy0 is not None else ""
            says = f"{len(bad)} of {side.rows} rows of {name} hold values that are not finite, first row {first}{at}"
            yield Finding("not_finite", says, {"side": name.lower(), "rows": len(bad), "first": first})


def _widths(widths: tuple[int, int], padded: bool, wider: str) -> Finding:
    figures = {"width": list(widths)}
    if padded:
        return Finding(
            "width",
            f"{wider} has {max(widths)} numbers a row, the last {abs(np.subtract(*widths))} zeros: padding",
            figures,
        )
    return Finding("encoder", f"A has {widths[0]} numbers a row, B {widths[1]}: another encoder", figures)


def _one_maker(a: Side, b: Side) -> bool | None:
    """Whether both were made by one encoder, by what they say; None where one does not."""
    if a.provenance.maker != b.provenance.maker:
        return None
    weights = [maker_digest(side.provenance, side.provenance.maker) for side in (a, b)]
    external = a.provenance.maker not in ("tile_encoder", "slide_encoder")  # their digest is that of the file
    return None if external or not all(weights) else weights[0] == weights[1]


def _reasons(
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    rows_a: Rows,
    rows_b: Rows,
    far: Distances,
    one_maker: bool | None,
) -> list[Finding]:
    """The first that holds of: rounded by storage, in fp32, in half precision, a few tiles, scaled, permuted,
    another encoder or other pixels."""
    figures = far.told()
    stored = _stored(x, y, rows_a, rows_b)
    if stored is not None:
        which, storage = stored
        other = "B" if which == "A" else "A"
        return [Finding("precision", f"{which} is {other} rounded to {storage} by storage", {**figures, "is": storage})]
    typical, worst = float(np.median(far.error)), float(far.error.max())
    if worst <= FP32:
        return [Finding("precision", f"within fp32 arithmetic (relative error up to {worst:.1e})", figures)]
    outliers = (far.error > HALF_WORST) & (far.error > 10 * typical)
    if typical <= HALF_MEDIAN and (worst <= HALF_WORST or outliers.any()):
        return list(_close(far, outliers, figures))
    scaled = _scaled(far, figures)
    if scaled is not None:
        return [scaled]
    permuted = _permuted(x, y, rows_a, rows_b)
    if permuted is not None:
        return [Finding("order", permuted, figures)]
    return [_apart(x[rows_a], y[rows_b], figures, one_maker)]


def _stored(x: NDArray[np.float32], y: NDArray[np.float32], rows_a: Rows, rows_b: Rows) -> tuple[str, str] | None:
    for storage in ("fp16", "bf16"):
        for name, (fine, rows), (coarse, others) in (("B", (x, rows_a), (y, rows_b)), ("A", (y, rows_b), (x, rows_a))):
            blocks = range(0, len(rows), _BLOCK)
            if all(
                np.array_equal(rounded(fine[rows[i : i + _BLOCK]], storage), coarse[others[i : i + _BLOCK]])
                for i in blocks
            ):
                return name, storage
    return None


def _close(far: Distances, outliers: NDArray[np.bool_], figures: dict[str, Any]) -> Iterator[Finding]:
    """Near as a whole: the typical row by its size of error, then the rows that stand out."""
    rest = far.error[~outliers]
    if rest.max(initial=0.0) > FP32:
        typical = float(np.median(rest))
        unit = min(
            (k for k in ROUNDING if ROUNDING[k] > 0), key=lambda k: abs(np.log(ROUNDING[k] / max(typical, 1e-9)))
        )
        says = (
            f"as close as reduced precision comes (relative error {typical:.1e} median, {rest.max():.1e} worst): "
            f"one was computed in {unit}, int8 or the like, or by other kernels"
        )
        yield Finding("precision", says, figures)
    if outliers.any():
        count = int(outliers.sum())
        says = (
            f"{count} of {len(outliers)} rows stand out (relative error from {far.error[outliers].min():.1e}), the "
            "others agree: those tiles were read or encoded otherwise"
        )
        yield Finding("values", says, {**figures, "outliers": count})


def _scaled(far: Distances, figures: dict[str, Any]) -> Finding | None:
    if far.cosine.min() < SAME:
        return None
    spread = float(far.ratio.max() / far.ratio.min() - 1)
    ratio = float(np.median(far.ratio))
    how = f"{ratio:.6g} times A's" if spread < 1e-3 else "A's with each row scaled on its own, as by an L2 norm"
    return Finding(
        "values", f"B's numbers are {how}", {**figures, "ratio": short(ratio), "ratio_spread": short(spread)}
    )


def _permuted(x: NDArray[np.float32], y: NDArray[np.float32], rows_a: Rows, rows_b: Rows) -> str | None:
    """A's numbers stand in B, but beside other coordinates."""
    picked = np.linspace(0, len(rows_a) - 1, min(SAMPLE, len(rows_a))).astype(np.int64)
    probe = _unit(x[rows_a[picked]])
    best, at = np.full(len(picked), -2.0), np.zeros(len(picked), np.int64)
    for i in range(0, len(rows_b), _BLOCK):
        cosine = probe @ _unit(y[rows_b[i : i + _BLOCK]]).T
        column = cosine.argmax(axis=1)
        value = cosine[np.arange(len(picked)), column]
        better = value > best
        best[better], at[better] = value[better], i + column[better]
    elsewhere = (best >= SAME) & (at != picked)
    if (best >= SAME).mean() < 0.9 or not elsewhere.any():
        return None
    first = int(np.flatnonzero(elsewhere)[0])
    row_a, row_b = int(rows_a[picked[first]]), int(rows_b[at[first]])
    return (
        f"B holds A's numbers beside other tiles ({int(elsewhere.sum())} of {len(picked)} rows looked at): features "
        f"and coordinates come in two orders; what A has in row {row_a} B has in row {row_b}"
    )


def _unit(x: NDArray[np.float32]) -> NDArray[np.float64]:
    x64 = x.astype(np.float64)
    return x64 / np.maximum(np.linalg.norm(x64, axis=1, keepdims=True), 1e-30)


def _apart(x: NDArray[np.float32], y: NDArray[np.float32], figures: dict[str, Any], one_maker: bool | None) -> Finding:
    """Far apart. What files say of their encoder comes first; else it is told by its columns' means over many tiles,
    which hardly depend on the pixels."""
    alike = _correlation(x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64))
    figures = {**figures, "column_mean_correlation": short(alike), "one_encoder": one_maker}
    told = f"median cosine {figures['cosine']['median']:.4f}, columns' means correlate by {alike:.2f}"
    if one_maker is False:
        return Finding("encoder", f"made by encoders of different weights, as they say ({told})", figures)
    if one_maker is None and alike < UNLIKE:
        return Finding("encoder", f"the numbers are unrelated ({told}): another encoder or other weights", figures)
    pixels = "other pixels (mpp, crop, slide, preprocessing) or another order"
    if one_maker or alike >= ALIKE:
        why = "they say so" if one_maker else "by their statistics"
        return Finding("values", f"one encoder ({why}), {pixels}: {told}", figures)
    return Finding("values", f"another encoder, or {pixels}: {told}, which does not tell", figures)


def _correlation(p: NDArray[Any], q: NDArray[Any]) -> float:
    p, q = p - p.mean(), q - q.mean()
    return float((p * q).sum() / max(float(np.sqrt((p * p).sum() * (q * q).sum())), 1e-30))


def worst_rows(a: Side, far: Distances, rows_a: Rows, rows_b: Rows, count: int = WORST) -> Sequence[dict[str, Any]]:
    """The differing pairs of lowest cosine: rows, coordinates, cosine, relative error."""
    order = np.argsort(far.cosine, kind="stable")
    new = np.concatenate(([True], np.diff(far.cosine[order]) != 0))  # few tiles fill many tokens with the same row
    return [
        {
            "row_a": int(rows_a[i]),
            "row_b": int(rows_b[i]),
            "xy0": None if a.xy0 is None else a.xy0[rows_a[i]].tolist(),
            "cosine": float(far.cosine[i]),
            "error": float(far.error[i]),
        }
        for i in order[new][:count]
        if not far.same[i]
    ]
