"""Files of both releases: read, matched, refused by name; nothing of a question or an id in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_rt.runtime.accept.records import about, match, read_answers, read_questions
from wsi_rt.runtime.accept.report import Level, Section, verdict
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.features import write_tensor

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def reference_tokens(encode: Run, tiles: Run) -> np.ndarray:
    return encode(tiles(54))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


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


def test_the_verdict_is_the_worst_and_tells_what_is_explained() -> None:
    sections = [
        Section("reference", Level.AGREES),
        Section("tokens", Level.EXPLAINED, ("order",)),
        Section("answers", Level.DIFFERS, ("answers differ",)),
    ]
    assert verdict(sections[:1]) == (Level.AGREES, "accept")
    assert verdict(sections[:2]) == (Level.EXPLAINED, "accept with these differences: order")
    assert verdict(sections) == (Level.DIFFERS, "do not accept: answers differ; order")
