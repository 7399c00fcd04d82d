"""`wsi-rt doctor`: what this machine has, what is missing, and the command that fixes it."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

from wsi_rt.runtime.doctor_gpu import examine_engines, examine_gpu, render_gpu
from wsi_rt.runtime.packages import installed_version
from wsi_rt.runtime.threads import usable_cpus

# Import name -> distribution. The base needs all of its own; an extra may be absent.
BASE = {
    "click": "click",
    "h5py": "h5py",
    "numpy": "numpy",
    "onnxruntime": "onnxruntime",
    "openslide": "openslide-python",
    "PIL": "pillow",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
}
EXPORT = {
    "onnx": "onnx",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "timm": "timm",
    "torch": "torch",
    "transformers": "transformers",
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def examine(engines: Path | None = None) -> dict[str, Any]:
    """Look without importing anything heavy. `ok` is whether the main job can run here: with `engines`, a bundle,
    whether any of its targets does. What GPU targets lack is no problem of it ("gpu", "missing").

    Raises InputError and EngineMismatchError for what is no whole bundle.
    """
    base, export = ({n: _version(n, d) for n, d in group.items()} for group in (BASE, EXPORT))
    base["onnxruntime"] = base["onnxruntime"] or _version("onnxruntime", "onnxruntime-gpu")
    problems = [f"{BASE[n]} is not installed: pip install {BASE[n]}" for n, v in base.items() if v is None]
    if _version("onnxruntime", "onnxruntime") and _version("onnxruntime", "onnxruntime-gpu"):
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"
        )
    problems += [p for p in (_openslide_problem(), _onnxruntime_problem()) if p]
    gpu = examine_gpu()
    targets = {} if engines is None else examine_engines(engines, gpu["pieces"])
    if targets and None not in targets.values():
        problems.append(f"{engines}: none of its engines runs here")
    return {
        "ok": not problems,
        "problems": problems,
        "wsi_rt": _version("wsi_rt", "wsi-rt"),
        "python": platform.python_version(),
        "machine": {
            "system": platform.platform(),
            "isa": platform.machine(),
            "cpu_flags": _cpu_flags(),
            "cpus": os.cpu_count(),
            "usable_cpus": usable_cpus(),
            "memory_bytes": _memory_bytes(),
            "nvidia_driver": gpu["driver"],
        },
        "base": base,
        "export": export,
        "gpu": gpu,
        "engines": targets,
    }


def render(report: dict[str, Any]) -> str:
    machine = report["machine"]
    flags = " ".join(machine["cpu_flags"]) or "none of " + " ".join(CPU_FLAGS)
    memory = f"{machine['memory_bytes'] / 2**30:.1f} GiB" if machine["memory_bytes"] else "unknown memory"
    lines = [
        f"wsi-rt {report['wsi_rt']} on Python {report['python']}, {machine['system']}",
        f"CPU     {machine['isa']}, {machine['usable_cpus']} of {machine['cpus']} CPUs usable, {memory}, {flags}",
    ]
    for group, hint in (("base", "pip install ."), ("export", "pip install '.[export]'")):
        have = [f"{n} {v}" for n, v in report[group].items() if v]
        lack = [n for n, v in report[group].items() if not v]
        missing = f"; missing {', '.join(lack)} ({hint} in a checkout)" if lack else ""
        lines.append(f"{group:7} {', '.join(have) or 'nothing'}{missing}")
    lines += render_gpu(report["gpu"])
    lines += [f"engines {target}: {why or 'ok'}" for target, why in report["engines"].items()]
    lines += [f"PROBLEM {p}" for p in report["problems"]]
    lines.append("ok: engines can run here" if report["ok"] else "engines cannot run here")
    return "\n".join(lines)


def _version(module: str, distribution: str) -> str | None:
    try:
        return installed_version(distribution) if importlib.util.find_spec(module) else None
    except ValueError:  # a module without a spec
        return None


def _openslide_problem() -> str | None:
    try:
        import openslide  # noqa: F401 (loads the C library)
    except (ImportError, OSError) as e:
        return f"OpenSlide does not load ({str(e).splitlines()[0]}): pip install openslide-python openslide-bin"
    return None


def _onnxruntime_problem() -> str | None:
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
    except (ImportError, OSError, AttributeError) as e:
        return f"onnxruntime does not load ({str(e).splitlines()[0]}): pip install onnxruntime"
    return None if "CPUExecutionProvider" in providers else f"onnxruntime has no CPU provider, only {providers}"


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    line = next((ln for ln in text.splitlines() if ln.startswith(("flags", "Features"))), "")
    present = set(line.split())
    return [f for f in CPU_FLAGS if f in present]


def _memory_bytes() -> int | None:
    """Physical memory, cut to the cgroup limit."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(limit)) if limit != "max" else total
    except (OSError, ValueError):
        return total
