"""``nemf completion``: what makes a shell complete commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from experiments.commands.options import examples

_SHELLS = ("bash", "zsh", "fish")


@click.command(
    "completion",
    short_help="Print the completion script of a shell.",
    epilog=examples(
        'eval "$(nemf completion bash)"                                # for now; or in ~/.bashrc',
        "nemf completion zsh > ~/.zfunc/_nemf                          # a folder in $fpath",
        "nemf completion fish > ~/.config/fish/completions/nemf.fish",
    ),
)
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the script that teaches SHELL to complete nemf's commands, options, matchers, datasets,
    protocols and configs."""
    script = get_completion_class(shell)
    assert script is not None
    group = context.find_root().command
    click.echo(script(group, {}, "nemf", "_NEMF_COMPLETE").source())
