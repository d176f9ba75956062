"""Regression tracking: what commits do to matchers (``nemf regress``).

Every commit predicts and scores with its own code, in a process of its own. Predictions of all
commits lie in one store, ``<out>/regress/store``, where a key that did not change is not predicted
again; ``<out>/regress/runs/<tree>`` remembers which file a tree of sources led to. The verdicts are
:mod:`reports.regression`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.accepted_answers import (
    FOLDER,
    nothing_accepted,
    read_accepted,
    read_listing,
    write_accepted,
)
from experiments.checkouts import Checkout, Commit, DoesNotRun, Repository, last_line
from experiments.provenance import code_state, library_versions
from experiments.store import slug
from nemf.errors import NemfError
from nemf.files import claimed, write_text
from nemf.predictions import Predictions
from reports.regression import (
    FORMAT,
    Cell,
    Cost,
    Observed,
    Policy,
    Rescored,
    Side,
    judge,
    not_comparable,
)
from reports.regression_page import draw_history, history_page, summary

log = logging.getLogger(__name__)
POLICY = Path("experiments") / "regress.yaml"
_PROBE = Path(__file__).with_name("regression_probe.py")
# Complaints about this machine; everything else that a commit's command says is about the commit.
_NOT_THE_COMMIT = ("another process is predicting this cell", "cannot be written (")


@dataclass(eq=False)
class Measured:
    """A commit with one side of every cell; ``files`` and ``records`` where it has a prediction.
    ``configs``: the names under which the commit knows the predictions of the policy; ``data``:
    the root of its datasets."""

    commit: Commit
    data: Path | None = None
    sides: dict[Cell, Side] = field(default_factory=dict)
    files: dict[Cell, Path] = field(default_factory=dict)
    records: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Report:
    """What a command found. ``content`` is the JSON, ``markdown`` the page, both also among
    ``files``; ``failed`` is whether a program should stop."""

    content: dict[str, Any]
    markdown: str
    files: list[Path]
    failed: bool = False


class Regressions:
    """The comparisons of one repository under one policy, kept below ``out / "regress"``.

    ``data``: a folder of datasets in place of the policy's; ``weights``: folder of backbones and
    checkpoints. Every command holds the output folder for itself: NemfError if another one does.
    """

    def __init__(
        self,
        start: Path,
        out: Path,
        *,
        policy: Path | None = None,
        data: Path | None = None,
        weights: Path | None = None,
        cells: Sequence[str] = (),
    ) -> None:
        self.repository = Repository(start)
        self.out, self.scratch = out.resolve(), out.resolve() / "regress"
        self.policy_file = policy or self.repository.root / POLICY
        self.policy = Policy.load(self.policy_file)
        self.cells = _chosen(self.policy, cells)
        if data is not None and not data.is_dir():
            raise NemfError(f"{data}: no such folder of datasets")
        self.data = data.resolve() if data else None
        self.weights = weights.resolve() if weights else None

    # -- commands -------------------------------------------------------------------------------

    def compare(self, base: str, head: str | None = None, *, cost: bool = True) -> Report:
        """The head (by default the working tree) against the commit ``base``."""
        with self._held():
            old, new = self.repository.commit(base), self._head(head)
            with ExitStack() as stack:
                before, base_checkout = self._measure(old, stack)
                after, head_checkout = self._measure(new, stack)
                observed = self._observe(before, after, head_checkout)
                if cost:
                    self._add_costs(observed, before, after, base_checkout, head_checkout)
            self._check_still(new)
            verdicts = judge(observed, self.policy)
            note = "" if cost else "Cost was not measured."
            return self._report(old.as_dict(), new, verdicts, note)

    def gate(self, head: str | None = None) -> Report:
        """The head against the accepted answers that lie in it. A guarded cell that cannot be
        compared fails as well: nothing would watch it from then on."""
        with self._held():
            new = self._head(head)
            if new.sha is None:  # said before anything runs
                read_listing(self.repository.root / FOLDER)
            elif not self.repository.has(new, FOLDER / "accepted.json"):
                raise NemfError(nothing_accepted(new.label))
            with ExitStack() as stack:
                after, checkout = self._measure(new, stack)
                root = checkout.root if checkout else self.repository.root
                accepted, before = self._accepted(root / FOLDER, after)
                observed = self._observe(before, after, checkout)
            self._check_still(new)
            verdicts = judge(observed, self.policy, must_compare=True)
            base = {"label": f"accepted {accepted['commit'][:8]}", "subject": accepted["reason"]}
            base |= {"commit": accepted["commit"], "dirty": False, "tree": accepted["tree"]}
            note = (
                "Cost is measured only between commits (--base): stored times are of another "
                'machine. A wanted change is renewed with `nemf regress --accept "why"`.'
            )
            return self._report(base, new, verdicts, note)

    def accept(self, reason: str) -> Report:
        """Stores the working tree's answers and scores per pair as what the gate compares with.

        NemfError without a reason, for some of the cells only, or if one has no prediction.
        """
        if len(self.cells) < len(self.policy.cells()):
            raise NemfError("all cells are accepted together: leave out --cell")
        if not reason.strip():
            raise NemfError("give the reason why the scores changed: --accept 'why'")
        with self._held():
            new = self._head(None)
            with ExitStack() as stack:
                measured, checkout = self._measure(new, stack)
                for cell, side in measured.sides.items():
                    if side.problem is not None:
                        raise NemfError(f"{cell} cannot be accepted: {side.problem}")
                frames = self._scores(checkout, [(measured, cell) for cell in self.cells])
            self._check_still(new)
            folder = self.repository.root / FOLDER
            scored = {
                cell: (measured.files[cell], str(measured.sides[cell].protocol), frame)
                for cell, frame in zip(self.cells, frames, strict=True)
            }
            alphas = self.policy.accuracy.alphas
            files = write_accepted(folder, scored, alphas, new.as_dict(), reason.strip())
            text = f"Accepted {len(self.cells)} cells in {len(files) - 1} files: {reason.strip()}\n"
            return Report({"accepted": [str(f) for f in files]}, text, files)

    def history(self, n_commits: int, head: str | None = None) -> Report:
        """The last ``n_commits`` along first parents: every cell's metric and its change points.

        A cell's change point is the first commit that differs, by the rules of a comparison, from
        the first commit of the stretch before it; so slow drifts are found as well.
        """
        if n_commits < 2:
            raise NemfError(f"a history needs at least 2 commits, not {n_commits}")
        with self._held():
            last = self.repository.commit(head or "HEAD")
            commits = self.repository.first_parents(str(last.sha), n_commits)
            if len(commits) < n_commits and self.repository.shallow:
                log.warning("this clone is shallow: only %d commits are here", len(commits))
            level = self.policy.accuracy.level / max(1, len(commits) - 1)
            accuracy = dataclasses.replace(self.policy.accuracy, level=level)
            policy = dataclasses.replace(self.policy, accuracy=accuracy)
            alpha = max(self.policy.accuracy.alphas)
            series: dict[str, list[dict[str, Any]]] = {str(cell): [] for cell in self.cells}
            reference: dict[Cell, Measured] = {}
            changes, listed, synthetic = [], [], False
            for at, commit in enumerate(commits):
                log.info("[%d/%d] %s %s", at + 1, len(commits), commit.label, commit.subject)
                with ExitStack() as stack:
                    measured, checkout = self._measure(commit, stack)
                    observed = [
                        item
                        for before in {id(m): m for m in reference.values()}.values()
                        for item in self._observe(
                            before,
                            measured,
                            checkout,
                            [c for c in reference if reference[c] is before],
                        )
                    ]
                for item, verdict in zip(observed, judge(observed, policy), strict=True):
                    cell = item.cell
                    if _is_change(verdict, measured.sides[cell]):
                        changes.append({"at": at, **verdict})
                        del reference[cell]
                for cell, side in measured.sides.items():
                    if side.predictions is not None:
                        reference.setdefault(cell, measured)
                        synthetic |= bool(side.predictions.meta["synthetic"])
                    series[str(cell)].append(_point(measured.records.get(cell), alpha))
                problems = {s.problem for s in measured.sides.values() if s.problem}
                listed.append(commit.as_dict() | {"problem": "; ".join(sorted(problems)) or None})
            changes.sort(key=lambda change: (change["at"], change["cell"]))
            content = {
                "format": FORMAT,
                "alpha": alpha,
                "synthetic": synthetic,
                "commits": listed,
                "series": series,
                "changes": changes,
                "compared_by": code_state(),
            }
            folder = self.scratch / f"history-{commits[0].label}-{commits[-1].label}"
            text = history_page(content)
            files = _write_pages(folder, "history", content, text)
            return Report(content, text, files + draw_history(content, folder))

    def bisect(self, range_: str) -> Report:
        """The first commit of ``good..bad`` after which a cell is worse than at ``good``, for every
        watch of every guarded cell that is worse at ``bad``; commits that cannot tell are skipped.

        NemfError if the ends are not a range, if one of them does not run, or if nothing is worse.
        """
        good, dots, bad = range_.partition("..")
        if not dots or not good or not bad or bad.startswith("."):
            raise NemfError(f"--bisect {range_!r}: expected good..bad, e.g. v1.0..main")
        with self._held(), ExitStack() as stack:
            first, last = self.repository.commit(good), self.repository.commit(bad)
            if not self.repository.is_ancestor(first, last) or first.sha == last.sha:
                raise NemfError(f"{good} is no ancestor of {bad}: give an older and a newer commit")
            commits = self.repository.first_parents(f"{first.sha}..{last.sha}")
            before, base_checkout = self._measure(first, stack)
            if base_checkout is None:
                problems = {side.problem for side in before.sides.values()}
                raise NemfError(f"{good} {'; '.join(map(str, problems))}: give another good commit")
            search = _Search(self, commits, before, base_checkout)
            found = search.culprits()
        content = {
            "format": FORMAT,
            "good": first.as_dict(),
            "bad": last.as_dict(),
            "n_commits": len(commits),
            "runs": search.log,
            "culprits": found,
            "compared_by": code_state(),
        }
        text = _bisect_page(content)
        folder = self.scratch / f"bisect-{first.label}-{last.label}"
        return Report(content, text, _write_pages(folder, "bisect", content, text))

    # -- parts ----------------------------------------------------------------------------------

    @contextmanager
    def _held(self) -> Iterator[None]:
        busy = "another comparison is running here; wait for it, or give another --out"
        with claimed(self.scratch, ".lock", busy):
            self.repository.forget_leftovers(self.scratch)
            yield

    def _head(self, name: str | None) -> Commit:
        if name is not None:
            return self.repository.commit(name)
        return self.repository.working_tree(self.out)

    def _check_still(self, commit: Commit) -> None:
        """NemfError if the working tree is no longer what was measured."""
        if commit.sha is None and self._head(None).tree != commit.tree:
            raise NemfError(
                f"{self.repository.root}: files changed while they were compared; run again"
            )

    def _measure(self, commit: Commit, stack: ExitStack) -> tuple[Measured, Checkout | None]:
        """Every cell of a commit, and its checkout, open until ``stack`` ends. A commit that does
        not import has no checkout and that problem in every cell."""
        measured = Measured(commit)
        threads = self.policy.suite.threads
        try:
            checkout = stack.enter_context(self.repository.checkout(commit, self.scratch, threads))
            listing = _protocols(checkout)
            measured.data = self._data(checkout)
        except DoesNotRun as problem:
            for cell in self.cells:
                measured.sides[cell] = _missing(str(problem))
            return measured, None
        runs = _Runs(self, checkout, measured.data)
        for prediction in dict.fromkeys(cell.prediction for cell in self.cells):
            cells = [cell for cell in self.cells if cell.prediction == prediction]
            config = self._config(checkout, cells[0])
            plans: dict[str, dict[Cell, str]] = {}
            for cell in cells:
                id_ = _protocol_id(listing, cell.protocol)
                if config is None:
                    measured.sides[cell] = _missing(f"it has no config {cell.prediction}")
                elif id_ is None:
                    measured.sides[cell] = _missing(f"it has no protocol {cell.protocol}")
                else:
                    measured.configs[prediction] = config
                    plan = json.dumps(listing[id_]["plan"], sort_keys=True)
                    plans.setdefault(plan, {})[cell] = id_
            for ids in plans.values():
                runs.measure(measured, str(config), ids)
        measured.sides = {cell: measured.sides[cell] for cell in self.cells}
        return measured, checkout

    def _config(self, checkout: Checkout, cell: Cell) -> str | None:
        """The name under which that commit knows the matcher config, or None."""
        configs = checkout.root / "experiments" / "configs"
        if not (configs / "datasets" / f"{cell.dataset}.py").is_file():
            return None
        for matcher in (cell.matcher, self.policy.suite.renamed.get(cell.matcher)):
            if matcher and (configs / "matchers" / f"{matcher}.py").is_file():
                return f"{matcher}/{cell.dataset}"
        return None

    def _data(self, checkout: Checkout) -> Path:
        """The root of the datasets for that commit; renders its own stand-ins if it has to."""
        if self.data is not None:
            return self.data
        ((kind, value),) = self.policy.suite.data.items()
        if kind == "folder":
            root = checkout.root / value  # an absolute path stays what it is
            if not root.is_dir():
                raise DoesNotRun(f"has no datasets in {value}")
            return root
        answer = json.loads(checkout.python(str(_PROBE), "generator"))
        root = self.scratch / "data" / f"{value}-{answer['fingerprint'][:16]}"
        checkout.nemf("data", "make-synthetic", str(root), "--preset", value)
        return root

    def weights_for(self, data: Path) -> Path | None:
        """As the command line finds them: given, else a folder beside or in the data root."""
        named = os.environ.get("NEMF_WEIGHTS")
        places = [self.weights] if self.weights else [Path(named)] if named else []
        places = places or [data / "weights", data.parent / "weights"]
        return next((place for place in places if place.is_dir()), None)

    def _observe(
        self,
        before: Measured,
        after: Measured,
        checkout: Checkout | None,
        cells: Sequence[Cell] | None = None,
    ) -> list[Observed]:
        """Every cell; where the two predictions differ, both scored by the code of ``checkout``."""
        observed, differing = [], []
        for cell in cells or self.cells:
            base, head = before.sides[cell], after.sides[cell]
            observed.append(Observed(cell, base, head, not_comparable(base, head)))
            if observed[-1].problem is None and before.files[cell] != after.files[cell]:
                differing.append(observed[-1])
        if not differing or checkout is None:
            return observed
        wanted = [(side, item.cell) for item in differing for side in (before, after)]
        try:
            frames = self._scores(checkout, wanted)
        except DoesNotRun as problem:
            for item in differing:
                item.problem = f"the base's predictions cannot be scored by the head: {problem}"
            return observed
        for k, item in enumerate(differing):
            item.rescored = Rescored(frames[2 * k], frames[2 * k + 1])
        return observed

    def _scores(
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
            checkout.python(str(_PROBE), "scores", text=json.dumps(listed))
            return [pd.read_parquet(place) for place in places]

    def _add_costs(
        self,
        observed: Sequence[Observed],
        before: Measured,
        after: Measured,
        base_checkout: Checkout | None,
        head_checkout: Checkout | None,
    ) -> None:
        """Times the predictions that the policy names, where both sides have one."""
        if base_checkout is None or head_checkout is None:
            return
        for prediction in self.policy.cost.predictions:
            items = [o for o in observed if o.cell.prediction == prediction and not o.problem]
            if not items:
                continue
            cell = items[0].cell
            if _same_run(before.sides[cell], after.sides[cell]):
                note = "the code on the prediction path, config and weights are the same"
                for item in items:
                    item.cost_note = note
                continue
            log.info("timing %s", prediction)
            try:
                cost = self._cost(cell, before, after, base_checkout, head_checkout)
            except DoesNotRun as problem:
                for item in items:
                    item.cost_note = str(problem)
                continue
            for item in items:
                item.cost = cost

    def _cost(
        self,
        cell: Cell,
        before: Measured,
        after: Measured,
        base_checkout: Checkout,
        head_checkout: Checkout,
    ) -> Cost:
        """Rounds of two fresh processes that take turns, the order swapped from turn to turn, so
        that whatever else the machine does meets both. A round counts each one's fastest turn."""
        rule = self.policy.cost
        found: dict[str, list[float]] = {"base_s": [], "head_s": [], "base_mib": [], "head_mib": []}
        sides = {"base": (base_checkout, before), "head": (head_checkout, after)}
        for _ in range(rule.rounds):
            workers: dict[str, _Worker] = {}
            try:
                for name, (checkout, measured) in sides.items():
                    workers[name] = _Worker(
                        checkout,
                        [
                            measured.configs[cell.prediction],
                            str(measured.data),
                            str(self.scratch / "store"),
                            str(measured.sides[cell].protocol),
                            str(rule.pairs),
                        ],
                        self.weights_for(measured.data),
                    )
                for worker in workers.values():
                    worker.wait_until_ready()
                seconds: dict[str, list[float]] = {name: [] for name in workers}
                for turn in range(rule.blocks):
                    for name in list(workers)[:: 1 if turn % 2 else -1]:
                        seconds[name].append(workers[name].turn())
                for name, worker in workers.items():
                    found[f"{name}_s"].append(min(seconds[name]))
                    found[f"{name}_mib"].append(worker.finish())
            finally:
                for worker in workers.values():
                    worker.stop()
        return Cost(**found)

    def _accepted(self, folder: Path, after: Measured) -> tuple[dict[str, Any], Measured]:
        """What was accepted, as the measurement of a commit of its own."""
        accepted = read_listing(folder)
        stored = accepted["cells"]
        subject, commit = str(accepted["reason"]), str(accepted["commit"])
        before = Measured(Commit(commit, str(accepted["tree"]), "accepted", subject))
        for cell in self.cells:
            entry = stored.get(str(cell))
            if entry is None:
                before.sides[cell] = _missing("it was never accepted")
                continue
            file = self.scratch / "accepted" / entry["file"]
            head = after.sides[cell].predictions
            side = read_accepted(folder / entry["file"], entry["protocol"], head, file)
            before.files[cell] = file
            before.sides[cell] = side
        return accepted, before

    def _report(
        self, base: dict[str, Any], head: Commit, verdicts: list[dict[str, Any]], note: str
    ) -> Report:
        failed = any(verdict["fails"] for verdict in verdicts)
        policy = self.policy_file.resolve()
        root = self.repository.root.resolve()
        content = {
            "format": FORMAT,
            "failed": failed,
            "base": base,
            "head": head.as_dict(),
            "policy": policy.relative_to(root).as_posix()
            if policy.is_relative_to(root)
            else policy.name,
            "level": self.policy.accuracy.level,
            "note": note,
            "cells": verdicts,
            "compared_by": code_state(),
        }
        text = summary(content)
        folder = self.scratch / slug(f"{base['label']}_{head.label}")
        return Report(content, text, _write_pages(folder, "regress", content, text), failed)


class _Runs:
    """Runs cells of one checkout, or remembers what an equal run led to."""

    def __init__(self, owner: Regressions, checkout: Checkout, data: Path) -> None:
        self.owner, self.checkout, self.data = owner, checkout, data
        self.store = owner.scratch / "store"
        self.weights = owner.weights_for(data)
        inside = data.is_relative_to(checkout.root)
        self.conditions = {
            # data in the tree are the tree's; others are known by their files' times
            "data": str(data.relative_to(checkout.root)) if inside else _files_state(data),
            "weights": _files_state(self.weights) if self.weights else None,
            "threads": checkout.threads,
            "libraries": library_versions(),
            "machine": platform.node(),
            "alphas": owner.policy.accuracy.alphas,
        }

    def measure(self, measured: Measured, config: str, ids: dict[Cell, str]) -> None:
        """One prediction, scored under the protocols of its plan."""
        facts = {"config": config, "protocols": sorted(ids.values()), **self.conditions}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        note = self.owner.scratch / "runs" / self.checkout.commit.tree[:16] / f"{digest}.json"
        found = self._remembered(note)
        if found is None:
            try:
                found = self._run(config, sorted(ids.values()))
            except DoesNotRun as problem:
                text = str(problem)
                if any(phrase in text for phrase in _NOT_THE_COMMIT):
                    raise NemfError(text) from None
                measured.sides.update({cell: _missing(text) for cell in ids})
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
        printed = self.checkout.nemf(
            "predict", config, "--data", str(self.data), "--out", str(self.store),
            "--protocol", protocols[0], *weights,
        )  # fmt: skip
        file = Path(last_line(printed))
        if not file.is_file():
            raise DoesNotRun(f"`nemf predict {config}` printed no file but {printed[-80:]!r}")
        alphas = ",".join(f"{alpha:g}" for alpha in self.owner.policy.accuracy.alphas)
        chosen = [word for id_ in protocols for word in ("--protocol", id_)]
        records = json.loads(
            self.checkout.nemf("score", str(file), *chosen, "--alphas", alphas, "--json")
        )
        by_protocol = {record["protocol"]["id"]: record for record in records}
        if missing := set(protocols) - set(by_protocol):
            raise DoesNotRun(f"`nemf score` gave no record of {', '.join(sorted(missing))}")
        log.info("%s: %s in %.0f s", label, config, time.monotonic() - begun)
        return {"file": str(file.relative_to(self.store)), "records": by_protocol}


class _Search:
    """The bisection of a line of commits, each measured and compared with ``before`` once."""

    def __init__(
        self, owner: Regressions, commits: list[Commit], before: Measured, checkout: Checkout
    ) -> None:
        self.owner, self.commits, self.before, self.checkout = owner, commits, before, checkout
        self.log: list[dict[str, Any]] = []
        self._known: dict[tuple[int, bool], dict[tuple[str, str], bool]] = {}

    def culprits(self) -> list[dict[str, Any]]:
        last = len(self.commits) - 1
        ends = self._state(last, with_cost=bool(self.owner.policy.cost.predictions))
        targets = [target for target, bad in ends.items() if bad]
        if not targets:
            told = {text for run in self.log for text in run["problems"]}
            why = f" ({'; '.join(sorted(told))})" if told else ""
            raise NemfError(f"no guarded cell is worse at {self.commits[last].label}{why}")
        found: dict[tuple[int, int], list[tuple[str, str]]] = {}
        for target in targets:
            found.setdefault(self._search(target), []).append(target)
        return [
            {
                "first_bad": self.commits[high].as_dict(),
                "or_one_of": [c.as_dict() for c in self.commits[low + 1 : high]],
                "worse": [{"cell": cell, "watch": watch} for cell, watch in hits],
            }
            for (low, high), hits in sorted(found.items())
        ]

    def _search(self, target: tuple[str, str]) -> tuple[int, int]:
        """(last known good, first known bad); what lies between cannot tell."""
        low, high, mute = -1, len(self.commits) - 1, set()
        while open_ := [at for at in range(low + 1, high) if at not in mute]:
            at = min(open_, key=lambda k: abs(2 * k - low - high))
            bad = self._state(at, with_cost=target[1] == "cost").get(target)
            if bad is None:
                mute.add(at)
            elif bad:
                high = at
            else:
                low = at
        return low, high

    def _state(self, at: int, *, with_cost: bool) -> dict[tuple[str, str], bool]:
        """For every guarded cell and watch that can be told: whether it is worse than before."""
        for known in ((at, True), (at, with_cost)):
            if known in self._known:
                return self._known[known]
        commit, owner = self.commits[at], self.owner
        log.info("run %d: %s %s", len(self.log) + 1, commit.label, commit.subject)
        with ExitStack() as stack:
            after, checkout = owner._measure(commit, stack)
            observed = owner._observe(self.before, after, checkout)
            if with_cost:
                owner._add_costs(observed, self.before, after, self.checkout, checkout)
        state, problems, worse = {}, set(), set()
        for verdict in judge(observed, owner.policy):
            if verdict["verdict"] == "not comparable":
                problems |= {reason["text"] for reason in verdict["reasons"]}
            if not verdict["guarded"] or verdict["exactness"] is None:
                continue
            bad = {r["watch"] for r in verdict["reasons"] if r["verdict"] == "worse"}
            untold = {r["watch"] for r in verdict["reasons"] if r["verdict"] == "not comparable"}
            watches = {"accuracy", "scoring", "exactness"} | ({"cost"} if with_cost else set())
            state |= {(verdict["cell"], w): w in bad for w in watches - untold}
            worse |= {f"{verdict['cell']} {watch}" for watch in bad}
        self.log.append(commit.as_dict() | {"worse": sorted(worse), "problems": sorted(problems)})
        self._known[at, with_cost] = state
        return state


class _Worker:
    """A process that predicts the same pairs whenever it is its turn."""

    def __init__(self, checkout: Checkout, arguments: list[str], weights: Path | None) -> None:
        environment = checkout.environment()
        if weights is not None:
            environment["NEMF_WEIGHTS"] = str(weights)
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see stop)
        self.process = subprocess.Popen(
            checkout.command([str(_PROBE), "cost", *arguments]),
            cwd=checkout.root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        self._answer()

    def turn(self) -> float:
        """Seconds per pair."""
        self._say("go\n")
        return self._answer()["seconds"]

    def finish(self) -> float:
        """Peak MiB; the process ends."""
        self.process.stdin.close()
        return self._answer()["peak_mib"]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            stream.close()

    def _say(self, text: str) -> None:
        try:
            self.process.stdin.write(text)
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> None:
        self.process.wait()
        self.errors.seek(0)
        reason = last_line(self.errors.read()) or f"status {self.process.returncode}"
        raise DoesNotRun(f"the commit cannot be timed ({reason})")


def _chosen(policy: Policy, names: Sequence[str]) -> list[Cell]:
    """The cells whose name starts with one of ``names``; all without any."""
    cells = policy.cells()
    if not names:
        return cells
    for name in names:
        if not any(f"{cell}/".startswith(f"{name}/") for cell in cells):
            known = ", ".join(map(str, cells))
            raise NemfError(f"--cell {name!r} fits none of {known}")
    return [c for c in cells if any(f"{c}/".startswith(f"{name}/") for name in names)]


def _missing(problem: str) -> Side:
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


def _same_run(base: Side, head: Side) -> bool:
    return base.predictions.meta["key"] == head.predictions.meta["key"]


def _files_state(folder: Path) -> str:
    """A hash of names, sizes and times of the files below a folder."""
    digest = hashlib.sha256(str(folder).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _is_change(verdict: dict[str, Any], side: Side) -> bool:
    """Whether a verdict of a history marks a change: not a commit that merely has no prediction."""
    if side.predictions is None or verdict["verdict"] == "same":
        return False
    return verdict["verdict"] != "not comparable" or verdict["exactness"] is None


def _point(record: dict[str, Any] | None, alpha: float) -> dict[str, Any]:
    for entry in record["metrics"] if record else ():
        if (entry["group"], entry["averaging"], entry["alpha"]) == ("all", "image", alpha):
            return {key: entry[key] for key in ("pck", "low", "high")}
    return {"pck": None, "low": None, "high": None}


def _write_pages(folder: Path, name: str, content: dict[str, Any], text: str) -> list[Path]:
    files = [folder / f"{name}.md", folder / f"{name}.json"]
    write_text(files[0], text)
    write_text(files[1], json.dumps(content, indent=1, allow_nan=False) + "\n")
    return files


def _bisect_page(content: dict[str, Any]) -> str:
    lines = [f"## {content['n_commits']} commits, {len(content['runs'])} runs", ""]
    for culprit in content["culprits"]:
        commit = culprit["first_bad"]
        lines.append(f"First bad commit: `{commit['label']}` {commit['subject']}")
        if culprit["or_one_of"]:
            others = ", ".join(f"`{c['label']}`" for c in culprit["or_one_of"])
            lines.append(f"(or one of {others}, which cannot be compared)")
        lines += [f"- {hit['cell']}: {hit['watch']}" for hit in culprit["worse"]] + [""]
    lines += ["| run | commit | worse | cannot be compared |", "|---|---|---|---|"]
    for number, run in enumerate(content["runs"], 1):
        worse = ", ".join(run["worse"]) or "–"
        problems = "; ".join(run["problems"]) or "–"
        lines.append(f"| {number} | `{run['label']}` {run['subject']} | {worse} | {problems} |")
    return "\n".join(lines) + "\n"
