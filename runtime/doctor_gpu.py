"""What `wsi-rt doctor` says of GPUs: what is there, what is missing for which target, and the command that fixes it."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wsi_rt.runtime import devices
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.engines.ort_cuda import onnxruntime_problem
from wsi_rt.runtime.engines.registry import TARGETS, family_of
from wsi_rt.runtime.errors import WsiRtError
from wsi_rt.runtime.packages import installed_version

CUDNN = "libcudnn.so.9"
_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")  # CUDA 13 and later have no suffix


@dataclass(frozen=True)
class Piece:
    """A package that GPU work may need. module: what is imported; distributions: of which pip knows one. use: what
    for."""

    name: str
    module: str
    distributions: tuple[str, ...]
    use: str
    fix: str


PIECES = (
    Piece("torch", "torch", ("torch",), "target torch", "pip install '.[cuda]' in a checkout"),
    Piece("triton", "triton", ("triton",), "the kernels of target torch", "pip install '.[cuda]' in a checkout"),
    Piece(
        "onnxruntime-gpu",
        "onnxruntime",
        ("onnxruntime-gpu",),
        "target ort-cuda",
        "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]' (it takes onnxruntime's place)",
    ),
    Piece(
        "tensorrt-rtx",
        "tensorrt_rtx",
        ("tensorrt-rtx-cu12",),
        "target tensorrt-rtx",
        "pip install '.[tensorrt-rtx]' in a checkout",
    ),
    Piece(
        "cuda-bindings",
        "cuda.bindings",
        ("cuda-bindings",),
        "targets tensorrt and tensorrt-rtx",
        "pip install '.[tensorrt-rtx]' in a checkout",
    ),
    Piece("tensorrt", "tensorrt", ("tensorrt",), "target tensorrt", "pip install tensorrt"),
    Piece(
        "flash-attn",
        "flash_attn",
        ("flash-attn", "flash-attn-4"),
        "a peer of bench kernels",
        "pip install flash-attn (compiles with nvcc)",
    ),
    Piece(
        "cucim",
        "cucim",
        ("cucim-cu13", "cucim-cu12"),
        "slides decoded on the GPU (--reader cucim)",
        "pip install --no-deps cucim-cu12 lazy-loader",
    ),
)
# What a target cannot run without, by the names above.
NEEDS = {
    "ort-cuda": ("onnxruntime-gpu",),
    "torch": ("torch",),
    "tensorrt": ("tensorrt", "cuda-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx", "cuda-bindings"),
}


def examine_gpu() -> dict[str, Any]:
    """missing: what GPU work lacks, and for which target; none of it matters to `ort-cpu`."""
    found = devices.found()
    pieces = {p.name: _version(p) for p in PIECES}
    missing = [] if found.problem is None else [_lack("GPU", "every GPU target", found.problem)]
    missing += [_lack(p.name, p.use, p.fix) for p in PIECES if pieces[p.name] is None]
    missing += [_lack("CUDA", "every GPU target", flaw) for flaw in (_cuda_flaw(found),) if flaw]
    if _cudnn() is None:
        missing.append(_lack("cuDNN", "target ort-cuda", f"{CUDNN} does not load: pip install nvidia-cudnn-cu13"))
    if pieces["onnxruntime-gpu"] is not None and (flaw := onnxruntime_problem()):
        missing.append(_lack("onnxruntime-gpu", "target ort-cuda", flaw))
    return {
        "driver": found.driver,
        "cuda": None if found.cuda is None else ".".join(map(str, found.cuda)),
        "gpus": [asdict(gpu) for gpu in found.gpus],
        "pieces": {**pieces, "cuDNN": _cudnn()},
        "missing": missing,
    }


def examine_engines(root: Path, pieces: Mapping[str, str | None]) -> dict[str, Any]:
    """-> for every target of a bundle, None or why it does not run here, with the fix. Raises what opening raises."""
    targets = Bundle.open(root, to_run=False).manifest.targets
    return {target: _why_not(root, target, pieces) for target in targets}


def _why_not(root: Path, target: str, pieces: Mapping[str, str | None]) -> str | None:
    if family_of(target) not in TARGETS:
        return f"this wsi-rt knows no target {target}: install the one that built it"
    try:
        Bundle.open(root, target=target)
    except WsiRtError as e:
        return str(e)
    if family_of(target) == "ort-cuda" and (flaw := onnxruntime_problem()):
        return flaw
    lacks = [p for p in PIECES if p.name in NEEDS.get(family_of(target), ()) and pieces[p.name] is None]
    return f"{lacks[0].name} is not installed: {lacks[0].fix}" if lacks else None


def render_gpu(report: Mapping[str, Any]) -> list[str]:
    gpus = ", ".join(f"{g['name']} (sm_{g['sm']}, {g['memory_bytes'] / 2**30:.0f} GiB)" for g in report["gpus"])
    driver = f"driver {report['driver'] or 'of unknown version'}, CUDA up to {report['cuda']}" if report["cuda"] else ""
    have = ", ".join(f"{name} {version}" for name, version in report["pieces"].items() if version)
    return [
        f"GPU     {'; '.join(filter(None, [gpus or 'none', driver]))}",
        f"gpu     {have or 'nothing'}",
        *(f"        without {m['what']}, which is for {m['for']}: {m['fix']}" for m in report["missing"]),
    ]


def _lack(what: str, use: str, fix: str) -> dict[str, str]:
    return {"what": what, "for": use, "fix": fix}


def _version(piece: Piece) -> str | None:
    """None where the module is not there, whatever pip says; it is not imported."""
    try:
        if importlib.util.find_spec(piece.module) is None:
            return None
    except (ImportError, ValueError):  # a parent package that is not there; a module without a spec
        return None
    return next((v for d in piece.distributions if (v := installed_version(d))), None)


def _cuda_flaw(found: devices.Survey) -> str | None:
    """CUDA libraries newer than the driver: a minor version may be, a major one not."""
    if found.cuda is None:
        return None
    newer = [v for name in _RUNTIMES if (v := installed_version(name)) and int(v.split(".")[0]) > found.cuda[0]]
    if not newer:
        return None
    return (
        f"the installed CUDA libraries are of {newer[0]}, the driver supports {found.cuda[0]}.{found.cuda[1]}: "
        "install a newer driver"
    )


def _cudnn() -> str | None:
    """pip's, or the system's."""
    packaged = next((v for n in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12") if (v := installed_version(n))), None)
    if packaged:
        return packaged
    try:
        ctypes.CDLL(CUDNN)
    except OSError:
        return None
    return "of the system"
