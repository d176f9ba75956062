"""Pictures of matches (matplotlib, no display needed)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemf.errors import NemfError
from nemf.files import write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist

_WIDEST_IN = 16  # both images side by side
# Okabe and Ito's colours: told apart by colour-blind readers and in grey print by the numbers.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def draw_matches(
    query: np.ndarray,
    reference: np.ndarray,
    points: Sequence[Sequence[float]] | np.ndarray,
    answers: np.ndarray,
    file: Path,
) -> None:
    """Query image (left) with numbered points, reference image (right) with the answers, as PNG.

    ``query``, ``reference`` uint8 (H, W, 3); ``points``, ``answers`` (N, 2) px of their image, NaN
    = no answer (named in the caption). NemfError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import ConnectionPatch
    from matplotlib.text import Annotation

    if file.suffix.lower() != ".png":
        raise NemfError(f"{file}: pictures are PNG; give a name that ends in .png")
    xy, uv = np.asarray(points, float).reshape(-1, 2), np.asarray(answers, float).reshape(-1, 2)
    widths = [query.shape[1] / query.shape[0], reference.shape[1] / reference.shape[0]]
    height = float(np.clip(_WIDEST_IN / sum(widths), 1, 4))
    size = (np.clip(height * sum(widths), 3, _WIDEST_IN), height + 0.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=widths)
    unanswered = [str(k + 1) for k in range(len(xy)) if np.isnan(uv[k]).any()]
    for axes, image, title in ((left, query, "query"), (right, reference, "reference")):
        axes.imshow(image)
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)

    def draw(artist: Artist, order: int) -> None:
        # On the figure, not on the axes: links cross both axes, and numbers belong on top of them.
        artist.set(in_layout=False, zorder=order)
        figure.add_artist(artist)

    for k, (p, q) in enumerate(zip(xy, uv, strict=True)):
        colour = COLOURS[k % len(COLOURS)]
        for axes, point in ((left, p), (right, q)):
            if np.isnan(point).any():
                continue
            draw(
                Line2D(
                    *point[:, None], transform=axes.transData, marker="o", color=colour,
                    markeredgecolor="black", markersize=7,
                ),
                order=3,
            )  # fmt: skip
            draw(
                Annotation(
                    str(k + 1), point, xycoords=axes.transData, xytext=(5, 5),
                    textcoords="offset points", fontsize=8,
                    bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
                ),
                order=4,
            )  # fmt: skip
        if not np.isnan(q).any():
            ends = {"axesA": left, "axesB": right, "coordsA": "data", "coordsB": "data"}
            draw(ConnectionPatch(p, q, **ends, color=colour, lw=1, annotation_clip=False), order=2)
    if unanswered:
        figure.supxlabel(f"no answer for {', '.join(unanswered)}", fontsize=9)
    write_whole(file, lambda temporary: figure.savefig(temporary, format="png"))
