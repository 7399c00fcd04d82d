"""`wsi-rt ask`: one question about one slide, its answer streamed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from wsi_rt.runtime.commands.options import ENGINES, JSON, SLIDE, SLIDE_FLAGS, THREADS, show
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.progress import Progress


@click.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("question")
@ENGINES
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
@THREADS
@JSON
def ask(source: Path, question: str, engines: Path, threads: int | None, as_json: bool, **flags: Any) -> None:
    """Ask one question about a slide, an .h5 of tile features or a .pt of slide tokens."""
    from wsi_rt.runtime.pipeline import Pipeline

    slide = SlideSettings(**{k: flags[k] for k in SLIDE_FLAGS})
    chosen = {k: v for k, v in flags.items() if k not in SLIDE_FLAGS and v not in (None, ())}
    with Pipeline.open(engines, threads) as pipeline, Progress() as progress:
        settings = pipeline.default_generation().with_overrides(**chosen)

        def stream(text: str) -> None:
            progress.close()
            click.echo(_for_terminal(text), nl=False)

        answer = pipeline.ask(
            source, question, settings, slide, on_text=None if as_json else stream, on_progress=progress.update
        )
    if as_json:
        click.echo(json.dumps(answer.to_json(), indent=1))
        return
    click.echo()
    show(answer.tiles, answer.timings_ms, answer.notes)
    generated, decode_s = len(answer.token_ids), answer.timings_ms["decode"] / 1e3
    rate = f", {(generated - 1) / decode_s:.1f} tokens/s" if generated > 1 and decode_s > 0 else ""
    click.echo(f"answer: {generated} tokens{rate}, stopped by {answer.stop_reason}", err=True)


def _for_terminal(text: str) -> str:
    """A model may write control characters; a terminal would obey them, a file or pipe gets them as they are."""
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
