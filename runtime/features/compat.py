"""Whether features of a file are what a bundle works on: refused, with the reason, where the file says otherwise.

What our own encoders stamped is compared by digest (`encode.require_own`); here is what other tools say in names and
attributes. What a file does not say cannot be checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.types import TILE_PX, SlideTokens, TileFeatures

TOLERANCE = 0.05  # resolutions within 5 % count as the same (SPEC 1)
MPP_AT_1X = 10.0  # um/px: 20x is 0.5 by convention
# A slide called 40x has 0.22 to 0.26 um/px, so what follows from that name is compared by the next power of 2 only.
NOMINAL = 1.4
# Tile encoders as TRIDENT and AtlasPatch name them (letters and digits, lower case). Those of 1536 numbers per tile
# pass for GigaPath's by their width.
GIGAPATH = {"gigapath", "provgigapath", "gigapathtile"}
OTHERS = {
    *("uni", "univ1", "univ2", "uni2", "uni2h", "conch", "conchv1", "conchv15", "virchow", "virchow2", "virchowv2"),
    *("hoptimus0", "hoptimus1", "h0mini", "phikon", "phikonv2", "ctranspath", "hibou", "hiboub", "hiboul", "musk"),
    *("resnet50", "gpfm", "lunitvits8", "midnight12k", "midnight", "kaikovitb8", "kaikovits8", "kaikovitl14", "keep"),
}


def refuse_other_mpp(
    features: TileFeatures, attributes: Mapping[str, Any], settings: SlideSettings, where: str
) -> None:
    """Raises FeatureFileError when the tiles' own resolution, as 256 px, is not `settings.target_mpp`."""
    told = working_mpp(features.grid.provenance.settings, features.grid.patch_size_level0, attributes)
    if told is None:
        return
    mpp, source, factor = told
    ratio = mpp / settings.target_mpp
    if not 1 / factor - 1e-9 <= ratio <= factor + 1e-9:
        raise FeatureFileError(
            f"{where}: its tiles have {mpp:.4g} um/px ({source}), expected {settings.target_mpp:g}: features of "
            f"another mpp; extract them again at {MPP_AT_1X / settings.target_mpp:g}x with {TILE_PX} px, or say that "
            f"this is meant with --target-mpp {mpp:.4g}"
        )


def working_mpp(
    record: Mapping[str, Any], size0: int | None, attributes: Mapping[str, Any]
) -> tuple[float, str, float] | None:
    """(um/px of a tile as 256 px, what says so, the factor it may be off by), or None where the file does not say.

    record: settings of our own grid; size0: tile edge in level-0 px; attributes: TRIDENT's.
    """
    own = record.get("target_mpp")
    if isinstance(own, (int, float)) and 0 < own < 1e3:
        return float(own), "its own record", 1 + TOLERANCE
    target, px = (_number(attributes.get(name)) for name in ("target_magnification", "patch_size"))
    if target and px:
        return MPP_AT_1X / target * px / TILE_PX, f"{px:g} px at {target:g}x", 1 + TOLERANCE
    level0 = _number(attributes.get("level0_magnification"))
    if level0 and size0:
        return MPP_AT_1X / level0 * size0 / TILE_PX, f"{size0} px of a {level0:g}x slide", NOMINAL
    return None


def refuse_other_encoder(features: TileFeatures, tile_encoder: Mapping[str, Any] | None, where: str) -> tuple[str, ...]:
    """Compare the name that a file gives its tile encoder with the bundle's; returns notes.

    tile_encoder: configuration of the bundle's, None where it has none. Raises FeatureFileError when the file names
    another one than GigaPath and the bundle's is GigaPath.
    """
    name = features.provenance.settings.get("encoder_name")
    if not isinstance(name, str):
        return ()
    plain, shown = re.sub(r"[^a-z0-9]", "", name.lower()), ascii(name)[1:-1][:40]
    ours = tile_encoder is not None and is_gigapath(tile_encoder)
    if ours and plain in OTHERS:
        raise FeatureFileError(
            f"{where}: its features are those of the tile encoder {shown}, this bundle's is GigaPath: features of "
            "another encoder; extract them with GigaPath, or encode the slide with this bundle"
        )
    if ours and plain in GIGAPATH:
        return ()
    return (f"the file names its tile encoder {shown}, which cannot be compared with this bundle's",)


def is_gigapath(config: Mapping[str, Any]) -> bool:
    """SPEC 2; H-optimus has the same width and depth, with patches of 14."""
    return (config.get("width"), config.get("depth"), config.get("patch_px")) == (1536, 40, 16)


def refuse_other_order(tokens: SlideTokens, settings: SlideSettings, where: str) -> None:
    """Raises FeatureFileError for tokens that were made of tiles in another order than row-major, unless that is
    asked for."""
    order = tokens.provenance.settings.get("order", "row-major")
    if order != "row-major" and not settings.keep_order:
        raise FeatureFileError(
            f"{where}: its slide tokens were made of tiles in {ascii(order)[1:-1][:40]} order, expected row-major "
            "(y, x); encode the tiles again, or say that this is meant with --keep-order"
        )


def _number(value: Any) -> float | None:
    array = np.asarray(value).ravel()
    if array.dtype.kind not in "iuf" or array.size != 1 or not 0 < float(array[0]) < 1e6:
        return None
    return float(array[0])
