"""Ctrl-C, SIGTERM and SIGHUP: one KeyboardInterrupt, asked for again when it gets lost."""

from __future__ import annotations

import signal
from types import FrameType

_NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_asked = False


def install() -> None:
    """Turn the signals of this process into a KeyboardInterrupt of its main thread; those ignored stay so (nohup,
    background jobs)."""
    for number in _NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def checkpoint() -> None:
    """Raises KeyboardInterrupt when one was asked for and something swallowed it: an import that guards itself with a
    bare `except`, a callback out of C. Long work calls this between its steps and before its result counts."""
    if _asked:
        raise KeyboardInterrupt


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Stop once: a second Ctrl-C would interrupt the clean-up, and leave half a bundle."""
    global _asked
    _asked = True
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
