"""Decoded segments (TIFF tiles, DICOM frames) shared by the regions and threads that need them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.slides.codecs import CodecError


class Segment:
    """A borrowed segment. pixels: u8 [h, w, 3]; white where the file has none."""

    __slots__ = ("done", "error", "key", "number", "pixels", "ready", "users")

    def __init__(self, level: int, number: int, pixels: NDArray[np.uint8]) -> None:
        self.key = (level, number)
        self.number = number
        self.pixels = pixels
        self.users = 1
        self.done = False
        self.error = ""
        self.ready = threading.Lock()


class SegmentCache:
    """Decodes each segment once while it is wanted: least recently used out, except those in use; thread-safe.

    With the uses of a level announced, a segment leaves after its last one, which holds about one row of
    segments in row-major reading; else it stays until the room is needed. Two threads that want the
    same segment decode it once: the second waits. Memory: limit_bytes, plus what is in use, plus at most
    SPARE_BYTES of buffers for the next ones (a fresh buffer costs a page fault per 4 KiB, 10 us for 240-px tiles).
    """

    SPARE_BYTES = 16 << 20  # what reading 32 neighbours of 256 px drops before it decodes the next row of tiles

    def __init__(self, limit_bytes: int) -> None:
        self.decoded = 0  # segments decoded since opening, for tests and benchmarks
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._segments: OrderedDict[tuple[int, int], Segment] = OrderedDict()
        self._uses: dict[int, NDArray[np.uint16]] = {}
        self._spare: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def announce(self, level: int, uses: NDArray[np.uint16]) -> None:
        """uses: [segments of the level], how many regions each will serve from now on."""
        with self._lock:
            self._uses = {level: uses}

    def borrow(
        self, level: int, number: int, shape: tuple[int, int, int], decode: Callable[[NDArray[np.uint8]], bool]
    ) -> Segment:
        """The segment, decoded by decode(out) -> False when absent. To be given back. Raises what `decode` raises."""
        key = (level, number)
        with self._lock:
            segment = self._segments.get(key)
            mine = segment is None
            if segment is None:
                segment = self._segments[key] = Segment(level, number, self._take_spare(shape))
                segment.ready.acquire()
            else:
                segment.users += 1
                self._segments.move_to_end(key)
        if mine:
            self._decode(segment, decode)
        elif not segment.done:
            with segment.ready:
                pass
        if segment.error:
            raise CodecError(segment.error)
        return segment

    def give_back(self, segment: Segment, regions: int = 1) -> None:
        """regions: how many of the announced uses it served."""
        with self._lock:
            segment.users -= 1
            uses = self._uses.get(segment.key[0])
            if uses is None:
                return
            left = max(0, int(uses[segment.number]) - regions)
            uses[segment.number] = left
            if not left and not segment.users and self._segments.get(segment.key) is segment:
                self._drop(segment)

    def clear(self) -> None:
        with self._lock:
            self._segments.clear()
            self._spare.clear()
            self._held_bytes = 0

    def _decode(self, segment: Segment, decode: Callable[[NDArray[np.uint8]], bool]) -> None:
        try:
            if not decode(segment.pixels):
                segment.pixels[:] = 255
        except BaseException as error:
            with self._lock:
                segment.error = str(error) or type(error).__name__
                del self._segments[segment.key]
                self._keep_spare(segment.pixels)
            raise
        else:
            with self._lock:
                self.decoded += 1
                self._held_bytes += segment.pixels.nbytes
                if self._held_bytes > self._limit_bytes:
                    self._make_room()
        finally:
            segment.done = True
            segment.ready.release()

    def _make_room(self) -> None:
        for segment in list(self._segments.values()):
            if segment.done and not segment.users:
                self._drop(segment)
                if self._held_bytes <= self._limit_bytes:
                    return

    def _drop(self, segment: Segment) -> None:
        del self._segments[segment.key]
        self._held_bytes -= segment.pixels.nbytes
        self._keep_spare(segment.pixels)

    def _take_spare(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        while self._spare:
            buffer = self._spare.pop()
            if buffer.shape == shape:
                return buffer
        return np.empty(shape, np.uint8)

    def _keep_spare(self, buffer: NDArray[np.uint8]) -> None:
        if (len(self._spare) + 1) * buffer.nbytes <= self.SPARE_BYTES:
            self._spare.append(buffer)
