"""``nemf predict``."""

from __future__ import annotations

from pathlib import Path

import click

from experiments.commands.options import (
    CONFIG_OPTIONS,
    DATA,
    DOWNLOAD,
    OUT,
    WEIGHTS,
    completed_by,
    examples,
    find_weights,
    matcher_dataset_configs,
    need,
    parse_options,
    protocols,
)
from nemf import progress
from nemf.errors import NemfError


@click.command(
    "predict",
    short_help="Predict a matcher on a dataset, or a whole table.",
    epilog=examples(
        "nemf predict hpf_resnet18/pfwillow --data DATA --weights WEIGHTS",
        "nemf predict nearest_small/folder --data my_pairs",
        "nemf predict hpf_resnet18/spair --data DATA --cfg-options 'model.layers=(4,6)'",
        "nemf predict --table 1 --data DATA --matchers 'copy hpf_resnet18'",
    ),
)
@click.argument("config", required=False, shell_complete=completed_by(matcher_dataset_configs))
@click.option("--table", "table_name", help="Every cell of that table instead of one config.")
@click.option("--matchers", help="With --table: only these matcher configs (comma or space).")
@click.option("--full", is_flag=True, help="With --table: its rows that take long to train, too.")
@click.option(
    "--train", "train_missing", is_flag=True, help="With --table: first train its recipes."
)
@click.option(
    "--protocol", help="Decides the plan [default: canonical@1].",
    shell_complete=completed_by(protocols),
)  # fmt: skip
@click.option("--label", help="Name of the row in tables.")
@DATA
@OUT
@WEIGHTS
@DOWNLOAD
@CONFIG_OPTIONS
def predict_command(
    config: str | None,
    table_name: str | None,
    matchers: str | None,
    full: bool,
    train_missing: bool,
    protocol: str | None,
    label: str | None,
    data: Path | None,
    out: Path,
    weights: Path | None,
    download: bool,
    options: tuple[str, ...],
) -> None:
    """Predict CONFIG (<matcher>/<dataset> or a file), resuming what a killed run left."""
    data = need(data, "--data")
    find_weights(weights, data, download)
    parsed = parse_options(options)
    if (config is None) == (table_name is None):
        raise NemfError("give either a CONFIG (e.g. hpf_resnet18/pfwillow) or --table 1")
    if table_name is not None:
        from experiments.jobs import predict_table, table_spec

        chosen = tuple((matchers or "").replace(",", " ").split()) or None
        predict_table(table_spec(table_name), data, out, chosen, parsed, train_missing, full)
        return
    from experiments.configurations import load_config, relabel
    from experiments.prediction import predict
    from experiments.ranks import is_first
    from nemf.scoring import get_protocol

    loaded = load_config(config, parsed)
    relabel(loaded, parsed, label)
    plan = get_protocol(protocol or "canonical@1").plan
    label = config if progress.shown() else None
    file = predict(loaded, data=data, out=out, plan=plan, progress=label)
    if is_first():
        click.echo(file)
