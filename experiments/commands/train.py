"""``nemf train``."""

from __future__ import annotations

from pathlib import Path

import click

from experiments.commands.options import (
    CONFIG_OPTIONS,
    DATA,
    DOWNLOAD,
    MLFLOW,
    OUT,
    WEIGHTS,
    completed_by,
    examples,
    find_weights,
    parse_options,
    training_configs,
)


@click.command(
    "train",
    short_help="Train a recipe, going on where it stopped.",
    epilog=examples(
        "nemf train nemf_spair --data DATA --weights WEIGHTS",
        "nemf train experiments/configs/training/resnet_small.py",
    ),
)
@click.argument("config", shell_complete=completed_by(training_configs))
@MLFLOW
@DATA
@OUT
@WEIGHTS
@DOWNLOAD
@CONFIG_OPTIONS
def train_command(
    config: str,
    use_mlflow: bool,
    data: Path | None,
    out: Path,
    weights: Path | None,
    download: bool,
    options: tuple[str, ...],
) -> None:
    """Train what CONFIG describes (a name in configs/training or a file), going on where a stopped
    run left off; prints the file of the trained weights."""
    from experiments.ranks import is_first
    from experiments.training import train

    find_weights(weights, data, download)
    file = train(config, out, parse_options(options), data)
    if not is_first():
        return
    click.echo(file)
    if use_mlflow:
        from reports.mlflow_store import tracking_uri, without_password
        from reports.tracking import publish_trainings

        publish_trainings(out)
        click.echo(f"MLflow: {without_password(tracking_uri(out))}", err=True)
