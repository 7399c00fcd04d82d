"""Which tiles of two files are the same, and what keeps the others apart: mpp, crop, offset, axes, scale, order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.features.compat import TOLERANCE
from wsi_rt.runtime.features.diff.report import Finding
from wsi_rt.runtime.features.diff.side import Side
from wsi_rt.runtime.features.order import SAYS, order_of

Coordinates = NDArray[np.int64]  # [N, 2] level-0 px
SHOWN = 5
FEW = 0.5  # with fewer tiles in common than this share of the smaller file, another grid is looked for
VOTERS, DISTANCES = 64, 1 << 22  # tiles of B whose distances to all of A are counted to find an offset; at most
SCALES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Pairs:
    """rows_a, rows_b: [M] int64, the same tile in both, in row-major order of A; findings of the grids."""

    rows_a: NDArray[np.int64]
    rows_b: NDArray[np.int64]
    findings: tuple[Finding, ...]


def pair_tiles(a: Side, b: Side) -> Pairs:
    """Pair the tiles of two files by their coordinates; two in one place pair in their order."""
    if a.xy0 is None or b.xy0 is None:
        raise ValueError("pair_tiles() needs coordinates")
    findings = list(_mpp(a, b))
    if _other_size(a, b):  # whatever lies in the same place shows other tissue
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), tuple(findings))
    rows_a, rows_b = match(a.xy0, b.xy0)
    if len(rows_a) < FEW * min(a.rows, b.rows):
        moved = _other_grid(a.xy0, b.xy0, len(rows_a))
        if moved is not None:
            finding, rows_a, rows_b = moved
            findings.append(finding)
    findings += _left_over(a, b, rows_a, rows_b)
    findings += _order(a.xy0, b.xy0, rows_a, rows_b)
    return Pairs(rows_a, rows_b, tuple(findings))


def match(a: Coordinates, b: Coordinates) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of `a` and of `b` that are one tile, row-major; the k-th of several in one place with the k-th."""
    places = np.concatenate([xy0[:, 1] << 32 | xy0[:, 0] & 0xFFFFFFFF for xy0 in (a, b)])
    ids = np.unique(places, return_inverse=True)[1].reshape(-1)
    counts = [_occurrence(part) for part in (ids[: len(a)], ids[len(a) :])]
    most = 1 + max(int(c.max(initial=0)) for c in counts)
    codes = ids * most + np.concatenate(counts)
    _, rows_a, rows_b = np.intersect1d(codes[: len(a)], codes[len(a) :], assume_unique=True, return_indices=True)
    return rows_a.astype(np.int64), rows_b.astype(np.int64)


def _occurrence(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] -> [N]: how many equal ids stand before each."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    out = np.empty(len(ids), np.int64)
    out[order] = np.arange(len(ids)) - np.searchsorted(ordered, ordered, side="left")
    return out


def _other_size(a: Side, b: Side) -> bool:
    return bool(a.size0 and b.size0 and abs(a.size0 / b.size0 - 1) > TOLERANCE)


def _mpp(a: Side, b: Side) -> Iterator[Finding]:
    figures = {"patch_size_level0": [a.size0, b.size0], "mpp": [a.mpp, b.mpp], "tiles": [a.rows, b.rows]}
    ratio = a.mpp / b.mpp if a.mpp and b.mpp else None
    alike = ratio is not None and 1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE
    if a.size0 and b.size0 and a.size0 != b.size0:
        why = f"another mpp, A's {a.size0 / b.size0:.4g} times B's if they are of one slide"
        if not _other_size(a, b):
            why = "the same mpp within 5 %, rounded otherwise"
        elif alike:
            why = "both say they have the same mpp, so they take the slide's own mpp to differ, or are of two slides"
        yield Finding("mpp", f"a tile of A is {a.size0} level-0 px wide, of B {b.size0}: {why}", figures)
    elif ratio is not None and not alike:
        yield Finding("mpp", f"A's tiles have {a.mpp:.4g} um/px, B's {b.mpp:.4g}: another mpp", figures)


Found = tuple[Finding, NDArray[np.int64], NDArray[np.int64]]


def _other_grid(a: Coordinates, b: Coordinates, common: int) -> Found | None:
    """The one known reason that lets most tiles pair: axes, level px for level-0 px, an offset."""
    candidates = [(Finding("axes", "the coordinates of one file are (y, x) instead of (x, y)"), b[:, ::-1])]
    for scale in SCALES:
        candidates.append((_scaled("B", scale), b * scale))
        if (b % scale == 0).all():
            candidates.append((_scaled("A", scale), b // scale))
    offset = _offset(a, b)
    if offset is not None:
        candidates.append((_shifted(offset), b + offset))
    best: Found | None = None
    most = max(common, int(np.ceil(FEW * min(len(a), len(b)))) - 1)
    for finding, moved in candidates:
        if moved.min() < 0:
            continue
        rows_a, rows_b = match(a, np.ascontiguousarray(moved))
        if len(rows_a) > most:
            most, best = len(rows_a), (finding, rows_a, rows_b)
    return best


def _scaled(which: str, scale: int) -> Finding:
    return Finding("scale", f"{which}'s coordinates are px of a level {scale} times smaller", {"scale": scale})


def _shifted(offset: NDArray[np.int64]) -> Finding:
    x, y = offset.tolist()
    says = f"the tiles of A lie ({x:+d}, {y:+d}) level-0 px from those of B: another origin, as of a crop or a margin"
    return Finding("offset", says, {"offset": [x, y]})


def _offset(a: Coordinates, b: Coordinates) -> NDArray[np.int64] | None:
    """The commonest distance from tiles of B to tiles of A; None when it is zero."""
    count = min(VOTERS, len(b), max(4, DISTANCES // len(a)))
    voters = b[np.linspace(0, len(b) - 1, count).astype(np.int64)]
    distances = (a[None] - voters[:, None]).reshape(-1, 2)
    found, counts = np.unique(distances, axis=0, return_counts=True)
    best = found[counts == counts.max()]
    best = best[np.abs(best).sum(axis=1).argmin()]  # of several as common ones, the smallest
    return best if best.any() else None


def _left_over(a: Side, b: Side, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]) -> Iterator[Finding]:
    """Tiles of one file alone: a crop where the others all lie outside of a box, else missing here and there."""
    only = {"a": _others(a, rows_a), "b": _others(b, rows_b)}
    figures: dict[str, Any] = {"a": a.rows, "b": b.rows, "common": len(rows_a)}
    figures |= {f"only_{k}": len(v) for k, v in only.items()}
    figures |= {f"first_only_{k}": v[:SHOWN].tolist() for k, v in only.items()}
    if not len(only["a"]) and not len(only["b"]):
        return
    shared_a = a.xy0[rows_a] if a.xy0 is not None else only["a"]
    for whole, part, missing, spare in (("A", "B", only["a"], only["b"]), ("B", "A", only["b"], only["a"])):
        box = _box(shared_a)
        if len(rows_a) and not len(spare) and box is not None and not _inside(missing, box).any():
            low, high = box
            says = (
                f"{part} is a crop of {whole}: all its {len(rows_a)} tiles are in {whole}, whose other {len(missing)} "
                f"lie outside of x {low[0]}..{high[0]}, y {low[1]}..{high[1]}"
            )
            yield Finding("crop", says, {**figures, "box": [*low, *high]})
            return
    parts = [f"{len(v)} in {k.upper()} alone, first ({v[0][0]}, {v[0][1]})" for k, v in only.items() if len(v)]
    says = f"{len(rows_a)} tiles in common, {', '.join(parts)}: another tissue mask, crop or slide"
    yield Finding("tiles", says, figures)


def _others(side: Side, rows: NDArray[np.int64]) -> Coordinates:
    left = np.ones(side.rows, bool)
    left[rows] = False
    return side.xy0[left] if side.xy0 is not None else np.empty((0, 2), np.int64)


def _box(xy0: Coordinates) -> tuple[list[int], list[int]] | None:
    return (xy0.min(axis=0).tolist(), xy0.max(axis=0).tolist()) if len(xy0) else None


def _inside(xy0: Coordinates, box: tuple[list[int], list[int]]) -> NDArray[np.bool_]:
    low, high = np.array(box[0]), np.array(box[1])
    return np.asarray(((xy0 >= low) & (xy0 <= high)).all(axis=1))


def _order(a: Coordinates, b: Coordinates, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]) -> Iterator[Finding]:
    """Where the tiles they share come in another order."""
    by_a = np.argsort(rows_a, kind="stable")  # pairs in A's order; in the same order, B's rows then rise
    if (np.diff(rows_b[by_a]) > 0).all():
        return
    rank_b = np.empty(len(rows_b), np.int64)
    rank_b[np.argsort(rows_b, kind="stable")] = np.arange(len(rows_b))
    moved = int((rank_b[by_a] != np.arange(len(rows_b))).sum())
    names = [order_of(xy0) for xy0 in (a, b)]
    said = [SAYS[n] if n else "no known order" for n in names]
    says = f"{moved} of {len(rows_a)} shared tiles have another place: A is in {said[0]}, B in {said[1]}"
    yield Finding("order", says, {"moved": moved, "order": names})
