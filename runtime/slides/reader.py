"""What every slide reader offers: level sizes, the level-0 resolution, regions and tiles.

Everything outside the slide is white. The readers are in `readers/`; `open.py` picks one.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import MPP_RANGE, SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.types import Provenance, SlideRef

MPP_TOLERANCE = 0.05  # two resolutions within 5 % count as the same (SPEC 1)
FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True)
class Level:
    """One pyramid level: its size in its own px, and level-0 px per px of this level."""

    width: int
    height: int
    downsample: float


@dataclass(frozen=True)
class DeclaredMpp:
    """Level-0 um/px as the file states it, untrusted: None where absent or not a number.

    `source` is the property it was read from (x first), for messages and provenance.
    """

    x: float | None
    y: float | None
    source: str


class SlideReader(ABC):
    """An open slide; a context manager. `read_region` and `read_tiles` may be called from several threads.

    name: reader and library versions, e.g. "openslide 4.0.1".
    size0: (width, height) in level-0 px.        levels: finest first.
    mpp0: um per level-0 px.                     mpp_source: a property name or "--mpp".
    declared_mpp: what the file itself states.
    background: RGB the file declares for empty areas, or None. Recorded only: we paint white.
    icc: an ICC profile is embedded. Recorded only: pixels are used as they are.
    associated: label, macro and thumbnail images, name -> (width, height) px. They may show patient data:
        neither they nor their text belong in logs, caches and pictures.
    bounds0: (x, y, width, height) level-0 px of the scanned area, None where the file states none. QuPath crops to it.
    files: every file whose bytes make the pixels (an MRXS folder, a DICOM series).
    notes: remarks a user should see (resolution overridden, stated for one axis only).
    rereads: regions that failed once and succeeded when read again.
    """

    def __init__(
        self,
        path: Path,
        settings: SlideSettings,
        *,
        name: str,
        levels: tuple[Level, ...],
        declared_mpp: DeclaredMpp,
        background: tuple[int, int, int] | None = None,
        icc: bool = False,
        associated: Mapping[str, tuple[int, int]] | None = None,
        bounds0: tuple[int, int, int, int] | None = None,
        files: tuple[Path, ...] = (),
    ) -> None:
        """Raises SlideError when the resolution is unknown or absurd; the subclass closes its handle then."""
        self.path = path
        self.name = name
        self.levels = levels
        self.size0 = (levels[0].width, levels[0].height)
        self.background = background
        self.icc = icc
        self.associated: Mapping[str, tuple[int, int]] = dict(associated or {})
        self.bounds0 = bounds0
        self.files = files or (path,)
        self.rereads = 0
        self.declared_mpp = declared_mpp
        self.mpp0, self.mpp_source, self.notes = resolve_mpp(path, declared_mpp, settings)
        self.ref = SlideRef(
            path=path,
            size0=self.size0,
            mpp0=self.mpp0,
            mpp_source=self.mpp_source,
            bounds0=bounds0,
            provenance=Provenance(maker=name, digest=fingerprint(*self.files), settings=settings.to_json()),
        )
        self._closed = False
        self._lock = threading.Lock()

    def read_region(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Read u8 [h, w, 3] RGB; everything outside the slide, or transparent, is white.

        xy0: top-left corner in level-0 px, may lie outside.  size: (w, h) in px of `level`, both >= 1.
        Where xy0 falls between px of the level, the px are interpolated as OpenSlide does.
        Raises SlideError naming slide and place when the file cannot be read there; ValueError for
        a level that does not exist, an empty size or a closed slide (programming errors).
        """
        self._check(level, size)
        return self._read((int(xy0[0]), int(xy0[1])), int(level), (int(size[0]), int(size[1])))

    def read_tiles(
        self, xy0s: NDArray[np.int64], level: int, size: tuple[int, int], out: NDArray[np.uint8]
    ) -> list[tuple[int, SlideError]]:
        """Read B regions of one size into `out`; the same pixels as `read_region`, faster where a reader can.

        xy0s: [B, 2] level-0 px.  size: (w, h) px of `level`.  out: u8 [B, h, w, 3], C-contiguous.
        Returns (row, error) of the regions that cannot be read, tried twice; their rows are white.
        Raises ValueError as `read_region` does, and for arrays that do not fit together.
        """
        self._check(level, size)
        expected = (len(xy0s), int(size[1]), int(size[0]), 3)
        if out.shape != expected or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype}{list(out.shape)}, expected contiguous uint8{list(expected)}")
        if xy0s.shape != (len(xy0s), 2):
            raise ValueError(f"xy0s is {list(xy0s.shape)}, expected [B, 2]")
        return self._read_tiles(xy0s, int(level), (int(size[0]), int(size[1])), out)

    def announce(self, xy0s: NDArray[np.int64], level: int, size: tuple[int, int]) -> None:  # noqa: B027
        """Tell that these regions, int64 [N, 2], come next, in about this order; a hint to keep what they share."""

    def read_associated(self, name: str) -> NDArray[np.uint8]:
        """One of `associated`, u8 [h, w, 3] RGB on white. Raises SlideError (cannot be read), ValueError (no such)."""
        if self._closed:
            raise ValueError(f"{self.path}: read from a closed slide")
        if name not in self.associated:
            raise ValueError(f"associated image is {name!r}, expected {', '.join(self.associated) or 'none'}")
        return self._read_associated(name)

    def close(self) -> None:
        """Release the file. Twice is harmless; no read may be in progress."""
        if not self._closed:
            self._closed = True
            self._close()

    def _check(self, level: int, size: tuple[int, int]) -> None:
        if self._closed:
            raise ValueError(f"{self.path}: read from a closed slide")
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level is {level}, expected 0 to {len(self.levels) - 1}")
        if size[0] < 1 or size[1] < 1:
            raise ValueError(f"region size is {size}, expected at least 1 x 1 px")

    @abstractmethod
    def _read(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]: ...

    def _read_tiles(
        self, xy0s: NDArray[np.int64], level: int, size: tuple[int, int], out: NDArray[np.uint8]
    ) -> list[tuple[int, SlideError]]:
        failures: list[tuple[int, SlideError]] = []
        for row, (x, y) in enumerate(xy0s.tolist()):
            try:
                out[row] = self._read((x, y), level, size)
            except SlideError as error:
                out[row] = 255
                failures.append((row, error))
        return failures

    def _read_associated(self, name: str) -> NDArray[np.uint8]:
        raise NotImplementedError(f"{type(self).__name__} lists associated images but reads none")

    @abstractmethod
    def _close(self) -> None: ...

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def same_mpp(a: float, b: float) -> bool:
    """True when `a` is within 5 % of `b` (SPEC 1); the bound itself counts, whatever its last bit."""
    return abs(a / b - 1) <= MPP_TOLERANCE + 1e-9


def resolve_mpp(path: Path, declared: DeclaredMpp, settings: SlideSettings) -> tuple[float, str, tuple[str, ...]]:
    """Level-0 um/px, where it came from, and notes. `settings.mpp` wins; else the mean of x and y.

    Raises SlideError naming `--mpp` when the slide states none, one outside 0.05 ... 100 um/px on either axis,
    or two that differ by more than 5 %: which of them is right would be a guess.
    """
    stated = [v for v in (declared.x, declared.y) if v is not None]
    low, high = MPP_RANGE
    absurd = [v for v in stated if not low <= v <= high]  # NaN too
    told = " x ".join(dict.fromkeys(f"{v:.4g}" for v in stated))
    if settings.mpp is not None:
        agree = not absurd and all(same_mpp(v, settings.mpp) for v in stated)
        notes = () if agree else (f"--mpp {settings.mpp:g} replaces the slide's own {told} um/px",)
        return settings.mpp, "--mpp", notes
    way_out = "give the level-0 um/px with --mpp"
    if not stated:
        raise SlideError(f"{path}: the slide states no resolution ({declared.source} is absent); {way_out}")
    if absurd:
        raise SlideError(
            f"{path}: the slide states {told} um/px ({declared.source}), expected {low:g} to {high:g}; {way_out}"
        )
    if len(stated) == 1:
        note = f"the slide states its resolution for one axis only ({told} um/px), used for both"
        return stated[0], declared.source, (note,)
    if not same_mpp(max(stated), min(stated)):
        raise SlideError(
            f"{path}: the slide's x and y resolutions differ ({told} um/px, {declared.source}), expected square pixels "
            f"within {MPP_TOLERANCE:.0%}; {way_out}"
        )
    return sum(stated) / len(stated), declared.source, ()


def fingerprint(*paths: Path) -> str:
    """A quick fingerprint, not a checksum: sha256 over file size, first MiB and last MiB (hex).

    It tells slides apart without reading gigabytes; an edit in the middle goes unseen. Of several files
    (an MRXS folder, a DICOM series) it is the sha256 over their sorted fingerprints, so that neither
    names nor folders matter. Raises SlideError.
    """
    if len(paths) == 1:
        return _fingerprint_one(paths[0])
    return hashlib.sha256("".join(sorted(_fingerprint_one(path) for path in paths)).encode()).hexdigest()


def _fingerprint_one(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest = hashlib.sha256(size.to_bytes(8, "little"))
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}), expected a readable slide file") from error
    return digest.hexdigest()
