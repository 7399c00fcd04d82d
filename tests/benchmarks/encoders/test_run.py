"""`wsi-rt bench encoders`: what the reference computes, what rows say, and what a wrong answer does to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

import torch

from wsi_rt.benchmarks.encoders import cases, run
from wsi_rt.benchmarks.encoders.cases import INT8, OURS, REFERENCE, attention_flops, linear_flops
from wsi_rt.benchmarks.encoders.published import PublishedSlideEncoder, dilated_attention
from wsi_rt.benchmarks.encoders.run import Outcome, Plan, bench_case, build, source_of
from wsi_rt.benchmarks.report import Row
from wsi_rt.export.arch import LongNetConfig
from wsi_rt.export.models import reference_model
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.kernels.dilated_attention.reference import dilated_attention_reference
from wsi_rt.runtime.errors import InputError


@pytest.mark.parametrize("length", [1, 17, 100, 257])
def test_published_attention_equals_the_reference(length):
    q, k, v = torch.randn(3, length, 8, 16, generator=torch.Generator().manual_seed(0))
    for branches in (((16, 48, 300), (1, 2, 4)), ((13, 31), (1, 8))):
        assert torch.allclose(
            dilated_attention(q, k, v, *branches), dilated_attention_reference(q, k, v, *branches), atol=1e-5
        )


def test_published_module_equals_the_reference_model():
    c = LongNetConfig(in_width=32, width=64, depth=2, heads=16, ffn=128, norm_width=64, padded=96)
    source = SyntheticSource(c, "test", 1)
    features, positions = (torch.from_numpy(x) for x in cases.slide(c, 1030).values())
    with torch.inference_mode():
        expected = reference_model(c, source)(features, positions)["tokens"]
    assert torch.allclose(PublishedSlideEncoder(c, source).tokens(features, positions), expected, atol=2e-5)


def test_arithmetic_of_the_published_size():
    """Issue 7: 3.0 TFLOP for 10,000 tiles, 1.7 of them linear and 1.3 attention."""
    c = LongNetConfig(in_width=1536)
    assert linear_flops(c, 10_000) == pytest.approx(1.7e12, rel=0.03)
    assert attention_flops(c, 10_000) == pytest.approx(1.3e12, rel=0.03)
    one_branch = replace(c, segment_lengths=(1024,), dilated_ratios=(1,), depth=1)
    assert attention_flops(one_branch, 2047) == 2 * (2 * 1024**2 * 768 * 2), "scores and values of two segments"


def test_slides_are_distinct_tiles_row_by_row():
    for tiles in (1, 9, 10, 1000):
        made = cases.slide(LongNetConfig(in_width=8), tiles)
        positions = made["positions"]
        assert made["features"].shape == (tiles, 8)
        assert len(np.unique(positions, axis=0)) == tiles
        assert np.array_equal(np.lexsort(positions.T), np.arange(tiles))


def test_unknown_case_is_refused():
    with pytest.raises(InputError, match="--case is 'slide-7', expected one of: slide-1000, slide-10000, slide-50000"):
        cases.chosen(["slide-7"], False)
    assert cases.chosen([], True) == ("slide-1000",)
    assert cases.chosen([], False) == ("slide-1000", "slide-10000", "slide-50000")


def test_prediction_is_by_arithmetic_from_10000_tiles():
    c = LongNetConfig(in_width=1536)
    work = {n: linear_flops(c, n) + attention_flops(c, n) for n in (1_000, 10_000)}
    rows = [Row("encoders", "slide-10000", OURS, "seconds", "s", 2, p50=20.0)]
    rows += [Row("encoders", "slide-1000", OURS, "seconds", "s", 2, p50=3 * 20.0 * work[1_000] / work[10_000])]
    rows += [Row("encoders", "slide-1000", REFERENCE, "seconds", "s", 2, p50=9.0)]
    found = {(r.case, r.provider): r.p50 for r in run._predicted(c, rows)}
    assert found == {("slide-10000", OURS): 1.0, ("slide-1000", OURS): pytest.approx(3.0)}


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> tuple[Plan, dict[str, Path]]:
    plan = Plan(("slide-1000",), "nano", tmp_path_factory.mktemp("cache"), 1, 1)
    return plan, {provider: build(plan, precision) for provider, precision in run.PRECISIONS.items()}


@pytest.mark.slow
def test_a_whole_case(plan):
    plan, bundles = plan
    outcome = Outcome()
    c, _ = source_of(plan.word)
    rows = bench_case(plan, c, "slide-1000", bundles, outcome, lambda what: None)
    assert (outcome.red, outcome.broken) == ([], [])
    found = {(r.provider, r.metric): r for r in rows}
    metrics = {"seconds", "tiles_per_s", "gflops", "peak_rss_bytes"}
    for provider in (REFERENCE, OURS, INT8):
        assert metrics <= {m for p, m in found if p == provider}
        assert found[provider, "seconds"].p50 > 0
        assert 1e8 < found[provider, "peak_rss_bytes"].p50 < 2e9
    assert found[OURS, "max_error"].p50 <= 2e-4
    assert 0.999 <= found[INT8, "min_cosine"].p50 < 0.9999999
    assert found[OURS, "peak_rss_bytes"].p50 < found[REFERENCE, "peak_rss_bytes"].p50, "no torch in our process"


@pytest.mark.slow
def test_wrong_tokens_are_red_and_not_timed(plan):
    """The fp32 bundle of other weights: its rows say why it has no figures."""
    plan, bundles = plan
    other = replace(plan, preset="nano", cache=plan.cache / "other")
    spoilt = build(other, "int8")
    outcome = Outcome()
    c, _ = source_of(plan.word)
    rows = bench_case(plan, c, "slide-1000", {**bundles, OURS: spoilt}, outcome, lambda what: None)
    assert len(outcome.red) == 1
    assert outcome.red[0].startswith("slide-1000: wsi-rt: its tokens are off by")
    assert not outcome.broken
    ours = [r for r in rows if r.provider == OURS]
    assert [r.metric for r in ours if r.skipped] == ["seconds"]
    assert not [r for r in ours if r.metric in ("speedup", "tiles_per_s", "peak_rss_bytes")]


def test_a_process_that_dies_is_told(tmp_path):
    found = run.measure({"provider": OURS, "tiles": 4, "bundle": str(tmp_path), "runs": 1}, 1, str(tmp_path))
    assert found["skipped"].startswith("its process ended with exit code 1: ")
    assert "no engine bundle" in found["skipped"] or "without manifest" in found["skipped"]


@pytest.mark.slow
def test_the_command_gives_rows_of_the_common_form(tmp_path, capsys, monkeypatch):
    from wsi_rt.runtime.cli import run as wsi_rt

    monkeypatch.setitem(cases.TILES, "slide-1000", 60)
    assert wsi_rt(["bench", "encoders", "--quick", "--threads", "1", "--cache", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"machine", "versions", "commit", "rows"} <= set(shown)
    providers = {row["provider"] for row in shown["rows"]}
    assert providers == {"reference", "wsi-rt", "wsi-rt:int8", "limit"}
    assert {row["bench"] for row in shown["rows"]} == {"encoders"}
