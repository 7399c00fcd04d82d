"""The `wsi-rt` command: the table of commands, signals and exit codes. The commands are in `runtime/commands/`."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module

import click

from wsi_rt.runtime import interrupts
from wsi_rt.runtime.errors import WsiRtError

# Command -> "module:attribute" in `runtime/commands/`; the module is imported when its command is asked for.
COMMANDS = {
    "accept": "accept:accept",
    "ask": "ask:ask",
    "bench": "bench:bench",
    "build-engines": "build:build_engines",
    "cache": "cache:cache",
    "diff-features": "diff_features:diff_features",
    "doctor": "doctor:doctor",
    "encode": "encode:encode",
    "inspect": "bundle:inspect",
    "kernels": "kernels:kernels",
    "plan": "plan:plan",
    "prefix": "prefix:prefix",
    "synth-checkpoint": "synth_checkpoint:synth_checkpoint",
    "synth-slide": "synth:synth_slide",
    "tile": "tile:tile",
    "verify": "bundle:verify",
}


class LazyGroup(click.Group):
    """The commands of COMMANDS, each imported when it is asked for; `--help`, which tells of all, imports all."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            module, _, attribute = COMMANDS[cmd_name].partition(":")
            self.add_command(getattr(import_module(f"wsi_rt.runtime.commands.{module}"), attribute), cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:  # misspelt: click proposes the nearest of those it holds
            for name in COMMANDS:
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="wsi-rt")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compiled inference for WSI-LLaVA: questions about gigapixel pathology slides. Research use only."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def main(argv: list[str] | None = None) -> None:
    """Run the command; every expected error is one line on stderr and an exit code (see `errors`)."""
    interrupts.install()
    sys.exit(run(argv))


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
