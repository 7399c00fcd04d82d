"""The torch decoder through the whole loop, against onnxruntime's decoder with one request at a time: preempted,
replayed, speculating, and without a lost page."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")

import torch

from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.component import build_component
from wsi_rt.export.sources.synthetic import SyntheticSource
from wsi_rt.export.sources.weights import Part
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.llm.loop import Loop
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.scheduler import Limits
from wsi_rt.runtime.llm.sequence import Sequence
from wsi_rt.runtime.llm.tokenizer import Tokenizer
from wsi_rt.runtime.llm.torch_decoder import TorchDecoder

_SPEC = importlib.util.spec_from_file_location("random_requests", Path(__file__).with_name("test_random_requests.py"))
shared = importlib.util.module_from_spec(_SPEC)  # its oracle, its random requests
_SPEC.loader.exec_module(shared)

REQUESTS, ROUNDS = 50, 3
POOL_BYTES = 4 << 20


@pytest.fixture(scope="module")
def built(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    c = LlamaConfig(
        hidden=64, layers=2, heads=2, kv_heads=1, head_width=64, ffn=96, vocab=tokenizer.vocab_size, context=256
    )
    root = tmp_path_factory.mktemp("llm")
    part = Part(c, SyntheticSource(c, "test", 3))
    return root, build_component("llm", part, root, "ort-cpu", "fp32", 1, lambda _: None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def llama(built, request: pytest.FixtureRequest) -> Iterator[TorchDecoder]:
    """`on_call` is called before every `extend`; pages hold NaN before they are written."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    root, manifest = built
    compiled, device = manifest.compiled("ort-cpu"), torch.device(request.param)
    with TorchDecoder.open(root, manifest, compiled, 1, device=device, kv_bytes=POOL_BYTES) as decoder:
        decoder._pool._pages.fill_(torch.nan)
        extend = decoder.extend
        decoder.on_call = lambda: None
        decoder.extend = lambda chunks: decoder.on_call() or extend(chunks)
        yield decoder
        del decoder.extend  # it refers to itself


@pytest.fixture
def oracle(built, tokenizer: Tokenizer, slides: list) -> Iterator:
    with backend("ort-cpu").open_decoder(*built, 1) as ort:
        yield shared.Oracle(ort, tokenizer, slides)


def check(oracle, sequence: Sequence, request: Request, cancelled: bool) -> None:
    """As `test_random_requests`, but that scores are equal to rounding."""
    if sequence.scorer is not None and sequence.stop_reason == "choice":
        assert sequence.scorer.probabilities() == pytest.approx(oracle.choices(request), rel=1e-3)
    else:
        shared.check(oracle, sequence, request, cancelled)


def pages_accounted(loop: Loop) -> None:
    """Every page held is one of somebody that the loop knows."""
    kvs = [s.kv for s in loop.scheduler.running] + [f.kv for f in loop.scheduler.memory.fills.values()]
    kvs += [p.kv for p in loop.scheduler.memory.parked]
    known = [x.kv for x in loop.store._held.values()] + [kv for kv in kvs if kv is not None]
    assert loop.decoder._pool.free.held == sum(len(x.pages.numbers) for x in known)


@pytest.mark.parametrize("round_", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, ROUNDS))])
def test_random_requests_answer_as_onnxruntime_alone(
    llama: TorchDecoder, oracle, tokenizer: Tokenizer, slides: list, asked: Callable[..., Request], round_: int
) -> None:
    """Arriving over time, about three slides, some cancelled, in memory for a few of them."""
    rng = np.random.default_rng(100 + round_)
    budget = int(rng.integers(80, 120)) * llama.spec.kv_bytes_per_token
    limits = Limits(max_running=int(rng.integers(5, 14)), step_tokens=16, lone_tokens=32, kv_bytes=budget, overtakes=6)
    loop = Loop(llama, tokenizer, limits)
    assert loop.speculation is None  # a token's bits depend on its company
    llama.on_call = lambda: pages_accounted(loop)
    requests = [shared.random_request(rng, slides, asked, i) for i in range(REQUESTS)]
    cancel_at = {i: int(rng.integers(1, 30)) for i in range(REQUESTS) if rng.random() < 0.15}
    steps = [0] * REQUESTS
    sequences: list[Sequence] = []

    def cancel(i: int) -> bool:
        steps[i] += 1
        return steps[i] >= cancel_at.get(i, 1 << 30)

    while len(sequences) < REQUESTS or loop.scheduler.has_work:
        for _ in range(rng.integers(0, 4)):
            if (i := len(sequences)) < REQUESTS:
                sequences.append(loop.submit(replace(requests[i], cancel=lambda i=i: cancel(i))))
        loop.step()
    for i, (sequence, request) in enumerate(zip(sequences, requests, strict=True)):
        check(oracle, sequence, request, i in cancel_at)
    assert {s.stop_reason for s in sequences} >= {"length", "cancelled", "choice"}
    assert sum(s.kv_lost for s in sequences) >= 3  # put out, and fed again
    pages_accounted(loop)
    loop.store.clear()
    assert llama._pool.free.held == 0


def test_guesses_are_verified_and_taken_back(
    llama: TorchDecoder, oracle, tokenizer: Tokenizer, slides: list, asked: Callable[..., Request]
) -> None:
    """Speculation needs a decoder that says it is row-exact; this one is to rounding, enough for greedy tokens."""
    llama.spec = replace(llama.spec, row_exact=True)
    loop = Loop(llama, tokenizer, Limits(max_running=4, step_tokens=32, lone_tokens=32))
    loop.speculation.cost = shared.FreeRows()
    llama.on_call = lambda: pages_accounted(loop)
    requests = [asked(i % 4, slides[i % 2], max_new_tokens=24) for i in range(12)]  # each comes again
    sequences = []
    for request in requests:
        sequences.append(loop.submit(request))
        loop.step()
    while loop.scheduler.has_work:
        loop.step()
    for sequence, request in zip(sequences, requests, strict=True):
        check(oracle, sequence, request, False)
    drafted, accepted = (sum(getattr(s, name) for s in sequences) for name in ("drafted", "accepted"))
    assert drafted > accepted > 20
    loop.store.clear()
    assert llama._pool.free.held == 0
