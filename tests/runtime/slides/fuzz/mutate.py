"""Damaged copies of slides: the same (seed, number) gives the same bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

Rng = np.random.Generator

# Sizes, counts and offsets that parsers stumble over.
INTERESTING = (
    0,
    1,
    2,
    3,
    255,
    256,
    65535,
    65536,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    0x7FFFFFFFFFFFFFFF,
    (1 << 64) - 1,
)
MARKERS = tuple(
    bytes((0xFF, code)) for code in (0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xEE, 0x51, 0x52, 0x5C, 0x90, 0x93)
)
TAGS = (254, 256, 257, 258, 259, 262, 270, 277, 278, 282, 284, 317, 322, 323, 324, 325, 347, 530, 34675)


def mutate(data: bytes, rng: Rng) -> tuple[bytes, str]:
    """(damaged copy, what was done to it)."""
    kinds: tuple[tuple[str, Callable[[bytearray, Rng], None], float], ...] = (
        ("flip", _flip, 0.25),
        ("flip-head", _flip_head, 0.15),
        ("truncate", _truncate, 0.1),
        ("header", _header, 0.3),
        ("marker", _marker, 0.1),
        ("block", _block, 0.1),
    )
    name, change, _ = kinds[rng.choice(len(kinds), p=[share for *_, share in kinds])]
    damaged = bytearray(data)
    change(damaged, rng)
    return bytes(damaged), name


def _flip(data: bytearray, rng: Rng) -> None:
    """1 to 64 bits anywhere."""
    for at in rng.integers(0, len(data), 1 << int(rng.integers(0, 7))):
        data[at] ^= 1 << int(rng.integers(0, 8))


def _flip_head(data: bytearray, rng: Rng) -> None:
    """1 to 8 bytes of the first or the last 4 KiB, where headers and directories lie."""
    reach = min(4096, len(data))
    start = 0 if rng.random() < 0.5 else len(data) - reach
    for at in rng.integers(start, start + reach, 1 << int(rng.integers(0, 4))):
        data[at] = int(rng.integers(0, 256))


def _truncate(data: bytearray, rng: Rng) -> None:
    share = rng.random() if rng.random() < 0.7 else 1 - rng.random() ** 4
    del data[int(len(data) * share) :]


def _block(data: bytearray, rng: Rng) -> None:
    """A run of bytes is zeroed, filled with 0xFF, or overwritten by another run of the file."""
    length = min(len(data), 1 << int(rng.integers(1, 15)))
    at, other = rng.integers(0, len(data) - length + 1, 2)
    filler = (bytes(length), b"\xff" * length, bytes(data[other : other + length]))
    data[at : at + length] = filler[rng.integers(0, 3)]


def _marker(data: bytearray, rng: Rng) -> None:
    """A field behind a marker of a JPEG or a JPEG 2000 codestream."""
    marker = MARKERS[rng.integers(0, len(MARKERS))]
    places = []
    at = data.find(marker)
    while at >= 0 and len(places) < 500:
        places.append(at)
        at = data.find(marker, at + 1)
    if not places:
        return _flip(data, rng)
    at = places[rng.integers(0, len(places))] + 2 + int(rng.integers(0, 40))
    width = int(rng.choice((1, 2, 4)))
    _put(data, at, (INTERESTING[rng.integers(0, len(INTERESTING))] & ((1 << 8 * width) - 1)).to_bytes(width, "big"))
    return None


def _header(data: bytearray, rng: Rng) -> None:
    """One to three fields: of TIFF directories where the file has any, else of an image or DICOM header."""
    entries = tiff_entries(bytes(data))
    for _ in range(int(rng.integers(1, 4))):
        value = INTERESTING[rng.integers(0, len(INTERESTING))]
        if rng.random() < 0.3:
            value = int(rng.integers(0, len(data)))  # a place in the file, for offsets and loops
        if not entries:
            width = int(rng.choice((1, 2, 4)))
            _put(
                data,
                int(rng.integers(0, min(len(data), 2500))),
                (value & ((1 << 8 * width) - 1)).to_bytes(width, "little"),
            )
            continue
        wanted = TAGS[rng.integers(0, len(TAGS))]
        some = [entry for entry in entries if entry[1] == wanted] or entries
        at, _, order, big = some[rng.integers(0, len(some))]
        field, code = ((0, "H"), (2, "H"), (4, "Q" if big else "I"), (12 if big else 8, "Q" if big else "I"))[
            rng.choice(4, p=(0.1, 0.15, 0.35, 0.4))
        ]
        width = struct.calcsize(code)
        if width > 2 and field > 4 and rng.random() < 0.3:  # the first element of an array that lies elsewhere
            (target,) = struct.unpack_from(order + code, data, at + field)
            at, field, code, width = min(target, len(data)), 0, "I", 4
        _put(data, at + field, struct.pack(order + code, value & ((1 << 8 * width) - 1)))


def _put(data: bytearray, at: int, value: bytes) -> None:
    value = value[: max(0, len(data) - at)]
    data[at : at + len(value)] = value


def tiff_entries(data: bytes) -> list[tuple[int, int, str, bool]]:
    """(place, tag, byte order, BigTIFF) of every directory entry of a TIFF; none of anything else."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16:
        return []
    (magic,) = struct.unpack_from(order + "H", data, 2)
    big = magic == 43
    if magic not in (42, 43):
        return []
    offset, count_code, size = ("Q", "Q", 20) if big else ("I", "H", 12)
    (at,) = struct.unpack_from(order + offset, data, 8 if big else 4)
    entries: list[tuple[int, int, str, bool]] = []
    seen: set[int] = set()
    try:
        while at and at not in seen:
            seen.add(at)
            (count,) = struct.unpack_from(order + count_code, data, at)
            first = at + struct.calcsize(count_code)
            for entry in range(first, first + min(count, 100) * size, size):
                (tag,) = struct.unpack_from(order + "H", data, entry)
                entries.append((entry, tag, order, big))
            (at,) = struct.unpack_from(order + offset, data, first + count * size)
    except struct.error:
        pass
    return entries
