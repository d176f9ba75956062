"""Bisection over commits that can and cannot tell, without running any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import bisection
from experiments.bisection import Bisection
from experiments.checkouts import Commit
from experiments.cost_timing import SAME_MAKERS
from nemf.errors import NemfError
from reports.regression_policy import Policy

POLICY = Policy.load(Path(__file__).parent.parent / "experiments" / "regress.yaml")
CELL = "nearest_small/spair/canonical"


def search(monkeypatch: pytest.MonkeyPatch, states: list[str]) -> Bisection:
    """A bisection of commits of which ``states`` says what their cost is: good, bad, undecided,
    untimed, or broken."""
    commits = [Commit(f"{k:040x}", "t", f"{k:08x}", f"step {k}") for k in range(len(states))]

    def judge(observed: Commit, _: Policy) -> list[dict[str, Any]]:
        state = states[int(observed.sha, 16)]
        verdicts = {"bad": "worse", "undecided": "undecided", "broken": "not comparable"}
        told = {"watch": "cost", "verdict": verdicts.get(state), "text": state}
        return [
            {
                "cell": CELL,
                "guarded": True,
                "verdict": verdicts.get(state, "same"),
                "reasons": [told] if state in verdicts else [],
                "exactness": None if state == "broken" else {},
                "cost_note": {"untimed": "it cannot be timed", "good": SAME_MAKERS}.get(state),
            }
        ]

    monkeypatch.setattr(bisection, "judge", judge)
    monkeypatch.setattr(bisection, "add_costs", lambda *_: None)
    place = SimpleNamespace(
        policy=POLICY, measure=lambda commit, _: commit, observe=lambda _, commit: commit
    )
    return Bisection(place, commits, None)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_every_culprit_is_found_in_about_log2_runs(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    for at in range(n):
        found = search(monkeypatch, ["good"] * at + ["bad"] * (n - at))
        (culprit,) = found.culprits()
        assert culprit["first_bad"]["subject"] == f"step {at}"
        assert culprit["or_one_of"] == []
        assert culprit["worse"] == [{"cell": CELL, "watch": "cost"}]
        assert len(found.log) <= 1 + n.bit_length()


@pytest.mark.parametrize("mute", ["undecided", "untimed", "broken"])
def test_what_cannot_tell_is_skipped_and_named_with_the_culprit(
    monkeypatch: pytest.MonkeyPatch, mute: str
) -> None:
    states = ["good", "good", mute, mute, "bad", "bad", "bad"]
    (culprit,) = search(monkeypatch, states).culprits()
    assert culprit["first_bad"]["subject"] == "step 4"
    assert [c["subject"] for c in culprit["or_one_of"]] == ["step 2", "step 3"]


@pytest.mark.parametrize("last", ["good", "undecided"])
def test_nothing_worse_is_said(monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    with pytest.raises(NemfError, match="no guarded cell is worse at 00000001") as caught:
        search(monkeypatch, ["good", last]).culprits()
    assert ("(undecided)" in str(caught.value)) is (last == "undecided")
