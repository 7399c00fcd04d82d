"""Many questions about one slide on a real bundle: the same tokens however they are computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsi_rt.runtime import GenerationSettings, Pipeline
from wsi_rt.runtime.errors import InputError, MachineError
from wsi_rt.runtime.features import write_slide_tokens
from wsi_rt.runtime.llm.language_model import AUTO, ModelSettings, Question
from wsi_rt.runtime.llm.prefix_disk import PrefixDisk
from wsi_rt.runtime.types import Answer, Provenance, SlideTokens

GREEDY = GenerationSettings(max_new_tokens=24, repetition_penalty=1.1, no_repeat_ngram_size=3)
SUBJECTS = ("the grade", "the stage", "the stroma", "the margin", "the nuclei", "necrosis", "mitosis", "the diagnosis")
QUESTIONS = [f"What of {a}, given {b}?" for a in SUBJECTS for b in ("the glands", "its edge", "what you see")][:20]
CLOSED = ("Which? A) one B) two C) three D) four", "Is there necrosis?")
Run = Callable[..., object]


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = np.random.default_rng(0).standard_normal((576, 768)).astype(np.float32)
    path = tmp_path_factory.mktemp("tokens") / "slide.pt"
    write_slide_tokens(path, SlideTokens(np.pad(tokens, ((0, 0), (0, 256))), Provenance("test")))
    return path


@pytest.fixture(scope="module")
def plain(nano_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(nano_bundle, threads=1, model=ModelSettings(speculate=False)) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(plain: Pipeline, tokens_file: Path) -> list[tuple[int, ...]]:
    """Each of the 20 asked alone, without speculation."""
    return [plain.ask(tokens_file, q, GREEDY).token_ids for q in QUESTIONS]


def ids(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [a.token_ids for a in answers]


def test_the_same_tokens_batched_with_nineteen_others(plain: Pipeline, tokens_file: Path, alone: list) -> None:
    assert len(set(alone)) >= 10
    assert ids(plain.ask_many(tokens_file, QUESTIONS, GREEDY)) == alone


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_tokens_with_speculation(nano_bundle: Path, tokens_file: Path, alone: list, threads: int) -> None:
    with Pipeline.open(nano_bundle, threads=threads) as pipeline:
        assert ids(pipeline.ask_many(tokens_file, QUESTIONS, GREEDY)) == alone
        again = pipeline.ask_many(tokens_file, QUESTIONS, GREEDY)  # guessed from the first answers
        assert ids(again) == alone


def test_the_same_tokens_after_losing_memory(nano_bundle: Path, tokens_file: Path, alone: list) -> None:
    with Pipeline.open(nano_bundle, threads=1) as pipeline:
        per_token = pipeline._asking.model(pipeline._clock).decoder.spec.kv_bytes_per_token
    settings = ModelSettings(kv_bytes=900 * per_token)  # the prefix and some five questions
    with Pipeline.open(nano_bundle, threads=1, model=settings) as pipeline:
        lost: list[int] = []
        scheduler = pipeline._asking.model(pipeline._clock).loop.scheduler
        preempt = scheduler._preempt
        scheduler._preempt = lambda s: lost.append(s.number) or preempt(s)  # type: ignore[method-assign]
        assert ids(pipeline.ask_many(tokens_file, QUESTIONS, GREEDY)) == alone
        assert lost


def test_the_same_tokens_after_a_reload_from_disk(
    nano_bundle: Path, tokens_file: Path, alone: list, tmp_path: Path
) -> None:
    """And a prefill of the question only: rows are counted, not milliseconds."""
    disk, rows = PrefixDisk(tmp_path), []
    for _ in range(2):
        with Pipeline.open(nano_bundle, threads=1, model=ModelSettings(prefixes=disk)) as pipeline:
            fed = count_rows(pipeline)
            answer = pipeline.ask(tokens_file, QUESTIONS[0], GREEDY)
            assert answer.token_ids == alone[0]
            assert answer.timings_ms["prefill"] > 0
            rows.append(sum(fed))
            assert ids(pipeline.ask_many(tokens_file, QUESTIONS, GREEDY)) == alone
    assert rows[0] - rows[1] >= 576
    assert rows[1] < 150
    assert len(disk.listed()) == 1


def count_rows(pipeline: Pipeline) -> list[int]:
    """Filled with the rows of every call of its decoder."""
    decoder, fed = pipeline._asking.model(pipeline._clock).decoder, []
    extend = decoder.extend
    decoder.extend = lambda chunks: fed.append(sum(len(c.embeds) for c in chunks)) or extend(chunks)  # type: ignore
    return fed


def test_a_stored_prefix_is_of_one_build_and_template(nano_bundle: Path, tokens_file: Path, tmp_path: Path) -> None:
    with Pipeline.open(nano_bundle, threads=1, model=ModelSettings(prefixes=PrefixDisk(tmp_path))) as pipeline:
        for template in ("vicuna_v1", "llava_v1"):
            pipeline.ask(tokens_file, QUESTIONS[0], replace(GREEDY, max_new_tokens=1, template=template))
        llm = pipeline.bundle.component("llm")
    stored = PrefixDisk(tmp_path).listed()
    assert len({s.key for s in stored}) == 2
    for s in stored:
        assert s.made_of is not None
        assert s.made_of["model"]["digest"] == llm.digest
        assert s.made_of["model"]["precision"] == "fp32"
        assert s.made_of["model"]["library"].startswith("onnxruntime ")


def test_closed_questions_have_probabilities(plain: Pipeline, tokens_file: Path) -> None:
    asked = [Question(q, AUTO) for q in (*CLOSED, QUESTIONS[0])]
    letters, yes_no, opened = plain.ask_many(tokens_file, asked, GREEDY)
    assert (list(letters.choices or ()), list(yes_no.choices or ())) == (["A", "B", "C", "D"], ["Yes", "No"])
    for answer in (letters, yes_no):
        assert answer.choices is not None
        assert answer.stop_reason == "choice"
        assert answer.text == max(answer.choices, key=answer.choices.__getitem__)
        assert sum(answer.choices.values()) == pytest.approx(1)
        assert answer.to_json()["choices"] == dict(answer.choices)
    assert opened.choices is None
    assert "choices" not in opened.to_json()
    assert plain.ask(tokens_file, Question(CLOSED[0], ("A", "B", "C", "D")), GREEDY).choices == letters.choices


def test_a_dialogue_goes_on_from_what_was_said(plain: Pipeline, tokens_file: Path) -> None:
    with plain.converse(tokens_file, GREEDY) as dialogue:
        first = dialogue.ask(QUESTIONS[0])
        second = dialogue.ask(QUESTIONS[1])
        assert first.token_ids == plain.ask(tokens_file, QUESTIONS[0], GREEDY).token_ids
        assert second.token_ids != plain.ask(tokens_file, QUESTIONS[1], GREEDY).token_ids
        assert second.timings_ms["projector"] == 0
        with pytest.raises(InputError, match="contains <image>"):
            dialogue.ask("<image>")


def test_questions_are_refused_before_anything_is_read(plain: Pipeline, tmp_path: Path) -> None:
    for question, told in ((Question("q", ("A",)), "--choices"), (Question("q", json_schema="{"), "json")):
        with pytest.raises((InputError, MachineError), match=told):
            plain.ask_many(tmp_path / "missing.pt", ["fine", question], GREEDY)


# --- the commands
def test_questions_of_a_file_are_answered_together(
    wsi_rt, nano_bundle: Path, tokens_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "q.txt").write_text(f"{QUESTIONS[0]}\n\n{CLOSED[0]}\n")
    common = ("--engines", nano_bundle, "--max-new-tokens", 8, "--threads", 1)
    result = wsi_rt("ask", tokens_file, "--questions", tmp_path / "q.txt", *common, "--choices", "auto", "--json")
    assert result.code == 0, result.err
    first, second = json.loads(result.out)["answers"]
    assert (first["question"], second["question"]) == (QUESTIONS[0], CLOSED[0])
    assert (first["stop_reason"], second["stop_reason"]) == ("length", "choice")
    assert set(second["choices"]) == set("ABCD")
    one = json.loads(wsi_rt("ask", tokens_file, CLOSED[0], *common, "--choices", "A,B,C,D", "--json").out)
    assert one["choices"] == second["choices"]
    assert "question" not in one
    told = wsi_rt("ask", tokens_file, "--questions", tmp_path / "q.txt", *common, "--choices", "auto")
    assert told.out == f"{QUESTIONS[0]}\n{first['text']}\n\n{CLOSED[0]}\n{second['text']}\n\n"
    assert "A 0." in told.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--choices", "A"), "--choices are A, expected 2"),
        (("--choices", "A,B", "--json-schema", "schema.json"), "expected one of them"),
        (("--prefix-dtype", "int8"), "--prefix-dtype is 'int8'"),
        (("--kv-bytes", "some"), "expected a size"),
        (("--kv-bytes", "1M"), "raise --kv-bytes"),
        (("--questions", "none.txt"), "no question"),
        (("--questions", "latin.txt"), "is not UTF-8"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    wsi_rt, nano_bundle: Path, tokens_file: Path, tmp_path: Path, monkeypatch, flags: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text("{}")
    Path("none.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("Grad\xe9?\n".encode("latin-1"))
    result = wsi_rt("ask", tokens_file, QUESTIONS[0], "--engines", nano_bundle, "--threads", 1, *flags)
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1


def test_json_answers(wsi_rt, nano_bundle: Path, tokens_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="the json extra is missing")
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}'
    )
    flags = ("--engines", nano_bundle, "--threads", 1, "--json-schema", tmp_path / "schema.json", "--json")
    answer = json.loads(wsi_rt("ask", tokens_file, QUESTIONS[0], *flags, "--max-new-tokens", 200).out)
    assert json.loads(answer["text"])["n"] in (1, 2)
    assert answer["stop_reason"] == "eos"


def test_prefixes_on_disk_from_the_command(
    wsi_rt, nano_bundle: Path, tokens_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "prefixes"
    ask = ("ask", tokens_file, QUESTIONS[0], "--engines", nano_bundle, "--threads", 1, "--max-new-tokens", 4, "--json")
    first = json.loads(wsi_rt(*ask, "--prefixes", folder).out)
    monkeypatch.setenv("WSI_RT_PREFIXES", str(folder))
    again = json.loads(wsi_rt(*ask).out)
    assert again["token_ids"] == first["token_ids"]
    (listed,) = json.loads(wsi_rt("prefix", "list", "--json").out)["prefixes"]
    assert listed["tokens"] > 576
    assert listed["bytes"] > 4096
    assert listed["pinned"] is False
    assert wsi_rt("prefix", "pin", listed["key"][:8]).code == 0
    text = wsi_rt("prefix", "list")
    assert "pinned" in text.out
    assert "prefixes: 1, " in text.err
    assert wsi_rt("prefix", "pin", listed["key"], "--unpin", "--json").out == '{"pinned": false}\n'
    path = next(folder.glob("*.prefix"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    mended = json.loads(wsi_rt(*ask).out)
    assert mended["token_ids"] == first["token_ids"]
    assert any("was dropped and is computed again" in note for note in mended["notes"])
    assert wsi_rt("prefix", "drop", "nothing").code == 2
    assert wsi_rt("prefix", "drop").code == 2
    dropped = json.loads(wsi_rt("prefix", "drop", "--all", "--json").out)
    assert dropped == {"dropped": 1, "freed_bytes": listed["bytes"]}
    monkeypatch.delenv("WSI_RT_PREFIXES")
    assert "--prefixes" in wsi_rt("prefix", "list").err


def test_fast_needs_a_bundle_built_for_it(wsi_rt: Run, nano_bundle: Path, tokens_file: Path) -> None:
    result = wsi_rt("ask", tokens_file, "What?", "--engines", nano_bundle, "--fast")
    assert result.code == 2
    assert "build it again with wsi-rt build-engines --fast" in result.err
