"""Tiles of many slides without a pause between them: the next slide is opened and searched while one is encoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from wsi_rt.runtime.errors import SlideError, WsiRtError
from wsi_rt.runtime.slides.grid import ReadPlan
from wsi_rt.runtime.slides.prefetch import THREAD_NAME
from wsi_rt.runtime.slides.reader import SlideReader
from wsi_rt.runtime.slides.tiles import TileSource, iter_batches
from wsi_rt.runtime.types import TileBatch, TileGrid


class Chosen(Protocol):
    """An open slide and the tiles to read."""

    @property
    def reader(self) -> SlideReader: ...
    @property
    def plan(self) -> ReadPlan: ...
    @property
    def grid(self) -> TileGrid: ...


ChosenT = TypeVar("ChosenT", bound=Chosen)
# (path, check) -> a context in which the slide is open. `check` takes any arguments, as a progress callback does,
# and raises when the iteration was stopped: call it now and then.
Open = Callable[[Path, Callable[..., None]], AbstractContextManager[ChosenT]]


@dataclass(frozen=True)
class SlideBatch(Generic[ChosenT]):
    """A batch of slide `number` (of the paths given); `last` when none of it follows."""

    number: int
    chosen: ChosenT
    batch: TileBatch
    last: bool


@dataclass(frozen=True)
class FailedSlide:
    """Slide `number` could not be opened, or no tiles chosen on it."""

    number: int
    path: Path
    error: WsiRtError


class _StoppedError(Exception):
    """The iteration was closed while a slide was being prepared."""


def iter_slide_batches(
    paths: Sequence[Path], opened: Open[ChosenT], batch_size: int, threads: int = 2
) -> Generator[SlideBatch[ChosenT] | FailedSlide, None, None]:
    """Yield every slide's tiles in batches, slide after slide in the order given; a batch never mixes slides.

    opened: opens a slide and chooses its tiles, such as `encode_slide.choose_tiles`; runs in a thread of its own, for
    one slide at a time, from when the slide before it begins to be read. A slide that it refuses (WsiRtError) comes as
    a FailedSlide at its turn and the others go on; any other exception ends the iteration. Tiles that cannot be read
    are in the batches' `failures`.

    A slide stays open until the caller asks for what comes after its last batch. Memory: as `iter_tiles`, and what
    `opened` takes for the next slide. Closing the iterator, an exception or KeyboardInterrupt stops the threads and
    closes every slide; preparing stops at its next `check`.
    """
    return _Cohort(paths, opened).run(batch_size, threads)


class _Cohort(Generic[ChosenT]):
    def __init__(self, paths: Sequence[Path], opened: Open[ChosenT]) -> None:
        self._paths = paths
        self._opened = opened
        self._stopped = False
        self._failed: deque[FailedSlide] = deque()
        self._contexts: dict[int, AbstractContextManager[ChosenT]] = {}
        self._taken: deque[tuple[int, ChosenT, TileSource]] = deque()

    def run(self, batch_size: int, threads: int) -> Generator[SlideBatch[ChosenT] | FailedSlide, None, None]:
        with ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME) as pool:
            batches = iter_batches(self._sources(pool), batch_size, threads)
            try:
                for source, batch in batches:
                    number, chosen, _ = next(taken for taken in self._taken if taken[2] is source)
                    yield from self._failed_before(number)
                    last = int(batch.index[-1]) + 1 == len(source.grid)
                    yield SlideBatch(number, chosen, batch, last)
                    del batch
                    if last:
                        self._taken.popleft()
                        self._contexts.pop(number).__exit__(None, None, None)
                yield from self._failed_before(len(self._paths))
            finally:
                self._stopped = True
                batches.close()
                pool.shutdown(wait=True, cancel_futures=True)
                for context in self._contexts.values():
                    context.__exit__(None, None, None)

    def _failed_before(self, number: int) -> Iterator[FailedSlide]:
        while self._failed and self._failed[0].number < number:
            yield self._failed.popleft()

    def _sources(self, pool: ThreadPoolExecutor) -> Iterator[TileSource | Future[ChosenT]]:
        ready: Future[ChosenT] | None = None
        for number, path in enumerate(self._paths):
            ready = ready or pool.submit(self._prepare, number)
            yield ready
            try:
                chosen = ready.result()
                if not len(chosen.grid):
                    raise SlideError(f"{path}: no tiles were chosen, expected at least one")
            except WsiRtError as error:
                self._failed.append(FailedSlide(number, path, error))
                if number in self._contexts:
                    self._contexts.pop(number).__exit__(None, None, None)
                ready = None
                continue
            ready = pool.submit(self._prepare, number + 1) if number + 1 < len(self._paths) else None
            source = TileSource(chosen.reader, chosen.grid, chosen.plan)
            self._taken.append((number, chosen, source))
            yield source

    def _prepare(self, number: int) -> ChosenT:
        self._check()
        context = self._opened(self._paths[number], self._check)
        chosen = context.__enter__()
        self._contexts[number] = context
        return chosen

    def _check(self, *_: object) -> None:
        if self._stopped:
            raise _StoppedError
