"""Requests, the state of a running one, and who runs next.

The loop is three verbs: Scheduler.schedule() -> Loop.run(batch) -> Loop.postprocess(batch, logits). Today one sequence
runs at a time, first come first served; `max_running` > 1 admits more, and a decode batch then holds them all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.decoder import KV, DecoderSpec
from wsi_rt.runtime.llm.sampling import Sampler
from wsi_rt.runtime.llm.stream import TextStream
from wsi_rt.runtime.llm.tokenizer import Tokenizer

StopReason = Literal["eos", "length", "stop_string", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One question, ready for the language model.

    embeds: [T, hidden] f32, the prompt tokens that are not in `kv` yet; T >= 1.
    kv: where to append them. With kv.length > 0 it already holds a prefix (the slide, or a conversation). None: the
        loop makes one. A given kv is left holding prompt and answer: its owner rewinds it before the next use.
    stream: tells apart requests with the same seed that should sample differently (Sampler).
    slide_tokens: how many of the prompt's tokens come from the slide; only error messages use it.
    cancel: asked before every step; True ends the request with the text so far.
    """

    embeds: NDArray[np.float32]
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    kv: KV | None = None
    stream: int = 0
    slide_tokens: int = 0
    cancel: Callable[[], bool] | None = None

    @property
    def prefix_length(self) -> int:
        """Prompt tokens whose keys and values are there already."""
        return 0 if self.kv is None else self.kv.length

    @property
    def prompt_length(self) -> int:
        return self.prefix_length + int(self.embeds.shape[0])


def answer_room(request: Request, spec: DecoderSpec) -> int:
    """How many tokens may be generated: what fits, at most settings.max_new_tokens.

    InputError: a prompt that leaves no room for an answer, or one with nothing left to prefill.
    """
    if request.embeds.ndim != 2 or request.embeds.shape[1] != spec.hidden_size or request.embeds.shape[0] < 1:
        raise InputError(
            f"the prompt embeddings are {list(request.embeds.shape)}, expected [T >= 1, {spec.hidden_size}]"
        )
    prompt, slide = request.prompt_length, request.slide_tokens
    context, what = spec.context_length, "context"
    if request.kv is not None and request.kv.capacity < context:
        context, what = request.kv.capacity, "KV capacity"
    if prompt >= context:
        raise InputError(
            f"the prompt has {prompt} tokens ({prompt - slide} of text, {slide} of the slide), "
            f"expected fewer than the {what} of {context}; shorten the question"
        )
    return min(request.settings.max_new_tokens, context - prompt)


@dataclass(eq=False)
class Sequence:
    """A request while it waits and runs. `limit` is how many tokens it may generate (answer_room); `kv` is made when
    it is admitted, unless the request brought one."""

    request: Request
    kv: KV | None
    limit: int
    sampler: Sampler
    text: TextStream
    prompt_length: int
    token_ids: list[int] = field(default_factory=list)
    prefilled: bool = False
    stop_reason: StopReason | None = None
    error: Exception | None = None
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    @classmethod
    def start(cls, request: Request, limit: int, tokenizer: Tokenizer) -> Sequence:
        return cls(
            request=request,
            kv=request.kv,
            limit=limit,
            sampler=Sampler(request.settings, request.stream),
            text=TextStream(tokenizer, request.settings.stop),
            prompt_length=request.prompt_length,
        )

    @property
    def admitted_kv(self) -> KV:
        """The KV of a sequence that runs. RuntimeError while it waits."""
        if self.kv is None:
            raise RuntimeError("the sequence has not been admitted: it has no KV yet")
        return self.kv

    @property
    def done(self) -> bool:
        return self.stop_reason is not None or self.error is not None

    @property
    def cancel_requested(self) -> bool:
        return self.request.cancel is not None and self.request.cancel()

    def add_ms(self, kind: str, elapsed_ms: float) -> None:
        """Count wall time as this request saw it: a batch's time counts in full for each of its sequences."""
        if kind == "prefill":
            self.prefill_ms += elapsed_ms
        else:
            self.decode_ms += elapsed_ms

    def notes(self) -> tuple[str, ...]:
        """What the caller should be told about a finished sequence."""
        asked = self.request.settings.max_new_tokens
        if self.stop_reason == "length" and self.limit < asked:
            return (
                f"the answer was cut after {self.limit} tokens instead of {asked}: "
                f"with {self.prompt_length} prompt tokens no more fit",
            )
        return ()


@dataclass(frozen=True)
class Batch:
    """What one run() computes. A prefill batch holds one sequence (Decoder.prefill takes one)."""

    kind: Literal["prefill", "decode"]
    sequences: tuple[Sequence, ...]


class Scheduler:
    """First come first served; a waiting request is prefilled as soon as there is a place for it."""

    def __init__(self, max_running: int = 1) -> None:
        if max_running < 1:
            raise ValueError(f"max_running is {max_running}, expected 1 or more")
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Every sequence that has not ended, running ones first."""
        return (*self.running, *self.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """The next batch; None when there is nothing to do. A prefilled sequence counts as running."""
        if self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            return Batch("prefill", (sequence,))
        if self.running:
            return Batch("decode", tuple(self.running))
        return None

    def cancelled(self) -> list[Sequence]:
        """Sequences, waiting or running, whose caller asked to stop."""
        return [s for s in self.sequences if s.cancel_requested]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; no error when it is not there."""
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
