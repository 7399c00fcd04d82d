"""Sizes that an engine takes, and is tuned for."""

from __future__ import annotations

from wsi_rt.export.arch import ComponentConfig, LlamaConfig, LongNetConfig, ViTConfig
from wsi_rt.runtime.engines.tensorrt_sidecar import Profile

# A longer slide is refused; what activations take is in docs/tensorrt.md.
_MOST_TILES = 65_536
_MOST_SEQUENCES = 64


def profiles(c: ComponentConfig) -> tuple[Profile, ...]:
    """By symbolic dimension (min, opt, max). A language model has two: several tokens of one sequence (tuned for the
    640 of a slide and a question), and one token of each of many."""
    if isinstance(c, ViTConfig):
        return ({"batch": (1, 32, 256)},)
    if isinstance(c, LongNetConfig):
        return ({"tiles": (1, 8192, _MOST_TILES)},)
    if isinstance(c, LlamaConfig):
        n, usual = c.context, min(640, c.context)
        return (
            {"batch": (1, 1, 1), "tokens": (2, usual, n), "keys": (1, usual, n), "rows": (1, 1, n)},
            {
                "batch": (1, 16, _MOST_SEQUENCES),
                "tokens": (1, 1, 1),
                "keys": (1, min(1024, n), n),
                "rows": (1, 16, _MOST_SEQUENCES),
            },
        )
    return ({"tokens": (1, 576, 576)},)
