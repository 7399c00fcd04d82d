"""Our language model walked along a reference's answer: where it would say something else, and by how much.

Answers files hold text, and one text has many token sequences: a token is allowed when its bytes go on along the text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import KV, Chunk, PrefixKV
from wsi_rt.runtime.llm.prefix import slide_prefix
from wsi_rt.runtime.llm.prompt import encode_prompt
from wsi_rt.runtime.llm.sampling import Sampler
from wsi_rt.runtime.llm.tokenizer import Tokenizer

# same: all of the reference's text. other: another text. longer: ours goes on where the reference ends. shorter: ours
# ends first. cut: our max_new_tokens end it. untrimmed: ours ends at a turn marker, the reference goes on.
Kind = Literal["same", "other", "longer", "shorter", "cut", "untrimmed"]
_BLANK = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"  # what str.strip takes off, of one byte; bytes.strip keeps the last four
_UNDECODABLE = "\ufffd".encode()  # in text, where the model gave a byte that belongs to no character
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
    token; infinite when no token would do. said: how many tokens say all of the reference, white space after it not
    counted; None: none do.
    """

    kind: Kind
    tokens: int
    ties: tuple[tuple[int, float], ...] = ()
    margin: float | None = None
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
        self._prefixes: dict[str, PrefixKV] = {}  # by template

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *_: object) -> None:
        self._prefixes.clear()
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
            return Walk(kind, len(run.ids), tuple(ties), margin, said)

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

    def begin(self, question: str, settings: GenerationSettings) -> tuple[KV, NDArray[np.float32], int]:
        """Prefill a question after the shared prefix -> (KV, logits [vocab], tokens that may be generated)."""
        prompt = encode_prompt(self.tokenizer, settings.template, question)
        context, fixed = self.decoder.spec.context_length, len(prompt.before) + len(self._projected)
        room = context - fixed - len(prompt.after)
        if room < 1:
            raise InputError(f"a question of {len(prompt.after)} tokens does not fit the context of {context}")
        if settings.template not in self._prefixes:
            shared = slide_prefix(self.decoder, prompt.before, self._projected)
            kv = self.decoder.new_kv(shared.length)
            self.decoder.extend([Chunk(kv, shared.embeds, logits=0)])
            self._prefixes[settings.template] = self.decoder.freeze(kv)
        limit = min(room, settings.max_new_tokens)
        kv = self.decoder.new_kv(fixed + len(prompt.after) + limit, self._prefixes[settings.template])
        return kv, self.decoder.prefill(kv, self.decoder.embed(np.array(prompt.after, np.int64))), limit


class _Run:
    """One answer under way: scores of the next token, and taking one."""

    def __init__(self, answerer: Answerer, question: str, settings: GenerationSettings) -> None:
        self._decoder, self._sampler = answerer.decoder, Sampler(settings)
        self._kv, self._logits, self.limit = answerer.begin(question, settings)
        self._pending = False
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


class Vocabulary:
    """A tokenizer's tokens by their first byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos = tuple(tokenizer.eos_ids)
        self.by_first: dict[int, list[int]] = defaultdict(list)  # of the bytes as they are
        self.by_first_letter: dict[int, list[int]] = defaultdict(list)  # leading white space left out
        self.blank: list[int] = []
        for token in range(tokenizer.vocab_size):
            data = tokenizer.token_bytes(token)
            if data:
                self.by_first[data[0]].append(token)
            if data.strip(_BLANK):
                self.by_first_letter[data.lstrip(_BLANK)[0]].append(token)
            elif data:
                self.blank.append(token)


class Spelling:
    """How far an answer has come along `reference` (trimmed, as it is compared).

    White space before and after it is free, as is the beginning of a stop marker after it.
    """

    def __init__(self, vocabulary: Vocabulary, reference: str, stops: Sequence[str]) -> None:
        self.vocabulary = vocabulary
        self.text = reference.strip().encode("utf-8", "replace")
        self.stops = tuple(stops)
        ends = [self.text.find(s) + len(s) for s in (stop.encode() for stop in stops) if s in self.text]
        self._stop_end = min(ends, default=None)
        self._at, self._tail = 0, b""

    @property
    def complete(self) -> bool:
        """All of the reference has been said."""
        return self._at == len(self.text)

    @property
    def stopped(self) -> bool:
        """A stop marker is complete: an answer ends here."""
        inside = self._stop_end is not None and self._at >= self._stop_end
        return inside or any(stop in _text(self._tail) for stop in self.stops)

    @property
    def trimmed(self) -> bool:
        """It ended at a marker that the reference goes on behind, or ends with: there was no trimming."""
        return self._stop_end is not None and self._at >= self._stop_end

    def allows(self, token: int) -> bool:
        if token in self.vocabulary.eos:
            return self.complete and not _text(self._tail).strip()
        # A special token has no bytes, is dropped from text, and so may stand anywhere.
        return self._after(self.vocabulary.tokenizer.token_bytes(token)) is not None

    def push(self, token: int) -> None:
        """Go on by an allowed token."""
        after = self._after(self.vocabulary.tokenizer.token_bytes(token))
        if after is None:
            raise ValueError(f"token {token} does not go on along the reference")
        self._at, self._tail = after

    def candidates(self) -> NDArray[np.int64]:
        """Every allowed token."""
        v = self.vocabulary
        if self.complete:
            found = [t for t in (*v.eos, *v.blank) if self.allows(t)]
        else:
            first = self.text[self._at]
            found = [*v.by_first[first], *(v.by_first_letter[first] + v.blank if self._at == 0 else [])]
            if self.text.startswith(_UNDECODABLE, self._at):
                found += [t for b in range(0x80, 0x100) for t in v.by_first[b]]
            found = [t for t in found if self.allows(t)]
        return np.unique(np.array(found, np.int64))

    def _after(self, data: bytes) -> tuple[int, bytes] | None:
        """(place in the text, what came after its end) once `data` was said; None when that is another text."""
        at, tail = self._at, self._tail
        if at == 0:
            data = data.lstrip(_BLANK)
        for i, byte in enumerate(data):
            if at == len(self.text):
                tail += data[i:]
                break
            if self.text[at] == byte:
                at += 1
            elif byte >= 0x80 and self.text.startswith(_UNDECODABLE, at):
                at += len(_UNDECODABLE)
            else:
                return None
        return (at, tail) if self._may_follow(tail) else None

    def _may_follow(self, tail: bytes) -> bool:
        """White space, with nothing or the beginning of a stop marker (or all of one) behind it."""
        text = _text(tail)
        words = text.lstrip()
        blank = text[: len(text) - len(words)]
        if not words:
            return True
        return any(
            stop.startswith(blank[i:] + words) or (blank[i:] + words).startswith(stop)
            for stop in self.stops
            for i in range(len(blank) + 1)
        )


def _text(tail: bytes) -> str:
    """What stands behind the reference's end; a character that has only begun does not count yet."""
    return tail.decode("utf-8", "ignore")
