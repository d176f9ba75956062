"""``nemf figure``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from experiments.commands.options import (
    CONFIG_OPTIONS,
    DATA,
    OUT,
    WEIGHTS,
    completed_by,
    datasets,
    examples,
    find_weights,
    parse_options,
    protocols,
)
from nemf.errors import NemfError, did_you_mean


@click.command(
    "figure",
    short_help="Draw figures of what lies in --out.",
    epilog=examples(
        "nemf figure all --data DATA",
        "nemf figure transfer --dataset pfwillow --data DATA --matchers 'hpf_resnet18 copy'",
    ),
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--dataset", help="Dataset, or a folder's name such as spair-test-synthetic.",
    shell_complete=completed_by(datasets),
)  # fmt: skip
@click.option(
    "--matchers", help="Only these configs or matchers (comma or space), or labels (semicolon)."
)
@click.option(
    "--protocol", default="canonical@1", show_default=True, shell_complete=completed_by(protocols)
)
@click.option("--alpha", default=0.1, show_default=True)
@click.option("--pair", "pairs", multiple=True, help="Id of a pair to show. Repeatable.")
@click.option("--keypoint", default=0, show_default=True, help="Its number; of the figure field.")
@DATA
@OUT
@WEIGHTS
@CONFIG_OPTIONS
def figure_command(
    names: tuple[str, ...],
    dataset: str | None,
    matchers: str | None,
    protocol: str,
    alpha: float,
    pairs: tuple[str, ...],
    keypoint: int,
    data: Path | None,
    out: Path,
    weights: Path | None,
    options: tuple[str, ...],
) -> None:
    """Draw figures (PNG, PDF and the numbers as JSON) of what lies in --out.

    NAME: classes (heat map), curves (PCK over alpha), difficulty, transfer (keypoints on images),
    training, search (NeMF's flow by iteration), field (matching field of a keypoint), or all, which
    leaves out what cannot be made and says why.
    """
    from experiments.configurations import names_of, row_order
    from experiments.figure_jobs import FIGURES, FigureRequest, make_figures
    from experiments.jobs import table_spec
    from nemf.scoring import check_alphas, get_protocol
    from reports.figure_files import CannotDraw

    for name in names:
        if name not in (*FIGURES, "all"):
            hint = did_you_mean(name, FIGURES)
            raise NemfError(f"unknown figure {name!r}{hint}: choose {', '.join(FIGURES)} or all")
    find_weights(weights, data, False)
    spec = table_spec("1")
    request = FigureRequest(
        out=out,
        protocol=get_protocol(protocol),
        data=data,
        dataset=dataset,
        matchers=tuple(names_of(name) for name in _listed(matchers)),
        order=tuple(
            row_order((*spec.rows(synthetic=True, full=True), *spec.rows(synthetic=False)))
        ),
        pairs=pairs,
        alpha=check_alphas([alpha])[0],
        keypoint=keypoint,
        options=parse_options(options),
    )
    failed = False
    for name in FIGURES if "all" in names else dict.fromkeys(names):
        for what, result in make_figures(name, request):
            if not isinstance(result, NemfError):
                for file in result:
                    click.echo(file)
            elif isinstance(result, CannotDraw) and "all" in names:
                click.echo(f"not made: {what}: {result}")
            else:
                click.echo(f"nemf: {what}: {result}", err=True)
                failed = True
    sys.exit(2 if failed else 0)


def _listed(names: str | None) -> list[str]:
    """Names separated by commas or spaces; by semicolons if there is one (labels hold both)."""
    if names and ";" in names:
        return [name.strip() for name in names.split(";") if name.strip()]
    return (names or "").replace(",", " ").split()
