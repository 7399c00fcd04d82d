"""What a frame's own stream says about its colours, where that overrules what the instance declares.

Two kinds of wrong declaration are in circulation: JPEG 2000 declared YBR_ICT whose codestream has no colour transform
(conversions of Aperio's 33003; https://github.com/openslide/openslide/issues/772), and JPEG declared RGB whose colour
components are subsampled, which RGB never is (https://github.com/ImagingDataCommons/libdicom/issues/80).
"""

from __future__ import annotations

from wsi_rt.runtime.slides.readers.dicom_instance import JPEG, JPEG2000

_SCAN, _START_OF_DATA = 0xDA, 0x93
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
_COD = 0x52


def holds_ycc(codec: str, photometric: str, first_frame: bytes) -> tuple[bool, str]:
    """Whether the decoded components are Y, Cb, Cr, and a note where the declaration is overruled, else ""."""
    declared_rgb = photometric == "RGB"
    if codec == JPEG:
        if declared_rgb and _is_subsampled(first_frame):
            return True, "JPEG frames are declared RGB, but their colours are subsampled: read as YCbCr"
        return not declared_rgb, ""
    if codec == JPEG2000 and not declared_rgb and has_transform(first_frame) is False:
        return True, f"JPEG 2000 frames are declared {photometric}, but have no colour transform: read as YCbCr"
    return False, ""  # OpenJPEG undoes a codestream's transform by itself


def _segments(data: bytes, last: int) -> list[tuple[int, bytes]]:
    """(marker, payload) of the segments after the first marker, up to marker `last`; [] where they are malformed."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != last:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2:
            return []
        found.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    return found


def _is_subsampled(data: bytes) -> bool:
    """JPEG: the second or third component has fewer samples than the first. ITU-T T.81 B.2.2."""
    for marker, frame in _segments(data, _SCAN):
        if marker in _JPEG_FRAMES and len(frame) >= 15:
            first, *others = (frame[7 + 3 * i] for i in range(3))  # sampling factors, horizontal and vertical
            return any(other != first for other in others)
    return False


def has_transform(data: bytes) -> bool | None:
    """JPEG 2000: the multiple component transform of COD; None where there is no COD. ISO/IEC 15444-1 A.6.1."""
    if data[:2] != b"\xff\x4f":
        return None
    for marker, payload in _segments(data, _START_OF_DATA):
        if marker == _COD and len(payload) >= 5:
            return payload[4] != 0
    return None
