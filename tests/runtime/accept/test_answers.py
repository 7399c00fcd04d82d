"""Answers: each known setting is told by its flag; honest ones are accepted, others are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_rt.runtime import GenerationSettings, Pipeline
from wsi_rt.runtime.accept.answers import Answerer, Spelling, Trial, Vocabulary, fp16_noise
from wsi_rt.runtime.features import write_tensor
from wsi_rt.runtime.manifest import load_manifest

Run = Callable[..., Any]
QUESTIONS = (
    "Is there necrosis?",
    "What is the grade of this tumour?",
    "Which subtype is seen?",
    "Are the margins free?",
    "Describe the growth pattern.",
)
LENGTH = 24


@pytest.fixture(scope="module")
def reference_tokens(encode: Run, tiles: Run) -> np.ndarray:
    return encode(tiles(54))


@pytest.fixture(scope="module")
def answer(pipeline: Pipeline, reference_tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """answer(**settings) -> the texts `ask` gives to QUESTIONS."""
    path = tmp_path_factory.mktemp("answer") / "ref.pt"
    write_tensor(path, reference_tokens)
    encoded = pipeline.encode(path)

    def call(**settings: Any) -> list[str]:
        chosen = GenerationSettings(**{"max_new_tokens": LENGTH, **settings})
        return [pipeline.ask(encoded, q, chosen).text for q in QUESTIONS]

    return call


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def ask(wsi_rt: Run, nano_bundle: Path, reference_tokens: np.ndarray, tmp_path: Path) -> Run:
    """ask(answers, *flags) -> (exit code, the JSON report) of answers to QUESTIONS."""

    def call(
        answers: list[str], *flags: object, length: int = LENGTH, spoil: Callable[[Any], Any] = lambda x: x
    ) -> tuple[int, dict[str, Any]]:
        write_tensor(tmp_path / "REF.pt", spoil(reference_tokens))
        rows = [{"question_id": f"id-{i}", "image": "X/REF.pt", "question": q} for i, q in enumerate(QUESTIONS)]
        questions = write_lines(tmp_path / "q.jsonl", rows)
        told = write_lines(tmp_path / "a.jsonl", [{"question_id": f"id-{i}", "text": a} for i, a in enumerate(answers)])
        files = ("--features", tmp_path / "REF.pt", "--questions", questions, "--answers", told)
        common = ("--engines", nano_bundle, "--threads", 1, "--max-new-tokens", length, "--json")
        result = wsi_rt("accept", *files, *common, *flags)
        assert result.code in (0, 5), result.err
        return result.code, json.loads(result.out)

    return call


def test_honest_answers_are_accepted(ask: Run, answer: Run) -> None:
    code, report = ask([f" {text}\n" for text in answer()])
    assert (code, report["text"]) == (0, "accept")
    counts = {k: report["answers"][k] for k in ("compared", "same_text", "ties_only", "differing")}
    assert counts == {"compared": 5, "same_text": 5, "ties_only": 0, "differing": 0}


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"template": "llava_v1"}, ("--template", "llava_v1")),
        ({"no_repeat_ngram_size": 3}, ("--no-repeat-ngram-size", 3)),
        pytest.param({"no_repeat_ngram_size": 5}, ("--no-repeat-ngram-size", 5), marks=pytest.mark.slow),
        ({"repetition_penalty": 1.1}, ("--repetition-penalty", 1.1)),
        pytest.param(
            {"template": "llava_v1", "no_repeat_ngram_size": 5},
            ("--template", "llava_v1", "--no-repeat-ngram-size", 5),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else None,
)
def test_other_settings_are_told_and_their_flags_agree(
    ask: Run, answer: Run, settings: dict[str, Any], flags: tuple[object, ...]
) -> None:
    length = 160 if "no_repeat_ngram_size" in settings else LENGTH  # the n-gram rule has to bite
    theirs = answer(**settings, max_new_tokens=length)[:3]
    code, report = ask(theirs, length=length)
    assert (code, report["verdict"]) == (5, "accept with these differences"), report["text"]
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        assert f"{flag} {value}" in report["text"]
    code, report = ask(theirs, *flags, length=length)
    assert (code, report["text"]) == (0, "accept")


def test_answers_that_are_cut_are_told(ask: Run, answer: Run) -> None:
    code, report = ask(answer(max_new_tokens=10))
    assert (code, report["verdict"]) == (5, "accept with these differences")
    assert "smaller --max-new-tokens" in report["text"]
    assert {a["kind"] for a in report["answers"]["answers"]} == {"longer"}
    assert all(a["first_difference"] >= 10 for a in report["answers"]["answers"])
    code, report = ask(answer(), length=10)
    assert "our --max-new-tokens ends answers" in report["text"]
    assert code == 5


def test_answers_without_trimming_are_told(ask: Run, answer: Run) -> None:
    theirs = answer(stop=())
    marker = theirs[0][12:16]
    code, report = ask(theirs, "--stop", marker)
    assert (code, report["verdict"]) == (5, "accept with these differences")
    assert report["answers"]["answers"][0]["kind"] == "untrimmed"
    assert "does not trim" in report["text"]
    assert ask([t.partition(marker)[0] for t in theirs], "--stop", marker)[0] == 0


def test_template_and_cut_together_are_told(ask: Run, answer: Run) -> None:
    code, report = ask(answer(template="llava_v1", max_new_tokens=12))
    assert (code, report["verdict"]) == (5, "accept with these differences")
    assert "--template llava_v1" in report["text"]
    assert "smaller --max-new-tokens" in report["text"]


def test_sampled_answers_are_not_accepted_and_temperature_0_is_asked_for(ask: Run, answer: Run) -> None:
    code, report = ask(answer(temperature=0.2, seed=3))
    assert (code, report["verdict"]) == (5, "do not accept")
    assert "compare with answers made at temperature 0" in report["text"]


def test_answers_about_another_slide_are_not_accepted(
    ask: Run, pipeline: Pipeline, encode: Run, tiles: Run, tmp_path: Path
) -> None:
    write_tensor(tmp_path / "other.pt", encode(tiles(60)))
    other = pipeline.encode(tmp_path / "other.pt")
    theirs = [pipeline.ask(other, q, GenerationSettings(max_new_tokens=LENGTH)).text for q in QUESTIONS]
    code, report = ask(theirs)
    assert (code, report["verdict"]) == (5, "do not accept")
    assert "no known setting explains it" in report["text"]
    assert report["answers"]["same_text"] == 0


def test_one_wrong_answer_is_enough(ask: Run, answer: Run) -> None:
    theirs = answer()
    code, report = ask([*theirs[:3], "Yes, the margins are free of tumour.", theirs[4]])
    assert (code, report["verdict"]) == (5, "do not accept")
    assert "1 of 5 answers differ" in report["text"]
    assert report["answers"]["answers"][3]["explained_by"] is None


def test_a_tie_goes_on_along_the_reference(
    pipeline: Pipeline, reference_tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner-up's path, made by hand at the narrowest step: a tie for a noise above the margin, else a difference
    whose margin is that of the logits."""
    with Answerer(pipeline.bundle, reference_tokens) as answerer:
        settings = GenerationSettings(max_new_tokens=16)
        path, margins = greedy(answerer, settings, {})
        step = int(np.argmin(margins))
        other, _ = greedy(answerer, settings, {step: 1})
        assert other[:step] == path[:step]
        reference = answerer.tokenizer.decode(other)
        narrow = answerer.walk(QUESTIONS[0], Trial(settings, reference, noise=margins[step] * 1.01))
        assert (narrow.kind, narrow.first_difference) == ("same", step)
        assert narrow.ties[0] == (step, pytest.approx(margins[step], rel=1e-3))
        monkeypatch.setattr("wsi_rt.runtime.accept.answers.fp16_noise", lambda _: 0.0)
        real = answerer.walk(QUESTIONS[0], Trial(settings, reference, noise=margins[step] * 0.99))
        assert (real.kind, real.tokens, real.margin) == ("other", step, pytest.approx(margins[step], rel=1e-3))


def greedy(answerer: Answerer, settings: GenerationSettings, ranks: dict[int, int]) -> tuple[list[int], list[float]]:
    """16 tokens straight from the decoder, the best one, or that of another rank at some steps; and top-2 margins."""
    kv, logits, _ = answerer.begin(QUESTIONS[0], settings)
    ids: list[int] = []
    margins: list[float] = []
    for step in range(settings.max_new_tokens):
        order = np.argsort(-logits)
        margins.append(float(logits[order[0]] - logits[order[1]]))
        ids.append(int(order[ranks.get(step, 0)]))
        logits = answerer.decoder.step([kv], np.array(ids[-1:], np.int64))[0]
    return ids, margins


def test_fp16_noise_is_two_steps_of_the_type() -> None:
    assert fp16_noise(20.0) == 2 * 2**-6
    assert fp16_noise(-1.5) == 2 * 2**-10


@pytest.mark.slow
def test_another_checkpoints_answers_are_not_accepted(
    wsi_rt: Run, ask: Run, reference_tokens: np.ndarray, tmp_path: Path
) -> None:
    flags = ("--checkpoint", "synthetic:nano?seed=1", "--components", "projector,llm")
    assert wsi_rt("build-engines", *flags, "--out", tmp_path / "seed1").code == 0
    write_tensor(tmp_path / "tokens.pt", reference_tokens)
    with Pipeline.open(tmp_path / "seed1", threads=1) as other:
        encoded = other.encode(tmp_path / "tokens.pt")
        theirs = [other.ask(encoded, q, GenerationSettings(max_new_tokens=LENGTH)).text for q in QUESTIONS]
    code, report = ask(theirs)
    assert (code, report["verdict"]) == (5, "do not accept")


def test_an_int4_language_model_is_named(ask: Run, answer: Run, reduced_bundle: Path) -> None:
    """Its margins count as ties up to twice what its engine and its weights' rounding move a logit by."""
    code, report = ask(answer(max_new_tokens=16), "--engines", reduced_bundle, length=16)
    assert (code, report["verdict"]) == (5, "accept with these differences")
    assert "--precision llm=fp32 would tell" in report["text"]
    llm = load_manifest(reduced_bundle).components["llm"]
    engine, rounding = llm.compiled("ort-cpu").parity["engine"]["max_abs"], llm.rounding["outputs"]["max_abs"]
    assert report["answers"]["logit_error"] == pytest.approx(engine + rounding)
    margins = [a["margin"] for a in report["answers"]["answers"] if a["explained_by"] == ["precision"]]
    assert max(margins) <= 2 * (engine + rounding)
    assert max(margins) > 2 * engine, "the engine's error alone must not be enough here"
    code, report = ask(["Yes, the margins are free of tumour."] * 5, "--engines", reduced_bundle)
    assert (code, report["verdict"]) == (5, "do not accept")
    assert "--precision llm=fp32 would tell more" in report["text"]


def test_the_limit_takes_the_first(ask: Run, answer: Run) -> None:
    code, report = ask([*answer()[:2], "x", "y", "z"], "--limit", 2)
    assert (code, report["answers"]["compared"]) == (0, 2)


def test_spelling_follows_text_whatever_the_tokens(pipeline: Pipeline) -> None:
    tokenizer = pipeline.bundle.tokenizer()
    vocabulary = Vocabulary(tokenizer)
    text = "Grade III; necrosis is present."
    spelling = Spelling(vocabulary, f" {text}\n", ("\nUSER:",))
    for token in tokenizer.encode(text):
        assert spelling.allows(token)
        assert token in spelling.candidates()
        assert not any(spelling.allows(e) for e in tokenizer.eos_ids)
        spelling.push(token)
    assert spelling.complete
    assert spelling.allows(tokenizer.eos_ids[0])
    assert not spelling.allows(tokenizer.encode("more")[-1])
    for token in tokenizer.encode("\nUSER:")[1:]:  # the dummy prefix left out
        assert spelling.allows(token)
        spelling.push(token)
    assert spelling.stopped
    assert not spelling.trimmed
    with pytest.raises(ValueError, match="does not go on"):
        Spelling(vocabulary, "Grade", ()).push(tokenizer.encode("other")[-1])


def test_padding_that_is_not_zero_is_told_without_a_slide(ask: Run, answer: Run) -> None:
    code, report = ask(answer(), spoil=lambda x: x + 1)
    assert (code, report["verdict"]) == (5, "do not accept")
    assert "padding columns 768.. of the reference are not zero" in report["text"]
    assert report["reference"]["padding_is_zero"] is False
