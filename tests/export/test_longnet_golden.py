"""SPEC 10: the published slide encoder and its operator, through torch and through the exported graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
load_file = pytest.importorskip("safetensors.numpy", reason="the export extra is not installed").load_file

from wsi_rt.export.arch import LongNetConfig  # noqa: E402
from wsi_rt.export.graphs import slide_encoder  # noqa: E402
from wsi_rt.export.graphs.builder import GraphBuilder, WeightFile, check_model  # noqa: E402
from wsi_rt.export.graphs.dilated_attention import dilated_attention  # noqa: E402
from wsi_rt.export.graphs.layers import Style  # noqa: E402
from wsi_rt.export.lowering import lower_ort_cpu  # noqa: E402
from wsi_rt.export.models import reference_model  # noqa: E402
from wsi_rt.export.sources.files import FileSource, open_weights  # noqa: E402
from wsi_rt.export.sources.weights import check_tensors  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = json.loads((GOLDEN / "longnet" / "tiny.json").read_text())
OPERATOR = json.loads((GOLDEN / "dilated_attention" / "cases.json").read_text())
TOLERANCE, OPERATOR_TOLERANCE = 2e-4, 1e-5  # max abs, SPEC 10


def config(padded: int) -> LongNetConfig:
    c = TINY["config"]
    return LongNetConfig(
        in_width=c["in_chans"],
        width=c["embed_dim"],
        depth=c["depth"],
        heads=c["heads"],
        ffn=c["ffn_dim"],
        segment_lengths=tuple(c["segment_length"]),
        dilated_ratios=tuple(c["dilated_ratio"]),
        eps=c["layer_norm_eps"],
        pool_eps=c["norm_eps"],
        padded=padded,
        norm_width=c["embed_dim"],
    )


@pytest.fixture(scope="module")
def source() -> FileSource:
    source = open_weights(GOLDEN / "longnet" / "tiny_weights.safetensors")
    check_tensors(source, config(64).tensors(), "slide_encoder")
    return source


@pytest.fixture(scope="module")
def runners(source, tmp_path_factory: pytest.TempPathFactory, ort_run):
    """The same encoder three ways: features, positions -> outputs by name."""
    folder = tmp_path_factory.mktemp("longnet")
    portable, lowered = folder / "model.onnx", folder / "ort-cpu" / "model.onnx"
    slide_encoder.build(
        config(64), source, WeightFile(folder / "weights.data"), portable, Style(), expose_encoder_out=True
    )
    check_model(portable)
    lower_ort_cpu(portable, lowered)
    module = reference_model(config(64), source)

    def run_torch(features, positions):
        with torch.inference_mode():
            out = module(torch.from_numpy(features), torch.from_numpy(positions))
        return {name: x.numpy() for name, x in out.items()}

    def onnx_runner(path):
        return lambda features, positions: ort_run(path, {"features": features, "positions": positions})

    return {"torch": run_torch, "portable": onnx_runner(portable), "ort-cpu": onnx_runner(lowered)}


@pytest.mark.parametrize("way", ["torch", "portable", "ort-cpu"])
@pytest.mark.parametrize("n", TINY["cases"], ids=lambda n: f"N{n}")
def test_encoder_equals_published(runners, n, way):
    case = load_file(GOLDEN / "longnet" / f"tiny_L{n}.safetensors")
    out = runners[way](case["tile_features"], case["coords"] // TINY["config"]["tile_size"])
    expected = {"tokens": case["pooled"], "cls": case["cls"], "mean": case["mean"]}
    if int(n) <= 1500:
        expected["encoder_out"] = case["encoder_out"]
    assert expected["tokens"].shape == (576, 64)
    for name, reference in expected.items():
        assert out[name].shape == reference.shape, name
        assert np.abs(out[name] - reference).max() <= TOLERANCE, name


def test_golden_covers_1_to_4500():
    assert {1, 575, 576, 577, 1023, 1024, 4500} <= {int(n) for n in TINY["cases"]}


def test_padded_channels_are_zero_after_the_norm(source, tmp_path, ort_run):
    """norm.weight of width C: norm first, then zero channels (SPEC 3)."""
    slide_encoder.build(config(80), source, WeightFile(tmp_path / "weights.data"), tmp_path / "model.onnx", Style())
    case = load_file(GOLDEN / "longnet" / "tiny_L17.safetensors")
    out = ort_run(tmp_path / "model.onnx", {"features": case["tile_features"], "positions": case["coords"] // 256})
    assert out["tokens"].shape == (576, 80)
    assert np.abs(out["tokens"][:, :64] - case["pooled"]).max() <= TOLERANCE
    assert not out["tokens"][:, 64:].any()


def test_wide_norm_pads_first(source, changed, tmp_path, ort_run):
    """norm.weight of the padded width: zero channels first, then the norm over all of them (SPEC 3)."""
    wide = LongNetConfig(**{**vars(config(80)), "norm_width": 80})
    rng = np.random.default_rng(0)
    norm = {f"norm.{k}": rng.uniform(0.5, 1.5, 80).astype(np.float32) for k in ("weight", "bias")}
    weights = changed(source, norm)
    slide_encoder.build(
        wide, weights, WeightFile(tmp_path / "weights.data"), tmp_path / "model.onnx", Style(), expose_encoder_out=True
    )
    case = load_file(GOLDEN / "longnet" / "tiny_L577.safetensors")
    inputs = {"features": case["tile_features"], "positions": case["coords"] // 256}
    out = ort_run(tmp_path / "model.onnx", inputs)
    assert set(out) == {"tokens", "encoder_out"}, "a norm wider than C has no CLS and mean heads"

    tokens = case["encoder_out"][1:]
    bins = [tokens[i * 577 // 576 : -(-(i + 1) * 577 // 576)].mean(axis=0) for i in range(576)]
    x = np.pad(np.stack(bins), ((0, 0), (0, 16)))
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    assert np.abs(out["tokens"] - (x * norm["norm.weight"] + norm["norm.bias"])).max() <= TOLERANCE


@pytest.mark.parametrize("case", OPERATOR, ids=lambda c: c["file"].removesuffix(".safetensors"))
def test_operator_graph_equals_published(case, tmp_path, ort_run):
    b = GraphBuilder("operator", WeightFile(tmp_path / "weights.data"))
    heads, width = case["H"], case["D"]
    q, k, v = (b.input(name, onnx.TensorProto.FLOAT, ["tokens", heads, width]) for name in "qkv")
    out = dilated_attention(b, q, k, v, case["segment_length"], case["dilated_ratio"], heads, width)
    b.output(out, "out", onnx.TensorProto.FLOAT, ["tokens", heads, width])
    b.save(tmp_path / "operator.onnx")
    check_model(tmp_path / "operator.onnx")
    tensors = load_file(GOLDEN / "dilated_attention" / case["file"])
    expected = tensors.pop("out")
    assert expected.shape == (case["L"], heads, width)
    actual = ort_run(tmp_path / "operator.onnx", tensors)["out"]
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= OPERATOR_TOLERANCE


def test_operator_graph_is_zero_where_no_branch_keeps(tmp_path, ort_run):
    b = GraphBuilder("operator", WeightFile(tmp_path / "weights.data"))
    q, k, v = (b.input(name, onnx.TensorProto.FLOAT, ["tokens", 4, 8]) for name in "qkv")
    b.output(dilated_attention(b, q, k, v, [9], [2], 4, 8), "out", onnx.TensorProto.FLOAT, ["tokens", 4, 8])
    b.save(tmp_path / "operator.onnx")
    rng = np.random.default_rng(0)
    out = ort_run(tmp_path / "operator.onnx", {n: rng.standard_normal((9, 4, 8), np.float32) for n in "qkv"})["out"]
    assert not out[1::2, :2].any()
    assert not out[0::2, 2:].any()
    assert np.abs(out[0::2, :2]).min() > 0
