"""``nemf leaderboard``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from experiments.commands.options import examples


@click.command(
    "leaderboard",
    short_help="Check result files and render them as one page.",
    epilog=examples("nemf leaderboard results", "nemf leaderboard results --out site/board"),
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("board"), show_default=True,
    help="Folder of the board.",
)  # fmt: skip
def leaderboard_command(folder: Path, out: Path) -> None:
    """Check every result file (*.json) below FOLDER and render them as one page that opens
    offline. If a file is refused, each is named with the reason and no board is written."""
    from reports.leaderboard import read_folder, write_board

    entries, refused = read_folder(folder)
    for problem in refused:
        click.echo(f"nemf: {problem}", err=True)
    if refused:
        count = f"{len(refused)} of {len(refused) + len(entries)} files"
        click.echo(f"nemf: {count} refused; no board written", err=True)
        sys.exit(2)
    write_board(out / "index.html", entries)
    click.echo(f"{len(entries)} results: {out / 'index.html'}")
