"""The gate's stored answers: what a commit's matchers answered and scored when it was accepted.

Below ``experiments/accepted`` (``accepted_real`` for real images): ``accepted.json`` (the reason,
the commit, which stand-ins, the file of every cell) and per prediction a parquet file, one row per
pair: ``pair``, ``category``, ``n`` keypoints, per protocol and alpha the number right
(``canonical@1/pck-0.05``), and ``answers``, float32 x, y px of every keypoint. The questions are
not stored but for a hash; the dataset's fingerprint says which they were.

Stand-ins that the same sources rendered on another processor may have other bytes: a pixel on the
edge between two surfaces falls to the other one. They ask the same questions, so they count as the
same version of the dataset, and "pixels" is named as a cause of what differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.store import slug
from nemf.errors import NemfError
from nemf.files import write_text, write_whole
from nemf.predictions import Predictions
from nemf.reading import read_json, read_parquet
from reports.records import alpha_name
from reports.regression import FORMAT
from reports.regression_policy import Cell
from reports.regression_watches import QUESTIONS, Side

FOLDER = Path("experiments") / "accepted"  # below the root of the repository
REAL_FOLDER = Path("experiments") / "accepted_real"


def write_accepted(
    folder: Path,
    cells: Mapping[Cell, tuple[Path, str, pd.DataFrame]],
    alphas: Sequence[float],
    commit: Mapping[str, Any],
    reason: str,
    stand_ins: str | None,
) -> list[Path]:
    """Replaces what was accepted. ``cells``: prediction file, protocol id and per-pair scores of
    each; ``commit``: "commit" and "tree" of the code; ``stand_ins``: what names the sources that
    rendered the images, None for other data. Returns the files."""
    by_file: dict[Path, list[Cell]] = {}
    for cell, (file, _, _) in cells.items():
        by_file.setdefault(file, []).append(cell)
    listed, contents = {}, {}
    for file, scored in by_file.items():
        predictions = Predictions.read(file)
        name = slug(f"{scored[0].prediction}-{predictions.meta['plan']}") + ".parquet"
        _, _, frame = cells[scored[0]]
        columns = {key: frame[key].astype(str) for key in ("pair", "category")}
        columns["n"] = frame["n"].astype(np.int16)
        for cell in scored:
            _, id_, frame = cells[cell]
            listed[str(cell)] = {"file": name, "protocol": id_}
            for alpha in map(alpha_name, alphas):
                columns[f"{id_}/{alpha}"] = frame[alpha].astype(np.int16)
        starts = np.r_[predictions.pair_starts, len(predictions)]
        points = predictions.points("pred")
        answers = [points[a:b].ravel() for a, b in itertools.pairwise(starts)]
        table = pa.table(columns).append_column(
            "answers", pa.array(answers, pa.list_(pa.float32()))
        )
        told = predictions.meta | {"questions": _questions(predictions)}
        meta = {b"nemf": json.dumps(told, sort_keys=True).encode()}
        contents[name] = table.replace_schema_metadata(meta)
    shutil.rmtree(folder, ignore_errors=True)
    for name, table in contents.items():
        write_whole(
            folder / name, lambda path, table=table: pq.write_table(table, path, compression="zstd")
        )
    listing = {"format": FORMAT, "reason": reason, "stand_ins": stand_ins}
    listing |= {"commit": commit["commit"], "tree": commit["tree"], "cells": listed}
    write_text(folder / "accepted.json", json.dumps(listing, indent=1) + "\n")
    return [folder / "accepted.json", *(folder / name for name in contents)]


def nothing_accepted(where: str) -> str:
    """What to do where there are no accepted answers."""
    return (
        f"{where}: no accepted scores; run `nemf regress --accept 'why'`, or compare with a commit "
        "by --base"
    )


def _restore(path: Path) -> str:
    """What to do about a damaged file: accepting anew would take today's answers unjudged."""
    return f"restore it (`git checkout -- {path.name}` in its folder)"


def read_listing(folder: Path) -> dict[str, Any]:
    """What accepted.json says; NemfError if there is none."""
    path = folder / "accepted.json"
    if not path.exists():
        raise NemfError(nothing_accepted(str(path)))
    try:
        accepted = read_json(path)
    except NemfError as problem:
        raise NemfError(f"{problem}; {_restore(path)}") from None
    if not isinstance(accepted, dict) or accepted.get("format") != FORMAT:
        raise NemfError(f"{path}: holds no accepted answers of format {FORMAT}; accept anew")
    cells = accepted.get("cells")
    if not isinstance(cells, dict) or not all(map(_is_stored, cells.values())):
        raise NemfError(f"{path}: does not name the files of its cells; {_restore(path)}")
    return accepted


def _is_stored(entry: Any) -> bool:
    """Whether a cell names a file beside the listing, and a protocol."""
    if not isinstance(entry, dict) or not isinstance(entry.get("protocol"), str):
        return False
    name = entry.get("file")
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) is not None


def read_accepted(
    path: Path, protocol: str, head: Predictions | None, file: Path, *, same_stand_ins: bool
) -> Side:
    """A cell's accepted side. The questions are ``head``'s: its prediction file with the accepted
    answers is written to ``file``. Where the metadata say that these are other questions, nobody
    looks at the answers. ``same_stand_ins``: the same sources rendered both sides' images.
    NemfError if the stored file cannot be read."""
    try:
        table = read_parquet(path)
        meta = json.loads((table.schema.metadata or {})[b"nemf"])
        frame = table.drop_columns(["answers"]).to_pandas()
        answers = table["answers"].combine_chunks().flatten().to_numpy().reshape(-1, 2)
        means: dict[tuple[str, str, float], float] = {}
        prefix = f"{protocol}/pck-"
        for column in (name for name in frame if name.startswith(prefix)):
            fractions, alpha = frame[column] / frame["n"], float(column.removeprefix(prefix))
            means["all", "all", alpha] = float(fractions.mean())
            for category, part in fractions.groupby(frame["category"]):
                means["class", str(category), alpha] = float(part.mean())
    except (OSError, pa.ArrowException, ValueError, KeyError) as problem:
        raise NemfError(f"{path}: cannot be read ({problem}); {_restore(path)}") from None
    side = Side(None, protocol, means)
    if head is None:
        return side
    questions = head.table
    if len(answers) == len(head):
        for axis, values in zip("xy", answers.T, strict=True):
            at = questions.column_names.index(f"pred_{axis}")
            column = pa.array(values, pa.float32())
            questions = questions.set_column(at, questions.field(at), column)
    elif all(meta[key] == head.meta[key] for key in ("fingerprint", "plan", "split")):
        text = f"{len(answers)} answers are stored for {len(head)} questions"
        return Side(None, None, {}, text)
    fingerprint = head.meta["fingerprint"]
    alike = same_stand_ins and meta["questions"] == _questions(head)
    if alike and meta["fingerprint"] != fingerprint:
        meta |= {"fingerprint": fingerprint, "pixels": meta["fingerprint"]}
    predictions = Predictions(questions, meta)
    predictions.write(file)
    return dataclasses.replace(side, predictions=predictions)


def _questions(predictions: Predictions) -> str:
    """Hex SHA-256 of what was asked and what is true."""
    digest = hashlib.sha256()
    for name in QUESTIONS:
        values = predictions.column(name)
        if values.dtype == object:
            digest.update("\n".join(map(str, values)).encode())
        else:
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
