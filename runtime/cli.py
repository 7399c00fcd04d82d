"""The `wsi-rt` command. Heavy imports happen inside commands; logs and progress go to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import click

from wsi_rt.runtime.config import TARGET_MPP
from wsi_rt.runtime.errors import InputError, WsiRtError

Command = Callable[..., Any]


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator, so that commands share them."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


ENGINES = click.option("--engines", type=click.Path(path_type=Path), required=True, help="Engine bundle.")
THREADS = click.option("--threads", type=int, help="CPU threads (default: the CPUs this process may use).")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
SLIDE = options(
    click.option("--mpp", type=float, help="The slide's level-0 resolution in um/px, overriding its metadata."),
    click.option("--target-mpp", type=float, default=TARGET_MPP, show_default=True, help="Working resolution, um/px."),
    click.option("--allow-upsample", is_flag=True, help="Accept a slide coarser than the target."),
    click.option("--allow-dark", is_flag=True, help="Accept a dark background: the bright side counts as tissue."),
    click.option(
        "--position-tile", type=int, help="Divisor of the position grid in level-0 px (GigaPath's code: 256)."
    ),
    click.option("--patch-size-level0", type=int, help="For an .h5 that does not say: tile edge in level-0 px."),
    click.option("--keep-order", is_flag=True, help="Leave an .h5's tiles in the file's order (default: row-major)."),
)


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="wsi-rt")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compiled inference for WSI-LLaVA: questions about gigapixel pathology slides. Research use only."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


@cli.command("build-engines")
@click.option("--checkpoint", metavar="SRC", help="synthetic:<preset>?seed=N, or a folder with the three below.")
@click.option("--tile-encoder", metavar="P", help="timm folder (config.json + safetensors).")
@click.option("--slide-encoder", metavar="P", help="LongNet safetensors, file or folder.")
@click.option("--llava", metavar="P", help="LLaVA folder: merged, or projector only with --llava-base.")
@click.option("--llava-base", metavar="P", help="Language model folder that --llava's projector belongs to.")
@click.option("--tokenizer", metavar="P", help="tokenizer.model or tokenizer.json (default: from --llava).")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle folder to write.")
@click.option("--target", default="ort-cpu", show_default=True, help="What to compile for.")
@click.option("--precision", metavar="SPEC", help="fp32, or component=precision,...")
@click.option("--components", metavar="LIST", help="Comma-separated subset of the checkpoint's components.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be built.")
@click.option("--force", is_flag=True, help="Replace another build in --out.")
@THREADS
def build_engines(out: Path, components: str | None, dry_run: bool, **flags: Any) -> None:
    """Compile a checkpoint into an engine bundle."""
    from wsi_rt.runtime import commands

    names = tuple(n.strip() for n in components.split(",") if n.strip()) if components is not None else ()
    if components is not None and not names:
        raise InputError(f"--components is {components!r}, expected a comma-separated list of components")
    commands.build(out, names, dry_run, **flags)


@cli.command()
@click.argument("engines", metavar="DIR", type=click.Path(path_type=Path))
@JSON
def inspect(engines: Path, as_json: bool) -> None:
    """Say what a bundle holds and what made it."""
    from wsi_rt.runtime import commands

    commands.inspect(engines, as_json)


@cli.command()
@click.argument("engines", metavar="DIR", type=click.Path(path_type=Path))
@THREADS
@JSON
def verify(engines: Path, threads: int | None, as_json: bool) -> None:
    """Hash every file of a bundle and check every component's numbers again."""
    from wsi_rt.runtime import commands

    commands.verify(engines, threads, as_json)


@cli.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say what this machine has and lacks."""
    from wsi_rt.runtime.doctor import examine, render

    report = examine()
    click.echo(json.dumps(report, indent=1) if as_json else render(report))
    if not report["ok"]:
        click.get_current_context().exit(3)


@cli.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@ENGINES
@click.option(
    "--out",
    "outs",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Repeatable; .h5 gets tile features, .pt slide tokens.",
)
@SLIDE
@THREADS
@JSON
def encode(
    source: Path, engines: Path, outs: tuple[Path, ...], threads: int | None, as_json: bool, **slide: Any
) -> None:
    """Encode a slide (or an .h5 of tile features) into files."""
    from wsi_rt.runtime import commands

    commands.encode(source, engines, outs, threads, as_json, slide)


@cli.command()
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
    from wsi_rt.runtime import commands

    commands.ask(source, question, engines, threads, as_json, flags)


@cli.command("synth-slide")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .svs to write.")
@click.option("--width", type=int, default=6144, show_default=True, help="Level-0 px.")
@click.option("--height", type=int, default=4096, show_default=True, help="Level-0 px.")
@click.option("--mpp", type=float, default=TARGET_MPP, show_default=True, help="um/px.")
@click.option("--tissue", type=float, default=0.3, show_default=True, help="Share of the area.")
@click.option("--compression", default="jpeg", show_default=True, help="jpeg, jpeg2000, deflate or none.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def synth_slide(out: Path, **flags: Any) -> None:
    """Write a deterministic, H&E-like pyramidal slide (no patient data) for trials and benchmarks."""
    from wsi_rt.runtime import commands

    commands.synth_slide(out, flags)


def main(argv: list[str] | None = None) -> None:
    """Run the command; every expected error is one line on stderr and an exit code (see `errors`)."""
    for number in _INTERRUPTS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup and in background jobs: stays so
            signal.signal(number, _interrupt)
    sys.exit(run(argv))


_INTERRUPTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Stop once: a second Ctrl-C would interrupt the clean-up, and leave half a bundle."""
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(argv: list[str] | None = None) -> int:
    """`main` without the process: returns the exit code."""
    from wsi_rt.kernels.errors import KernelInputError

    try:
        # Not cli.main(): it answers Ctrl-C with an empty line of its own.
        with cli.make_context("wsi-rt", sys.argv[1:] if argv is None else list(argv)) as context:
            cli.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except click.exceptions.Exit as e:  # --help, --version
        return e.exit_code
    except click.UsageError as e:
        command = e.ctx.command_path if e.ctx else "wsi-rt"
        return _fail(2, f"{e.format_message().rstrip('.')}; see {command} --help")
    except click.ClickException as e:
        return _fail(2, e.format_message())
    except WsiRtError as e:
        return _fail(e.exit_code, str(e))
    except KernelInputError as e:
        return _fail(2, str(e))
    except (KeyboardInterrupt, click.Abort):
        if sys.stderr is not None and sys.stderr.isatty():
            click.echo(err=True)  # past "^C", or the answer so far
        return _fail(130, "interrupted; nothing half-written is left behind")
    except MemoryError as e:
        return _fail(3, f"memory ran out ({str(e) or 'no detail'}); use a machine with more, or a coarser --target-mpp")
    except BrokenPipeError:
        _discard_output()  # the reader left, and knows
        return 1
    except OSError as e:
        if e.filename is None:  # stdout or stderr: /dev/full, a closed terminal
            _discard_output()
        return _fail(3, f"{e.filename or 'the output'}: {e.strerror or e}")


def _discard_output() -> None:
    """What stdout still holds goes nowhere, instead of failing a second time at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(code: int, message: str) -> int:
    with contextlib.suppress(OSError):  # stderr on a full disk: the exit code still tells
        click.echo(f"wsi-rt: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    main()
