"""What is measured: the cases, their work in tokens, and who does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import InputError

PREFILL, DECODE, BATCH, SLIDE, LOAD = "prefill-640", "decode-b1", "decode-b20", "slide-20q", "load"
LIMITED = (PREFILL, DECODE, BATCH)  # held against what the machine can do at most
CASES = (PREFILL, DECODE, BATCH, SLIDE, LOAD)

OURS, PLAIN, UNSHARED = "wsi-rt", "wsi-rt:unspeculated", "wsi-rt:unshared"
FAST, TORCH, LIMIT = "wsi-rt:fast", "wsi-rt:torch", "limit"
LLAMA_CPP, LLAMA_CPP_BATCHED = "llama-cpp-python", "llama-cpp-python:batched"
PEERS = (LLAMA_CPP, LLAMA_CPP_BATCHED, "onnxruntime-genai", "openvino", "transformers")
PROVIDERS = (OURS, FAST, PLAIN, UNSHARED, *PEERS, TORCH)
DEFAULT_PROVIDERS = PROVIDERS[:-1]  # the torch decoder is no way to answer on a CPU
# Where a provider would do what another one does already.
LEFT_OUT = dict.fromkeys((PLAIN, UNSHARED, LLAMA_CPP_BATCHED), (PREFILL, DECODE, BATCH, LOAD))

PROMPT = 640  # tokens: about a slide's prefix and a question
SLIDE_PREFIX = 611  # 35 of text and 576 of the slide (SPEC 5)
# Tokens of a slide's questions with " ASSISTANT:": closed ones carry their options.
OPEN = (18, 22, 25, 19, 31, 27, 16, 24, 35, 21, 29, 23)
CLOSED = (58, 44, 63, 21, 52, 71, 24, 49)
OPTIONS = 4  # of a closed question: A to D
ANSWER = 64  # new tokens of an open question
GATE_PROMPT, GATE_STEPS = 48, 8


@dataclass(frozen=True)
class Work:
    """How much of it: `--quick` measures the same shapes for less long."""

    prefills: int
    warm_steps: int
    steps: int
    batch_steps: int
    answer: int
    rounds: int

    @classmethod
    def of(cls, quick: bool) -> Work:
        if quick:
            return cls(prefills=2, warm_steps=2, steps=16, batch_steps=8, answer=8, rounds=1)
        return cls(prefills=3, warm_steps=4, steps=64, batch_steps=32, answer=ANSWER, rounds=2)


@dataclass(frozen=True)
class Slide:
    """One slide's questions as token ids. answers: how many tokens are wanted of each, 0 for a closed one."""

    prefix: NDArray[np.int64]
    questions: tuple[NDArray[np.int64], ...]
    answers: tuple[int, ...]
    options: NDArray[np.int64]  # tokens that stand for the options of closed questions

    @property
    def new_tokens(self) -> int:
        return sum(self.answers)


def token_ids(name: str, count: int, vocab: int) -> NDArray[np.int64]:
    """[count] ids that every provider gets; not those of BOS, EOS and unknown (0 to 2)."""
    from wsi_rt.export.sources.synthetic import uniform

    return uniform(0, f"bench.{name}", count, 3, vocab).astype(np.int64)


def slide(vocab: int, answer: int) -> Slide:
    """The twenty questions, open and closed ones mixed as a benchmark's file has them."""
    lengths = [(n, answer) for n in OPEN] + [(n, 0) for n in CLOSED]
    order = [(7 * i) % len(lengths) for i in range(len(lengths))]  # 7 and 20 have no common divisor
    questions = tuple(token_ids(f"question.{i}", lengths[i][0], vocab) for i in order)
    return Slide(
        prefix=token_ids("prefix", SLIDE_PREFIX, vocab),
        questions=questions,
        answers=tuple(lengths[i][1] for i in order),
        options=token_ids("options", OPTIONS, vocab),
    )


def sequences(what: str, provider: str) -> int:
    """How many are held at once at most."""
    return 20 if what == BATCH or (what, provider) == (SLIDE, LLAMA_CPP_BATCHED) else 1


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The cases of these names, all for none. Raises InputError on another name."""
    if unknown := [n for n in names if n not in CASES]:
        raise InputError(f"--case {', '.join(unknown)} is unknown, expected some of: {', '.join(CASES)}")
    return tuple(c for c in CASES if not names or c in names)


def chosen_providers(names: Sequence[str]) -> tuple[str, ...]:
    """The providers of these names, DEFAULT_PROVIDERS for none. Raises InputError on another name."""
    if unknown := [n for n in names if n not in PROVIDERS]:
        raise InputError(f"--provider {', '.join(unknown)} is unknown, expected some of: {', '.join(PROVIDERS)}")
    return tuple(p for p in PROVIDERS if p in (names or DEFAULT_PROVIDERS))
