"""``nemf regress``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from experiments.commands.options import JSON, MLFLOW, OUT, WEIGHTS, check_fetching, examples
from nemf.errors import NemfError

if TYPE_CHECKING:
    from experiments.regression import Report


@click.command(
    "regress",
    short_help="Has a commit made a matcher worse, slower or hungrier?",
    epilog=examples(
        "nemf regress --base main~10",
        "nemf regress --history 20",
        "nemf regress --bisect v1.0..HEAD --cell hpf_small",
    ),
)
@click.option("--base", metavar="COMMIT", help="Compare with it [default: the accepted scores].")
@click.option("--head", metavar="COMMIT", help="What is compared [default: the working tree].")
@click.option("--accept", metavar="REASON", help="Renew the accepted scores.")
@click.option("--history", type=int, metavar="N", help="The metric over the last N commits.")
@click.option("--from-mlflow", is_flag=True,
              help="With --history: from $MLFLOW_TRACKING_URI alone.")  # fmt: skip
@click.option("--bisect", metavar="GOOD..BAD", help="Find the first bad commit.")
@click.option("--cell", "cells", multiple=True, metavar="MATCHER[/DATASET[/PROTOCOL]]",
              help="Only these cells of the policy. Repeatable.")  # fmt: skip
@click.option("--cost/--no-cost", default=True, show_default=True, help="Time both sides (--base).")
@click.option("--policy", type=click.Path(path_type=Path),
              help="[default: experiments/regress.yaml of the repository]")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path),
              help="Folder of datasets in place of the policy's.")  # fmt: skip
@MLFLOW
@OUT
@WEIGHTS
@JSON
def regress_command(
    base: str | None,
    head: str | None,
    accept: str | None,
    history: int | None,
    from_mlflow: bool,
    bisect: str | None,
    cells: tuple[str, ...],
    cost: bool,
    policy: Path | None,
    data: Path | None,
    use_mlflow: bool,
    out: Path,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Has a commit made a matcher worse, slower or hungrier? Exit status 1 if so."""
    from experiments.regression import Regressions

    modes = {"--base": base, "--accept": accept, "--history": history, "--bisect": bisect}
    given = [name for name, value in modes.items() if value is not None]
    if len(given) > 1:
        raise NemfError(f"{' and '.join(given)} do not go together: give one of them")
    if head is not None and given and given[0] in ("--accept", "--bisect"):
        raise NemfError(f"{given[0]} takes no --head")
    if from_mlflow:
        if given != ["--history"]:
            raise NemfError("--from-mlflow goes with --history N")
        if head is not None or cells or data is not None or policy is not None:
            raise NemfError(
                "--from-mlflow shows what was published last: --head, --cell, --data and --policy "
                "do not go with it"
            )
        _show(_fetched_history(out, history), as_json)
        return
    if weights is not None and not weights.is_dir():
        raise NemfError(f"{weights}: no such folder of weights")
    tracked = Regressions(Path.cwd(), out, policy=policy, data=data, weights=weights, cells=cells)
    if accept is not None:
        report = tracked.accept(accept)
    elif history is not None:
        report = tracked.history(history, head)
    elif bisect is not None:
        report = tracked.bisect(bisect)
    elif base is not None:
        report = tracked.compare(base, head, cost=cost)
    else:
        report = tracked.gate(head)
    _show(report, as_json)
    if history is not None and use_mlflow:
        _publish(report, out, cells)
    sys.exit(1 if report.failed else 0)


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.content, indent=1))
        return
    click.echo(report.markdown)
    for file in report.files:
        click.echo(file, err=True)


def _publish(report: Report, out: Path, cells: tuple[str, ...]) -> None:
    from reports.history_store import publish_history
    from reports.mlflow_store import tracking_uri, without_password

    if cells:
        click.echo("not published: a history of some cells only", err=True)
        return
    publish_history(out, report.content, report.files)
    click.echo(f"MLflow: {without_password(tracking_uri(out))}", err=True)


def _fetched_history(out: Path, n_commits: int) -> Report:
    """The history as MLflow holds it, drawn anew."""
    from experiments.regression import Report
    from reports.history_page import write_history
    from reports.history_store import fetch_history

    check_fetching()
    content = fetch_history(out, n_commits)
    text, files = write_history(content, out / "regress")
    return Report(content, text, files)
