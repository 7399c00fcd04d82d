"""Bundles of reduced precision, end to end: they answer, verify, say what they are; files remember who made them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.pipeline import Pipeline

GREEDY = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory):
    """Encoders in int8, language model in int4."""
    from wsi_rt.export.build import BuildRequest, build_engines, plan_build
    from wsi_rt.export.sources.checkpoint import Sources

    out = tmp_path_factory.mktemp("narrow") / "engines"
    precision = "tile_encoder=int8,slide_encoder=int8,llm=int4"
    build_engines(plan_build(BuildRequest(Sources(checkpoint="synthetic:nano?seed=0"), out, precision=precision)))
    return out


def test_it_answers_and_is_smaller(narrow, nano_bundle, slide):
    with Pipeline.open(narrow) as pipeline:
        encoded = pipeline.encode(slide)
        assert len(pipeline.ask(encoded, "What is the grade?", GREEDY).token_ids) == 12
    sizes = [sum(f.size for f in Bundle.open(root).manifest.files.values()) for root in (narrow, nano_bundle)]
    assert sizes[0] < 0.5 * sizes[1]


def test_inspect_tells_bits_block_and_symmetry(narrow, wsi_rt):
    out = wsi_rt("inspect", narrow).out
    assert "  weights: 16 Linear layers in 4 bits, one scale per 32, asymmetric" in out
    assert "  weights: 13 Linear layers in 8 bits, one scale per 64, symmetric" in out
    told = json.loads(wsi_rt("inspect", narrow, "--json").out)["components"]["tile_encoder"]["targets"]["ort-cpu"]
    assert sum(f["layers"] for f in told["formats"].values()) == 12
    assert f"  weights: {told['formats']['int8xrow']['layers']} Linear layers in 8 bits, one scale per row" in out
    assert out.count("rounded weights: off by") == 3
    told = json.loads(wsi_rt("inspect", narrow, "--json").out)["components"]["llm"]["targets"]["ort-cpu"]
    assert told["precision"] == "int4"
    assert told["formats"]["int4x32"] == {"bits": 4, "block": 32, "symmetric": False, "layers": 16}


def test_verify_passes(narrow, wsi_rt):
    result = wsi_rt("verify", narrow)
    assert result.code == 0, result.err
    assert result.out.count(" ok ") == 4


def test_another_precision_is_another_build(narrow, wsi_rt):
    words = ("build-engines", "--checkpoint", "synthetic:nano?seed=0", "--out", narrow, "--precision")
    assert "up to date" in wsi_rt(*words, "tile_encoder=int8,slide_encoder=int8,llm=int4").err
    refused = wsi_rt(*words, "int8")
    assert refused.code == 2
    assert "holds another build" in refused.err


@pytest.mark.parametrize("suffix", [".h5", ".pt"])
def test_files_remember_the_precision_that_made_them(narrow, nano_bundle, slide, wsi_rt, tmp_path, suffix):
    """The weights are the same, so the file is taken; that they were rounded on the way is said."""
    path = tmp_path / f"x{suffix}"
    assert wsi_rt("encode", slide, "--engines", narrow, "--out", path).code == 0
    ask = ("ask", path, "What is the grade?", "--max-new-tokens", "2", "--engines")
    own, other = wsi_rt(*ask, narrow), wsi_rt(*ask, nano_bundle)
    assert own.code == other.code == 0, (own.err, other.err)
    note = "encoder that made this input was int8, this bundle's is fp32"
    assert note not in own.err
    assert f"tile_{note}" in other.err
    assert (f"slide_{note}" in other.err) == (suffix == ".pt")
