"""A picture of one prediction file's scores (matplotlib, no display needed)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemf.files import write_whole

_ALPHA = 0.1  # of the bars, if it was scored


def draw_scores(records: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """PCK over alpha under every protocol (left), and per class at one alpha under the first
    (right), with their intervals, as PNG.

    ``records``: score records (:mod:`reports.records`) of one prediction file by the name that the
    legend gives them. Averaged as the protocol says. NemfError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (name, first), *_ = records.items()
    alpha = min(first["alphas"], key=lambda a: abs(a - _ALPHA))
    classes = [e for e in _entries(first, "class") if e["alpha"] == alpha]
    figure = Figure(figsize=(9, max(3.6, 0.24 * len(classes) + 1)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, (label, record) in enumerate(records.items()):
        entries = sorted(_entries(record, "all"), key=lambda e: e["alpha"])
        alphas, means, lows, highs = zip(*(_percent(e) for e in entries), strict=True)
        (line,) = left.plot(alphas, means, ("-", "--", ":")[number % 3], marker=".", label=label)
        left.fill_between(alphas, lows, highs, color=line.get_color(), alpha=0.15, lw=0)
    left.set(xlabel="alpha", ylabel="PCK (%)", ylim=(0, 100), title="all pairs")
    left.legend(fontsize=7, frameon=False)
    _, means, lows, highs = zip(*(_percent(e) for e in classes), strict=True)
    names = [e["value"] for e in classes]
    right.barh(names, means, color="C0", alpha=0.6)
    right.hlines(names, lows, highs, color="black", lw=1)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=8)
    right.set(xlabel="PCK (%)", xlim=(0, 100), title=f"{name}, alpha {alpha:g}")
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    meta = first["predictions"]
    kind = "SYNTHETIC " if meta["synthetic"] else ""
    title = f"{meta['matcher']['label']} on {kind}{meta['title']} {meta['split']}"
    figure.suptitle(f"{title}, {first['n_pairs']} pairs", fontsize=11)
    write_whole(file, lambda temporary: figure.savefig(temporary, format="png"))


def _entries(record: Mapping[str, Any], group: str) -> list[dict[str, Any]]:
    averaging = record["protocol"]["averaging"]
    return [e for e in record["metrics"] if (e["group"], e["averaging"]) == (group, averaging)]


def _percent(entry: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Alpha, mean and bounds; without an interval the bounds are NaN and not drawn."""
    low, high = (float("nan") if entry[k] is None else entry[k] for k in ("low", "high"))
    return entry["alpha"], 100 * entry["pck"], 100 * low, 100 * high
