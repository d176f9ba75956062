"""Scores of prediction files: by hand, against a slow oracle, and as records on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemf.errors import NemfError
from nemf.pairs import FLAGS, ImageRecord, Pair, Plan
from nemf.predictions import FORMAT, Predictions, prediction_table
from nemf.scoring import PROTOCOLS, get_protocol
from reports.records import (
    alpha_name,
    current_predictions,
    current_records,
    groups,
    keypoint_errors,
    make_record,
    metrics,
    read_record,
    score_pairs,
    write_record,
)

NAN = float("nan")
CANONICAL = get_protocol("canonical@1")
LAYOUTS = ("spair", "pfpascal", "pfwillow")


def image(name: str, size: tuple[int, int]) -> ImageRecord:
    return ImageRecord(Path(name), name, f"hash-{name}", size, np.zeros((0, 2), np.float32), ())


def make_predictions(
    pairs: Sequence[Pair], answers: Sequence[Any], layout: str = "spair", plan: Plan | None = None
) -> Predictions:
    """``answers``: one (N, 2) per pair, px of the reference image."""
    plan = plan or Plan("src2trg")
    rows = [
        (number, pair.oriented(plan), np.asarray(xy, np.float32), None)
        for number, (pair, xy) in enumerate(zip(pairs, answers, strict=True))
    ]
    meta = {
        "format": FORMAT, "dataset": layout, "title": layout, "split": "test", "layout": layout,
        "fingerprint": "f" * 64, "synthetic": False, "n_pairs": len(pairs),
        "official_pairs": None, "plan": str(plan.for_layout(layout)), "key": "0" * 24,
        "matcher": {"name": "hand", "label": "hand"}, "code": None,
    }  # fmt: skip
    return Predictions(prediction_table(rows), meta)


def pair_of(
    name: str,
    category: str,
    src: ImageRecord,
    trg: ImageRecord,
    trg_kps: Any,
    *,
    src_kps: Any = None,
    boxes: tuple[Any, Any] = (None, None),
    flags: dict[str, int] | None = None,
) -> Pair:
    trg_kps = np.asarray(trg_kps, np.float32)
    src_kps = np.zeros_like(trg_kps) if src_kps is None else np.asarray(src_kps, np.float32)
    names = tuple(str(k) for k in range(len(trg_kps)))
    src_box, trg_box = (None if b is None else np.asarray(b, np.float32) for b in boxes)
    return Pair(
        name, category, src, trg, src_kps, trg_kps, names, src_box, trg_box, dict(flags or {})
    )


def three_pairs() -> Predictions:
    """Distances 0, 5, 10, 20 (box 100 px); 5 and no answer (box 40 px); 12 (box 200 px)."""
    a, b, c, d, e = (image(name, (300, 300)) for name in "abcde")
    truth = np.float32([[10, 10], [20, 20], [30, 30], [40, 40]])
    pairs = [
        pair_of("one", "cat", a, b, truth, boxes=([0, 0, 9, 9], [0, 0, 50, 100]),
                flags={"viewpoint": 0, "scale": 2, "truncation": 1, "occlusion": 0}),
        pair_of("two", "cat", a, c, truth[:2], boxes=([0, 0, 9, 9], [7, 5, 47, 6]),
                flags={"viewpoint": 1, "scale": 2, "truncation": 1, "occlusion": 0}),
        pair_of("three", "dog", d, e, truth[:1], boxes=([0, 0, 9, 9], [0, 0, 200, 100])),
    ]  # fmt: skip
    answers = [
        truth + np.float32([[0, 0], [5, 0], [0, -10], [12, 16]]),
        [[10 + 3, 10 + 4], [NAN, NAN]],
        [[10, 10 + 12]],
    ]
    return make_predictions(pairs, answers)


# -- by hand --------------------------------------------------------------------------------------

ALPHAS = (0.05, 0.1, 0.2)
BY_HAND = {
    ("all", "all", "image"): ((1 / 2 + 0 + 0) / 3, (3 / 4 + 0 + 1) / 3, (1 + 1 / 2 + 1) / 3),
    ("all", "all", "point"): (2 / 7, 4 / 7, 6 / 7),
    ("class", "cat", "image"): (1 / 4, 3 / 8, 3 / 4),
    ("class", "cat", "point"): (2 / 6, 3 / 6, 5 / 6),
    ("class", "dog", "image"): (0, 1, 1),
    ("class", "dog", "point"): (0, 1, 1),
    ("viewpoint", "0", "image"): (1 / 2, 3 / 4, 1),
    ("viewpoint", "0", "point"): (1 / 2, 3 / 4, 1),
    ("viewpoint", "1", "image"): (0, 0, 1 / 2),
    ("viewpoint", "1", "point"): (0, 0, 1 / 2),
    ("scale", "2", "image"): (1 / 4, 3 / 8, 3 / 4),
    ("scale", "2", "point"): (2 / 6, 3 / 6, 5 / 6),
    ("truncation", "1", "image"): (1 / 4, 3 / 8, 3 / 4),
    ("truncation", "1", "point"): (2 / 6, 3 / 6, 5 / 6),
    ("occlusion", "0", "image"): (1 / 4, 3 / 8, 3 / 4),
    ("occlusion", "0", "point"): (2 / 6, 3 / 6, 5 / 6),
}


def test_three_pairs_by_hand() -> None:
    scores = score_pairs(three_pairs(), CANONICAL, ALPHAS)
    found: dict[tuple, dict[float, float]] = {}
    for entry in metrics(scores):
        key = (entry["group"], entry["value"], entry["averaging"])
        found.setdefault(key, {})[entry["alpha"]] = entry["pck"]
    assert found.keys() == BY_HAND.keys()
    for key, expected in BY_HAND.items():
        assert [found[key][alpha] for alpha in ALPHAS] == pytest.approx(expected), key


def test_errors_and_thresholds_by_hand() -> None:
    error, length = keypoint_errors(three_pairs(), CANONICAL)
    assert error.tolist() == [0, 5, 10, 20, 5, math.inf, 12]
    assert length.tolist() == [100, 100, 100, 100, 40, 40, 200]
    assert error.dtype == length.dtype == np.float32


def test_counts_of_pairs_images_and_keypoints() -> None:
    scores = score_pairs(three_pairs(), CANONICAL, ALPHAS)
    assert scores.frame["pair"].tolist() == ["one", "two", "three"]
    assert scores.frame["n"].tolist() == [4, 2, 1]
    assert scores.frame["n_none"].tolist() == [0, 1, 0]
    assert scores.frame["pck-0.10"].tolist() == [3, 0, 1]
    assert scores.frame["image_a"][0] == scores.frame["image_a"][1]
    record = make_record(scores, "abc", {"commit": None, "dirty": None})
    assert (record["n_pairs"], record["n_keypoints"], record["n_images"]) == (3, 7, 5)
    assert record["n_unanswered"] == 1
    cats = [m for m in record["metrics"] if m["value"] == "cat"]
    assert {(m["n_pairs"], m["n_keypoints"], m["n_images"]) for m in cats} == {(2, 6, 3)}


def test_groups_leave_out_what_is_not_annotated() -> None:
    scores = score_pairs(three_pairs(), CANONICAL, ALPHAS)
    masks = {(kind, value): rows.tolist() for kind, value, rows in groups(scores)}
    assert masks["viewpoint", "0"] == [True, False, False]
    assert ("viewpoint", "-1") not in masks
    assert masks["all", "all"] == [True] * 3


def test_one_image_on_both_sides_has_one_code() -> None:
    a, b, c = (image(name, (90, 90)) for name in "abc")
    points = [[1, 2], [30, 40]]
    pairs = [pair_of("p", "x", a, b, points), pair_of("q", "x", c, a, points)]
    frame = score_pairs(make_predictions(pairs, [points] * 2, "pfwillow"), CANONICAL).frame
    assert frame["image_a"][0] == frame["image_b"][1]
    assert len({*frame["image_a"], *frame["image_b"]}) == 3


def test_no_answer_is_wrong_at_any_alpha() -> None:
    scores = score_pairs(three_pairs(), CANONICAL, [1e6])
    assert scores.frame["pck-1000000.00"].tolist() == [4, 1, 1]


def test_half_an_answer_is_no_answer() -> None:
    a, b = image("a", (90, 90)), image("b", (90, 90))
    truth = [[10, 10], [50, 10]]
    half = make_predictions([pair_of("p", "x", a, b, truth)], [[[10, NAN], [50, 10]]], "pfwillow")
    assert score_pairs(half, CANONICAL, [5.0]).frame["n_none"].tolist() == [1]


@pytest.mark.parametrize(
    ("grid", "errors"),
    [
        # width 64, height 32: one cell spans everything, its centre is (31.5, 15.5)
        (1, [math.hypot(31.5, 15.5), math.hypot(31.5, 15.5), 0.5]),
        # centres at x 15.5 and 47.5, y 7.5 and 23.5; y = 15.5 lies between the rows, which counts
        # to the lower one
        (2, [math.hypot(15.5, 7.5), math.hypot(15.5, 7.5), math.hypot(15.5, 8.0)]),
        # cells of 1 px across and half a pixel down, whose rows meet at y = 0, 31 and 15.5
        (64, [0.25, 0.25, 0.25]),
    ],
)
def test_the_oracle_grid_by_hand(grid: int, errors: list[float]) -> None:
    a, b = image("a", (32, 64)), image("b", (32, 64))
    truth = [[0, 0], [63, 31], [32, 15.5]]
    box = [0, 0, 10, 10]
    pair = pair_of("p", "x", a, b, truth, boxes=(box, box))
    unanswered = make_predictions([pair], [np.full((3, 2), NAN)])
    error, length = keypoint_errors(unanswered, CANONICAL, oracle_grid=grid)
    assert error.tolist() == pytest.approx(errors)
    assert length.tolist() == [10, 10, 10]
    scores = score_pairs(unanswered, CANONICAL, oracle_grid=grid)
    assert scores.meta["matcher"]["label"] == f"oracle-grid {grid}x{grid} (ceiling)"
    assert unanswered.meta["matcher"]["label"] == "hand"
    assert scores.frame["n_none"].tolist() == [0]


def test_the_oracle_grid_uses_each_images_own_size() -> None:
    a, small, large = image("a", (9, 9)), image("small", (8, 8)), image("large", (80, 80))
    pairs = [
        pair_of("p", "x", a, small, [[0, 0], [7, 7]]),
        pair_of("q", "x", a, large, [[0, 0], [79, 79]]),
    ]
    made = make_predictions(pairs, [np.zeros((2, 2))] * 2, "pfwillow")
    error, _ = keypoint_errors(made, CANONICAL, oracle_grid=1)
    diagonal = math.sqrt(2)
    assert error.tolist() == pytest.approx([3.5 * diagonal] * 2 + [39.5 * diagonal] * 2)


# -- a slow oracle --------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Predictions, str]:
    protocol = draw(st.sampled_from(sorted(PROTOCOLS)))
    layout = draw(st.sampled_from(LAYOUTS))
    n_images = draw(st.integers(2, 4))
    sides = st.integers(20, 700)
    images = [image(str(k), (draw(sides), draw(sides))) for k in range(n_images)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pairs, answers = [], []
    plan = PROTOCOLS[protocol].plan
    for number in range(draw(st.integers(1, 5))):
        src, trg = rng.integers(0, n_images, 2)
        n = int(rng.integers(2, 6))
        sides_kps, boxes = [], []
        for k in (src, trg):
            height, width = images[k].size
            sides_kps.append(rng.uniform(0, 1, (n, 2)) * [width - 1, height - 1])
            low, high = np.sort(rng.uniform(0, 1, (2, 2)) * [width, height], 0)
            boxes.append([*low, *(high + 1)])
        flags = {flag: int(rng.integers(-1, 3)) for flag in FLAGS}
        category = "ab"[int(rng.integers(0, 2))]
        pair = pair_of(
            f"pair {number}", category, images[src], images[trg], sides_kps[1],
            src_kps=sides_kps[0], boxes=tuple(boxes) if layout == "spair" else (None, None),
            flags=flags if layout == "spair" else None,
        )  # fmt: skip
        xy = pair.oriented(plan).reference_kps + rng.normal(0, 20, (n, 2))
        xy[rng.uniform(size=n) < 0.2] = NAN
        pairs.append(pair)
        answers.append(xy)
    return make_predictions(pairs, answers, layout, plan), protocol


def slow_keypoints(predictions: Predictions, name: str) -> pd.DataFrame:
    """Error and threshold length of every keypoint, one row at a time, in float64; the rules are
    written out again from the papers, without the suite's own protocol objects."""
    table = predictions.table.to_pandas()
    layout = predictions.meta["layout"]

    def scaled(row: pd.Series, x: float, y: float) -> tuple[float, float]:
        height, width = float(row.reference_height), float(row.reference_width)
        if name in ("cats-paper@1", "ncnet-paper@1", "chm-paper@1"):
            side = {"cats": 256, "ncnet": 224, "chm": 240}[name.partition("-")[0]]
            return x * side / width, y * side / height
        if name.startswith("catspp-paper"):
            return x * 512 / width, y * 512 / height
        if name == "dhpf-paper@1":
            return x * 240 / width, y * 240 / height
        if name == "mmnet-paper@1":
            return x * 320 / width, y * 224 / height
        if name == "hpf-paper@1" and max(height, width) > 300:
            ratio = 300 / max(height, width)
            return x * ratio, y * ratio
        if name in ("scot-paper@1", "geoaware-paper@1"):
            ratio = (300 if name == "scot-paper@1" else 840) / max(height, width)
            return x * ratio, y * ratio
        return x, y

    rows = []
    for _, row in table.iterrows():
        mine = table[table.pair_number == row.pair_number]
        true = [scaled(r, r.true_x, r.true_y) for _, r in mine.iterrows()]
        if layout == "spair":
            x1, y1 = scaled(row, row.reference_bbox_x1, row.reference_bbox_y1)
            x2, y2 = scaled(row, row.reference_bbox_x2, row.reference_bbox_y2)
            length = max(x2 - x1, y2 - y1)
        elif layout == "pfpascal":
            length = max(scaled(row, float(row.reference_width), float(row.reference_height)))
        else:
            if name in ("cats-paper@1", "catspp-paper@1", "chm-paper@1", "dhpf-paper@1"):
                padding = -2.0 if name == "chm-paper@1" else -1.0
                true.append((padding, padding))
            xs, ys = zip(*true, strict=True)
            length = max(max(xs) - min(xs), max(ys) - min(ys))
        error = math.inf
        if not math.isnan(row.pred_x):
            error = math.dist(
                scaled(row, row.pred_x, row.pred_y), scaled(row, row.true_x, row.true_y)
            )
        rows.append({"pair": row.pair, "category": row.category, "error": error, "length": length}
                    | {flag: row[flag] for flag in FLAGS})  # fmt: skip
    return pd.DataFrame(rows)


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(0.02, 0.9))
def test_every_protocol_and_layout_against_a_slow_oracle(
    case: tuple[Predictions, str], alpha: float
) -> None:
    predictions, name = case
    slow = slow_keypoints(predictions, name)
    error, length = keypoint_errors(predictions, get_protocol(name))
    np.testing.assert_allclose(error, slow["error"], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(length, slow["length"], rtol=1e-5)
    answered = np.isfinite(slow["error"])
    margin = (slow["error"] - alpha * slow["length"])[answered].abs()
    assume(not (margin < 1e-2).any())  # such keypoints are float32's to decide
    slow["hit"] = slow["error"] <= alpha * slow["length"]

    for entry in metrics(score_pairs(predictions, get_protocol(name), [alpha])):
        column = {"all": None, "class": "category"}.get(entry["group"], entry["group"])
        rows = slow if column is None else slow[slow[column].astype(str) == entry["value"]]
        if entry["averaging"] == "point":
            expected = rows["hit"].mean()
        else:
            expected = rows.groupby("pair")["hit"].mean().mean()
        assert entry["pck"] == pytest.approx(expected)
        assert entry["n_pairs"] == rows["pair"].nunique()
        assert entry["n_keypoints"] == len(rows)


def test_the_oracle_can_tell_protocols_apart() -> None:
    """On one lopsided pair every protocol of a direction gives errors or thresholds of its own."""
    a, b = image("a", (700, 200)), image("b", (600, 300))
    points = [[20, 30], [150, 420]]
    pair = pair_of("p", "x", a, b, points, src_kps=points)
    seen = {}
    for name, protocol in PROTOCOLS.items():
        made = make_predictions([pair], [np.add(points, 3)], "pfwillow", protocol.plan)
        slow = slow_keypoints(made, name)
        seen[name] = tuple(np.round([*slow["error"], *slow["length"]], 3))
    assert seen["canonical@1"] == seen["nemf-paper@1"]
    assert seen["scot-paper@1"] == seen["hpf-paper@1"]  # but for images below 300 px
    assert len(set(seen.values())) == len(PROTOCOLS) - 2  # the two equalities above


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["nemf-paper@1", "cats-paper@1"])
def test_another_plan_is_refused(name: str, layout: str) -> None:
    made = three_pairs()
    made.meta["layout"] = layout
    with pytest.raises(NemfError) as refused:
        keypoint_errors(made, get_protocol(name))
    text = str(refused.value)
    assert f"predict with --protocol {name}" in text
    assert "made under src2trg-own" in text


def test_padding_is_a_plan_of_its_own_on_the_pf_layouts_only() -> None:
    a, b = image("a", (90, 90)), image("b", (90, 90))
    box = [0, 0, 10, 10]
    pair = pair_of("p", "x", a, b, [[1, 2], [30, 40]], boxes=(box, box))
    unpadded = Plan("trg2src")
    answers = [np.zeros((2, 2))]
    paper = get_protocol("nemf-paper@1")
    error, _ = keypoint_errors(make_predictions([pair], answers, "spair", unpadded), paper)
    assert len(error) == 2
    with pytest.raises(NemfError, match="plan trg2src-pair on pfwillow"):
        keypoint_errors(make_predictions([pair], answers, "pfwillow", unpadded), paper)


def test_missing_boxes_are_refused() -> None:
    a, b = image("a", (90, 90)), image("b", (90, 90))
    box = [0, 0, 10, 10]
    pairs = [
        pair_of("p", "x", a, b, [[1, 2]], boxes=(box, box)),
        pair_of("q", "x", a, b, [[1, 2]], boxes=(box, None)),
    ]
    with pytest.raises(NemfError, match="pair number 1 has no box"):
        score_pairs(make_predictions(pairs, [[[1, 2]]] * 2), CANONICAL)


def test_a_pair_without_extent_is_named() -> None:
    a, b = image("a", (90, 90)), image("b", (90, 90))
    pairs = [
        pair_of("fine", "x", a, b, [[1, 2], [30, 2]]),
        pair_of("single", "x", a, b, [[1, 2]]),
    ]
    made = make_predictions(pairs, [np.zeros((2, 2)), np.zeros((1, 2))], "pfwillow")
    with pytest.raises(NemfError, match="pair single has a kps_extent of 0 px"):
        score_pairs(made, CANONICAL)


@pytest.mark.parametrize("alphas", [[], [0.0], [-0.1], [NAN], [math.inf]])
def test_impossible_alphas_are_refused(alphas: list[float]) -> None:
    with pytest.raises(NemfError, match="alpha"):
        score_pairs(three_pairs(), CANONICAL, alphas)


# -- records --------------------------------------------------------------------------------------


def test_a_record_is_plain_json_and_comes_back(tmp_path: Path) -> None:
    record = make_record(score_pairs(three_pairs(), CANONICAL), "abc", {"commit": "c" * 40})
    undefined = [m for m in record["metrics"] if m["low"] is None or m["se"] is None]
    assert undefined  # groups of one pair have no standard error; JSON has no NaN
    write_record(tmp_path / "r.json", record)
    text = (tmp_path / "r.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in a record")

    json.loads(text, parse_constant=refuse)
    back = read_record(tmp_path / "r.json")
    assert back == json.loads(json.dumps(record))
    assert back["protocol"]["id"] == "canonical@1"
    assert back["protocol"]["description"] == CANONICAL.describe("spair")
    assert back["predictions_sha256"] == "abc"
    assert back["scored_by"] == {"commit": "c" * 40}
    assert back["alphas"] == list(CANONICAL.alphas)


def test_intervals_hold_their_means() -> None:
    for entry in metrics(score_pairs(three_pairs(), CANONICAL)):
        if entry["low"] is not None:
            assert 0 <= entry["low"] <= entry["pck"] <= entry["high"] <= 1


def test_nan_never_reaches_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_record(tmp_path / "r.json", {"pck": NAN})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read as a score record"),
        ("{", "cannot be read as a score record"),
        ("[]", "not a score record of format"),
        ('{"format": 99}', "not a score record of format"),
    ],
)
def test_what_is_no_record_is_refused(content: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NemfError) as refused:
        read_record(path)
    assert str(refused.value).startswith(f"{path}: {reason}")


def test_names_of_alphas_sort_like_alphas() -> None:
    alphas = [0.005, 0.01, 0.03, 0.05, 0.07, 0.1, 0.125, 0.15, 0.2, 0.5, 1.0]
    names = [alpha_name(alpha) for alpha in alphas]
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert alpha_name(0.1) == "pck-0.10"
    assert alpha_name(0.125) == "pck-0.125"
    assert alpha_name(np.float64(0.05)) == "pck-0.05"


def test_only_complete_current_cells_count(tmp_path: Path) -> None:
    store = tmp_path / "predictions"

    def cell(matcher: str, key: str, *, complete: bool = True, scored: bool = False) -> Path:
        folder = store / matcher / "pfwillow-test" / "src2trg-own" / key
        (folder / "chunks").mkdir(parents=True)
        if complete:
            three_pairs().write(folder / "predictions.parquet")
        if scored:
            digest = hashlib.sha256((folder / "predictions.parquet").read_bytes()).hexdigest()
            record = make_record(score_pairs(three_pairs(), CANONICAL), digest, {"key": key})
            write_record(folder / "scores" / "canonical@1.json", record)
        return folder

    def current(matcher: str, key: str) -> None:
        (store / matcher / "pfwillow-test" / "src2trg-own" / "current").write_text(f"{key}\n")

    cell("b", "old", scored=True)
    new = cell("b", "new", scored=True)
    current("b", "new")
    cell("c", "half", complete=False)
    current("c", "half")
    cell("d", "unmarked")
    unscored = cell("a", "first")
    current("a", "first")
    assert current_predictions(tmp_path) == [
        unscored / "predictions.parquet",
        new / "predictions.parquet",
    ]
    ((path, record),) = current_records(tmp_path)
    assert path == new / "scores" / "canonical@1.json"
    assert record["scored_by"]["key"] == "new"
    assert current_predictions(tmp_path / "nowhere") == []
    write_record(path, record | {"predictions_sha256": "0" * 64})
    with pytest.raises(NemfError, match=r"canonical@1\.json: scores other predictions"):
        current_records(tmp_path)
