"""``nemf export``."""

from __future__ import annotations

from pathlib import Path

import click

from experiments.commands.options import (
    OUT,
    completed_by,
    datasets,
    examples,
    matcher_configs,
    protocols,
)
from nemf.errors import NemfError


@click.command(
    "export",
    short_help="Write scores as result files that others can read.",
    epilog=examples(
        "nemf export results",
        "nemf export results --matcher hpf_resnet18 --protocol canonical@1 --contact 'A. Author'",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--matcher", "matchers", multiple=True, help="Only this label or config. Repeatable.",
    shell_complete=completed_by(matcher_configs),
)  # fmt: skip
@click.option("--dataset", help="Only this dataset.", shell_complete=completed_by(datasets))
@click.option("--protocol", help="Only this protocol.", shell_complete=completed_by(protocols))
@click.option("--contact", help="Whom to ask: a name, an address or a page.")
@OUT
def export_command(
    folder: Path,
    matchers: tuple[str, ...],
    dataset: str | None,
    protocol: str | None,
    contact: str | None,
    out: Path,
) -> None:
    """Write the scores in --out as result files into FOLDER: one JSON a method, dataset and
    protocol, for others to read and for `nemf leaderboard`."""
    from experiments.configurations import names_of
    from experiments.store import slug
    from nemf.files import write_text
    from nemf.predictions import dataset_folder
    from nemf.scoring import get_protocol
    from reports.records import current_records
    from reports.results import result_json, result_of

    labels = {label for name in matchers for label in names_of(name)}
    rule = get_protocol(protocol).id if protocol else None
    texts: dict[str, str] = {}
    for path, record in current_records(out):
        meta = record["predictions"]
        if (
            (matchers and meta["matcher"]["label"] not in labels)
            or (dataset and meta["dataset"] != dataset)
            or (rule and record["protocol"]["id"] != rule)
        ):
            continue
        parts = meta["matcher"]["label"], dataset_folder(meta), record["protocol"]["id"]
        name = "--".join(slug(part.replace("@", "-")) for part in parts) + ".json"
        text = result_json(result_of(record, contact))
        if texts.setdefault(name, text) != text:
            raise NemfError(f"{path}: another result is called {name} too; use --label to rename")
    if not texts:
        raise NemfError(f"{out}: holds no such score record: run `nemf predict` and `nemf score`")
    for name, text in texts.items():
        write_text(folder / name, text)
        click.echo(folder / name)
