"""What a plain SVS or generic TIFF says of itself, as OpenSlide 4.0.1 states it: levels, resolution, other images.

OpenSlide's own word would cost a process (0.15 s), since it cannot be trusted with a damaged file in ours. So only what
leaves no doubt is taken here; NotDirectError hands any other slide over to OpenSlide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from wsi_rt.runtime.slides.reader import DeclaredMpp, Level
from wsi_rt.runtime.slides.readers.tiff_index import MAX_EDGE_PX, TiffImage, TiffLevel

VENDORS = ("aperio", "generic-tiff")  # the others' levels are more than one plain directory each
COMPRESSIONS = frozenset((1, 5, 7, 8, 32946, 33003, 33005))  # none, LZW, JPEG, deflate, JPEG 2000
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # inch, centimetre
_MPP_SOURCE = "openslide.mpp-x"
_NUMBER = re.compile(r"\d{1,12}(\.\d{1,12})?")
_THUMBNAIL = 1  # Aperio's second directory
_ASSOCIATED = {1: "label", 9: "macro"}
_REDUCED = 1  # bit of NewSubfileType


class NotDirectError(ValueError):
    """Why a slide is not read directly."""


@dataclass(frozen=True)
class TiffFacts:
    """stored: the directory behind each of `levels`. The rest as `SlideReader` has it."""

    levels: tuple[Level, ...]
    stored: tuple[TiffLevel, ...]
    declared_mpp: DeclaredMpp
    associated: Mapping[str, tuple[int, int]]
    icc: bool


def facts_of(images: Sequence[TiffImage], vendor: str) -> TiffFacts:
    """images: every directory in file order.  vendor: one of VENDORS. Raises NotDirectError."""
    if not images:
        raise NotDirectError("it has no directory")
    aperio = vendor == "aperio"
    directories = images if aperio else [images[0], *(v for v in images[1:] if v.tiled and v.subfile & _REDUCED)]
    for image in directories:
        if image.depth != 1 or image.compression not in COMPRESSIONS:
            raise NotDirectError(f"a directory has compression {image.compression}, depth {image.depth}")
    tiled = [image for image in directories if image.tiled]
    stored = [image.level for image in tiled if image.level is not None]
    if not stored or len(stored) < len(tiled):
        raise NotDirectError(f"{len(tiled) - len(stored)} of its {len(tiled)} levels are not 8-bit RGB")
    if not aperio:
        stored.sort(key=lambda level: -level.width)
    levels = tuple(_level(stored[0], level) for level in stored)
    if any(coarse.downsample <= fine.downsample for fine, coarse in pairwise(levels)):
        raise NotDirectError("its levels are not in order of their size")
    return TiffFacts(
        levels=levels,
        stored=tuple(stored),
        declared_mpp=_aperio_mpp(images[0].description or "") if aperio else _tagged_mpp(images[0]),
        associated=_associated(images) if aperio else {},
        icc=images[0].icc,
    )


def _level(finest: TiffLevel, level: TiffLevel) -> Level:
    down = (finest.height / level.height + finest.width / level.width) / 2  # OpenSlide's rule
    return Level(level.width, level.height, down)


def _aperio_mpp(description: str) -> DeclaredMpp:
    """From "...|AppMag = 20|MPP = 0.4990|..."; the last one counts."""
    mpp = None
    for field in description.split("|")[1:]:
        name, equals, value = field.partition("=")
        if not equals:
            raise NotDirectError("a field of its description has no value")
        if name.strip() == "MPP":
            if not _NUMBER.fullmatch(value.strip()):
                raise NotDirectError("its resolution is not a plain number")
            mpp = float(value)
    return DeclaredMpp(mpp, mpp, _MPP_SOURCE)


def _tagged_mpp(image: TiffImage) -> DeclaredMpp:
    if image.unit not in (1, *_UM_PER_UNIT):
        raise NotDirectError(f"its unit of resolution is {image.unit}")
    um = _UM_PER_UNIT.get(image.unit)
    x, y = (None if um is None or per_unit is None else um / per_unit for per_unit in image.per_unit)
    return DeclaredMpp(x, y, _MPP_SOURCE)


def _associated(images: Sequence[TiffImage]) -> dict[str, tuple[int, int]]:
    """Name -> (width, height) of Aperio's images that are not tiled, told apart by their place or NewSubfileType."""
    found = {}
    for number, image in enumerate(images):
        name = "thumbnail" if number == _THUMBNAIL else _ASSOCIATED.get(image.subfile)
        if image.tiled or name is None:
            continue
        if not (0 < image.width <= MAX_EDGE_PX and 0 < image.height <= MAX_EDGE_PX):
            raise NotDirectError(f"its {name} image is {image.width} x {image.height} px")
        found[name] = (image.width, image.height)
    return dict(sorted(found.items()))
