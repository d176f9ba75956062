"""What all figures share: style, caption, and three files each (PNG, PDF, JSON). Torch-free.

A figure is drawn from a ``content``, a dict with every number that the picture shows, where they
come from, and the ``caption``. The content is the JSON beside the picture.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemf.errors import NemfError
from nemf.files import write_text, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a conference paper prints: one column, and the text's width over two.
COLUMN_IN, PAGE_IN = 3.3, 6.9
_CAPTION_PT = 6.0
_CHARACTER_EM, _LINE_EM = 0.53, 1.3  # mean width and height of the caption's letters
_STYLE = {
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "axes.linewidth": 0.5,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,  # text stays text
}
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class CannotDraw(NemfError):
    """What a figure needs is not there; the message says what, and how to get it."""


def palette() -> list[tuple[float, float, float]]:
    """Ten colours that colour-blind readers can tell apart."""
    import seaborn

    return list(seaborn.color_palette("colorblind"))


def write_figure(
    base: Path,
    content: dict[str, Any],
    size_in: tuple[float, float],
    draw: Callable[[Figure], None],
) -> list[Path]:
    """Writes ``<base>.png``, ``.pdf`` and ``.json``, each whole or not at all, and returns them.

    ``draw`` fills an empty figure of ``size_in`` (width, height), in which the lines of
    ``content["caption"]`` come below. The same content gives the same bytes. NemfError if a file
    cannot be written.
    """
    import matplotlib
    import seaborn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = size_in
    em_in = _CAPTION_PT / 72
    lines = textwrap.wrap(content["caption"], int(width / (em_in * _CHARACTER_EM)))
    files = [base.parent / f"{base.name}.{ending}" for ending in ("png", "pdf", "json")]
    with matplotlib.rc_context(seaborn.axes_style("whitegrid") | _STYLE):
        size = (width, height + len(lines) * em_in * _LINE_EM)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=_CAPTION_PT)
        # No date, so that the same content gives the same bytes.
        formats = {"png": {"dpi": 300}, "pdf": {"dpi": 300, "metadata": {"CreationDate": None}}}
        for file, (ending, options) in zip(files, formats.items(), strict=False):
            write_whole(file, lambda to, e=ending, o=options: figure.savefig(to, format=e, **o))
    text = json.dumps(content, indent=1, allow_nan=False, default=_plain)
    write_text(files[-1], text + "\n")
    return files


def or_none(values: np.ndarray) -> Any:
    """Nested lists of an array, null for NaN: JSON has no NaN."""
    array = np.asarray(values, np.float64).round(6)
    return np.where(np.isnan(array), None, array).tolist()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
