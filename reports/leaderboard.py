"""A static board from a folder of result files (:mod:`reports.results`). Torch-free.

Results are ranked together only where the numbers mean the same: one kind of data (photographs or
synthetic stand-ins), one dataset split with one fingerprint, one protocol, one averaging.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemf.errors import NemfError
from nemf.files import write_text
from reports.ranking import Contender, rank_columns
from reports.results import read_result
from reports.self_contained import render_page
from reports.table_files import Column
from reports.wording import code_text, dataset_title, is_part

CLASS_ALPHA = 0.1  # of the tables by class, where it was scored


@dataclass(frozen=True, eq=False)
class Entry:
    """A valid result and its file's name below the folder."""

    file: str
    result: dict[str, Any]


def read_folder(folder: Path) -> tuple[list[Entry], list[str]]:
    """The results of every ``*.json`` below a folder, by name, and why the other files are refused,
    one line each.

    Refused are files that are no valid result, that tell the same result again, or that contradict
    an earlier one on the dataset of their fingerprint. NemfError if there is no such folder or no
    such file in it.
    """
    if not folder.is_dir():
        raise NemfError(f"{folder}: no such folder of result files")
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise NemfError(f"{folder}: holds no result file (*.json); `nemf export` writes some")
    entries: list[Entry] = []
    refused = []
    datasets: dict[tuple[str, ...], Entry] = {}
    told: dict[tuple[str, ...], Entry] = {}
    for file in files:
        try:
            entry = Entry(file.relative_to(folder).as_posix(), read_result(file))
            _check_agreement(file, entry, datasets, told)
        except NemfError as problem:
            refused.append(str(problem))
        else:
            entries.append(entry)
    return entries, refused


def _check_agreement(
    file: Path,
    entry: Entry,
    datasets: dict[tuple[str, ...], Entry],
    told: dict[tuple[str, ...], Entry],
) -> None:
    """NemfError if an earlier file tells the same result, or something else of the dataset."""
    result = entry.result
    dataset = result["dataset"]
    first = datasets.setdefault((dataset["name"], dataset["split"], dataset["fingerprint"]), entry)
    before = first.result["dataset"]
    for key in dataset.keys() - {"n_unanswered"}:
        if dataset[key] != before[key]:
            raise NemfError(
                f"{file}: dataset.{key} is {dataset[key]!r}, but {before[key]!r} in {first.file} "
                "for the same fingerprint"
            )
    key = (
        result["method"]["label"],
        result["protocol"]["id"],
        result["provenance"]["predictions_sha256"],
    )
    first = told.setdefault(key, entry)
    if first is not entry:
        raise NemfError(f"{file}: tells the result of {first.file} again")


def write_board(path: Path, entries: Sequence[Entry]) -> None:
    """Writes the board of some results, whole or not at all; equal input gives equal bytes."""
    sections = list(_sections(entries))
    page = render_page(
        "board.html",
        ("sorting.js", "board.js"),
        sections=sections,
        kinds=[
            (kind, label)
            for kind, label in (("real", "photographs"), ("synthetic", "synthetic stand-ins"))
            if any(section["kind"] == kind for section in sections)
        ],
        n_results=len(entries),
    )
    write_text(path, page)


def _sections(entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """What is ranked together: a table each, photographs first."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        dataset, protocol = entry.result["dataset"], entry.result["protocol"]["id"]
        where = (dataset["synthetic"], dataset["title"], dataset["split"], dataset["name"])
        key = (*where, dataset["fingerprint"], protocol != "canonical@1", protocol)
        groups.setdefault(key, []).append(entry)
    several = {key[:5] for key in groups}
    for key in sorted(groups):
        for averaging in ("image", "point"):
            group = [e for e in groups[key] if _scores(e, averaging, "all")]
            if group:
                versions = sum(other[:4] == key[:4] for other in several)
                yield _section(group, averaging, tell_version=versions > 1)


def _section(group: Sequence[Entry], averaging: str, tell_version: bool) -> dict[str, Any]:
    first = group[0].result
    dataset = first["dataset"]
    title = dataset_title(dataset) + (f" [{dataset['fingerprint'][:8]}]" if tell_version else "")
    alphas = sorted({alpha for entry in group for alpha in _scores(entry, averaging, "all")})
    preferred = CLASS_ALPHA if CLASS_ALPHA in alphas else alphas[-1]
    rows = [_row(entry, averaging) for entry in group]
    columns = [Column(dataset["name"], "all", alpha, f"@{alpha:g}") for alpha in alphas]
    contenders = []
    if not is_part(dataset):
        for alpha in alphas:
            cells = [row["all"][alpha] for row in rows if alpha in row["all"] and not row["marks"]]
            contenders.append([Contender(cell, {}, "all", alpha) for cell in cells])
    rank_columns(contenders, averaging=averaging, level=first["level"], scores_of=None)
    rows.sort(key=lambda row: _order(row, preferred))
    classes = sorted({name for row in rows for name in row["classes"]})
    return {
        "kind": "synthetic" if dataset["synthetic"] else "real",
        "dataset": title,
        "protocol": first["protocol"]["id"],
        "averaging": averaging,
        "rule": first["protocol"]["text"].replace("per-image mean", f"per-{averaging} mean"),
        "data": dataset,
        "part": is_part(dataset),
        "columns": columns,
        "sorted_by": preferred,
        "rows": [
            row | {"cells": [(column, row["all"].get(column.alpha)) for column in columns]}
            for row in rows
        ],
        "classes": [Column(dataset["name"], c, preferred, c, interval=False) for c in classes],
        "class_rows": [
            (row["label"], [row["classes"].get(name, {}).get(preferred) for name in classes])
            for row in rows
            if any(preferred in by_alpha for by_alpha in row["classes"].values())
        ],
    }


def _row(entry: Entry, averaging: str) -> dict[str, Any]:
    """A row of a section. ``marks``: why it takes no part in the ranking."""
    method, provenance = entry.result["method"], entry.result["provenance"]
    marks = [kind for kind in ("floor", "ceiling") if method.get("kind") == kind]
    marks += ["random weights"] * method.get("random_weights", False)
    marks += ["oracle class"] * method.get("oracle_class", False)
    groups = {score["group"] for score in entry.result["scores"]} - {"all"}
    classes = {name.removeprefix("class "): _scores(entry, averaging, name) for name in groups}
    return {
        "label": method["label"],
        "marks": marks,
        "method": method,
        "all": _scores(entry, averaging, "all"),
        "classes": classes,
        "n_unanswered": entry.result["dataset"]["n_unanswered"],
        "seed": provenance.get("seed"),
        "predictions": provenance["predictions_sha256"],
        "weights": provenance["weights_sha256"],
        "predicted_by": _code(provenance["predicted_by"], method.get("predicted")),
        "scored_by": code_text(provenance["scored_by"]),
        "file": entry.file,
    }


def _code(state: dict[str, Any], predicted: str | None) -> str:
    return "elsewhere" if predicted == "elsewhere" else code_text(state)


def _scores(entry: Entry, averaging: str, group: str) -> dict[float, dict[str, Any]]:
    """Cells by alpha, each a dict of its own that ranks may be written into."""
    return {
        score["alpha"]: {key: score[key] for key in ("pck", "low", "high")}
        for score in entry.result["scores"]
        if (score["averaging"], score["group"]) == (averaging, group)
    }


def _order(row: dict[str, Any], alpha: float) -> tuple[float, str, str]:
    """Best first; rows without a score at that alpha last."""
    score = row["all"].get(alpha)
    return (-score["pck"] if score else 1.0, row["label"], row["file"])
