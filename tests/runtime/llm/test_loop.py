"""The loop on a stand-in decoder whose logits depend on everything in its KV."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_rt.export.tokenizer import synthetic_tokenizer
from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import KV, Decoder, DecoderSpec
from wsi_rt.runtime.llm.loop import Generation, Loop, generate
from wsi_rt.runtime.llm.scheduler import Request, Scheduler
from wsi_rt.runtime.llm.tokenizer import Tokenizer

HIDDEN = 8
F32 = NDArray[np.float32]


class StandInKV(KV):
    """Keeps the embeddings themselves."""

    def __init__(self, capacity: int) -> None:
        self.length, self.capacity = 0, capacity
        self.rows = np.full((capacity, HIDDEN), np.nan, np.float32)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def rewind(self, length: int) -> None:
        if length > self.length:
            raise ValueError(length)
        self.length = length

    def append(self, embeds: F32) -> None:
        assert self.length + len(embeds) <= self.capacity, "the loop overran the KV"
        self.rows[self.length : self.length + len(embeds)] = embeds
        self.length += len(embeds)


class StandInDecoder(Decoder):
    """A stand-in for a language model: logits are a fixed random map of a position-weighted sum of the KV.

    `script` forces the tokens that come after the prompt (by count of steps) instead.
    """

    def __init__(self, vocab: int, context: int = 128, script: Sequence[int] = ()) -> None:
        self.spec = DecoderSpec(vocab, HIDDEN, context, HIDDEN * 4)
        rng = np.random.default_rng(0)
        self.table = rng.standard_normal((vocab, HIDDEN)).astype(np.float32)
        self.head = rng.standard_normal((vocab, HIDDEN)).astype(np.float32)
        self.script = list(script)
        self.calls: list[tuple[str, int]] = []
        self.on_call: Callable[[], None] = lambda: None
        self.steps = 0

    def new_kv(self, capacity: int) -> StandInKV:
        return StandInKV(capacity)

    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        return self.table[token_ids]

    def prefill(self, kv: KV, embeds: F32) -> F32:
        self.calls.append(("prefill", len(embeds)))
        self.on_call()
        self.steps = 0
        return self._logits(kv, embeds)

    def step(self, kvs: Sequence[KV], token_ids: NDArray[np.int64]) -> F32:
        assert token_ids.dtype == np.int64
        self.calls.append(("step", len(kvs)))
        self.on_call()
        self.steps += 1
        return np.stack([self._logits(kv, self.table[[t]]) for kv, t in zip(kvs, token_ids, strict=True)])

    def close(self) -> None:
        pass

    def _logits(self, kv: KV, embeds: F32) -> F32:
        assert isinstance(kv, StandInKV)
        kv.append(embeds)
        if self.script:
            logits = np.zeros(self.spec.vocab_size, np.float32)
            logits[self.script[min(self.steps, len(self.script) - 1)]] = 9
            return logits
        state = (kv.rows[: kv.length] * np.sin(1.0 + np.arange(kv.length, dtype=np.float32))[:, None]).sum(0)
        logits = self.head @ (state * np.cos(kv.length * np.arange(1, HIDDEN + 1)))  # keeps greedy from latching
        logits[:3] = -100  # no special token by chance
        return logits.astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("synthetic")
    synthetic_tokenizer(folder)
    return Tokenizer(folder)


def prompt(length: int, seed: int = 1) -> F32:
    return np.random.default_rng(seed).standard_normal((length, HIDDEN)).astype(np.float32)


def scripted(tokenizer: Tokenizer, text: str, end: Sequence[int] = (2,), **settings: object) -> tuple:
    """A decoder that says `text` and then `end`, and a request for it."""
    ids = [*tokenizer.encode(text), *end]
    decoder = StandInDecoder(tokenizer.vocab_size, script=ids)
    return decoder, Request(prompt(5), GenerationSettings(**settings)), ids


def answer(decoder: Decoder, tokenizer: Tokenizer, request: Request, **kw: object) -> tuple[Generation, list[str]]:
    pieces: list[str] = []
    result = generate(decoder, tokenizer, request, on_text=pieces.append, **kw)
    assert "".join(pieces) == result.text
    assert all(pieces)
    return result, pieces


def test_eos_is_a_token_but_not_text(tokenizer: Tokenizer) -> None:
    decoder, request, ids = scripted(tokenizer, "The tumor is benign.")
    result, pieces = answer(decoder, tokenizer, request)
    assert result.text == "The tumor is benign."
    assert result.token_ids == tuple(ids)
    assert result.token_ids[-1] == 2
    assert (result.stop_reason, result.notes, result.prompt_tokens) == ("eos", (), 5)
    assert len(pieces) > 1
    assert decoder.calls == [("prefill", 5), *[("step", 1)] * (len(ids) - 1)]
    assert result.prefill_ms > 0
    assert result.decode_ms > 0


def test_each_step_feeds_the_token_just_chosen(tokenizer: Tokenizer) -> None:
    """Against prefilling everything anew for every token."""
    decoder = StandInDecoder(tokenizer.vocab_size)
    want: list[int] = []
    for _ in range(15):
        tail = decoder.embed(np.array(want, dtype=np.int64))
        want.append(int(decoder.prefill(decoder.new_kv(40), np.concatenate([prompt(6), tail])).argmax()))
    result, _ = answer(decoder, tokenizer, Request(prompt(6), GenerationSettings(max_new_tokens=15)))
    assert list(result.token_ids) == want
    assert len(set(want)) > 5


def test_eos_gives_out_what_was_held_back(tokenizer: Tokenizer) -> None:
    decoder, request, _ = scripted(tokenizer, "Yes\nUSER")
    result, _ = answer(decoder, tokenizer, request)
    assert (result.text, result.stop_reason) == ("Yes\nUSER", "eos")


def test_length(tokenizer: Tokenizer) -> None:
    decoder, request, ids = scripted(tokenizer, "The tumor is poorly differentiated", max_new_tokens=3)
    result, _ = answer(decoder, tokenizer, request)
    assert result.stop_reason == "length"
    assert result.token_ids == tuple(ids[:3])
    assert result.text == tokenizer.decode(ids[:3])
    assert result.notes == ()  # asked for, so nothing to tell


def test_one_new_token_needs_no_step(tokenizer: Tokenizer) -> None:
    decoder, request, _ = scripted(tokenizer, "The tumor", max_new_tokens=1)
    result, _ = answer(decoder, tokenizer, request)
    assert (len(result.token_ids), result.decode_ms) == (1, 0.0)
    assert decoder.calls == [("prefill", 5)]


def test_stop_string_trims_the_text(tokenizer: Tokenizer) -> None:
    decoder, request, ids = scripted(tokenizer, "Grade 2.\nASSISTANT: and more")
    result, _ = answer(decoder, tokenizer, request)
    assert (result.text, result.stop_reason) == ("Grade 2.", "stop_string")
    assert result.token_ids == tuple(ids[: len(result.token_ids)])
    assert len(result.token_ids) < len(ids)


def test_no_stop_strings_when_none_are_set(tokenizer: Tokenizer) -> None:
    decoder, request, _ = scripted(tokenizer, "Grade 2.\nASSISTANT: more", stop=())
    assert answer(decoder, tokenizer, request)[0].text == "Grade 2.\nASSISTANT: more"


@pytest.mark.parametrize("as_event", [True, False])
def test_cancel_keeps_the_text_so_far(tokenizer: Tokenizer, as_event: bool) -> None:
    decoder, request, ids = scripted(tokenizer, "The tumor is poorly differentiated")
    event = threading.Event()
    decoder.on_call = lambda: event.set() if len(decoder.calls) == 3 else None
    result, _ = answer(decoder, tokenizer, request, cancel=event if as_event else event.is_set)
    assert result.stop_reason == "cancelled"
    assert result.token_ids == tuple(ids[:3])
    assert result.text == tokenizer.decode(ids[:3])


def test_cancelled_before_it_began_costs_no_prefill(tokenizer: Tokenizer) -> None:
    decoder, request, _ = scripted(tokenizer, "The tumor")
    result, _ = answer(decoder, tokenizer, request, cancel=lambda: True)
    assert (result.text, result.token_ids, result.stop_reason) == ("", (), "cancelled")
    assert decoder.calls == []


def test_prompt_longer_than_the_context(tokenizer: Tokenizer) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size, context=20)
    with pytest.raises(InputError, match=r"prompt has 20 tokens \(8 of text, 12 of the slide\).* context of 20"):
        generate(decoder, tokenizer, Request(prompt(20), slide_tokens=12))
    assert decoder.calls == []


def test_answer_limited_to_the_context(tokenizer: Tokenizer) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size, context=20)
    result = generate(decoder, tokenizer, Request(prompt(15), GenerationSettings(max_new_tokens=50)))
    assert (len(result.token_ids), result.stop_reason) == (5, "length")
    assert len(result.notes) == 1
    assert "after 5 tokens instead of 50" in result.notes[0]


def test_a_given_kv_limits_too(tokenizer: Tokenizer) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size)
    kv = decoder.new_kv(12)
    decoder.prefill(kv, prompt(6))
    result = generate(decoder, tokenizer, Request(prompt(3), kv=kv))
    assert (len(result.token_ids), result.stop_reason) == (3, "length")
    kv.rewind(6)
    with pytest.raises(InputError, match="KV capacity of 12"):
        generate(decoder, tokenizer, Request(prompt(6), kv=kv))


@pytest.mark.parametrize("shape", [(0, HIDDEN), (3, HIDDEN + 1)])
def test_misshapen_prompt(tokenizer: Tokenizer, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="expected"):
        generate(StandInDecoder(tokenizer.vocab_size), tokenizer, Request(np.zeros(shape, np.float32)))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_shared_prefix_gives_the_same_tokens_again_and_again(tokenizer: Tokenizer, temperature: float) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size)
    cfg = GenerationSettings(max_new_tokens=12, temperature=temperature, seed=5, repetition_penalty=1.2)
    prefix, questions = prompt(20), [prompt(4, seed=s) for s in (10, 11, 12)]
    alone = [generate(decoder, tokenizer, Request(np.concatenate([prefix, q]), cfg)).token_ids for q in questions]
    assert len(set(alone)) == 3  # the decoder does look at the question
    kv = decoder.new_kv(64)
    decoder.prefill(kv, prefix)
    decoder.calls.clear()
    for _ in range(2):
        for question, want in zip(questions, alone, strict=True):
            kv.rewind(20)
            result = generate(decoder, tokenizer, Request(question, cfg, kv=kv))
            assert result.token_ids == want
            assert result.prompt_tokens == 24
    assert ("prefill", 4) in decoder.calls
    assert ("prefill", 24) not in decoder.calls


def test_a_kv_belongs_to_one_request_at_a_time(tokenizer: Tokenizer) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size)
    kv = decoder.new_kv(64)
    decoder.prefill(kv, prompt(6))
    loop = Loop(decoder, tokenizer, max_running=2)
    first = loop.submit(Request(prompt(3), GenerationSettings(max_new_tokens=2), kv=kv))
    for _ in range(2):  # while it waits, and while it runs
        with pytest.raises(ValueError, match="belongs to a request that has not ended"):
            loop.submit(Request(prompt(3, seed=1), kv=kv))
        loop.step()
    while not first.done:
        loop.step()
    kv.rewind(6)
    loop.submit(Request(prompt(3, seed=1), kv=kv))


def test_waiting_requests_hold_no_memory(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size)
    made: list[int] = []
    monkeypatch.setattr(decoder, "new_kv", lambda capacity: made.append(capacity) or StandInKV(capacity))
    loop = Loop(decoder, tokenizer)
    for seed in range(5):
        loop.submit(Request(prompt(3, seed=seed), GenerationSettings(max_new_tokens=4)))
    assert made == []
    loop.step()
    assert made == [7]


def test_several_running_sequences_are_independent(tokenizer: Tokenizer) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size)
    requests = [
        Request(prompt(3 + i, seed=i), GenerationSettings(max_new_tokens=4 + i, temperature=0.8, seed=i), stream=i)
        for i in range(5)
    ]
    alone = [generate(decoder, tokenizer, r) for r in requests]
    decoder.calls.clear()
    loop = Loop(decoder, tokenizer, max_running=3)
    sequences = [loop.submit(r) for r in requests]
    texts = {id(s): "" for s in sequences}
    while loop.scheduler.has_work:
        for event in loop.step():
            texts[id(event.sequence)] += event.text
    for sequence, want in zip(sequences, alone, strict=True):
        got = Generation.of(sequence)
        assert (got.token_ids, got.text, got.stop_reason) == (want.token_ids, want.text, want.stop_reason)
        assert texts[id(sequence)] == want.text
    assert ("step", 3) in decoder.calls
    assert not loop.scheduler.running


def test_first_come_first_served_one_at_a_time(tokenizer: Tokenizer) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size)
    loop = Loop(decoder, tokenizer)
    first, second = (loop.submit(Request(prompt(3), GenerationSettings(max_new_tokens=2))) for _ in range(2))
    ended = []
    while loop.scheduler.has_work:
        ended += [e.sequence for e in loop.step() if e.stop_reason]
    assert ended == [first, second]
    assert [kind for kind, _ in decoder.calls] == ["prefill", "step", "prefill", "step"]
    assert loop.schedule() is None


def test_unusable_logits_end_one_sequence_only(tokenizer: Tokenizer) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size)
    bad, good = prompt(3), prompt(3)
    bad[1] = np.nan
    with pytest.raises(WsiRtError, match="at step 0"):
        generate(decoder, tokenizer, Request(bad))
    loop = Loop(decoder, tokenizer, max_running=2)
    sequences = [loop.submit(Request(x, GenerationSettings(max_new_tokens=4))) for x in (bad, good)]
    while loop.scheduler.has_work:
        loop.step()
    assert isinstance(sequences[0].error, WsiRtError)
    assert sequences[1].stop_reason == "length"


def test_a_failing_decoder_leaves_nothing_running(tokenizer: Tokenizer) -> None:
    decoder = StandInDecoder(tokenizer.vocab_size)

    def fail() -> None:
        raise RuntimeError("out of memory")

    decoder.on_call = fail
    loop = Loop(decoder, tokenizer)
    sequence = loop.submit(Request(prompt(3)))
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.step()
    assert sequence.done
    assert not loop.scheduler.has_work


def test_scheduler_wants_a_place() -> None:
    with pytest.raises(ValueError, match="max_running"):
        Scheduler(0)
