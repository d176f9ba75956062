"""``nemf match``: two photographs of one's own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.commands.options import (
    CONFIG_OPTIONS,
    DOWNLOAD,
    JSON,
    WEIGHTS,
    completed_by,
    examples,
    find_weights,
    matcher_configs,
    parse_options,
)
from nemf.errors import NemfError

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)
_GRID = 4
_RESULTS = Path("outputs")


@click.command(
    "match",
    short_help="Match two photographs of one's own and draw a picture.",
    epilog=examples(
        "nemf match cat1.jpg cat2.jpg",
        "nemf match cat1.jpg cat2.jpg --points '120,80 64,33' --out cats.png",
        "nemf match cat1.jpg cat2.jpg --matcher hpf_small --matcher copy --grid 5",
        "nemf match cat1.jpg cat2.jpg --points points.csv --json",
    ),
)
@click.argument("query", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option(
    "--matcher", "matchers", multiple=True, metavar="CONFIG",
    shell_complete=completed_by(matcher_configs),
    help="Matcher config (`nemf list configs`); repeatable, each gets a row "
    "[default: the best one whose weights are there].",
)  # fmt: skip
@click.option(
    "--points", multiple=True, metavar="'X,Y X,Y ...'|FILE",
    help="Points of QUERY in pixels from its top-left corner, or a CSV or JSON file. Repeatable.",
)  # fmt: skip
@click.option("--grid", type=click.IntRange(1, 50), help=f"NxN points [default: {_GRID}].")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE",
    help="The picture: PNG, PDF, SVG or JPEG [default: outputs/match/<QUERY>-<REFERENCE>.png; "
    "with --json none].",
)  # fmt: skip
@WEIGHTS
@DOWNLOAD
@CONFIG_OPTIONS
@JSON
def match_command(
    query: Path,
    reference: Path,
    matchers: tuple[str, ...],
    points: tuple[str, ...],
    grid: int | None,
    out: Path | None,
    weights: Path | None,
    download: bool,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Where are points of the photograph QUERY in the photograph REFERENCE?

    Both are turned upright as their EXIF orientation says, as every viewer shows them; points refer
    to the upright images. Weights are looked for in --weights, else in a folder `weights` here.
    """
    if points and grid is not None:
        raise NemfError("--points and --grid do not go together: give one of them")
    if out is not None:
        _check_ending(out)
    import numpy as np

    from experiments.own_images import (
        answers,
        check_inside,
        chosen_matchers,
        grid_points,
        read_points,
    )
    from nemf.match_pictures import draw_matches
    from nemf.photographs import upright_pixels

    asked = read_points(points) if points else None
    pixels = [upright_pixels(path) for path in (query, reference)]
    if asked is None:
        asked = grid_points(pixels[0].shape[:2], grid or _GRID)
    check_inside(asked, pixels[0].shape[:2], str(query))
    find_weights(weights, Path(), download)
    chosen = chosen_matchers(matchers, parse_options(options), _RESULTS)
    found = [answers(one, *pixels, asked) for one in chosen]
    placed = [matches.points.detach().cpu().numpy() for matches in found]
    for one, at in zip(chosen, placed, strict=True):
        if len(at) and np.isnan(at).any(1).all():
            log.warning(
                "%s answers no point: a photograph of %dx%d or %dx%d px may be too small or too "
                "narrow for it; enlarge or crop it, or try --matcher nearest_small",
                one.name, *(side for image in pixels for side in image.shape[1::-1]),
            )  # fmt: skip
    if out is None and not as_json:
        out = _RESULTS / "match" / f"{query.stem}-{reference.stem}.png"
    if out is not None:
        rows = {one.label: xy for one, xy in zip(chosen, placed, strict=True)}
        draw_matches(*pixels, asked, rows, out, (query.name, reference.name))
    images = [_image(path, p) for path, p in zip((query, reference), pixels, strict=True)]
    if as_json:
        content = {
            "query": images[0],
            "reference": images[1],
            "points": asked.tolist(),
            "matchers": [
                one.as_dict()
                | {
                    "answers": [[_number(v) for v in xy] for xy in at.tolist()],
                    "confidence": None
                    if matches.confidence is None
                    else [_number(v) for v in matches.confidence.tolist()],
                }
                for one, at, matches in zip(chosen, placed, found, strict=True)
            ],
            "picture": None if out is None else str(out),
        }
        click.echo(json.dumps(content, indent=1))
        return
    for image in images:
        turned = ", turned upright as its EXIF says" if image["exif_orientation"] != 1 else ""
        click.echo(f"{image['file']}: {image['width']}x{image['height']} px{turned}")
    for one, at in zip(chosen, placed, strict=True):
        click.echo(one.described())
        for k, ((x, y), (u, v)) in enumerate(zip(asked, at, strict=True), 1):
            answer = "no answer" if u != u else f"{u:.1f},{v:.1f}"
            click.echo(f"{k:>4}  {x:.1f},{y:.1f} -> {answer}")
    click.echo(out)


def _check_ending(out: Path) -> None:
    """NemfError before the work for a picture that could not be written after it."""
    from nemf.match_pictures import ENDINGS

    if out.suffix.lower() not in ENDINGS:
        raise NemfError(f"{out}: give a name that ends in {', '.join(ENDINGS)}")


def _image(path: Path, pixels: np.ndarray) -> dict[str, Any]:
    from nemf.photographs import orientation

    height, width = pixels.shape[:2]
    turned = orientation(path)
    return {"file": str(path), "width": width, "height": height, "exif_orientation": turned}


def _number(value: float) -> float | None:
    return None if value != value else value
