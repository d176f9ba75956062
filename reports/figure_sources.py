"""The prediction files that figures are made from, and how a figure names them. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemf.errors import NemfError
from nemf.pairs import FLAGS
from nemf.predictions import Predictions
from nemf.scoring import Protocol
from reports.comparison import Run, read_runs
from reports.figure_files import CannotDraw
from reports.records import LEVEL, PairScores, current_predictions
from reports.wording import dataset_title, is_part


def find_sources(
    out: Path,
    protocol: Protocol,
    *,
    dataset: str | None = None,
    names: Sequence[Sequence[str]] = (),
    order: Sequence[str] = (),
) -> dict[str, list[Run]]:
    """The current predictions below ``out`` that ``protocol`` scores, by dataset folder.

    ``dataset``: only that dataset or folder (``spair``, ``spair-test-synthetic``). ``names``: per
    row what it may be called, label or matcher; all rows by default. Rows come in the order of
    ``names``, else by their label's place in ``order``, unknown labels last.

    CannotDraw if there is nothing; NemfError for a name that stands for no prediction, and if the
    rows of a folder are about different versions of the dataset or not complete.
    """
    folders: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for file in current_predictions(out):
        meta, folder = Predictions.read(file, ["pair"]).meta, file.parents[2].name
        fits = meta["plan"] == str(protocol.plan.for_layout(meta["layout"]))
        if fits and dataset in (None, meta["dataset"], folder):
            folders.setdefault(folder, []).append((file, meta))
    if not folders:
        where = f" on {dataset}" if dataset else ""
        raise CannotDraw(
            f"{out} holds no predictions{where} that {protocol.id} scores: run `nemf predict`"
        )
    found = {}
    for folder, entries in folders.items():
        chosen = _chosen(entries, names, order)
        if chosen:
            found[folder] = read_runs(chosen)
            _check(folder, found[folder])
    for alternatives in names:
        if not any(_is_called(m, alternatives) for es in folders.values() for _, m in es):
            labels = {repr(m["matcher"]["label"]) for es in folders.values() for _, m in es}
            raise NemfError(
                f"{alternatives[0]!r} is not predicted in {out} (there is "
                f"{', '.join(sorted(labels))}): run `nemf predict` first"
            )
    return found


def _chosen(
    entries: Sequence[tuple[Path, dict[str, Any]]],
    names: Sequence[Sequence[str]],
    order: Sequence[str],
) -> list[Path]:
    if not names:
        place = {label: k for k, label in enumerate(order)}

        def key(entry: tuple[Path, dict[str, Any]]) -> tuple[int, str]:
            label = entry[1]["matcher"]["label"]
            return place.get(label, len(place)), label

        return [file for file, _ in sorted(entries, key=key)]
    chosen = [
        file for alternatives in names for file, meta in entries if _is_called(meta, alternatives)
    ]
    return list(dict.fromkeys(chosen))


def _is_called(meta: dict[str, Any], alternatives: Sequence[str]) -> bool:
    matcher = meta["matcher"]
    return matcher["label"] in alternatives or matcher["name"] == alternatives[0]


def _check(folder: str, runs: Sequence[Run]) -> None:
    first = runs[0].predictions.meta
    for run in runs:
        meta = run.predictions.meta
        if meta["fingerprint"] != first["fingerprint"]:
            raise NemfError(
                f"{folder}: {runs[0].label!r} and {run.label!r} were predicted on different "
                "versions of the dataset: predict both on one, or use another OUT="
            )
        if len(run.predictions.pair_starts) != meta["n_pairs"]:
            raise NemfError(f"{run.file}: does not hold all of its pairs; predict anew")


def basis(runs: Sequence[Run], scores: Sequence[PairScores]) -> dict[str, Any]:
    """The part of a figure's content that says what it is about: dataset, protocol, matchers."""
    meta, protocol, frame = runs[0].predictions.meta, scores[0].protocol, scores[0].frame
    keys = ("dataset", "title", "split", "synthetic", "fingerprint", "official_pairs")
    return {
        "dataset": {key: meta[key] for key in keys}
        | {
            "n_pairs": len(frame),
            "n_images": len(np.unique(frame[["image_a", "image_b"]])),
            "n_keypoints": int(frame["n"].sum()),
        },
        "protocol": {"id": protocol.id, "description": protocol.describe(meta["layout"])},
        "averaging": protocol.averaging,
        "level": LEVEL,
        "matchers": [source_of(run) for run in runs],
    }


def source_of(run: Run) -> dict[str, Any]:
    """Label and origin of one row."""
    meta = run.predictions.meta
    return {
        "label": run.label,
        "predictions_sha256": run.sha256,
        "key": meta["key"],
        "weights_sha256": meta["matcher"].get("weights_sha256"),
        "external": bool(meta["matcher"].get("external")),
        "code": meta["code"],
    }


def subject(content: dict[str, Any]) -> str:
    """Dataset, number of pairs and protocol of a content with a :func:`basis`, for its caption."""
    data = content["dataset"]
    return (
        f"{dataset_title(data)}, {_pairs(data)} of {data['n_images']:,} images; "
        f"{content['protocol']['description']}."
    )


def _pairs(data: dict[str, Any]) -> str:
    if is_part(data):
        return f"{data['n_pairs']:,} of its {data['official_pairs']:,} pairs"
    return f"{data['n_pairs']:,} pairs"


def annotated_flags(scores: PairScores) -> list[str]:
    """The difficulty flags of which the pairs have at least two values."""
    frame = scores.frame
    return [flag for flag in FLAGS if frame.loc[frame[flag] >= 0, flag].nunique() > 1]
