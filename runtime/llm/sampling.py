"""From logits to the next token: transformers' logits processors in numpy, then a seeded draw (SPEC 5).

Order: repetition penalty, no-repeat n-gram, temperature, top-k, top-p. Greedy (temperature 0) uses the first two and
takes the lowest index among equal maxima. The penalties see generated tokens only, as in the reference, which
generates from embeddings. Each function works on float32 [vocab] and returns float32 [vocab].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import WsiRtError

Logits = NDArray[np.float32]


class Constraint(Protocol):
    """What an answer must follow, token by token (grammar.py)."""

    @property
    def complete(self) -> bool:
        """The answer so far may stand as it is."""

    def allowed(self, vocab_size: int) -> NDArray[np.bool_]:
        """[vocab]: which tokens may come next."""

    def accept(self, token: int) -> None: ...


def require_finite(logits: Logits, when: str) -> None:
    """WsiRtError: logits (any shape) that hold NaN or +inf. `when`: "at step 3"."""
    bad = np.isnan(logits) | np.isposinf(logits)
    if bad.any():
        raise WsiRtError(
            f"the language model returned {int(bad.sum())} NaN or infinite logits of {logits.size} {when}, "
            "expected finite numbers; check the engine with `wsi-rt verify` or build it with --precision llm=fp32"
        )


def _softmax(scores: Logits) -> Logits:
    """Softmax of [n] float32 scores with a finite maximum."""
    exps = np.exp(scores - scores.max())
    return exps / exps.sum()


def repetition_penalty(scores: Logits, generated: Sequence[int], penalty: float) -> Logits:
    """Divide positive scores of generated tokens by `penalty`, multiply negative ones; once per distinct token."""
    ids = np.unique(np.asarray(generated, dtype=np.int64))
    ids = ids[(ids >= 0) & (ids < scores.shape[0])]
    out = scores.copy()
    seen = scores[ids]
    factor = np.float32(penalty)
    out[ids] = np.where(seen < 0, seen * factor, seen / factor)
    return out


def ban_tokens(scores: Logits, banned: Sequence[int]) -> Logits:
    """-inf at each banned id (the no-repeat n-gram rule; see NgramIndex)."""
    ids = [i for i in banned if 0 <= i < scores.shape[0]]
    if not ids:
        return scores
    out = scores.copy()
    out[ids] = -np.inf
    return out


def temperature(scores: Logits, value: float) -> Logits:
    """scores / value."""
    return scores / np.float32(value)


def top_k(scores: Logits, k: int) -> Logits:
    """Keep the k highest; everything equal to the k-th stays too. k larger than the vocabulary keeps all."""
    k = min(k, scores.shape[0])
    kth = np.partition(scores, -k)[-k]
    return np.where(scores < kth, np.float32(-np.inf), scores)


def top_p(scores: Logits, p: float) -> Logits:
    """Keep the highest whose probabilities sum to p, at least one.

    As transformers does it: sorted ascending, removed while the cumulative probability is <= 1 - p. Which of several
    equal scores at the edge stay is left open there (torch.sort is not stable); here the lowest indices go first.
    """
    alive = np.flatnonzero(scores > -np.inf)  # the others carry probability 0 and are -inf already
    if alive.size == 0:
        return scores
    order = alive[np.argsort(scores[alive], kind="stable")]
    # torch accumulates a float32 cumsum in float64
    cumulative = np.cumsum(_softmax(scores[order]), dtype=np.float64).astype(np.float32)
    remove = cumulative <= np.float32(1 - p)
    remove[-1] = False
    out = scores.copy()
    out[order[remove]] = -np.inf
    return out


class NgramIndex:
    """Which tokens would repeat an n-gram of the tokens seen so far; one dictionary entry per token."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], list[int]] = {}

    def append(self, token: int) -> None:
        self._tokens.append(token)
        if len(self._tokens) >= self.size:
            ngram = self._tokens[len(self._tokens) - self.size :]
            self._next.setdefault(tuple(ngram[:-1]), []).append(ngram[-1])

    def banned(self) -> Sequence[int]:
        """Tokens that complete an n-gram already seen, given the last n - 1 tokens."""
        if len(self._tokens) < self.size:
            return ()
        return self._next.get(tuple(self._tokens[len(self._tokens) + 1 - self.size :]), ())


class Sampler:
    """Chooses one request's tokens; holds that request's history and nothing shared.

    The draw of step n is a uniform number from Philox with key (seed, stream) and counter n (n = tokens generated so
    far): it depends on nothing else in a batch, and replaying a request gives the same tokens. Reproducible within
    wsi-rt; it is not torch's stream. The token is found by inverting the cumulative distribution (float64, id order).
    """

    def __init__(self, settings: GenerationSettings, stream: int = 0, constraint: Constraint | None = None) -> None:
        """`stream` (0 <= stream < 2^64) tells apart requests that share a seed and should differ."""
        self.settings = settings
        self._constraint = constraint
        self.stream = stream
        self.generated: list[int] = []
        size = settings.no_repeat_ngram_size
        self._ngrams = NgramIndex(size) if size > 0 else None

    @property
    def complete(self) -> bool:
        """Nothing is missing from the answer by its constraint."""
        return self._constraint is None or self._constraint.complete

    def accept(self, token: int) -> None:
        """Add a token to the history the penalties see (sample() does it itself; this is for replay)."""
        if self._constraint is not None:
            self._constraint.accept(token)
        self.generated.append(token)
        if self._ngrams is not None:
            self._ngrams.append(token)

    def process(self, logits: Logits) -> Logits:
        """logits [vocab] -> scores [vocab] float32 after every processor that is on. Changes nothing."""
        cfg = self.settings
        scores = np.asarray(logits, dtype=np.float32)
        if self._constraint is not None:  # first or last, -inf is -inf: none of the processors raises it
            scores = np.where(self._constraint.allowed(scores.shape[0]), scores, np.float32(-np.inf))
        if cfg.repetition_penalty != 1.0:
            scores = repetition_penalty(scores, self.generated, cfg.repetition_penalty)
        if self._ngrams is not None:
            scores = ban_tokens(scores, self._ngrams.banned())
        if cfg.temperature > 0:
            if cfg.temperature != 1.0:
                scores = temperature(scores, cfg.temperature)
            if cfg.top_k > 0:
                scores = top_k(scores, cfg.top_k)
            if cfg.top_p < 1.0:
                scores = top_p(scores, cfg.top_p)
        return scores

    def sample(self, logits: Logits) -> int:
        """The next token for logits [vocab] float32; it joins the history.

        WsiRtError: logits that hold NaN or +inf, or no token left to choose.
        """
        step = len(self.generated)
        if logits.ndim != 1:
            raise ValueError(f"logits are {list(logits.shape)}, expected [vocab]")
        require_finite(logits, f"at step {step}")
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            scores = self.process(logits)
        best = scores.max()
        if best == -np.inf:
            either = " or do without --json-schema" if self._constraint is not None else ""
            raise WsiRtError(
                f"every token is excluded at step {step}, expected at least one; raise --no-repeat-ngram-size{either}"
            )
        if not np.isfinite(best):
            raise WsiRtError(
                f"the scores overflow at step {step} with temperature {self.settings.temperature} and repetition "
                f"penalty {self.settings.repetition_penalty}, expected finite numbers; use --temperature 0"
            )
        token = int(scores.argmax()) if self.settings.temperature == 0 else self._draw(scores, step)
        self.accept(token)
        return token

    def _draw(self, scores: Logits, step: int) -> int:
        """Invert the cumulative distribution of softmax(scores) at this step's uniform number."""
        key = np.array([self.settings.seed, self.stream], dtype=np.uint64)
        uniform = np.random.Generator(np.random.Philox(key=key, counter=step)).random()
        alive = np.flatnonzero(scores > -np.inf)
        shifted = scores[alive].astype(np.float64)
        cumulative = np.cumsum(np.exp(shifted - shifted.max()))
        place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        return int(alive[min(place, alive.size - 1)])
