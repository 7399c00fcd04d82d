"""Features of a file against what a bundle works on: mpp, encoder, order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from wsi_rt.runtime import SlideSettings
from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features import read_tile_file
from wsi_rt.runtime.features.compat import is_gigapath, refuse_other_encoder, refuse_other_mpp, refuse_other_order
from wsi_rt.runtime.types import Provenance, SlideTokens

GIGAPATH = {"width": 1536, "depth": 40, "patch_px": 16}
H_OPTIMUS = {"width": 1536, "depth": 40, "patch_px": 14}


def tiles(path: Path, attrs: dict[str, Any], group: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as root:
        root["features" + (f"/{group}" if group else "")] = np.ones((2, 4), np.float32)
        root["coords"] = np.array([(0, 0), (512, 0)])
        root["coords"].attrs.update({"patch_size_level0": 512, **attrs})
    return path


@pytest.mark.parametrize(
    ("attrs", "mpp"),
    [
        ({"patch_size": 256, "target_magnification": 40}, "0.25"),
        ({"patch_size": 512, "target_magnification": 20}, "1"),
        ({"patch_size": 224, "target_magnification": 20}, "0.4375"),
        ({"level0_magnification": 20}, "1"),
    ],
    ids=["40x", "512-px", "224-px", "20x-slide"],
)
def test_another_mpp_is_refused_with_the_reason(tmp_path: Path, attrs: dict[str, Any], mpp: str):
    features, carried = read_tile_file(tiles(tmp_path / "a.h5", attrs))
    with pytest.raises(FeatureFileError, match=f"have {mpp} um/px .*another mpp.*--target-mpp {mpp}$"):
        refuse_other_mpp(features, carried, SlideSettings(), "a.h5")
    refuse_other_mpp(features, carried, SlideSettings(target_mpp=float(mpp)), "a.h5")


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"patch_size": 256, "target_magnification": 20},
        {"patch_size": 512, "target_magnification": 40},
        {"level0_magnification": 40},
        {"patch_size": 256, "downsample": (2.0, 2.0)},
        {"target_magnification": "20x", "patch_size": 256},
    ],
    ids=["silent", "20x", "512-px-at-40x", "40x-slide", "clam", "text"],
)
def test_the_working_mpp_and_silence_are_taken(tmp_path: Path, attrs: dict[str, Any]):
    features, carried = read_tile_file(tiles(tmp_path / "a.h5", attrs))
    refuse_other_mpp(features, carried, SlideSettings(), "a.h5")


@pytest.mark.parametrize(
    ("folder", "group", "attrs", "named"),
    [
        ("features_uni_v2", "", {}, "uni_v2"),
        ("atlas", "h_optimus_0", {}, "h_optimus_0"),
        ("any", "", {"encoder": "conch_v15"}, "conch_v15"),
        ("features_gigapath", "", {}, "gigapath"),
        ("any", "", {}, None),
    ],
)
def test_the_encoder_that_a_file_names(
    tmp_path: Path, folder: str, group: str, attrs: dict[str, Any], named: str | None
):
    features, _ = read_tile_file(tiles(tmp_path / folder / "slide.h5", attrs, group))
    assert features.provenance.settings.get("encoder_name") == named
    if named in (None, "gigapath"):
        assert refuse_other_encoder(features, GIGAPATH, "slide.h5") == ()
    else:
        with pytest.raises(FeatureFileError, match=f"tile encoder {named}, this bundle's is GigaPath.*another encoder"):
            refuse_other_encoder(features, GIGAPATH, "slide.h5")
    told = refuse_other_encoder(features, H_OPTIMUS, "slide.h5")
    assert (told == ()) == (named is None)
    assert refuse_other_encoder(features, None, "slide.h5") == told


def test_a_name_that_nobody_knows_is_told(tmp_path: Path):
    features, _ = read_tile_file(tiles(tmp_path / "features_ours\u00e9" / "slide.h5", {}))
    (note,) = refuse_other_encoder(features, GIGAPATH, "slide.h5")
    assert "ours\\xe9, which cannot be compared" in note


def test_gigapath_is_told_by_its_shape():
    assert is_gigapath(GIGAPATH)
    assert not is_gigapath(H_OPTIMUS)
    assert not is_gigapath({})


def test_tokens_of_another_order_are_refused():
    x = np.zeros((576, 4), np.float32)
    made = {order: SlideTokens(x, Provenance("slide_encoder", "", {"order": order})) for order in ("file", "row-major")}
    refuse_other_order(made["row-major"], SlideSettings(), "a.pt")
    refuse_other_order(SlideTokens(x, Provenance("external")), SlideSettings(), "a.pt")
    refuse_other_order(made["file"], SlideSettings(keep_order=True), "a.pt")
    with pytest.raises(FeatureFileError, match=r"made of tiles in file order, expected row-major.*--keep-order"):
        refuse_other_order(made["file"], SlideSettings(), "a.pt")
