"""Dilated attention by fused attention with one key more, against the published operator's golden vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("torch", reason="the export extra is not installed")
safetensors = pytest.importorskip("safetensors.numpy", reason="the export extra is not installed")

from onnx import TensorProto, helper  # noqa: E402

from wsi_rt.export.graphs.builder import OUR_DOMAIN, WeightFile  # noqa: E402
from wsi_rt.export.graphs.dilated_attention_rtx import (  # noqa: E402
    HEADROOM,
    RANGES,
    Widths,
    fuse_calls,
    fused_function,
)
from wsi_rt.export.graphs.half import HALVES, write_half  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "golden" / "dilated_attention"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def model_of(segments, ratios, heads, width):
    """A graph that only calls the operator, as the slide encoder's does."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["L", heads, width]) for n in ("q", "k", "v", "out")]
    call = helper.make_node(
        "DilatedAttention",
        ["q", "k", "v"],
        ["out"],
        name="/call",
        domain=OUR_DOMAIN,
        segment_lengths=segments,
        dilated_ratios=ratios,
    )
    graph = helper.make_graph([call], "g", values[:3], values[3:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(OUR_DOMAIN, 1)])


@pytest.fixture
def run(tmp_path, ort_run):
    """(precision, segments, ratios, q, k, v) -> out, headroom: fp32, or half precision as onnxruntime runs it."""

    def attend(precision, segments, ratios, q, k, v):
        _, heads, width = q.shape
        model = model_of(segments, ratios, heads, width)
        fuse_calls(model, heads, width, precision)
        path = tmp_path / f"{precision}.onnx"
        if precision == "fp32":
            for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
                for entry in imports:
                    entry.version = 24 if entry.domain == "" else entry.version
            path.write_bytes(model.SerializeToString())
        else:
            weights = WeightFile(tmp_path / "weights.data")
            write_half(model, tmp_path, path, weights, HALVES[precision], emulated=precision == "bf16")
        found = ort_run(path, {"q": q, "k": k, "v": v})
        return found["out"], float(found[HEADROOM])

    return attend


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["file"].removesuffix(".safetensors"))
def test_golden(case, run):
    """fp32 within 1e-5; half types within a few of their roundings, and never out of range."""
    x = safetensors.load_file(str(GOLDEN / case["file"]))
    for precision in RANGES:
        out, headroom = run(precision, case["segment_length"], case["dilated_ratio"], x["q"], x["k"], x["v"])
        assert headroom >= 1
        bound = 1e-5 if precision == "fp32" else 6 * HALVES[precision].unit_roundoff * np.abs(x["v"]).max()
        assert np.abs(out - x["out"]).max() <= bound, precision


def reference(segments, ratios, q, k, v):
    import torch

    from wsi_rt.kernels.dilated_attention.reference import dilated_attention_reference

    return dilated_attention_reference(*map(torch.from_numpy, (q, k, v)), segments, ratios).numpy()


PUBLISHED = ([1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16])


@pytest.mark.parametrize("length", [2, 3, 15, 16, 17, 33])
def test_slides_shorter_than_every_segment(length, run):
    rng = np.random.default_rng(length)
    q, k, v = (rng.standard_normal((length, 16, 48)).astype(np.float32) for _ in range(3))
    out, headroom = run("fp32", *PUBLISHED, q, k, v)
    assert headroom >= 1
    assert np.abs(out - reference(*PUBLISHED, q, k, v)).max() <= 1e-5


def test_without_a_branch_of_ratio_1(run):
    """What no branch keeps is zero."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((21, 4, 16)).astype(np.float32) for _ in range(3))
    out, _ = run("fp32", [8, 16], [2, 4], q, k, v)
    expected = reference([8, 16], [2, 4], q, k, v)
    assert (expected == 0).all(axis=-1).any()
    assert np.abs(out - expected).max() <= 1e-5


def one_key_stands_out(score, count, width=16):
    """q, k [count, 2, width]: every query has this score with the first key, and 0 with all others."""
    q, k = (np.zeros((count, 2, width), np.float32) for _ in "qk")
    q[..., 0], k[0, :, 0] = width**0.5, score
    return q, k


@pytest.mark.parametrize("precision", RANGES)
@pytest.mark.parametrize("score", [-150, -60, -10, 0, 10, 60, 150])
def test_equal_scores_of_any_size(precision, score, run):
    """Whatever they are: the appended key's score lies near."""
    rng = np.random.default_rng(1)
    v = rng.standard_normal((24, 2, 16)).astype(np.float32)
    q, k = one_key_stands_out(score, 24)
    k[:] = k[0]
    out, headroom = run(precision, [8, 16], [1, 2], q, k, v)
    bound = 1e-5 if precision == "fp32" else 6 * HALVES[precision].unit_roundoff * np.abs(v).max()
    expected = reference([8, 16], [1, 2], q, k, v)
    if headroom >= 1:
        assert np.abs(out - expected).max() <= bound
    assert (headroom >= 1) == (score >= (-10 if precision == "fp16" else -60)), headroom


@pytest.mark.parametrize(("precision", "sound", "broken"), [("fp16", 12, 60), ("bf16", 60, 200), ("fp32", 60, 200)])
def test_a_key_that_stands_out_is_right_or_told(precision, sound, broken, run):
    """A single key among 2,000, unlike all the others, is what an estimate from their moments must miss: up to a score
    it does not matter, beyond, the headroom tells."""
    rng = np.random.default_rng(2)
    v = rng.standard_normal((2000, 2, 16)).astype(np.float32)
    for score in (sound, broken):
        q, k = one_key_stands_out(score, 2000)
        out, headroom = run(precision, [1024, 2000], [1, 2], q, k, v)
        assert (headroom >= 1) == (score == sound), headroom
        if score == sound:
            bound = 2e-5 if precision == "fp32" else 10 * HALVES[precision].unit_roundoff * np.abs(v).max()
            assert np.abs(out - reference([1024, 2000], [1, 2], q, k, v)).max() <= bound


@pytest.mark.parametrize("spread", [1, 2, 4])
def test_scores_of_trained_layers_fit_fp16(spread, run):
    """Normal scores of a deviation up to 4, whose sum over 1,000 is about e^15; e^12 would be the end with t = 0."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1200, 4, 48)).astype(np.float32) for _ in range(3))
    q *= spread
    out, headroom = run("fp16", [1024, 1200], [1, 2], q, k, v)
    assert headroom >= 1
    rounded = [x.astype(np.float16).astype(np.float32) for x in (q, k, v)]
    assert np.abs(out - reference([1024, 1200], [1, 2], *rounded)).max() <= 0.02 * spread**0.5


def test_the_columns_fit():
    for width in (4, 15, 16, 48, 62, 63, 64):
        w = Widths(4, width, RANGES["fp16"])
        assert w.filled % 16 == 0
        assert width + 2 <= w.filled < width + 18
        assert 0.7 < w.appended * w.scale < 1.5
    assert Widths(16, 48, RANGES["fp16"]).filled == 64


def test_the_function_keeps_its_settings_and_no_matrix_of_scores():
    function = fused_function((1024, 5792), (1, 2), Widths(16, 48, RANGES["fp16"]))
    kinds = [n.op_type for n in function.node]
    assert kinds.count("Attention") == 2
    assert "MatMul" not in kinds
    assert "Softmax" not in kinds
    assert list(function.attribute) == ["segment_lengths", "dilated_ratios"]


def test_a_graph_without_a_call_is_refused():
    model = model_of([8], [1], 2, 16)
    model.graph.node[0].op_type = "Other"
    with pytest.raises(ValueError, match="calls no wsi_rt::DilatedAttention"):
        fuse_calls(model, 2, 16, "fp32")
