"""`manifest.json`: what an engine bundle holds, what made it, and how to tell that it is intact."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsi_rt.runtime.errors import EngineMismatchError, InputError
from wsi_rt.runtime.hashing import sha256_json

SCHEMA = 1
FILE_NAME = "manifest.json"
COMPONENTS = ("tile_encoder", "slide_encoder", "projector", "llm")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `dims` are sizes, or names of symbolic dimensions; `dtype` as numpy writes it."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class EngineManifest:
    """One component of a bundle.

    portable, engine: graph role ("model", or "embed" and "decoder") -> file, relative to the bundle.
    weights_dir: folder that the engine files' external weights are relative to.
    profile: symbolic dimension -> (min, opt, max). check: stored input and fp32 reference output.
    parity: how far the engine was from the reference, and the gate. digest: of all its files.
    """

    name: str
    precision: str
    config: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: Mapping[str, tuple[int, int, int]]
    portable: Mapping[str, str]
    engine: Mapping[str, str]
    weights_dir: str
    check: str
    parity: Mapping[str, Any]
    digest: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineManifest:
        specs = {
            key: tuple(TensorSpec(s["name"], s["dtype"], tuple(s["dims"])) for s in data[key])
            for key in ("inputs", "outputs")
        }
        profile = {dim: (low, opt, high) for dim, (low, opt, high) in data["profile"].items()}
        return cls(**{**data, **specs, "profile": profile})


@dataclass(frozen=True)
class FileEntry:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole bundle. `source` tells the checkpoint (label, digest, synthetic); `build` the settings and
    toolchain; `prompt` and `generation` are the defaults `ask` starts from."""

    schema: int
    version: str
    target: str
    source: Mapping[str, Any]
    build: Mapping[str, Any]
    components: Mapping[str, EngineManifest]
    tokenizer: Mapping[str, Any]
    tiles: Mapping[str, Any]
    generation: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {**data, "digest": sha256_json(json.loads(json.dumps(data)))}

    def rebuild_command(self, root: Path) -> str:
        """What builds this bundle again where it stands."""
        return f"wsi-rt build-engines {self.source['arguments']} --out {shlex.quote(str(root))} --force"


def load_manifest(root: Path) -> Manifest:
    """Read and check the manifest itself (not the files it lists).

    Raises InputError when `root` is no bundle, EngineMismatchError when the manifest was edited, is
    damaged, or has a schema this version does not read.
    """
    path = root / FILE_NAME
    build = f"build one: wsi-rt build-engines --checkpoint synthetic:nano --out {root}"
    if not root.is_dir():
        raise InputError(f"{root}: no engine bundle there; {build}")
    if not path.is_file():
        raise InputError(f"{root}: a folder without {FILE_NAME}, expected an engine bundle; {build}")
    try:
        data = json.loads(path.read_text())
        digest = data.pop("digest")
        schema = int(data["schema"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise EngineMismatchError(f"{path}: damaged ({e!r}); rebuild with wsi-rt build-engines ... --force") from e
    if schema != SCHEMA:
        raise EngineMismatchError(
            f"{path}: schema {schema}, this wsi-rt reads {SCHEMA}; rebuild it, or use the wsi-rt {data.get('version')}"
        )
    if digest != sha256_json(data):
        raise EngineMismatchError(f"{path}: edited after the build (its digest does not match); rebuild with --force")
    stored = data["components"]
    components = {n: EngineManifest.from_json(stored[n]) for n in COMPONENTS if n in stored}
    files = {name: FileEntry(**f) for name, f in data["files"].items()}
    return Manifest(**{**data, "components": components, "files": files})
