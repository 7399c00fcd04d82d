"""The instances that make one slide: the levels of its pyramid and its associated images.

Archives keep a slide as a series: one folder of instances, each a level (VOLUME), or the LABEL, OVERVIEW (macro) or
THUMBNAIL image. A level may be split into several instances (a concatenation, DICOM PS3.3 C.7.6.16.2.2.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.readers.dicom_instance import Instance, find_series, read_instance

LEVEL = "VOLUME"
_HEAD_BYTES = 1 << 16  # holds the UIDs of any instance
_MAX_PLACES = 1 << 24  # a slide of 1,000,000 x 1,000,000 px in frames of 256 px has 15 million
ASSOCIATED = {"LABEL": "label", "OVERVIEW": "macro", "THUMBNAIL": "thumbnail"}  # the names OpenSlide gives them


@dataclass(frozen=True)
class DicomLevel:
    """One level: its parts in the order of their frames; more than one where it is a concatenation.

    places: for TILED_SPARSE, row * columns + column -> (part, frame in it); None where frames fill the grid row by row.
    """

    parts: tuple[Instance, ...]
    places: dict[int, tuple[int, int]] | None

    def find(self, col: int, row: int) -> tuple[int, int] | None:
        """(part, frame in it) at a place of the grid; None where there is none."""
        place = row * self.parts[0].grid[0] + col
        if self.places is not None:
            return self.places.get(place)
        part = len(self.parts) - 1
        while self.parts[part].first_frame > place:
            part -= 1
        return part, place - self.parts[part].first_frame


@dataclass(frozen=True)
class Series:
    """levels: finest first.  associated: label, macro, thumbnail.  files: of all of them.  notes: for the user."""

    levels: tuple[DicomLevel, ...]
    associated: dict[str, Instance]
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def read_series(path: Path) -> Series | None:
    """The slide that an instance belongs to, or that a folder holds; None where there is no whole-slide DICOM.

    Raises SlideError: an instance that is no level of the pyramid, a folder of several slides, levels that contradict
    each other, lack frames or cannot be decoded, a malformed header.
    """
    if path.is_dir():
        by_series, malformed = _scan(_files(path))
        if malformed:  # it may be the finest level: the folder is the slide, so nothing of it is left out
            raise next(iter(malformed.values()))
        return _assemble(_only(path, by_series), []) if by_series else None
    series = find_series(path)
    if series is None:
        return None
    named = read_instance(path)
    by_series, malformed = _scan(other for other in _files(path.parent) if other.name != path.name)
    for other, error in malformed.items():
        if _names(other, series):
            raise error
    siblings = [read_instance(other) for other in by_series.get(series, [])]
    _refuse_by_name(named, siblings)
    return _assemble([named, *siblings], list(malformed))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise SlideError(f"{folder}: cannot be listed ({error.strerror}), expected a readable folder") from error


def _scan(paths: Iterable[Path]) -> tuple[dict[str, list[Path]], dict[Path, SlideError]]:
    """Whole-slide instances by their series, and those whose header cannot be parsed as far as that, with why."""
    by_series: dict[str, list[Path]] = {}
    malformed = {}
    for path in paths:
        try:
            series = find_series(path)
        except SlideError as error:
            malformed[path] = error
            continue
        if series is not None:
            by_series.setdefault(series, []).append(path)
    return by_series, malformed


def _names(path: Path, series: str) -> bool:
    """Whether a file that cannot be parsed names a series in its beginning."""
    try:
        with path.open("rb") as file:
            return series.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def _only(folder: Path, by_series: dict[str, list[Path]]) -> list[Instance]:
    """The instances of the one series with levels. Series of labels alone do not count."""
    slides = [instances for paths in by_series.values() if _has_level(instances := [read_instance(p) for p in paths])]
    if not slides:
        raise SlideError(
            f"{folder}: holds no image of the slide itself, only its label or overview; expected VOLUME instances"
        )
    if len(slides) > 1:
        told = "; ".join(_describe(instances) for instances in slides[:8])
        more = f"; and {len(slides) - 8} more" if len(slides) > 8 else ""
        raise SlideError(
            f"{folder}: holds {len(slides)} slides (DICOM series), expected one; give a file of it: {told}{more}"
        )
    return slides[0]


def _has_level(instances: Sequence[Instance]) -> bool:
    return any(instance.kind == LEVEL for instance in instances)


def _describe(instances: Sequence[Instance]) -> str:
    finest = max((i for i in instances if i.kind == LEVEL), key=lambda i: i.size)
    return f"{finest.path.name} ({finest.size[0]} x {finest.size[1]} px, {len(instances)} instances)"


def _refuse_by_name(named: Instance, siblings: Sequence[Instance]) -> None:
    if named.kind == LEVEL:
        return
    levels = [instance for instance in siblings if instance.kind == LEVEL]
    way_out = f"give {max(levels, key=lambda i: i.size).path.name}" if levels else "give a VOLUME instance"
    what = ASSOCIATED.get(named.kind)
    told = f"the {what} image of the slide" if what else f"of the kind {named.kind or '(none)'}"
    raise SlideError(f"{named.path}: is {told}, not the slide itself; {way_out} or the folder")


def _assemble(instances: Sequence[Instance], left_out: Sequence[Path]) -> Series:
    notes = []
    if left_out:
        names = ", ".join(file.name for file in left_out[:3])
        notes.append(f"{len(left_out)} DICOM files of the folder are malformed and were left out: {names}")
    groups: dict[tuple[int, int], list[Instance]] = {}
    associated: dict[str, Instance] = {}
    ignored = []
    for instance in instances:
        if instance.kind == LEVEL:
            groups.setdefault(instance.size, []).append(instance)
        elif instance.kind in ASSOCIATED and not instance.unsupported:
            associated.setdefault(ASSOCIATED[instance.kind], instance)
        elif instance.kind not in ASSOCIATED:
            ignored.append(instance)
    if ignored:
        kinds = ", ".join(sorted({instance.kind or "(none)" for instance in ignored}))
        notes.append(f"{len(ignored)} instances of other kinds are not used: {kinds}")
    levels = tuple(_level(groups[size]) for size in sorted(groups, reverse=True))
    files = tuple(part.path for level in levels for part in level.parts) + tuple(i.path for i in associated.values())
    return Series(levels, associated, files, (*notes, *_contradictions(levels)))


def _level(found: Sequence[Instance]) -> DicomLevel:
    first = found[0]
    for other in found:
        if other.unsupported:
            raise SlideError(f"{other.path}: cannot be read: {other.unsupported}")
        if other.uid != first.uid:
            raise SlideError(
                f"{first.path}: {other.path.name} of the same series is another image of {first.size[0]} x "
                f"{first.size[1]} px (several focal planes or optical paths?), expected one image per level"
            )
        same = (other.tile, other.codec, other.photometric, other.positions is None)
        if same != (first.tile, first.codec, first.photometric, first.positions is None):
            raise SlideError(f"{other.path}: is tiled or encoded unlike {first.path.name}, of which it is a part")
    # a part that is there twice is a copy of the same instance
    parts = tuple(sorted({i.first_frame: i for i in reversed(found)}.values(), key=lambda i: i.first_frame))
    if len(parts) < first.parts:
        raise SlideError(
            f"{first.path}: its level of {first.size[0]} x {first.size[1]} px is split into {first.parts} files, "
            f"of which {len(parts)} are there; download the others too"
        )
    if first.positions is not None:
        return DicomLevel(parts, _places(parts))
    expected = 0
    for part in parts:
        if part.first_frame != expected:
            break
        expected += part.frames
    cols, rows = first.grid
    if expected != cols * rows or parts[-1].first_frame + parts[-1].frames != expected:
        raise SlideError(
            f"{first.path}: its level of {first.size[0]} x {first.size[1]} px has {expected} frames in a row, expected "
            f"{cols * rows} ({cols} x {rows}): a part is missing, or it holds several focal planes"
        )
    return DicomLevel(parts, None)


def _places(parts: Sequence[Instance]) -> dict[int, tuple[int, int]]:
    """Where each frame of a TILED_SPARSE level lies; frames have to lie on one grid, one to a place."""
    (width, height), (cols, rows) = parts[0].tile, parts[0].grid
    if cols * rows > _MAX_PLACES:
        raise SlideError(
            f"{parts[0].path}: its level has {cols} x {rows} places for frames, expected {_MAX_PLACES} or less"
        )
    places: dict[int, tuple[int, int]] = {}
    for number, part in enumerate(parts):
        positions = np.empty((0, 2), np.int64) if part.positions is None else part.positions
        cells, offsets = np.divmod(positions, (width, height))  # [frames, 2]: (column, row)
        if offsets.any() or (cells < 0).any() or (cells >= (cols, rows)).any():
            raise SlideError(
                f"{part.path}: its frames do not lie on a grid of {width} x {height} px, expected frames side by side"
            )
        for frame, place in enumerate((cells[:, 1] * cols + cells[:, 0]).tolist()):
            if place in places:
                raise SlideError(
                    f"{part.path}: several frames lie at column {place % cols}, row {place // cols} (several focal "
                    "planes or optical paths?), expected one"
                )
            places[place] = (number, frame)
    return places


def _contradictions(levels: Sequence[DicomLevel]) -> list[str]:
    """Notes on levels whose stated resolution disagrees with their size by more than 5 %."""
    notes = []
    finest = levels[0].parts[0]
    for number, level in enumerate(levels[1:], 1):
        part = level.parts[0]
        stated, stated0 = part.declared_mpp.x, finest.declared_mpp.x
        by_size = finest.size[0] / part.size[0]
        if stated and stated0 and stated0 > 0 and abs(stated / stated0 / by_size - 1) > 0.05:
            notes.append(
                f"level {number} states {stated:.4g} um/px, its size says {stated0 * by_size:.4g}; its size is used"
            )
    return notes
