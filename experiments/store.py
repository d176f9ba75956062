"""The prediction store: one folder per cell, chunks committed one by one, resumable.

A cell is (matcher, dataset, plan). Its folder is ``<label>/<dataset>-<split>/<plan>/<key>``, where
the key hashes everything that can change a prediction and nothing else. ``current`` in the folder
above names the key that was predicted last (:func:`reports.records.current_predictions`). A cell
is complete when ``predictions.parquet`` is there; until then finished chunks lie in ``chunks/`` and
a new start goes on with the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemf.claims import Claim, claimed
from nemf.errors import NemfError
from nemf.files import write_text, write_whole
from nemf.predictions import FILE_NAME, SCHEMA, Predictions
from nemf.processes import sweep_folder
from nemf.reading import read_parquet
from reports.records import current_predictions

log = logging.getLogger(__name__)


def cell_key(facts: dict[str, Any]) -> str:
    """24 hex digits over the canonical JSON of everything that can change a prediction."""
    text = json.dumps(facts, sort_keys=True, default=_listed)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _listed(value: Any) -> Any:
    if isinstance(value, tuple | set):
        return list(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be part of a cell's key")


class Cell:
    """One cell of the store. ``slot``: the folder of all keys of (matcher, dataset, plan)."""

    def __init__(self, slot: Path, key: str) -> None:
        self.slot, self.key = slot, key
        self.folder = slot / key
        self.file = self.folder / FILE_NAME

    @property
    def complete(self) -> bool:
        """Whether the prediction file is there and whole; a damaged one is predicted anew."""
        if not self.file.exists():
            return False
        try:
            Predictions.read(self.file)
        except NemfError as problem:
            log.warning("predicting anew: %s", problem)
            return False
        return True

    def claim(self, timeout_s: float = 0) -> AbstractContextManager[Claim]:
        """Holds the cell for this process; Busy if another one does for longer than ``timeout_s``.
        Freed if it dies."""
        busy = "another process is predicting this cell"
        return claimed(self.folder, ".lock", busy, timeout_s=timeout_s)

    def finished_chunks(self) -> set[int]:
        """Numbers of the chunks that are committed and whole. Leftovers of killed writers, damaged
        chunks and foreign files are removed."""
        done = set()
        for path in self.folder.glob("chunks/*"):
            if re.fullmatch(r"\d{6}\.parquet", path.name) and _readable(path):
                done.add(int(path.stem))
            else:
                path.unlink(missing_ok=True)
        return done

    def tidy(self) -> None:
        """Removes what a writer left that was killed when the prediction file was there already."""
        self.discard_chunks()
        sweep_folder(self.folder)

    def discard_chunks(self) -> None:
        """Forgets the chunks of an unfinished run."""
        shutil.rmtree(self.folder / "chunks", ignore_errors=True)

    def commit(self, chunk: int, rows: pa.Table) -> None:
        """Writes one chunk, whole or not at all."""
        path = self.folder / "chunks" / f"{chunk:06d}.parquet"
        write_whole(path, lambda file: pq.write_table(rows, file, write_page_checksum=True))

    def finish(self, n_chunks: int, meta: dict[str, Any]) -> None:
        """Joins the chunks into the prediction file and drops them."""
        paths = [self.folder / "chunks" / f"{chunk:06d}.parquet" for chunk in range(n_chunks)]
        table = pa.concat_tables(map(read_parquet, paths)).unify_dictionaries()
        Predictions(table, meta).write(self.file)
        self.discard_chunks()

    def write_json(self, name: str, content: Any) -> None:
        write_text(
            self.folder / name, json.dumps(content, indent=1, sort_keys=True, default=str) + "\n"
        )

    def make_current(self) -> None:
        """Marks this key as the one that tables read."""
        write_text(self.slot / "current", self.key + "\n")


def _readable(path: Path) -> bool:
    try:
        return read_parquet(path).schema.equals(SCHEMA)
    except (OSError, NemfError):
        return False


def check_row(
    out: Path, slot: Path, label: str, matcher: str, facts: dict[str, Any] | None = None
) -> None:
    """That predictions of ``matcher`` may become the row ``label`` in ``slot``; ``facts`` are None
    for predictions made elsewhere.

    NemfError if the label, or the folder that it shares with a similar label, is the row of another
    method below ``out``: its numbers would be replaced by these. A warning if the row's config
    changes, which is an edit, or a copy of a config whose label was left as it was.
    """
    for name in (label, f"external-{label}"):
        for file in current_predictions(out, slug(name)):
            try:
                there = Predictions.read(file, ["pair"]).meta["matcher"]
            except NemfError:
                continue  # damaged: it is predicted anew, or refused where it is read
            here = file.parent.parent == slot
            if there["label"] != label and not here:
                continue
            outside = bool(there.get("external"))
            alike = outside or there["name"] == matcher
            if there["label"] == label and outside == (facts is None) and alike:
                if here and facts is not None:
                    _tell_changes(label, there["config"], facts["matcher"], file)
                continue
            whose = "predictions made elsewhere" if outside else f"matcher {there['name']}"
            raise NemfError(
                f"the row {label!r} would replace or join {there['label']!r} of {whose} ({file}): "
                "give it another label (--label, label in its config, --name), or remove "
                f"{file.parent.parent} if that is no longer wanted"
            )


def _tell_changes(label: str, before: Any, after: Any, file: Path) -> None:
    was, now = (json.loads(json.dumps(c, default=_listed)) for c in (before, after))
    changed = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
    if changed:
        log.warning(
            "the row %r was predicted with another config (%s) and now shows this one; for both "
            "give one another label. The older predictions stay in %s",
            label,
            "; ".join(f"{k}: {was.get(k)!r}, now {now.get(k)!r}" for k in changed),
            file.parent,
        )


def slot_folder(out: Path, label: str, dataset: str, plan: str) -> Path:
    return out / "predictions" / slug(label) / dataset / plan


def slug(text: str) -> str:
    """A folder name: letters, digits, dot, dash and underscore. A plus is spelled out: CATs++ is
    not CATs."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.replace("+", "plus")).strip("-.")
    if not name:
        raise NemfError(f"{text!r} holds no letter or digit to name a folder by")
    return name
