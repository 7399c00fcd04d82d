"""An engine bundle opened for use: preflight of its files, then engines, decoder and tokenizer on request."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_rt.runtime.devices import gpus, require_gpu, sm_of
from wsi_rt.runtime.engines import tensorrt_api
from wsi_rt.runtime.engines.machine import NO_GPU, lacking
from wsi_rt.runtime.engines.registry import backend, family_of
from wsi_rt.runtime.errors import EngineMismatchError, InputError
from wsi_rt.runtime.hashing import sha256_file
from wsi_rt.runtime.manifest import FILE_NAME, EngineManifest, Manifest, load_manifest
from wsi_rt.runtime.threads import resolve_threads

if TYPE_CHECKING:
    from wsi_rt.runtime.engines.base import Engine
    from wsi_rt.runtime.llm.decoder import Decoder
    from wsi_rt.runtime.llm.tokenizer import Tokenizer

STAMP_NAME = ".stamp.json"  # path -> [size, mtime_ns, sha256] of files known to be intact
Stamp = Mapping[str, Sequence[int | str]]


class Bundle:
    """A checked bundle, used through one of its targets. `Bundle.open(root)` compares size and mtime of every file
    with a stamp and hashes only files whose stamp is stale (a copied bundle once); `verify_files` hashes everything.

    Components are opened when asked for, from the folder as it then is: what reads them raises EngineMismatchError
    when another bundle was put in its place meanwhile.
    """

    def __init__(self, root: Path, manifest: Manifest, target: str, threads: int, identity: tuple[int, ...]) -> None:
        self.root, self.manifest, self.target, self.threads = root, manifest, target, threads
        self._identity = identity

    @classmethod
    def open(
        cls, root: str | Path, threads: int | None = None, target: str | None = None, to_run: bool = True
    ) -> Bundle:
        """`target`: one of the bundle's (default: the first), with or without the GPU architecture in its name;
        without, this machine's. to_run: False where only files are looked at, and the machine may be any.

        Raises InputError when there is no bundle or no such target, MachineError without the GPU that the target needs,
        EngineMismatchError when a file differs from the manifest or the machine is not the target's. The machine is
        looked at before the files.
        """
        root = Path(root)
        identity = _identity(root)  # before the manifest is read: replaced in between is replaced
        manifest = load_manifest(root)
        bundle = cls(root, manifest, _choose(root, manifest, target), resolve_threads(threads), identity)
        if to_run:
            bundle.require_machine()
        with bundle.unreplaced():
            _check_files(root, manifest, _read_stamp(root))
        return bundle

    def for_target(self, target: str) -> Bundle:
        """The same bundle through another of its targets."""
        return Bundle(self.root, self.manifest, target, self.threads, self._identity)

    def require_machine(self) -> None:
        """Raises MachineError without the GPU that the target needs, EngineMismatchError when it was compiled for
        another machine."""
        for component in self.manifest.components.values():
            if self.target not in component.targets:
                continue
            requires = component.targets[self.target].requires
            flaw = lacking(self.target, requires)
            if flaw == NO_GPU:
                require_gpu(self.target)
            if flaw is not None:
                raise EngineMismatchError(f"{self.root}: {flaw}; {self._rebuild_here('sm' in requires)}")

    def _rebuild_here(self, per_sm: bool) -> str:
        """What makes this target run on this machine. per_sm: it is compiled for GPU architectures."""
        if not per_sm or not gpus():
            return f"rebuild: {self.manifest.rebuild_command(self.root)}"
        here, family = gpus()[0].sm, tensorrt_api.family(self.target)
        if family.ahead_of_time and here not in family.sms:
            return f"{family.name} has no engines for this GPU, use another target: wsi-rt build-engines --target torch"
        others = self.manifest.build.get("sms", ()) if family.ahead_of_time else ()
        return f"rebuild: {self.manifest.rebuild_command(self.root, sms=sorted({*others, here}))}"

    @contextmanager
    def unreplaced(self) -> Iterator[None]:
        """What is read inside is of this bundle; else EngineMismatchError, whatever the mixture led to."""
        self._check_identity()
        try:
            yield
        finally:
            self._check_identity()

    def _check_identity(self) -> None:
        if _identity(self.root) != self._identity:
            raise EngineMismatchError(f"{self.root}: this bundle was replaced while open; open it again")

    def verify_files(self) -> None:
        """Hash every file, whatever the stamp says."""
        with self.unreplaced():
            _check_files(self.root, self.manifest, {})

    def component(self, name: str) -> EngineManifest:
        """Raises InputError when the bundle was built without this component."""
        try:
            return self.manifest.components[name]
        except KeyError:
            have = ", ".join(self.manifest.components)
            if name in self.manifest.source["components"]:
                fix = f"rebuild: {self.manifest.rebuild_command(self.root, everything=True)}"
            else:
                fix = f"its checkpoint, {self.manifest.source['label']}, has none: build from one that has"
            raise InputError(f"{self.root}: no {name} in this bundle (it has {have}); {fix}") from None

    def engine(self, name: str) -> Engine:
        from wsi_rt.runtime.plan_measure import fastest_threads

        with self.unreplaced():
            threads = fastest_threads(self, name)
            return backend(self.target).open_engine(self.root, self.component(name), threads)

    def decoder(self, fast: bool = False) -> Decoder:
        """fast: see Decoder.open."""
        with self.unreplaced():
            return backend(self.target).open_decoder(self.root, self.component("llm"), self.threads, fast)

    def tokenizer(self) -> Tokenizer:
        from wsi_rt.runtime.llm.tokenizer import Tokenizer

        with self.unreplaced():
            return Tokenizer(self.root / "tokenizer")


def _choose(root: Path, manifest: Manifest, asked: str | None) -> str:
    """The bundle's name of the target that was asked for."""
    if asked in manifest.targets:
        return str(asked)
    first = manifest.targets[0]
    family = family_of(first) if asked is None else asked
    of_family = [t for t in manifest.targets if family_of(t) == family]
    if not of_family:
        raise InputError(f"{root}: not built for {asked!r}, expected one of: {', '.join(manifest.targets)}")
    here = [gpu.sm for gpu in gpus()] if len(of_family) > 1 else []
    return next((t for t in of_family if sm_of(t) in here), of_family[0])


def _identity(root: Path) -> tuple[int, ...]:
    """Of the bundle that stands there now: every build writes a new manifest. Empty: none does."""
    try:
        stat = (root / FILE_NAME).stat()
    except OSError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


def stamp_file(path: Path) -> tuple[int, int, str]:
    """Size, mtime_ns and SHA-256, the stat taken first: a write during the hashing leaves the stamp stale."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, sha256_file(path)


def write_stamp(root: Path, stamp: Stamp) -> None:
    """Record that these files are intact; a bundle that cannot be written to goes without."""
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
    known: dict[str, list[int | str]] = {}
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
        known[name] = [stat.st_size, stat.st_mtime_ns, entry.sha256]
        if stamp.get(name) != known[name]:
            known[name] = list(stamp_file(path))
            if known[name][2] != entry.sha256:
                raise EngineMismatchError(f"{path}: edited after the build (digest differs); rebuild: {rebuild}")
    if known != stamp:
        write_stamp(root, known)
