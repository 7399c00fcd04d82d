"""The feature store: tile features and slide tokens of slides that were encoded before, found by what made them.

An entry's name is the SHA-256 of its key: slide digest, reader, grid, encoder weights, precision; of tokens the
position divisor and the slide encoder as well. So a changed slide, tissue rule or checkpoint finds nothing, and nothing
has to be invalidated. Beside the numbers (`.h5` as TRIDENT has them, `.pt` as WSI-LLaVA publishes them) stands
`<name>.json`, written last: it makes the entry exist, and has the file's size and SHA-256. No name or path of a slide
is stored, nor anything out of its metadata but size and resolution.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wsi_rt.runtime.atomic import plain_os_error
from wsi_rt.runtime.errors import FeatureFileError, WsiRtError
from wsi_rt.runtime.features.slide_digest import OnBytes, SlideDigest, digest_slide
from wsi_rt.runtime.features.slide_tokens import read_slide_tokens, write_slide_tokens
from wsi_rt.runtime.features.store_entries import LOCKS, SLIDES, Entry, drop, entry_path, load_entry, prune, store_entry
from wsi_rt.runtime.features.store_place import MAX_BYTES, default_root
from wsi_rt.runtime.features.tile_features import read_tile_features, write_tile_features
from wsi_rt.runtime.hashing import sha256_json
from wsi_rt.runtime.types import Provenance, SlideTokens, TileFeatures, TileGrid

if TYPE_CHECKING:
    from filelock import FileLock

# Changed whenever the pixels that the tile encoder gets, or what is done with them, change for equal keys.
REVISION = 1


@dataclass(frozen=True)
class TilesKey:
    """What tile features depend on. slide: digest of all its bytes; reader: name and version; grid: `grid_digest`;
    encoder: weights of the tile encoder; precision: the compiled one's."""

    slide: str
    reader: str
    grid: str
    encoder: str
    precision: str
    kind: Literal["tiles"] = "tiles"
    revision: int = REVISION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TokensKey:
    """What slide tokens depend on. position_tile: divisor of the position grid, level-0 px; encoder: weights of the
    slide encoder."""

    tiles: TilesKey
    position_tile: int
    encoder: str
    precision: str
    kind: Literal["tokens"] = "tokens"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Key = TilesKey | TokensKey


def grid_digest(grid: TileGrid, reads: Mapping[str, Any]) -> str:
    """Of which tiles, in which order, and how they are read (`reads`: level, read_px, resample ...)."""
    xy0 = hashlib.sha256(np.ascontiguousarray(grid.xy0, "<i8").tobytes()).hexdigest()
    return sha256_json(
        {"xy0": xy0, "patch_size_level0": grid.patch_size_level0, "order": grid.order, "reads": dict(reads)}
    )


class FeatureStore:
    """Entries under `root`; may be shared by processes and machines. It never fails a caller: what cannot be read or
    kept is told in `notes`, which `take_notes` empties.

    max_bytes: of all entries; the least recently used ones go when a new one needs the room.
    """

    def __init__(self, root: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.root = root or default_root()
        self.max_bytes = max_bytes
        self.notes: list[str] = []

    def take_notes(self) -> tuple[str, ...]:
        notes, self.notes = tuple(dict.fromkeys(self.notes)), []
        return notes

    def require_usable(self) -> None:
        """For a folder that was asked for by name. Raises MachineError, InputError."""
        try:
            self._make(self.root)
            probe = self.root / f".{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise plain_os_error(error, self.root) from error

    def digest(self, files: Sequence[Path], on_bytes: OnBytes = lambda done, total: None) -> SlideDigest:
        """Raises SlideError."""
        return digest_slide(files, self.root / SLIDES, on_bytes)

    def get_tiles(self, key: TilesKey, grid: TileGrid) -> TileFeatures | None:
        """The features of that key, as they were put, with `grid` (the key holds its digest)."""
        found = self._find(key)
        if found is None:
            return None
        entry, path = found
        try:
            features = read_tile_features(path, sort=False)
        except WsiRtError as error:
            self._dropped(entry, error)
            return None
        same = np.array_equal(features.grid.xy0, grid.xy0)
        if features.provenance.digest != entry.sha256 or not same:
            self._dropped(entry, None)
            return None
        self._used(entry)
        return TileFeatures(features.x, grid, _as_made(features.provenance))

    def put_tiles(self, key: TilesKey, features: TileFeatures) -> None:
        """Kept for `get_tiles`, or a note why not."""
        facts = {"tiles": len(features.grid), "width": features.x.shape[1]}
        self._keep(key, features.x.nbytes, facts, lambda path: write_tile_features(path, features))

    def get_tokens(self, key: TokensKey) -> SlideTokens | None:
        found = self._find(key)
        if found is None:
            return None
        entry, path = found
        try:
            tokens = read_slide_tokens(path)
        except WsiRtError as error:
            self._dropped(entry, error)
            return None
        if tokens.provenance.digest != entry.sha256:
            self._dropped(entry, None)
            return None
        self._used(entry)
        return replace(tokens, provenance=_as_made(tokens.provenance), notes=tuple(entry.facts.get("notes", ())))

    def put_tokens(self, key: TokensKey, tokens: SlideTokens, tiles: int) -> None:
        facts = {"tiles": tiles, "width": tokens.tokens.shape[1], "notes": list(tokens.notes)}
        self._keep(key, tokens.tokens.nbytes, facts, lambda path: write_slide_tokens(path, tokens))

    @contextlib.contextmanager
    def lock(self, key: Key, on_wait: Callable[[], None] = lambda: None) -> Iterator[bool]:
        """Hold `key` alone among all processes; yields whether another one had to be waited for.

        The operating system holds the lock (flock), so it goes with the process however that ends. Where there is
        none, work is done twice at worst: entries are written atomically.
        """
        waited = False

        def wait() -> None:
            nonlocal waited
            waited = True
            on_wait()

        held = self._acquire(self.root / LOCKS / f"{sha256_json(key.to_json())}.lock", wait)
        try:
            yield waited
        finally:
            if held is not None:
                held.release()

    def _acquire(self, path: Path, wait: Callable[[], None]) -> FileLock | None:
        from filelock import FileLock, Timeout

        lock = FileLock(path, thread_local=False, fallback_to_soft=False)
        try:
            self._make(path.parent)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                wait()
                lock.acquire(poll_interval=0.2)
        except (OSError, NotImplementedError) as error:
            self.notes.append(f"the cache cannot be locked ({error}): two runs may encode the same slide")
            return None
        return lock

    def _find(self, key: Key) -> tuple[Entry, Path] | None:
        data = key.to_json()
        name = sha256_json(data)
        try:
            entry = load_entry(entry_path(self.root, name))
        except FeatureFileError as error:
            self.notes.append(f"a damaged cache entry was dropped ({error})")
            drop(self.root, name)
            return None
        if entry is None:
            return None
        if entry.key != data or not entry.path(self.root).is_file():
            self._dropped(entry, None)
            return None
        return entry, entry.path(self.root)

    def _dropped(self, entry: Entry, error: Exception | None) -> None:
        """Another process may have removed it meanwhile: then there is nothing to tell."""
        if entry.path(self.root).exists():
            reason = f": {error}" if error else " (its SHA-256 does not match)"
            self.notes.append(f"a damaged cache entry was dropped{reason}")
        drop(self.root, entry.name)

    def _used(self, entry: Entry) -> None:
        with contextlib.suppress(OSError):
            os.utime(entry_path(self.root, entry.name))

    def _keep(self, key: Key, size_bytes: int, facts: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        if size_bytes > self.max_bytes:
            self.notes.append(f"not kept in the cache: {size_bytes} bytes, which holds at most {self.max_bytes}")
            return
        data = key.to_json()
        try:
            self._make(entry_path(self.root, sha256_json(data)).parent)
            store_entry(self.root, data, {**facts, "created": int(time.time())}, write)
        except (WsiRtError, OSError, MemoryError) as error:
            drop(self.root, sha256_json(data))
            self.notes.append(f"not kept in the cache: {error}")
            return
        prune(self.root, max_bytes=self.max_bytes)

    def _make(self, folder: Path) -> None:
        """For this user alone: features are made of patients' slides."""
        if folder.is_dir():
            return
        if not self.root.is_dir():
            self.root.mkdir(parents=True, mode=0o700, exist_ok=True)
            # https://bford.info/cachedir: backups leave such a folder out.
            (self.root / "CACHEDIR.TAG").write_bytes(b"Signature: 8a477f597d28d172789f06886806bc55\n")
        folder.mkdir(parents=True, exist_ok=True)


def _as_made(provenance: Provenance) -> Provenance:
    """The provenance before it was written: files move the maker's digest to `source_digest` (stamp.py)."""
    settings = dict(provenance.settings)
    return Provenance(provenance.maker, settings.pop("source_digest", ""), settings)
