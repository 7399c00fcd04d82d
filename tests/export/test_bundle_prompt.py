"""Golden prompt ids through the tokenizer that a bundle carries (SPEC 5, 10)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("sentencepiece", reason="the export extra is not installed")

from wsi_rt.export.build import BuildRequest, build_engines, plan_build
from wsi_rt.export.sources.checkpoint import Sources
from wsi_rt.export.sources.presets import PRESETS
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.llm.prompt import encode_prompt

CASES = Path(__file__).resolve().parents[1] / "golden/prompt/cases.json"
MODEL = Path(__file__).resolve().parents[2].parent / "shared/data/llm/llama2_tokenizer.model"


def test_golden_prompts_through_the_bundles_tokenizer(tiny, monkeypatch, tmp_path):
    if not MODEL.is_file():
        pytest.skip(f"{MODEL} is not here")
    monkeypatch.setitem(PRESETS, "wide", replace(tiny, llm=replace(tiny.llm, vocab=32000)))
    sources = Sources(llava="synthetic:wide", tokenizer=str(MODEL))
    build_engines(plan_build(BuildRequest(sources, tmp_path / "bundle", components=("llm",), threads=1)))
    tokenizer = Bundle.open(tmp_path / "bundle", threads=1).tokenizer()
    cases = json.loads(CASES.read_text(encoding="utf-8"))
    assert len(cases) == 12
    for case in cases:
        prompt = encode_prompt(tokenizer, case["template"], case["question"])
        assert list(prompt.before) == case["before"], case["question"]
        assert list(prompt.after) == case["after"], case["question"]
