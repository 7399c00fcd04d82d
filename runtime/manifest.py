"""`manifest.json`: what an engine bundle holds, what made it, and how to tell that it is intact."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from wsi_rt.runtime.atomic import is_vacant
from wsi_rt.runtime.errors import EngineMismatchError, InputError
from wsi_rt.runtime.hashing import sha256_json

SCHEMA = 4
READS = (3, 4)  # 3: before targets that need a GPU; every one of its fields is still there
NOT_RUN = "not run: "  # begins what a parity report says of an engine that the building machine could not run
FILE_NAME = "manifest.json"
COMPONENTS = ("tile_encoder", "slide_encoder", "projector", "llm")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `dims` are sizes, or names of symbolic dimensions; `dtype` as numpy writes it."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Compiled:
    """A component as one target runs it.

    graphs: role ("model", or "embed" and "decoder") -> file, relative to the bundle. weights_dir: folder that
    their external weights are relative to. formats: how quantised Linear layers are stored (bits, block, symmetric)
    and how many. parity: how far the "engine" was from the reference ("not run: ..." where the machine that built it
    could not), the worst of its "layers", the "gate", and of `source` how far that was.
    requires: what the machine must have, such as {"isa": "x86_64", "sm": "89"}. source: the ONNX files that the graphs
    were made from, for a target that needs a GPU; onnxruntime runs them on any CPU.
    """

    graphs: Mapping[str, str]
    weights_dir: str
    precision: str
    formats: Mapping[str, Mapping[str, Any]]
    parity: Mapping[str, Any]
    requires: Mapping[str, str]
    source: Mapping[str, str] = field(default_factory=dict)

    def measured(self) -> Mapping[str, float]:
        """The figures of the engine, or of the ONNX files that an engine which has not run was made from."""
        return self.parity["source"] if isinstance(self.parity["engine"], str) else self.parity["engine"]


@dataclass(frozen=True)
class EngineManifest:
    """One component of a bundle: what it computes, its portable graph, and what each target made of it.

    portable: graph role -> file, relative to the bundle; portable_parity: how far that was from the reference, which
    has the weights as the bundle stores them. rounding: how far those are from the checkpoint's (the worst tensor, and
    the outputs).
    profile: symbolic dimension -> (min, opt, max). check: stored input and fp32 reference output.
    targets: by target name. weights: identity of checkpoint and configuration, equal for every build of them
    whatever the toolchain or precision; features and tokens name it, and the precision beside it. digest: of all its
    files.
    """

    name: str
    config: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: Mapping[str, tuple[int, int, int]]
    portable: Mapping[str, str]
    portable_parity: Mapping[str, float]
    rounding: Mapping[str, Any]
    check: str
    targets: Mapping[str, Compiled]
    weights: str
    digest: str

    def compiled(self, target: str) -> Compiled:
        """Raises InputError when it was not compiled for `target`."""
        if target not in self.targets:
            have = ", ".join(self.targets)
            raise InputError(f"{self.name} is not compiled for {target!r}, expected one of: {have}")
        return self.targets[target]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineManifest:
        specs = {
            key: tuple(TensorSpec(s["name"], s["dtype"], tuple(s["dims"])) for s in data[key])
            for key in ("inputs", "outputs")
        }
        profile = {dim: (low, opt, high) for dim, (low, opt, high) in data["profile"].items()}
        targets = {name: Compiled(**compiled) for name, compiled in data["targets"].items()}
        return cls(**{**data, **specs, "profile": profile, "targets": targets})


@dataclass(frozen=True)
class FileEntry:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole bundle. `targets` are in the order they were built. `source` tells the checkpoint: label, digest,
    synthetic, every component it holds, and the build flags that name it. `build`: settings and toolchain.
    `generation`: the defaults `ask` starts from."""

    schema: int
    version: str
    targets: tuple[str, ...]
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

    def rebuild_command(self, root: Path, everything: bool = False, sms: Sequence[int] | None = None) -> str:
        """What builds this bundle again where it stands; `everything`: with all the checkpoint's components; sms: for
        these GPU architectures (None: those that it has)."""
        whole = everything or set(self.components) == set(self.source["components"])
        subset = "" if whole else f" --components {','.join(self.components)}"
        sms = self.build.get("sms", ()) if sms is None else sms
        compiled_for = f" --sm {','.join(map(str, sms))}" if sms else ""
        flags = f"{self.source['arguments']}{compiled_for}{subset}"
        return f"wsi-rt build-engines {flags} --out {shlex.quote(str(root))} --force"


def load_manifest(root: Path) -> Manifest:
    """Read and check the manifest itself (not the files it lists).

    Raises InputError when `root` is no bundle, EngineMismatchError when the manifest was edited, is
    damaged, or has a schema this version does not read.
    """
    path = root / FILE_NAME
    if not path.is_file():
        what = f"a folder without {FILE_NAME}, expected an engine bundle" if root.is_dir() else "no engine bundle there"
        command = f"wsi-rt build-engines --checkpoint synthetic:nano --out {shlex.quote(str(_free_place(root)))}"
        raise InputError(f"{root}: {what}; build one: {command}")
    again = (
        f"rebuild it from its checkpoint: wsi-rt build-engines --checkpoint SRC --out {shlex.quote(str(root))} --force"
    )
    try:
        data = json.loads(path.read_text())
        digest = data.pop("digest")
        schema = int(data["schema"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise EngineMismatchError(f"{path}: damaged ({e!r}); {again}") from e
    if schema not in READS:
        reads = " and ".join(map(str, READS))
        raise EngineMismatchError(
            f"{path}: schema {schema}, this wsi-rt reads {reads}; use the wsi-rt {data.get('version')}, or {again}"
        )
    if digest != sha256_json(data):
        raise EngineMismatchError(f"{path}: edited after the build (its digest does not match); {again}")
    try:
        return _from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise EngineMismatchError(f"{path}: not as this wsi-rt writes it ({e!r}); {again}") from e


def _from_json(data: Mapping[str, Any]) -> Manifest:
    stored = data["components"]
    components = {n: EngineManifest.from_json(stored[n]) for n in COMPONENTS if n in stored}
    files = {name: FileEntry(**f) for name, f in data["files"].items()}
    return Manifest(**{**data, "targets": tuple(data["targets"]), "components": components, "files": files})


def _free_place(root: Path) -> Path:
    """Where a build would not be refused: `root`, unless something stands there already."""
    if is_vacant(root):
        return root
    near = root / "engines" if root.is_dir() else root.with_name(f"{root.name}-engines")
    return next(p for i in count(1) if not (p := near if i == 1 else near.with_name(f"{near.name}-{i}")).exists())
