"""How long two commits are timed: until the rounds decide, or as many as the policy allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import cost_timing
from experiments.checkouts import Commit, DoesNotRun
from experiments.cost_timing import SAME_MAKERS, add_costs
from experiments.measured_commits import Measured
from reports.regression import Observed
from reports.regression_policy import Cell, Policy
from reports.regression_watches import Cost, Side, cost_ratios

POLICY = Policy.load(Path(__file__).parent.parent / "experiments" / "regress.yaml")
CELL = Cell("nearest_small", "spair", "canonical")


def timed(monkeypatch: pytest.MonkeyPatch, add_round: Callable[[Cost], None]) -> Observed:
    """The cell after two commits with different keys were timed by ``add_round``."""
    monkeypatch.setattr(
        cost_timing, "_add_round", lambda place, cell, before, after, cost: add_round(cost)
    )
    sides = [Side(SimpleNamespace(meta={"key": k}), "canonical@1", {}) for k in "ab"]
    measured = []
    for side in sides:
        commit = Commit("0" * 40, "t", "label", "subject")
        measured.append(Measured(commit, SimpleNamespace(), sides={CELL: side}))
    item = Observed(CELL, *sides, None)
    add_costs(SimpleNamespace(policy=POLICY), [item], *measured)
    return item


def rounds_of(ratios: Iterator[float]) -> Callable[[Cost], None]:
    def add_round(cost: Cost) -> None:
        cost.base_s.append(1.0)
        cost.head_s.append(next(ratios))
        cost.base_mib.append(100.0)
        cost.head_mib.append(100.0)

    return add_round


def cycled(*values: float) -> Iterator[float]:
    while True:
        yield from values


@pytest.mark.parametrize(
    ("ratios", "rounds", "verdict"),
    [
        ((1.0, 1.01), 5, "same"),
        ((1.5, 1.52), 5, "worse"),
        ((0.95, 1.1, 1.0), 10, "same"),  # five rounds leave it open
        ((0.7, 1.5, 1.1), 20, "undecided"),  # a busy machine
    ],
)
def test_one_goes_on_while_it_is_undecided(
    monkeypatch: pytest.MonkeyPatch, ratios: tuple[float, ...], rounds: int, verdict: str
) -> None:
    item = timed(monkeypatch, rounds_of(cycled(*ratios)))
    found = cost_ratios(item.cost, POLICY.cost)["seconds"]
    assert (found["rounds"], found["verdict"]) == (rounds, verdict)


def test_what_cannot_be_timed_has_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise DoesNotRun("the commit cannot be timed (KeyError: 'x')")

    item = timed(monkeypatch, broken)
    assert item.cost is None
    assert item.cost_note == "the commit cannot be timed (KeyError: 'x')" != SAME_MAKERS
