"""A progress bar on stderr, one per stage; silent when stderr is not a terminal."""

from __future__ import annotations

import sys
from typing import Any

from wsi_rt.runtime.interrupts import checkpoint


class Progress:
    """Context manager around tqdm. `update` takes (stage, done, total); a new stage replaces the bar. It also raises an
    interrupt that got lost."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""
        self._steps = 0

    def update(self, stage: str, done: int, total: int) -> None:
        checkpoint()
        if not sys.stderr.isatty():
            return
        if stage != self._stage or self._bar is None:
            from tqdm import tqdm

            self.close()
            self._bar, self._stage = tqdm(total=total, desc=stage, file=sys.stderr, leave=False), stage
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def step(self, what: str, total: int) -> None:
        """The next of `total` named steps of one bar."""
        self.update("", self._steps, total)
        self._steps += 1
        if self._bar is not None:
            self._bar.set_description(what)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
