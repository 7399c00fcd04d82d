"""`wsi-rt ask`: questions about one slide; the answer to a single one is streamed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from wsi_rt.runtime.commands.cache import CACHE, store_of
from wsi_rt.runtime.commands.options import ENGINES, JSON, SLIDE, SLIDE_FLAGS, TARGET, THREADS, show
from wsi_rt.runtime.commands.prefix import MODEL, model_settings
from wsi_rt.runtime.config import GenerationSettings, SlideSettings
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.progress import Progress

if TYPE_CHECKING:
    from wsi_rt.runtime.llm.language_model import Question
    from wsi_rt.runtime.pipeline import Pipeline
    from wsi_rt.runtime.types import Answer


@click.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("question", required=False)
@ENGINES
@click.option(
    "--questions",
    "file",
    type=click.File(encoding="utf-8"),
    help="Questions, one a line (- is stdin), answered together.",
)
@click.option("--choices", metavar="LIST", help="Score these instead of generating: A,B,C,D or yes,no; auto: as asked.")
@click.option("--json-schema", "schema", type=click.File(encoding="utf-8"), help="The answer is JSON of this schema.")
@click.option("--max-new-tokens", type=int, help="Longest answer (default: the bundle's).")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option("--top-k", type=int, help="0 switches it off.")
@click.option("--top-p", type=float, help="1 switches it off.")
@click.option("--repetition-penalty", type=float, help="Over generated tokens only; 1 switches it off.")
@click.option("--no-repeat-ngram-size", type=int, help="0 switches it off.")
@click.option("--stop", multiple=True, help="Repeatable; replaces the default turn markers.")
@click.option("--seed", type=int, help="Sampling seed.")
@click.option("--template", metavar="NAME", help="Prompt template: vicuna_v1 or llava_v1.")
@SLIDE
@CACHE
@MODEL
@TARGET
@THREADS
@JSON
def ask(
    source: Path,
    question: str | None,
    file: TextIO | None,
    choices: str | None,
    schema: TextIO | None,
    engines: Path,
    cache: Path | None,
    no_cache: bool,
    target: str | None,
    threads: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Ask one question or several about a slide, an .h5 of tile features or a .pt of slide tokens."""
    from wsi_rt.runtime.pipeline import Pipeline

    if question is None and file is None:
        raise click.UsageError("Missing argument 'QUESTION' (or --questions FILE)")
    texts = [*([] if question is None else [question]), *(_lines(file) if file is not None else ())]
    asked, model = _questions(texts, choices, schema), model_settings(flags)
    slide = SlideSettings(**{k: flags[k] for k in SLIDE_FLAGS})
    chosen = {k: v for k, v in flags.items() if k not in SLIDE_FLAGS and v not in (None, ())}
    with Pipeline.open(engines, threads, store_of(cache, no_cache), model, target) as pipeline, Progress() as progress:
        settings = pipeline.default_generation().with_overrides(**chosen)
        if len(asked) == 1:
            answers = [_one(pipeline, source, asked[0], settings, slide, progress, as_json)]
        else:
            answers = pipeline.ask_many(source, asked, settings, slide, on_progress=progress.update)
    if as_json:
        _show_json(texts, answers)
    else:
        _show(texts, answers)


def _lines(file: TextIO) -> list[str]:
    """Raises InputError: no line that is not blank, or not UTF-8."""
    try:
        found = [line for line in file.read().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"--questions is not UTF-8 ({error.reason} at byte {error.start}), expected text") from error
    if not found:
        raise InputError("--questions has no question, expected one a line")
    return found


def _questions(texts: list[str], choices: str | None, schema: TextIO | None) -> list[Question]:
    from wsi_rt.runtime.llm.language_model import Question

    options = tuple(c.strip() for c in choices.split(",")) if choices is not None else ()
    json_schema = schema.read() if schema is not None else None
    return [Question(text, options, json_schema) for text in texts]


def _one(
    pipeline: Pipeline,
    source: Path,
    question: Question,
    settings: GenerationSettings,
    slide: SlideSettings,
    progress: Progress,
    as_json: bool,
) -> Answer:
    def stream(text: str) -> None:
        progress.close()
        click.echo(_for_terminal(text), nl=False)

    heard = None if as_json else stream
    answer = pipeline.ask(source, question, settings, slide, on_text=heard, on_progress=progress.update)
    if not as_json:
        click.echo()
    return answer


def _show_json(texts: list[str], answers: list[Answer]) -> None:
    """One answer is an object, several are a list in one."""
    if len(answers) == 1:
        click.echo(json.dumps(answers[0].to_json(), indent=1))
        return
    told = [{"question": text, **answer.to_json()} for text, answer in zip(texts, answers, strict=True)]
    click.echo(json.dumps({"answers": told}, indent=1))


def _show(texts: list[str], answers: list[Answer]) -> None:
    if len(answers) > 1:
        for text, answer in zip(texts, answers, strict=True):
            click.echo(_for_terminal(f"{text}\n{answer.text}\n"))
    notes = tuple(dict.fromkeys(note for answer in answers for note in answer.notes))
    show(answers[0].tiles, answers[0].timings_ms, notes)
    for answer in answers:
        if answer.choices is not None:
            told = ", ".join(f"{label} {p:.3f}" for label, p in answer.choices.items())
            click.echo(f"answer: {answer.text}; {told}", err=True)
            continue
        generated, decode_s = len(answer.token_ids), answer.timings_ms["decode"] / 1e3
        rate = f", {(generated - 1) / decode_s:.1f} tokens/s" if generated > 1 and decode_s > 0 else ""
        click.echo(f"answer: {generated} tokens{rate}, stopped by {answer.stop_reason}", err=True)


def _for_terminal(text: str) -> str:
    """A model may write control characters; a terminal would obey them, a file or pipe gets them as they are."""
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
