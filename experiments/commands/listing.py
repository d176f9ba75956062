"""``nemf list``: what there is."""

from __future__ import annotations

import json
from typing import Any

import click

from experiments.commands.options import JSON, examples


@click.command(
    "list",
    epilog=examples(
        "nemf list",
        "nemf list matchers --json",
        "nemf list configs",
    ),
)
@click.argument(
    "what", type=click.Choice(["matchers", "datasets", "protocols", "configs"]), required=False
)
@JSON
def list_command(what: str | None, as_json: bool) -> None:
    """Matchers, datasets, protocols and configs with their cards."""
    import dataclasses

    from nemf.cards import available_matchers
    from nemf.datasets import available_datasets
    from nemf.scoring import available_protocols

    listing: dict[str, dict[str, Any]] = {
        "matchers": {name: card.as_dict() for name, card in available_matchers().items()},
        "datasets": available_datasets(),
        "protocols": {
            name: dataclasses.asdict(p) | {"threshold_side": p.threshold_side}
            for name, p in available_protocols().items()
        },
        "configs": _config_listing() if what == "configs" else {},
    }
    shown = {what: listing[what]} if what else {k: v for k, v in listing.items() if v}
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    for kind, entries in shown.items():
        click.echo(click.style(kind, bold=True))
        for name, entry in entries.items():
            click.echo(f"  {name:<16} {_summary(kind, entry)}")


def _config_listing() -> dict[str, Any]:
    from experiments.configurations import config_names

    return {f"{m}/{d}": {} for m in config_names("matchers") for d in config_names("datasets")}


def _summary(kind: str, entry: dict[str, Any]) -> str:
    if kind == "matchers":
        source = f"{entry['paper']}; {entry['official_protocol']}"
        return f"{entry['title']}: {entry['description']} ({source})"
    if kind == "datasets":
        counts = ", ".join(f"{s} {n:,}" for s, n in entry["official_pairs"].items())
        return f"{entry['title']}; splits {', '.join(entry['splits'])}" + (
            f" ({counts} pairs)" if counts else ""
        )
    if kind == "protocols":
        return f"{entry['note']} ({entry['source']})"
    return ""
