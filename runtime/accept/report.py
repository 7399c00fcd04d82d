"""What was found, and the verdict in plain words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

OnProgress = Callable[[str, int, int], None]  # stage, done, total


class Level(IntEnum):
    """AGREES: as run, within the precision. EXPLAINED: with a named difference. DIFFERS: nothing known explains it."""

    AGREES = 0
    EXPLAINED = 1
    DIFFERS = 2


_WORDS = {
    Level.AGREES: "accept",
    Level.EXPLAINED: "accept with these differences",
    Level.DIFFERS: "do not accept",
}


@dataclass(frozen=True)
class Section:
    """One comparison. differences: what keeps it from AGREES, one clause each; lines: the rest, for people;
    figures: everything, for `--json`."""

    name: str
    level: Level
    differences: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


def verdict(sections: Sequence[Section]) -> tuple[Level, str]:
    """The worst level, and one line: "accept", "accept with these differences: ..." or "do not accept: ..."."""
    level = max(s.level for s in sections)
    told = [d for s in sections if s.level == level for d in s.differences] if level else []
    if level == Level.DIFFERS:  # what is explained is worth knowing as well
        told += [d for s in sections if s.level == Level.EXPLAINED for d in s.differences]
    return level, f"{_WORDS[level]}: {'; '.join(told)}" if told else _WORDS[level]


def to_json(sections: Sequence[Section]) -> dict[str, Any]:
    """The object that `accept --json` prints."""
    level, text = verdict(sections)
    return {
        "verdict": _WORDS[level],
        "text": text,
        **{s.name: {"verdict": _WORDS[s.level], "differences": list(s.differences), **s.figures} for s in sections},
    }


def render(sections: Sequence[Section]) -> str:
    """The report as people read it, the verdict last."""
    lines = [f"{s.name}: {line}" for s in sections for line in s.lines]
    return "\n".join([*lines, verdict(sections)[1]])
