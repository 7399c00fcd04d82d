"""Slide-encoder weights -> LongNetConfig and tensors (SPEC 3, 6)."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from wsi_rt.export.arch import LongNetConfig, Shapes
from wsi_rt.export.sources.fields import Fields
from wsi_rt.export.sources.files import open_weights, read_json_object
from wsi_rt.export.sources.weights import Part
from wsi_rt.kernels.dilated_attention import check_branches
from wsi_rt.kernels.errors import KernelInputError
from wsi_rt.kernels.slide_embed import GRID
from wsi_rt.runtime.errors import CheckpointError

_SEGMENTS = ("segment_length", "segment_lengths")  # the published spelling first, then our own
_RATIOS = ("dilated_ratio", "dilated_ratios")
_LAYER_EPS, _POOL_EPS = ("layer_norm_eps", "eps"), ("norm_eps", "pool_eps")
_SLIDE = ("max_wsi_size", "tile_size")
_SIZES = ("in_chans", "embed_dim", "depth", "ffn_dim", "slide_ngrids")  # told by the weights or fixed: checked only
_METADATA = (
    "_name_or_path",
    "architecture",
    "architectures",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)
_KNOWN = ("heads", *_SEGMENTS, *_RATIOS, *_LAYER_EPS, *_POOL_EPS, *_SLIDE, *_SIZES, *_METADATA)


def load_slide_encoder(path: Path) -> Part:
    """A file or folder of LongNet weights. Sizes come from the weights; heads, segments, ratios and epsilons from
    the `config.json` beside them, if any. Raises CheckpointError when they do not fit."""
    source = open_weights(path, prefer="slide_encoder")
    config_path = (path if path.is_dir() else path.parent) / "config.json"
    data = read_json_object(config_path, optional=True)
    if "pretrained_cfg" in data:  # Prov-GigaPath's repository holds both encoders; its config.json is the tile one's
        data = {}
    return Part(_configured(_sized(path, source.shapes()), Fields(data, str(config_path))), source)


def _sized(path: Path, shapes: Shapes) -> LongNetConfig:
    """What the weights' shapes tell, the published settings otherwise."""
    try:
        width, in_width = shapes["patch_embed.proj.weight"]
        ffn = shapes["encoder.layers.0.ffn.fc1.weight"][0]
        norm_width = shapes["norm.weight"][0]
    except (KeyError, ValueError, IndexError) as e:
        raise CheckpointError(f"{path}: not a LongNet slide encoder ({e} is missing or misshapen)") from e
    depth = 1 + max(int(m[1]) for m in (re.match(r"encoder\.layers\.(\d+)\.", n) for n in shapes) if m)
    return LongNetConfig(in_width, width, depth, ffn=ffn, norm_width=norm_width)


def _configured(c: LongNetConfig, f: Fields) -> LongNetConfig:
    """`c` with the settings that config.json gives."""
    f.only(_KNOWN, "remove what is no setting of the slide encoder, or give its weights a folder of their own")
    for key, size in (("in_chans", c.in_width), ("embed_dim", c.width), ("depth", c.depth), ("ffn_dim", c.ffn)):
        f.equals(key, size, "as the weights are")
    f.equals("slide_ngrids", GRID, "the only grid supported")
    config = replace(
        c,
        heads=f.whole("heads", default=c.heads),
        segment_lengths=_segments(f, c.segment_lengths),
        dilated_ratios=f.wholes(*_RATIOS, default=c.dilated_ratios),
        eps=f.positive(*_LAYER_EPS, default=c.eps),
        pool_eps=f.positive(*_POOL_EPS, default=c.pool_eps),
    )
    try:
        check_branches(config.segment_lengths, config.dilated_ratios)
    except KernelInputError as e:
        raise CheckpointError(
            f"{f.label}: segments {config.segment_lengths} do not fit: {e}; correct config.json"
        ) from e
    if config.width % config.heads or config.width % 4:
        raise CheckpointError(
            f"{f.label}: width {config.width} with {config.heads} heads do not fit, expected a width divisible by both "
            "4 and the heads; correct config.json"
        )
    return config


def _segments(f: Fields, default: tuple[int, ...]) -> tuple[int, ...]:
    """The list as given, or what the slide's size makes it; both given must agree."""
    ruled = default
    if f.given(*_SLIDE):
        size, tile = f.whole("max_wsi_size", default=262144), f.whole("tile_size", default=256)
        if not 1 <= size / tile <= 2**20:
            f.refuse("max_wsi_size", size, f"1 to 2^20 times tile_size {tile}")
        ruled = segments_for(size, tile)
    segments = f.wholes(*_SEGMENTS, default=ruled)
    if f.given("max_wsi_size") and segments != ruled:
        raise CheckpointError(
            f"{f.label}: segments {list(segments)}, but its max_wsi_size and tile_size make them {list(ruled)}; "
            "keep one of the two"
        )
    return segments


def segments_for(max_wsi_size: int, tile: int) -> tuple[int, ...]:
    """SPEC 3: floor(2^linspace(10, floor(log2((max_wsi_size / tile)^2)), 5))."""
    top = math.floor(math.log2((max_wsi_size / tile) ** 2))
    return tuple(math.floor(2.0 ** (10 + (top - 10) * i / 4)) for i in range(5))
