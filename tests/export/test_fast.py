"""`--fast`: a language model's layers a second time, as integer products for calls of many rows."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.arch import LlamaConfig, linear_shapes
from wsi_rt.export.component import build_component
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.export.sources.weights import Part
from wsi_rt.export.targets import ort_cpu
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.errors import InputError, ParityError
from wsi_rt.runtime.features import write_slide_tokens
from wsi_rt.runtime.llm.decoder import Chunk
from wsi_rt.runtime.llm.ort_layers import WIDE_ROWS
from wsi_rt.runtime.parity import check_component, load_check
from wsi_rt.runtime.types import Provenance, SlideTokens

CONFIG = LlamaConfig(hidden=128, layers=2, heads=4, kv_heads=2, head_width=32, ffn=352, vocab=512, context=1024)


def build(work, fast: bool):
    part = Part(CONFIG, SyntheticSource(CONFIG, "test", 3))
    return build_component("llm", part, work, "ort-cpu", "int4", 2, lambda _: None, fast)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    work = tmp_path_factory.mktemp("fast")
    return work, build(work, fast=True)


@pytest.fixture(scope="module")
def decoders(opened):
    with (
        backend("ort-cpu").open_decoder(*opened, 2) as exact,
        backend("ort-cpu").open_decoder(*opened, 2, fast=True) as fast,
    ):
        yield exact, fast


def logits(decoder, embeds):
    return decoder.extend([Chunk(decoder.new_kv(200), embeds, len(embeds))])[0]


def test_few_rows_are_the_exact_ones_and_many_are_nearer_the_checkpoint(opened, decoders):
    exact, fast = decoders
    work, manifest = opened
    assert (exact.spec.row_exact, fast.spec.row_exact) == (True, False)
    few = np.random.default_rng(0).uniform(-1, 1, (WIDE_ROWS - 1, CONFIG.hidden)).astype(np.float32)
    assert np.array_equal(logits(fast, few), logits(exact, few))
    inputs, expected = load_check(work / manifest.check)
    found = {}
    for name, decoder in (("exact", exact), ("fast", fast)):
        found[name] = decoder.prefill(decoder.new_kv(1024), inputs["embeds"])
    checkpoint = expected["logits.wide"][0]  # fp32, from weights that are not rounded
    off = {name: float(np.abs(x - checkpoint).max()) for name, x in found.items()}
    assert off["fast"] < 0.3 * off["exact"], "8 bits against 4"


def test_the_manifest_tells_and_verify_looks_at_both(opened):
    work, manifest = opened
    compiled = manifest.compiled("ort-cpu")
    assert compiled.formats["int8xrow, wide"]["layers"] == len(linear_shapes(CONFIG)) - CONFIG.layers
    assert compiled.formats["int8x128, wide"]["layers"] == CONFIG.layers, "down_proj"
    assert compiled.parity["layers"]["wide"]["error"] < 0.05  # the gate: 0.15
    assert check_component(work, "ort-cpu", manifest, 2).max_rel < 0.1
    weights = work / "llm" / "weights.data"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-4096] + bytes(4096))  # the last that was written: scales of the wide layers
    try:
        assert check_component(work, "ort-cpu", manifest, 2).max_rel > 0.1
    finally:
        weights.write_bytes(intact)


def test_a_fault_in_the_wide_layers_fails_the_build(tmp_path, monkeypatch):
    """Rows of one matrix turned around in the wide graphs, the narrow ones whole: refused, naming the layer."""

    class Damaged(SyntheticSource):
        damaged = False

        def get(self, name):
            x = super().get(name)
            return x[::-1].copy() if self.damaged and name == "model.layers.1.mlp.down_proj.weight" else x

    source = Damaged(CONFIG, "test", 3)
    real = ort_cpu.build_layers

    def build_layers(c, _source, weights, folder, style):
        source.damaged = folder.name == "wide"
        try:
            return real(c, _source, weights, folder, style)
        finally:
            source.damaged = False

    monkeypatch.setattr(ort_cpu, "build_layers", build_layers)
    with pytest.raises(ParityError, match=r"layer model\.layers\.1 differs"):
        build_component("llm", Part(CONFIG, source), tmp_path, "ort-cpu", "int4", 2, lambda _: None, True)


def test_a_bundle_without_refuses(tmp_path):
    manifest = build(tmp_path, fast=False)
    with pytest.raises(InputError, match=r"no graphs for it; build it again with wsi-rt build-engines --fast"):
        backend("ort-cpu").open_decoder(tmp_path, manifest, 2, fast=True)


def test_fp32_has_nothing_to_gain(tmp_path):
    from wsi_rt.export.build import BuildRequest, plan_build
    from wsi_rt.export.sources.checkpoint import Sources

    request = BuildRequest(Sources(checkpoint="synthetic:nano?seed=0"), tmp_path / "out", fast=True)
    with pytest.raises(InputError, match="expected --precision llm=int4 or llm=int8"):
        plan_build(request)
    plan = plan_build(replace(request, precision="int4"))
    assert "--fast" in request.arguments()
    assert plan.to_json()["fast"] is True
    assert plan.estimated_bytes > plan_build(replace(request, precision="int4", fast=False)).estimated_bytes


def test_the_command_answers_and_says_that_it_was_fast(tmp_path, wsi_rt):
    """Twenty questions together, from a bundle that has both."""
    tokens = tmp_path / "slide.pt"
    x = np.random.default_rng(0).standard_normal((576, 1024)).astype(np.float32)
    write_slide_tokens(tokens, SlideTokens(x, Provenance("test")))
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(f"What of region {i}?" for i in range(20)))
    checkpoint = ("--checkpoint", "synthetic:nano?seed=0", "--components", "projector,llm", "--precision", "llm=int4")
    engines = tmp_path / "engines"
    assert wsi_rt("build-engines", *checkpoint, "--fast", "--out", engines).code == 0
    asked = ("ask", tokens, "--questions", questions, "--engines", engines, "--max-new-tokens", "8", "--json")
    found = {}
    for flags in ((), ("--fast",)):
        result = wsi_rt(*asked, *flags)
        assert result.code == 0, result.err
        answers = json.loads(result.out)["answers"]
        assert all(a["settings"].get("fast", False) == bool(flags) for a in answers)
        found[flags] = [tuple(a["token_ids"]) for a in answers]
    assert len(found[()]) == len(found[("--fast",)]) == 20
