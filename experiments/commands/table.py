"""``nemf table``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from experiments.commands.options import DATA, MLFLOW, OUT, check_fetching, examples
from nemf.errors import NemfError


@click.command(
    "table",
    short_help="Make a table and its page from the score records.",
    epilog=examples(
        "nemf table 1 --data DATA",
        "nemf table 2 --no-mlflow",
    ),
)
@click.argument("name")
@click.option("--synthetic/--real", "synthetic", default=None, help="If both lie in --out.")
@click.option(
    "--from-mlflow", is_flag=True,
    help="First fetch predictions and scores from $MLFLOW_TRACKING_URI into --out.",
)  # fmt: skip
@MLFLOW
@DATA
@OUT
def table_command(
    name: str,
    synthetic: bool | None,
    from_mlflow: bool,
    use_mlflow: bool,
    data: Path | None,
    out: Path,
) -> None:
    """Make table NAME (1, 2, or a specification file) from the records in --out, and a page to look
    at it with; with --data the page shows the pictures."""
    from experiments.configurations import row_order
    from experiments.jobs import last_job, missing_sentences, rescorer, table_spec
    from reports.page import write_page
    from reports.records import current_records
    from reports.tables import build_table

    spec = table_spec(name)
    fetched = _fetched(out, spec.name, synthetic) if from_mlflow else None
    if fetched is not None:
        synthetic = fetched.synthetic
    found = current_records(out)
    records = [record for _, record in found]
    kinds = {record["predictions"]["synthetic"] for record in records}
    job = last_job(spec, out)
    if synthetic is None:
        synthetic = job["synthetic"] if len(kinds) > 1 else True in kinds
        if synthetic is None:
            raise NemfError(f"{out} holds real and synthetic records: say --real or --synthetic")
    order = row_order(spec.rows(synthetic=synthetic, full=True))
    records.sort(key=lambda r: order.get(r["predictions"]["matcher"]["label"], len(order)))
    shown = [record for record in records if record["predictions"]["synthetic"] == synthetic]
    missing = missing_sentences(job, shown)
    scores_of = rescorer(found, spec.alphas)
    table = build_table(spec, records, synthetic=synthetic, missing=missing, scores_of=scores_of)
    files = [*table.write(out / spec.name), out / spec.name / f"{spec.name}.html"]
    write_page(files[-1], table, found, data=data)
    click.echo(table.markdown())
    if use_mlflow and fetched is None:
        from reports.mlflow_store import tracking_uri, without_password
        from reports.tracking import publish_cells, publish_table, publish_trainings

        job_file = out / spec.name / "job.json"
        published = [*files, *([job_file] if job_file.exists() else [])]
        publish_table(out, table, published, publish_cells(out))
        publish_trainings(out)
        click.echo(f"MLflow: {without_password(tracking_uri(out))}")
    differing = fetched.differing(files) if fetched is not None and fetched.published else []
    for file in files:
        click.echo(f"{file}{' (differs from the published file)' if file in differing else ''}")
    if fetched is not None and data is None and files[-1] in differing:
        click.echo("the published page may show pictures: give --data to rebuild it with them")


def _fetched(out: Path, name: str, synthetic: bool | None) -> Any:
    """The published table, its cells in ``out``."""
    from reports.rebuilding import fetch_table

    check_fetching()
    return fetch_table(out, name, synthetic)
