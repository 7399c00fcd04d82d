"""Regions of interest: QuPath's forms, tissue inside them, and files that are none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import InputError, SlideError
from wsi_rt.runtime.slides import (
    SlideReader,
    find_tissue,
    plan_reads,
    read_regions,
    regions,
    select_tiles,
    selection_notes,
)

Make = Callable[..., SlideReader]
Write = Callable[[Any], Path]


def box(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def feature(*rings: list, name: str | None = None, kind: str | None = "annotation", **more: Any) -> dict[str, Any]:
    """As QuPath 0.5 writes it."""
    properties: dict[str, Any] = {"objectType": kind} if kind else {}
    if name:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    geometry = {"type": "Polygon", "coordinates": list(rings)}
    return {"type": "Feature", "id": "e1", "geometry": geometry, "properties": {**properties, **more}}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(data: Any) -> Path:
        path = tmp_path / "roi.geojson"
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        return path

    return save


@pytest.fixture
def tissue(array_slide: Make) -> SlideReader:
    """2,048 x 1,024 px at 0.5 um/px, 8 x 4 tiles: glass, and tissue in all but the leftmost column of tiles."""
    pixels = np.full((1024, 2048, 3), 240, np.uint8)
    pixels[:, 256:] = (200, 100, 180)
    return array_slide(pixels)


def kept(reader: SlideReader, path: Path) -> list[tuple[int, int]]:
    grid = select_tiles(plan_reads(reader, SlideSettings()), find_tissue(reader), regions=read_regions(path))
    return [(int(x), int(y)) for x, y in grid.xy0 // 256]


INNER = feature(box(520, 260, 760, 500))  # within tile (2, 1)
FORMS = {
    "collection": {"type": "FeatureCollection", "features": [INNER]},
    "feature": INNER,
    "array": [INNER],
    "geometry": INNER["geometry"],
    "multipolygon": {"type": "MultiPolygon", "coordinates": [INNER["geometry"]["coordinates"]]},
    "geometry-collection": {"type": "GeometryCollection", "geometries": [INNER["geometry"]]},
    "not-closed": feature(box(520, 260, 760, 500)[:-1]),
    "with-z": feature([[*p, 0] for p in box(520, 260, 760, 500)]),
    "no-kind": feature(box(520, 260, 760, 500), kind=None),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_in_use(tissue: SlideReader, write: Write, form: str) -> None:
    path = write(FORMS[form])
    assert kept(tissue, path) == [(2, 1)]
    assert read_regions(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_byte_order_mark_is_taken(tissue: SlideReader, write: Write) -> None:
    assert kept(tissue, write(b"\xef\xbb\xbf" + json.dumps(INNER).encode())) == [(2, 1)]


def test_ten_percent_of_the_tiles_area(tissue: SlideReader, write: Write) -> None:
    """Tile (1, 0) is 65,536 px: 25 columns of it are 9.8 %, 26 are 10.2 %. No edge lies on the 16-px mask grid."""
    with pytest.raises(SlideError, match=r"no tissue: the fullest of 32 tiles is 9\.8% foreground inside the regions"):
        kept(tissue, write(feature(box(300, 0, 325, 256))))
    assert kept(tissue, write(feature(box(300, 0, 326, 256)))) == [(1, 0)]


def test_tissue_and_region(tissue: SlideReader, write: Write) -> None:
    """A region over glass and tissue: the column of glass stays out."""
    assert kept(tissue, write(feature(box(0, 0, 600, 256)))) == [(1, 0), (2, 0)]


def test_holes_and_ignored_regions_are_cut_out(tissue: SlideReader, write: Write) -> None:
    hole = feature(box(256, 0, 1280, 1024), box(512, 0, 1024, 1024))
    assert kept(tissue, write(hole)) == [(x, y) for y in range(4) for x in (1, 4)]
    ignored = [feature(box(512, 0, 1024, 1024), name="Ignore*"), feature(box(256, 0, 1280, 1024), name="Tumor")]
    assert kept(tissue, write(ignored)) == [(x, y) for y in range(4) for x in (1, 4)]


def test_overlapping_and_adjacent_regions_are_one_area(tissue: SlideReader, write: Write) -> None:
    """Two halves of 13 columns side by side make 26 (10.2 %); one drawn twice stays 13."""
    halves = [feature(box(300, 0, 313, 256)), feature(box(313, 0, 326, 256))]
    assert kept(tissue, write(halves)) == [(1, 0)]
    twice = [feature(box(304, 0, 320, 256)), feature(box(304, 0, 320, 256))]
    with pytest.raises(SlideError, match=r"6\.2%"):
        kept(tissue, write(twice))


def test_what_the_result_says(tissue: SlideReader, write: Write) -> None:
    path = write(
        [
            feature(box(512, 0, 1024, 1024), name="Tumor"),
            feature(box(600, 0, 700, 700), name="Tumor"),
            feature(box(0, 0, 9000, 700)),
            feature(box(0, 0, 10, 10), kind="detection"),
            {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {}},
        ]
    )
    grid = select_tiles(plan_reads(tissue, SlideSettings()), find_tissue(tissue), regions=read_regions(path))
    assert selection_notes(grid) == (
        "regions of interest: 3 (Tumor 2, unclassified 1)",
        "--roi: 1 objects of the kind detection are no regions: not used",
        "--roi: 1 objects of the kind Point are no regions: not used",
        "--roi: regions reach beyond the slide: check that they were drawn on it",
    )
    facts = grid.provenance.settings["roi"]
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(path.parent) not in json.dumps(facts)


def test_classes_of_several_names() -> None:
    assert regions._class_name({"classification": {"names": ["Tumor", "Positive"]}}) == "Tumor: Positive"
    for nothing in ({}, {"classification": None}, {"classification": {"name": 3}}, {"classification": {"names": 3}}):
        assert regions._class_name(nothing) == "unclassified"


def test_regions_beside_the_slide(tissue: SlideReader, write: Write) -> None:
    with pytest.raises(
        SlideError, match=r"no region lies on the slide: they span x 3000 to 4000 and y 0 to 50, .*2048"
    ):
        kept(tissue, write(feature(box(3000, 0, 4000, 50))))


BAD = {
    "no-json": (b"{", "is no JSON"),
    "binary": (b"\xff\xfe\x00", "is no JSON"),
    "deep": (b"[" * 200_000, "is no JSON"),
    "number": (7, "JSON but no GeoJSON"),
    "no-type": ({"a": 1}, "JSON but no GeoJSON"),
    "empty": ({"type": "FeatureCollection", "features": []}, r"holds no region \(nothing\)"),
    "features-missing": ({"type": "FeatureCollection"}, "JSON but no GeoJSON"),
    "points-only": ({"type": "Point", "coordinates": [1, 2]}, r"holds no region \(1 Point\)"),
    "cells-only": (feature(box(0, 0, 9, 9), kind="cell"), r"holds no region \(1 cell\)"),
    "ignored-only": (feature(box(0, 0, 9, 9), name="Ignore*"), "holds no region"),
    "no-outline": (feature(), "object 0 is a polygon without an outline"),
    "two-points": ([INNER, feature([[0, 0], [1, 1], [0, 0]])], "object 1 has a ring of 2 points"),
    "text": (feature([["a", "b"], [1, 2], [3, 4]]), "no list of"),
    "ragged": (feature([[1], [1, 2], [3, 4]]), "no list of"),
    "nan": (b'{"type": "Polygon", "coordinates": [[[NaN, 0], [1, 1], [2, 0]]]}', "no list of"),
    "huge": (feature([[0, 0], [1e300, 1], [2, 0]]), "no list of"),
    "no-list": (feature(5), "no list of"),
    "multi-number": ({"type": "MultiPolygon", "coordinates": 5}, "without a list of polygons"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_gives_one_clear_line(write: Write, case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        read_regions(write(data))
    assert "--roi" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_regions(tmp_path / "none.geojson")
    with pytest.raises(InputError, match="directory"):
        read_regions(tmp_path)


def test_a_file_beyond_the_limit(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="expected at most"):
        read_regions(write(FORMS["collection"]))
