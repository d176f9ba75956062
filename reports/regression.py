"""Regression verdicts: what a change of the code did to a matcher, from what it answered before and
after. Torch-free.

A cell is (matcher config, dataset, protocol). Four things are watched on it:

* *accuracy*: the paired difference of PCK, both sides scored by the newer code;
* *scoring*: whether the newer code gives the older predictions the numbers that the older code did;
* *exactness*: which predicted points moved, how far, and whether most moved the same way;
* *cost*: seconds per pair and peak memory as ratios of alternating measurements.

Each is worse, improved, same or (cost) undecided; the cell is the worst of them, or not comparable.
All tests of a comparison are corrected together. docs/regressions.md describes the rules and the
JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.records import or_none
from reports.regression_policy import AccuracyRule, Cell, ExactnessRule, Policy
from reports.regression_watches import (
    Cost,
    Rescored,
    Side,
    accuracy_tests,
    causes,
    cost_ratios,
    points_moved,
    scoring_changes,
)
from reports.statistics import holm

FORMAT = 2


@dataclass(eq=False)
class Observed:
    """A cell as it was found: both sides, ``problem``: why they cannot be compared, or None;
    ``rescored``: their scores by the newer code (None where both are one prediction file, which the
    head's own means are about); and what it costs (None where that was not measured, ``cost_note``
    says why)."""

    cell: Cell
    base: Side
    head: Side
    problem: str | None
    rescored: Rescored | None = None
    cost: Cost | None = None
    cost_note: str | None = None


def judge(
    observed: Sequence[Observed], policy: Policy, *, must_compare: bool = False
) -> list[dict[str, Any]]:
    """The verdict on every cell; the tests of all cells are corrected together.

    Overall tests and class tests are two families, each with Holm's correction at half of the
    policy's level. A cell whose predictions are byte-equal is not tested: its matcher cannot have
    changed. ``fails`` says whether the cell makes the comparison a failure: it is guarded, and
    worse, or the head has no prediction, or (``must_compare``) it is not comparable at all.
    """
    verdicts = [_observe(item, policy) for item in observed]
    tests = [test for v in verdicts if v["accuracy"] for test in v["accuracy"]["tests"]]
    for family in ("all", "class"):
        members = [test for test in tests if test["group"] == family]
        p = [math.nan if test["p"] is None else test["p"] for test in members]
        for test, adjusted in zip(members, holm(p), strict=True):
            test["p_holm"] = or_none(adjusted)
            test["verdict"] = _verdict_of(test, policy.accuracy)
    for item, verdict in zip(observed, verdicts, strict=True):
        _conclude(item, verdict, policy)
        if must_compare and verdict["guarded"] and verdict["verdict"] == "not comparable":
            verdict["fails"] = True
    return verdicts


def _verdict_of(test: Mapping[str, Any], rule: AccuracyRule) -> str:
    if test["p_holm"] is None:
        return "untested"
    least = rule.least_change if test["group"] == "all" else rule.least_class_change
    if test["p_holm"] >= rule.level / 2 or abs(test["difference"]) < least:
        return "same"
    return "worse" if test["difference"] < 0 else "improved"


def _observe(item: Observed, policy: Policy) -> dict[str, Any]:
    """What is known of a cell before the tests of all cells are corrected."""
    verdict: dict[str, Any] = {
        "cell": str(item.cell),
        "guarded": policy.guards(item.cell),
        "verdict": None,
        "fails": False,
        "reasons": [],
        "causes": [],
        "protocol": item.head.protocol or item.base.protocol,
        "synthetic": None,
        "accuracy": None,
        "scoring": None,
        "exactness": None,
        "cost": None,
        "cost_note": item.cost_note,
    }
    if item.head.predictions is not None:
        verdict["synthetic"] = item.head.predictions.meta["synthetic"]
    if item.base.predictions is not None and item.head.predictions is not None:
        verdict["causes"] = causes(item.base.predictions.meta, item.head.predictions.meta)
    if item.problem is not None:
        return verdict
    before, after = item.base.predictions, item.head.predictions
    verdict["exactness"] = points_moved(before, after, policy.exactness)
    verdict["scoring"] = scoring_changes(item.base, item.head, item.rescored, policy.accuracy)
    verdict["accuracy"] = {"tests": []}
    if verdict["exactness"]["status"] == "byte-equal":
        verdict["accuracy"]["means"] = [
            {"alpha": alpha, "pck": item.head.means.get(("all", "all", alpha))}
            for alpha in policy.accuracy.alphas
        ]
    elif item.rescored is not None:
        verdict["accuracy"]["tests"] = [
            {"group": group, "value": value, "alpha": alpha, **facts}
            for group, value, alpha, facts in accuracy_tests(item.rescored, policy.accuracy)
        ]
    if item.cost is not None:
        verdict["cost"] = cost_ratios(item.cost, policy.cost)
    return verdict


def _conclude(item: Observed, verdict: dict[str, Any], policy: Policy) -> None:
    """Fills in the cell's verdict, its reasons and whether it fails."""
    if item.problem is not None:
        verdict["verdict"] = "not comparable"
        verdict["reasons"] = [
            {"watch": "comparability", "verdict": "not comparable", "text": item.problem}
        ]
        # A head that cannot predict is a failure; another dataset or protocol version is not.
        verdict["fails"] = verdict["guarded"] and item.head.problem is not None
        return
    reasons = list(_reasons(verdict, policy))
    verdict["reasons"] = [{k: r[k] for k in ("watch", "verdict", "text")} for r in reasons]
    found = {reason["verdict"] for reason in reasons}
    order = ("worse", "improved", "not comparable", "undecided")
    verdict["verdict"] = next((v for v in order if v in found), "same")
    verdict["fails"] = verdict["guarded"] and verdict["verdict"] == "worse"


def _reasons(verdict: Mapping[str, Any], policy: Policy) -> Iterator[dict[str, str]]:
    """Everything that makes a cell other than the same: ``watch``, ``verdict``, ``text``."""
    yield from _scoring_reasons(verdict)
    yield from _accuracy_reasons(verdict["accuracy"]["tests"])
    yield from _exactness_reasons(verdict, policy.exactness)
    yield from _cost_reasons(verdict["cost"] or {})


def _scoring_reasons(verdict: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    if verdict["scoring"]["changed"]:
        entry = max(
            verdict["scoring"]["changed"],
            key=lambda e: (e["group"] == "all", abs((e["head"] or 0) - e["base"])),
        )
        yield {
            "watch": "scoring",
            "verdict": "worse",
            "text": (
                f"the same predictions score differently under an unchanged {verdict['protocol']}: "
                f"{entry['value']} @{entry['alpha']:g} {_percent(entry['base'])} → "
                f"{_percent(entry['head'])} ({len(verdict['scoring']['changed'])} numbers changed)"
            ),
        }
    elif not verdict["scoring"]["checked"]:
        yield {
            "watch": "scoring",
            "verdict": "not comparable",
            "text": "the base's own scores lack an alpha of the policy",
        }


def _accuracy_reasons(tests: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for kind in ("worse", "improved"):
        hits = [test for test in tests if test["verdict"] == kind]
        overall = [test for test in hits if test["group"] == "all"]
        for test in overall:
            yield {"watch": "accuracy", "verdict": kind, "text": _test_text(test)}
        classes = sorted(
            {test["value"] for test in hits if test["group"] == "class"},
            key=lambda name: max(abs(t["difference"]) for t in hits if t["value"] == name),
            reverse=True,
        )
        if classes:
            worst = max(
                (t for t in hits if t["group"] == "class"), key=lambda t: abs(t["difference"])
            )
            more = f" and {len(classes) - 1} more classes" if len(classes) > 1 else ""
            yield {
                "watch": "accuracy",
                "verdict": kind,
                "text": f"class {_test_text(worst)}{more}",
            }
    overall = [test for test in tests if test["group"] == "all"]
    if overall and all(test["verdict"] == "untested" for test in overall):
        yield {
            "watch": "accuracy",
            "verdict": "not comparable",
            "text": f"too few images for a test ({overall[0]['n_images']})",
        }


def _exactness_reasons(verdict: Mapping[str, Any], rule: ExactnessRule) -> Iterator[dict[str, str]]:
    moved, tests = verdict["exactness"], verdict["accuracy"]["tests"]
    share = moved["n_moved"] / max(1, moved["n_keypoints"])
    if not verdict["causes"] and share > rule.unexplained_share:
        yield {
            "watch": "exactness",
            "verdict": "worse",
            "text": (
                f"{moved['n_moved']} of {moved['n_keypoints']} points moved though nothing on the "
                "prediction path differs: chance that no seed governs, or another machine"
            ),
        }
    better = any(test["verdict"] == "improved" for test in tests if test["group"] == "all")
    retrained = any(cause["what"] == "weights" for cause in verdict["causes"])
    # Other weights may well lean to one side, and a shift that helps is a repair.
    if moved["shift"] is not None and not better and not retrained:
        dx, dy = moved["shift"]
        yield {
            "watch": "exactness",
            "verdict": "worse",
            "text": f"most points moved the same way, by ({dx:+.2f}, {dy:+.2f}) px",
        }


def _cost_reasons(cost: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for name, title in (("seconds", "s per pair"), ("memory", "MiB at most")):
        entry = cost.get(name)
        if entry and entry["verdict"] != "same":
            limits = f"between 1/{entry['limit']:g} and {entry['limit']:g}"
            doubt = (
                f" after {entry['rounds']} rounds, which does not decide whether it lies {limits}"
            )
            yield {
                "watch": "cost",
                "verdict": entry["verdict"],
                "text": (
                    f"{entry['head']:.3g} instead of {entry['base']:.3g} {title}: ratio "
                    f"{entry['ratio']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
                    f"{doubt if entry['verdict'] == 'undecided' else ''}"
                ),
            }


def _test_text(test: Mapping[str, Any]) -> str:
    interval = ""
    if test["low"] is not None:
        interval = f" [{100 * test['low']:+.1f}, {100 * test['high']:+.1f}]"
    return (
        f"{test['value']} @{test['alpha']:g} {_percent(test['base'])} → {_percent(test['head'])}: "
        f"{100 * test['difference']:+.1f} points{interval}, corrected p {_p(test['p_holm'])}"
    )


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
