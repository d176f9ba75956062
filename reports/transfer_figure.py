"""Keypoint transfer: pairs of images by matchers, right answers and wrong ones (NeMF, fig. 7)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemf.errors import NemfError
from nemf.scoring import Protocol, correct
from reports.comparison import Run
from reports.figure_files import PAGE_IN, CannotDraw, or_none, write_figure
from reports.figure_sources import basis, subject
from reports.records import alpha_name, keypoint_errors, pair_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAIRS = 4
MATCHERS = 5  # more would be too small to see
RIGHT, WRONG = "#009E73", "#D55E00"  # Okabe and Ito's green and red
_OUTLINE = {"markeredgecolor": "white", "markeredgewidth": 0.4}


def transfer_figure(
    runs: Sequence[Run], protocol: Protocol, alpha: float, pairs: Sequence[str] = ()
) -> dict[str, Any]:
    """Content of the figure: queries, truth and every run's answers on some pairs.

    ``pairs``: ids; by default :data:`PAIRS` spread evenly over the dataset. Of more than
    :data:`MATCHERS` runs those with the highest PCK at ``alpha`` are shown.

    NemfError for a pair that is not among the predictions.
    """
    found = [keypoint_errors(run.predictions, protocol) for run in runs]
    scores = [
        pair_scores(run.predictions, protocol, *lengths, [alpha])
        for run, lengths in zip(runs, found, strict=True)
    ]
    share = [(s.frame[alpha_name(alpha)] / s.frame["n"]).to_numpy() for s in scores]
    order = sorted(range(len(runs)), key=lambda k: -share[k].mean())[:MATCHERS]
    shown = sorted(order)
    content = basis([runs[k] for k in shown], [scores[k] for k in shown])
    first = runs[0].predictions
    starts = np.r_[first.pair_starts, len(first)]
    ids = first.column("pair")[starts[:-1]].tolist()
    numbers = _numbers(ids, pairs, first.meta["title"])
    content["pairs"] = [
        {
            "pair": ids[n],
            "category": str(scores[0].frame["category"].iloc[n]),
            "query_hash": first.column("query_hash")[starts[n]],
            "reference_hash": first.column("reference_hash")[starts[n]],
            "queries": or_none(first.points("query")[starts[n] : starts[n + 1]]),
            "truth": or_none(first.points("true")[starts[n] : starts[n + 1]]),
            "answers": [
                _answers(runs[k], scores[k], *found[k], n, slice(starts[n], starts[n + 1]), alpha)
                for k in shown
            ],
        }
        for n in numbers
    ]
    how = "chosen by hand" if pairs else "spread evenly over the dataset, not by their results"
    left = f" The {len(shown)} of {len(runs)} matchers with the highest PCK are shown."
    caption = (
        f"Keypoint transfer on {len(numbers)} pairs ({how}). Dots: right at alpha {alpha:g}; "
        "crosses: wrong, with a line to the true position (ring); below each picture how many are "
        f"right.{left if len(shown) < len(runs) else ''} {subject(content)}"
    )
    return {"figure": "transfer", "caption": caption, "alpha": alpha, **content}


def _numbers(ids: Sequence[str], wanted: Sequence[str], title: str) -> list[int]:
    if not wanted:
        count = min(PAIRS, len(ids))
        # The middle of equal parts: a dataset sorted by class shows different ones.
        return [int((k + 0.5) * len(ids) / count) for k in range(count)]
    for pair in wanted:
        if pair not in ids:
            raise NemfError(f"there is no pair {pair!r} in {title} (the first one is {ids[0]!r})")
    return [ids.index(pair) for pair in wanted]


def _answers(
    run: Run,
    scores: Any,
    error: np.ndarray,
    length: np.ndarray,
    number: int,
    rows: slice,
    alpha: float,
) -> dict[str, Any]:
    inclusive = scores.protocol.inclusive
    return {
        "label": run.label,
        "points": or_none(run.predictions.points("pred")[rows]),
        "right": correct(error[rows], length[rows], alpha, inclusive=inclusive).tolist(),
        "n_right": int(scores.frame[alpha_name(alpha)].iloc[number]),
        "n": int(scores.frame["n"].iloc[number]),
        "n_unanswered": int(scores.frame["n_none"].iloc[number]),
    }


def draw_transfer(
    content: dict[str, Any], pixels: Mapping[str, np.ndarray], base: Path
) -> list[Path]:
    """A row per pair: the query image, then the reference image with each matcher's answers.

    ``pixels``: uint8 (H, W, 3) images by content hash. CannotDraw if one is missing, NemfError if a
    file cannot be written.
    """
    for entry in content["pairs"]:
        for side in ("query_hash", "reference_hash"):
            if entry[side] not in pixels:
                raise CannotDraw(f"an image of pair {entry['pair']} is not among the given ones")
    columns = 1 + len(content["matchers"])
    cell_in = min(PAGE_IN / columns, 1.7)
    heights = []
    for entry in content["pairs"]:
        shapes = [pixels[entry[side]].shape for side in ("query_hash", "reference_hash")]
        heights.append(max(shape[0] / shape[1] for shape in shapes))
    heights = [float(np.clip(height, 0.4, 1.2)) for height in heights]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
        for row, entry in zip(grid, content["pairs"], strict=True):
            _blank(row[0], pixels[entry["query_hash"]])
            for x, y in entry["queries"]:
                row[0].plot(x, y, "o", color="#F0E442", ms=3, mec="black", mew=0.5)
            row[0].set_xlabel(entry["category"], labelpad=2)
            for axes, answers in zip(row[1:], entry["answers"], strict=True):
                _blank(axes, pixels[entry["reference_hash"]])
                _draw_answers(axes, entry["truth"], answers)
        grid[0][0].set_title("query")
        for axes, matcher in zip(grid[0][1:], content["matchers"], strict=True):
            axes.set_title("\n".join(textwrap.wrap(matcher["label"], int(cell_in * 15))))

    height = sum(heights) * (cell_in - 0.05) + 0.2 * len(heights) + 0.3
    return write_figure(base, content, (cell_in * columns, height), draw)


def _blank(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[], autoscale_on=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_answers(axes: Axes, truth: Sequence[Any], answers: dict[str, Any]) -> None:
    for (x, y), (u, v), right in zip(truth, answers["points"], answers["right"], strict=True):
        if right:
            axes.plot(u, v, "o", color=RIGHT, ms=3.2, **_OUTLINE)
            continue
        axes.plot(x, y, "o", mfc="none", mec="white", ms=3.8, mew=1.6)
        axes.plot(x, y, "o", mfc="none", mec="black", ms=3.8, mew=0.7)
        if u is None or v is None:
            continue
        axes.plot([u, x], [v, y], "-", color=WRONG, lw=0.8)
        axes.plot(u, v, "X", color=WRONG, ms=4, **_OUTLINE)
    text = f"{answers['n_right']} of {answers['n']}"
    if answers["n_unanswered"]:
        text += f", {answers['n_unanswered']} unanswered"
    axes.set_xlabel(text, labelpad=2)
