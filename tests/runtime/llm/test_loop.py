"""One request at a time through the loop: tokens, text, endings, limits, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import F32, Decoder
from wsi_rt.runtime.llm.generation import Generation
from wsi_rt.runtime.llm.loop import Loop, generate
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.scheduler import Limits
from wsi_rt.runtime.llm.tokenizer import Tokenizer

Scripted = Callable[..., tuple]
Prompt = Callable[..., F32]


def answer(decoder: Decoder, tokenizer: Tokenizer, request: Request, **kw: object) -> tuple[Generation, list[str]]:
    pieces: list[str] = []
    result = generate(decoder, tokenizer, request, on_text=pieces.append, **kw)
    assert "".join(pieces) == result.text
    assert all(pieces)
    return result, pieces


def test_eos_is_a_token_but_not_text(tokenizer: Tokenizer, scripted: Scripted) -> None:
    decoder, request, ids = scripted("The tumor is benign.")
    result, pieces = answer(decoder, tokenizer, request)
    assert result.text == "The tumor is benign."
    assert result.token_ids == tuple(ids)
    assert result.token_ids[-1] == 2
    assert (result.stop_reason, result.notes, result.prompt_tokens, result.choices) == ("eos", (), 5, None)
    assert len(pieces) > 1
    assert decoder.calls[0] == [5]
    assert len(decoder.calls) <= len(ids)
    assert result.prefill_ms > 0
    assert result.decode_ms > 0
    assert result.first_token_ms >= result.prefill_ms


@pytest.mark.parametrize("speculate", [False, True])
def test_each_step_feeds_the_token_just_chosen(llama: Decoder, tokenizer: Tokenizer, prompt: Prompt, speculate) -> None:
    """Against prefilling everything anew for every token."""
    want: list[int] = []
    for _ in range(15):
        tail = llama.embed(np.array(want, dtype=np.int64))
        want.append(int(llama.prefill(llama.new_kv(40), np.concatenate([prompt(6), tail])).argmax()))
    loop = Loop(llama, tokenizer, speculate=speculate)
    sequence = loop.submit(Request(prompt(6), GenerationSettings(max_new_tokens=15)))
    while not sequence.done:
        loop.step()
    assert sequence.token_ids == want
    assert len(set(want)) > 5


def test_eos_gives_out_what_was_held_back(tokenizer: Tokenizer, scripted: Scripted) -> None:
    decoder, request, _ = scripted("Yes\nUSER")
    result, _ = answer(decoder, tokenizer, request)
    assert (result.text, result.stop_reason) == ("Yes\nUSER", "eos")


def test_length(tokenizer: Tokenizer, scripted: Scripted) -> None:
    decoder, request, ids = scripted("The tumor is poorly differentiated", max_new_tokens=3)
    result, _ = answer(decoder, tokenizer, request)
    assert result.stop_reason == "length"
    assert result.token_ids == tuple(ids[:3])
    assert result.text == tokenizer.decode(ids[:3])
    assert result.notes == ()  # asked for, so nothing to tell


def test_one_new_token_needs_no_step(tokenizer: Tokenizer, scripted: Scripted) -> None:
    decoder, request, _ = scripted("The tumor", max_new_tokens=1)
    result, _ = answer(decoder, tokenizer, request)
    assert (len(result.token_ids), result.decode_ms) == (1, 0.0)
    assert decoder.calls == [[5]]


def test_stop_string_trims_the_text(tokenizer: Tokenizer, scripted: Scripted) -> None:
    decoder, request, ids = scripted("Grade 2.\nASSISTANT: and more")
    result, _ = answer(decoder, tokenizer, request)
    assert (result.text, result.stop_reason) == ("Grade 2.", "stop_string")
    assert result.token_ids == tuple(ids[: len(result.token_ids)])
    assert len(result.token_ids) < len(ids)


def test_no_stop_strings_when_none_are_set(tokenizer: Tokenizer, scripted: Scripted) -> None:
    decoder, request, _ = scripted("Grade 2.\nASSISTANT: more", stop=())
    assert answer(decoder, tokenizer, request)[0].text == "Grade 2.\nASSISTANT: more"


@pytest.mark.parametrize("as_event", [True, False])
def test_cancel_keeps_the_text_so_far(tokenizer: Tokenizer, scripted: Scripted, as_event: bool) -> None:
    decoder, request, ids = scripted("The tumor is poorly differentiated")
    event = threading.Event()
    decoder.on_call = lambda: event.set() if len(decoder.calls) == 3 else None
    result, _ = answer(decoder, tokenizer, request, cancel=event if as_event else event.is_set)
    assert result.stop_reason == "cancelled"
    assert result.token_ids == tuple(ids[:3])
    assert result.text == tokenizer.decode(ids[:3])


def test_cancelled_before_it_began_costs_no_prefill(tokenizer: Tokenizer, scripted: Scripted) -> None:
    decoder, request, _ = scripted("The tumor")
    result, _ = answer(decoder, tokenizer, request, cancel=lambda: True)
    assert (result.text, result.token_ids, result.stop_reason) == ("", (), "cancelled")
    assert decoder.calls == []


def test_prompt_longer_than_the_context(llama, tokenizer: Tokenizer, prompt: Prompt, slides: list) -> None:
    with pytest.raises(InputError, match=r"prompt has 256 tokens \(239 of text, 17 of the slide\).* context of 256"):
        generate(llama, tokenizer, Request(prompt(236), prefix=slides[0]))
    assert llama.calls == []


def test_answer_limited_to_the_context(llama, tokenizer: Tokenizer, prompt: Prompt) -> None:
    result = generate(llama, tokenizer, Request(prompt(251), GenerationSettings(max_new_tokens=50)))
    assert (len(result.token_ids), result.stop_reason) == (5, "length")
    assert len(result.notes) == 1
    assert "after 5 tokens instead of 50" in result.notes[0]


@pytest.mark.parametrize("shape", [(0, 32), (3, 33)])
def test_misshapen_prompt(llama, tokenizer: Tokenizer, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="expected"):
        generate(llama, tokenizer, Request(np.zeros(shape, np.float32)))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_shared_prefix_gives_what_one_prompt_gives(
    llama, tokenizer: Tokenizer, slides: list, asked: Callable[..., Request], temperature: float
) -> None:
    settings = {"temperature": temperature, "seed": 5, "repetition_penalty": 1.2}
    requests = [asked(i, slides[0], **settings) for i in range(3)]
    whole = [replace(r, embeds=np.concatenate([slides[0].embeds, r.embeds]), prefix=None) for r in requests]
    alone = [generate(llama, tokenizer, r) for r in whole]
    assert len({a.token_ids for a in alone}) == 3  # the decoder does look at the question
    loop = Loop(llama, tokenizer)
    llama.calls.clear()
    for request, want in zip(requests * 2, alone * 2, strict=True):
        sequence = loop.submit(request)
        while not sequence.done:
            loop.step()
        got = Generation.of(sequence)
        assert (got.token_ids, got.text, got.prompt_tokens) == (want.token_ids, want.text, want.prompt_tokens)
    assert [rows for rows in llama.calls if rows == [slides[0].length]] == [[slides[0].length]]  # once


def test_waiting_requests_hold_no_memory(llama, tokenizer: Tokenizer, prompt: Prompt, monkeypatch) -> None:
    made, new_kv = [], llama.new_kv
    monkeypatch.setattr(llama, "new_kv", lambda capacity, prefix: made.append(capacity) or new_kv(capacity, prefix))
    loop = Loop(llama, tokenizer, Limits(max_running=1))
    for seed in range(5):
        loop.submit(Request(prompt(3, seed), GenerationSettings(max_new_tokens=4)))
    assert made == []
    loop.step()
    assert made == [7]


def test_unusable_logits_end_one_sequence_only(llama, tokenizer: Tokenizer, prompt: Prompt) -> None:
    bad, good = prompt(3), prompt(3)
    bad[1] = np.nan
    with pytest.raises(WsiRtError, match="at step 0"):
        generate(llama, tokenizer, Request(bad))
    loop = Loop(llama, tokenizer)
    sequences = [loop.submit(Request(x, GenerationSettings(max_new_tokens=4))) for x in (bad, good)]
    while loop.scheduler.has_work:
        loop.step()
    assert isinstance(sequences[0].error, WsiRtError)
    assert sequences[1].stop_reason == "length"


@pytest.mark.parametrize("with_prefix", [False, True])
def test_a_failing_decoder_leaves_nothing_running(llama, tokenizer, slides: list, asked, with_prefix: bool) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    llama.on_call = fail
    loop = Loop(llama, tokenizer)
    sequence = loop.submit(asked(0, slides[0] if with_prefix else None))
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.step()
    assert sequence.done
    assert not loop.scheduler.has_work
    assert loop.scheduler.memory.held_bytes == 0
    llama.on_call = lambda: None  # the loop stays usable
    again = loop.submit(asked(0, slides[0]))
    while not again.done:
        loop.step()
    assert again.stop_reason == "length"
