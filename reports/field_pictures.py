"""Pictures of NeMF's search and of matching fields, drawn from arrays (NeMF, figs. 5 and 6).

Torch-free: :mod:`experiments.field_figures` computes what is drawn here. The query image is the
paper's target, the reference image its source.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from reports.figure_files import PAGE_IN, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mpl_toolkits.mplot3d import Axes3D

_MARKS = {  # in Okabe and Ito's colours: marker, colour, size in points
    "query keypoint": ("D", "#56B4E9", 4.5),
    "true position": ("*", "#D55E00", 8),
    "answer": ("o", "#F0E442", 4.5),
}
# Displacement as a colour: blue to orange along x, dark to light along y. Both axes can be told
# apart by colour-blind readers, unlike the customary wheel of hues.
_LEFT, _RIGHT = np.array([0.12, 0.40, 0.85]), np.array([0.95, 0.55, 0.05])


# -- the search -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SearchState:
    """The dense field after some ``iterations``: ``field`` float (H, W, 2), for every pixel of the
    query image the matched position, px of the reference image."""

    iterations: int
    field: np.ndarray


def draw_search(
    content: dict[str, Any],
    states: Sequence[SearchState],
    query: np.ndarray,
    reference: np.ndarray,
    base: Path,
) -> list[Path]:
    """The reference image warped onto the query by every state, and below its displacements.

    ``content``: ``full_colour_px`` (:func:`full_colour_px`), and ``states`` in the order of
    ``states``, each with the ``text`` printed below. Images uint8 (H, W, 3). NemfError if a
    file cannot be written.
    """
    columns, largest = len(states) + 1, content["full_colour_px"]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, columns)
        _picture(grid[0, 0], query, "query")
        _picture(grid[1, 0], reference, "reference")
        for column, (state, entry) in enumerate(zip(states, content["states"], strict=True), 1):
            move = displacement(state.field)
            name = "start" if state.iterations == 0 else f"iteration {state.iterations}"
            _picture(grid[0, column], warped(reference, state.field), name)
            _picture(grid[1, column], flow_colours(move, largest), "")
            grid[1, column].set_xlabel(entry["text"], labelpad=2, fontsize=6)
        _key(grid[1, 1], largest)

    tall = [image.shape[0] / image.shape[1] for image in (query, reference)]
    cells = float(np.clip(tall[0], 0.4, 1.6) + np.clip(max(tall), 0.4, 1.6))
    size = (PAGE_IN, cells * (PAGE_IN / columns - 0.04) + 0.65)
    return write_figure(base, content, size, draw)


def full_colour_px(states: Sequence[SearchState]) -> float:
    """The displacement per axis that is drawn in full colour: what 98 % of all stay below, so that
    single outliers do not make the rest pale."""
    moves = [np.abs(displacement(state.field)).ravel() for state in states]
    return max(1.0, float(np.percentile(np.concatenate(moves), 98)))


def warped(reference: np.ndarray, field: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): the reference image read at ``field`` (H, W, 2) px, bilinear; white outside
    of it."""
    at = [field[..., 1], field[..., 0]]
    channels = [
        map_coordinates(reference[..., c].astype(np.float32), at, order=1, cval=255.0)
        for c in range(3)
    ]
    return np.clip(np.stack(channels, -1).round(), 0, 255).astype(np.uint8)


def displacement(field: np.ndarray) -> np.ndarray:
    """float (H, W, 2): matched position minus own position, px."""
    rows, cols = np.mgrid[: field.shape[0], : field.shape[1]]
    return field - np.stack([cols, rows], -1)


def flow_colours(move: np.ndarray, largest: float) -> np.ndarray:
    """float (H, W, 3) RGB of displacements (H, W, 2) px: hue from left (blue) over none (grey) to
    right (orange), lightness from up (dark) to down (light); full at ``largest`` px."""
    x, y = (np.clip(move[..., k : k + 1] / largest, -1, 1) for k in (0, 1))
    grey = np.array([0.55, 0.55, 0.55])
    hue = np.where(x < 0, grey + (grey - _LEFT) * x, grey + (_RIGHT - grey) * x)
    return np.where(y < 0, hue * (1 + 0.8 * y), hue + (1 - hue) * 0.8 * y)


def _key(axes: Axes, largest: float) -> None:
    """What the colours mean, in a corner of the first state."""
    steps = np.linspace(-largest, largest, 41)
    inset = axes.inset_axes((0.02, 0.02, 0.3, 0.3))
    inset.set_anchor("SW")
    inset.imshow(
        flow_colours(np.stack(np.meshgrid(steps, steps), -1), largest),
        extent=(-1, 1, 1, -1), aspect="equal",
    )  # fmt: skip
    inset.set(xticks=[], yticks=[])
    inset.plot(0, 0, "+", color="white", ms=3, mew=0.6)


# -- the field of one keypoint --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KeypointField:
    """A matcher's field of one query keypoint over the reference image.

    ``values`` float (h, w), not smoothed, at the grid of ``xs`` (w,) and ``ys`` (h,), px of the
    reference image; ``what`` the values are; the matcher's ``answer`` (2,) px, NaN = none.
    """

    label: str
    what: str
    xs: np.ndarray
    ys: np.ndarray
    values: np.ndarray
    answer: np.ndarray

    def smoothed(self, sigma_px: float) -> np.ndarray:
        """The values under a Gaussian of that deviation, the border repeated beyond it."""
        step_px = (self.ys[1] - self.ys[0], self.xs[1] - self.xs[0])
        return gaussian_filter(self.values, [sigma_px / s for s in step_px], mode="nearest")


def draw_keypoint_fields(
    content: dict[str, Any],
    fields: Sequence[KeypointField],
    query: np.ndarray,
    reference: np.ndarray,
    base: Path,
) -> list[Path]:
    """Every field as contours over the reference image and, below, as a surface.

    ``content``: ``query_px`` and ``true_px`` (2,), ``sigma_px``, and ``fields`` with a ``text`` of
    each, printed below. Images uint8 (H, W, 3). NemfError if a file cannot be written.
    """
    columns = len(fields) + 1
    true = np.array(content["true_px"], float)

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(2, columns, height_ratios=(1, 1.1))
        left = figure.add_subplot(grid[0, 0])
        _picture(left, query, "query")
        _mark(left, np.array(content["query_px"]), "query keypoint")
        below = figure.add_subplot(grid[1, 0])
        _picture(below, reference, "reference")
        _mark(below, true, "true position")
        for column, (field, entry) in enumerate(zip(fields, content["fields"], strict=True), 1):
            values = field.smoothed(content["sigma_px"])
            axes = figure.add_subplot(grid[0, column])
            _contours(figure, axes, field, values, reference, true)
            axes.set_xlabel(entry["text"], labelpad=2)
            _surface(figure.add_subplot(grid[1, column], projection="3d"), field, values, true)
        unique: dict[str, Any] = {}
        for axes in figure.axes:
            unique |= {line.get_label(): line for line in axes.lines if line.get_label() in _MARKS}
        figure.legend(
            unique.values(), unique, loc="outside upper center", ncols=len(unique), frameon=False
        )

    return write_figure(base, content, (PAGE_IN, 4.3), draw)


def _contours(
    figure: Figure,
    axes: Axes,
    field: KeypointField,
    values: np.ndarray,
    reference: np.ndarray,
    true: np.ndarray,
) -> None:
    grey = reference.mean(2)
    _picture(axes, 255 - (255 - grey) * 0.45, "", cmap="gray", vmin=0, vmax=255)
    axes.set_title("\n".join(textwrap.wrap(field.label, 40)))
    filled = axes.contourf(field.xs, field.ys, values, levels=12, cmap="viridis", alpha=0.55)
    axes.contour(field.xs, field.ys, values, levels=12, cmap="viridis", linewidths=0.5)
    bar = figure.colorbar(filled, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label(field.what, fontsize=6)
    bar.ax.tick_params(labelsize=5.5, width=0.4, length=2)
    _mark(axes, true, "true position")
    _mark(axes, field.answer, "answer")


def _surface(axes: Axes3D, field: KeypointField, values: np.ndarray, true: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    x, y = np.meshgrid(field.xs, field.ys)
    axes.plot_surface(
        x, y, values, cmap="viridis", rcount=64, ccount=64, lw=0, antialiased=False, rasterized=True
    )
    for name, point in (("true position", true), ("answer", field.answer)):
        marker, colour, _ = _MARKS[name]
        if np.isnan(point).any():
            continue
        height = values[
            int(np.abs(field.ys - point[1]).argmin()), int(np.abs(field.xs - point[0]).argmin())
        ]
        top = values.max() + 0.05 * np.ptp(values)
        axes.plot([point[0]] * 2, [point[1]] * 2, [height, top], color=colour, lw=0.8, zorder=9)
        tip = [[v] for v in (*point, top)]
        axes.plot(*tip, marker, color=colour, mec="black", mew=0.4, ms=5, zorder=10)
    axes.set(xlim=field.xs[[0, -1]], ylim=field.ys[[-1, 0]], xlabel="x (px)", ylabel="y (px)")
    axes.set_box_aspect(
        (np.ptp(field.xs), np.ptp(field.ys), 0.6 * max(np.ptp(field.xs), 1)), zoom=1.1
    )
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=5.5, pad=-3)
    axes.xaxis.labelpad = axes.yaxis.labelpad = -8
    axes.view_init(elev=40, azim=-70)


def _mark(axes: Axes, point: np.ndarray, name: str) -> None:
    marker, colour, size = _MARKS[name]
    if not np.isnan(point).any():
        axes.plot(
            *point[:, None], marker, color=colour, mec="black", mew=0.5, ms=size, label=name, ls=""
        )


def _picture(axes: Axes, image: np.ndarray, title: str, **options: Any) -> None:
    axes.imshow(image, **options)
    axes.set(xticks=[], yticks=[], autoscale_on=False, title=title)
    for spine in axes.spines.values():
        spine.set_visible(False)
