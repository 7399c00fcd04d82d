"""Layers that lose too much to 8 bits and one scale a row are found at build time, and kept wider."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export import sensitive  # noqa: E402
from wsi_rt.export.arch import linear_shapes  # noqa: E402
from wsi_rt.export.component import build_component  # noqa: E402
from wsi_rt.export.precision import WIDER, format_of, formats  # noqa: E402
from wsi_rt.export.quantise import BlockFormat  # noqa: E402
from wsi_rt.export.sensitive import MAX_ERROR, MAX_ROW_ERROR, sensitive_layers  # noqa: E402
from wsi_rt.export.sources.presets import NANO  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource  # noqa: E402
from wsi_rt.export.sources.weights import Part  # noqa: E402

VIT = replace(NANO.tile_encoder, width=256, heads=4, mlp_hidden=256, depth=2)
ROWS = BlockFormat(bits=8, block=0, symmetric=True)
OUTLIER = "blocks.1.norm1"


@pytest.fixture
def source(changed):
    """One channel of what blocks.1.attn.qkv takes is 200 times the others, and hardly counts."""
    whole = SyntheticSource(VIT, "test", 1)
    gain, weight = whole.get(f"{OUTLIER}.weight").copy(), whole.get("blocks.1.attn.qkv.weight").copy()
    gain[3], weight[:, 3] = 200, 0.01 * weight[:, 3]
    return changed(whole, {f"{OUTLIER}.weight": gain, "blocks.1.attn.qkv.weight": weight})


def test_a_layer_with_an_outlier_channel_is_kept_wider(source):
    found = sensitive_layers(VIT, source, format_of("int8", "tile_encoder"))
    assert "blocks.1.attn.qkv" in found.losses
    loss = found.losses["blocks.1.attn.qkv"]
    assert loss.error > MAX_ERROR or loss.row > MAX_ROW_ERROR
    assert loss.left <= MAX_ERROR
    choose = found.format_of(lambda _: ROWS)
    assert choose("blocks.1.attn.qkv") in WIDER
    assert choose("blocks.0.attn.qkv") == ROWS
    assert found.worst <= MAX_ERROR


def test_where_blocks_do_not_help_it_is_fp32(monkeypatch):
    monkeypatch.setattr(sensitive, "MAX_ERROR", 1e-9)
    found = sensitive_layers(VIT, SyntheticSource(VIT, "test", 1), format_of("int8", "tile_encoder"))
    assert set(found.formats) == set(linear_shapes(VIT))
    assert set(found.formats.values()) == {None}
    assert {loss.format for loss in found.losses.values()} == {"fp32"}
    assert formats(VIT, "int8", found.format_of(format_of("int8", "tile_encoder"))) == {}


def test_the_manifest_records_it(tmp_path, source):
    manifest = build_component("tile_encoder", Part(VIT, source), tmp_path, "ort-cpu", "int8", 1, lambda _: None)
    told = manifest.rounding["sensitive"]
    assert told["limits"] == {"error": MAX_ERROR, "row": MAX_ROW_ERROR}
    assert told["worst"] <= MAX_ERROR
    wider = told["wider"]
    stored = manifest.targets["ort-cpu"].formats
    assert wider["blocks.1.attn.qkv"]["format"] in {*stored, "fp32"}
    assert stored["int8xrow"]["layers"] == len(linear_shapes(VIT)) - len(wider)


def test_calibration_has_stained_tissue():
    tiles = sensitive.calibration_tiles(VIT)["tiles"]
    assert tiles.shape == (4, 256, 256, 3)
    for tissue in tiles[2:]:
        red, green, blue = tissue.reshape(-1, 3).mean(axis=0)
        assert green < min(red, blue), "haematoxylin and eosin are not grey"
        assert tissue.std() > 10


def test_errors_are_those_of_the_product():
    """Against the formula, by hand: integer codes of activations and weights, multiplied."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 64), np.float32), rng.standard_normal((7, 64), np.float32)
    steps = np.abs(x).max(1, keepdims=True) / 127, np.abs(w).max(1, keepdims=True) / 127
    codes = (np.rint(a / s) for a, s in zip((x, w), steps, strict=True))
    product = np.multiply(*np.meshgrid(steps[1][:, 0], steps[0][:, 0])) * (next(codes) @ next(codes).T)
    off = np.linalg.norm(product - x @ w.T, axis=1)
    size = np.sqrt(np.square(np.linalg.norm(x @ w.T, axis=1)).mean())
    error, row = sensitive._error(torch.from_numpy(x), w, ROWS, torch.from_numpy(x @ w.T))
    assert error == pytest.approx(np.sqrt(np.square(off).mean()) / size, rel=1e-3)
    assert row == pytest.approx(off.max() / size, rel=1e-3)
