"""The pages of regression tracking: a summary for a pull request, a history with its picture.

Everything here reads the content of the JSON files that docs/regressions.md describes and computes
nothing new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemf.files import write_whole

_ORDER = ("worse", "not comparable", "improved", "same")


def summary(content: Mapping[str, Any]) -> str:
    """A comparison in Markdown: what to know first, the cells that changed, the others folded."""
    cells = content["cells"]
    lines = [f"## {headline(content)}", ""]
    lines.append(f"{_commit(content['base'])} → {_commit(content['head'])}")
    if any(cell["synthetic"] for cell in cells):
        lines.append("(SYNTHETIC stand-ins: good for noticing changes, no figures to quote)")
    lines.append("")
    changed = [cell for cell in cells if cell["verdict"] != "same"]
    changed.sort(key=lambda cell: (_ORDER.index(cell["verdict"]), cell["cell"]))
    if changed:
        lines += ["| cell | verdict | why | changed |", "|---|---|---|---|"]
        for alike in _grouped(changed):
            cell = alike[0]
            texts = "<br>".join(f"{r['watch']}: {r['text']}" for r in cell["reasons"])
            mark = "**worse**" if cell["verdict"] == "worse" else cell["verdict"]
            mark += "" if cell["guarded"] else " (not guarded)"
            names = "<br>".join(c["cell"] for c in alike)
            lines.append(f"| {names} | {mark} | {_escaped(texts)} | {cause_text(cell)} |")
        lines.append("")
    lines += _details(cells)
    lines += _cost(cells)
    note = content["note"]
    lines.append(
        f"Paired tests on the same pairs, intervals and p from images, Holm-corrected over all "
        f"cells at {content['level']:.0%}; PCK in percent. {note}".rstrip()
    )
    return "\n".join(lines) + "\n"


def _grouped(cells: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Cells that say the same, together: protocols of one prediction often do."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        said = [cell["verdict"], cell["guarded"], cell["reasons"], cell["causes"]]
        groups.setdefault(repr(said), []).append(cell)
    return list(groups.values())


def headline(content: Mapping[str, Any]) -> str:
    """Whether the comparison fails, and how many cells have which verdict."""
    counts = Counter(cell["verdict"] for cell in content["cells"])
    parts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _ORDER if counts[verdict])
    failing = {cell["verdict"] for cell in content["cells"] if cell["fails"]}
    state = "No regression"
    if failing:
        state = "REGRESSION" if "worse" in failing else "NOT COMPARED"
    return f"{state}: {parts} of {len(content['cells'])} cells"


def _commit(side: Mapping[str, Any]) -> str:
    subject = f" ({_escaped(side['subject'])})" if side.get("subject") else ""
    return f"`{side['label']}`{subject}"


def cause_text(cell: Mapping[str, Any]) -> str:
    """What differs between the two makers of a cell's predictions, briefly."""
    if not cell["causes"]:
        return "" if cell["exactness"] is None else "nothing on the prediction path"
    texts = []
    for cause in cell["causes"]:
        if cause["what"] in ("code", "weights"):
            texts.append(cause["what"])
        elif cause["what"] == "libraries":
            old, new = (dict(cause[side] or {}) for side in ("base", "head"))
            differing = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n)]
            texts += [f"{n} {old.get(n)} → {new.get(n)}" for n in differing]
        else:
            texts.append(f"{cause['what']} {cause['base']} → {cause['head']}")
    return _escaped(", ".join(texts))


def exactness_text(found: Mapping[str, Any]) -> str:
    """How the predicted points differ, in one phrase."""
    if found["status"] != "changed":
        return found["status"]
    text = (
        f"{found['n_moved']} of {found['n_keypoints']} points moved, median "
        f"{found['median_px']:.2f} px, at most {found['largest_px']:.1f} px, mean "
        f"({found['mean_dx_px']:+.3f}, {found['mean_dy_px']:+.3f}) px"
    )
    for key, what in (("n_lost", "no longer answered"), ("n_gained", "newly answered")):
        if found[key]:
            text += f", {found[key]} {what}"
    return text


def _details(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = [cell for cell in cells if cell["exactness"] is not None]
    if not shown:
        return []
    lines = [f"<details><summary>All {len(shown)} compared cells</summary>", ""]
    lines += ["| cell | verdict | PCK | predictions |", "|---|---|---|---|"]
    for cell in shown:
        texts = []
        for test in cell["accuracy"]["tests"]:
            if test["group"] == "all":
                texts.append(
                    f"@{test['alpha']:g} {100 * test['base']:.1f} → {100 * test['head']:.1f}"
                )
        for mean in cell["accuracy"].get("means", []):
            if mean["pck"] is not None:
                texts.append(f"@{mean['alpha']:g} {100 * mean['pck']:.1f}")
        lines.append(
            f"| {cell['cell']} | {cell['verdict']} | {', '.join(texts)} | "
            f"{exactness_text(cell['exactness'])} |"
        )
    return [*lines, "", "</details>", ""]


def _cost(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    measured, notes = {}, {}
    for cell in cells:
        prediction = cell["cell"].rpartition("/")[0]
        if cell["cost"]:
            measured.setdefault(prediction, cell["cost"])
        elif cell["cost_note"]:
            notes.setdefault(prediction, cell["cost_note"])
    lines = []
    if measured:
        lines += ["| cost of | s per pair | ratio | peak MiB | ratio |", "|---|---|---|---|---|"]
        for prediction, cost in measured.items():
            columns = [prediction]
            for name in ("seconds", "memory"):
                entry = cost[name]
                columns.append(f"{entry['base']:.3g} → {entry['head']:.3g}")
                columns.append(f"{entry['ratio']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]")
            lines.append(f"| {' | '.join(columns)} |")
        lines.append("")
    for note in dict.fromkeys(notes.values()):
        names = ", ".join(p for p, text in notes.items() if text == note)
        lines += [f"Cost not measured ({names}): {note}.", ""]
    return lines


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# -- history --------------------------------------------------------------------------------------


def history_page(content: Mapping[str, Any]) -> str:
    """The commits of a history with the metric of each cell, and its change points, in Markdown."""
    commits = content["commits"]
    lines = [f"## {len(commits)} commits, PCK@{content['alpha']:g} in percent", ""]
    if not content["changes"]:
        lines += ["No change point.", ""]
    else:
        lines += ["| commit | cell | verdict | why | changed |", "|---|---|---|---|---|"]
        for change in content["changes"]:
            texts = "<br>".join(f"{r['watch']}: {r['text']}" for r in change["reasons"])
            commit = commits[change["at"]]
            lines.append(
                f"| {_commit(commit)} | {change['cell']} | {change['verdict']} | "
                f"{_escaped(texts)} | {cause_text(change)} |"
            )
        lines.append("")
    names = list(content["series"])
    lines += [f"| commit | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for at, commit in enumerate(commits):
        values = []
        for name in names:
            point = content["series"][name][at]
            values.append("–" if point["pck"] is None else f"{100 * point['pck']:.1f}")
        lines.append(f"| {_commit(commit)} | {' | '.join(values)} |")
    lines.append("")
    for commit in commits:
        if commit["problem"]:
            lines.append(f"- `{commit['label']}`: {_escaped(commit['problem'])}")
    return "\n".join(lines) + "\n"


def draw_history(content: Mapping[str, Any], folder: Path) -> list[Path]:
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
