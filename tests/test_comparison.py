"""Comparisons: scores by hand or against a slow oracle, what is refused, the page, the verb."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image as PILImage

from experiments.cli import main_group
from experiments.store import slot_folder
from nemf.datasets.spair import SPair71k
from nemf.errors import NemfError
from nemf.pairs import ImageRecord, Pair, Plan
from nemf.predictions import FILE_NAME, FORMAT, Predictions, dataset_meta, prediction_table
from nemf.scoring import get_protocol, pck
from reports.comparison import (
    CURVE_ALPHAS,
    CURVE_END,
    Comparison,
    Run,
    compare,
    find_runs,
    read_runs,
)
from reports.comparison_page import caveat, conclusion, draw_curves, headline
from reports.confusions import keypoint_names, left_right, mirrored_name, nearer_to_another
from reports.records import keypoint_errors
from reports.statistics import paired_difference
from tests.conftest import REPO, write_json

NAN = float("nan")
CANONICAL = get_protocol("canonical@1")
SRC2TRG = Plan("src2trg")


# -- prediction files -----------------------------------------------------------------------------


def image(name: str, kps: Any = ()) -> ImageRecord:
    points = np.asarray(kps, np.float32).reshape(-1, 2)
    names = tuple(str(k) for k in range(len(points)))
    return ImageRecord(Path(name), name, f"hash-{name}", (200, 300), points, names)


def pair(
    name: str,
    category: str,
    src: str,
    trg: ImageRecord,
    kps: Any,
    *,
    names: Sequence[str] | None = None,
    src_kps: Any = None,
    flags: dict[str, int] | None = None,
) -> Pair:
    """A pair whose target box makes alpha count in units of 100 px."""
    kps = np.asarray(kps, np.float32)
    asked = np.zeros_like(kps) if src_kps is None else np.asarray(src_kps, np.float32)
    names = tuple(names or (str(k) for k in range(len(kps))))
    box = np.float32([0, 0, 100, 50])
    return Pair(name, category, image(src), trg, asked, kps, names, box, box, flags or {})


def predictions(
    pairs: Sequence[Pair], answers: Sequence[Any], label: str = "one", **changed: Any
) -> Predictions:
    """``answers``: px of the target image, (N, 2) per pair."""
    plan = Plan.parse(changed.get("plan", "src2trg-own"))
    rows = [
        (number, p.oriented(plan), np.asarray(xy, np.float32), None)
        for number, (p, xy) in enumerate(zip(pairs, answers, strict=True))
    ]
    meta = {
        "format": FORMAT, "dataset": "spair", "title": "SPair-71k", "split": "test",
        "layout": "spair", "fingerprint": "f" * 64, "synthetic": False, "n_pairs": len(pairs),
        "official_pairs": None, "plan": str(plan), "key": "0" * 24,
        "matcher": {"name": "hand", "label": label}, "code": None,
    }  # fmt: skip
    return Predictions(prediction_table(rows), meta | changed)


def written(folder: Path, *contents: Predictions) -> list[Path]:
    files = [folder / f"{number}.parquet" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        content.write(file)
    return files


def moved(kps: Any, *errors_px: float) -> list[list[float]]:
    """Answers that miss keypoints by so many pixels (NaN: no answer)."""
    return [[x + e, y] for (x, y), e in zip(kps, errors_px, strict=True)]


SPOTS = [[50, 50], [50, 150], [200, 100], [200, 20]]


def four_pairs() -> list[Pair]:
    """Three cats with 2, 2 and 4 keypoints and a dog with 2, no two with a common image."""
    flags = [{"viewpoint": 0}, {"viewpoint": 1}, {"viewpoint": 1}, {}]
    return [
        pair(
            f"p{i}", "dog" if i == 3 else "cat", f"s{i}", image(f"t{i}", SPOTS),
            SPOTS[:4] if i == 2 else SPOTS[:2],
            flags=dict.fromkeys(("scale", "truncation", "occlusion"), -1) | flags[i],
        )
        for i in range(4)
    ]  # fmt: skip


def four_runs() -> tuple[Predictions, Predictions]:
    """PCK@0.1 per pair: 1, 1, 1/2, 0 against 0, 1, 3/4, 1/2."""
    right, wrong = 5.0, 30.0
    one = [[right, right], [right, right], [right, right, wrong, NAN], [wrong, NAN]]
    two = [[wrong, wrong], [right, right], [right, right, right, wrong], [right, wrong]]
    pairs = four_pairs()
    answers = [
        [moved(p.trg_kps, *e) for p, e in zip(pairs, errors, strict=True)] for errors in (one, two)
    ]
    return predictions(pairs, answers[0], "one"), predictions(pairs, answers[1], "two")


def compared(folder: Path, *contents: Predictions, **options: Any) -> Comparison:
    return compare(read_runs(written(folder, *contents)), CANONICAL, **options)


def cell_of(comparison: dict[str, Any], measure: str, value: str, alpha: float | None) -> Any:
    (cell,) = (
        c
        for c in comparison["cells"]
        if (c["measure"], c["value"], c["alpha"]) == (measure, value, alpha)
    )
    return cell


# -- differences by hand --------------------------------------------------------------------------

FIRST, SECOND = [1, 1, 1 / 2, 0], [0, 1, 3 / 4, 1 / 2]
BY_HAND = {  # group: a, b, wins, ties, losses, pairs, weights of the four pairs
    "all": (2.5 / 4, 2.25 / 4, 1, 1, 2, 4, [1, 1, 1, 1]),
    "class mean": ((2.5 / 3) / 2, (1.75 / 3 + 0.5) / 2, 1, 1, 2, 4, [1, 1, 1, 3]),
    "cat": (2.5 / 3, 1.75 / 3, 1, 1, 1, 3, [1, 1, 1, 0]),
    "dog": (0, 1 / 2, 0, 0, 1, 1, [0, 0, 0, 1]),
    "0": (1, 0, 1, 0, 0, 1, [1, 0, 0, 0]),
    "1": (1.5 / 2, 1.75 / 2, 0, 1, 1, 2, [0, 1, 1, 0]),
}


def test_differences_per_group_by_hand(tmp_path: Path) -> None:
    content = compared(tmp_path, *four_runs()).content
    (comparison,) = content["comparisons"]
    shown = [c["value"] for c in comparison["cells"] if (c["measure"], c["alpha"]) == ("pck", 0.1)]
    assert shown == list(BY_HAND)
    for value, (a, b, wins, ties, losses, n_pairs, weights) in BY_HAND.items():
        cell = cell_of(comparison, "pck", value, 0.1)
        assert (cell["a_mean"], cell["b_mean"]) == pytest.approx((a, b)), value
        assert cell["difference"] == pytest.approx(a - b), value
        counts = [cell[key] for key in ("wins", "ties", "losses", "n_pairs", "n_images")]
        assert counts == [wins, ties, losses, n_pairs, 2 * n_pairs], value
        rows = np.flatnonzero(weights)
        expected = paired_difference(
            np.array(FIRST)[rows], np.array(SECOND)[rows], 2 * rows, 2 * rows + 1,
            weights=np.array(weights)[rows],
        )  # fmt: skip
        wanted_of = {"low": expected.low, "high": expected.high, "p": expected.p_value}
        for key, wanted in wanted_of.items():
            assert cell[key] == (None if np.isnan(wanted) else pytest.approx(wanted)), (value, key)
    assert content["runs"][0]["n_unanswered"] == 2
    assert cell_of(comparison, "pck", "all", 0.1) == headline(comparison, 0.1)


def test_per_point_averaging_by_hand(tmp_path: Path) -> None:
    content = compared(tmp_path, *four_runs(), by="point").content
    (comparison,) = content["comparisons"]
    overall = cell_of(comparison, "pck", "all", 0.1)
    assert (overall["a_mean"], overall["b_mean"]) == (6 / 10, 6 / 10)
    by_class = cell_of(comparison, "pck", "class mean", 0.1)
    assert by_class["a_mean"] == pytest.approx((6 / 8 + 0) / 2)
    assert by_class["b_mean"] == pytest.approx((5 / 8 + 1 / 2) / 2)
    assert "per-point mean" in content["protocol"]["description"]
    assert "per point)" in comparison["conclusion"]


def test_one_class_has_no_class_mean(tmp_path: Path) -> None:
    pairs = four_pairs()[:3]
    same = [p.trg_kps for p in pairs]
    (comparison,) = compared(tmp_path, *(predictions(pairs, same, x) for x in "ab")).content[
        "comparisons"
    ]
    assert {c["group"] for c in comparison["cells"]} == {"all", "class", "viewpoint"}
    assert comparison["conclusion"].endswith("a and b score alike on every pair.")


def test_the_csv_holds_every_pair_of_every_comparison(tmp_path: Path) -> None:
    one, two = four_runs()
    three = predictions(four_pairs(), [p.trg_kps for p in four_pairs()], "three")
    table = compared(tmp_path, one, two, three, all_pairs=True, alphas=[0.1]).per_pair
    assert table[["a", "b"]].drop_duplicates().to_numpy().tolist() == [
        ["one", "two"],
        ["one", "three"],
        ["two", "three"],
    ]
    first = table[:4]
    assert first["pair"].tolist() == ["p0", "p1", "p2", "p3"]
    assert first["n_keypoints"].tolist() == [2, 2, 4, 2]
    assert first["a_pck-0.10"].tolist() == FIRST
    assert first["difference_pck-0.10"].tolist() == [1, 0, -1 / 4, -1 / 2]
    assert first["viewpoint"].tolist() == [0, 1, 1, -1]
    assert table["b_area"][4:8].tolist() == [1, 1, 1, 1]


def test_the_pairs_that_differ_most_come_first_on_both_sides(tmp_path: Path) -> None:
    (comparison,) = compared(tmp_path, *four_runs()).content["comparisons"]
    found = [(e["pair"], e["difference"]) for e in comparison["most_different"]]
    assert found == [("p0", 1.0), ("p3", -1 / 2), ("p2", -1 / 4)]


# -- Holm -----------------------------------------------------------------------------------------


def holm_by_hand(p: list[float]) -> list[float]:
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, at in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = worst
    return adjusted


def random_runs(n_runs: int, n_pairs: int = 40, seed: int = 0) -> list[Predictions]:
    """Runs of growing noise on pairs that share ten images a class, two classes."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n_pairs):
        category, (s, t) = "cat" if i % 2 else "dog", rng.choice(10, 2, replace=False)
        kps = rng.uniform(20, 180, (3 + i % 4, 2))
        name = f"{category}{t}"
        pairs.append(pair(f"p{i}", category, f"{category}{s}", image(name, kps), kps))
    return [
        predictions(
            pairs,
            [p.trg_kps + rng.normal(0, 6 + 3 * k, p.trg_kps.shape) for p in pairs],
            f"run{k}",
        )
        for k in range(n_runs)
    ]


def test_holm_is_over_every_test_of_every_comparison(tmp_path: Path) -> None:
    content = compared(tmp_path, *random_runs(3), all_pairs=True).content
    cells = [cell for c in content["comparisons"] for cell in c["cells"]]
    # three comparisons of three alphas x (all, class mean, two classes, PCK-dagger), and the area
    assert content["holm_tests"] == len(cells) == 3 * (3 * 5 + 1)
    expected = holm_by_hand([cell["p"] for cell in cells])
    assert [cell["p_holm"] for cell in cells] == pytest.approx(expected)
    main = [headline(c, 0.1) for c in content["comparisons"]]
    expected = holm_by_hand([cell["p"] for cell in main])
    assert [cell["p_conclusion"] for cell in main] == pytest.approx(expected)
    assert "Holm's correction over 3 comparisons" in content["comparisons"][0]["conclusion"]


def test_cells_without_a_test_do_not_count(tmp_path: Path) -> None:
    content = compared(tmp_path, *four_runs(), alphas=[0.1]).content
    (comparison,) = content["comparisons"]
    untested = [c for c in comparison["cells"] if c["p"] is None]
    assert {c["value"] for c in untested} >= {"dog", "0"}  # a single pair each
    assert all(c["p_holm"] is None and c["low"] is None for c in untested)
    assert content["holm_tests"] == len(comparison["cells"]) - len(untested)
    assert headline(comparison, 0.1)["p_conclusion"] == headline(comparison, 0.1)["p"]


# -- curves and area ------------------------------------------------------------------------------


def test_curves_against_a_numpy_oracle(tmp_path: Path) -> None:
    runs = random_runs(2)
    content = compared(tmp_path, *runs).content
    fractions = []
    for content_of_run, run in zip(content["runs"], runs, strict=True):
        error = np.linalg.norm(run.points("pred") - run.points("true"), axis=1)
        number = run.column("pair_number")
        each = np.array(
            [
                [np.mean(error[number == i] <= alpha * 100) for i in np.unique(number)]
                for alpha in CURVE_ALPHAS
            ]
        )
        fractions.append(each)
        curve = content_of_run["curve"]
        assert curve["alphas"] == list(CURVE_ALPHAS)
        assert curve["mean"] == pytest.approx(each.mean(1))
        bands = list(zip(curve["low"], curve["mean"], curve["high"], strict=True))
        assert all(0 <= low <= mean <= high <= 1 for low, mean, high in bands)
        # half the keypoints right: the band is wide, but it does not hold everything
        assert all(0.02 < high - low < 0.7 for low, mean, high in bands if 0.3 < mean < 0.9)
    difference = content["comparisons"][0]["curve"]
    assert difference["difference"] == pytest.approx((fractions[0] - fractions[1]).mean(1))
    for low, middle, high in zip(
        difference["low"], difference["difference"], difference["high"], strict=True
    ):
        assert low <= middle <= high


def test_area_by_hand(tmp_path: Path) -> None:
    """A keypoint 5 px off (of 100) is right from alpha 0.05 on: 3/4 of the range up to 0.2."""
    one = four_runs()[0]
    run = compared(tmp_path, one, four_runs()[1]).content["runs"][0]
    per_pair = [3 / 4, 3 / 4, 2 * (3 / 4) / 4, 0]
    assert run["area"]["mean"] == pytest.approx(np.mean(per_pair))


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.floats(0, 40, width=32) | st.just(NAN), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
def test_the_area_is_that_under_the_curve(
    tmp_path_factory: pytest.TempPathFactory, errors: list[float], seed: int
) -> None:
    kps = np.random.default_rng(seed).uniform(50, 100, (len(errors), 2)).round().astype(np.float32)
    pairs = [pair("p", "cat", "s", image("t", kps), kps)]
    one = predictions(pairs, [moved(kps, *errors)], "one")
    two = predictions(pairs, [kps], "two")
    run = compared(tmp_path_factory.mktemp("area"), one, two).content["runs"][0]
    error, length = keypoint_errors(one, CANONICAL)
    grid = np.linspace(0, CURVE_END, 1001)[1:] - CURVE_END / 2000  # midpoints
    under = np.mean([pck(error, length, alpha) for alpha in grid])
    assert run["area"]["mean"] == pytest.approx(under, abs=6e-4)


# -- nearer to another keypoint -------------------------------------------------------------------


def test_dagger_by_hand(tmp_path: Path) -> None:
    """The reference image shows keypoints at x = 50, 58, 70 and, not asked for, 90."""
    kps = [[50, 50], [58, 50], [70, 50]]
    shown = image("t", [*kps, [90, 50]])
    pairs = [pair("p", "cat", "s", shown, kps), pair("q", "cat", "u", shown, kps[:1])]
    answers = [
        [[53, 50], [55, 50], [81, 50]],  # own 3, other 5; own 3, other 5; own 11, other 9
        [[54.0, 50]],  # own 4, other 4: a tie is not nearer
    ]
    one = predictions(pairs, answers, "one")
    error, _ = keypoint_errors(one, CANONICAL)
    assert nearer_to_another(one, CANONICAL, error).tolist() == [False, False, True, False]
    worse = predictions(pairs, [[[55, 50], [NAN, NAN], [66, 50]], [[54.5, 50]]], "two")
    error, _ = keypoint_errors(worse, CANONICAL)
    assert nearer_to_another(worse, CANONICAL, error).tolist() == [True, False, False, True]
    (comparison,) = (content := compared(tmp_path, one, worse).content)["comparisons"]
    plain, dagger = (cell_of(comparison, m, "all", 0.1) for m in ("pck", "dagger"))
    assert (plain["a_mean"], plain["b_mean"]) == pytest.approx(((2 / 3 + 1) / 2, (2 / 3 + 1) / 2))
    assert (dagger["a_mean"], dagger["b_mean"]) == pytest.approx(((2 / 3 + 1) / 2, (1 / 3) / 2))
    assert (dagger["wins"], dagger["ties"], dagger["losses"]) == (2, 0, 0)
    assert [run["dagger"][1]["mean"] for run in content["runs"]] == pytest.approx(
        [dagger["a_mean"], dagger["b_mean"]]
    )


def test_dagger_needs_the_annotated_keypoints(tmp_path: Path) -> None:
    pairs = [pair("p", "cat", "s", image("t", [[50, 50]]), [[50, 50], [60, 50]])]
    content = compared(tmp_path, *(predictions(pairs, [SPOTS[:2]], x) for x in "ab")).content
    assert content["dagger"]["available"] is False
    assert "pair p" in content["dagger"]["reason"]
    assert content["runs"][0]["dagger"] is None
    assert not [c for c in content["comparisons"][0]["cells"] if c["measure"] == "dagger"]


# -- left and right -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mirrored"),
    [
        ("left_eye", ("right", "eye")),
        ("right_eye", ("left", "eye")),
        ("L_Eye", ("r", "eye")),
        ("eye-r", ("eye", "l")),
        ("LeftFrontPaw", ("right", "front", "paw")),
        ("LEye", ("r", "eye")),
        ("wheel front left 2", ("wheel", "front", "right", "2")),
        ("nose", None),
        ("cleft", None),
        ("upright", None),
        ("7", None),
    ],
)
def test_mirrored_names(name: str, mirrored: tuple[str, ...] | None) -> None:
    assert mirrored_name(name) == mirrored


NAMES = ("left_eye", "Right_Eye", "nose", "left_ear")
FACE = [[40, 50], [60, 50], [50, 70], [30, 40]]


def face_pairs() -> list[Pair]:
    """Pair q asks for both eyes, p for one and a nose (its right eye is known from q), r for an ear
    without a counterpart."""
    shown = image("t", FACE)
    return [
        pair("q", "cat", "s", shown, FACE[:2], names=NAMES[:2]),
        pair("p", "cat", "u", shown, [FACE[0], FACE[2]], names=(NAMES[0], NAMES[2])),
        pair("r", "cat", "v", shown, FACE[3:], names=NAMES[3:]),
    ]


def test_left_right_by_hand(tmp_path: Path) -> None:
    pairs = face_pairs()
    first = [[[55, 50], [60, 50]], [[58, 50], [40, 50]], [[60, 50]]]
    second = [[[50, 50], [NAN, NAN]], [[45, 50], [50, 70]], [[30, 40]]]
    one, two = predictions(pairs, first, "one"), predictions(pairs, second, "two")
    error, _ = keypoint_errors(one, CANONICAL)
    has, confused = left_right(one, CANONICAL, error, keypoint_names(one, None))
    assert has.tolist() == [True, True, True, False, False]
    assert confused.tolist() == [True, False, True, False, False]
    content = compared(tmp_path, one, two).content
    assert content["left_right"] == {"available": True, "reason": None, "n_keypoints": 3}
    (comparison,) = content["comparisons"]
    cell = cell_of(comparison, "left_right", "all", None)
    # halfway between the two is not nearer, and no answer is no confusion
    assert (cell["a_mean"], cell["b_mean"]) == pytest.approx((2 / 3, 0))
    assert (cell["n_pairs"], cell["wins"], cell["ties"], cell["losses"]) == (2, 2, 0, 0)
    assert content["runs"][0]["left_right"]["mean"] == pytest.approx(2 / 3)
    row = next(r for r in compared(tmp_path, one, two).markdown().splitlines() if "less is" in r)
    assert row.endswith("| 0 / 0 / 2 |")  # more confusions are a loss


def test_an_image_as_query_shows_where_its_keypoints_are() -> None:
    pairs = [
        pair("p", "cat", "s", image("t"), FACE[:1], names=NAMES[:1]),
        pair("q", "cat", "t", image("s"), [[10, 10]], names=NAMES[1:2], src_kps=FACE[1:2]),
    ]
    one = predictions(pairs, [[[55, 50]], [[10, 10]]])
    error, _ = keypoint_errors(one, CANONICAL)
    has, confused = left_right(one, CANONICAL, error, keypoint_names(one, None))
    # the query of p says that s has its left eye at (0, 0)
    assert has.tolist() == [True, True]
    assert confused.tolist() == [True, False]


def test_two_places_of_one_name_are_no_counterpart() -> None:
    shown = image("t", FACE)
    pairs = [
        pair("p", "cat", "s", shown, FACE[:2], names=NAMES[:2]),
        pair("q", "cat", "u", shown, [[150, 50]], names=NAMES[1:2]),
    ]
    one = predictions(pairs, [FACE[:2], [[150, 50]]])
    error, _ = keypoint_errors(one, CANONICAL)
    has, _ = left_right(one, CANONICAL, error, keypoint_names(one, None))
    assert has.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("0", "1"), "numbered, and without the dataset"),
        (("nose", "tail"), "says left or right"),
        (("left_eye", "nose"), "both a keypoint and its mirrored one"),
    ],
)
def test_left_right_says_why_it_is_not_available(
    names: tuple[str, str], reason: str, tmp_path: Path
) -> None:
    pairs = [pair("p", "cat", "s", image("t", FACE), FACE[:2], names=names)]
    result = compared(tmp_path, *(predictions(pairs, [FACE[:2]], x) for x in "ab"))
    assert result.content["left_right"]["available"] is False
    assert reason in result.content["left_right"]["reason"]
    assert re.search(rf"Left/right confusions: not available \(.*{reason}", result.markdown())
    cells = result.content["comparisons"][0]["cells"]
    assert {cell["measure"] for cell in cells} == {"pck", "dagger", "area"}


# -- with the dataset -----------------------------------------------------------------------------


def on_dataset(data: Path, shift_px: float, label: str) -> Predictions:
    """Predictions for the test split of a SPair-71k, each keypoint ``shift_px`` to the right."""
    dataset = SPair71k(data)
    rows = [
        (number, p.oriented(SRC2TRG), p.trg_kps + np.float32([shift_px, 0]), None)
        for number, p in enumerate(dataset)
    ]
    meta = dataset_meta(dataset, SRC2TRG)
    meta |= {"key": "0" * 24, "matcher": {"name": label, "label": label}, "code": None}
    return Predictions(prediction_table(rows), meta)


def name_keypoints(data: Path, names: Sequence[str]) -> None:
    """Gives the numbered keypoints of every image annotation names."""
    for file in (data / "SPair-71k" / "ImageAnnotation").rglob("*.json"):
        content = json.loads(file.read_text())
        content["kps_names"] = list(names[: len(content["kps"])])
        write_json(file, content)


def test_numbered_keypoints_are_named_by_the_image_annotations(
    tiny_spair: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny_spair()
    one, two = (on_dataset(data, shift, f"by{shift}") for shift in (0, 1))
    with pytest.raises(NemfError, match="do not name them"):
        keypoint_names(one, SPair71k(data))
    name_keypoints(data, ["left_eye", "right_eye", "nose", "tail", "more"])
    names = keypoint_names(one, SPair71k(data))
    assert names.tolist() == ["left_eye", "right_eye", "nose", "left_eye", "right_eye"]
    content = compared(tmp_path, one, two, data=data).content
    assert content["left_right"]["n_keypoints"] == 4
    file = data / "SPair-71k" / "ImageAnnotation" / "cat" / "test_b.json"
    changed = json.loads(file.read_text())
    changed["kps_names"][0] = "right_eye"
    write_json(file, changed)
    rows = [
        (number, SPair71k(data)[0].oriented(plan), np.zeros((3, 2), np.float32), None)
        for number, plan in enumerate((SRC2TRG, Plan("trg2src")))
    ]
    both_sides = Predictions(prediction_table(rows), one.meta)
    with pytest.raises(NemfError, match="keypoint 0 of cat is right_eye in one annotation and lef"):
        keypoint_names(both_sides, SPair71k(data))


def test_pictures_show_truth_and_both_answers(
    tiny_spair: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny_spair()
    result = compared(tmp_path, on_dataset(data, 0, "good"), on_dataset(data, 30, "bad"), data=data)
    files = result.write(tmp_path / "out")
    entries = result.content["comparisons"][0]["most_different"]
    assert [e["pair"] for e in entries] == [p.id for p in SPair71k(data)]
    drawn = [tmp_path / "out" / e["pictures"][w] for e in entries for w in ("truth", "a", "b")]
    assert set(drawn) < set(files)
    sizes = {PILImage.open(file).size for file in drawn}
    assert all(width > 300 and height > 100 for width, height in sizes)
    # the good answers are the truth
    assert drawn[0].read_bytes() == drawn[1].read_bytes() != drawn[2].read_bytes()
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert stored == result.content
    assert "![truth](pictures/1-1-truth.png)" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_comparison_without_the_dataset_drops_old_pictures(
    tiny_spair: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny_spair()
    two = on_dataset(data, 0, "good"), on_dataset(data, 30, "bad")
    compared(tmp_path, *two, data=data).write(tmp_path / "out")
    result = compared(tmp_path, *two)
    result.write(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("1-*.png"))
    assert "No pictures: no --data was given." in result.markdown()


def test_contamination_is_counted_by_content(
    tiny_spair: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny_spair()
    images = data / "SPair-71k" / "JPEGImages"
    two = on_dataset(data, 0, "good"), on_dataset(data, 30, "bad")
    clean = compared(tmp_path, *two, data=data)
    assert clean.content["contamination"] == {
        "checked": True, "reason": None, "n_training_images": 4, "n_images": 0, "n_pairs": 0,
        "images": [],
    }  # fmt: skip
    assert "None of the 4 images is among the 4 of SPair-71k's training split" in clean.markdown()
    # the training image keeps its size, so that its annotation stays valid
    shutil.copy(images / "cat" / "trn_a.jpg", images / "cat" / "test_a.jpg")
    two = on_dataset(data, 0, "good"), on_dataset(data, 30, "bad")
    dirty = compared(tmp_path, *two, data=data)
    found = dirty.content["contamination"]
    assert (found["n_images"], found["n_pairs"]) == (1, 1)
    assert found["images"] == ["cat/test_a.jpg"]
    assert "CONTAMINATION: 1 of the 4 images, in 1 pairs" in dirty.markdown()
    assert "training images too" in caveat(dirty.content)


def test_what_was_not_checked_says_why(tiny_spair: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_spair(splits=("test",))
    two = on_dataset(data, 0, "good"), on_dataset(data, 30, "bad")
    without = compared(tmp_path, *two).content
    assert without["contamination"] == {"checked": False, "reason": "no --data was given"}
    no_split = compared(tmp_path, *two, data=data).content
    assert "PairAnnotation/trn: the folder is missing" in no_split["contamination"]["reason"]
    elsewhere = compared(tmp_path, *two, data=tmp_path / "nowhere").content
    assert elsewhere["pictures"]["reason"].endswith("holds no SPair-71k")
    other = tiny_spair(root=tmp_path / "other", splits=("val", "test"))
    other = compared(tmp_path, *two, data=other).content
    assert "has other images than the predictions" in other["pictures"]["reason"]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fingerprint": "e" * 64}, "'one' and 'two' differ in fingerprint"),
        ({"dataset": "animalpose"}, r"differ in dataset \(spair and animalpose\)"),
        ({"split": "val"}, "differ in split"),
        ({"synthetic": True}, "differ in synthetic"),
        ({"n_pairs": 5}, "1.parquet: holds 4 of 5 pairs"),
    ],
)
def test_runs_of_other_pairs_are_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    one, two = four_runs()
    with pytest.raises(NemfError, match=message):
        compared(tmp_path, one, Predictions(two.table, two.meta | changed))


def test_other_truth_under_one_fingerprint_is_refused(tmp_path: Path) -> None:
    pairs = four_pairs()
    one = predictions(pairs, [p.trg_kps for p in pairs], "one")
    pairs[2].trg_kps[0] += 1
    two = predictions(pairs, [p.trg_kps for p in pairs], "two")
    with pytest.raises(NemfError, match="different questions: the column true_x differs"):
        compared(tmp_path, one, two)


def test_another_direction_is_refused(tmp_path: Path) -> None:
    pairs = four_pairs()
    other = [predictions(pairs, [p.trg_kps for p in pairs], x, plan="trg2src-own") for x in "ab"]
    with pytest.raises(NemfError, match="canonical@1 scores predictions of plan src2trg-own"):
        compared(tmp_path, *other)


@pytest.mark.parametrize("alpha", [0.0, -1.0, NAN, float("inf")])
def test_an_alpha_must_be_positive(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(NemfError, match="alpha must be a positive number"):
        compared(tmp_path, *four_runs(), alpha=alpha)


# -- finding the runs -----------------------------------------------------------------------------


def store(out: Path, content: Predictions) -> Path:
    """Puts predictions into an output folder as the current ones of their label."""
    meta = content.meta
    part = f"{meta['dataset']}-{meta['split']}" + ("-synthetic" if meta["synthetic"] else "")
    slot = slot_folder(out, meta["matcher"]["label"], part, meta["plan"])
    content.write(slot / "k" / FILE_NAME)
    (slot / "current").write_text("k\n")
    return slot / "k" / FILE_NAME


def named(label: str, matcher: str, **changed: Any) -> Predictions:
    one = four_runs()[0]
    return Predictions(
        one.table, one.meta | {"matcher": {"name": matcher, "label": label}} | changed
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    store(folder, named("HPF, big", "hpf"))
    store(folder, named("HPF, small", "hpf"))
    store(folder, named("copy (floor)", "copy"))
    store(folder, named("copy (floor)", "copy", dataset="animalpose"))
    store(folder, named("nearest", "nearest", dataset="animalpose", synthetic=True))
    store(folder, named("CATs", "cats", plan="trg2src-own"))
    return folder


def found(out: Path, *names: str | tuple[str, ...], dataset: str | None = None) -> list[Run]:
    wanted = [(name,) if isinstance(name, str) else name for name in names]
    return find_runs(out, wanted, CANONICAL, dataset)


def test_runs_are_found_by_label_matcher_and_file(out: Path, tmp_path: Path) -> None:
    runs = found(out, "HPF, small", "copy")
    assert [run.label for run in runs] == ["HPF, small", "copy (floor)"]
    assert {run.predictions.meta["dataset"] for run in runs} == {"spair"}
    runs = found(out, ("hpf_small", "HPF, small"), "copy", dataset="spair-test")
    assert [run.label for run in runs] == ["HPF, small", "copy (floor)"]
    file = tmp_path / "elsewhere.parquet"
    named("mine", "mine", dataset="animalpose").write(file)
    runs = found(out, "copy", str(file))
    assert [run.predictions.meta["dataset"] for run in runs] == ["animalpose"] * 2


def test_equal_labels_are_told_apart(tmp_path: Path) -> None:
    one, two = (Predictions(p.table, p.meta | {"matcher": {"name": "x", "label": "x"}})
                for p in four_runs())  # fmt: skip
    labels = [run.label for run in read_runs(written(tmp_path, one, two))]
    assert all(re.fullmatch(r"x \[[0-9a-f]{8}\]", label) for label in labels)
    assert labels[0] != labels[1]


def test_random_weights_and_oracle_classes_are_marked(tmp_path: Path) -> None:
    matcher = {"name": "x", "label": "x", "random_weights": True, "card": {"oracle_class": True}}
    content = Predictions(four_runs()[0].table, four_runs()[0].meta | {"matcher": matcher})
    (run,) = read_runs(written(tmp_path, content))
    assert run.label == "x [random weights, oracle class]"


@pytest.mark.parametrize(
    ("names", "dataset", "message"),
    [
        (["copy"], None, "1 to compare: give 2 to 26"),
        (["copy", "nemf"], None, r"'nemf' is neither .* \(there is 'CATs', 'HPF, big'"),
        (["copy", "hpf"], None, "'hpf' stands for 'HPF, big' and 'HPF, small': give a label"),
        (["copy", "copy (floor)"], "spair", "is compared with itself"),
        (["copy", "copy (floor)"], None, "choose --dataset animalpose-test | spair-test"),
        (["HPF, big", "nearest"], None, "no dataset that all were predicted on: HPF, big on spair"),
        (["HPF, big", "copy"], "pfwillow", "not predicted on pfwillow but on spair-test"),
        (["HPF, big", "CATs"], None, "predicted under trg2src-own, which canonical@1 does not"),
        (["copy", "gone.parquet"], None, "gone.parquet: no such prediction file"),
    ],
)
def test_what_cannot_be_found_says_what_there_is(
    names: list[str], dataset: str | None, message: str, out: Path
) -> None:
    with pytest.raises(NemfError, match=message):
        found(out, *names, dataset=dataset)


# -- conclusions ----------------------------------------------------------------------------------


def claim(
    difference: float,
    p: float | None,
    *,
    classes: Sequence[tuple[float, float | None]] = (),
    method: str = "dyadic t",
    comparisons: int = 1,
    **data: Any,
) -> str:
    """The conclusion on given figures: ``classes`` are (difference, corrected p)."""
    low, high = (None, None) if p is None else (difference - 0.019, difference + 0.021)
    base = {"measure": "pck", "alpha": 0.1, "method": method}
    cells = [
        base | {"group": "all", "difference": difference, "low": low, "high": high}
        | {"p_conclusion": p, "p_holm": p},
        *(base | {"group": "class", "difference": d, "p_holm": q} for d, q in classes),
    ]  # fmt: skip
    comparison = {"a": "A", "b": "B", "cells": cells}
    facts = {
        "title": "SPair-71k", "split": "test", "synthetic": False, "n_pairs": 12234,
        "official_pairs": 12234, "n_images": 486,
    }  # fmt: skip
    content = {
        "dataset": facts | data, "protocol": {"id": "canonical@1"}, "by": "image", "alpha": 0.1,
        "level": 0.95, "comparisons": [comparison] * comparisons,
    }  # fmt: skip
    return conclusion(content, comparison)


ON = "On SPair-71k test (12,234 pairs of 486 images, canonical@1, PCK@0.10 per image) "


def test_ahead_in_one_sentence() -> None:
    classes = [(0.1, 0.01)] * 4 + [(0.01, 0.4)] * 7 + [(0.02, None)] + [(-0.01, 0.9)] * 6
    assert claim(0.031, 0.002, classes=classes) == (
        f"{ON}A is ahead of B by 3.1 points [1.2, 5.2], p = 0.002; ahead in 12 of 18 classes, 4 of "
        "them significantly after Holm's correction."
    )


def test_behind_in_one_sentence() -> None:
    classes = [(-0.1, 0.2), (-0.1, 1.0), (0.2, 0.04), (0.0, 1.0)]
    assert claim(-0.031, 0.0002, classes=classes, comparisons=2) == (
        f"{ON}A is behind B by 3.1 points [1.0, 5.0], p < 0.001 (Holm's correction over 2 "
        "comparisons); behind in 2 of 4 classes, none of them significantly after Holm's "
        "correction, and significantly ahead in 1."
    )


@pytest.mark.parametrize(
    ("q", "how"), [(0.2, "none of them significantly"), (0.04, "significantly in 0 and 1")]
)
def test_no_difference_shown_in_one_sentence(q: float, how: str) -> None:
    classes = [(0.1, 0.2), (1e-15, 1.0), (-0.1, q)]
    assert claim(0.004, 0.6, classes=classes) == (
        f"{ON}no difference between A and B is shown: +0.4 points [−1.5, 2.5], p = 0.60; ahead in "
        f"1 and behind in 1 of 3 classes, {how} after Holm's correction; one may be there all the "
        "same."
    )


def test_too_little_data_and_no_difference_at_all() -> None:
    assert claim(0.25, None) == (
        f"{ON}nothing can be said of A against B: they differ by +25.0 points, but so few images "
        "determine no interval."
    )
    assert claim(0.0, 1.0, method="identical") == f"{ON}A and B score alike on every pair."


def test_parts_and_stand_ins_are_called_so() -> None:
    part = claim(0.031, 0.002, title="PF-PASCAL", n_pairs=65, official_pairs=299, n_images=108)
    assert part.startswith("On PF-PASCAL test (65 of its 299 pairs, 108 images, canonical@1, ")
    fake = claim(0.031, 0.002, synthetic=True, official_pairs=None, n_pairs=480)
    assert fake.startswith("On SYNTHETIC stand-ins (rendered objects) for SPair-71k test (480 ")


def test_the_page_ends_with_the_conclusion_and_what_it_does_not_say(tmp_path: Path) -> None:
    one, two = (Predictions(p.table, p.meta | {"synthetic": True}) for p in random_runs(2))
    result = compared(tmp_path, one, two, code={"commit": "c" * 40, "dirty": True})
    text = result.markdown()
    (comparison,) = result.content["comparisons"]
    assert text.endswith(f"{comparison['conclusion']}\n\n{caveat(result.content)}\n")
    assert "not about the methods" in caveat(result.content)
    assert caveat(result.content).endswith("Synthetic stand-ins say nothing about photographs.")
    assert "SYNTHETIC" in text.splitlines()[0]
    assert f"over all {result.content['holm_tests']} tests of this page" in text
    assert "Compared by commit cccccccccccc with uncommitted changes." in text
    tables = [line for line in text.splitlines() if line.startswith("| PCK@0.05 |")]
    assert len(tables) == 1
    rows = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if "| all p" in line}
    assert rows == {10}


def test_the_page_shows_flags_intervals_and_missing_tests(tmp_path: Path) -> None:
    text = compared(tmp_path, *four_runs()).markdown()
    assert "| viewpoint 1 (medium) | 2 | 4 | 75.0 | 87.5 | −12.5 [" in text
    assert "| dog | 1 | 2 | 0.0 | 50.0 | −50.0 [no interval] | – | – | 0 / 0 / 1 |" in text


# -- figure ---------------------------------------------------------------------------------------


def test_curves_are_drawn_as_png_and_pdf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    content = compared(tmp_path, *random_runs(3)).content
    content["dataset"]["synthetic"] = True
    files = draw_curves(content, tmp_path / "one")
    assert [file.name for file in files] == ["curves.png", "curves.pdf"]
    assert PILImage.open(files[0]).size[0] >= 1400
    assert files[1].read_bytes().startswith(b"%PDF")
    left, right = figures[0].axes
    labels = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in (left, right)]
    assert labels == [["A: run0", "B: run1", "C: run2"], ["A − B", "A − C"]]
    drawn = left.get_lines()[0]
    assert drawn.get_ydata() == pytest.approx(100 * np.array(content["runs"][0]["curve"]["mean"]))
    assert len({line.get_color() for line in left.get_lines()[:3]}) == 3
    assert len({line.get_linestyle() for line in left.get_lines()[:3]}) == 3  # for grey print
    assert figures[0].get_suptitle().startswith("SYNTHETIC")
    again = draw_curves(content, tmp_path / "two")
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again]


def test_bands_that_do_not_exist_are_left_out(tmp_path: Path) -> None:
    content = compared(tmp_path, *four_runs()).content
    content["runs"][0]["curve"]["low"][3] = None
    assert draw_curves(content, tmp_path / "out")


# -- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def nemf(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.delenv("NEMF_DATA", raising=False)

    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(main_group, [str(a) for a in arguments])

    return run


def test_the_command_line_compares_stored_predictions(
    nemf: Callable[..., Result], tiny_spair: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny_spair()
    out = tmp_path / "out"
    store(out, on_dataset(data, 0, "HPF, ResNet-18 (4,6)"))
    file = store(out, on_dataset(data, 30, "mine"))
    # a config's name, and a file
    done = nemf("compare", "hpf_resnet18", file, "--out", out, "--data", data)
    assert done.exit_code == 0, done.output
    (folder,) = (out / "compare").iterdir()
    assert folder.name.startswith("spair-test_canonical-1_HPF-ResNet-18-4-6")
    names = {p.name for p in folder.iterdir()}
    files = {"comparison.md", "comparison.json", "per_pair.csv", "curves.png", "curves.pdf"}
    assert names == files | {"pictures"}
    assert (folder / "comparison.md").read_text() in done.output
    assert done.output.splitlines()[-1] == str(folder / "pictures")
    done = nemf(
        *("compare", "mine", "HPF, ResNet-18 (4,6)", "--out", out, "--json"),
        *("--alphas", "0.2,0.3", "--alpha", "0.25", "--by", "point", "--dataset", "spair"),
    )
    content = json.loads(done.stdout)
    assert (content["alphas"], content["alpha"], content["by"]) == ([0.2, 0.25, 0.3], 0.25, "point")
    assert [run["label"] for run in content["runs"]] == ["mine", "HPF, ResNet-18 (4,6)"]
    (stored,) = (f for f in (out / "compare").iterdir() if "-per-point_mine" in f.name)
    assert json.loads((stored / "comparison.json").read_text()) == content
    table = pd.read_csv(stored / "per_pair.csv")
    assert len(table) == 2
    assert table["a_pck-0.25"].tolist() == [0, 0]


def test_the_command_line_refuses_in_one_line(nemf: Callable[..., Result], tmp_path: Path) -> None:
    for arguments in ([], ["copy"], ["copy", "hpf"]):
        done = nemf("compare", *arguments, "--out", tmp_path)
        assert isinstance(done.exception, NemfError)
        assert "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_comparing_loads_neither_torch_nor_matplotlib() -> None:
    code = "import reports.comparison, sys; print({'torch', 'mlflow', 'mmengine'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True
    )
    assert done.stdout.strip() == "set()"
