"""Where a bench runs: the machine, the versions that matter, the commit."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from wsi_rt.benchmarks.report import Report, Row
from wsi_rt.runtime.doctor import examine
from wsi_rt.runtime.packages import installed_version

PEERS = ("triton", "flash-attn")  # what benches measure beside what `wsi-rt doctor` lists


def report(rows: Sequence[Row]) -> Report:
    """The rows with this machine, its versions and the commit of this code."""
    found = examine()
    installed = {"wsi-rt": found["wsi_rt"], "python": found["python"], **found["base"], **found["export"]}
    versions = {**installed, **{name: installed_version(name) for name in PEERS}}
    machine = {**found["machine"], "gpus": gpus()}
    return Report(machine, {k: v for k, v in versions.items() if v}, commit(), list(rows))


def gpus() -> list[str]:
    """Names of the CUDA devices that torch sees; none without torch."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout that `folder` belongs to, "-dirty" behind it where files differ; None outside one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
