"""``nemf annotate``: pairs of one's own photographs by clicks."""

from __future__ import annotations

from pathlib import Path

import click

from experiments.commands.options import examples


@click.command(
    "annotate",
    short_help="Click corresponding points in one's own photographs.",
    epilog=examples(
        "nemf annotate photos/",
        "nemf annotate photos/ --no-browser --port 8000",
        "nemf predict nearest_small/folder --data photos/    # what to do with it",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--browser/--no-browser", "browser", default=True, help="Open the page by itself.")
@click.option("--port", type=click.IntRange(1, 65535), help="[default: that of last time, or any]")
def annotate_command(folder: Path, browser: bool, port: int | None) -> None:
    """Open a page on this machine to click corresponding points in the photographs of FOLDER.

    Each click is saved at once in FOLDER/pairs.json, which `nemf predict MATCHER/folder` and the
    other commands read; closing the page or the program loses nothing. Photographs that EXIF says
    to turn get an upright copy in FOLDER/upright, which is annotated in their place.
    """
    from nemf.annotation.server import annotate

    annotate(folder, port, browser, click.echo)
