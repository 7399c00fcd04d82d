"""How many CPUs this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path

from wsi_rt.runtime.errors import InputError


def usable_cpus() -> int:
    """CPUs in the affinity mask, cut to the cgroup quota (v2, then v1) where one is set."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cpus, math.ceil(quota)) if quota else cpus)


def _cgroup_quota(root: Path) -> float | None:
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    except (OSError, ValueError):
        return None


def resolve_threads(threads: int | None) -> int:
    """The thread budget: what was asked for, or every usable CPU.

    Raises InputError below 1, or far beyond the CPUs there are: onnxruntime's threads spin, so 64 on two CPUs
    are 10 times slower than 2, and 100,000 take all memory before they start.
    """
    if threads is None:
        return usable_cpus()
    most = max(16, os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise InputError(f"--threads is {threads}, expected 1 to {most}")
    return threads
