"""Closed questions: the options' likelihoods as answers, with no decoding; and which options a question names (SPEC 7).

An option's score is log P(its tokens | prompt), the sum over its tokens, by the model's raw distribution (no
temperature, no penalties); probabilities are the softmax over the options, so they say how the options compare and not
how likely the model is to say any of them. Where one option's tokens begin another's ("Grade I", "Grade II"), the end
of the answer is scored with each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.llm.decoder import F32
from wsi_rt.runtime.llm.sampling import require_finite
from wsi_rt.runtime.llm.tokenizer import Tokenizer

YES_NO = ("Yes", "No")
MAX_OPTIONS, MAX_OPTION_TOKENS = 26, 32
# "A) ", "(b) ", "C. ", "D: " at the beginning or after white space or punctuation; a letter alone.
_MARK = re.compile(r"(?:^|(?<=[\s,;?.:!/|(]))\(?([A-Za-z])[).:](?=\s|$|[^\s.])")
_ASKING = "is are was were does do did has have had can could will would should may might"
_YES_NO_FIRST = frozenset(_ASKING.split(" "))
_YES_NO_LIST = re.compile(r"\(?\s*\b(yes\s*(?:/|or|,)\s*no|true\s*(?:/|or|,)\s*false)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Option:
    """label: how the answer calls it; token_ids: as they follow "ASSISTANT:"."""

    label: str
    token_ids: tuple[int, ...]


def make_options(tokenizer: Tokenizer, labels: Sequence[str]) -> tuple[Option, ...]:
    """Raises InputError: fewer than two, two alike, empty or very long ones."""
    labels = [_spelled(label.strip()) for label in labels]
    if not 2 <= len(labels) <= MAX_OPTIONS or len(set(labels)) < len(labels) or not all(labels):
        raise InputError(
            f"--choices are {', '.join(labels) or 'none'}, expected 2 to {MAX_OPTIONS} different ones such as A,B,C,D"
        )
    lead = "" if tokenizer.dummy_prefix else " "  # the space after "ASSISTANT:"
    ids = [tuple(tokenizer.encode(lead + label)) for label in labels]
    long = [label for label, x in zip(labels, ids, strict=True) if len(x) > MAX_OPTION_TOKENS]
    if long:
        raise InputError(f"--choices has {long[0]!r}, expected {MAX_OPTION_TOKENS} tokens or fewer; use letters")
    if any(a != b and b[: len(a)] == a for a in ids for b in ids):
        ids = [(*x, tokenizer.eos_ids[0]) for x in ids]
    return tuple(Option(label, x) for label, x in zip(labels, ids, strict=True))


def _spelled(label: str) -> str:
    """Yes/No and True/False as models spell them, however they were typed."""
    return label.capitalize() if label.lower() in ("yes", "no", "true", "false") else label


def find_choices(question: str) -> tuple[str, ...] | None:
    """The options a question names: the letters of `A) ... B) ...` in order, or Yes/No (SPEC 7); None: it is open.

    Letters must run on from A without a gap and number at least two; "is the prognosis poor?", a last sentence that
    begins with an auxiliary verb and offers no alternative, asks for Yes or No; "can you state ..." does not.
    """
    run: list[str] = []
    for match in _MARK.finditer(question):
        if match.group(1).upper() == chr(ord("A") + len(run)):
            run.append(match.group(1).upper())
    if len(run) >= 2:
        return tuple(run)
    named = list(_YES_NO_LIST.finditer(question))
    if named:
        return YES_NO if named[-1].group(1).lower().startswith("yes") else ("True", "False")
    clause = re.split(r"[,;:.!?\n]\s+", question.strip().rstrip("?").strip())[-1].split()
    words = [w.lower().strip(",") for w in clause]
    asks = question.strip().endswith("?") and bool(words) and words[0] in _YES_NO_FIRST
    return YES_NO if asks and "or" not in words and words[1:2] != ["you"] else None


@dataclass
class OptionScorer:
    """Collects the options' scores from logits: first those of the prompt's last position, which has every option's
    first token, then one option at a time for the rest of its tokens."""

    options: tuple[Option, ...]
    _first: NDArray[np.float64] | None = None
    _scores: dict[int, float] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return len(self._scores) == len(self.options)

    @property
    def longest_tail(self) -> int:
        return max(len(o.token_ids) for o in self.options) - 1

    def tail(self) -> tuple[int, ...]:
        """Tokens to feed after the prompt: all but the last of an option of several that has no score yet."""
        at = self._next()
        return self.options[at].token_ids[:-1] if at is not None else ()

    def take(self, logits: F32, prompt_ends: bool) -> None:
        """logits [k, vocab] f32 of the prompt's last position, if `prompt_ends`, then of the tail's. WsiRtError: not
        finite."""
        require_finite(logits, "while scoring options")
        at, rows = self._next(), list(logits)
        if prompt_ends:
            self._first = log_softmax(rows.pop(0))
            for i, option in enumerate(self.options):
                if len(option.token_ids) == 1:
                    self._scores[i] = float(self._first[option.token_ids[0]])
        if at is not None and rows and self._first is not None:
            first, *rest = self.options[at].token_ids
            later = [log_softmax(row)[token] for row, token in zip(rows, rest, strict=True)]
            self._scores[at] = float(self._first[first] + np.sum(later))

    def probabilities(self) -> dict[str, float]:
        """By label, in the given order."""
        scores = np.array([self._scores[i] for i in range(len(self.options))])
        weights = np.exp(scores - scores.max())
        return {o.label: float(w) for o, w in zip(self.options, weights / weights.sum(), strict=True)}

    def best(self) -> Option:
        """Of equals, the first."""
        return self.options[max(range(len(self.options)), key=lambda i: (self._scores[i], -i))]

    def _next(self) -> int | None:
        return next((i for i, o in enumerate(self.options) if i not in self._scores and len(o.token_ids) > 1), None)


def log_softmax(row: F32) -> NDArray[np.float64]:
    """[vocab] f32 -> f64, so that 32,000 small terms do not get lost."""
    x = row.astype(np.float64)
    x -= x.max()
    return x - np.log(np.exp(x).sum())
