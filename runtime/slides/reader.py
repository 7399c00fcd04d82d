"""What every slide reader offers, and `open_slide`, which picks one.

A reader knows the level sizes, the level-0 resolution and how to read a region; everything outside
the slide is white. Later readers (TIFF, DICOM, cuCIM) are one more line in `_BACKENDS`.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
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
    """An open slide; a context manager. `read_region` may be called from several threads.

    name: reader and library version, e.g. "openslide 4.0.1".
    size0: (width, height) in level-0 px.        levels: finest first.
    mpp0: um per level-0 px.                     mpp_source: a property name or "--mpp".
    background: RGB the file declares for empty areas, or None. Recorded only: we paint white.
    notes: remarks a user should see (resolution overridden, stated for one axis only).
    rereads: regions that failed once and succeeded on a fresh handle.
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
    ) -> None:
        """Raises SlideError when the resolution is unknown or absurd; the subclass closes its handle then."""
        self.path = path
        self.name = name
        self.levels = levels
        self.size0 = (levels[0].width, levels[0].height)
        self.background = background
        self.rereads = 0
        self.mpp0, self.mpp_source, self.notes = resolve_mpp(path, declared_mpp, settings)
        self.ref = SlideRef(
            path=path,
            size0=self.size0,
            mpp0=self.mpp0,
            mpp_source=self.mpp_source,
            provenance=Provenance(maker=name, digest=fingerprint(path), settings=settings.to_json()),
        )
        self._closed = False
        self._lock = threading.Lock()

    def read_region(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Read u8 [h, w, 3] RGB; everything outside the slide, or transparent, is white.

        xy0: top-left corner in level-0 px, may lie outside.  size: (w, h) in px of `level`, both >= 1.
        Raises SlideError naming slide and place when the file cannot be read there; ValueError for
        a level that does not exist, an empty size or a closed slide (programming errors).
        """
        if self._closed:
            raise ValueError(f"{self.path}: read from a closed slide")
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level is {level}, expected 0 to {len(self.levels) - 1}")
        if size[0] < 1 or size[1] < 1:
            raise ValueError(f"region size is {size}, expected at least 1 x 1 px")
        return self._read((int(xy0[0]), int(xy0[1])), int(level), (int(size[0]), int(size[1])))

    def close(self) -> None:
        """Release the file. Twice is harmless; no read may be in progress."""
        if not self._closed:
            self._closed = True
            self._close()

    @abstractmethod
    def _read(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]: ...

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


def fingerprint(path: Path) -> str:
    """A quick fingerprint, not a checksum: sha256 over file size, first MiB and last MiB (hex).

    It tells slides apart without reading gigabytes; an edit in the middle goes unseen, and for
    formats of several files (MRXS, DICOM series) it covers the file named only. Raises SlideError.
    """
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


def _open_with_openslide(path: Path, settings: SlideSettings) -> SlideReader | None:
    from wsi_rt.runtime.slides.openslide_reader import open_with_openslide

    return open_with_openslide(path, settings)


# Tried in order; a backend returns None for a file that is not its own and raises SlideError for
# one that is but cannot be opened.
_BACKENDS: dict[str, Callable[[Path, SlideSettings], SlideReader | None]] = {"openslide": _open_with_openslide}


def open_slide(path: str | Path, settings: SlideSettings | None = None) -> SlideReader:
    """Open a slide with the first reader that knows its format. Use it as a context manager.

    Raises SlideError (missing, a folder, not a slide, unreadable, no or absurd resolution) and
    MachineError (OpenSlide not installed).
    """
    path = Path(path)
    settings = settings or SlideSettings()
    if path.is_dir():
        raise SlideError(
            f"{path}: is a folder, expected a slide file (DICOM: any .dcm file of the series; "
            "MRXS: the .mrxs file beside its folder)"
        )
    if not path.exists():
        raise SlideError(f"{path}: no such file, expected a slide")
    if not path.is_file():
        raise SlideError(f"{path}: is not a regular file, expected a slide")
    try:
        path.open("rb").close()
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}), expected a readable slide file") from error
    for backend in _BACKENDS.values():
        reader = backend(path, settings)
        if reader is not None:
            return reader
    raise SlideError(
        f"{path}: not a slide that {', '.join(_BACKENDS)} can read, expected SVS, DICOM WSI, NDPI, MRXS, SCN, BIF, "
        "Philips or tiled pyramidal TIFF; check that the download is complete"
    )
