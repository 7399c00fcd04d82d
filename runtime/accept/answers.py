"""Our language model walked along a reference's answer: where it would say something else, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.accept.spelling import Spelling, Vocabulary
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.prefix import SlidePrefix, prefill_prefix
from wsi_rt.runtime.llm.prompt import encode_prompt
from wsi_rt.runtime.llm.sampling import Sampler

# same: all of the reference's text. other: another text. longer: ours goes on where the reference ends. shorter: ours
# ends first. cut: our max_new_tokens end it. untrimmed: ours ends at a turn marker, the reference goes on.
Kind = Literal["same", "other", "longer", "shorter", "cut", "untrimmed"]
FP16_STEPS = 2  # the published scripts compute logits in fp16: two candidates this many steps apart may swap


@dataclass(frozen=True)
class Trial:
    """Generate with `settings` (greedily) and compare with `reference`. noise: how far apart, in logits, two
    candidates may be and still swap by our own engine's rounding."""

    settings: GenerationSettings
    reference: str
    noise: float = 0.0


@dataclass(frozen=True)
class Walk:
    """One answer. tokens: how many agree (a tie, where the reference's token was taken, counts as agreeing).

    ties: (index, margin) of tokens where ours is the other of two candidates that rounding decides between.
    margin: of the first token that really differs: our logit for our token minus that for the reference's best
    token; infinite when no token would do. retokenised: the reference's text, tokenised, is our tokens. said: how many
    tokens say all of the reference, white space after it not counted; None: none do.
    """

    kind: Kind
    tokens: int
    ties: tuple[tuple[int, float], ...] = ()
    margin: float | None = None
    retokenised: bool = False
    said: int | None = None

    @property
    def same(self) -> bool:
        return self.kind == "same"

    @property
    def first_difference(self) -> int | None:
        """Index of the first token that differs, a tie included."""
        if self.ties:
            return self.ties[0][0]
        return None if self.same else self.tokens


@dataclass(frozen=True)
class Surprise:
    """A reference's tokens under sampling: nats they cost, what sampled ones cost on average, and its deviation."""

    nats: float
    expected: float
    deviation: float

    @property
    def plausible(self) -> bool:
        """No dearer than sampled answers are: within three deviations, and e^3 for the short ones."""
        return self.nats <= self.expected + 3 * self.deviation + 3


class Answerer:
    """Answers about one slide; its prefix is computed once per template. Context manager; not thread-safe."""

    def __init__(self, bundle: Bundle, tokens: NDArray[np.float32]) -> None:
        """tokens: [576, C] as the projector takes them. Raises InputError (no llm or projector in the bundle)."""
        bundle.component("llm")
        with bundle.engine("projector") as projector:
            self._projected = projector.run({"tokens": tokens})["embeds"]
        self.tokenizer = bundle.tokenizer()
        self.vocabulary = Vocabulary(self.tokenizer)
        self.decoder = bundle.decoder()
        self._prefix: SlidePrefix | None = None

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *_: object) -> None:
        self._prefix = None
        self.decoder.close()

    def walk(self, question: str, trial: Trial) -> Walk:
        """Greedy, token by token, until it ends or differs by more than rounding.

        Raises InputError (a question that does not fit, or is refused), WsiRtError (logits that are not finite).
        """
        run = _Run(self, question, trial.settings)
        spelling = Spelling(self.vocabulary, trial.reference, trial.settings.stop)
        ties: list[tuple[int, float]] = []
        said = 0 if spelling.complete else None

        def end(kind: Kind, margin: float | None = None) -> Walk:
            return Walk(kind, len(run.ids), tuple(ties), margin, self._retokenised(run.ids, trial.reference), said)

        while len(run.ids) < run.limit:
            scores = run.scores()
            token = int(scores.argmax())
            if not spelling.allows(token):
                allowed = spelling.candidates()
                best = int(allowed[scores[allowed].argmax()]) if allowed.size else -1
                margin = float(scores[token] - scores[best]) if best >= 0 else float("inf")
                if not margin <= max(trial.noise, fp16_noise(float(scores[token]))):
                    ours_ends = token in self.vocabulary.eos
                    return end("longer" if spelling.complete else "shorter" if ours_ends else "other", margin)
                ties.append((len(run.ids), margin))
                token = best
            run.take(token)
            if token in self.vocabulary.eos:
                return end("same")
            spelling.push(token)
            said = len(run.ids) if said is None and spelling.complete else said
            if spelling.stopped:
                return end("untrimmed" if spelling.trimmed else "same")
        return end("same" if spelling.complete else "cut")

    def surprise(self, question: str, trial: Trial) -> Surprise | None:
        """How the reference fares as an answer sampled with `trial.settings`; None when it cannot be told: it leaves
        the tokens that could be drawn, or has no spelling. Each token is the likeliest that spells it."""
        run = _Run(self, question, trial.settings)
        spelling = Spelling(self.vocabulary, trial.reference, ())
        nats = expected = variance = 0.0
        while len(run.ids) < run.limit and not spelling.complete:
            scores = run.scores().astype(np.float64)
            logp = scores - scores.max()
            logp -= np.log(np.exp(logp).sum())
            alive = np.isfinite(logp)
            entropy = -float((np.exp(logp[alive]) * logp[alive]).sum())
            allowed = spelling.candidates()
            token = int(allowed[logp[allowed].argmax()]) if allowed.size else -1
            if token < 0 or not alive[token]:
                return None
            nats -= float(logp[token])
            expected += entropy
            variance += float((np.exp(logp[alive]) * logp[alive] ** 2).sum()) - entropy**2
            run.take(token)
            spelling.push(token)
        return Surprise(nats, expected, max(variance, 0.0) ** 0.5)

    def _retokenised(self, ids: list[int], reference: str) -> bool:
        said = [i for i in ids if i not in self.vocabulary.eos]
        return self.tokenizer.encode(reference.strip()) == said

    def begin(self, question: str, settings: GenerationSettings) -> tuple[SlidePrefix, NDArray[np.float32], int]:
        """Prefill a question after the shared prefix -> (prefix, logits [vocab], tokens that may be generated)."""
        prompt = encode_prompt(self.tokenizer, settings.template, question)
        context, fixed = self.decoder.spec.context_length, len(prompt.before) + len(self._projected)
        room = context - fixed - len(prompt.after)
        if room < 1:
            raise InputError(f"a question of {len(prompt.after)} tokens does not fit the context of {context}")
        needed = min(context, fixed + len(prompt.after) + settings.max_new_tokens)
        key, prefix = settings.template, self._prefix
        if prefix is None or prefix.key != key or prefix.kv.capacity < needed:
            self._prefix = None  # free its KV before the next one is made
            spare = min(context, needed + len(prompt.after))  # a longer question can follow
            prefix = self._prefix = prefill_prefix(self.decoder, prompt.before, self._projected, spare, key)
        prefix.kv.rewind(prefix.length)
        logits = self.decoder.prefill(prefix.kv, self.decoder.embed(np.array(prompt.after, np.int64)))
        return prefix, logits, min(room, settings.max_new_tokens)


class _Run:
    """One answer under way: scores of the next token, and taking one."""

    def __init__(self, answerer: Answerer, question: str, settings: GenerationSettings) -> None:
        self._decoder, self._sampler = answerer.decoder, Sampler(settings)
        prefix, self._logits, self.limit = answerer.begin(question, settings)
        self._kv, self._pending = prefix.kv, False
        self.ids: list[int] = []

    def scores(self) -> NDArray[np.float32]:
        """[vocab] f32 after penalties and, when sampling, temperature and filters. Before the first token too."""
        if self._pending:
            self._logits = self._decoder.step([self._kv], np.array(self.ids[-1:], np.int64))[0]
            self._pending = False
        if not np.isfinite(self._logits).all():
            raise WsiRtError(
                f"the language model returned logits that are not finite at step {len(self.ids)}; "
                "check the engine with `wsi-rt verify` or build it with --precision llm=fp32"
            )
        return self._sampler.process(self._logits)

    def take(self, token: int) -> None:
        self.ids.append(token)
        self._sampler.accept(token)
        self._pending = True


def fp16_noise(logit: float) -> float:
    """Two logits this close may come out either way where the reference computed in fp16."""
    return FP16_STEPS * float(np.spacing(np.float16(min(abs(logit), 6e4))))
