"""``nemf bench``."""

from __future__ import annotations

from pathlib import Path

import click

from experiments.commands.options import OUT, WEIGHTS, examples, find_weights
from nemf.errors import NemfError


@click.command(
    "bench",
    short_help="Measure the suite's speed, or what matchers cost.",
    epilog=examples(
        "nemf bench --quick",
        "nemf bench matchers --matchers 'nearest_small hpf_small'",
    ),
)
@click.argument("names", nargs=-1)
@click.option("--quick", is_flag=True, help="Smaller sizes (a smoke test, no figures to quote).")
@click.option(
    "--matchers",
    help="Of the benchmark matchers: configs to measure (comma or space), with the accuracy of "
    "the scores in --out. Default: every matcher at its paper's setting, with published figures.",
)
@click.option("--size", default="500x375", show_default=True, help="WIDTHxHEIGHT of the pictures.")
@click.option("--device", default="cpu", show_default=True, help="As torch names it.")
@click.option("--dataset", help="Dataset whose scores are shown beside --matchers.")
@click.option("--protocol", default="canonical@1", show_default=True)
@click.option("--alpha", default=0.1, show_default=True)
@OUT
@WEIGHTS
def bench_command(
    names: tuple[str, ...],
    quick: bool,
    matchers: str | None,
    size: str,
    device: str,
    dataset: str | None,
    protocol: str,
    alpha: float,
    out: Path,
    weights: Path | None,
) -> None:
    """Measure the suite's own speed: scoring, index, encode-once. Ratios come from one run.

    `nemf bench matchers` measures what each matcher costs instead (parameters, GFLOP, time, memory)
    and draws accuracy against cost.
    """
    if "matchers" not in names:
        from experiments.benchmarks import run

        run(names, quick=quick)
        return
    if len(names) > 1:
        raise NemfError("`nemf bench matchers` runs alone")
    from experiments.matcher_costs import measure, of_configs, paper_settings
    from reports.costs import add_measured, add_published, markdown, write
    from reports.records import current_records

    find_weights(weights, None, False)
    chosen = (matchers or "").replace(",", " ").split()
    tasks = of_configs(chosen, out) if chosen else paper_settings()
    records = [record for _, record in current_records(out)] if chosen else []
    content = measure(tasks, size=_size(size), device=device)
    if chosen:
        add_measured(content, records, protocol, alpha, dataset)
    else:
        add_published(content, "nemf_table1.yaml", "spair", alpha)
    click.echo(markdown(content))
    for file in write(content, out / "costs"):
        click.echo(file)


def _size(text: str) -> tuple[int, int]:
    """(height, width) of WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) >= 32 and int(height) >= 32):
        raise NemfError(f"--size {text!r}: expected WIDTHxHEIGHT of at least 32x32, e.g. 500x375")
    return int(height), int(width)
