"""The history of regression tracking: a page, and a picture of the metric over commits.

Everything here reads the content of ``history.json``, which docs/regressions.md describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemf.files import write_whole
from reports.regression_page import cause_text, commit_text, escaped, write_page


def write_history(content: Mapping[str, Any], folder: Path) -> tuple[str, list[Path]]:
    """The page in Markdown, and ``history.{md,json,png,pdf}`` in a folder of their own below
    ``folder``. NemfError if they cannot be written."""
    first, last = content["commits"][0], content["commits"][-1]
    place = folder / f"history-{first['label']}-{last['label']}"
    text = history_page(content)
    return text, [*write_page(place, "history", content, text), *_draw(content, place)]


def history_page(content: Mapping[str, Any]) -> str:
    """The commits of a history with the metric of each cell, and its change points, in Markdown."""
    commits = content["commits"]
    lines = [f"## {len(commits)} commits, PCK@{content['alpha']:g} in percent", ""]
    if not content["changes"]:
        lines += ["No change point.", ""]
    else:
        lines += ["| commit | cell | against | verdict | why | changed |"]
        lines += ["|---|---|---|---|---|---|"]
        for change in content["changes"]:
            texts = "<br>".join(f"{r['watch']}: {r['text']}" for r in change["reasons"])
            commit = commits[change["at"]]
            lines.append(
                f"| {commit_text(commit)} | {change['cell']} | `{change['since']}` | "
                f"{change['verdict']} | "
                f"{escaped(texts)} | {cause_text(change)} |"
            )
        lines.append("")
    names = list(content["series"])
    lines += [f"| commit | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for at, commit in enumerate(commits):
        values = []
        for name in names:
            point = content["series"][name][at]
            values.append("–" if point["pck"] is None else f"{100 * point['pck']:.1f}")
        lines.append(f"| {commit_text(commit)} | {' | '.join(values)} |")
    lines.append("")
    for commit in commits:
        if commit["problem"]:
            lines.append(f"- `{commit['label']}`: {escaped(commit['problem'])}")
    return "\n".join(lines) + "\n"


def _draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """``history.png`` and ``history.pdf``: the metric of every cell over the commits with its band;
    change points as lines (red: worse, green: improved, grey: another dataset or protocol), commits
    without a prediction as gaps. NemfError if they cannot be written."""
    import matplotlib
    import seaborn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"worse": "#D55E00", "improved": "#009E73", "not comparable": "0.5"}
    series, commits = content["series"], content["commits"]
    files = [folder / "history.png", folder / "history.pdf"]
    style = {"pdf.fonttype": 42, "font.size": 8, "axes.titlesize": 8, "grid.linewidth": 0.4}
    with matplotlib.rc_context(seaborn.axes_style("whitegrid") | style):
        columns = min(2, len(series))
        rows = -(-len(series) // columns)
        size = (3.8 * columns, 1.9 * rows + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axes in list(grid.flat)[len(series) :]:
            axes.set_visible(False)
        for axes, (name, points) in zip(grid.flat, series.items(), strict=False):
            pck, low, high = (
                [_percent(point[key]) for point in points] for key in ("pck", "low", "high")
            )
            axes.plot(range(len(points)), pck, color="#0072B2", marker="o", ms=3, lw=1)
            axes.fill_between(range(len(points)), low, high, color="#0072B2", alpha=0.2, lw=0)
            for change in content["changes"]:
                if change["cell"] == name:
                    axes.axvline(
                        change["at"] - 0.5, color=colours[change["verdict"]], lw=1.2, ls="--"
                    )
            axes.set_title(name)
            axes.set_xlim(-0.5, len(points) - 0.5)
            axes.set_xticks(range(len(points)), [c["label"] for c in commits], rotation=90)
            seaborn.despine(ax=axes)
        kind = "SYNTHETIC stand-ins, " if content["synthetic"] else ""
        figure.suptitle(f"{kind}PCK@{content['alpha']:g} (%) over commits, 95 % bands", fontsize=8)
        for file in files:
            ending = file.suffix[1:]
            metadata = {"CreationDate": None} if ending == "pdf" else None
            write_whole(
                file,
                lambda path, ending=ending, metadata=metadata: figure.savefig(
                    path, format=ending, dpi=150, metadata=metadata
                ),
            )
    return files


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value
