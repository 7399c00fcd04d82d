"""500 random requests against a one-by-one oracle that shares no scheduling, batching and speculation with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.llm.choices import Option, log_softmax
from wsi_rt.runtime.llm.decoder import KV, Decoder, PrefixKV
from wsi_rt.runtime.llm.loop import Loop
from wsi_rt.runtime.llm.prefix import SlidePrefix
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.sampling import Sampler
from wsi_rt.runtime.llm.scheduler import Limits
from wsi_rt.runtime.llm.sequence import Sequence
from wsi_rt.runtime.llm.speculate import StepCost
from wsi_rt.runtime.llm.tokenizer import Tokenizer

REQUESTS, ROUNDS = 125, 4


@pytest.fixture
def llama(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Iterator[Decoder]:
    """The decoder of the test's parameter: the numpy one, or ONNX Runtime's on a bundle's weights. `on_call` is called
    before every `extend`."""
    if request.param == "numpy":
        yield request.getfixturevalue("numpy_llama")
        return
    with Bundle.open(request.getfixturevalue("nano_bundle"), threads=1).decoder() as decoder:
        extend = decoder.extend
        decoder.on_call = lambda: None
        decoder.extend = lambda chunks: decoder.on_call() or extend(chunks)
        yield decoder


class FreeRows(StepCost):
    """Every step costs the same."""

    def __call__(self, rows: int) -> float:
        return 1.0


class Oracle:
    """One request at a time, token by token, on a KV of its own; a slide's prefix in one call."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, slides: list[SlidePrefix]) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.prefixes: dict[str, PrefixKV] = {}
        for slide in slides:
            kv = decoder.new_kv(slide.length)
            decoder.prefill(kv, slide.embeds)
            self.prefixes[slide.key] = decoder.freeze(kv)

    def begin(self, request: Request, room: int) -> tuple[KV, np.ndarray]:
        prefix = self.prefixes[request.prefix.key] if request.prefix is not None else None
        kv = self.decoder.new_kv(request.prompt_length + room, prefix)
        return kv, self.decoder.prefill(kv, request.embeds)

    def tokens(self, request: Request) -> tuple[tuple[int, ...], str]:
        """And the reason they end with."""
        sampler, ids = Sampler(request.settings, request.stream), []
        kv, logits = self.begin(request, request.settings.max_new_tokens)
        while True:
            ids.append(sampler.sample(logits))
            if ids[-1] in self.tokenizer.eos_ids:
                return tuple(ids), "eos"
            if any(stop in self.tokenizer.decode(ids) for stop in request.settings.stop):
                return tuple(ids), "stop_string"
            if len(ids) == request.settings.max_new_tokens:
                return tuple(ids), "length"
            logits = self.decoder.step([kv], np.array(ids[-1:]))[0]

    def choices(self, request: Request) -> dict[str, float]:
        """Each option after a prompt of its own."""
        scores = []
        for option in request.options:
            (kv, logits), score = self.begin(request, len(option.token_ids)), 0.0
            for token in option.token_ids:
                score += log_softmax(logits)[token]
                logits = self.decoder.step([kv], np.array([token]))[0]
            scores.append(score)
        weights = np.exp(np.array(scores) - max(scores))
        return {o.label: w for o, w in zip(request.options, weights / weights.sum(), strict=True)}


def random_request(rng: np.random.Generator, slides: list, asked: Callable[..., Request], number: int) -> Request:
    warm = rng.random() < 0.4
    settings = {
        "max_new_tokens": int(rng.integers(1, 40)),
        "temperature": float(rng.choice([0.2, 0.8, 1.5])) if warm else 0.0,
        "top_k": int(rng.choice([0, 5, 50])),
        "top_p": float(rng.choice([0.7, 1.0])),
        "repetition_penalty": float(rng.choice([1.0, 1.1, 1.5])),
        "no_repeat_ngram_size": int(rng.choice([0, 2, 3])),
        "seed": int(rng.integers(5)),
        "stop": tuple(rng.choice(["e", "th", "a"], size=rng.integers(0, 3), replace=False).tolist()),
    }
    options: tuple[Option, ...] = ()
    if rng.random() < 0.2:
        lengths = rng.integers(1, 4, size=rng.integers(2, 5))
        ids = rng.integers(300, 340, size=(len(lengths), 4))
        options = tuple(
            Option(str(i), tuple(row[:n].tolist())) for i, (row, n) in enumerate(zip(ids, lengths, strict=True))
        )
    prefix = slides[rng.integers(3)] if rng.random() < 0.9 else None
    return asked(number, prefix, options=options, stream=int(rng.integers(2)), **settings)


def check(oracle: Oracle, sequence: Sequence, request: Request, cancelled: bool) -> None:
    assert sequence.error is None
    if sequence.scorer is not None:
        assert sequence.stop_reason == "choice" or (cancelled and sequence.stop_reason == "cancelled")
        if sequence.stop_reason == "choice":
            assert sequence.scorer.probabilities() == pytest.approx(oracle.choices(request), rel=1e-12)
        return
    ids, reason = oracle.tokens(request)
    if cancelled and sequence.stop_reason == "cancelled":
        assert tuple(sequence.token_ids) == ids[: len(sequence.token_ids)]
        assert len(sequence.token_ids) < len(ids)
        return
    assert (tuple(sequence.token_ids), sequence.stop_reason) == (ids, reason)
    if reason != "stop_string":
        assert sequence.text.text == oracle.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("llama", "round_"),
    [
        ("numpy", 0),
        *(pytest.param("numpy", i, marks=pytest.mark.slow) for i in range(1, ROUNDS)),
        *(pytest.param("onnxruntime", i, marks=pytest.mark.slow) for i in range(2)),
    ],
    indirect=["llama"],
)
def test_random_requests_answer_as_if_they_were_alone(
    llama, tokenizer: Tokenizer, slides: list, asked: Callable[..., Request], round_: int
) -> None:
    """Arriving over time, about three slides, some cancelled, in memory for a few of them."""
    rng = np.random.default_rng(round_)
    budget = int(rng.integers(80, 120)) * llama.spec.kv_bytes_per_token
    limits = Limits(max_running=int(rng.integers(5, 14)), step_tokens=16, lone_tokens=32, kv_bytes=budget, overtakes=6)
    loop = Loop(llama, tokenizer, limits)
    requests: list[Request] = []
    for i in range(REQUESTS):  # some come again: their answers are guessed
        again = bool(requests) and rng.random() < 0.3
        requests.append(requests[rng.integers(i)] if again else random_request(rng, slides, asked, i))
    cancel_at = {i: int(rng.integers(1, 30)) for i in range(REQUESTS) if rng.random() < 0.15}
    steps = [0] * REQUESTS
    sequences: list[Sequence] = []

    def cancel(i: int) -> bool:
        steps[i] += 1
        return steps[i] >= cancel_at.get(i, 1 << 30)

    def within_budget() -> None:
        held = loop.store.nbytes + sum(s.kv.nbytes for s in loop.scheduler.running if s.kv is not None)
        held += sum(f.kv.nbytes for f in loop.scheduler.memory.fills.values())
        assert held <= loop.scheduler.memory.held_bytes <= budget

    assert loop.speculation is not None
    loop.speculation.cost = FreeRows()  # many guesses, right and wrong ones
    llama.on_call = within_budget
    while len(sequences) < REQUESTS or loop.scheduler.has_work:
        for _ in range(rng.integers(0, 4)):
            if (i := len(sequences)) < REQUESTS:
                sequences.append(loop.submit(replace(requests[i], cancel=lambda i=i: cancel(i))))
        loop.step()
    assert all(s.done for s in sequences)
    assert loop.scheduler.memory.held_bytes == loop.store.nbytes == loop.store.idle_bytes  # nothing leaked
    assert not any(s.kv is not None or s.prefix_kv is not None for s in sequences)
    llama.on_call = lambda: None
    oracle = Oracle(llama, tokenizer, slides)
    for i, (sequence, request) in enumerate(zip(sequences, requests, strict=True)):
        check(oracle, sequence, request, i in cancel_at)
    told = {s.stop_reason for s in sequences}
    assert told >= {"length", "stop_string", "cancelled", "choice"}
    assert sum(s.kv_lost for s in sequences) >= 5
    drafted, accepted = (sum(getattr(s, name) for s in sequences) for name in ("drafted", "accepted"))
    assert drafted >= accepted > 10
