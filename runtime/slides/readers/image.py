"""Plain RGB images (PNG, JPEG, TIFF in strips), for regions cut out of slides; they need `--mpp`.

The resolution such files carry is that of print (72 or 300 dpi), so it is never used.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import SlideError
from wsi_rt.runtime.slides.reader import DeclaredMpp, Level, SlideReader

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "TIFF")
# Pillow holds 4 bytes per px (358 MB here), a progressive JPEG 6 more while it is decoded. Pillow warns beyond it.
MAX_PX = 89_478_485
_COLOUR = {"RGB", "RGBA", "P"}
_DESCRIPTION, _MAKE, _SOFTWARE, _ORIENTATION = 270, 271, 305, 274
_STRIP_TAGS, _TILE_TAGS = (273, 279), (322, 323, 324, 325)
_HAMAMATSU_TAGS = range(65420, 65500)
_SCANNERS = ("aperio", "hamamatsu", "leica", "philips", "ventana", "iscan", "trestle", "<?xml")


def open_image(path: Path, settings: SlideSettings) -> ImageReader | None:
    """Open `path`; None when Pillow does not know it as PNG, JPEG or TIFF. Raises SlideError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oversize, odd metadata: what matters is checked below
            warnings.filterwarnings("error", "Truncated File Read")  # a TIFF directory that is cut off
            image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        raise SlideError(f"{path}: has more than {2 * MAX_PX} px, {_TOO_LARGE}") from error
    except Exception as error:  # a damaged header makes Pillow raise nearly anything
        raise _unreadable(path, error) from error
    try:
        return ImageReader(path, settings, image)
    except BaseException:
        image.close()
        raise


_TOO_LARGE = (
    f"expected at most {MAX_PX} in a plain image, which is held in memory; "
    "convert it to a tiled pyramidal TIFF (vips tiffsave --tile --pyramid)"
)


def _unreadable(path: Path, error: Exception) -> SlideError:
    told = " ".join(str(error).split())[:200] or type(error).__name__
    return SlideError(f"{path}: cannot be read ({told}), expected an intact image; download it again")


class ImageReader(SlideReader):
    """A plain image as a slide of one level, decoded once. Transparent px are white.

    Memory: 4 bytes per px, at most 358 MB; about 2.5 times that while a large progressive JPEG is decoded.
    """

    def __init__(self, path: Path, settings: SlideSettings, image: Image) -> None:
        """Takes over `image`, opened but not decoded. Raises SlideError: too large, not colour, damaged, no mpp."""
        import PIL

        width, height = image.size
        if width * height > MAX_PX:
            raise SlideError(f"{path}: has {width} x {height} px, {_TOO_LARGE}")
        if image.mode not in _COLOUR:
            raise SlideError(f"{path}: is an image of the kind {image.mode} (L: grey), expected RGB colours")
        if image.format == "TIFF":
            _refuse_slides(path, image)
        super().__init__(
            path,
            settings,
            name=f"pillow {PIL.__version__} {image.format}",
            levels=(Level(width, height, 1.0),),
            declared_mpp=DeclaredMpp(None, None, "a plain image's scale in um"),
            icc=bool(image.info.get("icc_profile")),
        )
        self._image, remarks = _decode(path, image)
        self.notes += remarks

    def _read(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        left, top = (max(v, 0) for v in xy0)
        right, bottom = (min(v + n, edge) for v, n, edge in zip(xy0, size, self.size0, strict=True))
        if left < right and top < bottom:
            inside = np.asarray(self._image.crop((left, top, right, bottom)))
            out[top - xy0[1] : bottom - xy0[1], left - xy0[0] : right - xy0[0]] = inside
        return out

    def _close(self) -> None:
        self._image.close()


def _refuse_slides(path: Path, image: Image) -> None:
    """A slide that no reader of slides takes is damaged; as a plain image its first page would pass for the whole."""
    try:
        tags = dict(image.tag_v2)  # type: ignore[attr-defined]
        pages = image.n_frames  # type: ignore[attr-defined]
    except Exception as error:
        raise _unreadable(path, error) from error
    told = " ".join(str(tags.get(tag, "")) for tag in (_DESCRIPTION, _MAKE, _SOFTWARE)).lower()
    found = [name for name in _SCANNERS if name in told]
    if pages > 1:
        found.append(f"{pages} pages")
    if any(tag in tags for tag in _TILE_TAGS) or not all(tag in tags for tag in _STRIP_TAGS):
        found.append("tiles" if _TILE_TAGS[0] in tags else "no strips")
    if any(tag in _HAMAMATSU_TAGS for tag in tags):
        found.append("Hamamatsu's tags")
    if found:
        raise SlideError(
            f"{path}: is a TIFF with {', '.join(found)}, but no slide that can be read, expected a plain image of one "
            "page; download it again if it is a slide"
        )


def _remarks(image: Image) -> tuple[str, ...]:
    notes = []
    if image.getexif().get(_ORIENTATION, 1) != 1:
        notes.append("the image is marked as turned (EXIF orientation); its px are used as they are stored")
    return tuple(notes)


def _decode(path: Path, image: Image) -> tuple[Image, tuple[str, ...]]:
    """RGB, on white where transparent; and remarks."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            remarks = _remarks(image)
            image.load()
        if image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        elif "transparency" in image.info:  # PNG: one colour of RGB that stands for transparent
            image = image.convert("RGBA")
        if image.mode == "RGBA":
            canvas = Image.new("RGB", image.size, (255, 255, 255))
            canvas.paste(image, mask=image.getchannel("A"))
            image = canvas
    except Exception as error:  # libjpeg, libpng and libtiff report damage in many ways
        raise _unreadable(path, error) from error
    return image, remarks
