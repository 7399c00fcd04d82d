"""Two files in, one report out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features.diff.records import compare_records
from wsi_rt.runtime.features.diff.report import Finding, Report
from wsi_rt.runtime.features.diff.side import Side, read_side
from wsi_rt.runtime.features.diff.tiles import pair_tiles
from wsi_rt.runtime.features.diff.values import explain, worst_rows
from wsi_rt.runtime.features.pooled import tile_count


def diff_files(a: Path, b: Path, tolerance: float = 0.0) -> Report:
    """Compare two feature files: `.h5` of tiles with each other, `.pt` of slide tokens with each other, and a `.pt` of
    bare features [N, C] with either kind of tile features, row by row in the files' order.

    tolerance: relative L2 error of a row up to which it counts as equal; 0 asks for every bit.
    Raises FeatureFileError: a file that cannot be read, slide tokens beside tile features.
    """
    sides = read_side(a), read_side(b)
    _require_alike(*sides)
    rows_a, rows_b, findings = _pair(*sides)
    records = compare_records(*sides)
    reasons, far = explain(*sides, rows_a, rows_b, tolerance)
    findings += reasons
    good = None if far is None or len(far.cosine) != len(rows_a) else far
    worst = worst_rows(sides[0], good, rows_a, rows_b) if good is not None and reasons else ()
    return Report(
        sides[0].told(),
        sides[1].told(),
        tuple(findings),
        tuple(worst),
        records,
        far.told() if far is not None else {},
    )


def _require_alike(a: Side, b: Side) -> None:
    kinds = {a.kind, b.kind}
    if kinds == {"tiles", "tokens"} and a.rows == b.rows:  # 576 tiles, and as many rows of a .pt
        return
    if "tokens" in kinds and len(kinds) > 1:
        names = {"tiles": "tile features", "tokens": "slide tokens", "rows": "tile features"}
        raise FeatureFileError(
            f"{a.path} holds {names[a.kind]}, {b.path} {names[b.kind]}: nothing to compare; expected two files of one "
            "kind (make tokens of tile features with `wsi-rt encode TILES.h5 --engines DIR --out tokens.pt`)"
        )


def _pair(a: Side, b: Side) -> tuple[np.ndarray, np.ndarray, list[Finding]]:
    if a.xy0 is not None and b.xy0 is not None:
        pairs = pair_tiles(a, b)
        return pairs.rows_a, pairs.rows_b, list(pairs.findings)
    rows, findings = np.arange(min(a.rows, b.rows)), []
    if a.rows != b.rows:
        says = f"A has {a.rows} rows, B {b.rows}, and without coordinates in both nothing tells which are the same"
        findings, rows = [Finding("tiles", says, {"a": a.rows, "b": b.rows})], rows[:0]
    if a.kind == b.kind == "tokens" and a.x is not None and b.x is not None:
        tiles = tile_count(a.x), tile_count(b.x)
        if tiles[0] != tiles[1]:
            told = [str(t) if t else "more than 288" for t in tiles]
            says = f"A was pooled from {told[0]} tiles, B from {told[1]}: another mpp, tissue or tile set"
            findings.append(Finding("tiles", says, {"tiles": list(tiles)}))
    return rows, rows, findings
