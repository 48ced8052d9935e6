"""The `xenbus` command: a table of subcommands, each imported when it is asked for, and how any of them ends.

Knows names of modules and exit codes. Imports click alone, so that `xenbus --help` is there at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from xenbus.cli import exits

# Name -> (module below xenbus.cli, its help in one line). The module's command is called `command`. The
# line stands here so that `xenbus --help` need not import the module; a test holds the two together.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Show the whole of it: a host, guests, disks, a network, faults."),
    "up": ("up", "Start a host: supervisor, store, domain 0."),
    "serve": ("serve", "Serve a real Xen's guests: the back ends of this domain."),
    "domain": ("domain", "Create, end, suspend and list domains."),
    "attach": ("attach", "Give a domain a device."),
    "detach": ("detach", "Take a device away from a domain."),
    "console": ("console", "Attach to a guest's console."),
    "tree": ("tree", "Show the device trees of all domains."),
    "sysctl": ("sysctl", "Read variables of the device trees."),
    "nbd": ("nbd", "Export a guest's disk over NBD."),
    "completion": ("completion", "Print a script that completes xenbus in your shell."),
    "store": ("store", "Read, write and watch a XenStore, or serve one."),
}

DEBUG_VARIABLE = "XENBUS_DEBUG"


class LazyGroup(click.Group):
    """A group whose subcommands are rows of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        row = COMMANDS.get(name)
        if row is None:
            return None
        command: click.Command = importlib.import_module(f"xenbus.cli.{row[0]}").command
        return command

    def invoke(self, ctx: click.Context) -> object:
        """click makes a plain failure of a pipe that nobody reads, wherever it is told."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            return _broken_pipe()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _version(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from xenbus import __version__

        click.echo(f"xenbus {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=exits.HELP,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and exit.",
)
@click.option("--debug", is_flag=True, envvar=DEBUG_VARIABLE, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Xen's split-driver device bus in user space."""
    ctx.obj = {"debug": debug}


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; its exit code. What went wrong is told on stderr, in one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = cli.main(words, prog_name="xenbus", standalone_mode=False, color=_colour())
        sys.stdout.flush()
        return result if isinstance(result, int) else exits.Exit.OK
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return exits.INTERRUPTED
    except BrokenPipeError:
        return _broken_pipe()
    except Exception as error:
        code = exits.code_of(error)
        if code is None:
            raise
        if _debugging(words):
            import traceback

            traceback.print_exception(error)
        head = click.style("xenbus:", fg="red", bold=True)
        click.echo(f"{head} {exits.line_of(error)}", err=True, color=_colour())
        return code


def _broken_pipe() -> int:
    """Whoever read our output has had enough; nothing may be flushed to it at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exits.BROKEN_PIPE


def _colour() -> bool | None:
    """None: where there is a terminal (https://no-color.org)."""
    return False if os.environ.get("NO_COLOR") else None


def _debugging(words: list[str]) -> bool:
    asked = os.environ.get(DEBUG_VARIABLE, "").lower() not in ("", "0", "false", "no")
    return asked or words[:1] == ["--debug"]


def _standard_streams() -> None:
    """Where the caller closed one (`>&-`) it is /dev/null: what we open next would be taken for it."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, fd)
            if null != fd:
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115


def main() -> None:
    """The entry point `xenbus`."""
    _standard_streams()
    sys.exit(run())


if __name__ == "__main__":
    main()
