"""The way back from MLflow: a published table's records and predictions into an output folder.

What lies in the store is not trusted: every file is compared with the hash that it was published
with, and nothing becomes current below the folder before all of them are right.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemf.errors import NemfError
from nemf.files import write_text, write_whole
from nemf.predictions import FILE_NAME
from reports.mlflow_store import Store, open_store
from reports.records import current_predictions
from reports.tracking import LAST_PUBLISHED

_CELL = re.compile(r"\w[\w.-]*(/\w[\w.-]*){3}")  # label / dataset / plan / key
_FILE = re.compile(rf"{re.escape(FILE_NAME)}|cell\.json|scores/\w[\w.@ -]*\.json")


@dataclass(frozen=True)
class FetchedTable:
    """A published table whose cells lie in an output folder now. ``synthetic``: of its data;
    ``published``: SHA-256 of its files by name, empty if only another table of these cells was
    published."""

    synthetic: bool
    published: dict[str, str]

    def differing(self, files: Iterable[Path]) -> list[Path]:
        """Those of the rebuilt files that do not have the published bytes."""
        return [
            file
            for file in files
            if self.published.get(file.name, "") != hashlib.sha256(file.read_bytes()).hexdigest()
        ]


def fetch_table(out: Path, name: str, synthetic: bool | None = None) -> FetchedTable:
    """Brings the cells of the table that was published last under this name to ``out``, as
    :func:`reports.records.current_records` reads them, and what its job left out.

    Of a name that was never published the cells of the table published last are taken: a
    publication holds all cells of its output folder. ``synthetic``: only a table of that kind.
    Files that are there already with the published content are not fetched again.

    NemfError naming everything that is missing or damaged in the store, and for a folder that
    holds other predictions or records.
    """
    with open_store(out, make=False) as store:
        kind = {} if synthetic is None else {"synthetic": str(synthetic).lower()}
        run = store.newest({"nemf.table": name, LAST_PUBLISHED: None} | kind, LAST_PUBLISHED)
        by_name = run is not None
        if run is None:
            run = store.newest({LAST_PUBLISHED: None} | kind, LAST_PUBLISHED)
        if run is None:
            raise NemfError(
                f"MLflow holds no finished run of a table ({name}): run `nemf table` where the "
                "predictions are, with the same MLFLOW_TRACKING_URI"
            )
        listing = store.listing(run)
        cells = json.loads(_get(store, run, listing, "cells.json"))
        problems, pointers = [], {}
        for cell, run_id in cells.items():
            found, pointer = _fetch_cell(store, out, cell, run_id)
            problems += found
            pointers |= pointer
        problems += _foreign(out, pointers)
        files = {k.removeprefix("table/"): v for k, v in listing.items() if k.startswith("table/")}
        job = b""
        if by_name and "job.json" in files:
            job = _get(store, run, listing, "table/job.json")
    if problems:
        raise NemfError(
            f"{name} cannot be rebuilt from run {run.info.run_id}: {'; '.join(problems)}"
        )
    for pointer, key in pointers.items():
        write_text(pointer, key + "\n")
    if job:
        write_text(out / name / "job.json", job.decode())
    return FetchedTable(run.data.tags["synthetic"] == "true", files if by_name else {})


def _get(store: Store, run: Any, listing: dict[str, str], name: str) -> bytes:
    if name not in listing:
        raise NemfError(f"run {run.info.run_id} lists no {name}: publish it again")
    return store.download(run, name, listing[name])


def _fetch_cell(
    store: Store, out: Path, cell: str, run_id: str
) -> tuple[list[str], dict[Path, str]]:
    """What is wrong with a cell, and the pointer file that makes it current with its content."""
    if not _CELL.fullmatch(cell):
        return [f"{cell!r} is no cell of this suite"], {}
    folder = out / "predictions" / cell
    problems = []
    try:
        run = store.finished_run(run_id)
        if run.data.tags.get("nemf.cell") != cell:
            raise NemfError(f"run {run_id} mirrors another cell")
        listing = {n: h for n, h in store.listing(run).items() if _FILE.fullmatch(n)}
        if FILE_NAME not in listing:
            raise NemfError(f"run {run_id} lists no {FILE_NAME}")
    except NemfError as problem:
        return [f"{cell}: {problem}"], {}
    for name, digest in listing.items():
        target = folder / name
        try:
            if not target.exists():
                content = store.download(run, name, digest)
                write_whole(target, lambda file, content=content: file.write_bytes(content))
            elif hashlib.sha256(target.read_bytes()).hexdigest() != digest:
                raise NemfError(f"{target} differs from the published file")
        except NemfError as problem:
            problems.append(f"{cell}: {problem}")
    extra = {f"scores/{path.name}" for path in folder.glob("scores/*.json")} - set(listing)
    problems += [f"{folder / name} was not published" for name in sorted(extra)]
    return problems, {folder.parent / "current": folder.name}


def _foreign(out: Path, pointers: dict[Path, str]) -> list[str]:
    """Complaints about current predictions below ``out`` that are none of the table's."""
    return [
        f"{file} is none of its cells: choose an empty --out"
        for file in current_predictions(out)
        if pointers.get(file.parent.parent / "current") != file.parent.name
    ]
