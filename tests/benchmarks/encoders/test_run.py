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

from wsi_rt.benchmarks.encoders import cases, plot, run
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
    with pytest.raises(InputError, match="--case is 'slide-7', expected one of: slide-1000, slide-3000, slide-10000"):
        cases.chosen(["slide-7"], False)
    assert cases.chosen([], True) == ("slide-1000",)
    assert cases.chosen([], False) == ("slide-1000", "slide-3000", "slide-10000", "slide-20000", "slide-50000")


def test_long_slides_are_run_once():
    assert [cases.repeats(case, 3) for case in cases.chosen([], False)] == [(3, 2)] * 3 + [(1, 1)] * 2


def curve(provider=OURS):
    for case, n in cases.TILES.items():
        for metric, unit, value in (
            ("seconds", "s", n / 500), ("planned_seconds", "s", n / 450),
            ("peak_rss_bytes", "B", 2e8 + 3e4 * n), ("planned_bytes", "B", 2.1e8 + 3e4 * n),
        ):  # fmt: skip
            yield Row("encoders", case, provider, metric, unit, 2, p50=value)


def test_the_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    from PIL import Image

    rows = [*curve(), *curve(INT8), Row("encoders", "slide-1000", REFERENCE, "seconds", "s", skipped="none")]
    assert plot._points(rows, OURS, "seconds") == [(n, n / 500) for n in cases.TILES.values()]
    assert plot._points(rows, REFERENCE, "seconds") == []
    plot.write_curve(rows, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        colours = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in plot.COLOURS}
        drawn = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
        assert image.size == (1500, 630)
    assert drawn & colours == {(0x1D, 0x4E, 0xD8), (0xC2, 0x41, 0x0C)}, "a provider that did not run is not drawn"


def test_a_picture_that_cannot_be_written_is_refused_before_the_bench(tmp_path, wsi_rt):
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    for name, said in (("curve.txt", "expected a name that ends in .png"), ("no/curve.png", "mkdir -p")):
        told = wsi_rt("bench", "encoders", "--quick", "--plot", tmp_path / name)
        assert (told.code, said in told.err) == (2, True), told.err


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> tuple[Plan, dict[str, Path]]:
    plan = Plan(("slide-1000",), "nano", tmp_path_factory.mktemp("cache"), 1, 1)
    return plan, {provider: build(plan, precision) for provider, precision in run.PRECISIONS.items()}  # measured, too


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
    for provider in (OURS, INT8):
        assert 0.1 < found[provider, "over_planned"].p50 < 10, "the plan is of this engine and this many tiles"
        assert 0.5 < found[provider, "bytes_over_planned"].p50 < 2
    assert (REFERENCE, "planned_seconds") not in found
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
def test_the_command_gives_rows_of_the_common_form(tmp_path, capsys):
    from wsi_rt.runtime.cli import run as wsi_rt

    assert wsi_rt(["bench", "encoders", "--quick", "--threads", "1", "--cache", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"machine", "versions", "commit", "rows"} <= set(shown)
    providers = {row["provider"] for row in shown["rows"]}
    assert providers == {"reference", "wsi-rt", "wsi-rt:int8", "limit"}
    assert {row["bench"] for row in shown["rows"]} == {"encoders"}
