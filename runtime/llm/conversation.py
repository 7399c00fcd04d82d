"""Several turns about one slide: each goes on from the keys and values of those before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.llm.generation import Generation
from wsi_rt.runtime.llm.loop import CancelSignal, drive
from wsi_rt.runtime.llm.prefix import SlidePrefix
from wsi_rt.runtime.llm.prompt import text_after, text_next_turn
from wsi_rt.runtime.llm.request import Parked
from wsi_rt.runtime.llm.sequence import Sequence

if TYPE_CHECKING:
    from wsi_rt.runtime.llm.language_model import LanguageModel, Question


class Conversation:
    """Context manager. A turn's prompt is everything said before it, an answer cut at a stop string without what was
    cut; it gives what a fresh prompt of these tokens gives. The loop may take the keys and values away for others; the
    next turn then computes them again.

    token_ids: all after the prefix, every answer ended by EOS.
    """

    def __init__(self, model: LanguageModel, prefix: SlidePrefix) -> None:
        self.token_ids: tuple[int, ...] = ()
        self._model, self._prefix = model, prefix
        self._parked: Parked | None = None

    def ask(
        self,
        question: Question,
        settings: GenerationSettings,
        on_text: Callable[[str], None] | None = None,
        cancel: CancelSignal | None = None,
    ) -> Generation:
        """The next turn. Raises as LanguageModel.ask; what was said so far then stands."""
        text = text_next_turn(question.text) if self.token_ids else text_after(question.text)
        prompt = (*self.token_ids, *self._model.tokenizer.encode(text))
        request = self._model.request(self._prefix, question, prompt, settings, self._parked, keep_kv=True)
        heard = None if on_text is None else lambda _, piece: on_text(piece)
        (sequence,) = drive(self._model.loop, [request], heard, cancel)
        generation = Generation.of(sequence)
        self.token_ids = (*prompt, *self._said(generation))
        self._parked = sequence.parked
        self._rewind(sequence)
        return generation

    def close(self) -> None:
        """Its keys and values go."""
        if self._parked is not None:
            self._model.loop.forget(self._parked)
        self._parked = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _said(self, generation: Generation) -> tuple[int, ...]:
        """The answer's tokens as the next turn sees them, EOS at the end."""
        tokenizer, ids = self._model.tokenizer, list(generation.token_ids)
        if generation.stop_reason == "stop_string":
            while ids and len(tokenizer.decode(ids)) > len(generation.text):
                ids.pop()
            if tokenizer.decode(ids) != generation.text:  # a token reaches over the cut
                ids = tokenizer.encode(generation.text)
        return tuple(ids) if ids and ids[-1] in tokenizer.eos_ids else (*ids, tokenizer.eos_ids[0])

    def _rewind(self, sequence: Sequence) -> None:
        """Keep the keys and values of those tokens that the next turn has as well."""
        if self._parked is None or self._parked.kv is None:
            return
        fed = self._parked.kv.length - self._prefix.length
        held = (*sequence.request.prompt_ids, *sequence.token_ids)[:fed]
        same = next((i for i, (a, b) in enumerate(zip(held, self.token_ids, strict=False)) if a != b), len(held))
        self._parked.kv.rewind(self._prefix.length + min(same, len(self.token_ids)))
