"""`wsi-rt accept`: published slide tokens and answers beside ours, what differs, and why it may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from wsi_rt.runtime.commands.options import ENGINES, JSON, SLIDE, SLIDE_FLAGS, TARGET, THREADS
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import InputError, ParityError
from wsi_rt.runtime.progress import Progress

_FILE = click.Path(path_type=Path)


@click.command()
@ENGINES
@click.option("--features", type=_FILE, required=True, help="Published slide tokens (.pt) of one slide.")
@click.option("--slide", type=_FILE, help="That slide, or an .h5 of its tile features: compare our tokens.")
@click.option("--questions", type=_FILE, help="WSI-Bench questions, JSON or JSON lines.")
@click.option("--answers", type=_FILE, help="The published script's answers, JSON lines: compare our greedy ones.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many answers.")
@click.option("--template", metavar="NAME", help="Prompt template: vicuna_v1 or llava_v1 (default: the bundle's).")
@click.option("--max-new-tokens", type=int, help="Longest answer (default: the bundle's).")
@click.option("--repetition-penalty", type=float, help="Over generated tokens only; 1 switches it off.")
@click.option("--no-repeat-ngram-size", type=int, help="0 switches it off.")
@click.option("--stop", multiple=True, help="Repeatable; replaces the default turn markers.")
@SLIDE
@TARGET
@THREADS
@JSON
def accept(
    engines: Path,
    features: Path,
    slide: Path | None,
    questions: Path | None,
    answers: Path | None,
    limit: int | None,
    target: str | None,
    threads: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Compare with the published scripts' files: may wsi-rt take their place?

    Exit code 0: "accept", ours agree as run. 5: "accept with these differences", or "do not accept". Run it again
    with the flags that a difference names, to see it agree.
    """
    from wsi_rt.runtime.accept.report import Level, render, to_json, verdict
    from wsi_rt.runtime.accept.run import AcceptRequest, run_accept

    if (questions is None) != (answers is None):
        raise InputError("--questions and --answers belong together, expected both or neither")
    if slide is None and questions is None:
        raise InputError("nothing to compare --features with: give --slide, or --questions and --answers")
    settings = SlideSettings(**{k: flags[k] for k in SLIDE_FLAGS})
    generation = {k: v for k, v in flags.items() if k not in SLIDE_FLAGS and v not in (None, ())}
    request = AcceptRequest(engines, features, slide, questions, answers, limit, settings, generation, threads, target)
    with Progress() as progress:
        sections = run_accept(request, progress.update)
    click.echo(json.dumps(to_json(sections), indent=1) if as_json else render(sections))
    if verdict(sections)[0] != Level.AGREES:
        click.get_current_context().exit(ParityError.exit_code)
