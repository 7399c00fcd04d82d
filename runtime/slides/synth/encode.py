"""Tiles of pixels to the bytes that a TIFF holds. Pillow does the coding: no package beyond the base install."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.slides.synth.spec import SlideSpec

JPEG_QUALITY = 80
JPEG2000_RATE = 12  # compression ratio
_SOI, _SOF0, _DHT, _EOI, _SOS, _DQT, _APP0, _APP14 = 0xD8, 0xC0, 0xC4, 0xD9, 0xDA, 0xDB, 0xE0, 0xEE

Encode = Callable[[NDArray[np.uint8]], bytes]  # u8 [tile, tile, 3] RGB -> one encoded tile


class TileEncoder:
    """Encodes tiles as a spec says. tables: JPEG tables that belong in the directory, else None."""

    def __init__(self, spec: SlideSpec) -> None:
        self._spec = spec
        codecs: dict[str, Encode] = {
            "jpeg": self._jpeg,
            "jpeg-rgb": self._jpeg_rgb,
            "jpeg2000": lambda pixels: _jpeg2000(pixels, ycc=False),
            "jpeg2000-ycc": lambda pixels: _jpeg2000(pixels, ycc=True),
            "deflate": lambda pixels: zlib.compress(self._differences(pixels), 6),
            "lzw": lambda pixels: _lzw(np.frombuffer(self._differences(pixels), np.uint8).reshape(pixels.shape)),
            "raw": lambda pixels: pixels.tobytes(),
        }
        self._encode = codecs[spec.codec]
        self.tables: bytes | None = None
        if (spec.codec == "jpeg-rgb" and spec.format != "dicom") or spec.shared_tables:
            # the tables depend on the quality alone, so any tile gives those of all
            self.tables, _ = _shared(_pillow_jpeg(np.zeros((16, 16, 3), np.uint8), self._options()))

    def __call__(self, pixels: NDArray[np.uint8]) -> bytes:
        return self._encode(pixels)

    def _options(self) -> dict[str, object]:
        if self._spec.codec == "jpeg-rgb":
            return {"keep_rgb": True, "subsampling": 0}
        return {"subsampling": {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}[self._spec.subsampling]}

    def _jpeg(self, pixels: NDArray[np.uint8]) -> bytes:
        data = _pillow_jpeg(pixels, self._options())
        return _shared(data)[1] if self._spec.shared_tables else data

    def _jpeg_rgb(self, pixels: NDArray[np.uint8]) -> bytes:
        tables, rest = _shared(_pillow_jpeg(pixels, self._options()))
        return rest if self.tables else tables[:-2] + rest[2:]  # DICOM has no directory: one stream holds both

    def _differences(self, pixels: NDArray[np.uint8]) -> bytes:
        """TIFF's predictor 2: each pixel less its left neighbour, modulo 256."""
        if not self._spec.predictor:
            return pixels.tobytes()
        differences = pixels.copy()
        differences[:, 1:] -= pixels[:, :-1]
        return differences.tobytes()


def _pillow_jpeg(pixels: NDArray[np.uint8], options: dict[str, object]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY, **options)
    return out.getvalue()


def _jpeg2000(pixels: NDArray[np.uint8], *, ycc: bool) -> bytes:
    """A bare codestream; ycc: the components are YCbCr and nothing in the stream says so, as in Aperio's 33003."""
    from PIL import Image

    out = io.BytesIO()
    image = Image.fromarray(pixels)
    options: dict[str, object] = {"quality_mode": "rates", "quality_layers": [JPEG2000_RATE]}
    if ycc:
        image, options = Image.fromarray(np.asarray(image.convert("YCbCr"))), {**options, "mct": 0}
    image.save(out, "JPEG2000", no_jp2=True, irreversible=True, **options)
    return out.getvalue()


def _lzw(pixels: NDArray[np.uint8]) -> bytes:
    """The one strip of a TIFF that Pillow's libtiff compresses."""
    from PIL import Image, TiffImagePlugin

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "TIFF", compression="tiff_lzw", strip_size=pixels.nbytes)
    out.seek(0)
    with TiffImagePlugin.TiffImageFile(out) as written:
        (offset,), (length,) = written.tag_v2[273], written.tag_v2[279]
    return out.getvalue()[offset : offset + length]


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, whole segment) of a JPEG up to the scan; the last is SOS with all that follows it."""
    at = 2
    while data[at + 1] != _SOS:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at + 1], data[at:end]
        at = end
    yield _SOS, data[at:]


def _shared(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG as (tables, the rest of it), without the APP markers that tell its colours, components 0, 1, 2.

    That is how Aperio's scanner writes them: a decoder that sees no TIFF tag guesses YCbCr.
    """
    tables, rest = [b"\xff\xd8"], [b"\xff\xd8"]
    for marker, segment in _segments(data):
        if marker in (_DQT, _DHT):
            tables.append(segment)
        elif marker == _SOF0:
            rest.append(_renumbered(segment, first=10, step=3))
        elif marker == _SOS:
            rest.append(_renumbered(segment, first=5, step=2))
        elif marker not in (_APP0, _APP14):
            rest.append(segment)
    return b"".join([*tables, b"\xff\xd9"]), b"".join(rest)


def _renumbered(segment: bytes, *, first: int, step: int) -> bytes:
    changed = bytearray(segment)
    for component in range(3):
        changed[first + component * step] = component
    return bytes(changed)
