"""Comparisons: two or more prediction files of the same pairs, told apart with intervals.

Works from prediction files alone. Where the dataset is at hand too it draws the pairs that differ
most, names numbered keypoints, and looks for training images among the test images. Every
difference is a paired one with the dyadic interval of :mod:`reports.statistics`; p-values are
Holm-corrected over all tests of a comparison. docs/comparisons.md describes the files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nemf.datasets import dataset_class
from nemf.datasets.index import PairDataset
from nemf.errors import NemfError
from nemf.files import write_text
from nemf.match_pictures import draw_matches
from nemf.pairs import FLAGS
from nemf.predictions import FILE_NAME, Predictions, dataset_folder
from nemf.scoring import Averaging, Protocol, check_alphas
from reports.comparison_page import conclusion, draw_curves, headline, markdown
from reports.confusions import keypoint_names, left_right, nearer_to_another
from reports.records import (
    LEVEL,
    PairScores,
    alpha_name,
    current_predictions,
    groups,
    keypoint_errors,
    or_none,
    pair_scores,
)
from reports.statistics import Difference, Estimate, dyadic_mean, holm, paired_difference

FORMAT = 1
ALPHAS = (0.05, 0.10, 0.15)
ALPHA = 0.10
CURVE_END = 0.20
CURVE_ALPHAS = tuple(round(0.005 * k, 3) for k in range(1, 41))
_SHOWN = 3  # pairs that differ most, in each direction
_MOST_RUNS = 26  # they are called A to Z


# -- which files ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Run:
    """One prediction file of a comparison. ``label`` is unique within it."""

    label: str
    file: Path
    sha256: str
    predictions: Predictions


def find_runs(
    out: Path,
    wanted: Sequence[Sequence[str]],
    protocol: Protocol,
    dataset: str | None = None,
) -> list[Run]:
    """The prediction files to compare, in the order given.

    ``wanted``: per run the names it may go by, the one that was typed first: a file, the label of
    a row, or the name of a matcher, among the current predictions below ``out``. ``dataset``: a
    dataset's name, or the name of a folder such as ``spair-test-synthetic``; by default the one
    dataset for which all runs have predictions that ``protocol`` scores.

    NemfError if there are fewer than two, if one is not found, is found only under another plan or
    dataset, or stands for several labels, if several datasets are possible, or if two are the same
    file.
    """
    if not 2 <= len(wanted) <= _MOST_RUNS:
        raise NemfError(f"{len(wanted)} to compare: give 2 to {_MOST_RUNS} matchers or files")
    stored = [(file, Predictions.read(file, ["pair"]).meta) for file in current_predictions(out)]
    found = [_candidates(names, stored, protocol, out, dataset) for names in wanted]
    typed = [names[0] for names in wanted]
    common = sorted(set.intersection(*(set(cells) for cells in found)))
    if not common:
        each = "; ".join(
            f"{n} on {', '.join(sorted(cells))}" for n, cells in zip(typed, found, strict=True)
        )
        raise NemfError(f"no dataset that all were predicted on: {each}")
    if len(common) > 1:
        raise NemfError(f"several datasets to compare on: choose --dataset {' | '.join(common)}")
    chosen: list[Path] = []
    for name, cells in zip(typed, found, strict=True):
        labels = cells[common[0]]
        if len(labels) > 1:
            raise NemfError(f"{name!r} stands for {' and '.join(map(repr, labels))}: give a label")
        (file,) = labels.values()
        if file.resolve() in (other.resolve() for other in chosen):
            raise NemfError(f"{name!r}: {file} is compared with itself")
        chosen.append(file)
    return read_runs(chosen)


def read_runs(files: Sequence[Path]) -> list[Run]:
    """Prediction files as runs; equal labels are told apart by the start of the file's SHA-256."""
    read = [(f, Predictions.read(f), hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
    labels = [_label(predictions.meta) for _, predictions, _ in read]
    return [
        Run(label if labels.count(label) == 1 else f"{label} [{sha256[:8]}]", file, sha256, content)
        for label, (file, content, sha256) in zip(labels, read, strict=True)
    ]


def _candidates(
    names: Sequence[str],
    stored: Sequence[tuple[Path, dict[str, Any]]],
    protocol: Protocol,
    out: Path,
    dataset: str | None,
) -> dict[str, dict[str, Path]]:
    """The files that one of the names stands for, by dataset folder and label."""
    name = names[0]
    if name.endswith(".parquet") or Path(name).is_file():
        hits = [(Path(name), Predictions.read(Path(name), ["pair"]).meta)]
    else:
        hits = [(f, m) for f, m in stored if m["matcher"]["label"] in names]
        hits = hits or [(f, m) for f, m in stored if m["matcher"]["name"] == name]
    if not hits and "/" in name and Path(name).is_dir():  # a matcher may be called as a folder
        raise NemfError(
            f"{name}: is a folder; of another outputs folder give the {FILE_NAME} of one run"
        )
    if not hits:
        known = ", ".join(sorted({repr(m["matcher"]["label"]) for _, m in stored})) or "nothing"
        raise NemfError(
            f"{name!r} is neither a prediction file nor predicted in {out} (there is {known}): "
            "run `nemf predict` first"
        )
    there = {dataset_folder(m) for _, m in hits}
    hits = [(f, m) for f, m in hits if dataset in (None, m["dataset"], dataset_folder(m))]
    if not hits:
        raise NemfError(f"{name!r} is not predicted on {dataset} but on {', '.join(sorted(there))}")
    plans = {m["plan"] for _, m in hits}
    hits = [(f, m) for f, m in hits if m["plan"] == str(protocol.plan.for_layout(m["layout"]))]
    if not hits:
        raise NemfError(
            f"{name!r} is predicted under {', '.join(sorted(plans))}, which {protocol.id} does not "
            f"score: run `nemf predict --protocol {protocol.id}`, or compare under another one"
        )
    cells: dict[str, dict[str, Path]] = {}
    for file, meta in hits:
        cells.setdefault(dataset_folder(meta), {})[meta["matcher"]["label"]] = file
    return cells


def _label(meta: dict[str, Any]) -> str:
    matcher = meta["matcher"]
    marks = ["random weights"] if matcher.get("random_weights") else []
    marks += ["oracle class"] if matcher.get("card", {}).get("oracle_class") else []
    return matcher["label"] + (f" [{', '.join(marks)}]" if marks else "")


def _check_same_pairs(runs: Sequence[Run]) -> None:
    """NemfError naming what differs unless all runs answer the same questions."""
    first = runs[0]
    for run in runs:
        meta = run.predictions.meta
        n_pairs = len(run.predictions.pair_starts)
        if n_pairs != meta["n_pairs"]:
            raise NemfError(f"{run.file}: holds {n_pairs} of {meta['n_pairs']} pairs; predict anew")
        for key in ("dataset", "split", "synthetic", "plan", "n_pairs", "fingerprint"):
            mine, other = first.predictions.meta[key], meta[key]
            if mine != other:
                raise NemfError(
                    f"{first.label!r} and {run.label!r} differ in {key.replace('_', ' of ', 1)} "
                    f"({mine} and {other}): predict both on one version of the dataset"
                )
        for column in ("pair", "keypoint", "query_x", "query_y", "true_x", "true_y"):
            mine, other = first.predictions.column(column), run.predictions.column(column)
            if not np.array_equal(mine, other):
                raise NemfError(
                    f"{first.label!r} and {run.label!r} answer different questions: the column "
                    f"{column} differs, though the fingerprints agree: predict both anew"
                )


# -- scores ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Scored:
    """Per-pair results of a run, all (P,) in the same order as every other run's."""

    run: Run
    scores: PairScores
    area: np.ndarray  # fraction of the area under the PCK curve, 0 to CURVE_END
    dagger: PairScores | None
    confused: np.ndarray | None  # keypoints taken for their mirrored one

    def pck(self, alpha: float, *, dagger: bool = False) -> np.ndarray:
        frame = (self.dagger if dagger else self.scores).frame
        return (frame[alpha_name(alpha)] / frame["n"]).to_numpy()


@dataclass(eq=False)
class Comparison:
    """A finished comparison. ``content`` is the JSON (docs/comparisons.md), ``per_pair`` the CSV:
    one row per compared two and pair."""

    content: dict[str, Any]
    per_pair: pd.DataFrame
    runs: list[Run]
    dataset: PairDataset | None

    @property
    def name(self) -> str:
        """What its folder is called, before anything that file names forbid is replaced."""
        data, by = self.content["dataset"], self.content["by"]
        labels = "-vs-".join(run.label for run in self.runs)
        rule = self.content["protocol"]["id"].replace("@", "-") + "-per-point" * (by == "point")
        digest = hashlib.sha256("".join(run.sha256 for run in self.runs).encode()).hexdigest()[:8]
        short = labels if len(labels) <= 120 else f"{labels[:110]}-{digest}"
        return f"{data['folder']}_{rule}_{short}"

    def json(self) -> str:
        return json.dumps(self.content, indent=1, allow_nan=False) + "\n"

    def markdown(self) -> str:
        return markdown(self.content)

    def write(self, folder: Path) -> list[Path]:
        """``comparison.md``, ``comparison.json``, ``curves.png``, ``curves.pdf``, ``per_pair.csv``
        and, where the dataset is at hand, ``pictures/``; each file whole or not at all."""
        files = draw_curves(self.content, folder)
        for old in (folder / "pictures").glob("*-*-*.png"):  # of an earlier comparison
            old.unlink()
        if self.dataset is not None:
            files += self._draw_pairs(folder)
        texts = {
            "comparison.md": self.markdown(),
            "comparison.json": self.json(),
            "per_pair.csv": self.per_pair.to_csv(index=False, lineterminator="\n"),
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        return [folder / name for name in texts] + files

    def _draw_pairs(self, folder: Path) -> list[Path]:
        images = {image.hash: image for image in self.dataset.images}
        by_label = {run.label: run.predictions for run in self.runs}
        files = []
        for number, comparison in enumerate(self.content["comparisons"], 1):
            two = {"a": by_label[comparison["a"]], "b": by_label[comparison["b"]]}
            starts = two["a"].pair_starts
            stops = np.r_[starts[1:], len(two["a"])]
            ids = two["a"].column("pair")[starts].tolist()
            for rank, entry in enumerate(comparison["most_different"], 1):
                at = ids.index(entry["pair"])
                rows = slice(starts[at], stops[at])
                pixels = [
                    self.dataset.pixels(images[two["a"].column(f"{side}_hash")[starts[at]]])
                    for side in ("query", "reference")
                ]
                points = {"truth": two["a"].points("true")[rows]}
                points |= {which: run.points("pred")[rows] for which, run in two.items()}
                queries = two["a"].points("query")[rows]
                entry["pictures"] = {
                    which: f"pictures/{number}-{rank}-{which}.png" for which in points
                }
                for which, answers in points.items():
                    file = folder / entry["pictures"][which]
                    draw_matches(*pixels, queries, answers, file)
                    files.append(file)
        return files


def compare(
    runs: Sequence[Run],
    protocol: Protocol,
    *,
    alphas: Sequence[float] = ALPHAS,
    alpha: float = ALPHA,
    by: Averaging = "image",
    all_pairs: bool = False,
    data: Path | None = None,
    code: dict[str, Any] | None = None,
) -> Comparison:
    """Compares the first run with each other one, or all with all.

    ``alpha``: the one the conclusion is about (added to ``alphas``); ``data``: root of the
    datasets; ``code``: state of the comparing code, for the record.

    NemfError if the runs do not answer the same pairs of one dataset, if the protocol does not
    score their plan, or for an alpha that is not positive and finite.
    """
    (alpha,) = check_alphas([alpha])
    alphas = tuple(sorted({*check_alphas(alphas), alpha}))
    _check_same_pairs(runs)
    first = runs[0].predictions
    dataset, without = _open_dataset(first, data)
    names, unnamed = _or_reason(keypoint_names, first, dataset)
    scored, reasons = [], {"left_right": unnamed, "dagger": None}
    mirrored = None
    for run in runs:
        error, length = keypoint_errors(run.predictions, protocol)
        starts = run.predictions.pair_starts
        every = sorted({*alphas, *CURVE_ALPHAS})
        scores = pair_scores(run.predictions, protocol, error, length, every)
        counts = scores.frame["n"].to_numpy()
        # The area under a keypoint's step from wrong to right, without a grid.
        area = np.clip(1 - error.astype(np.float64) / (CURVE_END * length), 0, 1)
        item = _Scored(run, scores, np.add.reduceat(area, starts) / counts, None, None)
        spoiled, why = _or_reason(nearer_to_another, run.predictions, protocol, error)
        reasons["dagger"] = reasons["dagger"] or why
        if spoiled is not None:
            worse = np.where(spoiled, np.float32(np.inf), error)
            item.dagger = pair_scores(run.predictions, protocol, worse, length, alphas)
        if names is not None:
            sides, why = _or_reason(left_right, run.predictions, protocol, error, names)
            reasons["left_right"] = why
            if sides is not None:
                sums = [np.add.reduceat(side.astype(np.int64), starts) for side in sides]
                mirrored, item.confused = sums
        scored.append(item)
    frame = scored[0].scores.frame
    bench = _Bench(frame, alphas, alpha, by, mirrored)
    index = range(len(runs))
    compared = itertools.combinations(index, 2) if all_pairs else ((0, j) for j in index[1:])
    comparisons = [_comparison(bench, scored[i], scored[j]) for i, j in compared]
    n_tests = _correct(comparisons, alpha)
    content = {
        "format": FORMAT,
        "dataset": _dataset_facts(first.meta, frame),
        "protocol": {"id": protocol.id, "description": _rule(protocol, first.meta, by)},
        "by": by,
        "alphas": list(alphas),
        "alpha": alpha,
        "level": LEVEL,
        "area_range": [0.0, CURVE_END],
        "holm_tests": n_tests,
        "dagger": {"available": reasons["dagger"] is None, "reason": reasons["dagger"]},
        "left_right": {
            "available": reasons["left_right"] is None,
            "reason": reasons["left_right"],
            "n_keypoints": int(mirrored.sum()) if mirrored is not None else 0,
        },
        "contamination": _contamination(first, data),
        "pictures": {"available": dataset is not None, "reason": without},
        "runs": [_run_facts(bench, item, chr(ord("A") + k)) for k, item in enumerate(scored)],
        "comparisons": comparisons,
        "compared_by": code,
    }
    for comparison in comparisons:
        comparison["conclusion"] = conclusion(content, comparison)
    by_label = {item.run.label: item for item in scored}
    table = pd.concat(
        _per_pair(bench, by_label[c["a"]], by_label[c["b"]]) for c in comparisons
    ).reset_index(drop=True)
    return Comparison(content, table, list(runs), dataset)


@dataclass(eq=False)
class _Bench:
    """What all runs of a comparison share: the pairs, and how they are averaged."""

    frame: pd.DataFrame
    alphas: tuple[float, ...]
    alpha: float
    by: Averaging
    mirrored: np.ndarray | None  # (P,) keypoints with a mirrored one

    @property
    def images(self) -> tuple[np.ndarray, np.ndarray]:
        return self.frame["image_a"].to_numpy(), self.frame["image_b"].to_numpy()

    @property
    def weights(self) -> np.ndarray:
        """(P,): one per pair, or its keypoints where points are averaged."""
        n = self.frame["n"].to_numpy(np.float64)
        return n if self.by == "point" else np.ones_like(n)

    def mean(self, values: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
        """Mean of fractions over the pairs with positive weight."""
        weights = self.weights if weights is None else weights
        rows = weights > 0
        a, b = (codes[rows] for codes in self.images)
        return dyadic_mean(
            values[rows], a, b, weights=weights[rows], level=LEVEL, bounds=(0.0, 1.0)
        )

    def difference(self, a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> Difference:
        """Paired difference a - b over the pairs with positive weight."""
        rows = weights > 0
        first, second = (codes[rows] for codes in self.images)
        return paired_difference(
            a[rows], b[rows], first, second, weights=weights[rows], level=LEVEL
        )

    def rates(self, counts: np.ndarray) -> np.ndarray:
        """(P,): counts as a fraction of the keypoints that have a mirrored one, 0 without any."""
        return counts / np.maximum(self.mirrored, 1)

    def groupings(self, scores: PairScores) -> Iterator[tuple[str, str, np.ndarray]]:
        """(kind, value, weights of all pairs, 0 outside of the group) of every mean that is
        compared: all pairs, the mean of the class means, each class, each flag value."""
        for kind, value, rows in groups(scores):
            yield kind, value, np.where(rows, self.weights, 0.0)
            codes = self.frame["category"].cat.codes.to_numpy()
            if kind == "all" and len(np.unique(codes)) > 1:
                totals = np.bincount(codes, self.weights)
                yield "class mean", "class mean", self.weights / totals[codes]


def _comparison(bench: _Bench, a: _Scored, b: _Scored) -> dict[str, Any]:
    cells = []
    for alpha in bench.alphas:
        for kind, value, weights in bench.groupings(a.scores):
            facts = {"measure": "pck", "group": kind, "value": value, "alpha": alpha}
            cells.append(facts | _cell(bench, a.pck(alpha), b.pck(alpha), weights))
    overall = {"group": "all", "value": "all"}
    if a.dagger is not None and b.dagger is not None:
        for alpha in bench.alphas:
            values = (item.pck(alpha, dagger=True) for item in (a, b))
            facts = {"measure": "dagger", **overall, "alpha": alpha}
            cells.append(facts | _cell(bench, *values, bench.weights))
    facts = {"measure": "area", **overall, "alpha": None}
    cells.append(facts | _cell(bench, a.area, b.area, bench.weights))
    if bench.mirrored is not None:
        rates = (bench.rates(item.confused) for item in (a, b))
        facts = {"measure": "left_right", **overall, "alpha": None}
        cells.append(facts | _cell(bench, *rates, bench.mirrored.astype(np.float64)))
    curve = [bench.difference(a.pck(x), b.pck(x), bench.weights) for x in CURVE_ALPHAS]
    return {
        "a": a.run.label,
        "b": b.run.label,
        "cells": cells,
        "curve": {"alphas": list(CURVE_ALPHAS)}
        | {"difference": [e.mean for e in curve]}
        | {key: [or_none(getattr(e, key)) for e in curve] for key in ("low", "high")},
        "most_different": _most_different(bench, a, b),
    }


def _cell(bench: _Bench, a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """One tested difference; ``p_holm`` follows when all tests are known."""
    rows = weights > 0
    found = bench.difference(a, b, weights)
    return {
        "a_mean": float(np.average(a[rows], weights=weights[rows])),
        "b_mean": float(np.average(b[rows], weights=weights[rows])),
        "difference": found.mean,
        **{key: or_none(getattr(found, key)) for key in ("low", "high", "se", "df")},
        "method": found.method,
        "p": or_none(found.p_value),
        **{key: getattr(found, key) for key in ("wins", "ties", "losses", "n_pairs", "n_images")},
    }


def _correct(comparisons: Sequence[dict[str, Any]], alpha: float) -> int:
    """Adds ``p_holm`` to every cell, over the tests of all cells, and ``p`` of the conclusion, over
    the overall cells at ``alpha`` alone. Returns the number of tests."""
    cells = [cell for comparison in comparisons for cell in comparison["cells"]]
    _adjust(cells, "p_holm")
    main = [headline(comparison, alpha) for comparison in comparisons]
    _adjust(main, "p_conclusion")
    return sum(cell["p"] is not None for cell in cells)


def _adjust(cells: Sequence[dict[str, Any]], key: str) -> None:
    p = [np.nan if cell["p"] is None else cell["p"] for cell in cells]
    for cell, adjusted in zip(cells, holm(p), strict=True):
        cell[key] = or_none(adjusted)


def _most_different(bench: _Bench, a: _Scored, b: _Scored) -> list[dict[str, Any]]:
    """The pairs on which a is furthest ahead, and those on which it is furthest behind: by PCK at
    the conclusion's alpha, then by area."""
    pck, area = a.pck(bench.alpha) - b.pck(bench.alpha), a.area - b.area
    # Rounded, so that equal fractions tie and the order does not hang on the last bit.
    order = np.lexsort([np.round(-area, 9), np.round(-pck, 9)])
    ahead = [i for i in order[:_SHOWN] if pck[i] > 0]
    behind = [i for i in order[::-1][:_SHOWN] if pck[i] < 0]
    return [
        {
            "pair": str(bench.frame["pair"].iloc[i]),
            "category": str(bench.frame["category"].iloc[i]),
            "a_pck": float(a.pck(bench.alpha)[i]),
            "b_pck": float(b.pck(bench.alpha)[i]),
            "difference": float(pck[i]),
            "area_difference": float(area[i]),
        }
        for i in [*ahead, *behind]
    ]


def _per_pair(bench: _Bench, a: _Scored, b: _Scored) -> pd.DataFrame:
    starts = a.run.predictions.pair_starts
    columns: dict[str, Any] = {"a": a.run.label, "b": b.run.label}
    columns |= {key: bench.frame[key].astype(str) for key in ("pair", "category")}
    columns |= {key: bench.frame[key] for key in FLAGS}
    for side in ("query", "reference"):
        columns[f"{side}_image"] = a.run.predictions.column(f"{side}_image")[starts]
    columns["n_keypoints"] = bench.frame["n"]
    measures = {alpha_name(x): (a.pck(x), b.pck(x)) for x in bench.alphas}
    for name, (mine, other) in (measures | {"area": (a.area, b.area)}).items():
        columns |= {f"a_{name}": mine, f"b_{name}": other, f"difference_{name}": mine - other}
    return pd.DataFrame(columns)


# -- facts ----------------------------------------------------------------------------------------


def _dataset_facts(meta: dict[str, Any], frame: pd.DataFrame) -> dict[str, Any]:
    return {
        "folder": dataset_folder(meta),
        **{key: meta[key] for key in ("dataset", "title", "split", "synthetic", "fingerprint")},
        "n_pairs": len(frame),
        "official_pairs": meta["official_pairs"],
        "n_images": len(np.unique(frame[["image_a", "image_b"]])),
        "n_keypoints": int(frame["n"].sum()),
        "n_classes": frame["category"].nunique(),
    }


def _rule(protocol: Protocol, meta: dict[str, Any], by: Averaging) -> str:
    text = protocol.describe(meta["layout"])
    return text.replace(f"per-{protocol.averaging} mean", f"per-{by} mean")


def _run_facts(bench: _Bench, item: _Scored, letter: str) -> dict[str, Any]:
    meta, matcher = item.run.predictions.meta, item.run.predictions.meta["matcher"]
    rates = None
    if item.confused is not None:
        weights = bench.mirrored.astype(np.float64)
        rates = _interval(bench.mean(bench.rates(item.confused), weights))
    curve = [_interval(bench.mean(item.pck(x))) for x in CURVE_ALPHAS]
    return {
        "letter": letter,
        "label": item.run.label,
        "origin": "external" if matcher.get("external") else "measured",
        "matcher": matcher,
        "file": item.run.file.as_posix(),
        "predictions_sha256": item.run.sha256,
        "key": meta["key"],
        "code": meta["code"],
        "n_unanswered": int(item.scores.frame["n_none"].sum()),
        "pck": [{"alpha": x} | _interval(bench.mean(item.pck(x))) for x in bench.alphas],
        "dagger": [
            {"alpha": x} | _interval(bench.mean(item.pck(x, dagger=True))) for x in bench.alphas
        ]
        if item.dagger is not None
        else None,
        "area": _interval(bench.mean(item.area)),
        "left_right": rates,
        "curve": {"alphas": list(CURVE_ALPHAS)}
        | {key: [point[key] for point in curve] for key in ("mean", "low", "high")},
    }


def _interval(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.mean, "low": or_none(estimate.low), "high": or_none(estimate.high)}


def _open_dataset(predictions: Predictions, data: Path | None) -> tuple[PairDataset | None, str]:
    """The dataset that the predictions are about, or None and why it is not at hand."""
    meta = predictions.meta
    reader = dataset_class(meta["dataset"])
    if data is None:
        return None, "no --data was given"
    if reader.find(data) is None:
        return None, f"{data} holds no {reader.title}"
    dataset, reason = _or_reason(reader, data, meta["split"])
    if dataset is None:
        return None, reason
    if not _image_hashes(predictions) <= {image.hash for image in dataset.images}:
        return None, f"the {reader.title} in {data} has other images than the predictions"
    return dataset, ""


def _contamination(predictions: Predictions, data: Path | None) -> dict[str, Any]:
    """Which images of the pairs are images of the dataset's own training split, by content."""
    meta = predictions.meta
    reader = dataset_class(meta["dataset"])
    reason = None
    if data is None:
        reason = "no --data was given"
    elif "trn" not in reader.splits:
        reason = f"{reader.title} has no training split"
    elif meta["split"] == "trn":
        reason = "the pairs are those of the training split"
    elif reader.find(data) is None:
        reason = f"{data} holds no {reader.title}"
    training = None
    if reason is None:
        training, reason = _or_reason(reader, data, "trn")
    if training is None:
        return {"checked": False, "reason": reason}
    shared = _image_hashes(predictions) & {image.hash for image in training.images}
    starts = predictions.pair_starts
    sides = {side: predictions.column(f"{side}_hash")[starts] for side in ("query", "reference")}
    touched = np.isin(sides["query"], list(shared)) | np.isin(sides["reference"], list(shared))
    names = {
        name
        for side, hashes in sides.items()
        for name, content in zip(predictions.column(f"{side}_image")[starts], hashes, strict=True)
        if content in shared
    }
    return {
        "checked": True,
        "reason": None,
        "n_training_images": len({image.hash for image in training.images}),
        "n_images": len(shared),
        "n_pairs": int(touched.sum()),
        "images": sorted(names),
    }


def _image_hashes(predictions: Predictions) -> set[str]:
    return {h for side in ("query", "reference") for h in predictions.codes(f"{side}_hash")[1]}


def _or_reason(function: Any, *arguments: Any) -> tuple[Any, str | None]:
    """What the function returns and None, or None and what it complains of."""
    try:
        return function(*arguments), None
    except NemfError as problem:
        return None, str(problem)
