"""Verdicts on a change: rules, tests, shifts, causes, cost; by hand and by simulation."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from scipy import stats

from experiments.benchmarks import random_predictions
from nemf.errors import NemfError
from nemf.predictions import Predictions
from nemf.scoring import get_protocol
from reports.records import score_pairs
from reports.regression import Observed, judge
from reports.regression_page import summary
from reports.regression_policy import Cell, ExactnessRule, Policy
from reports.regression_watches import (
    Cost,
    Rescored,
    Side,
    causes,
    cost_ratio,
    not_comparable,
    points_moved,
)

REPO = Path(__file__).resolve().parent.parent
CELL = Cell("nearest_small", "spair", "canonical")
RULE = ExactnessRule(tolerance_px=0.001, shift_px=0.1, unexplained_share=0.02)
PROTOCOL = get_protocol("canonical@1")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(REPO / "experiments" / "regress.yaml")


@pytest.fixture(scope="module")
def questions() -> Predictions:
    """200 pairs of 40 images in two classes; answers some 20 px off."""
    predictions = random_predictions(200, 2, 20)
    predictions.meta |= {
        "fingerprint": "f" * 64,
        "n_pairs": 200,
        "key": "k0",
        "matcher": {"name": "x", "weights_sha256": "w0", "config": {"layers": [6]}},
        "facts": {"seed": 1, "code": "c0", "threads": 1},
    }
    return predictions


def answering(
    questions: Predictions, points: np.ndarray, meta: dict[str, Any] | None = None
) -> Predictions:
    table = questions.table
    for axis, values in zip("xy", points.T, strict=True):
        at = table.column_names.index(f"pred_{axis}")
        column = pa.array(values.astype(np.float32), pa.float32())
        table = table.set_column(at, table.field(at), column)
    changed = {"key": "k1", "facts": {"seed": 1, "code": "c1", "threads": 1}}
    return Predictions(table, copy.deepcopy(questions.meta) | (meta or changed))


def side(predictions: Predictions, protocol: str = "canonical@1") -> Side:
    frame = scores(predictions)
    means = {}
    for alpha in (0.05, 0.1):
        fractions = frame[f"pck-{alpha:.2f}"] / frame["n"]
        means["all", "all", alpha] = float(fractions.mean())
        for category in sorted(set(frame["category"])):
            means["class", category, alpha] = float(fractions[frame["category"] == category].mean())
    return Side(predictions, protocol, means)


def scores(predictions: Predictions) -> pd.DataFrame:
    return score_pairs(predictions, PROTOCOL, (0.05, 0.1)).frame.astype({"category": str})


def observe(base: Predictions, head: Predictions, **more: Any) -> Observed:
    rescored = Rescored(scores(base), scores(head))
    return Observed(CELL, side(base), side(head), None, rescored, **more)


def spoiled(predictions: Predictions, share: float, seed: int = 0) -> np.ndarray:
    """Answers of which a random share is thrown far off, on every pair alike."""
    points = predictions.points("pred").copy()
    rng = np.random.default_rng(seed)
    points[rng.random(len(points)) < share] += 400
    return points


@pytest.fixture(scope="module")
def good(questions: Predictions) -> Predictions:
    """Answers 1 px off: all right."""
    return answering(questions, questions.points("true") + 1, {"key": "k0"})


# -- the policy -----------------------------------------------------------------------------------


def test_the_policy_lists_its_cells(policy: Policy) -> None:
    names = [str(cell) for cell in policy.cells()]
    assert "nearest_small/spair/canonical" in names
    assert len(names) == len(set(names)) == 20
    assert {cell.dataset for cell in policy.cells(real=True)} == {"pfwillow"}
    assert {c.matcher for c in policy.cells()} - {c.matcher for c in policy.cells(real=True)} == {
        "copy"
    }
    assert all(policy.guards(cell) for cell in [*policy.cells(), *policy.cells(real=True)])
    only = dataclasses.replace(policy, guard=("*/spair/*",))
    assert [only.guards(Cell("m", d, "p")) for d in ("spair", "pfwillow")] == [True, False]


def test_a_misspelt_key_is_named_beside_the_one_it_stands_for(tmp_path: Path) -> None:
    text = (REPO / "experiments" / "regress.yaml").read_text()
    file = tmp_path / "policy.yaml"
    file.write_text(text.replace("seconds_ratio:", "second_ratio:"))
    with pytest.raises(NemfError, match="cost lacks seconds_ratio and has unknown second_ratio"):
        Policy.load(file)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("guard",), None, "lacks guard"),
        (("extra",), 1, "has unknown extra"),
        (("accuracy", "level"), 1.5, "accuracy.level must lie in"),
        (("accuracy", "level"), "high", "accuracy.level must be a number"),
        (("accuracy", "alphas"), [], "at least one alpha"),
        (("accuracy", "alphas"), [-1], "alpha must be a positive number"),
        (("accuracy", "least_change"), -0.1, "accuracy.least_change must be at least 0"),
        (("suite", "matchers"), "copy", "suite.matchers must be a list of names"),
        (("suite", "matchers"), ["copy", "copy"], "suite.matchers must name at least one"),
        (("suite", "data"), {"both": "x"}, "suite.data must be"),
        (("suite", "threads"), 0, "suite.threads must be at least 1"),
        (("cost", "rounds"), 1, "cost.rounds must be at least 2"),
        (("cost", "most_rounds"), 4, "cost.most_rounds must be at least 5"),
        (("exactness", "unexplained_share"), -1, "exactness.unexplained_share must be at least 0"),
        (("suite", "real"), [], "suite.real must name at least one"),
        (("cost", "predictions"), ["cats/spair"], "cats/spair, which is not run"),
        (("guard",), ["cats/*"], "guard pattern 'cats/*' fits no cell"),
    ],
)
def test_a_wrong_policy_is_refused(
    tmp_path: Path, path: tuple[str, ...], value: Any, complaint: str
) -> None:
    content = yaml.safe_load((REPO / "experiments" / "regress.yaml").read_text())
    node = content
    for key in path[:-1]:
        node = node[key]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(NemfError, match=re.escape(complaint)) as info:
        Policy.load(file)
    assert str(info.value).startswith(f"{file}: ")
    assert "\n" not in str(info.value)


def test_a_policy_that_is_no_yaml_or_absent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("a: [")
    with pytest.raises(NemfError, match=r"p\.yaml: cannot be read as YAML"):
        Policy.load(tmp_path / "p.yaml")
    with pytest.raises(NemfError, match="no such policy file"):
        Policy.load(tmp_path / "q.yaml")


# -- can the two sides be compared ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "protocol", "reason"),
    [
        ({}, "canonical@1", None),
        ({"fingerprint": "e" * 64}, "canonical@1", "dataset version differs (ffff"),
        ({"synthetic": False}, "canonical@1", "kind of data differs (True and False)"),
        ({"n_pairs": 7}, "canonical@1", "number of pairs differs (200 and 7)"),
        ({"plan": "trg2src-own"}, "canonical@1", "plan of canonical@1 differs"),
        ({}, "canonical@2", "protocol version differs (canonical@1 and canonical@2)"),
    ],
)
def test_other_questions_are_not_compared(
    good: Predictions, changes: dict[str, Any], protocol: str, reason: str | None
) -> None:
    other = answering(good, good.points("pred"), changes)
    found = not_comparable(side(good), Side(other, protocol, {}))
    assert found is None if reason is None else str(found).startswith(reason)


def test_a_moved_truth_is_noticed_though_the_fingerprint_is_the_same(good: Predictions) -> None:
    at = good.table.column_names.index("true_x")
    moved = pa.array(good.column("true_x") + 1, pa.float32())
    other = Predictions(good.table.set_column(at, good.table.field(at), moved), dict(good.meta))
    assert "differ in true_x" in str(not_comparable(side(good), Side(other, "canonical@1", {})))


def test_a_side_without_predictions_is_named(policy: Policy, good: Predictions) -> None:
    broken = Side(None, None, {}, "does not import (SyntaxError: invalid syntax)")
    for base, head, fails in ((side(good), broken, True), (broken, side(good), False)):
        problem = not_comparable(base, head)
        (verdict,) = judge([Observed(CELL, base, head, problem)], policy)
        assert verdict["verdict"] == "not comparable"
        assert "does not import (SyntaxError" in verdict["reasons"][0]["text"]
        assert verdict["fails"] is fails
        (strict,) = judge([Observed(CELL, base, head, problem)], policy, must_compare=True)
        assert strict["fails"]


# -- accuracy -------------------------------------------------------------------------------------


def test_a_drop_is_worse_and_a_gain_improved(policy: Policy, good: Predictions) -> None:
    worse = answering(good, spoiled(good, 0.05))
    for base, head, expected in ((good, worse, "worse"), (worse, good, "improved")):
        (verdict,) = judge([observe(base, head)], policy)
        assert verdict["verdict"] == expected
        assert verdict["fails"] is (expected == "worse")
        (overall,) = (
            t for t in verdict["accuracy"]["tests"] if (t["group"], t["alpha"]) == ("all", 0.1)
        )
        difference = scores(head)["pck-0.10"].sum() - scores(base)["pck-0.10"].sum()
        assert np.sign(overall["difference"]) == np.sign(difference)
        assert overall["low"] <= overall["difference"] <= overall["high"]
        assert overall["p_holm"] == pytest.approx(min(1, 2 * overall["p"]), rel=0.5)


def test_a_certain_but_tiny_drop_pages_nobody(policy: Policy, good: Predictions) -> None:
    points = good.points("pred").copy()
    starts = good.pair_starts
    points[starts[:6]] += 400  # one keypoint of six of 200 pairs
    (verdict,) = judge([observe(good, answering(good, points))], policy)
    assert verdict["verdict"] == "same"
    strict = dataclasses.replace(policy.accuracy, level=0.99, least_change=0.0)
    (verdict,) = judge(
        [observe(good, answering(good, points))], dataclasses.replace(policy, accuracy=strict)
    )
    assert verdict["verdict"] == "worse"


def test_a_class_that_falls_is_named(policy: Policy, good: Predictions) -> None:
    first = good.column("category") == "class00"
    points = spoiled(good, 0.08)
    points[~first] = good.points("pred")[~first]
    (verdict,) = judge([observe(good, answering(good, points))], policy)
    fallen = {
        t["value"]
        for t in verdict["accuracy"]["tests"]
        if t["group"] == "class" and t["verdict"] == "worse"
    }
    assert fallen == {"class00"}
    assert any("class class00" in reason["text"] for reason in verdict["reasons"])


def test_more_cells_make_the_tests_stricter(policy: Policy, good: Predictions) -> None:
    head = answering(good, spoiled(good, 0.02))
    (alone,) = judge([observe(good, head)], policy)
    together = judge([observe(good, head) for _ in range(20)], policy)
    first = [v["accuracy"]["tests"][0]["p_holm"] for v in (alone, together[0])]
    assert first[1] == pytest.approx(min(1, 20 * first[0]), rel=0.6)
    unchanged = [observe(good, good) for _ in range(20)]
    beside = judge([observe(good, head), *unchanged], policy)[0]
    assert beside["accuracy"]["tests"][0]["p_holm"] == first[0]  # what is equal is no test


def test_every_pair_wrong_at_once_is_seen_though_there_is_no_variance(
    policy: Policy, good: Predictions
) -> None:
    head = answering(good, good.points("pred") + 500)
    (verdict,) = judge([observe(good, head)], policy)
    assert verdict["verdict"] == "worse"
    test = verdict["accuracy"]["tests"][0]
    assert test["difference"] == -1
    assert test["low"] is None
    # 200 pairs, and the image in most of them is in a share s: p = 2 (1/2)^(1/s)
    frame = scores(good)
    codes = [frame[c].to_numpy() for c in ("image_a", "image_b")]
    share = max(((codes[0] == i) | (codes[1] == i)).mean() for i in np.unique(codes))
    assert test["p"] == pytest.approx(2 * 0.5 ** (1 / share))


def test_too_few_images_are_no_verdict(policy: Policy) -> None:
    few = random_predictions(3, 1, 3)
    few.meta |= {"fingerprint": "f", "n_pairs": 3, "key": "k0"}
    base = answering(few, few.points("true"), {"key": "k0"})
    points = base.points("pred").copy()
    points[0] += 400
    (verdict,) = judge([observe(base, answering(few, points))], policy)
    assert verdict["verdict"] == "not comparable"
    assert "too few images" in verdict["reasons"][0]["text"]


# -- scoring --------------------------------------------------------------------------------------


def test_other_numbers_for_the_same_predictions_are_a_regression(
    policy: Policy, good: Predictions
) -> None:
    base, head = side(good), side(good)
    head.means = {key: value - 0.1 for key, value in head.means.items()}
    (verdict,) = judge([Observed(CELL, base, head, None)], policy)
    assert verdict["verdict"] == "worse"
    assert [reason["watch"] for reason in verdict["reasons"]] == ["scoring"]
    assert len(verdict["scoring"]["changed"]) == 6  # all and two classes at two alphas
    assert "100.0 → 90.0" in verdict["reasons"][0]["text"]
    head.means = {key: value + 1e-12 for key, value in base.means.items()}  # another summing order
    (verdict,) = judge([Observed(CELL, base, head, None)], policy)
    assert verdict["verdict"] == "same"


def test_matcher_and_scoring_are_told_apart(policy: Policy, good: Predictions) -> None:
    """The head answers worse and also scores everything as 0.1 more: each is named."""
    item = observe(good, answering(good, spoiled(good, 0.05)))
    item.base.means = {key: value - 0.1 for key, value in item.base.means.items()}
    (verdict,) = judge([item], policy)
    assert {reason["watch"] for reason in verdict["reasons"]} == {"scoring", "accuracy"}


# -- exactness ------------------------------------------------------------------------------------


def test_equal_and_nearly_equal_predictions(good: Predictions) -> None:
    same = points_moved(good, answering(good, good.points("pred")), RULE)
    assert same["status"] == "byte-equal"
    near = points_moved(good, answering(good, good.points("pred") + 0.0005), RULE)
    assert near["status"] == "within tolerance"
    assert near["n_moved"] == 0
    assert near["mean_dx_px"] == pytest.approx(0.0005, abs=5e-5)


def test_moved_points_are_counted_and_measured(good: Predictions) -> None:
    points = good.points("pred").copy()
    points[:4] += [3, 4]
    points[4] = np.nan
    found = points_moved(good, answering(good, points), RULE)
    n = len(points)
    assert (found["status"], found["n_moved"], found["n_lost"]) == ("changed", 4, 1)
    assert found["median_px"] == pytest.approx(5, abs=1e-4)
    assert found["mean_dx_px"] == pytest.approx(12 / (n - 1), rel=1e-3)
    assert found["mean_dy_px"] == pytest.approx(16 / (n - 1), rel=1e-3)
    assert found["shift"] is None
    back = points_moved(answering(good, points), good, RULE)
    assert back["n_gained"] == 1


@pytest.mark.parametrize("scale", [0.0, 0.2])
def test_half_a_pixel_is_a_shift(policy: Policy, good: Predictions, scale: float) -> None:
    """Rigid, or growing with the image as in a resized frame; PCK hardly moves."""
    rng = np.random.default_rng(0)
    step = 0.5 + scale * rng.uniform(-1, 1, len(good))
    points = good.points("pred") + np.stack([step, np.zeros_like(step)], 1)
    points[:20] += 300  # a few were matched anew
    found = points_moved(good, answering(good, points), RULE)
    assert found["shift"] == pytest.approx([0.5, 0.0], abs=0.02)
    rest = good.points("pred") + np.stack([step, np.zeros_like(step)], 1)
    (verdict,) = judge([observe(good, answering(good, rest))], policy)
    assert [r["watch"] for r in verdict["reasons"]] == ["exactness"]
    assert verdict["verdict"] == "worse"


def test_noise_and_few_moves_are_no_shift(good: Predictions) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.5, (len(good), 2))
    assert points_moved(good, answering(good, good.points("pred") + noise), RULE)["shift"] is None
    few = good.points("pred").copy()
    few[: len(few) // 3] += 0.5
    assert points_moved(good, answering(good, few), RULE)["shift"] is None
    far = answering(good, good.points("pred") + 16)  # one cell of a grid: matched anew
    assert points_moved(good, far, RULE)["shift"] is None


def test_other_weights_may_lean_to_one_side(policy: Policy, good: Predictions) -> None:
    matcher = good.meta["matcher"] | {"weights_sha256": "w1"}
    head = answering(good, good.points("pred") + 0.5, {"key": "k1", "matcher": matcher})
    (verdict,) = judge([observe(good, head)], policy)
    assert verdict["exactness"]["shift"] is not None
    assert verdict["verdict"] == "same"
    assert [cause["what"] for cause in verdict["causes"]] == ["weights"]


def test_moves_that_nothing_explains_are_a_regression(policy: Policy, good: Predictions) -> None:
    """The same code, weights and libraries: a few points may flip on another processor."""
    for share, expected in ((0.01, "same"), (0.04, "worse")):
        points = good.points("pred").copy()
        points[: round(share * len(points))] += [0.05, -0.05]
        for meta, verdict_then in (({"key": "k1"}, expected), (None, "same")):
            (verdict,) = judge([observe(good, answering(good, points, meta))], policy)
            assert verdict["verdict"] == verdict_then
    (verdict,) = judge([observe(good, answering(good, points, {"key": "k1"}))], policy)
    (reason,) = verdict["reasons"]
    assert reason["watch"] == "exactness"
    assert "points moved though nothing on the prediction path differs" in reason["text"]


# -- causes ---------------------------------------------------------------------------------------


def test_weights_config_and_seed_are_named() -> None:
    before = {
        "matcher": {"weights_sha256": "a", "config": {"layers": [4], "size": 1}},
        "facts": {"seed": 1, "code": "c", "libraries": {"torch": "2.4"}},
    }
    after = {
        "matcher": {"weights_sha256": "b", "config": {"layers": [6], "window": 5, "size": 1}},
        "facts": {"seed": 2, "code": "c", "libraries": {"torch": "2.4"}},
    }
    found = {c["what"]: (c["base"], c["head"]) for c in causes(before, after)}
    assert found == {
        "weights": ("a", "b"),
        "config layers": ([4], [6]),
        "config window": (None, 5),
        "seed": (1, 2),
    }
    assert causes(before, before) == []


# -- cost -----------------------------------------------------------------------------------------


def test_a_cost_ratio_is_a_geometric_mean_with_a_t_interval() -> None:
    found = cost_ratio([1.0, 2.0, 4.0], [1.5, 3.3, 5.6], level=0.9)
    logs = np.log([1.5, 1.65, 1.4])
    half = stats.t.ppf(0.95, 2) * logs.std(ddof=1) / math.sqrt(3)
    assert found["ratio"] == pytest.approx(math.exp(logs.mean()))
    assert found["low"] == pytest.approx(math.exp(logs.mean() - half))
    assert found["high"] == pytest.approx(math.exp(logs.mean() + half))
    with pytest.raises(NemfError, match="one positive number per round"):
        cost_ratio([1.0], [1.0], level=0.9)
    with pytest.raises(NemfError, match="one positive number per round"):
        cost_ratio([1.0, 0.0], [1.0, 1.0], level=0.9)


@pytest.mark.parametrize(
    ("seconds", "memory", "expected"),
    [
        ([1.0, 1.02, 0.99, 1.01, 1.0], [100] * 5, "same"),
        ([1.5, 1.52, 1.49, 1.5, 1.51], [100] * 5, "worse"),
        ([0.7, 0.71, 0.7, 0.69, 0.7], [100] * 5, "improved"),
        ([1.0] * 5, [130, 131, 130, 130, 129], "worse"),
        ([0.7] * 5, [130] * 5, "worse"),
        ([0.8, 2.4, 1.1, 1.9, 1.0], [100] * 5, "undecided"),  # slower perhaps, but not surely
        ([1.14, 1.16, 1.15, 1.14, 1.16], [100] * 5, "undecided"),  # at the limit
        ([0.8, 2.4, 1.1, 1.9, 1.0], [130] * 5, "worse"),
    ],
)
def test_cost_is_judged_by_its_interval(
    policy: Policy, good: Predictions, seconds: list[float], memory: list[float], expected: str
) -> None:
    cost = Cost([1.0] * 5, seconds, [100.0] * 5, memory)
    item = Observed(CELL, side(good), side(good), None, cost=cost)
    (verdict,) = judge([item], policy)
    assert verdict["verdict"] == expected
    assert verdict["fails"] is (expected == "worse")
    if expected == "undecided":
        (reason,) = verdict["reasons"]
        assert "after 5 rounds, which does not decide whether it lies between" in reason["text"]


def test_one_looks_after_twice_as_many_rounds_and_the_level_holds_for_all_looks(
    policy: Policy,
) -> None:
    assert policy.cost.looks == [5, 10, 20]
    assert policy.cost.look_level == pytest.approx(1 - 0.01 / 3)
    once = dataclasses.replace(policy.cost, most_rounds=5)
    assert (once.looks, once.look_level) == ([5], pytest.approx(0.99))
    assert dataclasses.replace(policy.cost, most_rounds=12).looks == [5, 10, 12]


# -- the page -------------------------------------------------------------------------------------


def test_the_summary_says_what_where_and_why(policy: Policy, good: Predictions) -> None:
    matcher = good.meta["matcher"] | {"weights_sha256": "w1"}
    head = answering(good, spoiled(good, 0.05), {"key": "k1", "matcher": matcher})
    cost = Cost([1.0] * 3, [1.0] * 3, [100.0] * 3, [100.0] * 3)
    cells = judge([observe(good, head, cost=cost)], policy)
    commit = {"label": "abc", "subject": "A | bar"}
    content = {"failed": True, "base": commit, "head": commit, "cells": cells, "level": 0.05}
    text = summary(content | {"note": ""})
    assert text.startswith("## REGRESSION: 1 worse of 1 cells\n")
    assert "| nearest_small/spair/canonical | **worse** | accuracy: all @0.05 " in text
    assert "| weights |" in text
    assert "A \\| bar" in text
    assert "SYNTHETIC" in text
    assert "| nearest_small/spair | 1 → 1 | 1.00 [1.00, 1.00] | 100 → 100 |" in text
    unsure = Cost([1.0] * 3, [0.8, 1.9, 1.2], [100.0] * 3, [100.0] * 3)
    doubt = judge([Observed(CELL, side(good), side(good), None, cost=unsure)], policy)
    text = summary(content | {"failed": False, "cells": doubt, "note": ""})
    assert text.startswith("## UNDECIDED: 1 undecided of 1 cells\n")
    assert "| nearest_small/spair/canonical | undecided | cost: 1.2 instead of 1 s per pair" in text
    calm = judge([Observed(CELL, side(good), side(good), None)], policy)
    text = summary(content | {"failed": False, "cells": calm, "note": ""})
    assert text.startswith("## No regression: 1 same of 1 cells\n")
    assert "byte-equal" in text


# -- false alarms ---------------------------------------------------------------------------------


def exchangeable(rng: np.random.Generator, n_images: int, n_pairs: int) -> Rescored:
    """Two sides that nothing tells apart: per pair and alpha as many keypoints right in
    expectation, images easy or hard for both and, half of it, for one side only."""
    ordered = np.array([(a, b) for a in range(n_images) for b in range(n_images) if a != b])
    category = np.repeat(np.arange(4), n_pairs // 4)
    kept = [rng.choice(len(ordered), n_pairs // 4, replace=False) for _ in range(4)]
    images = ordered[np.concatenate(kept)] + n_images * category[:, None]  # none in two classes
    n = rng.integers(4, 12, n_pairs)
    shared = rng.normal(0, 0.5, 4 * n_images)
    frames = []
    for _ in range(2):
        effect = shared + rng.normal(0, 0.5, 4 * n_images)
        easy = 0.3 + effect[images].sum(1) + rng.normal(0, 0.3, n_pairs)
        frame = {"pair": np.arange(n_pairs).astype(str), "category": category.astype(str)}
        frame |= {"image_a": images[:, 0], "image_b": images[:, 1], "n": n}
        frame["pck-0.10"] = rng.binomial(n, 1 / (1 + np.exp(-easy)))
        frame["pck-0.05"] = rng.binomial(frame["pck-0.10"], 0.6)
        frames.append(pd.DataFrame(frame))
    return Rescored(*frames)


@pytest.mark.long
@pytest.mark.parametrize("least", [0.0, 0.005])
def test_false_alarms_stay_within_the_nominal_rate(
    policy: Policy, good: Predictions, least: float
) -> None:
    """1,000 comparisons in which nothing happened but noise, with and without the least change: a
    team is called (worse) at most at the level's rate; worse or improved, which the level is about,
    at most at that rate but for the simulation's own error."""
    accuracy = dataclasses.replace(policy.accuracy, least_change=least)
    if not least:
        accuracy = dataclasses.replace(accuracy, least_class_change=0.0)
    policy = dataclasses.replace(policy, accuracy=accuracy)
    rng = np.random.default_rng(7)
    far = answering(good, spoiled(good, 0.3))
    base, head = Side(good, "canonical@1", {}), Side(far, "canonical@1", {})
    alarms = pages = 0
    for _ in range(1000):
        item = Observed(CELL, base, head, None, exchangeable(rng, 16, 480))
        (verdict,) = judge([item], policy)
        found = {reason["verdict"] for reason in verdict["reasons"]}
        alarms += bool(found & {"worse", "improved"})
        pages += verdict["verdict"] == "worse"
    assert pages <= 1000 * policy.accuracy.level
    assert alarms <= stats.binom.ppf(0.99, 1000, policy.accuracy.level)


def test_problems_of_both_sides_are_told() -> None:
    """A misspelt matcher was never accepted, but the misspelling is what to mend."""
    base, head = (Side(None, None, {}, text) for text in ("it was never accepted", "no config x"))
    told = not_comparable(base, head)
    assert (
        told == "base has no prediction: it was never accepted; head has no prediction: no config x"
    )
