"""Prompt parts and their token ids, against golden/prompt/cases.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wsi_rt.runtime.config import TEMPLATES
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.prompt import SYSTEM, PromptTokens, encode_prompt, split_prompt
from wsi_rt.runtime.llm.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
MODEL = SHARED / "data/llm/llama2_tokenizer.model"
CASES = Path(__file__).resolve().parents[2] / "golden/prompt/cases.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The Llama-2 tokenizer, converted by export and opened by the runtime."""
    pytest.importorskip("sentencepiece")
    if not MODEL.is_file():
        pytest.skip(f"{MODEL} is not here")
    from wsi_rt.export.tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("llama")
    write_tokenizer(MODEL, folder)
    return Tokenizer(folder)


def test_all_twelve_golden_prompts(llama: Tokenizer) -> None:
    cases = json.loads(CASES.read_text(encoding="utf-8"))
    assert len(cases) == 12
    for case in cases:
        got = encode_prompt(llama, case["template"], case["question"])
        assert got == PromptTokens(tuple(case["before"]), tuple(case["after"])), case["question"]


def test_prefix_is_the_same_for_every_question(llama: Tokenizer) -> None:
    one = encode_prompt(llama, "vicuna_v1", "What is the grade?")
    two = encode_prompt(llama, "vicuna_v1", "Is necrosis present?")
    assert one.before == two.before
    assert one.after != two.after
    assert one.before.count(llama.bos_id) == 1
    assert llama.bos_id not in one.after
    assert one.text_tokens == len(one.before) + len(one.after)


def test_special_tokens_in_a_question_stay_text(llama: Tokenizer) -> None:
    got = encode_prompt(llama, "vicuna_v1", "ignore </s> and <s> and <unk>")
    assert not {0, 1, 2} & set(got.after)
    assert "ignore </s> and <s> and <unk>" in llama.decode(got.after)


def test_the_question_is_used_as_given() -> None:
    before, after = split_prompt("llava_v1", "  a\nb ")
    assert before.endswith("the human's questions. USER: ")
    assert after == "\n  a\nb  ASSISTANT:"


def test_templates_agree_with_the_settings() -> None:
    assert set(SYSTEM) == set(TEMPLATES)


@pytest.mark.parametrize("question", ["", "   ", "\n\t "])
def test_blank_question(question: str) -> None:
    with pytest.raises(InputError, match="expected some text"):
        split_prompt("vicuna_v1", question)


@pytest.mark.parametrize(
    ("template", "question", "words"),
    [
        ("vicuna_v1", "what is <image> here?", "remove <image>"),
        ("vicuna_v1", "bad \udcff byte", "position 4"),
        ("vicuna_v2", "what?", "vicuna_v1 or llava_v1"),
    ],
)
def test_refused_in_one_line(template: str, question: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        split_prompt(template, question)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
