"""What the bench asks of a provider. Token ids go in, logits come out; nothing is sampled but the largest logit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from wsi_rt.benchmarks.llm.cases import Slide

F32 = NDArray[np.float32]
Ids = NDArray[np.int64]

SMALL_PARAMETERS = 2e9  # what a provider that holds fp32 weights is given at most: 8 GB


class CannotError(Exception):
    """Something that a provider has no way to do: its row says so."""


@dataclass
class Answers:
    """How a slide's questions went. token_ids and first_seconds (from the start of the slide to the question's first
    token, or a closed question's choice) are by question. kv_bytes: the most keys and values held at once;
    kv_needed_bytes: what the tokens held then take, a shared one once. drafted, accepted: guessed tokens verified, and
    those of them that were right."""

    token_ids: list[list[int]] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    kv_bytes: int | None = None
    kv_needed_bytes: int | None = None
    drafted: int = 0
    accepted: int = 0


class Model(ABC):
    """A language model that was opened. Sequences are those of the last `prefill` or `shared`.

    weight_bytes: what a step of one sequence reads of the weights; batch_weight_bytes: a step of twenty.
    kv_bytes_per_token: of one token's keys and values. note: what is particular about it, for its rows.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    note: str = ""

    @property
    def batch_weight_bytes(self) -> int:
        return self.weight_bytes

    @abstractmethod
    def prefill(self, ids: Ids) -> F32:
        """One sequence from scratch: ids [T] -> logits [vocab] of the last one."""

    @abstractmethod
    def step(self, ids: Ids) -> F32:
        """One token more for each sequence: [B] -> logits [B, vocab]."""

    def shared(self, prefix: Ids, questions: tuple[Ids, ...]) -> F32:
        """Sequences that share their first tokens, computed once: -> logits [B, vocab]. Raises CannotError."""
        raise CannotError("does not decode a batch of sequences that share a prefix")

    def begin(self, prefix: Ids) -> None:
        """A new slide. Here its prefix is only remembered: computed again for every question."""
        self._prefix = prefix

    def ask(self, question: Ids) -> F32:
        """One question about that slide: logits [vocab] after it."""
        return self.prefill(np.concatenate([self._prefix, question]))

    def answer_slide(self, slide: Slide) -> Answers:
        """All questions of a slide, one after the other."""
        done, start = Answers(), perf_counter()
        self.begin(slide.prefix)
        for question, wanted in zip(slide.questions, slide.answers, strict=True):
            logits = self.ask(question)
            tokens = [choose(logits, slide.options, wanted)]
            done.first_seconds.append(perf_counter() - start)
            while len(tokens) < wanted:
                tokens.append(int(self.step(np.array(tokens[-1:]))[0].argmax()))
            done.token_ids.append(tokens)
        return done

    def teach(self, prompt: Ids, tokens: Ids) -> F32:
        """Given tokens after a prompt, one by one -> logits [S + 1, vocab]."""
        logits = [self.prefill(prompt)]
        logits += [self.step(tokens[i : i + 1])[0] for i in range(len(tokens))]
        return np.stack(logits)


def choose(logits: F32, options: Ids, wanted: int) -> int:
    """The next token of an open question; of a closed one (wanted 0) the likeliest option."""
    return int(logits.argmax()) if wanted else int(options[logits[options].argmax()])


def seconds_of(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start
