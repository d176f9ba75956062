"""Which commit of a line made a watch of a cell worse: bisection over what can be told."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from experiments.checkouts import Commit
from experiments.cost_timing import SAME_MAKERS, add_costs
from experiments.measured_commits import Measured, Workplace
from nemf.errors import NemfError
from reports.regression import judge

log = logging.getLogger(__name__)
_UNTOLD = ("not comparable", "undecided")


class Bisection:
    """The bisection of ``commits``, oldest first, each measured and compared with ``before`` once.

    ``log``: the commits that were run, in that order, as the JSON lists them.
    """

    def __init__(self, place: Workplace, commits: Sequence[Commit], before: Measured) -> None:
        self.place, self.commits, self.before = place, commits, before
        self.log: list[dict[str, Any]] = []
        self._known: dict[tuple[int, bool], dict[tuple[str, str], bool]] = {}

    def culprits(self) -> list[dict[str, Any]]:
        """For every watch of a guarded cell that is worse at the last commit, the first commit
        after which it is. NemfError if there is none."""
        last = len(self.commits) - 1
        ends = self._state(last, with_cost=bool(self.place.policy.cost.predictions))
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
        commit, place = self.commits[at], self.place
        log.info("run %d: %s %s", len(self.log) + 1, commit.label, commit.subject)
        with ExitStack() as stack:
            after = place.measure(commit, stack)
            observed = place.observe(self.before, after)
            if with_cost:
                add_costs(place, observed, self.before, after)
        state, problems, worse = {}, set(), set()
        for verdict in judge(observed, place.policy):
            problems |= {r["text"] for r in verdict["reasons"] if r["verdict"] in _UNTOLD}
            if not verdict["guarded"] or verdict["exactness"] is None:
                continue
            bad = {r["watch"] for r in verdict["reasons"] if r["verdict"] == "worse"}
            untold = {r["watch"] for r in verdict["reasons"] if r["verdict"] in _UNTOLD} - bad
            if verdict["cost_note"] not in (None, SAME_MAKERS):  # it could not be timed
                untold.add("cost")
            watches = {"accuracy", "scoring", "exactness"} | ({"cost"} if with_cost else set())
            state |= {(verdict["cell"], w): w in bad for w in watches - untold}
            worse |= {f"{verdict['cell']} {watch}" for watch in bad}
        self.log.append(commit.as_dict() | {"worse": sorted(worse), "problems": sorted(problems)})
        self._known[at, with_cost] = state
        return state
