"""``nemf published``."""

from __future__ import annotations

import json

import click

from experiments.commands.options import JSON, completed_by, datasets, examples, protocols
from nemf.errors import NemfError

_COLUMNS = {  # of the data: heading
    "method": "method",
    "dataset": "dataset",
    "class": "class",
    "alpha": "alpha",
    "pck_percent": "PCK",
    "base": "threshold",
    "averaging": "average per",
    "backbone": "backbone",
    "training": "training",
}


@click.command(
    "published",
    short_help="Look up figures that papers print, with their source.",
    epilog=examples(
        "nemf published NeMF CATs --dataset spair",
        "nemf published --dataset pfwillow --alpha 0.1 --protocol canonical@1",
        "nemf published CHM --dataset spair --class cat --json",
    ),
)
@click.argument("methods", nargs=-1, metavar="[METHOD...]")
@click.option("--dataset", shell_complete=completed_by(datasets))
@click.option("--class", "group", default="all", show_default=True, help="A class, all, or any.")
@click.option("--alpha", type=float)
@click.option(
    "--protocol", help="Only figures over its threshold length and with its averaging.",
    shell_complete=completed_by(protocols),
)  # fmt: skip
@JSON
def published_command(
    methods: tuple[str, ...],
    dataset: str | None,
    group: str,
    alpha: float | None,
    protocol: str | None,
    as_json: bool,
) -> None:
    """Look up figures that papers print, with their source and where sources disagree.

    None of them was measured here.
    """
    from nemf.scoring import get_protocol
    from reports.published_lookup import look_up

    found = look_up(
        methods,
        dataset=dataset,
        group=None if group == "any" else group,
        alpha=alpha,
        protocol=get_protocol(protocol) if protocol else None,
    )
    if as_json:
        click.echo(json.dumps(found.to_dict("records"), indent=1))
        return
    if found.empty:
        raise NemfError("nothing is printed that fits: leave out --alpha, --class or --protocol")
    found = found.sort_values(["dataset", "class", "alpha", "method", "source"], kind="stable")
    rows = [list(_COLUMNS.values())]
    rows += [[_text(row[key]) for key in _COLUMNS] for row in found.to_dict("records")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    marks = {text: f"[{k}]" for k, text in enumerate(dict.fromkeys(found["source"]), 1)}
    notes: dict[str, str] = {}
    for text, row in zip(rows[1:], found.to_dict("records"), strict=True):
        text.append(marks[row["source"]])
        for kind, told in (("", row["note"]), ("also printed: ", row["conflict"])):
            if told:
                text.append(notes.setdefault(kind + told, f"({len(notes) + 1})"))
    for text in rows:
        cells = [cell.ljust(width) for cell, width in zip(text, widths, strict=False)]
        click.echo("  ".join([*cells, *text[len(widths) :]]).rstrip())
    click.echo()
    for source, mark in marks.items():
        place = found.loc[found["source"] == source, "read_from"].iloc[0]
        click.echo(f"{mark} {source} (read in {place})")
    for note, mark in notes.items():
        click.echo(f"{mark} {note}")
    click.echo("Published figures; not measured here.")


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
