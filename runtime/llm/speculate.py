"""How many guessed tokens a step verifies, and which.

Verification is exact: a guessed token counts only when the sampler, at its place in the seeded stream, chooses the same
one. For a guess that is certain of itself this is speculative sampling (Leviathan et al. 2023: accept x with
probability min(1, p(x) / q(x)), here q(x) = 1, so p(x)), and it gives the very tokens that decoding one by one gives.

Cost model: a step of m rows costs c(m), as measured in this process, else interpolated along PRIOR. A guess holds with
a probability that depends on where it was found and how many tokens before it agree, as counted in this process, from
HOLDS on; one that stands behind others needs those to hold too, and then has more tokens that agree. A step takes the
guesses that maximise expected tokens / c(rows), which may be none. One guess in PROBE_EVERY tokens is tried all the
same, so that what has changed is noticed: that, and a few tens of rows until the counts tell, is what guessing in vain
costs.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Seq

from wsi_rt.runtime.llm.ngrams import LONGEST, SHORTEST, AnswerMemory, Guess, NgramText, Source
from wsi_rt.runtime.llm.phrases import phrase_text
from wsi_rt.runtime.llm.sequence import Sequence
from wsi_rt.runtime.llm.tokenizer import Tokenizer

MOST = 19  # guesses of one sequence: 20 rows are where 4 bit weights come near the peak (PRIOR)
PROBE_EVERY = 64  # tokens of a loop
# How often the next token was guessed right, by matching tokens from 2 to 8: over the 53,000 tokens of 600 gold answers
# of WSI-Bench on 399 slides, Llama's tokenizer. Counted as if seen PRIOR_WEIGHT times.
HOLDS: dict[Source, tuple[float, ...]] = {
    "own": (0.47, 0.52, 0.59, 0.62, 0.62, 0.62, 0.62),
    "earlier": (0.57, 0.62, 0.68, 0.68, 0.77, 0.77, 0.95),
    "phrase": (0.44, 0.44, 0.45, 0.65, 0.65, 0.70, 0.75),
}
PRIOR_WEIGHT, MEMORY = 8.0, 64.0  # older outcomes fade: at most so many count
# Rows -> cost relative to one row: a layer of 7 B in `int4` (MatMulNBits of 4 and 8 bits), two cores.
PRIOR = ((1, 1.0), (2, 1.05), (8, 2.3), (20, 4.8), (64, 15.0), (128, 28.0), (640, 142.0))


class StepCost:
    """ms of a step by its rows: measured where there was one, else PRIOR's shape through the nearest measurement."""

    def __init__(self) -> None:
        self._ms: dict[int, float] = {}

    def observe(self, rows: int, elapsed_ms: float) -> None:
        """The least seen lately: other work on the machine only ever adds."""
        seen = self._ms.get(rows)
        self._ms[rows] = elapsed_ms if seen is None else min(elapsed_ms, seen * 1.02)

    def __call__(self, rows: int) -> float:
        if rows in self._ms:
            return self._ms[rows]
        if not self._ms:
            return _prior(rows)
        near = min(self._ms, key=lambda m: (abs(m - rows), m))
        return self._ms[near] * _prior(rows) / _prior(near)


def _prior(rows: int) -> float:
    at = min(max(bisect_left(PRIOR, (rows, 0.0)), 1), len(PRIOR) - 1)
    (m0, c0), (m1, c1) = PRIOR[at - 1], PRIOR[at]
    return c0 + (c1 - c0) * (rows - m0) / (m1 - m0)


class Holds:
    """Probability that a guess is right, by its source and matching tokens."""

    def __init__(self) -> None:
        self._right = {source: [p * PRIOR_WEIGHT for p in row] for source, row in HOLDS.items()}
        self._seen = {source: [PRIOR_WEIGHT] * len(row) for source, row in HOLDS.items()}

    def __call__(self, source: Source, matched: int) -> float:
        at = min(matched, LONGEST) - SHORTEST
        return self._right[source][at] / self._seen[source][at]

    def observe(self, source: Source, matched: int, right: bool) -> None:
        at = min(matched, LONGEST) - SHORTEST
        fade = min(1.0, (MEMORY - 1) / self._seen[source][at])
        self._right[source][at] = self._right[source][at] * fade + right
        self._seen[source][at] = self._seen[source][at] * fade + 1


class Speculation:
    """Guesses for the sequences of one loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.cost, self.holds = StepCost(), Holds()
        self._answers = AnswerMemory()
        self._tokenizer = tokenizer
        self._phrases: NgramText | None = None
        self._taken: dict[Sequence, Guess] = {}
        self._until_probe = PROBE_EVERY

    def plan(self, decoding: Seq[Sequence], rows: int, room: int) -> dict[Sequence, tuple[int, ...]]:
        """Guesses for sequences that each feed one token in a step of `rows` rows so far, `room` more at most."""
        guesses: dict[Sequence, Guess] = {}
        for s in decoding:
            most = min(MOST, room, s.limit - len(s.token_ids) - 1)
            if most > 0 and (guess := self._guess(s, most)) is not None:
                guesses[s] = guess
        counts = self._worthwhile(guesses, rows, room)
        self._until_probe -= len(decoding)
        if not counts and guesses and self._until_probe <= 0:
            counts = {next(iter(guesses)): 1}
        if counts:
            self._until_probe = PROBE_EVERY
        self._taken = {s: guesses[s] for s in counts}
        return {s: guesses[s].token_ids[:n] for s, n in counts.items()}

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """What became of a sequence's guesses in the last step."""
        sequence.drafted += drafted
        sequence.accepted += accepted
        guess = self._taken.pop(sequence, None)
        if guess is not None:
            for i in range(min(drafted, accepted + 1)):
                self.holds.observe(guess.source, guess.matched + i, i < accepted)

    def remember(self, sequence: Sequence) -> None:
        """An answer that is complete: the next on the same slide may say the same."""
        if sequence.prefix is not None and sequence.token_ids and sequence.scorer is None:
            self._answers.add(sequence.prefix.key, [*sequence.text_seen.start, *sequence.token_ids])

    def _guess(self, sequence: Sequence, most: int) -> Guess | None:
        if self._phrases is None:
            self._phrases = phrase_text(self._tokenizer)
        others: dict[Source, NgramText] = {}
        if sequence.prefix is not None and (earlier := self._answers.of(sequence.prefix.key)) is not None:
            others["earlier"] = earlier
        return sequence.text_seen.guess({**others, "phrase": self._phrases}, most)

    def _worthwhile(self, guesses: dict[Sequence, Guess], rows: int, room: int) -> dict[Sequence, int]:
        """How many guesses of which sequence: the likeliest, as many as give the most expected tokens per ms, a row of
        a prompt being worth a token as well."""
        items = list(guesses.items())
        queue = [(-self.holds(g.source, g.matched), i, 1) for i, (_, g) in enumerate(items)]
        heapq.heapify(queue)
        order: list[int] = []
        expected, best, best_rate = float(rows), 0, rows / self.cost(rows)
        while queue and len(order) < room:
            chance, i, length = heapq.heappop(queue)
            guess = items[i][1]
            order.append(i)
            expected -= chance
            rate = expected / self.cost(rows + len(order))
            if rate > best_rate:
                best, best_rate = len(order), rate
            if length < len(guess.token_ids):
                heapq.heappush(queue, (chance * self.holds(guess.source, guess.matched + length), i, length + 1))
        return {items[i][0]: n for i, n in Counter(order[:best]).items()}
