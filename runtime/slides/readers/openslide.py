"""Slides through OpenSlide (https://openslide.org): SVS, NDPI, MRXS, SCN, BIF, Philips, DICOM, generic TIFF."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import MachineError, SlideError
from wsi_rt.runtime.slides.reader import DeclaredMpp, Level, SlideReader

if TYPE_CHECKING:
    import openslide
    from PIL import Image

# Decoded-tile cache per open slide. OpenSlide's own default (32 MiB) is less than one tile row of a
# 46,000 px wide Aperio slide (240-px tiles: 44 MB), so off-grid reads would decode every tile twice.
CACHE_BYTES = 128 << 20
HEAD_BYTES = 1 << 16  # of a DICOM file; its SeriesInstanceUID stands in the first kilobytes


def load_openslide() -> ModuleType:
    try:
        import openslide
    except (ImportError, OSError) as error:  # OSError: the Python half without the library
        raise MachineError(
            "OpenSlide is not installed, expected to read slides with it; run: "
            "pip install openslide-python openslide-bin"
        ) from error
    return openslide


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def open_with_openslide(path: Path, settings: SlideSettings) -> OpenSlideReader | None:
    """Open `path`; None when OpenSlide does not know the format. Raises SlideError, MachineError."""
    openslide = load_openslide()
    try:
        handle = _open_handle(openslide, path)
    except openslide.OpenSlideUnsupportedFormatError:
        return None
    except openslide.OpenSlideError as error:
        raise SlideError(
            f"{path}: cannot be opened ({_one_line(error)}), expected an intact slide in a supported compression; "
            "download it again or convert it to tiled JPEG"
        ) from error
    try:
        return OpenSlideReader(path, settings, openslide, handle)
    except BaseException:
        handle.close()
        raise


def _open_handle(openslide: ModuleType, path: Path) -> openslide.OpenSlide:
    handle = openslide.OpenSlide(path)
    handle.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
    return handle


def _number(properties: Mapping[str, str], name: str) -> float | None:
    try:
        return float(properties[name])
    except (KeyError, ValueError):
        return None


def _bounds0(properties: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{part}"]) for part in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return None
    return x, y, width, height


def _associated(properties: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Name -> (width, height) px, from the properties: asking OpenSlide for the images would decode them."""
    found = (re.fullmatch(r"openslide\.associated\.(.+)\.width", name) for name in properties)
    names = [match[1] for match in found if match]
    return {
        name: (
            int(properties[f"openslide.associated.{name}.width"]),
            int(properties[f"openslide.associated.{name}.height"]),
        )
        for name in sorted(names)
    }


def _files(path: Path, properties: Mapping[str, str]) -> tuple[Path, ...]:
    """The files behind `path`, itself first: MRXS and VMS keep the pixels beside it, DICOM one level per file."""
    series = properties.get("dicom.SeriesInstanceUID", "").encode()
    if properties.get("openslide.vendor") == "mirax":
        beside = path.with_suffix("").glob("*")
    elif series:
        beside = (p for p in path.parent.iterdir() if p.is_file() and series in _head(p))
    elif path.suffix.lower() in (".vms", ".vmu"):
        beside = path.parent.glob(f"{path.stem}*")
    else:
        return (path,)
    return (path, *sorted(p for p in beside if p != path and p.is_file()))


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _background(properties: Mapping[str, str], name: str) -> tuple[int, int, int] | None:
    text = properties.get(name, "")
    if not re.fullmatch(r"[0-9A-Fa-f]{6}", text):
        return None
    red, green, blue = bytes.fromhex(text)
    return red, green, blue


class OpenSlideReader(SlideReader):
    """A slide read by OpenSlide; its handles are safe to use from several threads."""

    def __init__(self, path: Path, settings: SlideSettings, openslide: ModuleType, handle: openslide.OpenSlide) -> None:
        properties = handle.properties
        sizes = zip(handle.level_dimensions, handle.level_downsamples, strict=True)
        super().__init__(
            path,
            settings,
            name=f"openslide {openslide.__library_version__}",
            levels=tuple(Level(width, height, float(downsample)) for (width, height), downsample in sizes),
            declared_mpp=DeclaredMpp(
                x=_number(properties, openslide.PROPERTY_NAME_MPP_X),
                y=_number(properties, openslide.PROPERTY_NAME_MPP_Y),
                source=openslide.PROPERTY_NAME_MPP_X,
            ),
            background=_background(properties, openslide.PROPERTY_NAME_BACKGROUND_COLOR),
            icc=properties.get("openslide.icc-size", "0") != "0",
            associated=_associated(properties),
            bounds0=_bounds0(properties),
            files=_files(path, properties),
        )
        self.properties = properties
        self._openslide = openslide
        self._handle = handle

    def _read(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        try:
            image = self._handle.read_region(xy0, level, size)
        except self._openslide.OpenSlideError:
            image = self._read_again(xy0, level, size)
        return _on_white(image)

    def _read_again(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """Read once more through a fresh handle that no other thread has.

        OpenSlide latches errors: after one bad region every later read of that handle fails too,
        from any thread, with the first error's text. Only a private fresh handle tells whether *this*
        region is bad, so that the error names the right place. A handle that reads it serves from
        then on; the old one is left to whoever still reads from it.
        """
        with self._lock:
            handle = None
            try:
                handle = _open_handle(self._openslide, self.path)
                image = handle.read_region(xy0, level, size)
            except self._openslide.OpenSlideError as error:
                if handle is not None:
                    handle.close()
                raise SlideError(
                    f"{self.path}: {size[0]} x {size[1]} px at level {level}, level-0 position {xy0} cannot be read "
                    f"({_one_line(error)}), expected an intact slide; download it again"
                ) from error
            self._handle = handle
            self.rereads += 1
        return image

    def _read_associated(self, name: str) -> NDArray[np.uint8]:
        try:
            return _on_white(self._handle.associated_images[name])
        except self._openslide.OpenSlideError as error:
            raise SlideError(
                f"{self.path}: its {name} image cannot be read ({_one_line(error)}), expected an intact slide"
            ) from error

    def _close(self) -> None:
        self._handle.close()


def _on_white(image: Image.Image) -> NDArray[np.uint8]:
    """RGBA image -> u8 [h, w, 3] RGB composited on white (OpenSlide is transparent where there is no slide)."""
    from PIL import Image

    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return np.array(image.convert("RGB"))
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=alpha)
    return np.array(canvas)
