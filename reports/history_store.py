"""The history of regression tracking in MLflow, one run per commit, and the way back.

Experiment ``nemf-history``. A commit's run is found again by the tag ``nemf.history_commit`` (the
suite that was run, and the SHA); its metrics are the numbers of all cells, so that runs ticked in
MLflow's page compare commits; ``commit.json`` holds what a history says of this commit, its first
parent among it, so a history of any length is put together from the runs alone. One more run per
suite, tag ``nemf.history``, holds the page and the picture published last. The files on disk remain
the truth.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nemf.errors import NemfError
from reports.history_page import history_page
from reports.mlflow_store import Run, Store, open_store
from reports.records import alpha_name
from reports.regression import FORMAT
from reports.tracking import LAST_PUBLISHED, fit_note

log = logging.getLogger(__name__)
EXPERIMENT = "nemf-history"
_COMMIT, _HISTORY = "nemf.history_commit", "nemf.history"


def publish_history(out: Path, content: Mapping[str, Any], files: Sequence[Path]) -> dict[str, str]:
    """Mirrors a history (the content of ``history.json``) and its ``files``; SHA -> run id.

    A run that already mirrors its commit is left untouched, otherwise it is made or updated. The
    first commit was compared with none, so what was published of its changes before stays.
    NemfError if the store does not answer.
    """
    suite = content["suite"]
    with open_store(out, EXPERIMENT) as store:
        runs = {}
        for at, commit in enumerate(content["commits"]):
            entry = _entry(content, at)
            if at == 0:
                held = _published(store, suite, commit["commit"])
                entry["changes"] = held["changes"] if held else None
            runs[commit["commit"]] = store.publish(_commit_run(entry))
        last = content["commits"][-1]
        tags = {"suite": suite, "commit": last["commit"], "synthetic": _word(content["synthetic"])}
        links = [
            f"- [{commit['label']} {commit['subject']}]({store.link(runs[commit['commit']])})"
            for commit in content["commits"]
        ]
        run = Run(
            key=(_HISTORY, suite),
            name=f"history {suite}",
            tags={_HISTORY: suite, **tags},
            note=fit_note("\n".join([history_page(content), *links]), "history.md"),
            artifacts=[(file, None) for file in files],
        )
        run_id = store.publish(run)
        newest = store.newest({_HISTORY: None, LAST_PUBLISHED: None}, LAST_PUBLISHED)
        if newest is None or newest.info.run_id != run_id:
            store.set_tag(run_id, LAST_PUBLISHED, datetime.now(UTC).isoformat())
    return runs


def fetch_history(out: Path, n_commits: int) -> dict[str, Any]:
    """The content of ``history.json`` for the ``n_commits`` up to the commit that was published
    last, as many as there are, put together from their runs.

    What changed at a commit is told as it was found when that was published. NemfError if nothing
    was published, or if what lies in the store is damaged.
    """
    with open_store(out, EXPERIMENT, make=False) as store:
        run = store.newest({_HISTORY: None, LAST_PUBLISHED: None}, LAST_PUBLISHED)
        if run is None:
            raise NemfError(
                "MLflow holds no history: run `nemf regress --history N` in a repository, with the "
                "same MLFLOW_TRACKING_URI"
            )
        listing = store.listing(run)
        last = json.loads(store.download(run, "history.json", listing.get("history.json", "")))
        if last["format"] != FORMAT:
            raise NemfError(f"the history in MLflow has format {last['format']}, not {FORMAT}")
        entries = list(_line(store, last, n_commits))[::-1]
    if len(entries) < n_commits:
        log.warning("only %d commits in a row are published", len(entries))
    cells = dict.fromkeys(cell for entry in entries[::-1] for cell in entry["points"])
    nothing = {"pck": None, "low": None, "high": None}
    return {
        "format": FORMAT,
        "suite": last["suite"],
        "alpha": last["alpha"],
        "synthetic": any(entry["synthetic"] for entry in entries),
        "commits": [entry["commit"] for entry in entries],
        "series": {c: [entry["points"].get(c, nothing) for entry in entries] for c in cells},
        "changes": [
            {"at": at, **change}
            for at, entry in enumerate(entries)
            for change in (entry["changes"] or ())
            if at > 0
        ],
        "compared_by": last["compared_by"],
    }


def _line(store: Store, last: Mapping[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """What is published of the last commit, of its first parent, and so on."""
    sha = last["commits"][-1]["commit"]
    for _ in range(most):
        entry = _published(store, last["suite"], sha) if sha else None
        if entry is None:
            return
        if entry["alpha"] != last["alpha"]:
            log.warning(
                "%s and before were published with PCK@%g, not @%g",
                entry["commit"]["label"], entry["alpha"], last["alpha"],
            )  # fmt: skip
            return
        yield entry
        sha = entry["commit"]["parent"]


def _published(store: Store, suite: str, sha: str) -> dict[str, Any] | None:
    run = store.newest({_COMMIT: f"{suite} {sha}"}, _COMMIT)
    if run is None:
        return None
    listing = store.listing(run)
    return json.loads(store.download(run, "commit.json", listing.get("commit.json", "")))


def _entry(content: Mapping[str, Any], at: int) -> dict[str, Any]:
    """What ``commit.json`` holds. ``changes``: None where the commit was compared with none."""
    return {
        "format": content["format"],
        "suite": content["suite"],
        "alpha": content["alpha"],
        "synthetic": content["synthetic"],
        "commit": content["commits"][at],
        "points": {cell: points[at] for cell, points in content["series"].items()},
        "changes": [
            {key: value for key, value in change.items() if key != "at"}
            for change in content["changes"]
            if change["at"] == at
        ],
    }


def _commit_run(entry: dict[str, Any]) -> Run:
    commit, alpha = entry["commit"], alpha_name(entry["alpha"])
    metrics = {}
    for cell, point in entry["points"].items():
        name = f"{cell.replace('@', '-')}/per-image/{alpha}"  # MLflow accepts no @
        for suffix, value in (("", point["pck"]), ("-low", point["low"]), ("-high", point["high"])):
            if value is not None:
                metrics[f"{name}{suffix}"] = value
    verdicts = [f"{change['verdict']}: {change['cell']}" for change in entry["changes"] or ()]
    tags = {
        _COMMIT: f"{entry['suite']} {commit['commit']}",
        "suite": entry["suite"],
        "commit": commit["commit"],
        "parent": commit["parent"] or "none here",
        "tree": commit["tree"],
        "subject": commit["subject"],
        "problem": commit["problem"] or "none",
        "changes": "; ".join(verdicts)[:2000] or "none",
        "synthetic": _word(entry["synthetic"]),
        "mlflow.source.git.commit": commit["commit"],
    }
    page = history_page(
        {
            "alpha": entry["alpha"],
            "commits": [commit],
            "series": {cell: [point] for cell, point in entry["points"].items()},
            "changes": [{"at": 0, **change} for change in entry["changes"] or ()],
        }
    )
    return Run(
        key=(_COMMIT, tags[_COMMIT]),
        name=f"{commit['label']} {commit['subject']}"[:100],
        tags=tags,
        note=fit_note(page, "commit.json"),
        texts={"commit.json": json.dumps(entry, indent=1, allow_nan=False) + "\n"},
        metrics=metrics,
    )


def _word(value: bool) -> str:
    return str(value).lower()
