"""The answers' section of the report: the reference's answers beside our greedy ones, and why they differ.

Known reasons are settings of the published scripts, and how their answers were cut or stored, tried one at a time. The
next one is one more entry of REASONS or SETTINGS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.accept.answers import Answerer, Trial, Walk
from wsi_rt.runtime.accept.records import Matched, Question, ReferenceAnswer
from wsi_rt.runtime.accept.report import Level, OnProgress, Section
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import TEMPLATES, GenerationSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.manifest import EngineManifest

LONGEST = 2048  # tokens: the larger of the published max_new_tokens
SAMPLE = 4  # differing questions that each known reason is tried on
SHOWN = 10  # differing questions in the report; `--json` has all
# Changes of our settings. The last three are those of the releases: first, later, and the later one with its template.
SETTINGS: tuple[Mapping[str, Any], ...] = (
    *({"template": t} for t in TEMPLATES),
    *({"no_repeat_ngram_size": n} for n in (5, 3, 0)),
    *({"repetition_penalty": p} for p in (1.1, 1.0)),
    {"template": "llava_v1", "no_repeat_ngram_size": 5},
    {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
    {"template": "llava_v1", "repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
)


Change = Callable[[Trial, Sequence[Walk], float], Trial | None]


@dataclass(frozen=True)
class Reason:
    """One known reason. `says`: the clause of the verdict. `apply`(trial, walks before it, margin that our reduced
    precision may turn round) -> the trial with it; None: nothing to change.

    settles: whether the walk with it accounts for the answer. Those OF_FILE concern how answers were cut or stored, or
    our own precision, and go together with any one of OF_SETTINGS.
    """

    name: str
    says: str
    apply: Change
    settles: Callable[[Walk], bool] = lambda walk: walk.same


def _changed(changes: Mapping[str, Any]) -> Reason:
    def apply(trial: Trial, _: Sequence[Walk], __: float) -> Trial | None:
        changed = trial.settings.with_overrides(**changes)
        return None if changed == trial.settings else replace(trial, settings=changed)

    flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in changes.items())
    return Reason(" + ".join(f"{k} {v}" for k, v in changes.items()), f"the reference uses {flags}", apply)


def _stop_trimming(trial: Trial, _: Sequence[Walk], __: float) -> Trial | None:
    """Compare only what stands before the first turn marker."""
    found = [trial.reference.find(stop) for stop in trial.settings.stop if stop in trial.reference]
    return replace(trial, reference=trial.reference[: min(found)]) if found else None


def _max_new_tokens(trial: Trial, walks: Sequence[Walk], _: float) -> Trial | None:
    """One length ends all references where ours goes on, and no other is longer.

    Trimming takes white space off a cut answer, so each tells a range: what says it all, to where ours says more.
    """
    cut = [w for w in walks if w.kind == "longer"]
    if not cut:
        return None
    low, high = max(w.said or 0 for w in cut), min(w.tokens for w in cut)
    longest = max((w.tokens for w in walks if w.kind != "longer"), default=0)
    if not 1 <= low <= high or longest > high:
        return None
    return replace(trial, settings=replace(trial.settings, max_new_tokens=high))


def _our_max_new_tokens(trial: Trial, walks: Sequence[Walk], _: float) -> Trial | None:
    if not any(w.kind == "cut" for w in walks):
        return None
    return replace(trial, settings=replace(trial.settings, max_new_tokens=LONGEST))


def _precision(trial: Trial, _: Sequence[Walk], swaps: float) -> Trial | None:
    return replace(trial, noise=swaps) if swaps else None


OF_FILE = (
    Reason("stop marker", "the reference does not trim its answers at turn markers", _stop_trimming),
    Reason("max_new_tokens", "the reference's answers are cut by a smaller --max-new-tokens", _max_new_tokens),
    Reason(
        "our max_new_tokens",
        "our --max-new-tokens ends answers that the reference goes on with: give a larger one",
        _our_max_new_tokens,
        settles=lambda walk: walk.said is not None,  # where ours goes on behind it, the next run tells
    ),
    Reason(
        "precision",
        "they differ where our language model's rounded weights may decide: --precision llm=fp32 would tell",
        _precision,
    ),
)
OF_SETTINGS = tuple(_changed(changes) for changes in SETTINGS)


@dataclass
class Case:
    """One question, its walk as run, and what made it agree: reasons (none needed when it agrees as run)."""

    question: Question
    answer: ReferenceAnswer
    walk: Walk
    reasons: tuple[Reason, ...] | None = None


class Replies:
    """Compares the answers of one slide, then looks for reasons. tried: name -> how many of `sample` it makes agree."""

    def __init__(
        self, bundle: Bundle, answerer: Answerer, settings: GenerationSettings, on_progress: OnProgress
    ) -> None:
        manifest = bundle.component("llm")
        self.precision, self.logit_error = (
            manifest.compiled(bundle.target).precision,
            logit_error(manifest, bundle.target),
        )
        margin, fp32 = 2 * self.logit_error, self.precision == "fp32"  # twice: an error for each of two candidates
        self.noise, self.swaps = (margin, 0.0) if fp32 else (0.0, margin)  # reduced precision is a reason, not noise
        self.answerer, self.settings, self.on_progress = answerer, settings, on_progress
        self.tried: dict[str, int] = {}
        self.sample = 0

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

    def explain(self, cases: Sequence[Case]) -> None:
        """Find reasons for the cases that differ, and record them there."""
        differing = [c for c in cases if c.reasons is None]
        sample = differing[:SAMPLE]
        self.sample = len(sample)
        best: tuple[int, Reason | None] = (0, None)
        choices = (None, *OF_SETTINGS)
        for done, reason in enumerate(choices):
            self.on_progress("known reasons", done, len(choices))
            agreeing = [s for s in self._settle(sample, reason) or () if s is not None]
            for name in [reason.name] if reason else sorted({r.name for s in agreeing for r in s}):
                self.tried[name] = sum(name in [r.name for r in s] for s in agreeing)
            if len(agreeing) > best[0]:
                best = (len(agreeing), reason)
            if len(agreeing) == len(sample):
                break
        if best[0]:
            for case, reasons in zip(differing, self._settle(differing, best[1]) or [], strict=True):
                case.reasons = reasons

    def _settle(self, cases: Sequence[Case], reason: Reason | None) -> list[tuple[Reason, ...] | None] | None:
        """Per case the reasons that make it agree: `reason`, and where that is not enough one OF_FILE (None: it still
        differs). None when `reason` changes nothing."""
        trials, walks = [self._trial(c.answer) for c in cases], [c.walk for c in cases]
        if reason is not None:
            trials = [t for t in (reason.apply(t, walks, self.swaps) for t in trials) if t is not None]
            if len(trials) < len(cases):
                return None
            walks = [self.answerer.walk(c.question.text, t) for c, t in zip(cases, trials, strict=True)]
        given = () if reason is None else (reason,)
        out: list[tuple[Reason, ...] | None] = []
        for case, trial, walk in zip(cases, trials, walks, strict=True):
            further = () if walk.same else self._of_file(case, trial, walks)
            out.append(None if further is None else (*given, *further))
        return out

    def _of_file(self, case: Case, trial: Trial, walks: Sequence[Walk]) -> tuple[Reason, ...] | None:
        for reason in OF_FILE:
            changed = reason.apply(trial, walks, self.swaps)
            if changed is not None and reason.settles(self.answerer.walk(case.question.text, changed)):
                return (reason,)
        return None

    def _trial(self, answer: ReferenceAnswer) -> Trial:
        return Trial(self.settings, answer.text, self.noise)


def logit_error(manifest: EngineManifest, target: str) -> float:
    """How far a logit may be off: the engine's own error, and where its weights are rounded what that moves, both as
    the build measured them."""
    rounding = float(manifest.rounding["outputs"]["max_abs"]) if manifest.rounding else 0.0
    return float(manifest.compiled(target).measured()["max_abs"]) + rounding


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
        replies.explain(cases)
    return _section(cases, refused, replies, matched)


def _section(cases: Sequence[Case], refused: Sequence[str], replies: Replies, matched: Matched) -> Section:
    differing = [c for c in cases if not c.walk.same]
    tied = sum(c.walk.same and bool(c.walk.ties) for c in cases)
    same = len(cases) - len(differing) - tied
    lines = [
        f"{len(cases)} compared: {same} have the same text, {tied} part only at ties that rounding decides, "
        f"{len(differing)} differ",
        *(f"note: {n}" for n in matched.notes()),
        *([f"note: {len(refused)} questions refused: {', '.join(refused[:5])}"] if refused else []),
        *(_line(c) for c in differing[:SHOWN]),
        *(f"  with {name}: {n} of {replies.sample} agree" for name, n in replies.tried.items()),
    ]
    if replies.swaps:
        lines.append(f"our {replies.precision} language model: a logit may be off by {replies.logit_error:.2g}")
    level, differences = _judge(cases, replies)
    figures = {
        "compared": len(cases),
        "same_text": same,
        "ties_only": tied,
        "differing": len(differing),
        "refused": list(refused),
        **matched.left_out(),
        "settings": replies.settings.to_json(),
        "precision": replies.precision,
        "logit_error": replies.logit_error,
        "tried": replies.tried,
        "tried_on": replies.sample,
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
        "explained_by": None if case.reasons is None else [r.name for r in case.reasons],
    }


def _judge(cases: Sequence[Case], replies: Replies) -> tuple[Level, tuple[str, ...]]:
    differing = [c for c in cases if not c.walk.same]
    used = list(dict.fromkeys(r.says for c in differing for r in c.reasons or ()))
    unsettled = sum(c.reasons is None for c in differing)
    if not differing:
        return Level.AGREES, ()
    if not unsettled:
        return Level.EXPLAINED, tuple(used)
    helped = f" ({len(differing) - unsettled} others agree once {' and '.join(used)})" if used else ""
    reduced = (
        f"; our language model is {replies.precision}: --precision llm=fp32 would tell more" if replies.swaps else ""
    )
    return Level.DIFFERS, (
        f"{unsettled} of {len(cases)} answers differ by more than rounding, and no known setting explains it"
        f"{helped}{reduced}; sampled answers cannot be reproduced: compare with answers made at temperature 0",
    )
