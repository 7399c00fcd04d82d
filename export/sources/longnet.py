"""Slide-encoder weights -> LongNetConfig and tensors (SPEC 3, 6)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from wsi_rt.export.arch import LongNetConfig
from wsi_rt.export.sources.files import SafetensorsSource, read_json_object
from wsi_rt.export.sources.weights import Part
from wsi_rt.kernels.dilated_attention import check_branches
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.runtime.errors import CheckpointError

_OPTIONS = ("heads", "segment_lengths", "dilated_ratios", "eps", "pool_eps")  # of an optional config.json


def load_slide_encoder(path: Path) -> Part:
    """A file or folder of LongNet weights. Sizes come from the weights; heads, segments and ratios from a
    `config.json` beside them, if any. Raises CheckpointError when they do not fit."""
    source = SafetensorsSource.open(path)
    shapes = source.shapes()
    data = read_json_object(path / "config.json") if (path / "config.json").is_file() else {}
    try:
        width, in_width = shapes["patch_embed.proj.weight"]
        ffn = shapes["encoder.layers.0.ffn.fc1.weight"][0]
        norm_width = shapes["norm.weight"][0]
    except (KeyError, ValueError, IndexError) as e:
        raise CheckpointError(f"{path}: not a LongNet slide encoder ({e} is missing or misshapen)") from e
    depth = 1 + max(int(m[1]) for m in (re.match(r"encoder\.layers\.(\d+)\.", n) for n in shapes) if m)
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in _OPTIONS}
    config = LongNetConfig(in_width, width, depth, ffn=ffn, norm_width=norm_width, **options)
    try:
        check_branches(config.segment_lengths, config.dilated_ratios)
        fits = width % config.heads == 0
    except (KernelInputError, TypeError, ZeroDivisionError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"{path}: width {width} with {config.heads} heads, segments {config.segment_lengths} with ratios "
            f"{config.dilated_ratios}: do not fit; correct config.json"
        )
    return Part(config, source)
