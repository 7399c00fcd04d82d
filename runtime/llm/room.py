"""How much memory keys and values may take."""

from __future__ import annotations

from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can still be had without swapping: what the kernel says, cut to the cgroup's limit (v2, then v1).

    Pages of files, such as mapped weights, count as available. 4 GiB where the system does not tell.
    """
    found = [x for x in (_kernel(root), _cgroup(root)) if x is not None]
    return max(0, min(found)) if found else 4 << 30


def _kernel(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _cgroup(root: Path) -> int | None:
    places = (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder, limit, usage, cache in places:
        try:
            most = int((root / folder / limit).read_text())
            used = int((root / folder / usage).read_text())
            stat = (root / folder / "memory.stat").read_text().splitlines()
            reclaimable = next((int(x.split()[1]) for x in stat if x.split()[0] == cache), 0)
            return most - used + reclaimable
        except (OSError, ValueError, IndexError):  # also "max": no limit
            continue
    return None
