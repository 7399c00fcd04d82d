"""wsi-rt itself: the loop that `ask` and `batch` run, and the same engine one question at a time without a prefix."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from wsi_rt.benchmarks.llm.cases import Slide
from wsi_rt.benchmarks.llm.providers import Place
from wsi_rt.benchmarks.llm.providers.base import F32, SMALL_PARAMETERS, Answers, CannotError, Ids, Model
from wsi_rt.export.arch import LlamaConfig
from wsi_rt.export.precision import weight_bytes, wide_bytes
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.choices import Option
from wsi_rt.runtime.llm.decoder import KV, Chunk, Decoder, PrefixKV
from wsi_rt.runtime.llm.generation import Generation
from wsi_rt.runtime.llm.loop import Loop
from wsi_rt.runtime.llm.prefix import SlidePrefix
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.manifest import EngineManifest
from wsi_rt.runtime.types import POOLED_TOKENS

if TYPE_CHECKING:
    from wsi_rt.runtime.llm.sequence import Sequence


class Unshared(Model):
    """The engine as published runners use theirs: one question at a time, its slide's prefix computed again."""

    def __init__(self, place: Place) -> None:
        self._bundle = Bundle.open(place.path("bundle"), place.threads)
        self._decoder = self._open()
        self._context = min(place.context, self._decoder.spec.context_length)
        self._kvs: list[KV] = []
        self.weight_bytes = read_bytes(self._bundle.component("llm"), self._bundle.target)
        self.kv_bytes_per_token = self._decoder.spec.kv_bytes_per_token

    def _open(self) -> Decoder:
        return self._bundle.decoder()

    def prefill(self, ids: Ids) -> F32:
        self._kvs = [self._decoder.new_kv(self._context)]
        return self._decoder.prefill(self._kvs[0], self._decoder.embed(ids))

    def step(self, ids: Ids) -> F32:
        return self._decoder.step(self._kvs, ids)


class Plain(Unshared):
    """The prefix once, all questions together, no guessed tokens."""

    speculate = False

    def shared(self, prefix: Ids, questions: tuple[Ids, ...]) -> F32:
        held = self._prefill_prefix(prefix)
        self._kvs = [self._decoder.new_kv(self._context, held) for _ in questions]
        chunks = [Chunk(kv, self._decoder.embed(q)) for kv, q in zip(self._kvs, questions, strict=True)]
        return np.concatenate(self._decoder.extend(chunks))

    def answer_slide(self, slide: Slide) -> Answers:
        """Through the loop, greedily; a closed question is a choice of options."""
        self._kvs = []
        start, loop = perf_counter(), Loop(self._decoder, self._bundle.tokenizer(), speculate=self.speculate)
        sequences = [loop.submit(request) for request in self._requests(slide)]
        first: dict[Sequence, float] = {}
        answers = Answers()
        while loop.scheduler.has_work:
            for event in loop.step():
                if event.error is not None:
                    raise event.error
            now = perf_counter() - start
            first |= {s: now for s in sequences if s not in first and (s.token_ids or s.done)}
            self._account(loop, sequences, answers)
        done = [Generation.of(s) for s in sequences]
        answers.token_ids = [list(g.token_ids) for g in done]
        answers.first_seconds = [first[s] for s in sequences]
        answers.drafted, answers.accepted = (sum(getattr(g, x) for g in done) for x in ("drafted", "accepted"))
        return answers

    def _requests(self, slide: Slide) -> list[Request]:
        embed = self._decoder.embed
        prefix = SlidePrefix("bench", embed(slide.prefix), POOLED_TOKENS, {})
        options = tuple(Option(str(i), (int(token),)) for i, token in enumerate(slide.options))
        return [
            Request(
                embed(question),
                GenerationSettings(max_new_tokens=max(1, wanted), stop=()),
                prefix,
                prompt_ids=tuple(question.tolist()),
                options=() if wanted else options,
            )
            for question, wanted in zip(slide.questions, slide.answers, strict=True)
        ]

    def _account(self, loop: Loop, sequences: list[Sequence], answers: Answers) -> None:
        """The most bytes held at once, and what the tokens held then need: a prefix once, and each sequence's own."""
        kvs = [s.kv for s in sequences if s.kv is not None]
        held = loop.store.nbytes + sum(kv.nbytes for kv in kvs)
        if not kvs or held <= (answers.kv_bytes or 0):
            return
        prefixes = {id(kv.prefix): kv.prefix.length for kv in kvs if kv.prefix is not None}
        own = sum(kv.length - (kv.prefix.length if kv.prefix is not None else 0) for kv in kvs)
        answers.kv_bytes = held
        answers.kv_needed_bytes = (sum(prefixes.values()) + own) * self.kv_bytes_per_token

    def _prefill_prefix(self, prefix: Ids) -> PrefixKV:
        kv = self._decoder.new_kv(len(prefix))
        self._decoder.prefill(kv, self._decoder.embed(prefix))
        return self._decoder.freeze(kv)


class Ours(Plain):
    """As users have it: with guessed tokens where the decoder is row-exact."""

    speculate = True


class Fast(Plain):
    """`--fast`: calls of many rows on 8-bit weights of their own, where the company decides the last bits; hence
    nothing is guessed."""

    def _open(self) -> Decoder:
        try:
            return self._bundle.decoder(fast=True)
        except InputError as e:
            raise CannotError(str(e)) from e

    @property
    def batch_weight_bytes(self) -> int:
        component = self._bundle.component("llm")
        c = LlamaConfig(**component.config)
        matrices = wide_bytes(c, component.compiled(self._bundle.target).precision)
        return matrices + 4 * sum(shape[0] for shape in c.tensors().values() if len(shape) == 1)


class Torch(Plain):
    """The torch decoder on the same weights, which it makes fp32 again at every use where they are integers."""

    note = "plain torch on the CPU: the base of a GPU target, not tuned"

    def _open(self) -> Decoder:
        from wsi_rt.runtime.llm.torch_decoder import TorchDecoder

        component = self._bundle.component("llm")
        if (size := read_bytes(component, self._bundle.target)) > SMALL_PARAMETERS:
            raise CannotError(f"small shapes only: {size / 1e9:.1f} GB are made fp32 again at every step")
        compiled = component.compiled(self._bundle.target)
        return TorchDecoder.open(self._bundle.root, component, compiled, self._bundle.threads)


def read_bytes(component: EngineManifest, target: str) -> int:
    """Of the weights in a step of one row: all of them but the embedding table, of which it reads a row."""
    c = LlamaConfig(**component.config)
    return weight_bytes(c, component.compiled(target).precision) - 4 * c.vocab * c.hidden
