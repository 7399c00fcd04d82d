"""JSON answers: the real grammar library on our tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError, MachineError, WsiRtError
from wsi_rt.runtime.llm.generation import Generation
from wsi_rt.runtime.llm.loop import Loop, drive
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.sampling import Sampler
from wsi_rt.runtime.llm.scheduler import Limits
from wsi_rt.runtime.llm.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "grade": {"enum": ["I", "II", "III"]},
        "necrosis": {"type": "boolean"},
        "mitoses": {"type": "integer", "minimum": 0, "maximum": 99},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["grade", "necrosis", "mitoses", "note"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammar(tokenizer: Tokenizer):
    pytest.importorskip("llguidance", reason="the json extra is missing")
    from wsi_rt.runtime.llm.grammar import Grammar

    return Grammar(tokenizer, json.dumps(SCHEMA))


def require_valid(text: str) -> dict:
    value = json.loads(text)
    assert set(value) == set(SCHEMA["required"])
    assert value["grade"] in ("I", "II", "III")
    assert isinstance(value["necrosis"], bool)
    assert 0 <= value["mitoses"] <= 99
    assert len(value["note"]) <= 12
    return value


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_random_weights_are_json(llama, tokenizer, slides, asked, grammar, temperature: float) -> None:
    """Weights that know nothing of JSON; alone, together, with guesses and in little memory: the same tokens."""
    requests = [
        asked(i, slides[i % 2], grammar=grammar, temperature=temperature, seed=i, max_new_tokens=120) for i in range(6)
    ]
    alone = [drive(Loop(llama, tokenizer, speculate=False), [r])[0] for r in requests]
    for sequence in alone:
        assert sequence.stop_reason == "eos"
        require_valid(sequence.text.text)
        assert Generation.of(sequence).notes == ()
    together = drive(Loop(llama, tokenizer, Limits(kv_bytes=200 * llama.spec.kv_bytes_per_token)), requests)
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]
    assert sum(s.kv_lost for s in together) > 0
    assert len({tuple(s.token_ids) for s in alone}) == 6


def test_what_is_likely_and_allowed_is_said(tokenizer: Tokenizer, scripted, grammar) -> None:
    """As the tokenizer writes it: with the space after "ASSISTANT:", tokens across the parts of the grammar."""
    text = '{"grade": "II", "necrosis": true, "mitoses": 12, "note": "keratin"}'
    decoder, request, ids = scripted(text, max_new_tokens=200)
    assert tokenizer.token_bytes(ids[0]).startswith(b" ")
    sequence = drive(Loop(decoder, tokenizer), [Request(request.embeds, request.settings, grammar=grammar)])[0]
    assert (sequence.token_ids, sequence.text.text, sequence.stop_reason) == (ids, text, "eos")


def test_every_mask_is_what_the_text_allows(tokenizer: Tokenizer, grammar) -> None:
    """A token is allowed just where the text it makes can still become an answer, whatever its segmentation."""
    start = tokenizer.encode('{"grade": "I')
    constraint = grammar.start()
    for token in start:
        constraint.accept(token)
    allowed = np.flatnonzero(constraint.allowed(tokenizer.vocab_size + 7))
    texts = {int(t): tokenizer.token_bytes(int(t)) for t in allowed}
    assert set(texts.values()) >= {b"I", b'"'}
    for data in texts.values():
        rest = data.decode("utf-8", "replace")
        assert any(f'{end}"'.startswith(rest.split('"')[0]) for end in ("", "I", "II")), rest
    assert not constraint.complete


def test_an_answer_cut_short_is_told(tokenizer: Tokenizer, scripted, grammar) -> None:
    decoder, request, _ = scripted('{"grade": "II", "necrosis": true', max_new_tokens=4)
    sequence = drive(Loop(decoder, tokenizer), [Request(request.embeds, request.settings, grammar=grammar)])[0]
    assert sequence.stop_reason == "length"
    assert any("JSON is complete" in note for note in Generation.of(sequence).notes)


def test_a_ban_that_leaves_nothing_names_both_flags(llama, tokenizer: Tokenizer, asked, grammar) -> None:
    sampler = Sampler(GenerationSettings(no_repeat_ngram_size=1), constraint=grammar.start())

    def say_on() -> None:
        for _ in range(100):
            sampler.sample(np.zeros(tokenizer.vocab_size, np.float32))

    with pytest.raises(WsiRtError, match="--no-repeat-ngram-size or do without --json-schema"):
        say_on()


def test_white_space_ends(tokenizer: Tokenizer, grammar) -> None:
    """A model that says spaces for ever gets no further than nine."""
    space = tokenizer.encode("a b")
    constraint, count = grammar.start(), 0
    for token in tokenizer.encode("{"):
        constraint.accept(token)
    blanks = [t for t in range(tokenizer.vocab_size) if (b := tokenizer.token_bytes(t)) and not b.strip(b" \n")]
    assert space
    while any(constraint.allowed(tokenizer.vocab_size)[blanks]):
        constraint.accept(next(t for t in blanks if constraint.allowed(tokenizer.vocab_size)[t]))
        count += 1
        assert count < 20


def test_llamas_own_tokenizer(tmp_path: Path, grammar) -> None:
    """32,000 tokens, byte fallback: what the tokenizer writes is allowed, and random answers are JSON."""
    model = Path(__file__).resolve().parents[4] / "shared" / "data" / "llm" / "llama2_tokenizer.model"
    if not model.is_file():
        pytest.skip("the Llama-2 tokenizer is not beside the checkout")
    from wsi_rt.export.tokenizer import write_tokenizer

    write_tokenizer(model, tmp_path)
    llama2 = Tokenizer(tmp_path)
    real = type(grammar)(llama2, json.dumps(SCHEMA))
    for text in (
        '{"grade": "II", "necrosis": true, "mitoses": 12, "note": "keratin"}',
        '{"grade":"I","necrosis":false,"mitoses":0,"note":"é \\n"}',
        '{\n  "grade": "III",\n  "necrosis": true,\n  "mitoses": 7,\n  "note": ""\n}',
    ):
        constraint = real.start()
        for token in [*llama2.encode(text), 2]:
            assert constraint.allowed(32000)[token], (text, token)
            constraint.accept(token)
        assert constraint.complete
        require_valid(text)
    rng = np.random.default_rng(0)
    for _ in range(5):
        constraint, ids = real.start(), []
        while not ids or ids[-1] != 2:
            ids.append(int(rng.choice(np.flatnonzero(constraint.allowed(32000)))))
            constraint.accept(ids[-1])
        require_valid(llama2.decode(ids))


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ("{", "is no JSON"),
        ("[]", "is list in JSON"),
        ('{"type": "nope"}', "cannot be followed"),
        ('{"type": "string", "pattern": "("}', "cannot be followed"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(tokenizer: Tokenizer, grammar, schema: str, told: str) -> None:
    from wsi_rt.runtime.llm.grammar import Grammar

    with pytest.raises(InputError, match=told) as caught:
        Grammar(tokenizer, schema)
    assert "\n" not in str(caught.value)


def test_without_the_extra_the_error_names_it(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_rt.runtime.llm.grammar import Grammar

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MachineError, match=r"wsi-rt\[json\]"):
        Grammar(tokenizer, "{}")
