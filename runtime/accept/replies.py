"""The answers' section of the report: the reference's answers beside our greedy ones, and why they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.accept.answers import Answerer, Trial, Walk
from wsi_rt.runtime.accept.reasons import REASONS, Evidence, Reason, sampled
from wsi_rt.runtime.accept.records import Matched, Question, ReferenceAnswer
from wsi_rt.runtime.accept.report import Level, OnProgress, Section
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import GenerationSettings
from wsi_rt.runtime.errors import InputError

SAMPLE = 4  # differing questions that each known reason is tried on
SHOWN = 10  # differing questions in the report; `--json` has all
SAMPLING = (
    "the reference's answers read like draws at {profile}: wsi-rt's draws are not torch's, so they cannot be "
    "reproduced token for token; compare with answers made at temperature 0"
)


@dataclass
class Case:
    """One question, its walk as run, and what made it agree: reasons (none needed when it agrees as run)."""

    question: Question
    answer: ReferenceAnswer
    walk: Walk
    reasons: tuple[Reason, ...] | None = None


@dataclass
class Explained:
    """settings: the reason whose settings make the most agree, if one does; tried: name -> how many of the sample."""

    tried: dict[str, int] = field(default_factory=dict)
    sample: int = 0
    settings: Reason | None = None
    sampling: str = ""
    precision: str = "fp32"


class Replies:
    """Compares the answers of one slide, then looks for reasons."""

    def __init__(
        self, bundle: Bundle, answerer: Answerer, settings: GenerationSettings, on_progress: OnProgress
    ) -> None:
        compiled = bundle.component("llm").compiled(bundle.target)
        self.precision, self.error = compiled.precision, float(compiled.parity["engine"]["max_abs"])
        self.noise = 2 * self.error if self.precision == "fp32" else 0.0  # reduced precision is a reason, not noise
        self.answerer, self.settings, self.on_progress = answerer, settings, on_progress

    def compare(self, pairs: Sequence[tuple[Question, ReferenceAnswer]]) -> tuple[list[Case], list[str]]:
        """(every question walked, those refused). Raises InputError when every question is refused."""
        cases, refused = [], []
        for done, (question, answer) in enumerate(pairs):
            self.on_progress("answers", done, len(pairs))
            try:
                walk = self.answerer.walk(question.text, self._trial(answer))
            except InputError:  # its message may hold question text
                refused.append(question.place)
                continue
            cases.append(Case(question, answer, walk, () if walk.same else None))
        if not cases:
            raise InputError(
                f"every question is refused (blank, with <image> in it, or longer than the context): {refused[0]} first"
            )
        return cases, refused

    def explain(self, cases: Sequence[Case]) -> Explained:
        """Find reasons for the cases that differ, and record them there."""
        differing = [c for c in cases if c.reasons is None]
        sample = differing[:SAMPLE]
        explained = Explained(sample=len(sample), precision=self.precision)
        best: tuple[int, Reason | None] = (0, None)
        choices: list[Reason | None] = [None, *(r for r in REASONS if not r.of_file)]
        for done, reason in enumerate(choices):
            self.on_progress("known reasons", done, len(choices))
            settled = self._settle(sample, reason)
            if settled is None:
                continue
            agreeing = [s for s in settled if s is not None]
            names = [reason.name] if reason else sorted({r.name for s in agreeing for r in s})
            for name in names:
                explained.tried[name] = sum(reason is not None or name in [r.name for r in s] for s in agreeing)
            if len(agreeing) > best[0]:
                best = (len(agreeing), reason)
            if len(agreeing) == len(sample):
                break
        if best[0]:
            explained.settings = best[1]
            for case, reasons in zip(differing, self._settle(differing, best[1]) or [], strict=True):
                case.reasons = reasons
        unsettled = [c for c in differing if c.reasons is None]
        if unsettled:
            explained.sampling = self._sampling(unsettled)
        return explained

    def _settle(self, cases: Sequence[Case], reason: Reason | None) -> list[tuple[Reason, ...] | None] | None:
        """Per case the reasons that make it agree: `reason`, and where that is not enough one that concerns the file
        (None: it still differs). None when `reason` changes nothing."""
        trials = [self._trial(c.answer) for c in cases]
        walks = [c.walk for c in cases]
        if reason is not None:
            evidence = Evidence(walks, self.precision, self.error)
            changed = [reason.apply(t, evidence) for t in trials]
            trials = [t for t in changed if t is not None]
            if len(trials) < len(cases):
                return None
            walks = [self.answerer.walk(c.question.text, t) for c, t in zip(cases, trials, strict=True)]
        evidence = Evidence(walks, self.precision, self.error)
        given = () if reason is None else (reason,)
        out: list[tuple[Reason, ...] | None] = []
        for case, trial, walk in zip(cases, trials, walks, strict=True):
            further = () if walk.same else self._of_file(case, trial, evidence)
            out.append(None if further is None else (*given, *further))
        return out

    def _of_file(self, case: Case, trial: Trial, evidence: Evidence) -> tuple[Reason, ...] | None:
        for reason in (r for r in REASONS if r.of_file):
            changed = reason.apply(trial, evidence)
            if changed is not None and reason.settles(self.answerer.walk(case.question.text, changed)):
                return (reason,)
        return None

    def _sampling(self, cases: Sequence[Case]) -> str:
        """The name of a way of sampling that every one of these answers may come from; empty: none is."""
        for name, settings in sampled(self.settings):
            found = (self.answerer.surprise(c.question.text, Trial(settings, c.answer.text)) for c in cases)
            if all(s is not None and s.plausible for s in found):
                return name
        return ""

    def _trial(self, answer: ReferenceAnswer) -> Trial:
        return Trial(self.settings, answer.text, self.noise)


def compare_answers(
    bundle: Bundle,
    tokens: NDArray[np.float32],
    matched: Matched,
    settings: GenerationSettings,
    on_progress: OnProgress,
) -> Section:
    """Answer each question greedily from `tokens` [576, C] and compare with the reference's answers.

    Raises InputError (no language model in the bundle, every question refused), WsiRtError (unusable logits).
    """
    greedy = replace(settings, temperature=0.0)
    with Answerer(bundle, tokens) as answerer:
        replies = Replies(bundle, answerer, greedy, on_progress)
        cases, refused = replies.compare(matched.pairs)
        explained = replies.explain(cases) if any(c.reasons is None for c in cases) else None
    return _section(cases, refused, explained, matched, greedy)


def _section(
    cases: Sequence[Case],
    refused: Sequence[str],
    explained: Explained | None,
    matched: Matched,
    settings: GenerationSettings,
) -> Section:
    same = [c for c in cases if c.walk.same and not c.walk.ties]
    tied = [c for c in cases if c.walk.same and c.walk.ties]
    differing = [c for c in cases if not c.walk.same]
    exact = sum(c.walk.retokenised for c in same)
    lines = [
        f"{len(cases)} compared: {len(same)} have the same text ({exact} the same tokens), {len(tied)} part only at "
        f"ties that rounding decides, {len(differing)} differ",
        *(f"note: {n}" for n in matched.notes()),
        *([f"note: {len(refused)} questions refused: {', '.join(refused[:5])}"] if refused else []),
        *(_line(c) for c in differing[:SHOWN]),
    ]
    if explained is not None:
        lines += [f"  with {name}: {n} of {explained.sample} agree" for name, n in explained.tried.items()]
    level, differences = _judge(cases, explained)
    figures = {
        "compared": len(cases),
        "same_text": len(same),
        "same_tokens": exact,
        "ties_only": len(tied),
        "differing": len(differing),
        "refused": list(refused),
        "unanswered": list(matched.unanswered),
        "unasked": list(matched.unasked),
        "repeated_questions": list(matched.repeated_questions),
        "repeated_answers": list(matched.repeated_answers),
        "about_other_slides": matched.other_slides,
        "settings": settings.to_json(),
        "tried": explained.tried if explained else {},
        "tried_on": explained.sample if explained else 0,
        "sampling": explained.sampling if explained else "",
        "answers": [_figures(c) for c in cases],
    }
    return Section("answers", level, differences, tuple(lines), figures)


def _line(case: Case) -> str:
    walk = case.walk
    margin = "" if walk.margin is None or not np.isfinite(walk.margin) else f", margin {walk.margin:.3g} logits"
    what = {
        "other": f"differs at token {walk.tokens}{margin}",
        "longer": f"ours goes on after the reference's {walk.tokens} tokens{margin}",
        "shorter": f"ours ends after {walk.tokens} tokens, the reference goes on{margin}",
        "cut": f"ours is cut after {walk.tokens} tokens, the reference goes on",
        "untrimmed": f"ours ends at a turn marker after {walk.tokens} tokens, the reference does not",
    }[walk.kind]
    return f"  {case.question.place}: {what}"


def _figures(case: Case) -> dict[str, object]:
    walk = case.walk
    finite = walk.margin is not None and np.isfinite(walk.margin)
    return {
        "question_id": case.question.id,
        "kind": walk.kind,
        "tokens": walk.tokens,
        "first_difference": walk.first_difference,
        "margin": walk.margin if finite else None,
        "ties": [{"token": i, "margin": m} for i, m in walk.ties],
        "same_tokens": walk.same and not walk.ties and walk.retokenised,
        "explained_by": None if case.reasons is None else [r.name for r in case.reasons],
    }


def _judge(cases: Sequence[Case], explained: Explained | None) -> tuple[Level, tuple[str, ...]]:
    if explained is None:
        return Level.AGREES, ()
    differing = [c for c in cases if not c.walk.same]
    used = list(dict.fromkeys(r.says for c in differing for r in c.reasons or ()))
    unsettled = sum(c.reasons is None for c in differing)
    if unsettled and explained.sampling:
        used.append(f"{SAMPLING.format(profile=explained.sampling)} ({unsettled} of {len(cases)} answers)")
        unsettled = 0
    if not unsettled:
        return Level.EXPLAINED, tuple(used)
    helped = f" ({len(differing) - unsettled} others agree once {' and '.join(used)})" if used else ""
    reduced = (
        ""
        if explained.precision == "fp32"
        else (f"; our language model's {explained.precision} may be why: compare with --precision llm=fp32")
    )
    return Level.DIFFERS, (
        f"{unsettled} of {len(cases)} answers differ by more than rounding, and no known setting explains it"
        f"{helped}{reduced}",
    )
