"""Which reader for which file: tried in the order of a table, or the one that `settings.reader` (`--reader`) pins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.reader import SlideReader

OpenReader = Callable[[Path, SlideSettings], SlideReader | None]


@dataclass(frozen=True)
class _Entry:
    """A reader: "module:function" in `readers/`, imported when it is tried.

    The function returns None for a file that is not its own, and raises SlideError for one that is
    but cannot be opened. Where it is pinned it may raise instead of None, to say why not.
    automatic: tried without being pinned.  folders: takes a folder too.  reads: formats, for messages.
    apart: read in a process of its own, as it may take its process down with it.
    """

    function: str
    reads: str
    automatic: bool = True
    folders: bool = False
    apart: bool = False


# In the order they are tried.
_READERS: dict[str, _Entry] = {
    "tiff": _Entry("tiff:open_tiff", "SVS and generic tiled pyramidal TIFF, 8-bit RGB"),
    "dicom": _Entry("dicom:open_dicom", "DICOM WSI, 8-bit RGB", folders=True),
    # OpenSlide 4.0.1 ends its process on 1 of 1,000 damaged files: it asks for 4 TB, divides by zero, never returns.
    "openslide": _Entry(
        "openslide:open_with_openslide", "SVS, DICOM WSI, NDPI, MRXS, SCN, BIF, Philips or tiled TIFF", apart=True
    ),
    "image": _Entry("image:open_image", "plain RGB images (PNG, JPEG, TIFF)"),
    "cucim": _Entry("cucim:open_with_cucim", "SVS and tiled pyramidal TIFF", automatic=False, apart=True),
    # In this process, whose GPU memory no other process shares.
    "cucim-cuda": _Entry("cucim:open_with_cucim_on_gpu", "SVS and tiled pyramidal TIFF in JPEG", automatic=False),
}
READER_NAMES = tuple(_READERS)
GPU_READER = "cucim-cuda"  # decodes tiles on the GPU, for a tile encoder that takes them there


def open_slide(path: str | Path, settings: SlideSettings | None = None) -> SlideReader:
    """Open a slide with the reader pinned, else the first that knows the format. Use it as a context manager.

    Which one reads it is in the reader's `name` and its `ref.provenance.maker`.

    Raises SlideError (missing, a folder, not a slide, unreadable, no or absurd resolution, an unknown reader, one
    that cannot read this file) and MachineError (a library is not installed).
    """
    path = Path(path)
    settings = settings or SlideSettings()
    entries = _chosen(settings)
    _require_readable(path, entries)
    for name, entry in entries.items():
        if entry.folders or not path.is_dir():
            reader = open_with(name, path, settings)
            if reader is not None:
                return reader
    if path.is_dir():
        raise _is_a_folder(path)
    way_out = "leave out --reader" if settings.reader else "check that the download is complete"
    expected = entries[settings.reader].reads if settings.reader else _READERS["openslide"].reads
    raise SlideError(f"{path}: not a slide that {', '.join(entries)} can read, expected {expected}; {way_out}")


def open_with(name: str, path: Path, settings: SlideSettings) -> SlideReader | None:
    """Open with one reader of the table; None where the file is not its own. Raises SlideError, MachineError."""
    entry = _READERS[name]
    module, _, function = entry.function.partition(":")
    module = f"wsi_rt.runtime.slides.readers.{module}"
    if entry.apart:
        from wsi_rt.runtime.slides.worker import open_in_worker

        return open_in_worker(f"{module}:{function}", path, settings)
    opener: OpenReader = getattr(import_module(module), function)
    return opener(path, settings)


def _chosen(settings: SlideSettings) -> dict[str, _Entry]:
    if settings.reader is None:
        return {name: entry for name, entry in _READERS.items() if entry.automatic}
    if settings.reader not in _READERS:
        raise SlideError(f"--reader is {settings.reader!r}, expected one of {', '.join(_READERS)}")
    return {settings.reader: _READERS[settings.reader]}


def _require_readable(path: Path, entries: dict[str, _Entry]) -> None:
    if path.is_dir():
        if not any(entry.folders for entry in entries.values()):
            raise _is_a_folder(path)
        return
    if not path.exists():
        raise SlideError(f"{path}: no such file, expected a slide")
    if not path.is_file():
        raise SlideError(f"{path}: is not a regular file, expected a slide")
    try:
        path.open("rb").close()
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}), expected a readable slide file") from error


def _is_a_folder(path: Path) -> SlideError:
    return SlideError(
        f"{path}: is a folder, expected a slide file (DICOM: the folder of one series, or any .dcm file of it; "
        "MRXS: the .mrxs file beside its folder)"
    )
