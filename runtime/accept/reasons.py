"""Why a reference's answers may differ: settings of the published scripts, tried one at a time.

The next known reason is one more entry of REASONS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wsi_rt.runtime.accept.answers import Trial, Walk
from wsi_rt.runtime.config import TEMPLATES, GenerationSettings

LONGEST = 2048  # tokens: the larger of the published max_new_tokens


@dataclass(frozen=True)
class Evidence:
    """What a reason may look at: the walks before it, and the error of our own engine's logits (in its precision)."""

    walks: Sequence[Walk]
    precision: str
    engine_error: float


@dataclass(frozen=True)
class Reason:
    """One known reason. `says`: the clause of the verdict. `apply` -> the trial with it; None: nothing to change.

    of_file: it concerns how answers were cut or stored, so it goes together with any other. settles: whether the walk
    with it accounts for the answer.
    """

    name: str
    says: str
    apply: Callable[[Trial, Evidence], Trial | None]
    of_file: bool = False
    settles: Callable[[Walk], bool] = lambda walk: walk.same


def _settings(**changes: object) -> Callable[[Trial, Evidence], Trial | None]:
    def apply(trial: Trial, _: Evidence) -> Trial | None:
        changed = trial.settings.with_overrides(**changes)
        return None if changed == trial.settings else replace(trial, settings=changed)

    return apply


def _stop_trimming(trial: Trial, _: Evidence) -> Trial | None:
    """Compare only what stands before the first turn marker."""
    found = [trial.reference.find(stop) for stop in trial.settings.stop if stop in trial.reference]
    return replace(trial, reference=trial.reference[: min(found)]) if found else None


def _max_new_tokens(trial: Trial, evidence: Evidence) -> Trial | None:
    """One length ends all references where ours goes on, and no other is longer.

    Trimming takes white space off a cut answer, so each tells a range: what says it all, to where ours says more.
    """
    cut = [w for w in evidence.walks if w.kind == "longer"]
    if not cut:
        return None
    low, high = max(w.said or 0 for w in cut), min(w.tokens for w in cut)
    longest = max((w.tokens for w in evidence.walks if w.kind != "longer"), default=0)
    if not 1 <= low <= high or longest > high:
        return None
    return replace(trial, settings=replace(trial.settings, max_new_tokens=high))


def _our_max_new_tokens(trial: Trial, evidence: Evidence) -> Trial | None:
    if not any(w.kind == "cut" for w in evidence.walks):
        return None
    return replace(trial, settings=replace(trial.settings, max_new_tokens=LONGEST))


def _precision(trial: Trial, evidence: Evidence) -> Trial | None:
    """Candidates that the bundle's reduced precision may swap."""
    return None if evidence.precision == "fp32" else replace(trial, noise=2 * evidence.engine_error)


REASONS = (
    Reason(
        "stop marker",
        "the reference does not trim its answers at turn markers",
        _stop_trimming,
        of_file=True,
    ),
    Reason(
        "max_new_tokens",
        "the reference's answers are cut by a smaller --max-new-tokens",
        _max_new_tokens,
        of_file=True,
    ),
    Reason(
        "our max_new_tokens",
        "our --max-new-tokens ends answers that the reference goes on with: give a larger one",
        _our_max_new_tokens,
        of_file=True,
        settles=lambda walk: walk.said is not None,  # where ours goes on behind it, the next run tells
    ),
    Reason(
        "precision",
        "they differ where our language model's reduced precision may decide: build with --precision llm=fp32 to know",
        _precision,
        of_file=True,
    ),
    *(Reason(f"template {t}", f"the reference's prompt is --template {t}", _settings(template=t)) for t in TEMPLATES),
    *(
        Reason(
            f"no_repeat_ngram_size {n}",
            f"the reference uses --no-repeat-ngram-size {n}",
            _settings(no_repeat_ngram_size=n),
        )
        for n in (5, 3, 0)
    ),
    *(
        Reason(
            f"repetition_penalty {p}", f"the reference uses --repetition-penalty {p}", _settings(repetition_penalty=p)
        )
        for p in (1.1, 1.0)
    ),
    Reason(
        "repetition_penalty 1.1 + no_repeat_ngram_size 3",
        "the reference uses --repetition-penalty 1.1 --no-repeat-ngram-size 3 (the later release's settings)",
        _settings(repetition_penalty=1.1, no_repeat_ngram_size=3),
    ),
    Reason(
        "template llava_v1 + no_repeat_ngram_size 5",
        "the reference uses --template llava_v1 --no-repeat-ngram-size 5 (the first release's settings)",
        _settings(template="llava_v1", no_repeat_ngram_size=5),
    ),
    Reason(
        "template llava_v1 + repetition_penalty 1.1 + no_repeat_ngram_size 3",
        "the reference uses --template llava_v1 --repetition-penalty 1.1 --no-repeat-ngram-size 3",
        _settings(template="llava_v1", repetition_penalty=1.1, no_repeat_ngram_size=3),
    ),
)


def sampled(settings: GenerationSettings) -> tuple[tuple[str, GenerationSettings], ...]:
    """The ways the published scripts sample (temperature 0.2, top_k 50), by name: not to be reproduced token for
    token, since the draws are torch's, but whether an answer may be such a draw can be told."""
    warm = replace(settings, temperature=0.2, top_k=50, top_p=1.0)
    profiles: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {}),
        (", no_repeat_ngram_size 5", {"no_repeat_ngram_size": 5}),
        (", repetition_penalty 1.1, no_repeat_ngram_size 3", {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3}),
    )
    return tuple(
        (f"temperature 0.2, template {template}{name}", replace(warm, template=template, **changes))
        for template in dict.fromkeys((settings.template, *TEMPLATES))
        for name, changes in profiles
    )
