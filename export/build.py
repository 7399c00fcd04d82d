"""`build-engines`: checkpoint -> engine bundle."""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from wsi_rt.export.arch import LlamaConfig, config_json, parameter_count
from wsi_rt.export.component import build_component
from wsi_rt.export.precision import parse_precision, weight_bytes, wide_bytes
from wsi_rt.export.sources.checkpoint import Checkpoint, Sources, resolve
from wsi_rt.export.sources.weights import Part
from wsi_rt.export.targets import lowering
from wsi_rt.export.targets.architectures import architectures, check_types
from wsi_rt.runtime import manifest as m
from wsi_rt.runtime.atomic import is_vacant, plain_os_error
from wsi_rt.runtime.bundle import STAMP_NAME, Bundle, stamp_file, write_stamp
from wsi_rt.runtime.config import TARGET_MPP, GenerationSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.hashing import sha256_file, sha256_json
from wsi_rt.runtime.interrupts import checkpoint
from wsi_rt.runtime.packages import installed_version
from wsi_rt.runtime.plan_measure import FILE_NAME as MEASURED_NAME
from wsi_rt.runtime.staging import require_room, staged_directory, standing_parent
from wsi_rt.runtime.threads import resolve_threads
from wsi_rt.runtime.types import TILE_PX

TOOLCHAIN = ("wsi-rt", "onnx", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "numpy")
COMPILERS = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt-rtx-cu12",)}
TOKENIZER = "tokenizer"  # its folder in the bundle
OnStep = Callable[[str], None]


@dataclass(frozen=True)
class BuildRequest:
    """What `build-engines` was asked for."""

    sources: Sources
    out: Path
    target: str = "ort-cpu"
    precision: str | None = None
    components: tuple[str, ...] = ()
    force: bool = False
    threads: int | None = None
    fast: bool = False
    sms: tuple[int, ...] | None = None

    def arguments(self) -> str:
        """The flags, but for --out, --components and --sm, that ask for the same from any folder."""
        words = {
            k: v if not v or v.startswith("synthetic:") else os.path.abspath(v) for k, v in vars(self.sources).items()
        }
        given = [Sources(**words).arguments()]
        given += [f"--target {shlex.quote(self.target)}"] if self.target != BuildRequest.target else []
        given += [f"--precision {shlex.quote(self.precision)}"] if self.precision is not None else []
        given += ["--fast"] if self.fast else []
        return " ".join(given)


@dataclass(frozen=True)
class BuildPlan:
    """The request, resolved and checked; nothing is loaded or written yet. `available`: every component that the
    checkpoint holds, built or not. sms: architectures to compile for, none for a target that runs on any."""

    request: BuildRequest
    checkpoint: Checkpoint
    available: tuple[str, ...]
    precision: Mapping[str, str]
    threads: int
    tokenizer: Mapping[str, Any]  # what its conversion gives; empty without a language model
    sms: tuple[int, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """As the bundle names them."""
        target = self.request.target
        return tuple(f"{target}-sm{sm}" for sm in self.sms) or (target,)

    def steps(self) -> int:
        return 4 * len(self.checkpoint.parts) + 1

    @property
    def estimated_bytes(self) -> int:
        """Portable weights, and what the target adds to them: on the CPU another copy, but for the language model,
        whose graphs share one file; where it is compiled for architectures, the ONNX in 16 bits and an engine each."""
        parts = self.checkpoint.parts
        found = sum(weight_bytes(p.config, self.precision[n]) for n, p in parts.items())
        if self.request.target == "ort-cpu":
            found += sum(weight_bytes(p.config, self.precision[n]) for n, p in parts.items() if n != "llm")
        found += sum(2 * parameter_count(p.config) for p in parts.values()) * (len(self.sms) + 1 if self.sms else 0)
        if self.request.fast and "llm" in parts:
            found += wide_bytes(parts["llm"].config, self.precision["llm"])
        return found

    def to_json(self) -> dict[str, Any]:
        """What decides the bundle's contents; equal plans give equal bundles."""
        return {
            "source": self.checkpoint.digest,
            "config": {name: config_json(part.config) for name, part in self.checkpoint.parts.items()},
            "tokenizer": dict(self.tokenizer),
            "target": self.request.target,
            "precision": dict(self.precision),
            "fast": self.request.fast,
            "sms": list(self.sms),
            "toolchain": toolchain(self.request.target),
            "code": code_digest(),
            "isa": platform.machine(),
        }


def toolchain(target: str) -> dict[str, str]:
    """Versions of what builds for a target. onnxruntime-gpu is onnxruntime under another name."""
    return {name: version for name in (*TOOLCHAIN, *COMPILERS.get(target, ())) if (version := installed_version(name))}


def code_digest() -> str:
    """Of the code that builds and checks: a bundle from other code is another build."""
    root = Path(__file__).parents[1]
    files = [*root.glob("export/**/*.py"), *root.glob("kernels/**/*.py"), root / "runtime" / "parity.py"]
    return sha256_json({str(p.relative_to(root)): sha256_file(p) for p in sorted(files)})


def plan_build(request: BuildRequest) -> BuildPlan:
    """Resolve sources and flags. Raises WsiRtError subclasses; writes nothing."""
    lowering(request.target)
    sms = architectures(request.target, request.sms or ())
    checkpoint = resolve(request.sources)
    request = replace(request, sources=checkpoint.sources)  # a base that the adapter itself names is to be told again
    available = tuple(checkpoint.parts)
    wanted = request.components or available
    missing = [n for n in wanted if n not in available]
    if missing:
        expected = ", ".join(available)
        raise InputError(f"--components has {missing[0]!r}, expected some of: {expected} (what the checkpoint holds)")
    parts = {n: p for n, p in checkpoint.parts.items() if n in wanted}
    precision = parse_precision(request.precision, tuple(parts), request.target)
    check_types(sms, precision)
    if request.fast and request.target != "ort-cpu":
        raise InputError(f"--fast is for the target ort-cpu, expected --target {request.target} without it")
    if request.fast and precision.get("llm", "fp32") == "fp32":
        raise InputError("--fast is for a language model in int8 or int4, expected --precision llm=int4 or llm=int8")
    checkpoint = replace(checkpoint, parts=parts)
    with TemporaryDirectory() as aside:  # a tokenizer that does not fit is refused before hours of building
        tokenizer = _write_tokenizer(checkpoint, Path(aside)) if "llm" in parts else {}
    return BuildPlan(request, checkpoint, available, precision, resolve_threads(request.threads), tokenizer, sms)


def is_up_to_date(plan: BuildPlan) -> bool:
    """Whether `out` already holds this very build, intact. Raises InputError when it holds anything that is no
    bundle and, unless `force` is set, another build or a damaged one (EngineMismatchError)."""
    out = plan.request.out
    if not _holds_bundle(out) or plan.request.force:
        return False
    existing = Bundle.open(out, to_run=False).manifest
    if existing.build["key"] == sha256_json(plan.to_json()):
        return True
    raise InputError(f"{out}: holds another build (of {existing.source['label']}); replace it with --force")


def _holds_bundle(out: Path) -> bool:
    """False: nothing, or an empty folder. Raises InputError when it holds anything that no build writes."""
    if is_vacant(out):
        return False
    if not ((out / m.FILE_NAME).is_file() and any((out / n).is_dir() for n in m.COMPONENTS)):
        raise InputError(f"{out}: exists and is no engine bundle; choose another --out")
    ours = {m.FILE_NAME, TOKENIZER, *m.COMPONENTS}
    aside = (STAMP_NAME, MEASURED_NAME)
    others = sorted(p.name for p in out.iterdir() if p.name not in ours and not p.name.startswith(aside))
    if others:
        raise InputError(f"{out}: also holds {others[0]!r}, which is no part of an engine bundle; choose another --out")
    return True


def _may_replace(out: Path, force: bool) -> None:
    if _holds_bundle(out) and not force:
        raise InputError(f"{out}: an engine bundle stands there; replace it with --force")


def build_engines(plan: BuildPlan, on_step: OnStep = lambda _: None) -> m.Manifest:
    """Build into a directory aside and swap it in. Raises ParityError when an engine's numbers are off."""
    request = plan.request
    check_place(plan)
    _give_memory_back()
    with staged_directory(request.out, lambda out: _may_replace(out, request.force)) as work:
        components = {name: _build_one(plan, name, part, work, on_step) for name, part in plan.checkpoint.parts.items()}
        on_step("tokenizer and manifest")
        tokenizer = _write_tokenizer(plan.checkpoint, work / TOKENIZER) if "llm" in components else {}
        paths = sorted(p for p in work.rglob("*") if p.is_file())
        stamp = {str(p.relative_to(work)): stamp_file(p) for p in paths}
        manifest = _manifest(plan, components, tokenizer, stamp)
        write_json(work / m.FILE_NAME, manifest.to_json())
        write_stamp(work, stamp)
        checkpoint()
    return manifest


def _give_memory_back() -> None:
    """Buffers of a matrix's size go back to the system when they are freed. glibc keeps what it took below its growing
    threshold: a closed session of a 7 B model left 4.5 GB of heap behind for the next step to pile on."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)


_M_MMAP_THRESHOLD = -3  # malloc.h


def _build_one(plan: BuildPlan, name: str, part: Part, work: Path, on_step: OnStep) -> m.EngineManifest:
    request = plan.request
    return build_component(
        name,
        part,
        work,
        request.target,
        plan.precision[name],
        plan.threads,
        lambda s: on_step(f"{name}: {s}"),
        request.fast,
        plan.sms,
    )


def check_place(plan: BuildPlan) -> None:
    """Raises InputError or MachineError when the bundle cannot be written, or has no room."""
    place = standing_parent(plan.request.out)
    flaw = errno.ENOTDIR if not place.is_dir() else 0 if os.access(place, os.W_OK) else errno.EACCES
    if flaw:
        raise plain_os_error(OSError(flaw, os.strerror(flaw)), plan.request.out)
    require_room(plan.request.out, plan.estimated_bytes, "the bundle needs about")


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    from wsi_rt.export.tokenizer import synthetic_tokenizer, write_tokenizer

    llm = checkpoint.parts["llm"].config
    if not isinstance(llm, LlamaConfig):
        raise TypeError(f"llm is a {type(llm).__name__}")
    if checkpoint.tokenizer is None:
        config = synthetic_tokenizer(folder, llm.vocab)
    else:
        config = write_tokenizer(checkpoint.tokenizer, folder)
    if config["vocab_size"] > llm.vocab:
        raise InputError(
            f"{checkpoint.tokenizer}: a tokenizer of {config['vocab_size']} tokens for a language model of "
            f"{llm.vocab}; give the matching one with --tokenizer"
        )
    return config


def _manifest(
    plan: BuildPlan,
    components: Mapping[str, m.EngineManifest],
    tokenizer: Mapping[str, Any],
    stamp: Mapping[str, tuple[int, int, str]],
) -> m.Manifest:
    files = {name: m.FileEntry(size, digest) for name, (size, _, digest) in stamp.items()}
    components = {name: replace(c, digest=_component_digest(name, files)) for name, c in components.items()}
    settings = plan.to_json()
    return m.Manifest(
        schema=m.SCHEMA,
        version=importlib.metadata.version("wsi-rt"),
        targets=plan.targets,
        source={
            "label": plan.checkpoint.label,
            "digest": plan.checkpoint.digest,
            "synthetic": plan.checkpoint.synthetic,
            "components": list(plan.available),
            "arguments": plan.request.arguments(),
        },
        build={**settings, "key": sha256_json(settings)},
        components=components,
        tokenizer=tokenizer,
        tiles={"tile_px": TILE_PX, "target_mpp": TARGET_MPP},
        generation=GenerationSettings().to_json(),
        files=files,
    )


def _component_digest(name: str, files: Mapping[str, m.FileEntry]) -> str:
    return sha256_json({path: entry.sha256 for path, entry in files.items() if path.startswith(f"{name}/")})


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
