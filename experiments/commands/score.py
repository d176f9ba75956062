"""``nemf score``."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    need,
    protocols,
)
from nemf.errors import NemfError


@click.command(
    "score",
    short_help="Score a prediction file, ours or somebody else's.",
    epilog=examples(
        "nemf score outputs/predictions/.../predictions.parquet --protocol canonical@1",
        "nemf score --table 1",
        "nemf score answers.csv --dataset pfwillow --data DATA --name 'my method'",
    ),
)
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--table", "table_name", help="Score everything that table needs in --out.")
@click.option(
    "--protocol", "protocols", multiple=True,
    help="Repeatable [default: all of the file's plan; canonical@1 with --dataset].",
    shell_complete=completed_by(protocols),
)  # fmt: skip
@ALPHAS
@click.option("--by", type=click.Choice(["image", "point"]), default="image", show_default=True)
@click.option("--oracle-grid", type=int, help="Score the truth snapped to a GxG grid (a ceiling).")
@click.option(
    "--dataset", help="FILE was made elsewhere (CSV or parquet) for this dataset.",
    shell_complete=completed_by(datasets),
)  # fmt: skip
@click.option("--name", help="Name of the method that made FILE.")
@click.option("--split", default="test", show_default=True)
@DATA
@OUT
@JSON
def score_command(
    file: Path | None,
    table_name: str | None,
    protocols: tuple[str, ...],
    alphas: str | None,
    by: str,
    oracle_grid: int | None,
    dataset: str | None,
    name: str | None,
    split: str,
    data: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Score a prediction file: ours, or one made elsewhere (pair, keypoint, x, y)."""
    from experiments.jobs import score_file, score_table, table_spec
    from nemf.predictions import Predictions
    from nemf.scoring import available_protocols, check_alphas, get_protocol

    if (file is None) == (table_name is None):
        raise NemfError("give either a prediction FILE or --table 1")
    if table_name is not None:
        click.echo(f"{score_table(table_spec(table_name), out)} score records written below {out}")
        return
    chosen = [get_protocol(p) for p in protocols]
    values = check_alphas(alphas.split(",")) if alphas else ()
    if dataset is not None:
        chosen = chosen or [get_protocol("canonical@1")]
        file = _adopt(file, dataset, name, split, need(data, "--data"), out, chosen)
    elif file.suffix.lower() in (".csv", ".txt", ".tsv"):
        raise NemfError(
            f"{file}: predictions made elsewhere need --dataset and --data (and --name, their row "
            "in tables); see docs/predictions.md"
        )
    meta = Predictions.read(file, ["pair"]).meta
    if not chosen:
        chosen = [
            p
            for p in available_protocols().values()
            if str(p.plan.for_layout(meta["layout"])) == meta["plan"]
        ]
    grids = (oracle_grid,) if oracle_grid else ()
    records = list(score_file(file, chosen, values, grids))
    if as_json:
        click.echo(json.dumps(records, indent=1, default=float))
        return
    for record in records:
        _print_record(record, by, values or record["protocol"]["alphas"])


def _adopt(
    file: Path, dataset: str, name: str | None, split: str, data: Path, out: Path, chosen: list[Any]
) -> Path:
    """Takes predictions made elsewhere into the store, as the current cell of that method; what the
    ``chosen`` protocols cannot score is refused before anything is written."""
    from experiments.jobs import open_dataset
    from experiments.store import Cell, check_row, slot_folder
    from nemf.predictions import dataset_folder, read_external, warn_of_strange_answers
    from reports.records import keypoint_errors

    label = name or file.stem
    opened = open_dataset(dataset, data, split)
    predictions = read_external(file, opened, chosen[0].plan, label)
    for protocol in chosen:
        keypoint_errors(predictions, protocol)
    warn_of_strange_answers(predictions, str(file))
    meta = predictions.meta
    slot = slot_folder(out, f"external-{label}", dataset_folder(meta), meta["plan"])
    check_row(out, slot, label, label)
    cell = Cell(slot, meta["key"])
    predictions.write(cell.file)
    cell.make_current()
    return cell.file


def _print_record(record: dict[str, Any], by: str, alphas: Sequence[float]) -> None:
    meta = record["predictions"]
    kind = "SYNTHETIC " if meta["synthetic"] else ""
    click.echo(
        f"{meta['matcher']['label']} on {kind}{meta['title']} {meta['split']} "
        f"({record['n_pairs']} pairs of {record['n_images']} distinct images, "
        f"{record['n_keypoints']} keypoints, {record['n_unanswered']} unanswered; "
        f"fingerprint {meta['fingerprint'][:12]})"
    )
    click.echo(f"{record['protocol']['description'].replace('per-image', f'per-{by}')}")
    click.echo(f"{'':<28}" + "".join(f"{f'@{a:g}':>20}" for a in alphas))
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for entry in record["metrics"]:
        if entry["averaging"] == by:
            label = (
                entry["value"]
                if entry["group"] in ("all", "class")
                else f"{entry['group']} {entry['value']}"
            )
            rows.setdefault(f"{label} ({entry['n_pairs']})", {})[entry["alpha"]] = entry
    for label, entries in rows.items():
        click.echo(f"{label:<28}" + "".join(f"{_interval(entries[a]):>20}" for a in alphas))


def _interval(entry: dict[str, Any]) -> str:
    if entry["low"] is None:
        return f"{entry['pck'] * 100:.1f} [?]"
    return f"{entry['pck'] * 100:.1f} [{entry['low'] * 100:.1f}, {entry['high'] * 100:.1f}]"
