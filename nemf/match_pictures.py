"""Pictures of matches: two images side by side with numbered points (matplotlib, no display).

matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from nemf.errors import NemfError
from nemf.files import write_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers and in grey print by the numbers.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
ENDINGS = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
_WIDEST_IN = 16  # both images side by side
_HIGHEST_IN = 4  # one row of them
_DPI = 120
_LINKED = 8  # more lines than that hide what they lead to


def match_figure(
    query: np.ndarray,
    reference: np.ndarray,
    points: Sequence[Sequence[float]] | np.ndarray,
    answers: Mapping[str, np.ndarray],
    titles: tuple[str, str] = ("query", "reference"),
) -> Figure:
    """A row per entry of ``answers`` (label, may be empty → (N, 2) px of the reference, NaN = no
    answer, named in a caption): the query image with the numbered ``points`` (N, 2) px, and the
    reference image with the answers in the same colours.

    ``query``, ``reference`` uint8 (H, W, 3). The figure needs no display, belongs to no window and
    shows itself in a notebook. ValueError if there are not as many answers as points.
    """
    xy = np.asarray(points, float).reshape(-1, 2)
    rows = {label: np.asarray(uv, float).reshape(-1, 2) for label, uv in answers.items()}
    for label, uv in rows.items():
        if len(uv) != len(xy):
            raise ValueError(f"{label or 'the answers'}: {len(uv)} answers to {len(xy)} points")
    widths = [image.shape[1] / image.shape[0] for image in (query, reference)]
    height = float(np.clip(_WIDEST_IN / sum(widths), 1, _HIGHEST_IN))
    missing = []
    for label, uv in rows.items():
        none = [str(k + 1) for k in range(len(xy)) if np.isnan(uv[k]).any()]
        if none:
            missing.append(f"{label + ': ' if label else ''}no answer for {', '.join(none)}")
    lines = 1 + any(rows) + len(missing)  # of the first row's title and of the caption
    size = (
        np.clip(height * sum(widths), 3, _WIDEST_IN),
        (height + 0.25) * len(rows) + 0.25 * lines,
    )
    figure = _empty_figure(size)
    grid = figure.subplots(len(rows), 2, squeeze=False, width_ratios=widths)
    for number, ((label, uv), pair) in enumerate(zip(rows.items(), grid, strict=True)):
        for axes, image, title in zip(pair, (query, reference), titles, strict=True):
            _show(axes, image)
            text = title if number == 0 else ""
            if label and axes is pair[1]:
                text = f"{text}\n{label}" if text else label
            axes.set_title(text, fontsize=10)
        _draw_row(figure, pair, xy, uv)
    if missing:
        figure.supxlabel("\n".join(missing), fontsize=9)
    return figure


def draw_matches(
    query: np.ndarray,
    reference: np.ndarray,
    points: Sequence[Sequence[float]] | np.ndarray,
    answers: np.ndarray | Mapping[str, np.ndarray],
    file: Path,
    titles: tuple[str, str] = ("query", "reference"),
) -> None:
    """Writes :func:`match_figure` (of one set of answers, or of several by label) into ``file``, by
    its ending. NemfError for another ending or if the file cannot be written."""
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise NemfError(f"{file}: give a name that ends in {', '.join(ENDINGS)}")
    rows = answers if isinstance(answers, Mapping) else {"": answers}
    figure = match_figure(query, reference, points, rows, titles)
    write_whole(file, lambda temporary: figure.savefig(temporary, format=ending[1:]))


def _empty_figure(size_in: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure that a notebook shows without pyplot having been set up."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    figure = Shown(figsize=size_in, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _show(axes: Axes, image: np.ndarray) -> None:
    """Draws ``image`` (a large one in fewer pixels) in its own pixel coordinates."""
    height, width = image.shape[:2]
    factor = max(1, int(max(width, height) / (_DPI * _WIDEST_IN)))
    shown = np.asarray(PIL.Image.fromarray(image).reduce(factor)) if factor > 1 else image
    axes.imshow(shown, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set_axis_off()


def _draw_row(figure: Figure, pair: Sequence[Axes], xy: np.ndarray, uv: np.ndarray) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import ConnectionPatch
    from matplotlib.text import Annotation

    left, right = pair

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
        if not np.isnan(q).any() and len(xy) <= _LINKED:
            ends = {"axesA": left, "axesB": right, "coordsA": "data", "coordsB": "data"}
            draw(ConnectionPatch(p, q, **ends, color=colour, lw=1, annotation_clip=False), order=2)
