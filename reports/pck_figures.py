"""Figures of PCK: by class, over alpha, and by difficulty. Torch-free.

Every number comes from the functions that make the score records (:mod:`reports.records`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemf.pairs import FLAGS
from nemf.scoring import Protocol
from reports.comparison import CURVE_ALPHAS, CURVE_END, Run
from reports.figure_files import (
    COLUMN_IN,
    DASHES,
    MARKERS,
    PAGE_IN,
    CannotDraw,
    palette,
    write_figure,
)
from reports.figure_sources import annotated_flags, basis, subject
from reports.records import LEVEL, PairScores, alpha_name, metrics, score_pairs
from reports.statistics import dyadic_mean
from reports.wording import FLAG_LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUMBERS = ("pck", "low", "high", "n_pairs", "n_keypoints", "n_images")


def _scored(runs: Sequence[Run], protocol: Protocol, alpha: float) -> dict[str, Any]:
    """A content with the :func:`reports.figure_sources.basis` of the runs and their ``entries``:
    those of a score record at ``alpha`` in the protocol's averaging, with the ``label``."""
    scores = [score_pairs(run.predictions, protocol, [alpha]) for run in runs]
    entries = [
        {"label": run.label} | {key: entry[key] for key in ("group", "value", "alpha", *_NUMBERS)}
        for run, of_run in zip(runs, scores, strict=True)
        for entry in metrics(of_run)
        if entry["averaging"] == protocol.averaging
    ]
    return basis(runs, scores) | {"flags": annotated_flags(scores[0]), "entries": entries}


# -- classes --------------------------------------------------------------------------------------


def class_figure(runs: Sequence[Run], protocol: Protocol, alpha: float) -> dict[str, Any]:
    """Content of the heat map: PCK at ``alpha`` of every run on every class and on all pairs.
    CannotDraw if there is one class only."""
    content = _scored(runs, protocol, alpha)
    content["entries"] = [e for e in content["entries"] if e["group"] in ("class", "all")]
    if len({e["value"] for e in content["entries"] if e["group"] == "class"}) < 2:
        raise CannotDraw(f"{content['dataset']['title']} has a single class")
    del content["flags"]
    caption = (
        f"PCK@{alpha:g} in percent by class (number of its pairs); all: mean over all pairs. "
        f"{subject(content)}"
    )
    return {"figure": "classes", "caption": caption, "alpha": alpha, **content}


def draw_classes(content: dict[str, Any], base: Path) -> list[Path]:
    """Heat map with the numbers printed: a row per class, a column per matcher. NemfError if a
    file cannot be written."""
    labels = [matcher["label"] for matcher in content["matchers"]]
    cells = {(e["group"], e["value"], e["label"]): e for e in content["entries"]}
    classes = sorted({value for group, value, _ in cells if group == "class"})
    rows = [*(("class", name) for name in classes), ("all", "all")]
    grid = np.array([[100 * cells[*row, label]["pck"] for label in labels] for row in rows])
    names = [f"{row[1]} ({cells[*row, labels[0]]['n_pairs']})" for row in rows]

    def draw(figure: Figure) -> None:
        import seaborn

        axes = figure.subplots()
        seaborn.heatmap(
            grid, ax=axes, vmin=0, vmax=100, cmap="cividis", annot=True, fmt=".1f",
            annot_kws={"fontsize": 6.5}, linewidths=0.4, xticklabels=labels, yticklabels=names,
            cbar_kws={"label": "PCK (%)", "aspect": 40, "pad": 0.02},
        )  # fmt: skip
        axes.axhline(len(classes), color="white", lw=2)
        axes.tick_params(axis="x", rotation=30, length=0)
        axes.tick_params(axis="y", rotation=0, length=0)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")

    width = COLUMN_IN if len(labels) <= 5 else PAGE_IN
    return write_figure(base, content, (width, 1.1 + 0.17 * len(rows)), draw)


# -- curves ---------------------------------------------------------------------------------------


def curve_figure(runs: Sequence[Run], protocol: Protocol, alpha: float) -> dict[str, Any]:
    """Content of the curves: PCK of every run over alpha with its interval, and at ``alpha``."""
    alphas = sorted({*CURVE_ALPHAS, alpha})
    scores = [score_pairs(run.predictions, protocol, alphas) for run in runs]
    content = basis(runs, scores)
    content["entries"] = [
        {"label": run.label, "alpha": at, **_overall(of_run, at)}
        for run, of_run in zip(runs, scores, strict=True)
        for at in alphas
    ]
    caption = (
        f"PCK over alpha with {content['level']:.0%} bands (pointwise; images, not pairs, count as "
        f"independent); in the legend PCK@{alpha:g} with its interval. {subject(content)}"
    )
    return {"figure": "curves", "caption": caption, "alpha": alpha, **content}


def _overall(scores: PairScores, alpha: float) -> dict[str, float | None]:
    """PCK of all pairs and its interval as score records have them (which hold few alphas)."""
    n, hits, a, b = (
        scores.frame[c].to_numpy() for c in ("n", alpha_name(alpha), "image_a", "image_b")
    )
    weights = n if scores.protocol.averaging == "point" else None
    found = dyadic_mean(hits / n, a, b, weights=weights, level=LEVEL, bounds=(0.0, 1.0))
    bounds = {"low": found.low, "high": found.high}
    return {"pck": found.mean} | {k: None if np.isnan(v) else v for k, v in bounds.items()}


def draw_pck_curves(content: dict[str, Any], base: Path) -> list[Path]:
    """A curve with its band per matcher, told apart by colour and dashes. NemfError if a file
    cannot be written."""
    labels = [matcher["label"] for matcher in content["matchers"]]

    def draw(figure: Figure) -> None:
        import seaborn
        from matplotlib.ticker import MultipleLocator

        axes, colours = figure.subplots(), palette()
        for k, label in enumerate(labels):
            mine = [e for e in content["entries"] if e["label"] == label]
            (at,) = (e for e in mine if e["alpha"] == content["alpha"])
            mine = [e for e in mine if e["alpha"] <= CURVE_END]
            x = [e["alpha"] for e in mine]
            middle, low, high = (_percent(mine, key) for key in ("pck", "low", "high"))
            colour = colours[k % len(colours)]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
            axes.plot(
                x, middle, color=colour, ls=DASHES[k % len(DASHES)], label=f"{label}: {_text(at)}"
            )
        if content["alpha"] <= CURVE_END:
            axes.axvline(content["alpha"], color="0.3", lw=0.8, ls=":", zorder=1)
        axes.set(xlabel="alpha", ylabel="PCK (%)", xlim=(0, CURVE_END), ylim=(0, None))
        axes.xaxis.set_major_locator(MultipleLocator(0.05))
        seaborn.despine(ax=axes)
        figure.legend(loc="outside upper left", frameon=False, handlelength=3)

    return write_figure(base, content, (COLUMN_IN, 2.3 + 0.14 * len(labels)), draw)


# -- difficulty -----------------------------------------------------------------------------------


def difficulty_figure(runs: Sequence[Run], protocol: Protocol, alpha: float) -> dict[str, Any]:
    """Content of the breakdown: PCK at ``alpha`` of every run for every value of every difficulty
    flag. CannotDraw if no flag is annotated with two values."""
    content = _scored(runs, protocol, alpha)
    if not content["flags"]:
        title = content["dataset"]["title"]
        raise CannotDraw(f"{title} has no two levels of viewpoint, scale, truncation or occlusion")
    content["entries"] = [e for e in content["entries"] if e["group"] in content["flags"]]
    caption = (
        f"PCK@{alpha:g} by difficulty (number of pairs below each level), with "
        f"{content['level']:.0%} intervals that count images, not pairs, as independent; an open "
        f"marker has none (too few images). {subject(content)}"
    )
    return {"figure": "difficulty", "caption": caption, "alpha": alpha, **content}


def draw_difficulty(content: dict[str, Any], base: Path) -> list[Path]:
    """A panel per flag, in it a group of points with intervals per level. NemfError if a file
    cannot be written."""
    labels = [matcher["label"] for matcher in content["matchers"]]
    flags = [flag for flag in FLAGS if flag in content["flags"]]

    def draw(figure: Figure) -> None:
        import seaborn

        panels = figure.subplots(1, len(flags), sharey=True, squeeze=False)[0]
        for axes, flag in zip(panels, flags, strict=True):
            _draw_flag(axes, flag, [e for e in content["entries"] if e["group"] == flag], labels)
            seaborn.despine(ax=axes)
        panels[0].set(ylabel="PCK (%)", ylim=(-1, None))  # a little room for markers at 0
        handles = panels[0].get_legend_handles_labels()
        columns = min(len(labels), 4)
        figure.legend(*handles, loc="outside upper center", ncols=columns, frameon=False)

    rows = -(-len(labels) // 4)
    return write_figure(base, content, (PAGE_IN, 1.9 + 0.15 * rows), draw)


def _draw_flag(
    axes: Axes, flag: str, entries: Sequence[dict[str, Any]], labels: Sequence[str]
) -> None:
    colours, names = palette(), FLAG_LEVELS[flag]
    values = sorted({int(e["value"]) for e in entries})
    counts = {int(e["value"]): e["n_pairs"] for e in entries}
    for k, label in enumerate(labels):
        mine = {int(e["value"]): e for e in entries if e["label"] == label}
        shift, colour = 0.7 * ((k + 0.5) / len(labels) - 0.5), colours[k % len(colours)]
        for place, value in enumerate(values):
            pck, low, high = (_percent([mine[value]], key)[0] for key in ("pck", "low", "high"))
            known = not np.isnan(low)
            axes.errorbar(
                place + shift, pck, [[pck - low], [high - pck]] if known else None,
                fmt=MARKERS[k % len(MARKERS)], ms=3, lw=0.9, capsize=1.2, color=colour,
                mfc=colour if known else "white", label=label if place == 0 else None,
            )  # fmt: skip
    levels = [names[v] if v < len(names) else str(v) for v in values]
    axes.set_xticks(
        range(len(values)), [f"{n}\n({counts[v]})" for n, v in zip(levels, values, strict=True)]
    )
    axes.set(title=flag, xlim=(-0.6, len(values) - 0.4))
    axes.xaxis.grid(False)


def _percent(entries: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return 100 * np.array([np.nan if e[key] is None else e[key] for e in entries])


def _text(entry: dict[str, Any]) -> str:
    pck, low, high = (_percent([entry], key)[0] for key in ("pck", "low", "high"))
    return f"{pck:.1f} [no interval]" if np.isnan(low) else f"{pck:.1f} [{low:.1f}, {high:.1f}]"
