"""Decoded segments (TIFF tiles, DICOM frames) shared by the regions and threads that need them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.slides.codecs import CodecError

# (segment number, u8 [h, w, 3] to fill) -> False when the file has none
Decode = Callable[[int, NDArray[np.uint8]], bool]
NO_PIXELS = np.empty((0, 0, 3), np.uint8)


class Segment:
    """A borrowed segment. pixels: u8 [h, w, 3], white where the file has none; error: why there are none."""

    __slots__ = ("done", "error", "key", "pixels", "ready", "users")

    def __init__(self, key: tuple[int, int]) -> None:
        self.key = key
        self.pixels = NO_PIXELS
        self.error: Exception | None = None
        self.users = 0
        self.done = False
        self.ready = threading.Lock()
        self.ready.acquire()  # until it is done


class SegmentCache:
    """Decodes each segment once while it is wanted: least recently used out, except those in use; thread-safe.

    With the uses of a level announced, a segment leaves after its last one, which holds about one row of
    segments in row-major reading; else it stays until the room is needed. Two threads that want the
    same segment decode it once: the second waits. Memory: limit_bytes, plus what is in use; buffers serve again, and go
    when segments of another shape are asked for or the cache is cleared.
    """

    # Buffers are cut from blocks of this size: from 4 MiB on, numpy asks for huge pages, 3 % of reading 240-px tiles.
    BLOCK_BYTES = 8 << 20

    def __init__(self, limit_bytes: int) -> None:
        self.decoded = 0  # segments decoded since opening, for tests and benchmarks
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._segments: OrderedDict[tuple[int, int], Segment] = OrderedDict()
        self._uses: dict[int, memoryview] = {}
        self._spare: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def announce(self, level: int, uses: NDArray[np.uint16]) -> None:
        """uses: [segments of the level], how many regions each will serve from now on."""
        with self._lock:
            self._uses = {level: uses.data}

    def borrow(
        self, level: int, numbers: Sequence[int], regions: Sequence[int], shape: tuple[int, int, int], decode: Decode
    ) -> Iterator[tuple[int, Segment]]:
        """Yields (i, segment numbers[i]) when it is decoded: in order, but those that another thread is decoding last,
        since it may be on its way to them. Each stays as it is until the iterator ends or is closed.

        regions[i]: how many of the announced uses it serves. What `decode` raises as CodecError or OSError is in the
        segment's `error`, for every thread that waited for it; the next to ask tries again.
        """
        segments, mine = self._claim(level, numbers)
        elsewhere: list[int] = []
        try:
            for i, segment in enumerate(segments):
                if mine[i]:
                    self._fill(segment, shape, decode)
                elif not segment.done:
                    elsewhere.append(i)
                    continue
                yield i, segment
            for i in elsewhere:
                with segments[i].ready:
                    pass
                yield i, segments[i]
        finally:
            self._give_back(level, segments, mine, regions)

    def clear(self) -> None:
        with self._lock:
            self._segments.clear()
            self._spare.clear()
            self._held_bytes = 0

    def _claim(self, level: int, numbers: Sequence[int]) -> tuple[list[Segment], list[bool]]:
        """The segments, and which of them the caller is to decode."""
        segments, mine = [], []
        with self._lock:
            for number in numbers:
                key = (level, number)
                segment = self._segments.get(key)
                mine.append(segment is None)
                if segment is None:
                    segment = self._segments[key] = Segment(key)
                else:
                    self._segments.move_to_end(key)
                segment.users += 1
                segments.append(segment)
        return segments, mine

    def _fill(self, segment: Segment, shape: tuple[int, int, int], decode: Decode) -> None:
        pixels = self._take_buffer(shape)
        try:
            if not decode(segment.key[1], pixels):
                pixels[:] = 255
            segment.pixels = pixels
        except (CodecError, OSError) as error:
            segment.error = error
            self._spare.append(pixels)
        segment.done = True
        segment.ready.release()

    def _give_back(self, level: int, segments: Sequence[Segment], mine: Sequence[bool], regions: Sequence[int]) -> None:
        with self._lock:
            uses = self._uses.get(level)
            for segment, owned, served in zip(segments, mine, regions, strict=True):
                segment.users -= 1
                if owned:
                    self._settle(segment)
                if uses is None:
                    continue
                number = segment.key[1]
                left = uses[number] = max(0, uses[number] - served)
                if not left:
                    self._drop(segment)
            if self._held_bytes > self._limit_bytes:
                self._make_room()

    def _settle(self, segment: Segment) -> None:
        """What its decoder leaves behind: a segment that is held, or none."""
        if not segment.done:  # its reading ended before it came to it
            segment.error, segment.done = CodecError("reading was given up"), True
            segment.ready.release()
        if segment.error is None:
            self.decoded += 1
            self._held_bytes += segment.pixels.nbytes
        elif self._segments.get(segment.key) is segment:
            del self._segments[segment.key]

    def _make_room(self) -> None:
        for segment in list(self._segments.values()):
            self._drop(segment)
            if self._held_bytes <= self._limit_bytes:
                return

    def _drop(self, segment: Segment) -> None:
        """Unless somebody uses it, or is decoding it."""
        if segment.users or not segment.done or self._segments.get(segment.key) is not segment:
            return
        del self._segments[segment.key]
        self._held_bytes -= segment.pixels.nbytes
        self._spare.append(segment.pixels)

    def _take_buffer(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        with self._lock:
            if self._spare and self._spare[-1].shape != shape:
                self._spare.clear()
            if not self._spare:
                count = max(1, self.BLOCK_BYTES // int(np.prod(shape)))
                self._spare.extend(np.empty((count, *shape), np.uint8))
            return self._spare.pop()
