"""An ordered, bounded map over a thread pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
THREAD_NAME = "wsi-rt-read"


def prefetch_map(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int, depth: int
) -> Generator[Result, None, None]:
    """Yield work(item) in the order of `items`, with at most `depth` items begun and not yet taken.

    While the caller holds a result the pool goes on with the others, then stops: memory is bounded
    by `depth` results. An exception of `work` is raised at its item's turn. However the generator
    ends (exhausted, closed, an exception, KeyboardInterrupt), items not begun are dropped and the
    threads are joined, which waits for the items in progress only.
    """
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=THREAD_NAME)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
