"""`accept`: references made with each known difference are told by its name; honest ones are accepted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_rt.runtime import GenerationSettings, Pipeline, SlideSettings
from wsi_rt.runtime.accept.answers import Answerer, Trial, fp16_noise
from wsi_rt.runtime.accept.records import about, match, read_answers, read_questions
from wsi_rt.runtime.accept.reference import tile_count
from wsi_rt.runtime.accept.report import Level, Section, verdict
from wsi_rt.runtime.accept.spelling import Spelling, Vocabulary
from wsi_rt.runtime.accept.states import SlideStates, bin_edges, pool
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.features import write_tensor, write_tile_features
from wsi_rt.runtime.types import Provenance, TileFeatures, TileGrid

Run = Callable[..., Any]
WIDTH = 96  # numbers per tile of the nano tile encoder
SIZE0 = 512  # level-0 px of a tile: 40x, where the divisor matters
QUESTIONS = (
    "Is there necrosis?",
    "What is the grade of this tumour?",
    "Which subtype is seen?",
    "Are the margins free?",
    "Describe the growth pattern.",
)
LENGTH = 24


# --- tokens
def tiles(count: int) -> TileFeatures:
    """Tiles of a made-up 40x slide, in row-major order, with gaps."""
    rng, side = np.random.default_rng(count), int(count**0.5 * 1.3) + 2
    cells = np.sort(rng.permutation(side * side)[:count])
    xy0 = np.stack([cells % side, cells // side], axis=1).astype(np.int64) * SIZE0
    return TileFeatures(
        rng.standard_normal((count, WIDTH)).astype(np.float32), TileGrid(xy0, SIZE0), Provenance("test")
    )


def in_order(features: TileFeatures, order: np.ndarray) -> TileFeatures:
    return replace(features, x=features.x[order], grid=replace(features.grid, xy0=features.grid.xy0[order]))


COLUMN_MAJOR = "column-major order"
SHUFFLED = np.random.default_rng(7).permutation
ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    COLUMN_MAJOR: lambda xy: np.lexsort((xy[:, 1], xy[:, 0])),
    "reversed order": lambda xy: np.arange(len(xy))[::-1],
    "file-name order": lambda xy: np.array(sorted(range(len(xy)), key=lambda i: f"{xy[i, 0]}_{xy[i, 1]}")),
    "another order": lambda xy: SHUFFLED(len(xy)),
}


@pytest.fixture(scope="module")
def pipeline(nano_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(nano_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def encode(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., np.ndarray]:
    """encode(features, **settings) -> [576, 1024]: our tokens of tiles in the order given."""
    folder = tmp_path_factory.mktemp("encode")

    def call(features: TileFeatures, **settings: Any) -> np.ndarray:
        write_tile_features(folder / "tiles.h5", features)
        encoded = pipeline.encode(folder / "tiles.h5", SlideSettings(keep_order=True, **settings))
        assert encoded.tokens is not None
        return encoded.tokens.tokens

    return call


@pytest.fixture
def judge(wsi_rt: Run, nano_bundle: Path, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """judge(reference tokens, features, *flags) -> (exit code, the JSON report)."""

    def call(reference: np.ndarray, features: TileFeatures, *flags: object) -> tuple[int, dict[str, Any]]:
        write_tensor(tmp_path / "REF.pt", reference)
        write_tile_features(tmp_path / "tiles.h5", features)
        files = ("--features", tmp_path / "REF.pt", "--slide", tmp_path / "tiles.h5")
        result = wsi_rt("accept", "--engines", nano_bundle, *files, "--threads", 1, "--json", *flags)
        assert result.code in (0, 5), result.err
        return result.code, json.loads(result.out)

    return call


@lru_cache(maxsize=2)
def torch_encoder(seed: int) -> Any:
    pytest.importorskip("torch", reason="the export extra is missing")
    from wsi_rt.export.models import reference_model
    from wsi_rt.export.sources.checkpoint import Sources, resolve

    part = resolve(Sources(checkpoint=f"synthetic:nano?seed={seed}")).parts["slide_encoder"]
    return reference_model(part.config, part.source)


def states_of(features: TileFeatures, seed: int = 0) -> tuple[Any, np.ndarray, np.ndarray]:
    """The fp32 torch slide encoder of this seed: (module, states [N + 1, C], tokens)."""
    module = torch_encoder(seed)
    import torch

    with torch.inference_mode():
        out = module(torch.from_numpy(features.x), torch.from_numpy(features.grid.xy0 // SIZE0))
    return module, out["encoder_out"].numpy(), out["tokens"].numpy()


def pooled_by_torch(states: np.ndarray) -> Any:
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    x = torch.from_numpy(states).T[None]
    return torch.nn.functional.adaptive_avg_pool1d(x, 576)[0].T


@pytest.mark.parametrize("stored", ["as written", "unpadded", "leading 1", "fp16", "fp16 unpadded"])
@pytest.mark.parametrize("count", [54, 700], ids="N{}".format)
def test_honest_tokens_are_accepted(judge: Run, encode: Run, stored: str, count: int) -> None:
    features = tiles(count)
    reference = encode(features)
    reference = reference[:, :768] if "unpadded" in stored else reference
    reference = reference.astype(np.float16) if "fp16" in stored else reference
    code, report = judge(reference[None] if stored == "leading 1" else reference, features)
    assert (code, report["verdict"]) == (0, "accept"), report["text"]
    assert report["tokens"]["as_run"]["agreeing"] == 576
    assert report["tokens"]["tried"] == []
    assert report["reference"]["storage"] == ("fp16" if "fp16" in stored else "fp32")
    assert report["reference"]["rows_as_normed"] is True
    assert report["reference"]["tiles"] == (54 if count == 54 else None)


def test_tokens_of_fp32_torch_are_accepted(judge: Run) -> None:
    features = tiles(300)
    code, report = judge(states_of(features)[2], features)
    assert (code, report["text"]) == (0, "accept")


@pytest.mark.parametrize("name", list(ORDERS))
@pytest.mark.parametrize("count", [200, 600], ids="N{}".format)
def test_another_order_is_told(judge: Run, encode: Run, name: str, count: int) -> None:
    features = tiles(count)
    code, report = judge(encode(in_order(features, ORDERS[name](features.grid.xy0))), features)
    assert code == 5
    if name == "another order" and count > 288:  # bins of several tiles: no order can be recovered from them
        assert report["verdict"] == "do not accept"
        assert "tile coordinates" in report["text"]
        return
    assert report["tokens"]["explained_by"] == [name]
    assert report["verdict"] == "accept with these differences"
    assert report["reference"]["verdict"] == "accept"


def test_file_order_is_told_and_its_flag_agrees(judge: Run, encode: Run) -> None:
    shuffled = in_order(tiles(700), SHUFFLED(700))
    reference = encode(shuffled)
    code, report = judge(reference, shuffled)
    assert (code, report["tokens"]["explained_by"]) == (5, ["file order"])
    assert "--keep-order" in report["text"]
    assert judge(reference, shuffled, "--keep-order")[0] == 0


def test_the_divisor_is_told_and_its_flag_agrees(judge: Run, encode: Run) -> None:
    features = tiles(700)
    reference = encode(features, position_tile=256)
    code, report = judge(reference, features)
    assert (code, report["tokens"]["explained_by"]) == (5, ["divisor 256"])
    assert "--position-tile 256" in report["text"]
    assert judge(reference, features, "--position-tile", 256)[0] == 0


def test_order_and_divisor_together_are_told(judge: Run, encode: Run) -> None:
    features = tiles(200)
    columns = in_order(features, ORDERS[COLUMN_MAJOR](features.grid.xy0))
    code, report = judge(encode(columns, position_tile=256).astype(np.float16), features)
    assert (code, set(report["tokens"]["explained_by"])) == (5, {COLUMN_MAJOR, "divisor 256"})


def test_swapped_coordinates_are_told(judge: Run, encode: Run) -> None:
    features = tiles(200)
    swapped = replace(features, grid=replace(features.grid, xy0=features.grid.xy0[:, ::-1].copy()))
    code, report = judge(encode(swapped), features)
    assert (code, report["tokens"]["explained_by"]) == (5, ["coordinates (y, x)"])


@pytest.mark.parametrize(
    "name", ["missing norm", "fresh norm", "padded before the norm", "padded before a fresh norm", "CLS pooled"]
)
def test_what_follows_the_encoder_is_told(judge: Run, name: str) -> None:
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    features = tiles(200)
    module, states, _ = states_of(features)
    x = pooled_by_torch(states if name == "CLS pooled" else states[1:])
    weight, bias = (p.detach() for p in (module.norm.weight, module.norm.bias))
    norm = torch.nn.functional.layer_norm
    with torch.inference_mode():
        padded = torch.nn.functional.pad(x, (0, 256))
        made = {
            "missing norm": lambda: x,
            "fresh norm": lambda: norm(x, (768,), eps=1e-6),
            "padded before the norm": lambda: norm(
                padded, (1024,), *(torch.nn.functional.pad(p, (0, 256)) for p in (weight, bias)), eps=1e-6
            ),
            "padded before a fresh norm": lambda: norm(padded, (1024,), eps=1e-6),
            "CLS pooled": lambda: module.norm(x),
        }[name]()
    code, report = judge(made.numpy(), features)
    assert (code, report["tokens"]["explained_by"]) == (5, [name])
    assert report["verdict"] == "accept with these differences"
    assert report["reference"]["rows_as_normed"] is (name == "CLS pooled")
    if name == "padded before a fresh norm":
        assert report["reference"]["padding_is_zero"] is False


def test_half_precision_arithmetic_is_told(judge: Run) -> None:
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    features = tiles(100)
    module, _, _ = states_of(features)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(torch.from_numpy(features.x), torch.from_numpy(features.grid.xy0 // SIZE0))["tokens"]
    code, report = judge(out.float().numpy(), features)
    assert (code, report["verdict"]) == (5, "accept with these differences")
    assert "half-precision" in report["text"]
    assert report["tokens"]["explained_by"] == []


def test_another_checkpoint_is_not_accepted(judge: Run) -> None:
    features = tiles(200)
    code, report = judge(states_of(features, seed=1)[2], features)
    assert (code, report["verdict"]) == (5, "do not accept")
    assert "another checkpoint" in report["text"]
    assert report["tokens"]["as_run"]["agreeing"] == 0


@pytest.mark.parametrize(
    ("theirs", "words"), [(50, "2 times fewer"), (199, "made of 199 tiles"), (300, "more than 288")]
)
def test_another_tile_set_is_told_by_its_size(judge: Run, encode: Run, theirs: int, words: str) -> None:
    features = tiles(200)
    code, report = judge(encode(in_order(tiles(theirs) if theirs > 200 else features, np.arange(theirs))), features)
    assert (code, report["verdict"]) == (5, "do not accept")
    assert words in report["text"]
    assert report["reference"]["verdict"] == "accept"  # the same norm made it


def test_a_slide_is_encoded_once(
    wsi_rt: Run, nano_bundle: Path, synth_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_rt.runtime import pipeline as module

    flags = ("--engines", nano_bundle, "--threads", 1)
    assert wsi_rt("encode", synth_slide, *flags, "--out", tmp_path / "a.pt", "--position-tile", 300).code == 0
    runs = []
    encode_tiles = module.encode_tiles
    monkeypatch.setattr(module, "encode_tiles", lambda *a: runs.append(a[0]) or encode_tiles(*a))
    compare = ("accept", "--features", tmp_path / "a.pt", "--slide", synth_slide, *flags)
    result = wsi_rt(*compare)
    assert (result.code, len(runs)) == (5, 1)
    assert "with column-major order: 0 agree" in result.out
    assert "do not accept" in result.out.splitlines()[-1]
    assert "no known difference" in result.out
    assert wsi_rt(*compare, "--position-tile", 300).code == 0


def test_our_pooling_is_adaptive_pooling() -> None:
    for count in (1, 54, 575, 576, 577, 1500):
        states = np.random.default_rng(0).standard_normal((count, 5)).astype(np.float32)
        np.testing.assert_allclose(pool(states), pooled_by_torch(states), atol=1e-6)
        start, end = bin_edges(count)
        assert (start.min(), end.max()) == (0, count)


def test_repeated_tokens_tell_how_many_tiles_there_were() -> None:
    for count in (*range(1, 577, 7), 287, 288, 289, 576):
        x = np.random.default_rng(count).standard_normal((count, 2))
        assert tile_count(pool(x)) == (count if count <= 288 else None)


def test_the_states_are_those_the_engine_pools(pipeline: Pipeline, encode: Run) -> None:
    features = tiles(90)
    states = SlideStates(pipeline.bundle)
    x = states.run(features.x, features.grid.xy0 // SIZE0)
    np.testing.assert_allclose(x, states_of(features)[1], atol=2e-4)
    assert states.norm.weight.shape == (768,)


# --- answers
@pytest.fixture(scope="module")
def reference_tokens(encode: Run) -> np.ndarray:
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


def test_sampled_answers_are_told_but_not_reproduced(ask: Run, answer: Run) -> None:
    code, report = ask(answer(temperature=0.2, seed=3))
    assert (code, report["verdict"]) == (5, "accept with these differences")
    assert "draws at temperature 0.2, template vicuna_v1" in report["text"]
    assert "cannot be reproduced token for token" in report["text"]


def test_answers_about_another_slide_are_not_accepted(
    ask: Run, pipeline: Pipeline, encode: Run, tmp_path: Path
) -> None:
    write_tensor(tmp_path / "other.pt", encode(tiles(60)))
    other = pipeline.encode(tmp_path / "other.pt")
    theirs = [pipeline.ask(other, q, GenerationSettings(max_new_tokens=LENGTH)).text for q in QUESTIONS]
    code, report = ask(theirs)
    assert (code, report["verdict"]) == (5, "do not accept")
    assert "no known setting explains it" in report["text"]
    assert report["answers"]["sampling"] == ""
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
    prefix, logits, _ = answerer.begin(QUESTIONS[0], settings)
    ids: list[int] = []
    margins: list[float] = []
    for step in range(settings.max_new_tokens):
        order = np.argsort(-logits)
        margins.append(float(logits[order[0]] - logits[order[1]]))
        ids.append(int(order[ranks.get(step, 0)]))
        logits = answerer.decoder.step([prefix.kv], np.array(ids[-1:], np.int64))[0]
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


@pytest.mark.slow
def test_reduced_precision_is_named(wsi_rt: Run, answer: Run, ask: Run, tmp_path: Path) -> None:
    """fp32 answers judged by an int8 bundle of the same checkpoint: every difference is put down to the precision."""
    from wsi_rt.export.precision import SUPPORTED

    if "int8" not in SUPPORTED["llm"]:
        pytest.skip("this build has no int8 language model")
    flags = ("--checkpoint", "synthetic:nano?seed=0", "--components", "projector,llm", "--precision", "llm=int8")
    assert wsi_rt("build-engines", *flags, "--out", tmp_path / "int8").code == 0
    code, report = ask(answer(), "--engines", tmp_path / "int8")
    assert code == 5
    assert "--precision llm=fp32" in report["text"]
    assert report["reference"]["rows_as_normed"] is None


# --- files
def row(i: int, **more: Any) -> dict[str, Any]:
    return {"question_id": f"id-{i}", **more}


def test_both_releases_are_read(tmp_path: Path) -> None:
    official = [
        {"id": f"id-{i}", "image": f"TCGA-X/S{i}.pt", "conversations": [{"from": "human", "value": f"<image>\nQ{i}"}]}
        for i in range(3)
    ]
    (tmp_path / "list.json").write_text(json.dumps(official))
    later = write_lines(tmp_path / "later.jsonl", [row(i, image=f"TCGA-X/S{i}.pt", question=f"Q{i}") for i in range(3)])
    first, second = read_questions(tmp_path / "list.json"), read_questions(later)
    assert [(q.id, q.text, q.image) for q in first] == [(q.id, q.text, q.image) for q in second]
    assert first[1].text == "Q1"
    assert (first[1].place, second[1].place) == ("record 2", "line 2")
    old = write_lines(tmp_path / "old.jsonl", [row(0, prompt="p", text="A", answer_id="x", metadata={})])
    new = write_lines(
        tmp_path / "new.jsonl", [row(0, question="q", answer="A", **{"T-answer": "gold"}, metadata="Grading")]
    )
    assert [(a.id, a.text) for a in read_answers(old)] == [(a.id, a.text) for a in read_answers(new)] == [("id-0", "A")]


def test_what_has_no_partner_is_counted_and_named(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "q.jsonl", [row(i, image="S.pt", question="Q") for i in (0, 1, 1, 2)])
    answers = write_lines(tmp_path / "a.jsonl", [row(i, text=str(n)) for n, i in enumerate((0, 2, 2, 9))])
    matched = match(read_questions(questions), read_answers(answers))
    assert [(q.id, a.text) for q, a in matched.pairs] == [("id-0", "0"), ("id-2", "1")]
    notes = " / ".join(matched.notes())
    for words in ("no answer: line 2", "no question: line 4", "repeat an id (the first is used): line 3"):
        assert words in notes
    assert notes.count("line 3") == 2


def test_questions_about_other_slides_are_left_out(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "q.jsonl", [row(i, image=f"X/S.{i % 2}.pt", question="Q") for i in range(5)])
    answers = write_lines(tmp_path / "a.jsonl", [row(i, text="A") for i in range(5)])
    matched = match(read_questions(questions), read_answers(answers))
    own = about(matched, Path("/data/S.1.pt"))
    assert ([q.id for q, _ in own.pairs], own.other_slides) == (["id-1", "id-3"], 3)
    with pytest.raises(InputError, match="about 2 slides, none of them named as --features"):
        about(matched, Path("/data/other.pt"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question_id": 1, "text": "A"}\n\n{"question_id": 2, "tex', "line 3 is not JSON"),
        ('[{"question_id": 1, "text": "A"},\n{"question', "line 2 is not JSON"),
        ("[1]", "record 1 is a int"),
        ('{"text": "A"}', "line 1 has no question_id"),
        ('{"question_id": 1}', "line 1 has no answer or text"),
        ('{"question_id": 1, "text": 5}', "line 1 has no answer or text"),
    ],
    ids=["cut line", "cut list", "number", "no id", "no answer", "number as answer"],
)
def test_an_unreadable_record_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        read_answers(tmp_path / "a.jsonl")


def test_bad_input_is_one_line_and_exit_code_2(
    wsi_rt: Run, nano_bundle: Path, reference_tokens: np.ndarray, tmp_path: Path
) -> None:
    ref = tmp_path / "REF.pt"
    write_tensor(ref, reference_tokens)
    write_tensor(tmp_path / "wide.pt", np.zeros((576, 512), np.float32))
    q = write_lines(tmp_path / "q.jsonl", [row(0, question="Q")])
    a = write_lines(tmp_path / "a.jsonl", [row(1, text="A")])
    cases = {
        (ref,): "nothing to compare",
        (ref, "--questions", q): "belong together",
        (ref, "--questions", q, "--answers", a): "none of 1 answers has the question_id of one of 1 questions",
        (tmp_path / "wide.pt", "--slide", tmp_path / "x.h5"): "holds a tensor [576, 512]",
        (ref, "--slide", ref): "expected a slide or an .h5",
        (ref, "--slide", tmp_path / "none.h5"): "no such file",
    }
    for flags, words in cases.items():
        result = wsi_rt("accept", "--engines", nano_bundle, "--features", *flags)
        assert (result.code, result.out) == (2, ""), (flags, result)
        assert len(result.err.splitlines()) == 1
        assert words in result.err


def test_neither_question_nor_id_is_told_by_default(
    wsi_rt: Run, nano_bundle: Path, reference_tokens: np.ndarray, tmp_path: Path
) -> None:
    write_tensor(tmp_path / "REF.pt", reference_tokens)
    secret = "Has patient TCGA-21-1083 necrosis?"
    rows = [{"question_id": f"TCGA-21-1083-{i}", "question": secret} for i in range(3)]
    q = write_lines(tmp_path / "q.jsonl", [*rows, {"question_id": "TCGA-99", "question": " <image> <image> "}])
    a = write_lines(
        tmp_path / "a.jsonl", [{"question_id": r, "text": "Yes."} for r in ("TCGA-21-1083-1", "TCGA-99", "TCGA-5")]
    )
    files = ("--features", tmp_path / "REF.pt", "--questions", q, "--answers", a)
    result = wsi_rt("accept", "--engines", nano_bundle, *files, "--max-new-tokens", 4)
    assert result.code == 5
    assert "TCGA" not in result.out + result.err
    assert "necrosis" not in result.out + result.err
    for words in (
        "1 questions refused: line 4",
        "2 questions have no answer: line 1, line 3",
        "line 2: differs at token",
    ):
        assert words in result.out


def test_the_limit_takes_the_first(ask: Run, answer: Run) -> None:
    code, report = ask([*answer()[:2], "x", "y", "z"], "--limit", 2)
    assert (code, report["answers"]["compared"]) == (0, 2)


def test_the_verdict_is_the_worst_and_tells_what_is_explained() -> None:
    sections = [
        Section("reference", Level.AGREES),
        Section("tokens", Level.EXPLAINED, ("order",)),
        Section("answers", Level.DIFFERS, ("answers differ",)),
    ]
    assert verdict(sections[:1]) == (Level.AGREES, "accept")
    assert verdict(sections[:2]) == (Level.EXPLAINED, "accept with these differences: order")
    assert verdict(sections) == (Level.DIFFERS, "do not accept: answers differ; order")


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


def test_a_reference_that_was_not_normed_is_told_without_a_slide(ask: Run, answer: Run) -> None:
    code, report = ask(answer(), spoil=lambda x: x + 1)
    assert (code, report["verdict"]) == (5, "do not accept")
    assert "did not come out of this checkpoint's norm" in report["text"]
    assert "padding columns 768.. of the reference are not zero" in report["text"]
    assert report["reference"]["rows_as_normed"] is False
