"""Commits measured by their own code: predictions, their scores, and what two commits gave side by
side.

Every commit predicts and scores in a process of its own. Predictions of all commits lie in one
store, ``<scratch>/store``, where a key that did not change is not predicted again;
``<scratch>/runs/<tree>`` remembers which file a tree of sources led to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.checkouts import Checkout, Commit, DoesNotRun, Repository, last_line
from experiments.provenance import library_versions
from nemf.errors import NemfError
from nemf.files import write_text
from nemf.predictions import Predictions
from reports.regression import Observed
from reports.regression_policy import Cell, Policy
from reports.regression_watches import Rescored, Side, not_comparable

log = logging.getLogger(__name__)
PROBE = Path(__file__).with_name("regression_probe.py")
# Complaints about this machine; everything else that a commit's command says is about the commit.
_NOT_THE_COMMIT = ("another process is predicting this cell", "cannot be written (")


@dataclass(eq=False)
class Measured:
    """A commit with one side of every cell; ``files`` and ``records`` where it has a prediction.
    ``checkout``: where it runs as long as its context lasts, None if it does not run; ``data``: the
    root of its datasets; ``rendering``: what names the sources that made their pixels, None where
    they are no stand-ins of its own; ``configs``: the names under which it knows the predictions of
    the policy."""

    commit: Commit
    checkout: Checkout | None = None
    data: Path | None = None
    rendering: str | None = None
    sides: dict[Cell, Side] = field(default_factory=dict)
    files: dict[Cell, Path] = field(default_factory=dict)
    records: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)


class Workplace:
    """Where commits of ``repository`` are measured under a policy, kept below ``scratch``.

    ``data``: a folder of datasets in place of the policy's; ``weights``: folder of backbones and
    checkpoints.
    """

    def __init__(
        self,
        repository: Repository,
        scratch: Path,
        policy: Policy,
        cells: Sequence[Cell],
        data: Path | None,
        weights: Path | None,
    ) -> None:
        self.repository, self.scratch, self.policy = repository, scratch, policy
        self.cells, self.data, self.weights = cells, data, weights

    def measure(self, commit: Commit, stack: ExitStack) -> Measured:
        """Every cell of a commit, its checkout open until ``stack`` ends. A commit that does not
        import has no checkout and that problem in every cell."""
        measured = Measured(commit)
        threads = self.policy.suite.threads
        try:
            checkout = stack.enter_context(self.repository.checkout(commit, self.scratch, threads))
            listing = _protocols(checkout)
            measured.data, measured.rendering = self._data(checkout)
        except DoesNotRun as problem:
            measured.sides = {cell: missing(str(problem)) for cell in self.cells}
            return measured
        measured.checkout = checkout
        runs = _Runs(self, checkout, measured.data)
        for prediction in dict.fromkeys(cell.prediction for cell in self.cells):
            cells = [cell for cell in self.cells if cell.prediction == prediction]
            config = self._config(checkout, cells[0])
            plans: dict[str, dict[Cell, str]] = {}
            for cell in cells:
                id_ = _protocol_id(listing, cell.protocol)
                if config is None:
                    measured.sides[cell] = missing(f"it has no config {cell.prediction}")
                elif id_ is None:
                    measured.sides[cell] = missing(f"it has no protocol {cell.protocol}")
                else:
                    measured.configs[prediction] = config
                    plan = json.dumps(listing[id_]["plan"], sort_keys=True)
                    plans.setdefault(plan, {})[cell] = id_
            for ids in plans.values():
                runs.measure(measured, str(config), ids)
        measured.sides = {cell: measured.sides[cell] for cell in self.cells}
        return measured

    def observe(
        self, before: Measured, after: Measured, cells: Sequence[Cell] | None = None
    ) -> list[Observed]:
        """Every cell; where the two predictions differ, both scored by the code of ``after``."""
        observed, differing = [], []
        for cell in cells or self.cells:
            base, head = before.sides[cell], after.sides[cell]
            observed.append(Observed(cell, base, head, not_comparable(base, head)))
            if observed[-1].problem is None and before.files[cell] != after.files[cell]:
                differing.append(observed[-1])
        if not differing or after.checkout is None:
            return observed
        wanted = [(side, item.cell) for item in differing for side in (before, after)]
        try:
            frames = self.scores(after.checkout, wanted)
        except DoesNotRun as problem:
            for item in differing:
                item.problem = f"the base's predictions cannot be scored by the head: {problem}"
            return observed
        for k, item in enumerate(differing):
            item.rescored = Rescored(frames[2 * k], frames[2 * k + 1])
        return observed

    def scores(
        self, checkout: Checkout, wanted: Sequence[tuple[Measured, Cell]]
    ) -> list[pd.DataFrame]:
        """Per-pair scores of prediction files as that commit's code scores them."""
        with tempfile.TemporaryDirectory() as folder:
            tasks, places = {}, []
            for measured, cell in wanted:
                key = (str(measured.files[cell]), str(measured.sides[cell].protocol))
                place = tasks.setdefault(key, str(Path(folder) / f"{len(tasks)}.parquet"))
                places.append(place)
            listed = [
                {
                    "file": file,
                    "protocol": protocol,
                    "alphas": list(self.policy.accuracy.alphas),
                    "to": place,
                }
                for (file, protocol), place in tasks.items()
            ]
            checkout.python(str(PROBE), "scores", text=json.dumps(listed))
            return [pd.read_parquet(place) for place in places]

    def weights_for(self, data: Path) -> Path | None:
        """As the command line finds them: given, else a folder beside or in the data root."""
        named = os.environ.get("NEMF_WEIGHTS")
        places = [self.weights] if self.weights else [Path(named)] if named else []
        places = places or [data / "weights", data.parent / "weights"]
        return next((place for place in places if place.is_dir()), None)

    def _config(self, checkout: Checkout, cell: Cell) -> str | None:
        """The name under which that commit knows the matcher config, or None."""
        configs = checkout.root / "experiments" / "configs"
        if not (configs / "datasets" / f"{cell.dataset}.py").is_file():
            return None
        for matcher in (cell.matcher, self.policy.suite.renamed.get(cell.matcher)):
            if matcher and (configs / "matchers" / f"{matcher}.py").is_file():
                return f"{matcher}/{cell.dataset}"
        return None

    def _data(self, checkout: Checkout) -> tuple[Path, str | None]:
        """The root of the datasets for that commit, and ``rendering`` of :class:`Measured`; renders
        its own stand-ins if it has to."""
        if self.data is not None:
            return self.data, None
        ((kind, value),) = self.policy.suite.data.items()
        if kind == "folder":
            root = checkout.root / value  # an absolute path stays what it is
            if not root.is_dir():
                raise DoesNotRun(f"has no datasets in {value}")
            return root, None
        answer = json.loads(checkout.python(str(PROBE), "generator"))
        root = self.scratch / "data" / f"{value}-{answer['fingerprint'][:16]}"
        checkout.nemf("data", "make-synthetic", str(root), "--preset", value)
        return root, f"{value}-{answer['rendering'][:16]}"


class _Runs:
    """Runs cells of one checkout, or remembers what an equal run led to."""

    def __init__(self, place: Workplace, checkout: Checkout, data: Path) -> None:
        self.place, self.checkout, self.data = place, checkout, data
        self.store = place.scratch / "store"
        self.weights = place.weights_for(data)
        inside = data.is_relative_to(checkout.root)
        self.conditions = {
            # data in the tree are the tree's; others are known by their files' times
            "data": str(data.relative_to(checkout.root)) if inside else _files_state(data),
            "weights": _files_state(self.weights) if self.weights else None,
            "threads": checkout.threads,
            "libraries": library_versions(),
            "machine": platform.node(),
            "alphas": place.policy.accuracy.alphas,
        }

    def measure(self, measured: Measured, config: str, ids: dict[Cell, str]) -> None:
        """One prediction, scored under the protocols of its plan."""
        facts = {"config": config, "protocols": sorted(ids.values()), **self.conditions}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        note = self.place.scratch / "runs" / self.checkout.commit.tree[:16] / f"{digest}.json"
        found = self._remembered(note)
        if found is None:
            try:
                found = self._run(config, sorted(ids.values()))
            except DoesNotRun as problem:
                text = str(problem)
                if any(phrase in text for phrase in _NOT_THE_COMMIT):
                    raise NemfError(text) from None
                measured.sides.update({cell: missing(text) for cell in ids})
                return
            write_text(note, json.dumps(found) + "\n")
        file = self.store / found["file"]
        predictions = Predictions.read(file)
        for cell, id_ in ids.items():
            record = found["records"][id_]
            means = {
                (entry["group"], entry["value"], entry["alpha"]): entry["pck"]
                for entry in record["metrics"]
                if entry["averaging"] == "image"
            }
            measured.sides[cell] = Side(predictions, id_, means)
            measured.files[cell], measured.records[cell] = file, record

    def _remembered(self, note: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(note.read_bytes())
            Predictions.read(self.store / found["file"], ["pair"])
        except (OSError, ValueError, KeyError):
            return None
        return found

    def _run(self, config: str, protocols: list[str]) -> dict[str, Any]:
        label, begun = self.checkout.commit.label, time.monotonic()
        weights = ["--weights", str(self.weights)] if self.weights else []
        # Commits may give one label to different methods; this store has files, but no rows.
        for pointer in self.store.glob("predictions/*/*/*/current"):
            pointer.unlink()
        printed = self.checkout.nemf(
            "predict", config, "--data", str(self.data), "--out", str(self.store),
            "--protocol", protocols[0], *weights,
        )  # fmt: skip
        file = Path(last_line(printed))
        if not file.is_file():
            raise DoesNotRun(f"`nemf predict {config}` printed no file but {printed[-80:]!r}")
        alphas = ",".join(f"{alpha:g}" for alpha in self.place.policy.accuracy.alphas)
        chosen = [word for id_ in protocols for word in ("--protocol", id_)]
        records = json.loads(
            self.checkout.nemf("score", str(file), *chosen, "--alphas", alphas, "--json")
        )
        by_protocol = {record["protocol"]["id"]: record for record in records}
        if lacking := set(protocols) - set(by_protocol):
            raise DoesNotRun(f"`nemf score` gave no record of {', '.join(sorted(lacking))}")
        log.info("%s: %s in %.0f s", label, config, time.monotonic() - begun)
        return {"file": str(file.relative_to(self.store)), "records": by_protocol}


def missing(problem: str) -> Side:
    """The side of a cell for which a commit has no prediction."""
    return Side(None, None, {}, problem)


def _protocols(checkout: Checkout) -> dict[str, Any]:
    """The protocols that a commit lists, by id; the first thing that its command line is asked."""
    try:
        return json.loads(checkout.nemf("list", "protocols", "--json"))["protocols"]
    except (DoesNotRun, ValueError, KeyError) as problem:
        raise DoesNotRun(f"does not run ({problem})") from None


def _protocol_id(listing: dict[str, Any], name: str) -> str | None:
    """The newest version of a protocol that a commit lists, or None."""
    found = [id_ for id_ in listing if name in (id_, listing[id_]["name"])]
    return max(found, key=lambda id_: listing[id_]["version"], default=None)


def _files_state(folder: Path) -> str:
    """A hash of names, sizes and times of the files below a folder."""
    digest = hashlib.sha256(str(folder).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
