"""What pip has installed, without importing it."""

from __future__ import annotations

import importlib.metadata


def installed_version(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
