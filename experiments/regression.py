"""Regression tracking: what commits do to matchers (``nemf regress``).

Commits are measured by :mod:`experiments.measured_commits` and timed by
:mod:`experiments.cost_timing`; the verdicts are :mod:`reports.regression`'s.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.accepted_answers import (
    FOLDER,
    REAL_FOLDER,
    nothing_accepted,
    read_accepted,
    read_listing,
    write_accepted,
)
from experiments.bisection import Bisection
from experiments.checkouts import Commit, Repository
from experiments.cost_timing import add_costs
from experiments.measured_commits import Measured, Workplace, missing
from experiments.provenance import code_state
from experiments.store import slug
from nemf.claims import claimed
from nemf.datasets.synthetic import MARKER
from nemf.errors import NemfError
from reports.history_page import write_history
from reports.regression import FORMAT, judge
from reports.regression_page import bisect_page, summary, write_page
from reports.regression_policy import Cell, Policy
from reports.regression_watches import Side

log = logging.getLogger(__name__)
POLICY = Path("experiments") / "regress.yaml"


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

    ``data``: a folder of datasets in place of the policy's; if they are real, the policy's ``real``
    ones are compared. ``weights``: folder of backbones and checkpoints. Every command holds the
    output folder for itself: NemfError if another one does.
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
        if data is not None and not data.is_dir():
            raise NemfError(f"{data}: no such folder of datasets")
        self.data = data.resolve() if data else None
        self.real = data is not None and not any(data.glob(f"*/{MARKER}"))
        self.cells = _chosen(self.policy.cells(self.real), cells)
        self.accepted = REAL_FOLDER if self.real else FOLDER
        self._weights = weights.resolve() if weights else None

    # -- commands -------------------------------------------------------------------------------

    def compare(self, base: str, head: str | None = None, *, cost: bool = True) -> Report:
        """The head (by default the working tree) against the commit ``base``."""
        with self._held():
            old, new = self.repository.commit(base), self._head(head)
            place = self._place()
            with ExitStack() as stack:
                before, after = place.measure(old, stack), place.measure(new, stack)
                observed = place.observe(before, after)
                if cost:
                    add_costs(place, observed, before, after)
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
                read_listing(self.repository.root / self.accepted)
            elif not self.repository.has(new, self.accepted / "accepted.json"):
                raise NemfError(nothing_accepted(new.label))
            place = self._place()
            with ExitStack() as stack:
                after = place.measure(new, stack)
                root = after.checkout.root if after.checkout else self.repository.root
                accepted, before = self._accepted(root / self.accepted, after)
                observed = place.observe(before, after)
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
        if len(self.cells) < len(self.policy.cells(self.real)):
            raise NemfError("all cells are accepted together: leave out --cell")
        if not reason.strip():
            raise NemfError("give the reason why the scores changed: --accept 'why'")
        with self._held():
            new = self._head(None)
            place = self._place()
            with ExitStack() as stack:
                measured = place.measure(new, stack)
                for cell, side in measured.sides.items():
                    if side.problem is not None:
                        raise NemfError(f"{cell} cannot be accepted: {side.problem}")
                frames = place.scores(measured.checkout, [(measured, c) for c in self.cells])
            self._check_still(new)
            scored = {
                cell: (measured.files[cell], str(measured.sides[cell].protocol), frame)
                for cell, frame in zip(self.cells, frames, strict=True)
            }
            folder = self.repository.root / self.accepted
            before = {path.name for path in folder.glob("*.parquet")}
            files = write_accepted(
                folder,
                scored,
                self.policy.accuracy.alphas,
                new.as_dict(),
                reason.strip(),
                measured.rendering,
            )
            text = f"Accepted {len(self.cells)} cells in {len(files) - 1} files: {reason.strip()}\n"
            gone = sorted(before - {path.name for path in files})
            if gone:
                text += f"No longer accepted, as the policy runs them no more: {', '.join(gone)}\n"
            text += f"Commit {self.accepted} together with the change.\n"
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
            place = self._place()
            for at, commit in enumerate(commits):
                log.info("[%d/%d] %s %s", at + 1, len(commits), commit.label, commit.subject)
                with ExitStack() as stack:
                    measured = place.measure(commit, stack)
                    observed = [
                        item
                        for before in {id(m): m for m in reference.values()}.values()
                        for item in place.observe(
                            before, measured, [c for c in reference if reference[c] is before]
                        )
                    ]
                for item, verdict in zip(observed, judge(observed, policy), strict=True):
                    cell = item.cell
                    if _is_change(verdict, measured.sides[cell]):
                        since = reference.pop(cell).commit.label
                        changes.append({"at": at, "since": since, **verdict})
                for cell, side in measured.sides.items():
                    if side.predictions is not None:
                        reference.setdefault(cell, measured)
                        synthetic |= bool(side.predictions.meta["synthetic"])
                    series[str(cell)].append(_point(measured.records.get(cell), alpha))
                problems = {s.problem for s in measured.sides.values() if s.problem}
                told = {
                    "problem": "; ".join(sorted(problems)) or None,
                    "parent": self.repository.first_parent(commit),
                }
                listed.append(commit.as_dict() | told)
            changes.sort(key=lambda change: (change["at"], change["cell"]))
            content = {
                "format": FORMAT,
                "suite": self._suite(),
                "alpha": alpha,
                "synthetic": synthetic,
                "commits": listed,
                "series": series,
                "changes": changes,
                "compared_by": code_state(),
            }
            text, files = write_history(content, self.scratch)
            return Report(content, text, files)

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
            place = self._place()
            before = place.measure(first, stack)
            if before.checkout is None:
                problems = {side.problem for side in before.sides.values()}
                raise NemfError(f"{good} {'; '.join(map(str, problems))}: give another good commit")
            search = Bisection(place, commits, before)
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
        text = bisect_page(content)
        folder = self.scratch / f"bisect-{first.label}-{last.label}"
        return Report(content, text, write_page(folder, "bisect", content, text))

    # -- parts ----------------------------------------------------------------------------------

    def _place(self) -> Workplace:
        return Workplace(
            self.repository, self.scratch, self.policy, self.cells, self.data, self._weights
        )

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

    def _accepted(self, folder: Path, after: Measured) -> tuple[dict[str, Any], Measured]:
        """What was accepted, as the measurement of a commit of its own."""
        accepted = read_listing(folder)
        stored, subject = accepted["cells"], str(accepted["reason"])
        commit, tree = str(accepted["commit"]), str(accepted["tree"])
        before = Measured(Commit(commit, tree, "accepted", subject))
        same = after.rendering is not None and after.rendering == accepted.get("stand_ins")
        for cell in self.cells:
            entry = stored.get(str(cell))
            if entry is None:
                before.sides[cell] = missing("it was never accepted")
                continue
            file = before.files[cell] = self.scratch / "accepted" / entry["file"]
            before.sides[cell] = read_accepted(
                folder / entry["file"],
                entry["protocol"],
                after.sides[cell].predictions,
                file,
                same_stand_ins=same,
            )
        return accepted, before

    def _suite(self) -> str:
        """Which data a history is about."""
        if self.data is not None:
            return f"folder:{self.data}"
        ((kind, value),) = self.policy.suite.data.items()
        return f"{kind}:{value}"

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
        return Report(content, text, write_page(folder, "regress", content, text), failed)


def _chosen(cells: list[Cell], names: Sequence[str]) -> list[Cell]:
    """The cells whose name starts with one of ``names``; all without any."""
    if not names:
        return cells
    for name in names:
        if not any(f"{cell}/".startswith(f"{name}/") for cell in cells):
            known = ", ".join(map(str, cells))
            raise NemfError(f"--cell {name!r} fits none of {known}")
    return [c for c in cells if any(f"{c}/".startswith(f"{name}/") for name in names)]


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
