"""One encoded segment (a TIFF tile, a DICOM frame) -> u8 RGB pixels in a given array.

simplejpeg decodes JPEG: libjpeg-turbo into the array itself, with the accurate DCT and smooth chroma that OpenSlide
uses, and strict: what libjpeg would only warn of is an error, as in OpenSlide. imagecodecs decodes the rest (OpenJPEG,
libdeflate, LZW); its own JPEG decoder takes truncated data silently and is 5 % slower. Both release the GIL.

Every function raises CodecError for data that does not decode to exactly the pixels asked for; `out` then holds
anything. Nothing is allocated from sizes that a segment states.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import MachineError


class CodecError(ValueError):
    """A segment that cannot be decoded: broken, of another size, or of a kind that is not supported."""


_SOI, _EOI, _DHT, _DQT, _APP0, _APP14 = 0xD8, 0xD9, 0xC4, 0xDB, 0xE0, 0xEE
_SOS_MARKER = b"\xff\xda"
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {_DHT, 0xC8, 0xCC}
# libjpeg takes three components for YCbCr after a JFIF marker, and for RGB after Adobe's with transform 0. Without
# either it guesses from the component ids, wrongly for Aperio's RGB slides: so the right marker is put in front.
_JFIF = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_ADOBE_RGB = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
_J2K_START = b"\xff\x4f\xff\x51"  # SOC, SIZ
MAX_HEADER_BYTES = 1 << 16  # of a segment, beside its coded pixels; generous
_MAX_J2K_TILES = 64  # within one segment; each costs OpenJPEG some 5 KB before a pixel is decoded


def _load(name: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise MachineError(
            f"{name} is not installed, expected to decode slides with it; run: pip install {name}"
        ) from error


def library(name: str) -> str:
    """ "name version" of a codec library. Raises MachineError when it is not installed."""
    return f"{name} {_load(name).__version__}"


def decode_jpeg(data: bytes, out: NDArray[np.uint8], *, tables: bytes | None = None, rgb: bool) -> None:
    """Decode a JPEG of three 8-bit components into `out`, u8 [h, w, 3], C-contiguous.

    tables: an abbreviated stream with the quantisation and Huffman tables (TIFF's JPEGTables), or None.
    rgb: the components are R, G, B; else Y, Cb, Cr, whatever the stream's own markers say.
    Raises CodecError; MachineError when simplejpeg is not installed.
    """
    decode = _jpeg_decoder()
    stream = _with_markers(data, out.shape[0], out.shape[1], tables, rgb)
    try:
        decode(stream, "RGB", False, False, 0, 0, 1, out)
    except ValueError as error:
        raise CodecError(f"JPEG: {error}") from error


@lru_cache(maxsize=1)
def _jpeg_decoder():  # type: ignore[no-untyped-def]
    return _load("simplejpeg").decode_jpeg


def _with_markers(data: bytes, height: int, width: int, tables: bytes | None, rgb: bool) -> bytes:
    """The stream with its colour space made explicit and the tables put in; checks kind and size of its frame."""
    end = data.find(_SOS_MARKER)
    while end >= 0:
        head = _with_markers_head(data[:end], height, width, tables, rgb)
        if head is not None:
            return head + data[end:]
        end = data.find(_SOS_MARKER, end + 1)
    raise CodecError("JPEG: no scan")


# The tiles of a slide mostly share their heads (600 bytes): parsing each anew costs 6 us, 4 % of decoding it.
@lru_cache(maxsize=256)
def _with_markers_head(head: bytes, height: int, width: int, tables: bytes | None, rgb: bool) -> bytes | None:
    """`_with_markers` for what stands before the first scan; None if `head` ends inside a segment instead."""
    parts = [_ADOBE_RGB if rgb else _JFIF]
    if tables:
        parts.append(_table_segments(tables))
    at, checked = _first_segment(head), False
    kept_from = at
    while at < len(head):
        marker, length = _segment(head, at)
        if at + 2 + length > len(head):
            return None
        if marker in _FRAMES:
            _check_frame(head[at + 4 : at + 2 + length], height, width)
            checked = True
        elif marker in _OTHER_FRAMES:
            raise CodecError(f"JPEG: coding process 0xFF{marker:02X}, expected baseline or progressive Huffman")
        elif marker in (_APP0, _APP14) and rgb:  # a JFIF marker or another Adobe marker would overrule ours
            parts.append(head[kept_from:at])
            kept_from = at + 2 + length
        at += 2 + length
    if not checked:
        raise CodecError("JPEG: no frame header before the first scan")
    parts.append(head[kept_from:])
    return b"".join(parts)


def _first_segment(data: bytes) -> int:
    if data[:2] != b"\xff\xd8":
        raise CodecError(f"JPEG: starts with 0x{data[:2].hex()}, expected 0xffd8")
    return 2


def _segment(data: bytes, at: int) -> tuple[int, int]:
    """(marker, length with its two bytes) of the segment at `at`."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] in (0x00, 0xFF, _SOI, _EOI):
        raise CodecError("JPEG: no marker segment where one is due")
    length = data[at + 2] << 8 | data[at + 3]
    if length < 2:
        raise CodecError("JPEG: a segment shorter than its length")
    return data[at + 1], length


def _check_frame(frame: bytes, height: int, width: int) -> None:
    if len(frame) < 6:
        raise CodecError("JPEG: a frame header that is too short")
    precision, h, w, components = struct.unpack(">BHHB", frame[:6])
    if (precision, components) != (8, 3):
        raise CodecError(f"JPEG: {components} components of {precision} bits, expected 3 of 8 bits")
    if (h, w) != (height, width):
        raise CodecError(f"JPEG: {w} x {h} px, expected {width} x {height}")


@lru_cache(maxsize=64)
def _table_segments(tables: bytes) -> bytes:
    """The DQT and DHT segments of an abbreviated stream; whatever else it holds ends with it (libjpeg resets it)."""
    at, kept = _first_segment(tables), []
    while tables[at : at + 2] not in (b"\xff\xd9", b""):
        marker, length = _segment(tables, at)
        if at + 2 + length > len(tables):
            raise CodecError("JPEG: tables that end inside a segment")
        if marker in (_DQT, _DHT):
            kept.append(tables[at : at + 2 + length])
        at += 2 + length
    return b"".join(kept)


def decode_jpeg2000(data: bytes, out: NDArray[np.uint8], *, ycc: bool) -> None:
    """Decode a JPEG 2000 codestream of three 8-bit components into `out`, u8 [h, w, 3], C-contiguous.

    ycc: the components are Y, Cb, Cr (Aperio's compression 33003), none of them subsampled; they become RGB by
    OpenSlide's integer formula. The codestream's own colour transform is undone in any case.
    Raises CodecError; MachineError when imagecodecs is not installed.
    """
    imagecodecs = _load("imagecodecs")
    _check_j2k(data, out.shape[0], out.shape[1])
    try:
        imagecodecs.jpeg2k_decode(data, out=out)
    except (ValueError, RuntimeError) as error:  # Jpeg2kError is a RuntimeError
        raise CodecError(f"JPEG 2000: {error}") from error
    if ycc:
        _ycc_to_rgb(out)


def _check_j2k(data: bytes, height: int, width: int) -> None:
    """SIZ before OpenJPEG sees it: it allocates what the header states. ISO/IEC 15444-1 A.5.1."""
    if not data.startswith(_J2K_START) or len(data) < 51:
        raise CodecError("JPEG 2000: does not start with a codestream header")
    xsiz, ysiz, x0, y0, tw, th, tx0, ty0, components = struct.unpack(">8IH", data[8:42])
    if (xsiz - x0, ysiz - y0, components) != (width, height, 3):
        raise CodecError(
            f"JPEG 2000: {xsiz - x0} x {ysiz - y0} px of {components} components, expected {width} x {height} of 3"
        )
    if data[42:51] != b"\x07\x01\x01" * 3:
        raise CodecError("JPEG 2000: components that are subsampled or not of 8 unsigned bits")
    if not tw or not th or -(-(xsiz - tx0) // tw) * -(-(ysiz - ty0) // th) > _MAX_J2K_TILES:
        raise CodecError(f"JPEG 2000: more than {_MAX_J2K_TILES} tiles inside one segment")


@lru_cache(maxsize=1)
def _chroma_tables() -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int32], NDArray[np.int32]]:
    """OpenSlide's tables: red and blue rounded, halves away from zero; green in 16-bit fixed point.

    libjpeg's factors have more digits: its green is one level off at 35 of the 65,536 (Cb, Cr).
    """
    x = np.arange(256) - 128.0

    def rounded(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        return np.copysign(np.floor(np.abs(values) + 0.5), values)

    red, blue = rounded(1.402 * x).astype(np.int16), rounded(1.772 * x).astype(np.int16)
    green_cr, green_cb = rounded(65536 * -0.71414 * x), rounded(65536 * (0.5 - 0.34414 * x))
    return red, blue, green_cr.astype(np.int32), green_cb.astype(np.int32)


def _ycc_to_rgb(pixels: NDArray[np.uint8]) -> None:
    """In place, u8 [h, w, 3]."""
    red, blue, green_cr, green_cb = _chroma_tables()
    luma = pixels[..., 0].astype(np.int16)
    cb, cr = np.ascontiguousarray(pixels[..., 1]), np.ascontiguousarray(pixels[..., 2])
    green = ((green_cr[cr] + green_cb[cb]) >> 16).astype(np.int16)
    for channel, chroma in enumerate((red[cr], green, blue[cb])):
        np.clip(luma + chroma, 0, 255, out=chroma)
        pixels[..., channel] = chroma


def decode_deflate(data: bytes, out: NDArray[np.uint8], *, predictor: int = 1) -> None:
    """Decompress a zlib stream of exactly the bytes of `out`, u8 [h, w, 3], C-contiguous.

    predictor: 1 none, 2 horizontal differences (TIFF 6.0, section 14). Raises CodecError, MachineError.
    """
    _decode_bytes("deflate", "deflate_decode", data, out, predictor)


def decode_lzw(data: bytes, out: NDArray[np.uint8], *, predictor: int = 1) -> None:
    """Decompress TIFF's LZW of exactly the bytes of `out`, u8 [h, w, 3]; see `decode_deflate`.

    Raises CodecError, also for the bit order of before 1988, MachineError.
    """
    if data[:1] == b"\0" and len(data) > 1 and data[1] & 1:
        raise CodecError("LZW: the old bit order, expected TIFF 6.0's")
    _decode_bytes("LZW", "lzw_decode", data, out, predictor)


def decode_raw(data: bytes, out: NDArray[np.uint8], *, predictor: int = 1) -> None:
    """Copy uncompressed RGB into `out`, u8 [h, w, 3]; see `decode_deflate`. Bytes beyond it are ignored."""
    if len(data) < out.nbytes:
        raise CodecError(f"uncompressed: {len(data)} bytes, expected {out.nbytes}")
    out.reshape(-1)[:] = np.frombuffer(data, np.uint8, out.nbytes)
    _undo(predictor, out)


def _decode_bytes(what: str, function: str, data: bytes, out: NDArray[np.uint8], predictor: int) -> None:
    decode = getattr(_load("imagecodecs"), function)
    try:
        written = decode(data, out=out.reshape(-1)).nbytes
    except (ValueError, RuntimeError) as error:
        raise CodecError(f"{what}: {error}") from error
    if written != out.nbytes:
        raise CodecError(f"{what}: {written} bytes of pixels, expected {out.nbytes}")
    _undo(predictor, out)


def _undo(predictor: int, out: NDArray[np.uint8]) -> None:
    if predictor == 2:
        _load("imagecodecs").delta_decode(out, axis=1, out=out)
    elif predictor != 1:
        raise CodecError(f"predictor {predictor}, expected 1 (none) or 2 (horizontal)")
