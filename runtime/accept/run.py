"""`accept` from its files to its sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from wsi_rt.runtime.accept.answer_hypotheses import compare_answers
from wsi_rt.runtime.accept.records import Matched, about, match, read_answers, read_questions
from wsi_rt.runtime.accept.reference import examine, read_reference, token_widths
from wsi_rt.runtime.accept.report import OnProgress, Section
from wsi_rt.runtime.accept.tokens import compare_slide
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class AcceptRequest:
    """What to compare. generation: settings that override the bundle's; answers are always greedy."""

    engines: Path
    features: Path
    slide: Path | None = None
    questions: Path | None = None
    answers: Path | None = None
    limit: int | None = None
    slide_settings: SlideSettings = field(default_factory=SlideSettings)
    generation: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    target: str | None = None


def run_accept(request: AcceptRequest, on_progress: OnProgress) -> list[Section]:
    """The reference alone, then our tokens (with a slide), then our answers (with questions and answers).

    Files are read before the long work. Raises InputError and its kin for files, whatever opens engines raises.
    """
    matched = _matched(request)
    with Pipeline.open(request.engines, request.threads, target=request.target) as pipeline:
        bundle = pipeline.bundle
        settings = pipeline.default_generation().with_overrides(**request.generation)
        reference = read_reference(request.features, bundle.manifest)
        sections = [examine(reference)]
        if request.slide is not None:
            compared = compare_slide(pipeline, request.slide, request.slide_settings, reference, on_progress)
            sections = [_accounted_for(sections[0], compared), compared]
    if matched is None:
        return sections
    _, padded = token_widths(bundle.manifest)
    tokens = np.pad(reference.tokens, ((0, 0), (0, padded - reference.tokens.shape[1])))
    return [*sections, compare_answers(bundle, tokens, matched, settings, on_progress)]


def _accounted_for(alone: Section, compared: Section) -> Section:
    """What looked wrong about the reference alone is no finding of its own once the comparison explains it."""
    if compared.level >= alone.level:
        return alone
    return replace(alone, level=compared.level, differences=(), lines=(*alone.lines, *alone.differences))


def _matched(request: AcceptRequest) -> Matched | None:
    if request.questions is None or request.answers is None:
        return None
    matched = match(read_questions(request.questions), read_answers(request.answers))
    matched = about(matched, request.features)
    return replace(matched, pairs=matched.pairs[: request.limit])
