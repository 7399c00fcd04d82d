"""What our files say about themselves: a small JSON object beside the numbers, which other tools ignore.

It is a claim of the file, not proof: the digest of a value read from a file is always that of the file's bytes.
"""

from __future__ import annotations

import json
from typing import Any

from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.types import Provenance

STAMP = "wsi_rt"  # HDF5 attribute; in a torch zip the entry wsi_rt.json
MAX_STAMP_BYTES = 60_000  # HDF5 keeps attributes up to 64 KiB in the object header


def dump_stamp(provenance: Provenance, **facts: Any) -> bytes:
    """The JSON of a provenance and further facts, ASCII, keys sorted. Raises: FeatureFileError when too long.

    Numbers read from a file of ours and written again keep the digest of what made them, not of that file.
    """
    settings = dict(provenance.settings)
    data = {
        "maker": provenance.maker,
        "digest": settings.pop("source_digest", provenance.digest),
        "settings": settings,
        **{k: v for k, v in facts.items() if v is not None},
    }
    text = json.dumps(data, sort_keys=True, default=str).encode("ascii")
    if len(text) > MAX_STAMP_BYTES:
        raise FeatureFileError(f"the provenance takes {len(text)} bytes, expected at most {MAX_STAMP_BYTES}")
    return text


def load_stamp(text: bytes | str | None, *, digest: str, otherwise: str) -> tuple[Provenance, dict[str, Any]]:
    """(provenance, the other facts) of a stamp; `digest` is that of the file, `otherwise` the maker without a stamp.

    The digest that the stamp claims moves to settings["source_digest"]. A malformed stamp counts as none.
    """
    try:
        data = json.loads(text) if text and len(text) <= MAX_STAMP_BYTES else None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("maker"), str):
        return Provenance(otherwise, digest), {}
    claimed = claimed_provenance(data)
    settings = {**claimed.settings, **({"source_digest": claimed.digest} if claimed.digest else {})}
    facts = {k: v for k, v in data.items() if k not in ("maker", "digest", "settings")}
    return Provenance(claimed.maker, digest, settings), facts


def maker_digest(provenance: Provenance, component: str) -> str | None:
    """The digest of the component that made a value, whether fresh or read from a file; None for another maker."""
    digest = provenance.settings.get("source_digest", provenance.digest)
    return digest if provenance.maker == component and isinstance(digest, str) and digest else None


def claimed_provenance(data: dict[str, Any]) -> Provenance:
    """The provenance a stamp's object claims; parts of the wrong type count as empty."""
    maker, digest, settings = (data.get(key) for key in ("maker", "digest", "settings"))
    return Provenance(
        maker if isinstance(maker, str) else "unknown",
        digest if isinstance(digest, str) else "",
        settings if isinstance(settings, dict) else {},
    )
