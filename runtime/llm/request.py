"""What the loop is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.decoder import KV, DecoderSpec
from wsi_rt.runtime.llm.prefix import SlidePrefix

if TYPE_CHECKING:
    from wsi_rt.runtime.llm.choices import Option
    from wsi_rt.runtime.llm.grammar import Grammar

StopReason = Literal["eos", "length", "stop_string", "cancelled", "choice"]


@dataclass(eq=False)
class Parked:
    """Keys and values of a conversation between two turns; the loop may take them away when it needs the room, and
    the next turn then computes them again."""

    prefix: SlidePrefix | None
    kv: KV | None


@dataclass(frozen=True)
class Request:
    """One question, ready for the language model.

    embeds: [T, hidden] f32, the prompt's tokens after `prefix`; T >= 1.
    prefix: what comes before them, shared with others.
    parked: keys and values of the first of these tokens, where an earlier turn left some; used up.
    keep_kv: leave them behind for a next turn (Sequence.parked).
    stream: tells apart requests with the same seed that should sample differently (Sampler).
    prompt_ids: the prompt's text, where speculation looks for what the answer may repeat.
    options: score these instead of generating. grammar: what the answer must follow.
    cancel: asked before every token; True ends the request with the text so far.
    on_text: gets each new non-empty piece of text at once, where a step's events may tell of several tokens together.
    """

    embeds: NDArray[np.float32]
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    prefix: SlidePrefix | None = None
    parked: Parked | None = None
    keep_kv: bool = False
    stream: int = 0
    prompt_ids: tuple[int, ...] = ()
    options: tuple[Option, ...] = ()
    grammar: Grammar | None = None
    cancel: Callable[[], bool] | None = None
    on_text: Callable[[str], None] | None = None

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else self.prefix.length

    @property
    def prompt_length(self) -> int:
        return self.prefix_length + int(self.embeds.shape[0])


def answer_room(request: Request, spec: DecoderSpec, kv_bytes: int | None = None) -> int:
    """How many tokens may be generated: what fits the context and `kv_bytes`, at most settings.max_new_tokens.

    InputError: a prompt that leaves no room for an answer, or one with nothing to prefill.
    """
    if request.embeds.ndim != 2 or request.embeds.shape[1] != spec.hidden_size or request.embeds.shape[0] < 1:
        raise InputError(
            f"the prompt embeddings are {list(request.embeds.shape)}, expected [T >= 1, {spec.hidden_size}]"
        )
    prompt = request.prompt_length
    slide = request.prefix.slide_tokens if request.prefix is not None else 0
    tail = max((len(o.token_ids) for o in request.options), default=1)  # the last one is never fed
    if prompt + tail > spec.context_length:
        raise InputError(
            f"the prompt has {prompt} tokens ({prompt - slide} of text, {slide} of the slide), expected "
            f"{spec.context_length - tail} or fewer with the context of {spec.context_length}; shorten the question"
        )
    room = spec.context_length - prompt
    if kv_bytes is not None:
        held = kv_bytes // spec.kv_bytes_per_token
        if prompt + tail - 1 > held:
            raise InputError(
                f"the prompt of {prompt} tokens needs {(prompt + tail - 1) * spec.kv_bytes_per_token} bytes of keys "
                f"and values, {kv_bytes} are allowed; raise --kv-bytes"
            )
        room = min(room, held - prompt + 1)
    return min(request.settings.max_new_tokens, room)
