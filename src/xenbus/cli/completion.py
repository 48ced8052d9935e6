"""`xenbus completion`: the script for a shell, as click makes it. Knows three shells."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_XENBUS_COMPLETE"


@click.command("completion", short_help="Print a script that completes xenbus in your shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print a script that completes xenbus in your shell.

    \b
    Example:
      eval "$(xenbus completion bash)"        # in ~/.bashrc
      xenbus completion fish > ~/.config/fish/completions/xenbus.fish
    """
    from xenbus.cli.main import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    completion = kind(cli, {}, "xenbus", VARIABLE)
    # Not .source(): that runs the shell to see whether it is new enough.
    click.echo(completion.source_template % completion.source_vars())
