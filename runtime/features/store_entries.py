"""Entries of the feature store as files: `<kind>/<2 hex>/<name>.json` and the numbers beside it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsi_rt.runtime.atomic import atomic_write
from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.hashing import sha256_file, sha256_json

ENTRIES, LOCKS, SLIDES = "entries", "locks", "slides"
SUFFIXES = {"tiles": ".h5", "tokens": ".pt"}
MAX_ENTRY_BYTES = 1 << 20
# A file without its entry, or a temporary one, is somebody's unfinished work until it is this old, and rubbish after.
ABANDONED_S = 24 * 3600.0
FORGOTTEN_S = 90 * 24 * 3600.0  # a slide's remembered digest that nobody asked for


@dataclass(frozen=True)
class Entry:
    """One entry. name: SHA-256 of `key`; size, sha256: of the file of numbers; facts: tiles, width, created (s)."""

    name: str
    key: Mapping[str, Any]
    size: int
    sha256: str
    facts: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.key["kind"])

    def path(self, root: Path) -> Path:
        return entry_path(root, self.name).with_suffix(SUFFIXES[self.kind])


def entry_path(root: Path, name: str) -> Path:
    return root / ENTRIES / name[:2] / f"{name}.json"


def load_entry(path: Path) -> Entry | None:
    """None when there is none. Raises FeatureFileError when it is damaged."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_ENTRY_BYTES)
    except OSError:
        return None
    try:
        data = json.loads(text)
        check = data.pop("check")
        entry = Entry(path.stem, data["key"], data["size"], data["sha256"], data["facts"])
        intact = check == sha256_json(data) and sha256_json(data["key"]) == path.stem and entry.kind in SUFFIXES
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise FeatureFileError(f"{path.name} is not as it was written")
    return entry


def store_entry(root: Path, key: Mapping[str, Any], facts: Mapping[str, Any], write: Callable[[Path], None]) -> Entry:
    """`write` the numbers, then the entry that tells of them. Both atomic; an interruption between the two leaves a
    file without entry, which nobody finds and `prune` removes.

    Raises what `write` raises, MachineError, InputError (atomic.py).
    """
    name = sha256_json(key)
    path = entry_path(root, name)
    numbers = path.with_suffix(SUFFIXES[str(key["kind"])])
    write(numbers)
    entry = Entry(name, dict(key), numbers.stat().st_size, sha256_file(numbers), dict(facts))
    data = {"key": entry.key, "size": entry.size, "sha256": entry.sha256, "facts": entry.facts}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**data, "check": sha256_json(data)}, sort_keys=True), "ascii")
    return entry


def drop(root: Path, name: str) -> None:
    """Remove an entry: first what tells of it, so that it is never found half. Whoever reads it reads on (POSIX)."""
    path = entry_path(root, name)
    for file in (path, *(path.with_suffix(s) for s in SUFFIXES.values())):
        with contextlib.suppress(OSError):
            file.unlink()


@dataclass(frozen=True)
class Listed:
    """An entry with what the file system says: used (s since the epoch), bytes on disk of both files."""

    entry: Entry
    used: float
    size_bytes: int


def listed(root: Path) -> list[Listed]:
    """All whole entries, most recently used first; damaged ones are left out."""
    found = []
    for path in _files(root):
        if path.suffix != ".json" or path.name.startswith("."):
            continue
        with contextlib.suppress(OSError, FeatureFileError):
            entry = load_entry(path)
            if entry is not None:
                status = path.stat()
                size = status.st_size + entry.path(root).stat().st_size
                found.append(Listed(entry, status.st_mtime, size))
    return sorted(found, key=lambda e: e.used, reverse=True)


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed and left. rubbish: files without an entry, and damaged entries."""

    entries: int
    rubbish: int
    freed_bytes: int
    left: int
    left_bytes: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def prune(root: Path, *, max_bytes: int | None = None, older_than_s: float | None = None) -> Pruned:
    """Remove entries not used for `older_than_s`, then the least recently used until `max_bytes` hold the rest, and
    rubbish. Safe beside other processes, which then encode again."""
    now, left, total, gone, freed = time.time(), 0, 0, 0, 0
    for item in listed(root):
        too_old = older_than_s is not None and now - item.used >= older_than_s
        if too_old or (max_bytes is not None and total + item.size_bytes > max_bytes):
            drop(root, item.entry.name)
            gone, freed = gone + 1, freed + item.size_bytes
        else:
            left, total = left + 1, total + item.size_bytes
    rubbish, rubbish_bytes = _remove_rubbish(root, now)
    return Pruned(gone, rubbish, freed + rubbish_bytes, left, total)


def _remove_rubbish(root: Path, now: float) -> tuple[int, int]:
    count, freed = 0, 0
    for path in _files(root):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime < ABANDONED_S or _is_whole(path):
                continue
            size = path.stat().st_size
            path.unlink()
            count, freed = count + 1, freed + size
    for path in _files(root, SLIDES):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime >= FORGOTTEN_S:
                path.unlink()
    for path in _files(root, LOCKS):
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime >= ABANDONED_S:
                _remove_lock(path)
    return count, freed


def _remove_lock(path: Path) -> None:
    """Unless somebody holds it: who waits for a removed file would not meet who holds it."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(Timeout, NotImplementedError), FileLock(path, timeout=0, fallback_to_soft=False):
        path.unlink()


def _is_whole(path: Path) -> bool:
    if path.name.startswith("."):  # temporary: atomic.py
        return False
    try:
        entry = load_entry(path.with_suffix(".json"))
    except FeatureFileError:
        return False
    return entry is not None and path.suffix in (".json", SUFFIXES[entry.kind])


def _files(root: Path, part: str = ENTRIES) -> Iterator[Path]:
    for folder, _, names in os.walk(root / part):
        yield from (Path(folder, name) for name in names)
