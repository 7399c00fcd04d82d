"""What two files say of themselves: where their records disagree, which may tell why the numbers do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from wsi_rt.runtime.features.diff.side import Side

SHOWN = 100  # characters of a value
# Said elsewhere in the report, or of no bearing on the numbers.
LEFT_OUT = {"order", "cells"}


def compare_records(a: Side, b: Side) -> tuple[dict[str, Any], ...]:
    """Entries {what, a, b} that both files have and that differ, and the maker."""
    ours, theirs = (dict(_flat(side)) for side in (a, b))
    both = [k for k in ours if k in theirs and ours[k] != theirs[k]]
    return tuple({"what": k, "a": ours[k], "b": theirs[k]} for k in both)


def _flat(side: Side) -> Iterator[tuple[str, Any]]:
    made_by = side.provenance
    yield "maker", made_by.maker
    yield from _entries("", made_by.settings)
    grid = side.facts.get("grid")
    if isinstance(grid, Mapping) and isinstance(grid.get("settings"), Mapping):
        yield from _entries("grid ", grid["settings"])


def _entries(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if name in LEFT_OUT:
            continue
        name = "weights" if name == "source_digest" else name
        plain = value if isinstance(value, (int, float, bool)) else ascii(value)[:SHOWN].strip("'")
        yield prefix + ascii(name)[1:-1][:40], plain
