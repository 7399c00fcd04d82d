"""What a synthetic slide is to be, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from wsi_rt.runtime.config import MPP_RANGE, TARGET_MPP
from wsi_rt.runtime.errors import InputError

FORMATS = ("svs", "tiff", "dicom")
# jpeg: YCbCr in whole JPEG files. jpeg-rgb: as Aperio writes it, R, G, B components with nothing that says so but
# TIFF's photometric tag, and shared tables (in DICOM each frame has its own). jpeg2000: RGB (Aperio 33005);
# jpeg2000-ycc: YCbCr (Aperio 33003).
CODECS = ("jpeg", "jpeg-rgb", "jpeg2000", "jpeg2000-ycc", "deflate", "lzw", "raw")
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
MAX_EDGE = 1_000_000
DEFAULT_LEVELS = (1, 4, 16)


@dataclass(frozen=True)
class SlideSpec:
    """One synthetic slide; the same spec gives the same bytes (with the same numpy and Pillow).

    width, height: level-0 px.  mpp: um/px.  tile: stored tile edge, a multiple of 16 px.
    tissue: share of the area, 0 (blank glass) to 0.9.
    levels: downsample of each level, the first 1, each a multiple of the one before; coarser levels are box averages.
    format: svs (Aperio's), tiff (a generic pyramid) or dicom (a folder of instances).  codec: one of CODECS.
    subsampling: of the chroma of `jpeg`.  shared_tables: `jpeg` with its tables in the TIFF directory.
    predictor: horizontal differences under deflate or lzw.  sparse: tiles of bare glass are left out of the file.
    bigtiff: 64-bit offsets; without them a file ends at 4 GiB.  big_endian: byte order of the TIFF.

    Raises InputError, one line for the first choice that does not fit.
    """

    width: int = 6144
    height: int = 4096
    mpp: float = TARGET_MPP
    tile: int = 256
    seed: int = 0
    tissue: float = 0.3
    levels: tuple[int, ...] = DEFAULT_LEVELS
    codec: str = "jpeg"
    format: str = "svs"
    subsampling: str = "4:2:0"
    shared_tables: bool = False
    predictor: bool = False
    sparse: bool = False
    bigtiff: bool = True
    big_endian: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        for name, edge in (("width", self.width), ("height", self.height)):
            _require(1 <= edge <= MAX_EDGE, name, edge, f"1 to {MAX_EDGE} px")
        low, high = MPP_RANGE
        _require(low <= self.mpp <= high, "mpp", self.mpp, f"um/px between {low:g} and {high:g}")
        _require(16 <= self.tile <= 4096 and self.tile % 16 == 0, "tile", self.tile, "a multiple of 16 px up to 4096")
        _require(0 <= self.tissue <= 0.9, "tissue", self.tissue, "a share between 0 and 0.9")
        for name, given, known in (
            ("codec", self.codec, CODECS),
            ("format", self.format, FORMATS),
            ("subsampling", self.subsampling, SUBSAMPLINGS),
        ):
            _require(given in known, name, given, " or ".join(known))
        steps = [b / a for a, b in pairwise(self.levels) if a > 0]
        fits = all(s > 1 and s.is_integer() and self.tile % s == 0 for s in steps)
        fits = len(self.levels) > 0 and self.levels[0] == 1 and fits
        _require(fits, "levels", self.levels, f"1 first, then multiples whose steps divide the tile of {self.tile} px")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """What no reader would take, and what a choice has no effect on."""
        aperio_only = self.codec.startswith("jpeg2000") and self.format == "tiff"
        _require(not aperio_only, "codec", self.codec, "another one for a generic TIFF: JPEG 2000 is Aperio's there")
        if self.format == "dicom":
            layout = self.shared_tables or self.predictor or self.big_endian or not self.bigtiff
            _require(not layout, "format", "dicom", "svs or tiff for what only a TIFF has (tables, predictor, layout)")
            fits = self.codec in ("jpeg", "jpeg-rgb", "jpeg2000", "raw")
            _require(fits, "codec", self.codec, "jpeg, jpeg-rgb, jpeg2000 or raw in a dicom")
        _require(not self.predictor or self.codec in ("deflate", "lzw"), "predictor", self.codec, "deflate or lzw")
        _require(not self.shared_tables or self.codec == "jpeg", "shared_tables", self.codec, "codec jpeg")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each level, px."""
        return [(max(1, self.width // d), max(1, self.height // d)) for d in self.levels]


def _require(ok: bool, name: str, given: object, expected: str) -> None:
    if not ok:
        raise InputError(f"synthetic slide: {name} is {given!r}, expected {expected}")
