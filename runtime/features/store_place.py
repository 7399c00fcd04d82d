"""Where the feature store lies, and how large it may become, when a command does not say."""

from __future__ import annotations

import os
from pathlib import Path

from wsi_rt.runtime.errors import InputError

ENVIRONMENT, ENVIRONMENT_BOUND = "WSI_RT_CACHE", "WSI_RT_CACHE_MAX_BYTES"
MAX_BYTES = 20 << 30  # by default: about 330 slides of 10,000 tiles (61 MB at 1536 channels)


def default_root() -> Path:
    """$WSI_RT_CACHE, else the platform's folder for caches."""
    import platformdirs

    told = os.environ.get(ENVIRONMENT)
    return Path(told) if told else Path(platformdirs.user_cache_dir("wsi-rt", appauthor=False))


def bound_from_environment() -> int:
    """$WSI_RT_CACHE_MAX_BYTES, else MAX_BYTES. Raises InputError for what is no size."""
    text = os.environ.get(ENVIRONMENT_BOUND)
    try:
        return parse_bytes(text) if text else MAX_BYTES
    except ValueError as error:
        raise InputError(f"{ENVIRONMENT_BOUND} is {error}") from error


def parse_bytes(text: str) -> int:
    """`500M`, `20G`, `1.5T` (powers of 1024), or bytes. Raises ValueError."""
    powers = {"K": 1, "M": 2, "G": 3, "T": 4}
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    power = powers.get(number[-1:], 0)
    try:
        value = float(number[:-1] if power else number) * 1024**power
    except ValueError:
        value = -1.0
    if not 0 <= value < 2**63:
        raise ValueError(f"{text!r}, expected a size such as 500M or 20G")
    return int(value)
