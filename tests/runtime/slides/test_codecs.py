"""One encoded segment to pixels: what is decoded, into what, and what is refused."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
from numpy.typing import NDArray
from PIL import Image

from wsi_rt.runtime.errors import MachineError
from wsi_rt.runtime.slides import codecs
from wsi_rt.runtime.slides.codecs import CodecError
from wsi_rt.runtime.slides.synth import SlideSpec
from wsi_rt.runtime.slides.synth.tiff import PyramidWriter

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def picture() -> Pixels:
    """u8 [48, 64, 3]: soft colours and a hard edge."""
    y, x = np.mgrid[:48, :64]
    pixels = np.stack([4 * x, 5 * y, 255 - 2 * x - y], axis=2).clip(0, 255).astype(np.uint8)
    pixels[20:, 40:] = (180, 60, 140)
    return pixels


def jpeg(pixels: Pixels, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85, **options)
    return out.getvalue()


def without_marker(data: bytes, marker: int) -> bytes:
    """The stream without its first segment of a kind."""
    at = data.index(bytes((0xFF, marker)))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def abbreviated(data: bytes) -> tuple[bytes, bytes]:
    """(tables, the stream without them), as TIFF stores JPEG tiles."""
    at, tables, rest = 2, b"\xff\xd8", b"\xff\xd8"
    while data[at + 1] != 0xDA:
        segment = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
        if data[at + 1] in (0xC4, 0xDB):
            tables += segment
        else:
            rest += segment
        at += len(segment)
    return tables + b"\xff\xd9", rest + data[at:]


def decoded(decode: Callable[..., None], data: bytes, **options: object) -> Pixels:
    out = np.zeros((48, 64, 3), np.uint8)
    decode(data, out, **options)
    return out


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_jpeg_is_libjpegs(picture: Pixels, subsampling: str, progressive: bool) -> None:
    data = jpeg(picture, subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(
        decoded(codecs.decode_jpeg, data, rgb=False), np.asarray(Image.open(io.BytesIO(data)))
    )


def test_jpeg_tables_come_from_beside(picture: Pixels) -> None:
    data = jpeg(picture)
    tables, rest = abbreviated(data)
    np.testing.assert_array_equal(
        decoded(codecs.decode_jpeg, rest, tables=tables, rgb=False), decoded(codecs.decode_jpeg, data, rgb=False)
    )
    with pytest.raises(CodecError, match=r"JPEG: .*table"):
        decoded(codecs.decode_jpeg, rest, rgb=False)


@pytest.mark.parametrize("marked", ["nothing", "jfif", "adobe-ycc", "adobe-rgb"])
@pytest.mark.parametrize("rgb", [False, True], ids=["as-ycc", "as-rgb"])
def test_the_callers_colour_space_holds(picture: Pixels, marked: str, rgb: bool) -> None:
    """Aperio's RGB tiles say nothing about it, some say the wrong thing; the TIFF's tag is what counts."""
    plain = without_marker(jpeg(picture, subsampling="4:4:4"), 0xE0)
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    markers = {
        "nothing": b"",
        "jfif": b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00",
        "adobe-ycc": adobe + b"\x01",
        "adobe-rgb": adobe + b"\x00",
    }
    data = plain[:2] + markers[marked] + plain[2:]
    space = "rgb" if rgb else "ycbcr"
    expected = imagecodecs.jpeg8_decode(plain, colorspace=space, outcolorspace="rgb")
    np.testing.assert_array_equal(decoded(codecs.decode_jpeg, data, rgb=rgb), expected)


def test_a_scan_marker_inside_a_segment_is_not_the_scan(picture: Pixels) -> None:
    data = jpeg(picture)
    comment = b"\xff\xfe\x00\x08ab\xff\xdacd"
    np.testing.assert_array_equal(
        decoded(codecs.decode_jpeg, data[:2] + comment + data[2:], rgb=False),
        decoded(codecs.decode_jpeg, data, rgb=False),
    )


def _frame(data: bytes) -> int:
    return data.index(b"\xff\xc0")


JPEG_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "zeros": lambda d: bytes(len(d)),
    "no-start": lambda d: d[2:],
    "truncated": lambda d: d[: len(d) // 2],
    "last-bytes-lost": lambda d: d[:-40],
    "header-only": lambda d: d[: _frame(d)],
    "extraneous": lambda d: d[: _frame(d)] + b"\0\0" + d[_frame(d) :],
    "taller": lambda d: d[: _frame(d) + 5] + struct.pack(">H", 64) + d[_frame(d) + 7 :],
    "huge": lambda d: d[: _frame(d) + 5] + b"\xff\xff\xff\xff" + d[_frame(d) + 9 :],
    "12-bit": lambda d: d[: _frame(d) + 4] + b"\x0c" + d[_frame(d) + 5 :],
    "lossless": lambda d: d.replace(b"\xff\xc0", b"\xff\xc3", 1),
}


@pytest.mark.parametrize("damage", JPEG_DAMAGE)
def test_bad_jpeg_is_refused(picture: Pixels, damage: str) -> None:
    with pytest.raises(CodecError, match="JPEG"):
        decoded(codecs.decode_jpeg, JPEG_DAMAGE[damage](jpeg(picture)), rgb=False)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_components_is_refused(picture: Pixels, mode: str) -> None:
    out = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(out, "JPEG")
    with pytest.raises(CodecError, match="expected 3 of 8 bits"):
        decoded(codecs.decode_jpeg, out.getvalue(), rgb=False)


def j2k(pixels: Pixels, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG2000", no_jp2=True, **options)
    return out.getvalue()


def test_jpeg2000_is_openjpegs(picture: Pixels) -> None:
    lossless = j2k(picture, irreversible=False)
    np.testing.assert_array_equal(decoded(codecs.decode_jpeg2000, lossless, ycc=False), picture)
    lossy = j2k(picture, irreversible=True, quality_mode="rates", quality_layers=[8])
    np.testing.assert_array_equal(
        decoded(codecs.decode_jpeg2000, lossy, ycc=False), np.asarray(Image.open(io.BytesIO(lossy)))
    )


def test_jpeg2000_ycc_is_openslides_formula(tmp_path: Path) -> None:
    """Every (Cb, Cr) at three Y, a tile each; the formula adds Y and clips, so 0 and 255 show both ends of the sum."""
    path = tmp_path / "every-chroma.svs"
    cb, cr = np.mgrid[:256, :256]
    tiles = [np.stack([np.full_like(cb, y), cb, cr], axis=2).astype(np.uint8) for y in (0, 128, 255)]
    with path.open("wb") as file:
        spec = SlideSpec(width=256 * len(tiles), height=256, levels=(1,), codec="jpeg2000-ycc")
        writer = PyramidWriter(file, spec, "Aperio |AppMag = 40|MPP = 0.25")
        stored = [imagecodecs.jpeg2k_encode(t, reversible=True, codecformat="j2k", mct=False) for t in tiles]
        for col, data in enumerate(stored):
            writer.write_tile(0, col, 0, data)
        writer.finish()
    with openslide.OpenSlide(path) as slide:
        expected = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    for col, data in enumerate(stored):
        out = np.zeros((256, 256, 3), np.uint8)
        codecs.decode_jpeg2000(data, out, ycc=True)
        np.testing.assert_array_equal(out, expected[:, 256 * col : 256 * (col + 1)])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda d: b"", "codestream header"),
        (lambda d: bytes(500), "codestream header"),
        (lambda d: d[: len(d) // 2], "JPEG 2000"),
        (lambda d: d[:8] + struct.pack(">I", 1 << 30) + d[12:], "expected 64 x 48"),
        (lambda d: d[:24] + struct.pack(">II", 1, 1) + d[32:], "more than 64 tiles"),
        (lambda d: d[:24] + struct.pack(">II", 0, 1) + d[32:], "more than 64 tiles"),
        (lambda d: d[:42] + b"\x0f" + d[43:], "8 unsigned bits"),
        (lambda d: d[:46] + b"\x02" + d[47:], "subsampled"),
    ],
    ids=["empty", "zeros", "truncated", "huge", "many-tiles", "no-tiles", "16-bit", "subsampled"],
)
def test_bad_jpeg2000_is_refused(picture: Pixels, damage: Callable[[bytes], bytes], why: str) -> None:
    with pytest.raises(CodecError, match=why):
        decoded(codecs.decode_jpeg2000, damage(j2k(picture, irreversible=False)), ycc=False)


@pytest.mark.parametrize("predictor", [1, 2])
@pytest.mark.parametrize("codec", ["deflate", "lzw", "raw"])
def test_lossless_codecs(picture: Pixels, codec: str, predictor: int) -> None:
    pixels = np.diff(picture, axis=1, prepend=np.uint8(0)) if predictor == 2 else picture
    encode = {"deflate": zlib.compress, "lzw": imagecodecs.lzw_encode, "raw": bytes}[codec]
    decode = getattr(codecs, f"decode_{codec}")
    data = bytes(encode(pixels.tobytes()))
    np.testing.assert_array_equal(decoded(decode, data, predictor=predictor), picture)
    for bad in (b"", data[: len(data) // 2], data[2:]):
        with pytest.raises(CodecError):
            decoded(decode, bad, predictor=predictor)
    with pytest.raises(CodecError, match="predictor 3"):
        decoded(decode, data, predictor=3)


@pytest.mark.parametrize("codec", ["deflate", "lzw"])
def test_a_stream_of_another_size_is_refused(picture: Pixels, codec: str) -> None:
    """A stream that would give more than the tile (a decompression bomb) is cut off at the tile, and one that gives
    less is no tile either."""
    encode = {"deflate": zlib.compress, "lzw": imagecodecs.lzw_encode}[codec]
    with pytest.raises(CodecError, match="expected 9216"):
        decoded(getattr(codecs, f"decode_{codec}"), bytes(encode(bytes(1000))))
    if codec == "deflate":
        with pytest.raises(CodecError, match="SPACE"):
            decoded(codecs.decode_deflate, zlib.compress(bytes(1 << 24)))


def test_old_lzw_is_refused() -> None:
    with pytest.raises(CodecError, match="old bit order"):
        decoded(codecs.decode_lzw, b"\x00\x01\x02\x03")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, picture: Pixels) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(MachineError, match="pip install imagecodecs"):
        decoded(codecs.decode_jpeg2000, j2k(picture), ycc=False)


def test_import_is_light() -> None:
    loaded = "[m for m in ('simplejpeg', 'imagecodecs') if m in sys.modules]"
    code = f"import sys, wsi_rt.runtime.slides.codecs; print({loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
