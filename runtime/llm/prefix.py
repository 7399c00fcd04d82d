"""The part of a prompt that every question on a slide shares: text before the slide, and the slide.

A SlidePrefix says what it is; its keys and values are in a PrefixStore (prefix_store.py), which may lose them: they can
be computed again from it at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.hashing import sha256_json
from wsi_rt.runtime.llm.decoder import Decoder

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SlidePrefix:
    """key: SHA-256 of `made_of`, equal for equal keys and values. embeds: [P, hidden] f32, the text's tokens and the
    slide's `slide_tokens`. made_of: digests and settings, no text and no path."""

    key: str
    embeds: F32
    slide_tokens: int
    made_of: Mapping[str, Any]

    @property
    def length(self) -> int:
        return int(self.embeds.shape[0])


def slide_prefix(
    decoder: Decoder, before: tuple[int, ...], projected: F32, model: Mapping[str, Any] | None = None
) -> SlidePrefix:
    """before: token ids up to the slide; projected: [576, hidden] f32; model: what tells this language model from
    others (weights, precision, decoder), without which the key holds within one process only."""
    made_of = {
        "slide": digest(projected),
        "before": hashlib.sha256(repr(tuple(before)).encode()).hexdigest(),
        "model": dict(model or {}),
    }
    embeds = np.concatenate([decoder.embed(np.array(before, np.int64)), projected])
    return SlidePrefix(sha256_json(made_of), embeds, len(projected), made_of)


def digest(x: F32) -> str:
    """SHA-256 of an array's shape and numbers."""
    return hashlib.sha256(repr(x.shape).encode() + np.ascontiguousarray(x, "<f4").tobytes()).hexdigest()
