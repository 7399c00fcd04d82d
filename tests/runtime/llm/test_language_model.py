"""Questions and conversations about slides through LanguageModel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.language_model import AUTO, LanguageModel, ModelSettings, Question
from wsi_rt.runtime.llm.loop import generate
from wsi_rt.runtime.llm.prefix_disk import PrefixDisk
from wsi_rt.runtime.llm.prompt import split_prompt
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.room import available_bytes
from wsi_rt.runtime.llm.tokenizer import Tokenizer

GREEDY = GenerationSettings(max_new_tokens=10)
TEMPLATE = GREEDY.template
QUESTIONS = ("What is the grade?", "Is there necrosis?", "Which? A) one B) two")


@pytest.fixture
def new_model(tokenizer: Tokenizer, new_llama):
    """new_model(**ModelSettings): each over a fresh decoder with the same weights."""
    return lambda **kw: LanguageModel(new_llama(context=1024), tokenizer, ModelSettings(**kw), {"weights": "w"})


@pytest.fixture
def model(new_model) -> LanguageModel:
    return new_model()


def whole(model: LanguageModel, projected, ids) -> Request:
    """One prompt without prefix or history: what the same tokens give afresh."""
    before = [model.tokenizer.bos_id, *model.tokenizer.encode(split_prompt(TEMPLATE, "q")[0])]
    parts = [model.decoder.embed(np.array(before)), projected, model.decoder.embed(np.array(ids))]
    return Request(np.concatenate(parts), GREEDY)


def test_questions_together_are_answered_as_alone(model: LanguageModel, prompt) -> None:
    slides = [prompt(12, seed=s) for s in (1, 2)]
    prefixes = [model.prefix(x, TEMPLATE) for x in slides]
    asked = [(p, Question(q)) for p in prefixes for q in QUESTIONS]
    together = model.ask(asked, GREEDY)
    for (prefix, question), got in zip(asked, together, strict=True):
        ids = model.tokenizer.encode(split_prompt(TEMPLATE, question.text)[1])
        alone = generate(model.decoder, model.tokenizer, whole(model, slides[prefixes.index(prefix)], ids))
        assert (got.token_ids, got.text, got.prompt_tokens) == (alone.token_ids, alone.text, alone.prompt_tokens)
    assert len({g.token_ids for g in together}) == len(asked)


def test_streams_are_told_apart(model: LanguageModel, prompt) -> None:
    prefix = model.prefix(prompt(12), TEMPLATE)
    heard: dict[int, list[str]] = {0: [], 1: []}
    questions = [(prefix, Question(q)) for q in QUESTIONS[:2]]
    answers = model.ask(questions, GREEDY, on_text=lambda i, piece: heard[i].append(piece))
    assert ["".join(heard[i]) for i in (0, 1)] == [a.text for a in answers]


def test_choices_may_be_given_or_found(model: LanguageModel, prompt) -> None:
    prefix = model.prefix(prompt(12), TEMPLATE)
    given, *found = model.ask(
        [(prefix, Question(QUESTIONS[0], ("A", "B", "C"))), *((prefix, Question(q, AUTO)) for q in QUESTIONS)], GREEDY
    )
    assert given.choices is not None
    assert list(given.choices) == ["A", "B", "C"]
    assert [g.choices and list(g.choices) for g in found] == [None, ["Yes", "No"], ["A", "B"]]
    assert [g.stop_reason == "choice" for g in found] == [False, True, True]


def test_choices_and_a_schema_exclude_each_other() -> None:
    with pytest.raises(InputError, match="one of them"):
        Question("q", ("A", "B"), "{}")


def test_a_refused_question_computes_nothing_and_leaves_nothing(model: LanguageModel, prompt) -> None:
    prefix = model.prefix(prompt(12), TEMPLATE)
    with pytest.raises(InputError, match="shorten the question"):
        model.ask([(prefix, Question("fine")), (prefix, Question("word " * 2000))], GREEDY)
    assert not model.loop.scheduler.has_work
    assert model.decoder.calls == []  # type: ignore[attr-defined]
    assert len(model.ask([(prefix, Question("fine"))], GREEDY)) == 1


def test_an_error_leaves_no_other_question_running(model: LanguageModel, prompt) -> None:
    prefix = model.prefix(prompt(12), TEMPLATE)

    def interrupt() -> None:
        if len(model.decoder.calls) == 4:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    model.decoder.on_call = interrupt  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        model.ask([(prefix, Question(q)) for q in QUESTIONS], GREEDY)
    assert not model.loop.scheduler.has_work
    assert model.store.listed()[0].users == 0


def test_the_same_tokens_after_a_restart_from_disk(new_model, prompt, tmp_path: Path) -> None:
    def ask_anew(**kw) -> tuple[list[tuple[int, ...]], int]:
        with new_model(prefixes=PrefixDisk(tmp_path), **kw) as model:
            prefix = model.prefix(prompt(12), TEMPLATE)
            answers = model.ask([(prefix, Question(q)) for q in QUESTIONS], GREEDY)
            return [a.token_ids for a in answers], sum(map(sum, model.decoder.calls))

    first, rows = ask_anew(speculate=False)
    again, fewer = ask_anew(speculate=False)
    assert again == first
    with new_model() as model:
        prefix = model.prefix(prompt(12), TEMPLATE)
        assert rows - fewer == prefix.length
    assert len(PrefixDisk(tmp_path).listed()) == 1
    _, narrow_rows = ask_anew(speculate=False, prefix_dtype="fp16")
    assert narrow_rows == rows  # rounded ones are others


# --- conversations
def test_a_turn_gives_what_a_fresh_prompt_gives_and_computes_only_what_is_new(model: LanguageModel, prompt) -> None:
    projected = prompt(12)
    prefix = model.prefix(projected, TEMPLATE)
    with model.converse(prefix) as conversation:
        for turn, question in enumerate(QUESTIONS):
            said = conversation.token_ids
            model.decoder.calls.clear()  # type: ignore[attr-defined]
            got = conversation.ask(Question(question), GREEDY)
            new = model.tokenizer.encode(f"USER: {question} ASSISTANT:" if turn else f"\n{question} ASSISTANT:")
            first_rows = [rows for call in model.decoder.calls for rows in call][:2]  # type: ignore[attr-defined]
            assert first_rows[turn == 0] <= len(new) + 2  # the answer's last token and EOS had not been fed
            want = generate(model.decoder, model.tokenizer, whole(model, projected, [*said, *new]))
            assert (got.token_ids, got.prompt_tokens) == (want.token_ids, want.prompt_tokens)
            assert conversation.token_ids == (*said, *new, *got.token_ids, *(() if got.stop_reason == "eos" else (2,)))
    assert model.loop.scheduler.memory.held_bytes == model.store.nbytes


def test_a_conversation_that_lost_its_memory_goes_on_all_the_same(new_model, prompt) -> None:
    def talk(model: LanguageModel, disturb: bool) -> tuple[list[tuple[int, ...]], list[bool]]:
        prefix, other = (model.prefix(prompt(12, seed=s), TEMPLATE) for s in (1, 2))
        answers, lost = [], []
        with model.converse(prefix) as conversation:
            for question in QUESTIONS:
                answers.append(conversation.ask(Question(question), GREEDY).token_ids)
                if disturb:
                    model.ask([(other, Question(q)) for q in QUESTIONS], GREEDY)
                lost.append(conversation._parked.kv is None)
        return answers, lost

    free = new_model()
    want, lost = talk(free, disturb=False)
    assert not any(lost)
    budget = 260 * free.decoder.spec.kv_bytes_per_token
    tight = new_model(kv_bytes=budget)
    tight.decoder.on_call = lambda: tight.loop.scheduler.memory.held_bytes <= budget or pytest.fail("over the budget")
    answers, lost = talk(tight, disturb=True)
    assert answers == want
    assert any(lost)


def test_turns_are_cut_where_answers_are(tokenizer: Tokenizer, scripted) -> None:
    """After a stop string the next turn sees the trimmed answer, and keeps the keys and values up to there."""
    decoder, _, ids = scripted("Grade 2.\nASSISTANT: more")
    decoder.prompt = 0
    model = LanguageModel(decoder, tokenizer)
    prefix = model.prefix(np.zeros((3, 32), np.float32), TEMPLATE)
    conversation = model.converse(prefix)
    prompt_ids = tokenizer.encode("\nq ASSISTANT:")
    decoder.prompt = prefix.length + len(prompt_ids)
    assert conversation.ask(Question("q"), GenerationSettings()).text == "Grade 2."
    kept = tokenizer.encode("Grade 2.")
    assert conversation.token_ids == (*prompt_ids, *kept, 2)
    parked = conversation._parked
    assert parked is not None
    assert parked.kv is not None
    assert parked.kv.length == prefix.length + len(prompt_ids) + len(kept)
    assert ids[: len(kept)] == kept


def test_closed_questions_take_part_in_a_conversation(model: LanguageModel, prompt) -> None:
    projected = prompt(12)
    with model.converse(model.prefix(projected, TEMPLATE)) as conversation:
        closed = conversation.ask(Question(QUESTIONS[2], AUTO), GREEDY)
        said = conversation.token_ids
        assert said[-2:] == (*closed.token_ids, 2)
        got = conversation.ask(Question("Why?"), GREEDY)
        ids = [*said, *model.tokenizer.encode("USER: Why? ASSISTANT:")]
        assert got.token_ids == generate(model.decoder, model.tokenizer, whole(model, projected, ids)).token_ids


def test_a_turn_that_is_refused_leaves_the_conversation_as_it_was(model: LanguageModel, prompt) -> None:
    with model.converse(model.prefix(prompt(12), TEMPLATE)) as conversation:
        conversation.ask(Question("one"), GREEDY)
        said = conversation.token_ids
        for bad in ("", "<image>", "word " * 2000):
            with pytest.raises(InputError):
                conversation.ask(Question(bad), GREEDY)
        assert conversation.token_ids == said
        conversation.ask(Question("two"), GREEDY)


# --- memory
@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    1000 kB\n"}, 1_024_000),
        ({}, 4 << 30),
        (
            {
                "proc/meminfo": "MemAvailable: 1000 kB\n",
                "sys/fs/cgroup/memory.max": "500000\n",
                "sys/fs/cgroup/memory.current": "300000\n",
                "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 100000\n",
            },
            300_000,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 1000 kB\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": "3\n",
            },
            1_024_000,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 10",
            },
            0,
        ),
    ],
    ids=["kernel", "unknown", "cgroup v2", "cgroup v2 without limit", "cgroup v1, full"],
)
def test_available_memory(tmp_path: Path, files: dict[str, str], want: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == want


def test_memory_here_is_told() -> None:
    assert 0 < available_bytes() < 1 << 50
