"""Decoded segments: once each, bounded, shared by threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_rt.runtime.slides.codecs import CodecError
from wsi_rt.runtime.slides.readers.segment_cache import SegmentCache

SHAPE = (16, 16, 3)
BYTES = 16 * 16 * 3


def fill(value: int, calls: list[int] | None = None) -> Callable[[NDArray[np.uint8]], bool]:
    def decode(out: NDArray[np.uint8]) -> bool:
        if calls is not None:
            calls.append(value)
        out[:] = value
        return True

    return decode


def use(cache: SegmentCache, number: int, calls: list[int]) -> int:
    segment = cache.borrow(0, number, SHAPE, fill(number, calls))
    value = int(segment.pixels[0, 0, 0])
    cache.give_back(segment)
    return value


def test_the_least_recently_used_goes_first() -> None:
    cache, calls = SegmentCache(3 * BYTES), []
    assert [use(cache, n, calls) for n in (1, 2, 3, 1, 4)] == [1, 2, 3, 1, 4]
    assert calls == [1, 2, 3, 4]
    assert [use(cache, n, calls) for n in (1, 3, 4)] == [1, 3, 4]
    assert calls == [1, 2, 3, 4]  # 2 went
    use(cache, 2, calls)
    assert calls == [1, 2, 3, 4, 2]


def test_what_is_borrowed_stays_whole() -> None:
    cache, calls = SegmentCache(BYTES), []
    first = cache.borrow(0, 1, SHAPE, fill(1, calls))
    for number in range(2, 8):
        use(cache, number, calls)
    assert (first.pixels == 1).all()
    cache.give_back(first)


def test_announced_uses_end_its_stay() -> None:
    cache, calls = SegmentCache(1 << 20), []
    cache.announce(0, np.array([2, 1, 0], np.uint16))
    use(cache, 0, calls)
    use(cache, 1, calls)
    use(cache, 0, calls)
    assert calls == [0, 1]
    assert cache._held_bytes == 0
    use(cache, 0, calls)  # more often than announced: decoded again
    assert calls == [0, 1, 0]


def test_one_visit_may_serve_several_announced_regions() -> None:
    cache = SegmentCache(1 << 20)
    cache.announce(0, np.array([3], np.uint16))
    segment = cache.borrow(0, 0, SHAPE, fill(9))
    cache.give_back(segment, regions=2)
    assert cache._held_bytes == BYTES
    cache.give_back(cache.borrow(0, 0, SHAPE, fill(9)))
    assert cache._held_bytes == 0


def test_an_absent_segment_is_white() -> None:
    cache = SegmentCache(1 << 20)
    assert (cache.borrow(0, 0, SHAPE, lambda out: False).pixels == 255).all()


def test_two_threads_decode_it_once() -> None:
    cache, calls, begun = SegmentCache(1 << 20), [], threading.Event()

    def slow(out: NDArray[np.uint8]) -> bool:
        begun.set()
        time.sleep(0.1)
        return fill(7, calls)(out)

    seen: list[int] = []
    first = threading.Thread(target=lambda: seen.append(int(cache.borrow(0, 0, SHAPE, slow).pixels.max())))
    first.start()
    begun.wait()
    seen.append(int(cache.borrow(0, 0, SHAPE, slow).pixels.max()))  # waits for the first
    first.join()
    assert (seen, calls) == ([7, 7], [7])


def test_a_failure_reaches_those_who_wait_and_is_not_kept() -> None:
    cache, begun, errors = SegmentCache(1 << 20), threading.Event(), []

    def fail(out: NDArray[np.uint8]) -> bool:
        begun.set()
        time.sleep(0.1)
        raise CodecError("broken")

    def borrow() -> None:
        try:
            cache.borrow(0, 0, SHAPE, fail)
        except CodecError as error:
            errors.append(str(error))

    first = threading.Thread(target=borrow)
    first.start()
    begun.wait()
    borrow()
    first.join()
    assert errors == ["broken", "broken"]
    assert use(cache, 0, []) == 0  # tried anew


def test_many_threads_many_segments() -> None:
    cache, wrong = SegmentCache(6 * BYTES), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in rng.integers(0, 20, 400).tolist():
            segment = cache.borrow(0, number, SHAPE, fill(number))
            if not (segment.pixels == number).all():
                wrong.append(number)
            cache.give_back(segment)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache._held_bytes <= 6 * BYTES
    assert cache._held_bytes == sum(s.pixels.nbytes for s in cache._segments.values())


@pytest.mark.parametrize("shape", [SHAPE, (8, 8, 3)], ids=["same", "other"])
def test_buffers_serve_again_only_for_their_shape(shape: tuple[int, int, int]) -> None:
    cache = SegmentCache(0)
    first = cache.borrow(0, 1, SHAPE, fill(1))
    cache.give_back(first)
    cache.give_back(cache.borrow(0, 2, SHAPE, fill(2)))
    third = cache.borrow(1, 3, shape, fill(3))
    assert third.pixels.shape == shape
    assert (third.pixels == 3).all()
