"""Closed questions: which options a question names, and their scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.choices import Option, OptionScorer, find_choices, log_softmax, make_options
from wsi_rt.runtime.llm.generation import Generation
from wsi_rt.runtime.llm.loop import Loop, drive
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.scheduler import Limits
from wsi_rt.runtime.llm.tokenizer import Tokenizer

BENCH = Path(__file__).resolve().parents[4] / "shared" / "data" / "wsi_bench"
ABCD, YES_NO = ("A", "B", "C", "D"), ("Yes", "No")


@pytest.mark.parametrize(
    ("question", "want"),
    [
        ("What is it? A) Adenocarcinoma B) Squamous C) Small cell D) Other", ABCD),
        ("What is it?\nA. Adenocarcinoma\nB. Squamous", ("A", "B")),
        ("What is it? (A) one (B) two (C) three", ("A", "B", "C")),
        ("What is it? a) one b) two", ("A", "B")),
        ("Type? A: one; B: two; C: three", ("A", "B", "C")),
        ("Type? A)one B)two", ("A", "B")),
        ("Luminal A   B) Luminal B   C) HER2", None),  # no run from A
        ("Is it A) Luminal A B) Luminal B C) HER2-enriched D) Basal?", ABCD),
        ("Given the diagnosis of seminoma, TNM staging of T1M0NX, is the prognosis good?", YES_NO),
        ("Is there necrosis?", YES_NO),
        ("Is the tumour benign or malignant?", None),
        ("Is there necrosis? Answer yes or no.", YES_NO),
        ("Vascular invasion (Yes/No)", YES_NO),
        ("The margins are free. True or false?", ("True", "False")),
        ("What is the grade, and which features support it?", None),
        ("Describe vitamin A. Also hepatitis B.", ("A", "B")),  # cannot be told apart from options
        ("What is the Gleason score?", None),
        ("Can you determine the stage?", None),
        ("Hepatitis B. is suspected", None),
        ("Does the slide show, in your view, mitoses?", None),  # the last clause decides
    ],
)
def test_options_a_question_names(question: str, want: tuple[str, ...] | None) -> None:
    assert find_choices(question) == want


@pytest.mark.parametrize(
    ("file", "closed"),
    [
        ("Diagnosis_choice_test.json", True),
        ("Molecular_Subtyping_choice_test.json", True),
        ("Prognosis_TF_question_test.json", True),
        ("Grading_test.json", False),
        ("Staging_test.json", False),
        ("1_Report_test.json", False),
    ],
)
def test_wsi_bench_questions_are_told_apart(file: str, closed: bool) -> None:
    if not BENCH.is_dir():
        pytest.skip("WSI-Bench files are not beside the checkout")
    rows = json.loads((BENCH / file).read_text())
    wrong = []
    for row in rows:
        question, gold = (c["value"] for c in row["conversations"])
        found = find_choices(question.replace("<image>\n", ""))
        letter = gold.strip(' "').split(")")[0].split(".")[0].strip(' "')
        if (found is not None) != closed or (closed and found is not None and letter not in found):
            wrong.append((question[:200], gold, found))
    assert len(wrong) <= 0.01 * len(rows), wrong[:5]


def test_options_are_spelled_as_they_follow_the_prompt(tokenizer: Tokenizer) -> None:
    assert make_options(tokenizer, ["A", "B"]) == (
        Option("A", tuple(tokenizer.encode("A"))),
        Option("B", tuple(tokenizer.encode("B"))),
    )
    assert [o.label for o in make_options(tokenizer, [" yes", "NO "])] == ["Yes", "No"]
    grades = make_options(tokenizer, ["Grade I", "Grade II"])
    first = tokenizer.encode("Grade I")
    begins = tuple(tokenizer.encode("Grade II")[: len(first)]) == tuple(first)
    assert all((o.token_ids[-1] == tokenizer.eos_ids[0]) == begins for o in grades)
    prefixed = make_options(tokenizer, ["no", "no tumor"])
    assert [o.token_ids[-1] for o in prefixed] in (
        [2, 2],
        [tokenizer.encode("No")[-1], tokenizer.encode("no tumor")[-1]],
    )


@pytest.mark.parametrize(
    "labels", [[], ["A"], ["A", "A"], ["A", " "], ["yes", "Yes"], list("ABCDEFGHIJKLMNOPQRSTUVWXYZ1")]
)
def test_lists_that_are_no_choice_are_refused(tokenizer: Tokenizer, labels: list[str]) -> None:
    with pytest.raises(InputError, match="--choices"):
        make_options(tokenizer, labels)
    with pytest.raises(InputError, match="use letters"):
        make_options(tokenizer, ["A", "word " * 40])


def by_hand(llama, request: Request) -> dict[str, float]:
    """Every option teacher-forced after a whole prompt of its own."""
    prompt = np.concatenate([request.prefix.embeds, request.embeds]) if request.prefix else request.embeds
    scores = []
    for option in request.options:
        rows = np.concatenate([prompt, llama.embed(np.array(option.token_ids))])
        kv = llama.new_kv(len(rows))
        logits = np.stack([llama.prefill(kv, rows[i : i + 1]) for i in range(len(rows))])
        own = logits[len(prompt) - 1 : -1]
        scores.append(sum(log_softmax(row)[t] for row, t in zip(own, option.token_ids, strict=True)))
    weights = np.exp(np.array(scores) - max(scores))
    return {o.label: w for o, w in zip(request.options, weights / weights.sum(), strict=True)}


OPTIONS = {
    "letters": (Option("A", (344,)), Option("B", (448,)), Option("C", (400,)), Option("D", (401,))),
    "several tokens": (Option("x", (300, 301, 302)), Option("y", (300, 305)), Option("z", (310,))),
    "one begins another": (Option("I", (300, 2)), Option("II", (300, 300, 2))),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_probabilities_are_the_likelihoods(
    llama, tokenizer, slides, asked: Callable[..., Request], options: str
) -> None:
    """Penalties and temperature have no part in them."""
    request = asked(0, slides[0], options=OPTIONS[options], temperature=0.2, repetition_penalty=2.0, max_new_tokens=1)
    sequence = drive(Loop(llama, tokenizer), [request])[0]
    got, want = Generation.of(sequence), by_hand(llama, request)
    assert got.choices == pytest.approx(want, rel=1e-12)
    assert list(got.choices) == [o.label for o in OPTIONS[options]]
    assert sum(got.choices.values()) == pytest.approx(1)
    best = max(want, key=lambda k: want[k])
    assert (got.text, got.stop_reason) == (best, "choice")
    assert got.token_ids == next(o.token_ids for o in OPTIONS[options] if o.label == best)
    assert got.decode_ms == 0


def test_letters_of_many_questions_take_one_step(llama, tokenizer, slides, asked: Callable[..., Request]) -> None:
    requests = [asked(i, slides[0], options=OPTIONS["letters"]) for i in range(8)]
    llama.calls.clear()
    pieces: dict[int, str] = {}
    sequences = drive(Loop(llama, tokenizer), requests, on_text=lambda i, piece: pieces.update({i: piece}))
    assert llama.calls == [[slides[0].length], [len(r.embeds) for r in requests]]
    assert pieces == {i: Generation.of(s).text for i, s in enumerate(sequences)}


def test_closed_and_open_questions_share_steps(llama, tokenizer, slides, asked: Callable[..., Request]) -> None:
    open_, closed = asked(0, slides[0]), asked(1, slides[0], options=OPTIONS["several tokens"])
    alone = [drive(Loop(llama, tokenizer), [r])[0] for r in (open_, closed)]
    llama.calls.clear()
    both = drive(Loop(llama, tokenizer), [open_, closed])
    assert both[0].token_ids == alone[0].token_ids
    assert both[1].scorer.probabilities() == alone[1].scorer.probabilities()
    assert [len(rows) for rows in llama.calls[1:4]] == [2, 2, 1]


def test_scores_survive_the_loss_of_memory(llama, tokenizer, asked: Callable[..., Request]) -> None:
    """Put out between two options: the prompt is fed again, the scores that there are stay."""
    request = asked(1, options=OPTIONS["several tokens"])
    loop = Loop(llama, tokenizer, Limits(kv_bytes=60 * llama.spec.kv_bytes_per_token), speculate=False)
    loop.submit(asked(0, max_new_tokens=5))
    sequence = loop.submit(request)
    loop.step()
    assert not sequence.done
    loop.scheduler._preempt(sequence)
    while not sequence.done:
        loop.step()
    assert sequence.kv_lost == 1
    assert sequence.scorer.probabilities() == pytest.approx(by_hand(llama, request), rel=1e-12)


def test_options_need_room_in_the_context(llama, tokenizer, prompt) -> None:
    context = llama.spec.context_length
    longest = max(len(o.token_ids) for o in OPTIONS["several tokens"])
    fits = Request(prompt(context - longest), options=OPTIONS["several tokens"])
    assert drive(Loop(llama, tokenizer), [fits])[0].stop_reason == "choice"
    with pytest.raises(InputError, match="shorten the question"):
        Loop(llama, tokenizer).submit(replace(fits, embeds=prompt(context - longest + 1)))


def test_unusable_logits_are_told() -> None:
    scorer = OptionScorer(OPTIONS["letters"])
    with pytest.raises(WsiRtError, match="while scoring options"):
        scorer.take(np.full((1, 2048), np.nan, np.float32), prompt_ends=True)
