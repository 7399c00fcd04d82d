"""The half of a pipeline after a slide is encoded: its tokens through the projector, and questions to the language
model."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.encode import Encoded
from wsi_rt.runtime.engines.base import Engine
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.conversation import Conversation
from wsi_rt.runtime.llm.generation import Generation
from wsi_rt.runtime.llm.language_model import LanguageModel, ModelSettings, Question, prepared
from wsi_rt.runtime.llm.loop import CancelSignal
from wsi_rt.runtime.llm.prefix import SlidePrefix, digest
from wsi_rt.runtime.llm.prompt import encode_prompt
from wsi_rt.runtime.llm.tokenizer import Tokenizer
from wsi_rt.runtime.timing import Stopwatch
from wsi_rt.runtime.types import POOLED_TOKENS, Answer

SLIDES = 8  # whose projected tokens are remembered: 10 MB each at 4,096 channels
OnText = Callable[[int, str], None]


class Asking:
    """Opens tokenizer and language model when first needed; `engine(name)` gives the bundle's others."""

    def __init__(self, bundle: Bundle, engine: Callable[[str], Engine], settings: ModelSettings | None = None) -> None:
        self.bundle, self._engine, self._settings = bundle, engine, settings
        self._tokenizer: Tokenizer | None = None
        self._model: LanguageModel | None = None
        self._prefixes: OrderedDict[tuple[str, str], SlidePrefix] = OrderedDict()

    @property
    def fast(self) -> bool:
        return self._settings is not None and self._settings.fast

    @property
    def facts(self) -> Mapping[str, str]:
        """The language model's, once it is open."""
        return self._model.decoder.facts if self._model is not None else {}

    def check(self, questions: Sequence[Question], settings: GenerationSettings, clock: Stopwatch) -> None:
        """Refuse what can be refused before a slide is read. Raises InputError, MachineError."""
        context = int(self.bundle.component("llm").config["context"])
        tokenizer = self.tokenizer(clock)
        for question in questions:
            prompt = encode_prompt(tokenizer, settings.template, question.text)
            total = prompt.text_tokens + POOLED_TOKENS
            if total >= context:
                raise InputError(
                    f"the question makes a prompt of {total} tokens ({len(prompt.after)} of the question, "
                    f"{POOLED_TOKENS} of the slide), expected fewer than the context of {context}; shorten the question"
                )
            prepared(tokenizer, question)

    def ask(
        self,
        encoded: Encoded,
        questions: Sequence[Question],
        settings: GenerationSettings,
        clock: Stopwatch,
        on_text: OnText | None = None,
        cancel: CancelSignal | None = None,
    ) -> list[Generation]:
        """Answer them together. `clock`: opening, projector."""
        prefix = self.prefix(encoded, settings.template, clock)
        return self.model(clock).ask([(prefix, q) for q in questions], settings, on_text, cancel)

    def converse(self, encoded: Encoded, template: str, clock: Stopwatch) -> Conversation:
        prefix = self.prefix(encoded, template, clock)
        return self.model(clock).converse(prefix)

    def prefix(self, encoded: Encoded, template: str, clock: Stopwatch) -> SlidePrefix:
        """What every question on this slide shares. Raises InputError when it was encoded without tokens."""
        if encoded.tokens is None:
            raise InputError("this input was encoded without slide tokens; encode it with tokens=True")
        key = (digest(encoded.tokens.tokens), template)
        if key not in self._prefixes:
            model, projector = self.model(clock), self._engine("projector")
            with clock.measure("projector"):
                projected = projector.run({"tokens": encoded.tokens.tokens})["embeds"]
            self._prefixes[key] = model.prefix(projected, template)
            while len(self._prefixes) > SLIDES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def tokenizer(self, clock: Stopwatch) -> Tokenizer:
        if self._tokenizer is None:
            with clock.measure("open"):
                self._tokenizer = self.bundle.tokenizer()
        return self._tokenizer

    def model(self, clock: Stopwatch) -> LanguageModel:
        if self._model is None:
            tokenizer = self.tokenizer(clock)
            with clock.measure("open"):
                decoder = self.bundle.decoder(self.fast)
                made_of = {**self._made_of(type(decoder)), **({"fast": "1"} if self.fast else {})}
                self._model = LanguageModel(decoder, tokenizer, self._settings, made_of)
        return self._model

    def take_notes(self) -> tuple[str, ...]:
        return self._model.take_notes() if self._model is not None else ()

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None
        self._prefixes.clear()

    def _made_of(self, decoder: type) -> dict[str, str]:
        """What a stored prefix depends on beside slide and text: its numbers are this build's, on this library."""
        llm, library = self.bundle.component("llm"), "torch" if "torch" in decoder.__module__ else "onnxruntime"
        return {
            "weights": llm.weights,
            "digest": llm.digest,
            "precision": llm.compiled(self.bundle.target).precision,
            "target": self.bundle.target,
            "decoder": decoder.__name__,
            "library": f"{library} {sys.modules[library].__version__}",
        }


@dataclass(frozen=True)
class Dialogue:
    """A conversation whose answers tell of the whole pipeline (Pipeline.converse)."""

    conversation: Conversation
    settings: GenerationSettings
    answer: Callable[[Generation], Answer]

    def ask(
        self,
        question: str | Question,
        *,
        on_text: Callable[[str], None] | None = None,
        cancel: CancelSignal | None = None,
    ) -> Answer:
        """The next turn. Raises InputError (a question that is refused, or does not fit), WsiRtError."""
        asked = question if isinstance(question, Question) else Question(question)
        return self.answer(self.conversation.ask(asked, self.settings, on_text, cancel))
