"""Decoded segments: once each, bounded, shared by threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_rt.runtime.slides.codecs import CodecError
from wsi_rt.runtime.slides.readers.segment_cache import Segment, SegmentCache

SHAPE = (16, 16, 3)
BYTES = 16 * 16 * 3


Decode = Callable[[int, NDArray[np.uint8]], bool]


def fill(value: int, calls: list[int] | None = None) -> Decode:
    def decode(number: int, out: NDArray[np.uint8]) -> bool:
        if calls is not None:
            calls.append(value)
        out[:] = value
        return True

    return decode


@contextmanager
def borrowed(
    cache: SegmentCache,
    number: int,
    decode: Decode,
    *,
    regions: int = 1,
    level: int = 0,
    shape: tuple[int, int, int] = SHAPE,
) -> Iterator[Segment]:
    loan = cache.borrow(level, [number], [regions], shape, decode)
    yield next(loan)[1]
    assert next(loan, None) is None


def use(cache: SegmentCache, number: int, calls: list[int]) -> int:
    with borrowed(cache, number, fill(number, calls)) as segment:
        return int(segment.pixels[0, 0, 0])


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
    with borrowed(cache, 1, fill(1, calls)) as first:
        for number in range(2, 8):
            use(cache, number, calls)
        assert (first.pixels == 1).all()


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
    with borrowed(cache, 0, fill(9), regions=2):
        pass
    assert cache._held_bytes == BYTES
    with borrowed(cache, 0, fill(9)):
        pass
    assert cache._held_bytes == 0


def test_an_absent_segment_is_white() -> None:
    with borrowed(SegmentCache(1 << 20), 0, lambda number, out: False) as segment:
        assert (segment.pixels == 255).all()


def test_two_threads_decode_it_once() -> None:
    cache, calls, begun = SegmentCache(1 << 20), [], threading.Event()

    def slow(number: int, out: NDArray[np.uint8]) -> bool:
        begun.set()
        time.sleep(0.1)
        return fill(7, calls)(number, out)

    seen: list[int] = []

    def read() -> None:
        with borrowed(cache, 0, slow) as segment:
            seen.append(int(segment.pixels.max()))

    first = threading.Thread(target=read)
    first.start()
    begun.wait()
    read()  # waits for the first
    first.join()
    assert (seen, calls) == ([7, 7], [7])


def test_what_another_thread_decodes_comes_last() -> None:
    """Neighbours share the segment between them: the first one's last, the second one's first."""
    cache, begun, go, order = SegmentCache(1 << 20), threading.Event(), threading.Event(), []

    def slow(number: int, out: NDArray[np.uint8]) -> bool:
        begun.set()
        assert go.wait(10)
        return fill(number)(number, out)

    def first() -> None:
        for _ in cache.borrow(0, [0, 1], [1, 1], SHAPE, slow):
            pass

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    for i, segment in cache.borrow(0, [1, 2, 3], [1, 1, 1], SHAPE, lambda n, out: fill(n)(n, out)):
        order.append((i, int(segment.pixels.max())))
        if i == 2:
            go.set()
    thread.join()
    assert order == [(1, 2), (2, 3), (0, 1)]
    assert cache.decoded == 4


def test_a_failure_reaches_those_who_wait_and_is_not_kept() -> None:
    cache, begun, errors = SegmentCache(1 << 20), threading.Event(), []

    def fail(number: int, out: NDArray[np.uint8]) -> bool:
        begun.set()
        time.sleep(0.1)
        raise CodecError("broken")

    def read() -> None:
        with borrowed(cache, 0, fail) as segment:
            errors.append(str(segment.error))

    first = threading.Thread(target=read)
    first.start()
    begun.wait()
    read()
    first.join()
    assert errors == ["broken", "broken"]
    assert use(cache, 0, []) == 0  # tried anew


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_reading_that_ends_halfway_holds_nobody_up(error: type[BaseException]) -> None:
    cache = SegmentCache(1 << 20)

    def stop(number: int, out: NDArray[np.uint8]) -> bool:
        if number == 1:
            waiting.start()
            time.sleep(0.1)
            raise error
        return fill(number)(number, out)

    seen: list[str] = []
    waiting = threading.Thread(
        target=lambda: seen.extend(str(s.error) for _, s in cache.borrow(0, [2], [1], SHAPE, stop))
    )
    with pytest.raises(error):
        list(cache.borrow(0, [0, 1, 2], [1, 1, 1], SHAPE, stop))
    waiting.join(10)
    assert seen == ["reading was given up"]
    assert [use(cache, n, []) for n in (0, 1, 2)] == [0, 1, 2]
    assert cache._held_bytes == 3 * BYTES


def test_many_threads_many_segments() -> None:
    cache, wrong = SegmentCache(6 * BYTES), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            numbers = rng.choice(20, rng.integers(1, 5), replace=False).tolist()
            loan = cache.borrow(0, numbers, [1] * len(numbers), SHAPE, lambda n, out: fill(n)(n, out))
            wrong.extend(numbers[i] for i, segment in loan if not (segment.pixels == numbers[i]).all())

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
    for number in (1, 2):
        with borrowed(cache, number, fill(number)):
            pass
    with borrowed(cache, 3, fill(3), level=1, shape=shape) as third:
        assert third.pixels.shape == shape
        assert (third.pixels == 3).all()
