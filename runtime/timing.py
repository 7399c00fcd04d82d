"""Wall time per stage, in ms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Adds up the time spent in named stages."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    def add(self, stage: str, elapsed_ms: float) -> None:
        self.ms[stage] = self.ms.get(stage, 0.0) + elapsed_ms

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = perf_counter()
        try:
            yield
        finally:
            self.add(stage, (perf_counter() - started) * 1e3)
