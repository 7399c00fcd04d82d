"""The whole pipeline through the torch target: slide, tiles, encoders, projector and language model, held against
ONNX Runtime's fp32 engines of the same checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")

import torch

from wsi_rt.runtime import GenerationSettings, Pipeline
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.encode import Encoded
from wsi_rt.runtime.engines.torch_device import describe
from wsi_rt.runtime.engines.torch_engine import TorchEngine
from wsi_rt.runtime.llm.language_model import AUTO, Question
from wsi_rt.runtime.llm.torch_decoder import TorchDecoder
from wsi_rt.runtime.types import Answer

GREEDY = GenerationSettings(max_new_tokens=24, repetition_penalty=1.1, no_repeat_ngram_size=3)
OPEN = ("What is the grade?", "Describe the stroma.", "Which margin is nearest?", "What of the nuclei?")
CLOSED = (
    Question("Is there necrosis?", choices=AUTO),
    Question("Which? A) one B) two C) three D) four", choices=AUTO),
    Question("The grade is", choices=("low", "intermediate", "high")),
)
ENCODERS = ("tile_encoder", "slide_encoder", "projector")


@dataclass
class Pair:
    """The same checkpoint through both targets; `slide` encoded by each."""

    ort: Pipeline
    torch: Pipeline
    device: torch.device
    slide: tuple[Encoded, Encoded]

    def both(self, *questions: str | Question) -> tuple[list[Answer], list[Answer]]:
        """Each asks about the slide as it encoded it itself."""
        ort, own = (p.ask_many(s, questions, GREEDY) for p, s in zip((self.ort, self.torch), self.slide, strict=True))
        return ort, own


def build(target: str, checkpoint: str, out: Path) -> Path:
    from wsi_rt.export.build import BuildRequest, build_engines, plan_build
    from wsi_rt.export.sources.checkpoint import Sources

    build_engines(plan_build(BuildRequest(Sources(checkpoint=checkpoint), out, target)), lambda _: None)
    return out


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def bundles(
    request: pytest.FixtureRequest, export_extra: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, torch.device]:
    """(of ort-cpu, of torch, where the latter is to run). The decoder's kernels take heads of 64 or 128 on a GPU, which
    the nano checkpoint has not."""
    folder = tmp_path_factory.mktemp(f"torch-{request.param}")
    if request.param == "cpu":
        ort, checkpoint = request.getfixturevalue("nano_bundle"), "synthetic:nano?seed=0"
        return ort, build("torch", checkpoint, folder / "torch"), torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that this torch can use")
    from wsi_rt.export.sources.presets import NANO, PRESETS

    heads = replace(NANO, llm=replace(NANO.llm, heads=4, kv_heads=2, head_width=64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "wide-heads", heads)
        ort, own = (build(t, "synthetic:wide-heads?seed=0", folder / t) for t in ("ort-cpu", "torch"))
    return ort, own, torch.device("cuda", 0)


@pytest.fixture(scope="module")
def pair(bundles: tuple[Path, Path, torch.device], slide: Path) -> Iterator[Pair]:
    ort_root, torch_root, device = bundles
    with pytest.MonkeyPatch.context() as patch:
        for module in ("engines.torch_engine", "llm.torch_decoder"):  # the CPU, also where there is a GPU
            patch.setattr(f"wsi_rt.runtime.{module}.choose_device", lambda: device)
        with Pipeline(Bundle.open(ort_root, 2)) as ort, Pipeline(Bundle.open(torch_root, 2, "torch")) as own:
            yield Pair(ort, own, device, (ort.encode(slide), own.encode(slide)))


def test_engines_and_decoder_are_torchs_and_say_where_they_run(pair: Pair) -> None:
    pair.both(OPEN[0])
    engines = {name: pair.torch._engine(name) for name in ENCODERS}
    assert all(isinstance(engine, TorchEngine) for engine in engines.values())
    decoder = pair.torch._asking.model(pair.torch._clock).decoder
    assert isinstance(decoder, TorchDecoder)
    told = {decoder.facts["device"], *(engine.facts["device"] for engine in engines.values())}
    assert told == {describe(pair.device)}


def test_tiles_features_and_tokens_are_the_same(pair: Pair) -> None:
    ort, own = pair.slide
    assert own.tiles == ort.tiles
    assert own.features is not None
    assert ort.features is not None
    assert own.tokens is not None
    assert ort.tokens is not None
    np.testing.assert_array_equal(own.features.grid.xy0, ort.features.grid.xy0)
    for found, expected in ((own.features.x, ort.features.x), (own.tokens.tokens, ort.tokens.tokens)):
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert own.tokens.provenance.settings["precision"] == "fp32"


def test_from_the_slide_to_the_greedy_tokens_it_is_the_same(pair: Pair, slide: Path) -> None:
    expected, answer = (pipeline.ask(slide, OPEN[0], GREEDY) for pipeline in (pair.ort, pair.torch))
    assert len(answer.token_ids) == 24
    assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)
    assert answer.stop_reason == expected.stop_reason
    assert answer.settings["target"] == "torch"
    runs: Any = answer.settings["runs"]
    where = {name: facts["device"] for name, facts in runs.items()}
    assert where == dict.fromkeys((*ENCODERS, "llm"), describe(pair.device))
    assert "runs" not in expected.settings


def test_greedy_tokens_of_questions_asked_together_are_the_same(pair: Pair) -> None:
    ort, own = pair.both(*OPEN)
    assert len({a.token_ids for a in ort}) == len(OPEN), "answers that are all alike show little"
    assert [(a.token_ids, a.text) for a in own] == [(a.token_ids, a.text) for a in ort]


def test_closed_questions_have_the_same_answer_and_shares(pair: Pair) -> None:
    ort, own = pair.both(*CLOSED)
    for expected, answer in zip(ort, own, strict=True):
        assert answer.text == expected.text
        assert answer.choices is not None
        assert expected.choices is not None
        assert list(answer.choices) == list(expected.choices)
        assert answer.choices == pytest.approx(dict(expected.choices), rel=1e-3)


def test_open_and_closed_questions_asked_together(pair: Pair) -> None:
    mixed = [q for two in zip(OPEN, CLOSED, strict=False) for q in two]
    ort, own = pair.both(*mixed)
    assert [(a.token_ids, a.text) for a in own] == [(a.token_ids, a.text) for a in ort]


def test_turns_of_a_conversation_are_the_same(pair: Pair) -> None:
    said = []
    for pipeline, slide in zip((pair.ort, pair.torch), pair.slide, strict=True):
        with pipeline.converse(slide, GREEDY) as dialogue:
            said.append([dialogue.ask(q).token_ids for q in OPEN[:2]])
    assert said[0] == said[1]


def test_features_of_one_target_serve_the_other(pair: Pair) -> None:
    """The same weights: what ort-cpu encoded is asked about through torch."""
    answer, expected = pair.torch.ask(pair.slide[0], OPEN[2], GREEDY), pair.ort.ask(pair.slide[0], OPEN[2], GREEDY)
    assert answer.token_ids == expected.token_ids


def test_opening_a_torch_bundle_imports_no_torch(bundles: tuple[Path, Path, torch.device]) -> None:
    """Not before something is computed: `wsi-rt` on an ort-cpu bundle never meets it at all (test_imports.py)."""
    code = "import sys\nfrom wsi_rt.runtime.bundle import Bundle\nBundle.open(sys.argv[1], 1, 'torch')\n"
    code += "print([n for n in ('torch', 'onnx', 'triton') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundles[1])], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
