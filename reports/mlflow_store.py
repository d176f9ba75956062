"""One experiment of an MLflow store: runs written without duplicates, found and read again.

A run is found by a tag, so the same call never makes it twice. While it is written its state is
RUNNING, after a failure FAILED; a run that a killed call left RUNNING is completed by the next one.
``files.json`` in every run lists the SHA-256 of its files, and the tag ``nemf.files`` is the
SHA-256 of that list; ``nemf.content`` is a hash of all that the run mirrors and is written last.
Works with an SQLite file, a database or a server, as ``MLFLOW_TRACKING_URI`` says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from nemf.claims import Claim, claimed
from nemf.errors import NemfError
from nemf.processes import draft_beside, sweep_drafts

EXPERIMENT = "nemf"
LISTING = "files.json"
_FILES_TAG, _CONTENT_TAG = "nemf.files", "nemf.content"
_SCORES = re.compile(r".+/per-(image|point)/")  # names of metrics that come from score records
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


@dataclass(frozen=True)
class Run:
    """What a run is to hold. The files must not change while it is written.

    ``key``: the tag (name, value) that finds it again; None: the tag of its content, so that other
    content is another run. ``note``: its description in Markdown. ``artifacts``: (file, folder in
    the run or None); ``texts`` and ``pictures`` by their name in the run, a picture as what draws
    it into a file. ``metrics``: one value each; ``curves``: values by step. ``datasets``: fields of
    MLflow's Dataset, and ``context``.
    """

    name: str
    tags: dict[str, str]
    note: str
    key: tuple[str, str] | None = None
    artifacts: Sequence[tuple[Path, str | None]] = ()
    texts: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    datasets: Sequence[dict[str, str]] = ()

    @cached_property
    def files(self) -> dict[str, str]:
        """Hex SHA-256 of artifacts and texts by their path in the run."""
        held = {
            f"{folder}/{file.name}" if folder else file.name: file
            for file, folder in self.artifacts
        }
        digests = {name: _sha256(file.read_bytes()) for name, file in held.items()}
        return digests | {name: _sha256(text.encode()) for name, text in self.texts.items()}

    @cached_property
    def listing(self) -> str:
        """The text of ``files.json``."""
        return json.dumps(self.files, indent=1, sort_keys=True) + "\n"

    @cached_property
    def content(self) -> str:
        """Hex SHA-256 of everything that is mirrored."""
        parts = {
            name: getattr(self, name)
            for name in ("name", "tags", "note", "files", "params", "metrics", "curves", "datasets")
        }
        parts["pictures"] = sorted(self.pictures)
        return _sha256(json.dumps(parts, sort_keys=True).encode())


class Store:
    """The experiment in a store that answered, see :func:`open_store`."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id

    def link(self, run_id: str) -> str:
        """Address of a run within MLflow's page."""
        return f"#/experiments/{self._experiment_id}/runs/{run_id}"

    def search_link(self, condition: str) -> str:
        """Address within MLflow's page of the list of runs that fulfil a condition."""
        shown = f"searchFilter={quote(condition, safe='')}&lifecycleFilter=Active"
        return f"#/experiments/{self._experiment_id}/runs?{shown}"

    def publish(self, run: Run) -> str:
        """Makes the store hold the run; writes nothing if it does. Returns the run's id.

        If somebody else makes the same run at the same moment, the older of the two stays.
        """
        key = run.key or (_CONTENT_TAG, run.content)
        held = self._oldest(key)
        made = held is None
        if held is None:
            tags = dict([key])
            held = self._client.create_run(self._experiment_id, tags=tags, run_name=run.name)
        elif self._mirrors(held, run):
            return held.info.run_id
        else:
            self._client.update_run(held.info.run_id, status="RUNNING", name=run.name)
        run_id = held.info.run_id
        now_ms = _later_than(held)
        try:
            self._write_patiently(held, run, now_ms)
        except BaseException:
            with suppress(Exception):  # the first problem is the one to report
                self._client.set_terminated(run_id, "FAILED", end_time=_later_than(held))
            raise
        self._client.set_terminated(run_id, end_time=_later_than(held))
        if made:
            kept = self._oldest(key)
            if kept is not None and kept.info.run_id != run_id:
                self._client.delete_run(run_id)
                return kept.info.run_id
        return run_id

    def newest(self, conditions: dict[str, str | None], order: str) -> Any:
        """Of the finished runs that have these tags (None: any value), the one whose tag ``order``
        is greatest, or None."""
        terms = [
            f"tags.`{name}` {'!=' if value is None else '='} {_quoted(value or '')}"
            for name, value in conditions.items()
        ]
        return self._first([*terms, "attributes.status = 'FINISHED'"], f"tags.`{order}` DESC")

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        self._client.set_tag(run_id, name, value)

    def finished_run(self, run_id: str) -> Any:
        """A run by its id; NemfError if it is not there, deleted or not finished."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as problem:
            raise NemfError(f"run {run_id} cannot be read ({_line(problem)})") from None
        if run.info.lifecycle_stage != "active":
            raise NemfError(
                f"run {run_id} is deleted (`mlflow runs restore --run-id {run_id}` brings it back)"
            )
        if run.info.status != "FINISHED":
            raise NemfError(
                f"run {run_id} is {run.info.status}, not FINISHED: publish it again from where it "
                "was computed"
            )
        return run

    def listing(self, run: Any) -> dict[str, str]:
        """SHA-256 by path of a run's files. NemfError if the list is missing or damaged."""
        digest = run.data.tags.get(_FILES_TAG)
        if digest is None:
            raise NemfError(f"run {run.info.run_id} has no tag {_FILES_TAG}: publish it again")
        return json.loads(self.download(run, LISTING, digest))

    def download(self, run: Any, name: str, sha256: str) -> bytes:
        """The content of a run's file. NemfError if it is missing or has another hash."""
        from mlflow.exceptions import MlflowException

        run_id = run.info.run_id
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = self._client.download_artifacts(run_id, name, folder)
                content = Path(path).read_bytes()
            except (MlflowException, OSError) as problem:
                raise NemfError(f"{name} of run {run_id} is missing ({_line(problem)})") from None
        if _sha256(content) != sha256:
            raise NemfError(
                f"{name} of run {run_id} is damaged (SHA-256 {_sha256(content)[:12]}, published as "
                f"{sha256[:12]})"
            )
        return content

    def _mirrors(self, held: Any, run: Run) -> bool:
        finished = held.info.status == "FINISHED"
        return finished and held.data.tags.get(_CONTENT_TAG) == run.content

    def _oldest(self, key: tuple[str, str]) -> Any:
        name, value = key
        return self._first([f"tags.`{name}` = {_quoted(value)}"], "attributes.start_time ASC")

    def _first(self, terms: list[str], order: str) -> Any:
        found = self._client.search_runs(
            [self._experiment_id], " and ".join(terms), max_results=1, order_by=[order]
        )
        return found[0] if found else None

    def _write_patiently(self, held: Any, run: Run, now_ms: int) -> None:
        """MLflow refuses a tag or a dataset that somebody else stores at the same moment."""
        from mlflow.exceptions import MlflowException

        for pause_s in (0.5, 2):
            try:
                self._write(held, run, now_ms)
                return
            except MlflowException:
                time.sleep(pause_s)
                held = self._client.get_run(held.info.run_id)
        self._write(held, run, now_ms)

    def _write(self, held: Any, run: Run, now_ms: int) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id = held.info.run_id
        for file, folder in run.artifacts:
            self._client.log_artifact(run_id, str(file), folder)
        texts = {LISTING: run.listing, "environment.txt": _environment()}
        for name, text in (run.texts | texts).items():
            self._client.log_text(run_id, text, name)
        with tempfile.TemporaryDirectory() as folder:
            for name, draw in run.pictures.items():
                draw(Path(folder) / name)
                self._client.log_artifact(run_id, str(Path(folder) / name))
        self._log_datasets(run_id, run.datasets)
        values = [(n, 0, v) for n, v in self._changed(run, held.data.metrics)]
        values += self._changed_steps(run, held)
        tags = run.tags | {
            "mlflow.source.name": "nemf",
            "mlflow.note.content": run.note,
            _FILES_TAG: _sha256(run.listing.encode()),
        }
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, now_ms, step) for name, step, value in values],
            params=[Param(k, v) for k, v in run.params.items() if k not in held.data.params],
            tags=[RunTag(k, v) for k, v in tags.items()],
        )
        self._client.set_tag(run_id, _CONTENT_TAG, run.content)

    def _changed(self, run: Run, old: dict[str, float]) -> list[tuple[str, float]]:
        """Metrics to log; those of scores that are gone as NaN, since MLflow can delete none."""
        gone = {n: math.nan for n in old if n not in run.metrics and _SCORES.match(n)}
        wanted = sorted((run.metrics | gone).items())
        return [(n, v) for n, v in wanted if not _same(v, old.get(n))]

    def _changed_steps(self, run: Run, held: Any) -> list[tuple[str, int, float]]:
        values = []
        for name, curve in sorted(run.curves.items()):
            old = {}
            if name in held.data.metrics:
                history = self._client.get_metric_history(held.info.run_id, name)
                old = {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)}
            values += [(name, s, v) for s, v in curve.items() if not _same(v, old.get(s))]
        return values

    def _log_datasets(self, run_id: str, datasets: Sequence[dict[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(**{name: value for name, value in fields.items() if name != "context"}),
                [InputTag("mlflow.data.context", fields["context"])],
            )
            for fields in datasets
        ]
        if inputs:
            self._client.log_inputs(run_id, inputs)


def _later_than(held: Any) -> int:
    """Now in ms, but after what the run says of itself, should the clock have been put back: of two
    values of a metric MLflow takes the one of the later time, and of equal times the greater."""
    return max(int(time.time() * 1000), held.info.start_time, (held.info.end_time or 0) + 1)


def _same(value: float, old: float | None) -> bool:
    return old is not None and (value == old or (math.isnan(value) and math.isnan(old)))


def _quoted(text: str) -> str:
    """A text as MLflow's searches take it."""
    for mark in "'\"":
        if mark not in text:
            return f"{mark}{text}{mark}"
    raise NemfError(f"{text!r}: MLflow cannot search for a name with both kinds of quotes")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _line(problem: Exception) -> str:
    """The first line of what an exception says."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]


@cache
def _environment() -> str:
    found = {d.name: d.version for d in distributions() if d.name}
    lines = [f"{name}=={found[name]}" for name in sorted(found, key=str.casefold)]
    return "# installed where this run was published\n" + "\n".join(lines) + "\n"


# -- opening it ---------------------------------------------------------------------------------


@contextmanager
def open_store(out: Path, experiment: str = EXPERIMENT, *, make: bool = True) -> Iterator[Store]:
    """An experiment in the store of an output folder, for this process alone as far as the folder
    goes.

    ``make``: whether store and experiment are made if they are not there. NemfError in one line
    for anything that the store does wrong, also later in the block.
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
                _check_sqlite(uri, make)
                client = MlflowClient(tracking_uri=uri)
                store = Store(client, _experiment(client, uri, out, experiment, make))
            with _unless_set(_AFTERWARDS):
                yield store
        except (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError) as problem:
            raise NemfError(_refusal(uri, out, problem, make)) from problem


def _refusal(uri: str, out: Path, problem: Exception, writing: bool) -> str:
    shown = without_password(uri)
    reason = _line(problem).replace(uri, shown)
    if os.environ.get("MLFLOW_TRACKING_URI"):
        remedy = "start it or correct MLFLOW_TRACKING_URI"
    else:
        remedy = f"free or move away {out / 'mlflow.db'}"
    what = "take the runs" if writing else "give the runs"
    safe = f"the results are safe in {out}: " if writing else ""
    return (
        f"MLflow at {shown} did not {what} ({reason}); {safe}{remedy}, then run the same command "
        "again"
    )


def _experiment(client: Any, uri: str, out: Path, name: str, make: bool) -> str:
    """Id of the experiment, made if need be."""
    from mlflow.exceptions import MlflowException

    location = _artifact_location(uri, out)
    experiment = client.get_experiment_by_name(name)
    if experiment is None and not make:
        raise NemfError(
            f"MLflow at {without_password(uri)} has no experiment {name!r}: nothing was "
            "published there"
        )
    if experiment is None:
        try:
            # The kind decides which page MLflow opens the experiment with.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(name, artifact_location=location, tags=kind)
        except MlflowException:  # somebody else, on another machine, was quicker
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise NemfError(
            f"MLflow's experiment {name!r} is deleted: bring it back with `mlflow "
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


def _check_sqlite(uri: str, make: bool) -> None:
    """Tries to write an SQLite store first: MLflow repeats a hopeless opening for 100 seconds."""
    from sqlalchemy.engine import make_url

    file = make_url(uri).database if uri.startswith("sqlite") else None
    if not file:
        return
    if not make and not Path(file).exists():
        raise NemfError(f"{file}: there is no such MLflow store")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    sweep_drafts(Path(file))
    if not Path(file).exists():
        _make_sqlite(Path(file))
    with closing(sqlite3.connect(file, timeout=5)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


def _make_sqlite(file: Path) -> None:
    """An SQLite file with MLflow's tables, whole or not at all: MLflow makes them one by one and
    cannot go on with a part of them."""
    from mlflow import MlflowClient

    draft = draft_beside(file)
    try:
        MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # somebody else was quicker
            os.link(draft, file)
    finally:
        for left in list(draft.parent.iterdir()):
            if left.name.startswith(draft.name):  # SQLite's journals too
                left.unlink(missing_ok=True)


def _claim(out: Path) -> AbstractContextManager[Claim]:
    """One process per output folder: two at once would both find a run missing and make it."""
    busy = "another process has been publishing for long; stop it"
    return claimed(out, ".publish.lock", busy, timeout_s=_LOCK_TIMEOUT_S)


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow's warnings only: no INFO lines on its tables, no addresses, no bars of its own."""
    manners = {
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    with _unless_set(manners):
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
