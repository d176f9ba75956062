"""What a table needs: which cells to predict and which records to score."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.provenance import code_state
from nemf.claims import Busy
from nemf.datasets import dataset_class
from nemf.datasets.index import PairDataset
from nemf.datasets.synthetic import synthetic_marker
from nemf.errors import NemfError, WeightsNotFound
from nemf.files import write_text
from nemf.predictions import FILE_NAME, Predictions
from nemf.progress import shown
from nemf.reading import read_json
from nemf.scoring import Protocol, get_protocol
from reports.records import (
    PairScores,
    current_predictions,
    make_record,
    score_pairs,
    write_record,
)
from reports.tables import TableSpec

log = logging.getLogger(__name__)
TABLES = Path(__file__).parent / "tables"
CEILING_OF = "copy"  # whose predictions carry the truth that ceilings are made of


def table_spec(name: str) -> TableSpec:
    """A specification by number ("1" is ``tables/table1.yaml``) or by path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else TABLES / f"table{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem.removeprefix("table") for p in TABLES.glob("table*.yaml")))
        raise NemfError(f"{path}: no such table specification (tables here: {known})")
    return TableSpec.load(path)


@dataclass(frozen=True)
class TableData:
    """The datasets of a table that are there, and, by title, a sentence on each that is not."""

    datasets: tuple[str, ...]
    synthetic: bool
    missing: dict[str, str]


def find_datasets(spec: TableSpec, root: Path) -> TableData:
    """Which of the table's datasets lie below ``root``.

    NemfError if none does, or if some are synthetic and some real: a table mixes neither.
    """
    if not root.is_dir():
        raise NemfError(
            f"{root}: no such folder; give the root of the datasets with DATA= or --data"
        )
    folders = {
        name: dataset_class(name).find(root) for name in (*spec.columns, *spec.extra_columns)
    }
    found = tuple(name for name, folder in folders.items() if folder is not None)
    if not found:
        wanted = ", ".join(_first_folder(dataset_class(name)) for name in spec.columns)
        raise NemfError(f"{root}: holds none of {wanted}; see docs/datasets.md for the layouts")
    kinds = {name: synthetic_marker(folders[name]) is not None for name in found}
    if len(set(kinds.values())) > 1:
        fake = ", ".join(name for name in found if kinds[name])
        raise NemfError(
            f"{root}: {fake} is synthetic and the rest is not; keep them in two folders"
        )
    absent = [dataset_class(name) for name in spec.columns if folders[name] is None]
    missing = {
        c.title: f"{c.title}: no folder {_first_folder(c)} below the data root." for c in absent
    }
    return TableData(found, kinds[found[0]], missing)


def _first_folder(dataset: Any) -> str:
    return dataset.folders[0] if dataset.folders else "pairs.json"


def protocols_of(spec: TableSpec, official: str | None) -> list[Protocol]:
    """The protocols a matcher is scored under: its paper's own and the fixed ones of the table."""
    ids = [official if name == "paper" else name for name in spec.protocols]
    return list({p.id: p for p in (get_protocol(i) for i in ids if i)}.values())


def predict_table(
    spec: TableSpec,
    data: Path,
    out: Path,
    matchers: tuple[str, ...] | None,
    options: dict[str, Any],
    train_missing: bool = False,
    full: bool = False,
) -> None:
    """Predicts every cell of a table that is not there yet, after training the matchers whose
    recipe has not been run here (with ``train_missing``). ``full``: see :meth:`TableSpec.rows`.
    What cannot be measured for want of a dataset or of weights is recorded in
    ``<out>/<table>/job.json`` for the footnotes."""
    from experiments.configurations import load_config, relabel
    from experiments.prediction import predict
    from experiments.ranks import is_first
    from nemf.cards import available_matchers

    available = find_datasets(spec, data)
    missing = dict(available.missing)
    names = matchers or spec.rows(synthetic=available.synthetic, full=full)
    cards, cells = available_matchers(), []
    for matcher in names:
        for dataset in available.datasets:
            config = load_config(f"{matcher}/{dataset}", dict(options))
            relabel(config, options)
            config.dataset.split = spec.split
            card = cards[config.model.type]
            layout = getattr(dataset_class(dataset), "layout", None)
            if layout is None:  # of one's own pairs it depends on what they annotate
                layout = open_dataset(dataset, data, spec.split).layout
            protocols = protocols_of(spec, card.official_protocol)
            for plan in dict.fromkeys(p.plan.for_layout(layout) for p in protocols):
                cells.append((matcher, dataset, config, plan))
    if train_missing:
        from experiments.training import train

        recipes = dict.fromkeys(config.get("recipe") for _, _, config, _ in cells)
        spread(partial(train, recipe, out, {}, data) for recipe in recipes if recipe is not None)
    without: set[str] = set()

    def predict_cell(number: int, wait: bool) -> None:
        matcher, dataset, config, plan = cells[number]
        if matcher in without:
            return
        label = f"[{number + 1}/{len(cells)}] {matcher}/{dataset} {plan}"
        bar = label if shown() else None
        if bar is None:
            log.info("%s", label)
        try:
            predict(config, data=data, out=out, plan=plan, progress=bar, wait=wait)
        except WeightsNotFound as problem:
            without.add(matcher)
            missing[config.label] = _no_weights(config.label)
            log.warning("%s is left out: %s", matcher, problem)

    spread(partial(predict_cell, number) for number in range(len(cells)))
    job = {"synthetic": available.synthetic, "missing": missing}
    if is_first():
        write_text(out / spec.name / "job.json", json.dumps(job, indent=1) + "\n")


def spread(tasks: Iterable[Callable[..., object]]) -> None:
    """Calls every task with ``wait=False`` and those that another job holds (Busy) again with
    ``wait=True``, so that jobs that share an output folder do not wait while there is work."""
    held = []
    for task in tasks:
        try:
            task(wait=False)
        except Busy as problem:
            log.info("%s: left to it", problem)
            held.append(task)
    for task in held:
        task(wait=True)


def missing_sentences(job: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    """What a job left out, less the datasets and matchers that ``records`` show all the same;
    matchers that lack their weights in one sentence."""
    metas = [record["predictions"] for record in records]
    there = {meta["title"] for meta in metas} | {meta["matcher"]["label"] for meta in metas}
    missing = {about: said for about, said in job["missing"].items() if about not in there}
    weightless = [about for about, said in missing.items() if said == _no_weights(about)]
    said = [sentence for about, sentence in missing.items() if about not in weightless]
    return [*said, f"for want of weights, {'; '.join(weightless)}."] if weightless else said


def _no_weights(label: str) -> str:
    return f"{label}: no weights."


def last_job(spec: TableSpec, out: Path) -> dict[str, Any]:
    """What the last :func:`predict_table` of this output folder was about: ``synthetic`` (None if
    there was none) and ``missing``, sentences by the title or label they are about."""
    path = out / spec.name / "job.json"
    if not path.exists():
        return {"synthetic": None, "missing": {}}
    job = read_json(path)
    if not isinstance(job, dict) or not isinstance(job.get("missing"), dict):
        raise NemfError(f"{path}: does not tell of a job; run `nemf predict --table` again")
    return {"synthetic": None} | job


def score_file(
    file: Path,
    protocols: list[Protocol],
    alphas: tuple[float, ...] = (),
    oracle_grids: tuple[int, ...] = (),
) -> Iterator[dict[str, Any]]:
    """Scores one prediction file under protocols of its plan; writes and yields the records, which
    lie in ``scores/`` beside it. ``alphas`` come on top of the protocol's own, so that a record
    never loses what a table needs. ``oracle_grids`` adds the ceilings of those resolutions."""
    predictions = Predictions.read(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for protocol in protocols:
        for grid in (None, *oracle_grids):
            every = sorted({*protocol.alphas, *alphas})
            scores = score_pairs(predictions, protocol, every, oracle_grid=grid)
            record = make_record(scores, digest, code_state())
            name = protocol.id if grid is None else f"oracle-grid-{grid}-{protocol.id}"
            write_record(file.parent / "scores" / f"{name}.json", record)
            yield record


def score_table(spec: TableSpec, out: Path) -> int:
    """Scores every current prediction file on a table's datasets; returns how many records were
    written."""
    count = 0
    for file in current_predictions(out):
        predictions = Predictions.read(file, ["pair"])
        if predictions.meta["dataset"] not in (*spec.columns, *spec.extra_columns):
            continue
        matcher = predictions.meta["matcher"]
        official = matcher.get("card", {}).get("official_protocol")
        layout = predictions.meta["layout"]
        fitting = [
            p for p in protocols_of(spec, official) if p.plan.for_layout(layout) == predictions.plan
        ]
        grids = spec.oracle_grids if matcher["name"] == CEILING_OF else ()
        count += len(list(score_file(file, fitting, spec.alphas, grids)))
    if not count:
        raise NemfError(f"{out}: holds no predictions to score: run `nemf predict` first")
    return count


def rescorer(
    found: Iterable[tuple[Path, dict[str, Any]]], alphas: tuple[float, ...]
) -> Callable[[dict[str, Any]], PairScores]:
    """A function from one of the records ``found`` (with their files, as
    :func:`reports.records.current_records` gives them) to its scores pair by pair at ``alphas``."""
    files = {record["predictions_sha256"]: path.parent.parent / FILE_NAME for path, record in found}

    def rescore(record: dict[str, Any]) -> PairScores:
        predictions = Predictions.read(files[record["predictions_sha256"]])
        protocol = get_protocol(record["protocol"]["id"])
        grid = record["predictions"]["matcher"].get("grid")
        return score_pairs(predictions, protocol, alphas, oracle_grid=grid)

    return rescore


def open_dataset(name: str, data: Path, split: str, **options: Any) -> PairDataset:
    """A dataset by name; NemfError for an unknown one, a missing folder, a wrong option."""
    try:
        return dataset_class(name)(data, split, **options)
    except TypeError as problem:
        raise NemfError(f"dataset {name}: {problem}") from None
