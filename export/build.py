"""`build-engines`: checkpoint -> engine bundle."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from wsi_rt.export.arch import LlamaConfig, config_json, parameter_count
from wsi_rt.export.component import build_component
from wsi_rt.export.precision import parse_precision
from wsi_rt.export.sources.checkpoint import Checkpoint, Sources, resolve
from wsi_rt.export.sources.weights import Part
from wsi_rt.export.staging import staged_directory
from wsi_rt.runtime import manifest as m
from wsi_rt.runtime.bundle import STAMP_NAME, Bundle, write_stamp
from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.errors import InputError, MissingDependencyError, WsiRtError
from wsi_rt.runtime.hashing import sha256_file, sha256_json
from wsi_rt.runtime.threads import resolve_threads
from wsi_rt.runtime.types import TILE_PX

TOOLCHAIN = ("wsi-rt", "onnx", "onnxruntime", "torch", "transformers", "numpy")
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


@dataclass(frozen=True)
class BuildPlan:
    """The request, resolved and checked; nothing is loaded or written yet."""

    request: BuildRequest
    checkpoint: Checkpoint
    precision: Mapping[str, str]
    threads: int
    tokenizer: Mapping[str, Any]  # what its conversion gives; empty without a language model

    def steps(self) -> int:
        return 4 * len(self.checkpoint.parts) + 1

    @property
    def estimated_bytes(self) -> int:
        """Portable and lowered weights, fp32; the language model's two graphs share one file."""
        copies = {"llm": 1}
        return sum(4 * copies.get(n, 2) * parameter_count(p.config) for n, p in self.checkpoint.parts.items())

    def to_json(self) -> dict[str, Any]:
        """What decides the bundle's contents; equal plans give equal bundles."""
        return {
            "source": self.checkpoint.digest,
            "config": {name: config_json(part.config) for name, part in self.checkpoint.parts.items()},
            "tokenizer": dict(self.tokenizer),
            "target": self.request.target,
            "precision": dict(self.precision),
            "toolchain": toolchain(),
            "code": code_digest(),
            "isa": platform.machine(),
        }


def toolchain() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in TOOLCHAIN}


def code_digest() -> str:
    """Of the code that builds: a bundle from other code is another build."""
    root = Path(__file__).parent
    return sha256_json({str(p.relative_to(root)): sha256_file(p) for p in sorted(root.rglob("*.py"))})


def plan_build(request: BuildRequest) -> BuildPlan:
    """Resolve sources and flags. Raises WsiRtError subclasses; writes nothing."""
    backend(request.target)
    checkpoint = resolve(request.sources)
    wanted = request.components or tuple(checkpoint.parts)
    missing = [n for n in wanted if n not in checkpoint.parts]
    if missing:
        expected = ", ".join(checkpoint.parts)
        raise InputError(f"--components has {missing[0]!r}, expected some of: {expected} (what the checkpoint holds)")
    parts = {n: p for n, p in checkpoint.parts.items() if n in wanted}
    precision = {n: p for n, p in parse_precision(request.precision).items() if n in parts}
    checkpoint = replace(checkpoint, parts=parts)
    with TemporaryDirectory() as aside:  # a tokenizer that does not fit is refused before hours of building
        tokenizer = _write_tokenizer(checkpoint, Path(aside)) if "llm" in parts else {}
    return BuildPlan(request, checkpoint, precision, resolve_threads(request.threads), tokenizer)


def is_up_to_date(plan: BuildPlan) -> bool:
    """Whether `out` already holds this very build, intact. Raises InputError when it holds anything that is no
    bundle and, unless `force` is set, another build or a damaged one (EngineMismatchError)."""
    out = plan.request.out
    if not out.exists():
        return False
    try:
        existing = Bundle.open(out).manifest
    except InputError as e:
        if out.is_dir() and not any(out.iterdir()):
            return False
        raise InputError(f"{out}: exists and is no engine bundle; choose another --out") from e
    except WsiRtError:
        if plan.request.force:
            return False
        raise
    if plan.request.force:
        return False
    if existing.build["key"] == sha256_json(plan.to_json()):
        return True
    raise InputError(f"{out}: holds another build (of {existing.source['label']}); replace it with --force")


def build_engines(plan: BuildPlan, on_step: OnStep = lambda _: None) -> m.Manifest:
    """Build into a directory aside and swap it in. Raises ParityError when an engine's numbers are off."""
    out = plan.request.out
    _check_space(plan)
    with staged_directory(out) as work:
        components = {name: _build_one(plan, name, part, work, on_step) for name, part in plan.checkpoint.parts.items()}
        on_step("tokenizer and manifest")
        tokenizer = _write_tokenizer(plan.checkpoint, work / "tokenizer") if "llm" in components else {}
        manifest = _manifest(plan, components, tokenizer, work)
        write_json(work / m.FILE_NAME, manifest.to_json())
        write_stamp(work, manifest)
    return manifest


def _build_one(plan: BuildPlan, name: str, part: Part, work: Path, on_step: OnStep) -> m.EngineManifest:
    return build_component(
        name, part, work, plan.request.target, plan.precision[name], plan.threads, lambda s: on_step(f"{name}: {s}")
    )


def _check_space(plan: BuildPlan) -> None:
    place = plan.request.out.absolute().parent
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, plan.estimated_bytes
    if free < needed:
        raise MissingDependencyError(
            f"{place}: {free / 1e9:.1f} GB free, the bundle needs about {needed / 1e9:.1f} GB; choose another --out"
        )


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
    plan: BuildPlan, components: Mapping[str, m.EngineManifest], tokenizer: Mapping[str, Any], work: Path
) -> m.Manifest:
    files = {
        str(path.relative_to(work)): m.FileEntry(path.stat().st_size, sha256_file(path))
        for path in sorted(work.rglob("*"))
        if path.is_file() and path.name not in {m.FILE_NAME, STAMP_NAME}
    }
    components = {name: replace(c, digest=_component_digest(name, files)) for name, c in components.items()}
    settings = plan.to_json()
    return m.Manifest(
        schema=m.SCHEMA,
        version=importlib.metadata.version("wsi-rt"),
        target=plan.request.target,
        source={
            "label": plan.checkpoint.label,
            "digest": plan.checkpoint.digest,
            "synthetic": plan.checkpoint.synthetic,
            "arguments": plan.request.sources.arguments(),
        },
        build={**settings, "key": sha256_json(settings)},
        components=components,
        tokenizer=tokenizer,
        tiles={"tile_px": TILE_PX, "target_mpp": 0.5},
        generation=GenerationSettings().to_json(),
        files=files,
    )


def _component_digest(name: str, files: Mapping[str, m.FileEntry]) -> str:
    return sha256_json({path: entry.sha256 for path, entry in files.items() if path.startswith(f"{name}/")})


def write_json(path: Path, data: Any) -> None:
    import json

    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
