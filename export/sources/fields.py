"""Values of a configuration file, each checked as it is read: an error names the key and what it holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from wsi_rt.runtime.errors import CheckpointError


class Fields:
    """A configuration object; `label` is how messages name its file.

    A setting is read by one or more spellings of its key: the first is the one messages use when none is given.
    Without a default it must be there. JSON's 16.0, true and "16" are no whole numbers.
    """

    def __init__(self, data: Mapping[str, Any], label: str) -> None:
        self._data, self.label = data, label

    def given(self, *keys: str) -> bool:
        return any(key in self._data for key in keys)

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`."""
        key, value = self._find(keys, default)
        return value if _is_whole(value, least) else self.refuse(key, value, f"a whole number of at least {least}")

    def wholes(self, *keys: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """A non-empty list of whole numbers of at least 1."""
        key, value = self._find(keys, default)
        if not isinstance(value, (list, tuple)) or not value or not all(_is_whole(x, 1) for x in value):
            self.refuse(key, value, "a list of whole numbers of at least 1")
        return tuple(value)

    def triple(self, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Three finite numbers, as mean and std of the colours are."""
        key, value = self._find((key,), default)
        if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(map(_is_number, value)):
            self.refuse(key, value, "three numbers")
        return (float(value[0]), float(value[1]), float(value[2]))

    def positive(self, *keys: str, default: float | None = None) -> float:
        """A number above zero, and finite."""
        key, value = self._find(keys, default)
        if not _is_number(value) or value <= 0:
            self.refuse(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        key, value = self._find((key,), default)
        return value if isinstance(value, bool) else self.refuse(key, value, "true or false")

    def equals(self, key: str, actual: Any, where: str) -> None:
        """Refuse a key that is given and disagrees with `actual`, which `where` says."""
        if key in self._data and (type(self._data[key]) is not type(actual) or self._data[key] != actual):
            self.refuse(key, self._data[key], f"{actual} ({where})")

    def only(self, known: Collection[str], advice: str) -> None:
        unknown = sorted(key for key in self._data if key not in known)
        if unknown:
            told = ", ".join(f"{key} = {self._data[key]!r}" for key in unknown)
            raise CheckpointError(f"{self.label}: {told} not known here, expected some of {sorted(known)}; {advice}")

    def refuse(self, key: str, value: Any, expected: str) -> NoReturn:
        raise CheckpointError(f"{self.label}: {key} = {value!r}, expected {expected}; correct it")

    def _find(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        found = [key for key in keys if key in self._data]
        for other in found[1:]:
            if self._data[other] != self._data[found[0]]:
                self.refuse(other, self._data[other], f"{found[0]} = {self._data[found[0]]!r} again or one of the two")
        if not found and default is None:
            raise CheckpointError(f"{self.label} lacks {keys[0]}; copy it from the published config.json")
        return (found[0], self._data[found[0]]) if found else (keys[0], default)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30  # no NaN
