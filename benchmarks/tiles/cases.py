"""The cases of the bench and who takes part, without any peer's package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsi_rt.runtime.errors import InputError

OURS, LIMIT, REFERENCE = "wsi-rt", "limit", "openslide-python"
TIFF_PEERS = (REFERENCE, "tiffslide", "cucim", "pyvips", "fastslide")
# >= 10,000 tissue tiles of 256 px; 4:2:0 at quality 80, about 10 KB a tile, as the encoder of the writer gives them
LARGE: dict[str, Any] = {"width": 32768, "height": 24576, "tissue": 0.9, "levels": (1, 4, 16)}
SMALL: dict[str, Any] = {"width": 4096, "height": 3072, "tissue": 0.6, "levels": (1, 4)}


@dataclass(frozen=True)
class Case:
    """One kind of slide and of reading.

    providers: who reads it.  changes: what the slide is beside LARGE or SMALL (`SlideSpec` fields).
    most: tiles timed at most, from the middle of the slide.  suffix: of the slide's file.
    slide: a user's own, instead of one that is written.
    """

    name: str
    providers: tuple[str, ...]
    changes: tuple[tuple[str, Any], ...] = ()
    most: int = 10_000
    suffix: str = ".svs"
    slide: Path | None = None

    def spec(self, quick: bool) -> dict[str, Any]:
        """`write_synth_slide`'s arguments."""
        spec = {**(SMALL if quick else LARGE), **dict(self.changes)}
        if quick and "mpp" in spec:  # half the resolution is read: as many tiles need twice the edge
            spec = {**spec, "width": 2 * spec["width"], "height": 2 * spec["height"]}
        return spec


CASES = (
    Case("jpeg-aligned", (OURS, *TIFF_PEERS, LIMIT)),
    Case("jpeg-offgrid", (OURS, *TIFF_PEERS, LIMIT), (("tile", 240), ("levels", (1, 4)))),
    # OpenJPEG takes 2 to 4 ms a tile: fewer tiles, as many seconds
    Case("jpeg2000", (OURS, REFERENCE, "tiffslide", "cucim", LIMIT), (("codec", "jpeg2000"),), most=2_000),
    Case("dicom", (OURS, REFERENCE, "wsidicom", LIMIT), (("format", "dicom"),), suffix=""),
    # 40x with no 20x level: each tile is 506 level-0 px across, resized
    Case("preprocess", (OURS, REFERENCE, LIMIT), (("mpp", 0.2528),), most=2_000),
)


def chosen(names: Sequence[str], slide: Path | None) -> list[Case]:
    """The cases of some names (none: all); with a slide, the one case that reads it.

    Raises InputError on an unknown name, or a name beside a slide.
    """
    if slide is not None:
        if names:
            raise InputError(f"--case {', '.join(names)} beside {slide}, expected either: a case writes its own slide")
        dicom = slide.is_dir() or slide.suffix.lower() == ".dcm"
        return [replace(CASES[3] if dicom else CASES[0], name="slide", slide=slide)]
    known = [case.name for case in CASES]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--case {', '.join(unknown)} is unknown, expected one of: {', '.join(known)}")
    return [case for case in CASES if not names or case.name in names]
