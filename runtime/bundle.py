"""An engine bundle opened for use: preflight of its files, then engines, decoder and tokenizer on request."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_rt.runtime.errors import EngineMismatchError, InputError
from wsi_rt.runtime.hashing import sha256_file
from wsi_rt.runtime.manifest import EngineManifest, Manifest, load_manifest
from wsi_rt.runtime.threads import resolve_threads

if TYPE_CHECKING:
    from wsi_rt.runtime.engines.base import Engine
    from wsi_rt.runtime.llm.decoder import Decoder
    from wsi_rt.runtime.llm.tokenizer import Tokenizer

STAMP_NAME = ".stamp.json"  # path -> [size, mtime_ns, sha256] of files known to be intact


class Bundle:
    """A checked bundle. `Bundle.open(root)` compares size and mtime of every file with a stamp and hashes
    only files whose stamp is stale (a copied bundle once); `verify_files` hashes everything."""

    def __init__(self, root: Path, manifest: Manifest, threads: int) -> None:
        self.root, self.manifest, self.threads = root, manifest, threads

    @classmethod
    def open(cls, root: str | Path, threads: int | None = None) -> Bundle:
        """Raises InputError when there is no bundle, EngineMismatchError when a file differs from the manifest."""
        root = Path(root)
        manifest = load_manifest(root)
        isa = manifest.build["isa"]
        if isa != platform.machine():
            raise EngineMismatchError(
                f"{root}: built for {isa}, this machine is {platform.machine()}; "
                f"rebuild: {manifest.rebuild_command(root)}"
            )
        _check_files(root, manifest, _read_stamp(root))
        return cls(root, manifest, resolve_threads(threads))

    def verify_files(self) -> None:
        """Hash every file, whatever the stamp says."""
        _check_files(self.root, self.manifest, {})

    def component(self, name: str) -> EngineManifest:
        """Raises InputError when the bundle was built without this component."""
        try:
            return self.manifest.components[name]
        except KeyError:
            have = ", ".join(self.manifest.components)
            raise InputError(
                f"{self.root}: no {name} in this bundle (it has {have}); "
                f"rebuild: {self.manifest.rebuild_command(self.root)}"
            ) from None

    def engine(self, name: str) -> Engine:
        from wsi_rt.runtime.engines.registry import backend

        return backend(self.manifest.target).open_engine(self.root, self.component(name), self.threads)

    def decoder(self) -> Decoder:
        from wsi_rt.runtime.engines.registry import backend

        return backend(self.manifest.target).open_decoder(self.root, self.component("llm"), self.threads)

    def tokenizer(self) -> Tokenizer:
        from wsi_rt.runtime.llm.tokenizer import Tokenizer

        return Tokenizer(self.root / "tokenizer")


def write_stamp(root: Path, manifest: Manifest) -> None:
    """Record that the files are intact as they stand; a bundle that cannot be written to goes without."""
    stamp = {}
    for name, entry in manifest.files.items():
        stat = (root / name).stat()
        stamp[name] = [stat.st_size, stat.st_mtime_ns, entry.sha256]
    temporary = root / f"{STAMP_NAME}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(stamp))
        temporary.replace(root / STAMP_NAME)
    except OSError:
        temporary.unlink(missing_ok=True)


def _read_stamp(root: Path) -> dict[str, list[int | str]]:
    try:
        stamp = json.loads((root / STAMP_NAME).read_text())
        return stamp if isinstance(stamp, dict) else {}
    except (OSError, ValueError):
        return {}


def _check_files(root: Path, manifest: Manifest, stamp: dict[str, list[int | str]]) -> None:
    stale = False
    for name, entry in manifest.files.items():
        path, rebuild = root / name, manifest.rebuild_command(root)
        try:
            stat = path.stat()
        except OSError:
            raise EngineMismatchError(f"{path}: missing from the bundle; rebuild: {rebuild}") from None
        if stat.st_size != entry.size:
            raise EngineMismatchError(
                f"{path}: {stat.st_size} bytes, the manifest says {entry.size}; rebuild: {rebuild}"
            )
        if stamp.get(name) == [stat.st_size, stat.st_mtime_ns, entry.sha256]:
            continue
        stale = True
        if sha256_file(path) != entry.sha256:
            raise EngineMismatchError(f"{path}: edited after the build (digest differs); rebuild: {rebuild}")
    if stale:
        write_stamp(root, manifest)
