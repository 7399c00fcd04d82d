"""The part of a prompt that every question on a slide shares: text before the slide, and the slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.llm.decoder import KV, Decoder


@dataclass(frozen=True)
class SlidePrefix:
    """A KV whose first `length` tokens are `before` and the projected slide tokens.

    `key` tells what it was computed from. Rewind the KV to `length` before the next question.
    """

    kv: KV
    length: int
    slide_tokens: int
    key: str


def prefill_prefix(
    decoder: Decoder, before: tuple[int, ...], projected: NDArray[np.float32], capacity: int, key: str
) -> SlidePrefix:
    """Compute the prefix once. projected: [576, hidden] f32; capacity: tokens the KV must have room for."""
    embeds = np.concatenate([decoder.embed(np.array(before, np.int64)), projected])
    kv = decoder.new_kv(capacity)
    decoder.prefill(kv, embeds)
    return SlidePrefix(kv, len(embeds), len(projected), key)
