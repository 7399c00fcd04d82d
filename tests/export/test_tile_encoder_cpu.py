"""The tile encoder as onnxruntime runs it on the CPU: fused, and the same bits whatever is beside a tile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
onnx = pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.component import lower, open_component  # noqa: E402
from wsi_rt.export.models import reference_model  # noqa: E402
from wsi_rt.export.sources.presets import NANO, WSI_LLAVA_7B  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource  # noqa: E402
from wsi_rt.export.sources.weights import Part  # noqa: E402
from wsi_rt.runtime.engines.ort import open_session  # noqa: E402
from wsi_rt.runtime.parity import GATES, compare  # noqa: E402

VIT = NANO.tile_encoder
VARIANTS = {
    "nano": VIT,
    "plain-mlp": replace(VIT, mlp="mlp", act="gelu"),
    "quick-gelu-qk-norm": replace(VIT, mlp="mlp", act="quick_gelu", qk_norm=True, reg_tokens=4, no_embed_class=True),
    "swiglu-odd": replace(VIT, mlp="swiglu", width=72, heads=3, mlp_hidden=90, patch_px=14, pool="avg", fc_norm=True),
}
TILES = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), np.uint8)


def lowered(tmp_path, config, precision):
    part = Part(config, SyntheticSource(config, "test", 1))
    component = open_component(part, tmp_path / "tile_encoder", precision)
    return component, lower(component, "ort-cpu", threads=1)["ort-cpu"]


def features(found, tiles, threads, batch):
    session = open_session(found.graphs["model"], found.weights_dir, threads)
    parts = [tiles[i : i + batch] for i in range(0, len(tiles), batch)]
    return np.concatenate([session.run(None, {"tiles": part})[0] for part in parts])


def require_equal_bits(found, tiles):
    alone = features(found, tiles, 1, 1)
    for threads in (1, 2):
        for batch in (1, 7, 64):
            other = features(found, tiles, threads, batch)
            assert np.array_equal(alone.view(np.uint32), other.view(np.uint32)), (threads, batch)
    turned = features(found, tiles[::-1], 2, 7)[::-1]  # other neighbours, other places in the batch
    assert np.array_equal(alone.view(np.uint32), turned.view(np.uint32))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tile_has_the_same_bits_whatever_batch_threads_and_neighbours(tmp_path, variant, precision):
    require_equal_bits(lowered(tmp_path, VARIANTS[variant], precision)[1], TILES)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_so_it_has_at_full_width(tmp_path, precision):
    require_equal_bits(lowered(tmp_path, replace(WSI_LLAVA_7B.tile_encoder, depth=2), precision)[1], TILES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_is_the_reference(tmp_path, variant):
    config = VARIANTS[variant]
    _, found = lowered(tmp_path, config, "fp32")
    with torch.inference_mode():
        expected = reference_model(config, SyntheticSource(config, "test", 1))(torch.from_numpy(TILES[:3])).numpy()
    assert compare({"x": features(found, TILES[:3], 1, 3)}, {"x": expected}).passes(GATES["fp32"])


def test_it_runs_the_fused_operators(tmp_path):
    """No score matrix, one pass for the gate, products of integers: what the speed rests on."""
    _, found = lowered(tmp_path, VIT, "int8")
    graph = onnx.load(str(found.graphs["model"]), load_external_data=False).graph
    kinds = [n.op_type for n in graph.node]
    assert kinds.count("MultiHeadAttention") == kinds.count("QuickGelu") == VIT.depth
    assert kinds.count("MatMulIntegerToFloat") + kinds.count("MatMulNBits") == 4 * VIT.depth
    assert not {"MatMul", "Softmax", "Sigmoid", "DynamicQuantizeLinear"} & set(kinds)
