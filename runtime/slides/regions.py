"""Regions of interest from GeoJSON, as QuPath writes it, and how much of each mask px they cover."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import InputError, SlideError
from wsi_rt.runtime.slides.coverage import polygon_coverage
from wsi_rt.runtime.types import SlideRef

MAX_BYTES = 256 << 20  # json takes about ten times that in memory; a million vertices are 30 MB
MAX_XY0 = float(1 << 31)  # level-0 px; the largest slides are some 10^6 px wide
IGNORED_CLASS = "Ignore*"  # QuPath's own class for areas to leave out
UNCLASSIFIED = "unclassified"
MAX_CLASSES = 20  # named in the provenance, which a file attribute of 60 KB has to hold
# What QuPath calls its objects; a region is an annotation or says nothing of the kind.
_OTHER_KINDS = {"detection", "cell", "tile", "tma_core", "root", "pathdetectionobject", "pathcellobject"}
_EXPECTED = "expected GeoJSON polygons in level-0 px, as QuPath exports annotations (File > Export objects as GeoJSON)"

Polygon = tuple[NDArray[np.float64], ...]  # rings [K, 2] (x, y): the outline first, then holes


@dataclass(frozen=True)
class Region:
    """Polygons of one object, level-0 px (x, y), and the name of its class."""

    polygons: tuple[Polygon, ...]
    name: str

    @property
    def cut_out(self) -> bool:
        return self.name == IGNORED_CLASS


@dataclass(frozen=True)
class Regions:
    """The regions of one file.    digest: SHA-256 of its bytes.    ignored: kind -> count of objects that are none."""

    regions: tuple[Region, ...]
    path: Path
    digest: str
    ignored: dict[str, int]

    def coverage(self, shape: tuple[int, int], scale0: tuple[float, float], slide: SlideRef) -> NDArray[np.float32]:
        """f32 [h, w], 0..1: the share of each mask px inside the regions; `scale0`: level-0 px per mask px.

        Exact for a px that the outlines of one polygon cross; where several polygons share a px their shares are
        added, up to 1. Regions of the class "Ignore*" are taken off. Memory: 4 bytes per mask px, 12 more within a
        polygon's bounding box. Raises SlideError when no region touches the slide.
        """
        covered = np.zeros(shape, np.float32)
        for region in sorted(self.regions, key=lambda r: r.cut_out):
            for polygon in region.polygons:
                place, part = polygon_coverage([(ring + origin0(slide)) / scale0 for ring in polygon], shape)
                now = covered[place] - part if region.cut_out else covered[place] + part
                covered[place] = np.clip(now, 0, 1)
        if not covered.any():
            low, high = self.extent()
            raise SlideError(
                f"{self.path}: no region lies on the slide: they span x {low[0]:.0f} to {high[0]:.0f} and y "
                f"{low[1]:.0f} to {high[1]:.0f}, the slide is {slide.size0[0]} x {slide.size0[1]} level-0 px; "
                "check that they were drawn on this slide"
            )
        # The last column and row may reach past the slide; their share is that of the part on it.
        for axis, last in ((0, covered[:, -1]), (1, covered[-1])):
            on_slide = slide.size0[axis] / scale0[axis] - (shape[1 - axis] - 1)
            np.minimum(last / np.float32(on_slide), 1, out=last)
        return covered

    def extent(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(least, greatest) x, y over the regions that are not cut out, as in the file."""
        points = np.concatenate([p[0] for r in self.regions if not r.cut_out for p in r.polygons])
        return points.min(axis=0), points.max(axis=0)

    def facts(self, slide: SlideRef) -> dict[str, Any]:
        """What the grid's provenance says of the regions: never the path, which may name a patient."""
        classes = Counter(r.name for r in self.regions)
        notes = [f"--roi: {n} objects of the kind {kind} are no regions: not used" for kind, n in self.ignored.items()]
        low, high = (v + origin0(slide) for v in self.extent())
        if (low < -1).any() or (high > np.array(slide.size0) + 1).any():
            notes.append("--roi: regions reach beyond the slide: check that they were drawn on it")
        if origin0(slide).any():
            corner = ", ".join(f"{v:.0f}" for v in origin0(slide))
            notes.append(f"--roi: counted from the corner of the scanned area, level-0 px ({corner}), as QuPath does")
        return {
            "sha256": self.digest,
            "regions": len(self.regions),
            "classes": dict(classes.most_common(MAX_CLASSES)),
            "origin0": [int(v) for v in origin0(slide)],
            "notes": notes,
        }


def origin0(slide: SlideRef) -> NDArray[np.float64]:
    """(x, y) level-0 px that GeoJSON counts from: QuPath crops slides that declare their scanned bounds (MIRAX, SCN)
    to them (https://github.com/qupath/qupath/issues/820)."""
    return np.array(slide.bounds0[:2] if slide.bounds0 else (0, 0), np.float64)


def read_regions(path: str | Path) -> Regions:
    """Read GeoJSON: a FeatureCollection, a Feature, an array of them, or a bare geometry.

    Polygons and MultiPolygons with holes count; points, lines, detections, cells and tiles do not, and are counted in
    `ignored`. Raises InputError: no such file, no JSON, no polygon, a ring that is none.
    """
    path = Path(path)
    data = _read(path)
    try:
        root = json.loads(data.decode("utf-8-sig"))
        regions, ignored = _regions(root, path)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError; InputError passes
        raise InputError(f"--roi is {path}, which is no JSON ({_short(error)}); {_EXPECTED}") from error
    if not any(not region.cut_out for region in regions):
        had = ", ".join(f"{n} {kind}" for kind, n in ignored.items()) or "nothing"
        raise InputError(f"--roi is {path}, which holds no region ({had}); {_EXPECTED}")
    return Regions(tuple(regions), path, hashlib.sha256(data).hexdigest(), dict(ignored))


def _read(path: Path) -> bytes:
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise InputError(f"--roi is {path} of {path.stat().st_size >> 20} MiB, expected at most {MAX_BYTES >> 20}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"--roi is {path}, which cannot be read ({error.strerror}); {_EXPECTED}") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def _regions(root: Any, path: Path) -> tuple[list[Region], Counter[str]]:
    regions, ignored = [], Counter[str]()
    for index, feature in enumerate(_features(root, path)):
        properties = feature.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        kind = str(properties.get("objectType") or properties.get("object_type") or feature.get("id") or "").lower()
        if kind in _OTHER_KINDS:
            ignored[kind] += 1
            continue
        polygons, others = _polygons(feature.get("geometry"), f"{path}: object {index}")
        ignored.update(others)
        if polygons:
            regions.append(Region(tuple(polygons), _class_name(properties)))
    return regions, ignored


def _features(root: Any, path: Path) -> Iterator[dict[str, Any]]:
    """The features of any of the forms that are in use."""
    if isinstance(root, dict) and root.get("type") == "FeatureCollection":
        root = root.get("features")
    for item in root if isinstance(root, list) else [root]:
        if not isinstance(item, dict) or not isinstance(item.get("type"), str):
            raise InputError(f"--roi is {path}, which is JSON but no GeoJSON; {_EXPECTED}")
        yield item if item["type"] == "Feature" else {"geometry": item}


def _class_name(properties: dict[str, Any]) -> str:
    """QuPath's `classification`: {"name": "Tumor", ...}, or {"names": ["Tumor", "Positive"]}."""
    found = properties.get("classification")
    if isinstance(found, dict):
        names = found.get("names", [found.get("name")])
        found = ": ".join(n for n in names if isinstance(n, str)) if isinstance(names, list) else None
    return found[:60] if isinstance(found, str) and found else UNCLASSIFIED


def _polygons(geometry: Any, where: str) -> tuple[list[Polygon], Counter[str]]:
    """(polygons, other geometries counted by type)."""
    if not isinstance(geometry, dict):
        return [], Counter({"null": 1})
    kind, found = geometry.get("type"), geometry.get("coordinates")
    if kind == "Polygon":
        return [_polygon(found, where)], Counter()
    if kind == "MultiPolygon":
        if not isinstance(found, list):
            raise InputError(f"--roi: {where} is a MultiPolygon without a list of polygons; {_EXPECTED}")
        return [_polygon(p, where) for p in found], Counter()
    if kind == "GeometryCollection" and isinstance(geometry.get("geometries"), list):
        parts = [_polygons(part, where) for part in geometry["geometries"]]
        return [p for polygons, _ in parts for p in polygons], sum((c for _, c in parts), Counter[str]())
    return [], Counter({str(kind)[:40]: 1})


def _polygon(rings: Any, where: str) -> Polygon:
    if not isinstance(rings, list) or not rings:
        raise InputError(f"--roi: {where} is a polygon without an outline; {_EXPECTED}")
    return tuple(_ring(ring, where) for ring in rings)


def _ring(points: Any, where: str) -> NDArray[np.float64]:
    """[K, 2] f64, K >= 3, not closed."""
    try:
        ring = np.array([point[:2] for point in points], np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"--roi: {where} has a ring that is no list of (x, y) numbers; {_EXPECTED}") from error
    if ring.ndim != 2 or ring.shape[1] != 2 or not (np.abs(ring) <= MAX_XY0).all():  # NaN too
        raise InputError(f"--roi: {where} has a ring that is no list of (x, y) level-0 px; {_EXPECTED}")
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise InputError(f"--roi: {where} has a ring of {len(ring)} points, expected 3 or more; draw it again")
    return ring
