"""``nemf compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from experiments.commands.options import (
    ALPHAS,
    DATA,
    JSON,
    OUT,
    completed_by,
    datasets,
    examples,
    matcher_configs,
    protocols,
)


@click.command(
    "compare",
    short_help="Compare two methods or more on the same pairs.",
    epilog=examples(
        "nemf compare hpf_resnet18 nearest_resnet18 --dataset pfwillow",
        "nemf compare hpf_resnet18 nearest_resnet18 --dataset spair --data DATA --json",
    ),
)
@click.argument(
    "runs", nargs=-1, metavar="A B [C ...]", shell_complete=completed_by(matcher_configs)
)
@click.option(
    "--dataset", help="Dataset, or a folder's name such as spair-test-synthetic.",
    shell_complete=completed_by(datasets),
)  # fmt: skip
@click.option(
    "--protocol", default="canonical@1", show_default=True, shell_complete=completed_by(protocols)
)
@click.option("--alpha", default=0.1, show_default=True, help="The one the conclusion is about.")
@ALPHAS
@click.option("--by", type=click.Choice(["image", "point"]), default="image", show_default=True)
@click.option("--all-pairs", is_flag=True, help="All with all, not only the first with each.")
@DATA
@OUT
@JSON
def compare_command(
    runs: tuple[str, ...],
    dataset: str | None,
    protocol: str,
    alpha: float,
    alphas: str | None,
    by: Any,
    all_pairs: bool,
    data: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Compare A with B on the same pairs. Each is a label, matcher or matcher config among the
    current predictions in --out, or a prediction file. With --data: pictures too."""
    from experiments.configurations import names_of
    from experiments.provenance import code_state
    from experiments.store import slug
    from nemf.scoring import check_alphas, get_protocol
    from reports.comparison import ALPHAS, compare, find_runs

    rule = get_protocol(protocol)
    comparison = compare(
        find_runs(out, [names_of(name) for name in runs], rule, dataset),
        rule,
        alphas=check_alphas(alphas.split(",")) if alphas else ALPHAS,
        alpha=alpha,
        by=by,
        all_pairs=all_pairs,
        data=data,
        code=code_state(),
    )
    folder = out / "compare" / slug(comparison.name)
    files = comparison.write(folder)
    if as_json:
        click.echo(comparison.json(), nl=False)
        return
    click.echo(comparison.markdown())
    for file in dict.fromkeys(f if f.parent == folder else f.parent for f in files):
        click.echo(file)
