"""An open language model that answers questions about slides: many at a time, each slide's prefix computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.choices import Option, find_choices, make_options
from wsi_rt.runtime.llm.conversation import Conversation
from wsi_rt.runtime.llm.decoder import F32, Decoder
from wsi_rt.runtime.llm.generation import Generation
from wsi_rt.runtime.llm.grammar import Grammar
from wsi_rt.runtime.llm.loop import CancelSignal, Loop, drive
from wsi_rt.runtime.llm.prefix import SlidePrefix, slide_prefix
from wsi_rt.runtime.llm.prefix_disk import PrefixDisk
from wsi_rt.runtime.llm.prefix_store import PrefixStore
from wsi_rt.runtime.llm.prompt import text_after, text_before
from wsi_rt.runtime.llm.request import Parked, Request
from wsi_rt.runtime.llm.room import available_bytes
from wsi_rt.runtime.llm.scheduler import Limits
from wsi_rt.runtime.llm.tokenizer import Tokenizer

AUTO = ("auto",)  # choices: the options the question names, if it names any


@dataclass(frozen=True)
class Question:
    """One question. choices: options to score instead of generating, AUTO, or none; json_schema: JSON Schema as text
    that the answer follows."""

    text: str
    choices: tuple[str, ...] = ()
    json_schema: str | None = None

    def __post_init__(self) -> None:
        if self.choices and self.json_schema is not None:
            raise InputError("--choices and --json-schema are both given, expected one of them")


@dataclass(frozen=True)
class ModelSettings:
    """How the language model runs; what it answers does not depend on it, `prefix_dtype` and `fast` excepted.

    kv_bytes: of all keys and values (None: half of the memory that is free); prefixes: keeps them over restarts;
    prefix_dtype: "fp16" halves what they take on disk, and rounds keys and values; speculate: verify guessed tokens.
    fast: steps of many rows in 8 bits, where the bundle was built for it (Decoder.open); answers then depend on what
    else is asked at the same time.
    """

    kv_bytes: int | None = None
    prefixes: PrefixDisk | None = None
    prefix_dtype: str = "fp32"
    speculate: bool = True
    fast: bool = False


class LanguageModel:
    """Context manager; not thread-safe. Owns `decoder`."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        settings: ModelSettings | None = None,
        made_of: Mapping[str, Any] | None = None,
    ) -> None:
        """made_of: what tells this model from others (weights, precision, decoder), for prefixes on disk."""
        settings = settings or ModelSettings()
        self.decoder, self.tokenizer, self._made_of = decoder, tokenizer, dict(made_of or {})
        self.store = PrefixStore(decoder, settings.prefixes, dtype=settings.prefix_dtype)
        own = decoder.spec.kv_bytes  # memory that the decoder holds already
        kv_bytes = settings.kv_bytes if settings.kv_bytes is not None else own or available_bytes() // 2
        kv_bytes = kv_bytes if own is None else min(kv_bytes, own)
        self.loop = Loop(decoder, tokenizer, Limits(kv_bytes=kv_bytes), self.store, settings.speculate)

    def prefix(self, projected: F32, template: str) -> SlidePrefix:
        """projected: [576, hidden] f32, the slide's tokens. Nothing is computed but their embedding and digest."""
        before = (self.tokenizer.bos_id, *self.tokenizer.encode(text_before(template)))
        return slide_prefix(self.decoder, before, projected, {**self._made_of, "dtype": self.store.dtype})

    def ask(
        self,
        questions: Sequence[tuple[SlidePrefix, Question]],
        settings: GenerationSettings,
        on_text: Callable[[int, str], None] | None = None,
        cancel: CancelSignal | None = None,
    ) -> list[Generation]:
        """Answer questions about one slide or several together; each as if it were asked alone.

        Raises InputError (a question that is refused, or does not fit), WsiRtError.
        """
        requests = [
            self.request(prefix, q, self.tokenizer.encode(text_after(q.text)), settings) for prefix, q in questions
        ]
        return [Generation.of(s) for s in drive(self.loop, requests, on_text, cancel)]

    def converse(self, prefix: SlidePrefix) -> Conversation:
        """A conversation about a slide; close it when it is over."""
        return Conversation(self, prefix)

    def request(
        self,
        prefix: SlidePrefix,
        question: Question,
        token_ids: Sequence[int],
        settings: GenerationSettings,
        parked: Parked | None = None,
        keep_kv: bool = False,
    ) -> Request:
        """token_ids: all of the prompt after the prefix."""
        options, grammar = prepared(self.tokenizer, question)
        embeds = self.decoder.embed(np.array(token_ids, np.int64))
        return Request(
            embeds, settings, prefix, parked, keep_kv, prompt_ids=tuple(token_ids), options=options, grammar=grammar
        )

    def take_notes(self) -> tuple[str, ...]:
        """What a user should hear about stored prefixes."""
        return self.store.take_notes()

    def close(self) -> None:
        self.store.clear()
        self.decoder.close()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prepared(tokenizer: Tokenizer, question: Question) -> tuple[tuple[Option, ...], Grammar | None]:
    """The options to score (none: the question is open), and what its answer must follow. Raises InputError,
    MachineError."""
    labels = (find_choices(question.text) or ()) if question.choices == AUTO else question.choices
    if labels:
        return make_options(tokenizer, labels), None
    return (), _grammar(tokenizer, question.json_schema) if question.json_schema is not None else None


@lru_cache(maxsize=16)
def _grammar(tokenizer: Tokenizer, schema: str) -> Grammar:
    return Grammar(tokenizer, schema)
