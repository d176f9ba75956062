"""``nemf data``: check, describe and make datasets."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import click

from experiments.commands.options import (
    DATA,
    JSON,
    completed_by,
    datasets,
    examples,
    need,
    protocols,
)
from nemf import progress


@click.group("data")
def data_group() -> None:
    """Check, describe and make datasets."""


@data_group.command(
    "verify",
    short_help="Check every file of a dataset.",
    epilog=examples(
        "nemf data verify spair --data DATA",
        "nemf data verify folder --data my_pairs --json",
    ),
)
@click.argument("dataset", shell_complete=completed_by(datasets))
@click.option("--split", multiple=True, help="Only these splits (all that are there).")
@DATA
@JSON
def verify_command(dataset: str, split: tuple[str, ...], data: Path | None, as_json: bool) -> None:
    """Check every file of a dataset; exit status 1 if there is a problem."""
    from nemf.datasets.verification import verify

    report = verify(dataset, need(data, "--data"), list(split) or None, progress=progress.shown())
    click.echo(json.dumps(report.as_dict(), indent=1) if as_json else str(report))
    sys.exit(0 if report.ok else 1)


@data_group.command(
    "stats",
    short_help="Print a dataset's card.",
    epilog=examples(
        "nemf data stats pfwillow --data DATA",
    ),
)
@click.argument("dataset", shell_complete=completed_by(datasets))
@click.option("--split", default="test", show_default=True)
@DATA
@JSON
def stats_command(dataset: str, split: str, data: Path | None, as_json: bool) -> None:
    """Print a dataset's card: pairs, images, keypoints per class, sizes, difficulty flags."""
    from experiments.jobs import open_dataset
    from nemf.datasets.statistics import card, render

    described = card(open_dataset(dataset, need(data, "--data"), split))
    click.echo(json.dumps(described, indent=1) if as_json else render(described))


@data_group.command(
    "make-synthetic",
    short_help="Render synthetic stand-ins of the benchmarks.",
    epilog=examples(
        "nemf data make-synthetic synthetic",
        "nemf data make-synthetic small --preset tiny --seed 1",
    ),
)
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option("--preset", default="table1", show_default=True, help="table1 or tiny.")
def make_synthetic_command(root: Path, seed: int, preset: str) -> None:
    """Render the synthetic stand-ins of the three benchmarks into ROOT."""
    from nemf.datasets.synthetic import make_synthetic

    workers = len(os.sched_getaffinity(0))
    for folder in make_synthetic(
        root, seed=seed, preset=preset, workers=workers, progress=progress.shown()
    ):
        click.echo(folder)


@data_group.command(
    "queries",
    short_help="Write a dataset's questions for other methods.",
    epilog=examples(
        "nemf data queries pfwillow questions.csv --data DATA",
    ),
)
@click.argument("dataset", shell_complete=completed_by(datasets))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True)
@click.option(
    "--protocol", default="canonical@1", show_default=True, help="Decides the direction.",
    shell_complete=completed_by(protocols),
)  # fmt: skip
@DATA
def queries_command(dataset: str, file: Path, split: str, protocol: str, data: Path | None) -> None:
    """Write the questions of a dataset as CSV, for a method outside this suite to answer."""
    from experiments.jobs import open_dataset
    from nemf.files import write_text
    from nemf.predictions import query_list
    from nemf.scoring import get_protocol

    plan = get_protocol(protocol).plan
    opened = open_dataset(dataset, need(data, "--data"), split)
    table = query_list(opened, plan)
    write_text(file, table.to_csv(index=False, lineterminator="\n"))
    click.echo(f"{len(table)} queries of {len(opened)} pairs: {file}")
    click.echo("add the answers as columns x and y, then `nemf score`")


@data_group.command(
    "from-coco",
    short_help="Make pairs from keypoint annotations in COCO's format.",
    epilog=examples(
        "nemf data from-coco person_keypoints_val2017.json val2017/ my_pairs --pairs 200",
        "nemf data from-coco ap10k.json images/ my_pairs --category dog --category cat --seed 1",
        "nemf data verify folder --data my_pairs",
    ),
)
@click.argument("annotations", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--category", "categories", multiple=True, help="Only this class. Repeatable [default: all]."
)
@click.option("--pairs", default=100, show_default=True, help="At most that many a class.")
@click.option("--common", default=3, show_default=True, help="Keypoints that both images show.")
@click.option(
    "--visibility", type=click.IntRange(1, 2), default=2, show_default=True,
    help="Least COCO flag of a keypoint that counts: 1 labelled, 2 visible.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Decides which pairs are drawn.")
@JSON
def from_coco_command(
    annotations: Path,
    images: Path,
    out: Path,
    categories: tuple[str, ...],
    pairs: int,
    common: int,
    visibility: int,
    seed: int,
    as_json: bool,
) -> None:
    """Write pairs of the IMAGES that ANNOTATIONS describes into the new folder OUT.

    Each image counts with its main instance of a class; a pair holds the keypoints that both show.
    OUT gets copies of the images used and pairs.json, ready for `nemf predict MATCHER/folder`.
    """
    from nemf.datasets.coco import pairs_from_coco

    written = pairs_from_coco(
        annotations, images, out,
        categories=categories, pairs=pairs, common=common, visibility=visibility, seed=seed,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps({"folder": str(out)} | dataclasses.asdict(written), indent=1))
        return
    for category, count in written.pairs.items():
        click.echo(f"{category}: {count} pairs")
    for why, count in written.left_out.items():
        click.echo(f"left out: {count} {why}")
    click.echo(f"{sum(written.pairs.values())} pairs of {written.images} images: {out}")
