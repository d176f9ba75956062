"""The pages of regression tracking: a summary for a pull request, what a bisection found.

Everything here reads the content of the JSON files that docs/regressions.md describes and computes
nothing new.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemf.files import write_text

_ORDER = ("worse", "not comparable", "undecided", "improved", "same")


def summary(content: Mapping[str, Any]) -> str:
    """A comparison in Markdown: what to know first, the cells that changed, the others folded."""
    cells = content["cells"]
    lines = [f"## {headline(content)}", ""]
    lines.append(f"{commit_text(content['base'])} → {commit_text(content['head'])}")
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
            lines.append(f"| {names} | {mark} | {escaped(texts)} | {cause_text(cell)} |")
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
    state = "UNDECIDED" if counts["undecided"] else "No regression"
    if failing:
        state = "REGRESSION" if "worse" in failing else "NOT COMPARED"
    return f"{state}: {parts} of {len(content['cells'])} cells"


def commit_text(side: Mapping[str, Any]) -> str:
    """Label and subject."""
    subject = f" ({escaped(side['subject'])})" if side.get("subject") else ""
    return f"`{side['label']}`{subject}"


def cause_text(cell: Mapping[str, Any]) -> str:
    """What differs between the two makers of a cell's predictions, briefly."""
    if not cell["causes"]:
        return "" if cell["exactness"] is None else "nothing on the prediction path"
    texts = []
    for cause in cell["causes"]:
        if cause["what"] in ("code", "weights", "pixels"):
            texts.append(cause["what"])
        elif cause["what"] == "libraries":
            old, new = (dict(cause[side] or {}) for side in ("base", "head"))
            differing = [n for n in sorted({*old, *new}) if old.get(n) != new.get(n)]
            texts += [f"{n} {old.get(n)} → {new.get(n)}" for n in differing]
        else:
            texts.append(f"{cause['what']} {cause['base']} → {cause['head']}")
    return escaped(", ".join(texts))


def exactness_text(found: Mapping[str, Any]) -> str:
    """How the predicted points differ, in one phrase."""
    if found["status"] != "changed":
        return found["status"]
    text = (
        f"{found['n_moved']} of {found['n_keypoints']} points moved, median "
        f"{found['median_px']:.2f} px, at most {found['largest_px']:.2f} px, mean "
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


def escaped(text: str) -> str:
    """One line that may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def bisect_page(content: Mapping[str, Any]) -> str:
    """What a bisection found, and the commits that it ran, in Markdown."""
    lines = [f"## {content['n_commits']} commits, {len(content['runs'])} runs", ""]
    for culprit in content["culprits"]:
        commit = culprit["first_bad"]
        lines.append(f"First bad commit: `{commit['label']}` {commit['subject']}")
        if culprit["or_one_of"]:
            others = ", ".join(f"`{c['label']}`" for c in culprit["or_one_of"])
            lines.append(f"(or one of {others}, which cannot be compared)")
        lines += [f"- {hit['cell']}: {hit['watch']}" for hit in culprit["worse"]] + [""]
    lines += ["| run | commit | worse | cannot tell |", "|---|---|---|---|"]
    for number, run in enumerate(content["runs"], 1):
        worse = ", ".join(run["worse"]) or "–"
        problems = "; ".join(run["problems"]) or "–"
        lines.append(f"| {number} | `{run['label']}` {run['subject']} | {worse} | {problems} |")
    return "\n".join(lines) + "\n"


def write_page(folder: Path, name: str, content: Mapping[str, Any], text: str) -> list[Path]:
    """``<name>.md`` and ``<name>.json`` below ``folder``."""
    files = [folder / f"{name}.md", folder / f"{name}.json"]
    write_text(files[0], text)
    write_text(files[1], json.dumps(content, indent=1, allow_nan=False) + "\n")
    return files
