"""The MLflow writer: mirrors the records on disk to MLflow, again and again without duplicates.

The files below the output folder are the truth. Each current prediction file with its score
records is a run of the experiment "nemf", found again by the tag ``nemf.cell``; each version of a
table is a run of its own. The tag ``nemf.content`` says what a run mirrors and is written last, so
a run that a killed or failed call left behind is completed by the next call.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from nemf.errors import NemfError
from nemf.files import claimed
from nemf.pairs import FLAGS
from nemf.predictions import Predictions
from reports.records import alpha_name, current_predictions, read_record

EXPERIMENT = "nemf"
_LAYOUT = 1  # of what is written; a change publishes every run again
_NOTE_LIMIT = 8000  # characters that MLflow keeps of a tag
_OURS = re.compile(r"[^/]+/per-(image|point)/")
_FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
_AFTERWARDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
_LOCK_TIMEOUT_S = 600


def tracking_uri(out: Path) -> str:
    """``$MLFLOW_TRACKING_URI``, or else an SQLite file in the output folder.

    NemfError if the folder's name is one that MLflow would read as another.
    """
    chosen = os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        return chosen
    path = (out / "mlflow.db").resolve().as_posix()
    if "?" in path or unquote(path) != path:
        raise NemfError(
            f"{path}: MLflow cannot keep an SQLite file under a name with '?' or a %-escape; "
            "choose another OUT= folder or set MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{path}"


def without_password(uri: str) -> str:
    """The URI as it may be printed."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


def publish_cells(out: Path) -> dict[str, str]:
    """Mirrors every current prediction file and its score records; cell id -> run id.

    A cell's id is its folder below ``<out>/predictions``. A run that already mirrors its cell is
    left untouched; otherwise it is completed or updated. A metric that no record holds any more is
    logged as NaN, since MLflow can delete none.

    NemfError if a record scores another file than the one beside it, or the store does not answer.
    """
    runs = [_cell_run(out, file) for file in current_predictions(out)]
    if not runs:
        return {}
    with _open_store(out) as store:
        return {run.tags["nemf.cell"]: store.publish(run) for run in runs}


def publish_table(
    out: Path,
    name: str,
    files: list[Path],
    markdown: str,
    cells: dict[str, str],
    tags: dict[str, str],
) -> str:
    """Mirrors a table as a run of its own and returns the run's id.

    ``files`` become artifacts below ``table/``, ``markdown`` the description, ``cells`` (cell id ->
    run id, from :func:`publish_cells`) links and ``cells.json``. The same content is the same run;
    other content is a new one, so the runs of one name are the table's history. NemfError if the
    store does not answer.
    """
    parts = [(f"file {file.name}", file.read_bytes()) for file in files]
    for label, value in (("name", name), ("markdown", markdown), ("cells", cells), ("tags", tags)):
        parts.append((label, json.dumps(value, sort_keys=True).encode()))
    content = _digest(parts)
    kind = " SYNTHETIC" if tags.get("synthetic") == "true" else ""
    with _open_store(out) as store:
        links = [f"- [{cell}]({store.link(run_id)})" for cell, run_id in sorted(cells.items())]
        note = f"{markdown}\n**Runs of its cells**\n\n" + "\n".join(links) if links else markdown
        run = _Run(
            identity=("nemf.content", content),
            content=content,
            name=f"{name}{kind}",
            tags={**tags, "nemf.table": name, "nemf.cells": str(len(cells))},
            note=_fit_note(note, "table/"),
            artifacts=[(file, "table") for file in files],
            texts={"cells.json": json.dumps(cells, indent=1, sort_keys=True) + "\n"},
        )
        return store.publish(run)


# -- what a run holds ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What a run is to hold. ``identity``: the tag that finds it again; ``content``: hash of all
    that is mirrored; ``artifacts``: (file, folder in the run or None)."""

    identity: tuple[str, str]
    content: str
    name: str
    tags: dict[str, str]
    note: str
    artifacts: list[tuple[Path, str | None]]
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, str] | None = None  # fields of MLflow's Dataset, and "context"


def _cell_run(out: Path, file: Path) -> _Run:
    meta = Predictions.read(file, ["pair"]).meta
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    records = {p.stem: (p, read_record(p)) for p in sorted((file.parent / "scores").glob("*.json"))}
    for path, record in records.values():
        if record["predictions_sha256"] != digest:
            raise NemfError(f"{path}: scores an older {file.name}; run `nemf score {file}` again")
    cell = file.parent.relative_to(out / "predictions").as_posix()
    cell = re.sub(r"[^\w./-]", "_", cell)  # it is quoted in a search
    parts = [("predictions", digest.encode())]
    parts += [(stem, path.read_bytes()) for stem, (path, _) in records.items()]
    content = _digest(parts)
    scores = {stem: record for stem, (_, record) in records.items()}
    extra = file.parent / "cell.json"
    synthetic = "SYNTHETIC " if meta["synthetic"] else ""
    label = meta["matcher"]["label"]
    return _Run(
        identity=("nemf.cell", cell),
        content=content,
        name=f"{label} / {synthetic}{meta['title']} {meta['split']} / {meta['plan']}",
        tags={"nemf.cell": cell, **_cell_tags(meta, scores)},
        note=_fit_note(_cell_note(meta, scores), "scores/"),
        artifacts=[
            (file, None),
            *([(extra, None)] if extra.exists() else []),
            *((path, "scores") for path, _ in records.values()),
        ],
        params=_cell_params(meta),
        metrics=_metrics(scores),
        texts={"environment.txt": _environment()},
        dataset=_dataset_input(meta),
    )


def _cell_tags(meta: dict[str, Any], scores: dict[str, dict[str, Any]]) -> dict[str, str]:
    matcher, code = meta["matcher"], meta["code"] or {}
    tags = {
        "commit": code.get("commit"),
        "dirty": code.get("dirty"),
        "dataset": meta["dataset"],
        "split": meta["split"],
        "fingerprint": meta["fingerprint"],
        "synthetic": meta["synthetic"],
        "plan": meta["plan"],
        "protocols": ", ".join(scores) or "none yet",
        "matcher": matcher["label"],
        "external": matcher.get("external", False),
    }
    if code.get("commit"):
        tags["mlflow.source.git.commit"] = code["commit"]
    if matcher.get("external"):
        tags["external_file_sha256"] = matcher["file_sha256"]
    else:
        tags["matcher_card"] = json.dumps(matcher["card"], sort_keys=True)
        tags["weights_sha256"] = matcher["weights_sha256"]
        tags["random_weights"] = matcher["random_weights"]
    return {name: _text(value) for name, value in tags.items()}


def _cell_params(meta: dict[str, Any]) -> dict[str, str]:
    """Few, and functions of the cell's id: MLflow never changes a parameter."""
    params = {name: meta[name] for name in ("dataset", "split", "plan")}
    params["matcher"] = meta["matcher"]["label"]
    if "facts" in meta:
        params["seed"] = meta["facts"]["seed"]
    if "backbone" in meta["matcher"].get("config", {}):
        params["backbone"] = meta["matcher"]["config"]["backbone"]
    return {name: _text(value) for name, value in params.items()}


def _metrics(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Every number of the records by its name in MLflow, e.g.
    ``canonical-1/per-image/car_G/pck-0.10``."""
    rules = _words(scores)
    metrics: dict[str, float] = {}
    for stem, record in scores.items():
        entries = record["metrics"]
        values = {(entry["group"], entry["value"]) for entry in entries}
        flags = {(g, v): f"{g}-{v}" for g, v in values if g in FLAGS}
        classes = _words((v for g, v in values if g == "class"), {"all", *flags.values()})
        for entry in entries:
            group, value = entry["group"], entry["value"]
            word = classes[value] if group == "class" else flags.get((group, value), "all")
            folder = f"{rules[stem]}/per-{entry['averaging']}/{word}"
            name = f"{folder}/{alpha_name(entry['alpha'])}"
            metrics[name] = entry["pck"]
            if group == "all":
                for bound in ("low", "high"):
                    if entry[bound] is not None:
                        metrics[f"{name}-{bound}"] = entry[bound]
                metrics[f"{folder}/n-pairs"] = float(entry["n_pairs"])
                metrics[f"{folder}/n-images"] = float(entry["n_images"])
    return metrics


def _words(texts: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Each text as a word that may stand in a metric's name: ``canonical@1`` is ``canonical-1``,
    ``car(G)`` is ``car_G``.

    Texts that would share a word with each other or with ``taken`` get a hash of their own text,
    so that a name depends on no order. Case does not tell words apart (in some databases).
    """
    plain = {}
    for text in sorted(set(texts)):
        word = re.sub(r"[^\w.-]+", "_", text.replace("@", "-")).strip("._")
        plain[text] = word[:80] or "unnamed"
    uses = Counter(word.casefold() for word in [*plain.values(), *taken])
    return {
        text: f"{word}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        if uses[word.casefold()] > 1
        else word
        for text, word in plain.items()
    }


def _dataset_input(meta: dict[str, Any]) -> dict[str, str]:
    kind = " (synthetic)" if meta["synthetic"] else ""
    facts = {"fingerprint": meta["fingerprint"], "layout": meta["layout"], "split": meta["split"]}
    return {
        "name": f"{meta['title']}{kind}",
        "digest": meta["fingerprint"][:12],
        "source_type": "local",
        "source": json.dumps({"uri": meta["dataset"], **facts}),
        "profile": json.dumps({"num_rows": meta["n_pairs"], "rows": "image pairs"}),
        "context": meta["split"],
    }


def _cell_note(meta: dict[str, Any], scores: dict[str, dict[str, Any]]) -> str:
    """The run's description: main numbers, then where they come from."""
    matcher, facts = meta["matcher"], meta.get("facts", {})
    official = meta["official_pairs"]
    part = f" of {official}" if official not in (None, meta["n_pairs"]) else ""
    kind = "real images"
    if meta["synthetic"]:
        kind = "**SYNTHETIC stand-in, says nothing about real images**"
    images = "".join(f" of {r['n_images']} distinct images" for r in list(scores.values())[:1])
    dataset = f"{meta['title']} {meta['split']} ({meta['n_pairs']}{part} pairs{images})"
    lines = [
        f"**{matcher['label']}** on {dataset}, {kind}; queries {meta['plan']}.",
        "",
        *_score_lines(scores),
        "",
        *(
            f"- {description}"
            for description in dict.fromkeys(r["protocol"]["description"] for r in scores.values())
        ),
        f"- Dataset fingerprint `{meta['fingerprint']}`",
    ]
    if matcher.get("external"):
        lines.append(f"- Predictions made elsewhere, file SHA-256 `{matcher['file_sha256']}`")
    else:
        card = matcher["card"]
        year = f", {card['year']}" if card["year"] else ""
        random = " (**random weights**)" if matcher["random_weights"] else ""
        oracle = "; **oracle class**" if card["oracle_class"] else ""
        libraries = ", ".join(f"{name} {v}" for name, v in facts["libraries"].items())
        lines += [
            f"- {card['title']}: {card['description']} ({card['paper']}{year}{oracle})",
            f"- Code {_commit(meta['code'])}; seed {facts['seed']}; on {facts['device']}",
            f"- {libraries}",
            f"- Weights SHA-256 `{matcher['weights_sha256']}`{random}",
        ]
    scored_by = dict.fromkeys(_commit(record["scored_by"]) for record in scores.values())
    if scored_by:
        lines.append(f"- Scored by code {', '.join(scored_by)}")
    lines.append(f"- Prediction key `{meta['key']}`")
    return "\n".join(lines)


def _score_lines(scores: dict[str, dict[str, Any]]) -> list[str]:
    if not scores:
        return ["Not scored yet."]
    columns, head = [], ["PCK at"]
    for stem, record in scores.items():
        averaging = record["protocol"]["averaging"]
        head.append(f"{stem}, per {averaging}")
        columns.append(
            {
                entry["alpha"]: _interval(entry)
                for entry in record["metrics"]
                if (entry["group"], entry["averaging"]) == ("all", averaging)
            }
        )
    rows = [head, ["---"] + ["---:"] * len(columns)]
    for alpha in sorted({alpha for column in columns for alpha in column}):
        rows.append([f"{alpha:g}", *(column.get(alpha, "–") for column in columns)])
    levels = ", ".join(f"{level:.0%}" for level in sorted({r["level"] for r in scores.values()}))
    table = [f"| {' | '.join(row)} |" for row in rows]
    return [*table, "", f"Percent, with {levels} intervals."]


def _interval(entry: dict[str, Any]) -> str:
    if entry["low"] is None or entry["high"] is None:
        return f"{entry['pck'] * 100:.1f}"
    return f"{entry['pck'] * 100:.1f} [{entry['low'] * 100:.1f}, {entry['high'] * 100:.1f}]"


def _commit(code: dict[str, Any] | None) -> str:
    if not code or not code.get("commit"):
        return "of an unknown commit"
    return f"`{code['commit'][:12]}`" + (" (with uncommitted changes)" if code.get("dirty") else "")


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fit_note(note: str, where: str) -> str:
    """The note, cut after a whole line if MLflow would not keep all of it."""
    if len(note) <= _NOTE_LIMIT:
        return note
    rest = f"\n\n… the rest is in the artifacts below `{where}`."
    return note[: _NOTE_LIMIT - len(rest)].rpartition("\n")[0] + rest


@cache
def _environment() -> str:
    found = {d.name: d.version for d in distributions() if d.name}
    lines = [f"{name}=={found[name]}" for name in sorted(found, key=str.casefold)]
    return "# installed where this run was published\n" + "\n".join(lines) + "\n"


def _digest(parts: Iterable[tuple[str, bytes]]) -> str:
    """Hex SHA-256 over named parts, order included."""
    total = hashlib.sha256(f"layout {_LAYOUT}\n".encode())
    for name, content in parts:
        total.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


# -- the store ----------------------------------------------------------------------------------


class _Store:
    """One experiment of an MLflow store that answered."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self.client, self.experiment_id = client, experiment_id

    def link(self, run_id: str) -> str:
        """Address of a run within MLflow's page."""
        return f"#/experiments/{self.experiment_id}/runs/{run_id}"

    def publish(self, run: _Run) -> str:
        """Makes the store hold the run; writes nothing if it does. Returns the run's id."""
        held = self._find(run.identity)
        if held is not None:
            finished = held.info.status == "FINISHED"
            if finished and held.data.tags.get("nemf.content") == run.content:
                return held.info.run_id
            self.client.update_run(held.info.run_id, status="RUNNING", name=run.name)
        else:
            held = self.client.create_run(
                self.experiment_id, tags=dict([run.identity]), run_name=run.name
            )
        try:
            self._write(held, run)
        except BaseException:
            with suppress(Exception):  # the first problem is the one to report
                self.client.set_terminated(held.info.run_id, "FAILED")
            raise
        self.client.set_terminated(held.info.run_id)
        return held.info.run_id

    def _find(self, identity: tuple[str, str]) -> Any:
        """The oldest run with this tag, or None."""
        name, value = identity
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{name}` = '{value}'",
            max_results=1,
            order_by=["attributes.start_time ASC"],
        )
        return found[0] if found else None

    def _write(self, held: Any, run: _Run) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id = held.info.run_id
        for file, folder in run.artifacts:
            self.client.log_artifact(run_id, str(file), folder)
        for name, text in run.texts.items():
            self.client.log_text(run_id, text, name)
        self._log_dataset(run_id, run.dataset)
        # Of two values at one time MLflow takes the greater as the latest.
        now_ms = max(int(time.time() * 1000), held.info.start_time, (held.info.end_time or 0) + 1)
        old, new = held.data.metrics, dict(run.metrics)
        new |= {name: math.nan for name in old if name not in new and _OURS.match(name)}
        tags = run.tags | {"mlflow.source.name": "nemf", "mlflow.note.content": run.note}
        self.client.log_batch(
            run_id,
            metrics=[
                Metric(name, value, now_ms, 0)
                for name, value in sorted(new.items())
                if not _same(value, old.get(name))
            ],
            params=[Param(k, v) for k, v in run.params.items() if k not in held.data.params],
            tags=[RunTag(k, v) for k, v in tags.items()],
        )
        self.client.set_tag(run_id, "nemf.content", run.content)

    def _log_dataset(self, run_id: str, dataset: dict[str, str] | None) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if dataset is None:
            return
        fields = {name: value for name, value in dataset.items() if name != "context"}
        context = InputTag("mlflow.data.context", dataset["context"])
        self.client.log_inputs(run_id, [DatasetInput(Dataset(**fields), [context])])


def _same(value: float, old: float | None) -> bool:
    return old is not None and (value == old or (math.isnan(value) and math.isnan(old)))


@contextmanager
def _open_store(out: Path) -> Iterator[_Store]:
    """The store of an output folder, for this process alone as far as the folder goes.

    NemfError in one line for anything that the store does wrong, also later in the block.
    """
    uri = tracking_uri(out)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before mlflow is imported
    with _claim(out), _quiet():
        from alembic.util import CommandError
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with _unless_set(_FIRST_CONTACT):
                _check_sqlite(uri)
                client = MlflowClient(tracking_uri=uri)
                store = _Store(client, _experiment(client, uri, out))
            with _unless_set(_AFTERWARDS):
                yield store
        except (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError) as problem:
            raise NemfError(_refusal(uri, out, problem)) from problem


def _refusal(uri: str, out: Path, problem: Exception) -> str:
    reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    shown = without_password(uri)
    reason = reason.replace(uri, shown)[:200]
    if os.environ.get("MLFLOW_TRACKING_URI"):
        remedy = "start it or correct MLFLOW_TRACKING_URI"
    else:
        remedy = f"free or move away {out / 'mlflow.db'}"
    return (
        f"MLflow at {shown} did not take the runs ({reason}); the results are safe in {out}: "
        f"{remedy}, then run the same command again"
    )


def _experiment(client: Any, uri: str, out: Path) -> str:
    """Id of the experiment, made if need be."""
    from mlflow.exceptions import MlflowException

    location = _artifact_location(uri, out)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=location)
        except MlflowException:  # somebody else, on another machine, was quicker
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise NemfError(
            f"MLflow's experiment {EXPERIMENT!r} is deleted: bring it back with `mlflow "
            f"experiments restore -x {experiment.experiment_id}`, then run the same command again"
        )
    is_default = not os.environ.get("MLFLOW_TRACKING_URI")
    if is_default and experiment.artifact_location != location:
        raise NemfError(
            f"{out / 'mlflow.db'}: keeps its artifacts in {experiment.artifact_location}, so the "
            "folder was moved or copied: move mlflow.db away and run the same command again (the "
            "runs are made anew from the files)"
        )
    return experiment.experiment_id


def _artifact_location(uri: str, out: Path) -> str | None:
    """Where a new experiment keeps its artifacts; None leaves it to the server.

    Without a server MLflow would choose a folder below the current one. A database file has them
    beside it, any other database below the output folder that comes first.
    """
    from mlflow.store.db.db_types import DATABASE_ENGINES
    from sqlalchemy.engine import make_url

    if urlsplit(uri).scheme.partition("+")[0] not in DATABASE_ENGINES:
        return None
    file = make_url(uri).database if uri.startswith("sqlite") else None
    folder = Path(file).parent if file else out
    return (folder / "mlartifacts").resolve().as_uri()


def _check_sqlite(uri: str) -> None:
    """Tries to write an SQLite store first: MLflow repeats a hopeless opening for 100 seconds."""
    from sqlalchemy.engine import make_url

    file = make_url(uri).database if uri.startswith("sqlite") else None
    if not file:
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file, timeout=5)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


def _claim(out: Path) -> AbstractContextManager[None]:
    """One publisher per output folder: two at once would both find a run missing and make it."""
    busy = "another process has been publishing for long; stop it"
    return claimed(out, ".publish.lock", busy, timeout_s=_LOCK_TIMEOUT_S)


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow's warnings only: no INFO lines on its tables, no address of every run on stdout."""
    with _unless_set({"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}):
        import mlflow  # noqa: F401 (its import sets the level)

        logger = logging.getLogger("mlflow")
        level = logger.level
        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _unless_set(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while, except those that the user has set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
