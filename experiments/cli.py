"""The command line: ``nemf <verb>``; the verbs are in ``experiments/commands``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from experiments.commands.annotate import annotate_command
from experiments.commands.bench import bench_command
from experiments.commands.compare import compare_command
from experiments.commands.completion import completion_command
from experiments.commands.data import data_group
from experiments.commands.export import export_command
from experiments.commands.figure import figure_command
from experiments.commands.leaderboard import leaderboard_command
from experiments.commands.listing import list_command
from experiments.commands.match import match_command
from experiments.commands.options import examples
from experiments.commands.predict import predict_command
from experiments.commands.published import published_command
from experiments.commands.regress import regress_command
from experiments.commands.score import score_command
from experiments.commands.table import table_command
from experiments.commands.train import train_command
from nemf import progress
from nemf.errors import NemfError

_EXITS = """\b
Exit status:
  0    done
  1    a check failed (data verify, regress), or an unexpected error
  2    something to correct in the call or in a file it names
  130  stopped by Ctrl-C; the same command goes on where it was
  141  whoever read the output went away
"""


class _Verbs(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Also names the group whose command was meant (`nemf verify`: `nemf data verify`)."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as problem:
            for name, group in self.commands.items():
                if isinstance(group, click.Group) and args[0] in group.commands:
                    raise click.UsageError(
                        f"No such command {args[0]!r}. Did you mean '{name} {args[0]}'?", ctx
                    ) from problem
            raise


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXITS
    + "\n"
    + examples(
        "nemf match cat1.jpg cat2.jpg            # two photographs of one's own",
        "nemf list                               # matchers, datasets, protocols",
        "nemf predict nearest_small/folder --data my_pairs",
        "nemf predict --help                     # every command has examples",
    ),
)
@click.option("-q", "--quiet", is_flag=True, help="Only results and errors: no notes, no progress.")
@click.option("-v", "--verbose", is_flag=True, help="Tell more of what is done.")
@click.option("--debug", is_flag=True, help="As --verbose, and show tracebacks.")
@click.version_option(package_name="nemf")
def main_group(quiet: bool, verbose: bool, debug: bool) -> None:
    """Benchmark suite for semantic correspondence: match images, score and compare matchers."""
    if quiet and (verbose or debug):
        raise NemfError("--quiet does not go with --verbose or --debug: give one of them")
    level = logging.ERROR if quiet else logging.DEBUG if verbose or debug else logging.INFO
    logging.basicConfig(
        level=max(level, logging.WARNING), format="%(levelname)s %(name)s: %(message)s"
    )
    for package in ("nemf", "baselines", "experiments", "reports"):
        logging.getLogger(package).setLevel(level)
    if quiet:
        progress.silence()


for _command in (
    list_command,
    data_group,
    predict_command,
    score_command,
    table_command,
    compare_command,
    figure_command,
    published_command,
    regress_command,
    export_command,
    leaderboard_command,
    match_command,
    annotate_command,
    train_command,
    bench_command,
    completion_command,
):
    main_group.add_command(_command)


def main() -> None:
    """Entry point. Problems that a user can act on end in one line and status 2."""
    debug = "--debug" in sys.argv
    try:
        with _second_interrupt_ends():
            main_group(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("stopped; the same command goes on where it was", 130)
    except click.ClickException as problem:
        problem.show()
        sys.exit(problem.exit_code)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on where it was", 130)
    except NemfError as problem:
        if debug:
            raise
        _fail(str(problem), 2)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as problem:
        if debug:
            raise
        where = f"{problem.filename}: " if problem.filename else ""
        _fail(f"{where}{problem.strerror or problem}", 2)
    except Exception as problem:
        if debug:
            raise
        _fail(f"unexpected {type(problem).__name__}: {problem} (--debug shows where)", 1)


@contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """The first Ctrl-C stops with a message; another one, if that takes too long, ends the process
    at once. Neither leaves anything half-written that counts."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, before)


def _fail(message: str, status: int) -> None:
    rank = os.environ.get("RANK")  # of several processes of one job, see experiments/ranks.py
    who = f"nemf (process {rank})" if rank else "nemf"
    click.echo(f"{who}: {' '.join(message.split())}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
