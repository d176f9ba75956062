"""PCK, its thresholds and the protocols: cases by hand, and a naive oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nemf
from nemf.errors import NemfError
from nemf.scoring import (
    PROTOCOLS,
    Frame,
    check_alphas,
    correct,
    errors_px,
    get_protocol,
    lengths_px,
    pck,
)

NAN, INF = float("nan"), float("inf")


# -- pck by hand ----------------------------------------------------------------------------------


def test_one_pair() -> None:
    """Threshold 10 px at alpha 0.1 is 1 px: 0.5 and 1 are right, 1.5 and 40 wrong."""
    error, threshold = np.array([0.5, 1.0, 1.5, 40.0]), np.full(4, 10.0)
    assert pck(error, threshold, 0.1) == 0.5
    assert pck(error, threshold, 0.1, by="point") == 0.5
    assert pck(error, threshold, 0.1, inclusive=False) == 0.25
    assert pck(error, threshold, 0.15) == 0.75
    assert pck(error, threshold, 4.0) == 1.0


def test_averaging_differs_between_images_and_points() -> None:
    """Pair 1: 1 of 1 right; pair 2: 1 of 3 right. Per image (1 + 1/3) / 2, per point 2/4."""
    error = np.array([[0.0, 7.0, 7.0], [0.0, 9.0, 9.0]])
    threshold = np.array([[10.0, NAN, NAN], [10.0, 10.0, 10.0]])
    assert pck(error, threshold, 0.1, by="image") == pytest.approx(2 / 3)
    assert pck(error, threshold, 0.1, by="point") == 0.5


def test_nan_threshold_means_no_keypoint_whatever_the_error() -> None:
    for padding in (0.0, NAN, INF, -1.0):
        error, threshold = np.array([1.0, padding]), np.array([10.0, NAN])
        assert pck(error, threshold, 0.1) == 1.0


def test_infinite_error_is_wrong_at_any_alpha() -> None:
    assert pck(np.array([INF, 0.0]), np.array([10.0, 10.0]), 1e6) == 0.5


def test_thresholds_may_differ_within_a_pair() -> None:
    assert pck(np.array([2.0, 2.0]), np.array([10.0, 20.0]), 0.1) == 0.5


def test_compared_in_float32() -> None:
    """An error that exceeds the limit in float64 only is on the limit, as in the official codes."""
    limit = np.float32(0.1) * np.float32(3)
    error = np.array([float(limit) + 1e-9])
    assert error[0] > 0.1 * 3
    assert correct(error, np.array([3.0]), 0.1)[0]
    assert not correct(error, np.array([3.0]), 0.1, inclusive=False)[0]


def test_it_is_the_package_function() -> None:
    assert nemf.pck is pck
    assert pck.__doc__


@pytest.mark.parametrize(
    ("error", "threshold", "alpha", "by", "message"),
    [
        ([1.0], [1.0, 2.0], 0.1, "image", "must have one shape"),
        ([[[1.0]]], [[[1.0]]], 0.1, "image", "must have one shape"),
        ([NAN], [1.0], 0.1, "image", "error_px is NaN at valid keypoint 0"),
        ([-1.0], [1.0], 0.1, "image", "error_px is negative: -1.0"),
        ([1.0], [INF], 0.1, "image", "positive and finite, not inf"),
        ([1.0], [0.0], 0.1, "image", "positive and finite, not 0.0"),
        ([1.0], [-3.0], 0.1, "image", "positive and finite, not -3.0"),
        ([1.0], [1.0], 0.0, "image", "alpha must be a positive number, not 0.0"),
        ([1.0], [1.0], -0.1, "image", "alpha must be a positive number"),
        ([1.0], [1.0], NAN, "image", "alpha must be a positive number"),
        ([1.0], [1.0], INF, "image", "alpha must be a positive number"),
        ([1.0], [1.0], "x", "image", "alphas must be numbers"),
        ([1.0], [1.0], 0.1, "class", "by must be 'image' or 'point', not 'class'"),
        ([1.0], [NAN], 0.1, "image", "pair 0 has no keypoint"),
        ([[1.0], [1.0]], [[1.0], [NAN]], 0.1, "point", "pair 1 has no keypoint"),
        ([], [], 0.1, "image", "pair 0 has no keypoint"),
    ],
)
def test_bad_input_never_gives_a_number(error, threshold, alpha, by, message) -> None:
    with pytest.raises(NemfError, match=message):
        pck(np.array(error), np.array(threshold), alpha, by=by)


def test_no_pairs_at_all() -> None:
    with pytest.raises(NemfError, match="no keypoint"):
        pck(np.zeros((0, 3)), np.zeros((0, 3)), 0.1)


def test_alphas() -> None:
    assert check_alphas((0.1, 1)) == (0.1, 1.0)
    for bad in ([], [0], ["x"], [NAN], None):
        with pytest.raises(NemfError, match="alpha"):
            check_alphas(bad)


# -- errors and lengths by hand -------------------------------------------------------------------

# One pair per reference image: A is 100 high and 200 wide, B 400 high and 50 wide.
HEIGHTS, WIDTHS = np.array([100, 100, 400]), np.array([200, 200, 50])
PAIR = np.array([0, 0, 7])
TRUE = np.float32([[20, 10], [120, 30], [10, 200]])
BBOX = np.float32([[10, 10, 110, 90], [10, 10, 110, 90], [5, 40, 45, 340]])
FRAMES = {
    "original": (Frame("original"), [[1, 1], [1, 1], [1, 1]]),
    "squash": (Frame("squash", 100), [[0.5, 1], [0.5, 1], [2, 0.25]]),
    "oblong": (Frame("squash", 100, 50), [[0.5, 0.5], [0.5, 0.5], [2, 0.125]]),
    "fit": (Frame("fit", 200), [[1, 1], [1, 1], [0.5, 0.5]]),  # A fits as it is
    "scale": (Frame("scale", 300), [[1.5, 1.5], [1.5, 1.5], [0.75, 0.75]]),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frame_factors(name: str) -> None:
    frame, expected = FRAMES[name]
    factors = frame.factors(HEIGHTS, WIDTHS)
    assert factors.dtype == np.float32
    assert np.array_equal(factors, np.float32(expected))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # prediction minus truth: (6, 8), (30, 40), (-3, 4)
        ("original", [10, 50, 5]),
        ("squash", [math.hypot(3, 8), math.hypot(15, 40), math.hypot(6, 1)]),
        ("fit", [10, 50, 2.5]),
        ("scale", [15, 75, 3.75]),
    ],
)
def test_errors_in_every_frame(name: str, expected: list[float]) -> None:
    pred = TRUE + np.float32([[6, 8], [30, 40], [-3, 4]])
    error = errors_px(pred, TRUE, FRAMES[name][0].factors(HEIGHTS, WIDTHS))
    assert error.dtype == np.float32
    np.testing.assert_allclose(error, expected, rtol=1e-6)


def test_no_answer_is_infinitely_wrong() -> None:
    pred = np.float32([[NAN, NAN], [1, NAN], [10, 200]])
    error = errors_px(pred, TRUE, np.ones((3, 2), np.float32))
    assert error.tolist() == [INF, INF, 0]


@pytest.mark.parametrize(
    ("base", "name", "expected"),
    [
        # boxes: A 100 wide and 80 high, B 40 wide and 300 high
        ("bbox", "original", [100, 100, 300]),
        ("bbox", "squash", [80, 80, 80]),  # A: 50 x 80, B: 80 x 75
        ("bbox", "fit", [100, 100, 150]),
        ("image", "original", [200, 200, 400]),
        ("image", "squash", [100, 100, 100]),
        ("bbox", "oblong", [50, 50, 80]),  # A: 50 x 40, B: 80 x 37.5
        ("image", "oblong", [100, 100, 100]),
        ("image", "fit", [200, 200, 200]),
        ("bbox", "scale", [150, 150, 225]),
        ("image", "scale", [300, 300, 300]),
        ("kps_extent", "scale", [150, 150, 0]),
        # keypoints: A spans 100 x 20, B is one point
        ("kps_extent", "original", [100, 100, 0]),
        ("kps_extent", "squash", [50, 50, 0]),
        ("kps_extent", "fit", [100, 100, 0]),
        # with (-1, -1) among them: A from -1 to 120, B from -1 to 200
        ("kps_extent_padded", "original", [121, 121, 201]),
        ("kps_extent_padded", "squash", [61, 61, 51]),
        ("kps_extent_padded", "fit", [121, 121, 101]),
        ("kps_extent_padded_2", "original", [122, 122, 202]),
        ("kps_extent_padded_2", "squash", [62, 62, 52]),
    ],
)
def test_lengths_in_every_base_and_frame(base: str, name: str, expected: list[float]) -> None:
    lengths = lengths_px(
        base,
        factors=FRAMES[name][0].factors(HEIGHTS, WIDTHS),
        heights=HEIGHTS,
        widths=WIDTHS,
        bbox=BBOX,
        true=TRUE,
        pair=PAIR,
    )
    assert lengths.dtype == np.float32
    assert lengths.tolist() == expected


def test_padding_only_matters_right_of_minus_one() -> None:
    """Points left of -1 keep their own minimum; all-negative ones are bounded by -1 above."""
    true = np.float32([[-5, -9], [-3, -2]])
    ones = np.ones((2, 2), np.float32)
    size = np.array([10, 10])
    lengths = lengths_px(
        "kps_extent_padded",
        factors=ones,
        heights=size,
        widths=size,
        bbox=np.full((2, 4), NAN),
        true=true,
        pair=np.array([0, 0]),
    )
    assert lengths.tolist() == [8, 8]  # y from -9 to -1


def test_a_missing_box_is_named() -> None:
    bbox = BBOX.copy()
    bbox[2] = NAN
    ones = np.ones((3, 2), np.float32)
    with pytest.raises(NemfError, match="pair number 7 has no box, which this protocol needs"):
        lengths_px(
            "bbox", factors=ones, heights=HEIGHTS, widths=WIDTHS, bbox=bbox, true=TRUE, pair=PAIR
        )


# -- a naive oracle -------------------------------------------------------------------------------


def naive_pck(pairs: list[list[tuple[float, float]]], alpha: float, by: str, strict: bool) -> float:
    """Loops over (error, threshold) per pair, one float32 comparison at a time."""
    fractions, right, total = [], 0, 0
    for keypoints in pairs:
        hits = 0
        for error, threshold in keypoints:
            limit = np.float32(alpha) * np.float32(threshold)
            hits += bool(np.float32(error) < limit or (not strict and np.float32(error) == limit))
        fractions.append(hits / len(keypoints))
        right, total = right + hits, total + len(keypoints)
    return sum(fractions) / len(fractions) if by == "image" else right / total


finite_errors = st.one_of(st.floats(0, 100, width=32), st.integers(0, 20).map(float), st.just(INF))
keypoints = st.tuples(finite_errors, st.one_of(st.floats(1, 300, width=32), st.integers(1, 9)))
cases = st.lists(st.lists(keypoints, min_size=1, max_size=6), min_size=1, max_size=5)


@given(cases, st.sampled_from([0.01, 0.05, 0.1, 0.15, 0.5, 1.0]), st.booleans())
def test_against_the_oracle(cases: list, alpha: float, strict: bool) -> None:
    width = max(len(pair) for pair in cases)
    error = np.full((len(cases), width), NAN)
    threshold = np.full((len(cases), width), NAN)
    for i, pair in enumerate(cases):
        for k, (e, t) in enumerate(pair):
            error[i, k], threshold[i, k] = e, t
    for by in ("image", "point"):
        ours = pck(error, threshold, alpha, by=by, inclusive=not strict)
        assert 0 <= ours <= 1
        assert ours == pytest.approx(naive_pck(cases, alpha, by, strict), abs=1e-12)


sides = st.integers(2, 500)
rows = st.lists(
    st.tuples(
        st.integers(0, 2),
        sides,
        sides,
        st.floats(-50, 600, width=32),
        st.floats(-50, 600, width=32),
    ),
    min_size=1,
    max_size=12,
)


@given(rows, st.sampled_from([f for f, _ in FRAMES.values()]))
def test_keypoint_extent_against_a_loop(rows: list, frame: Frame) -> None:
    rows = sorted(rows, key=lambda row: row[0])
    first_of_pair = {row[0]: row for row in reversed(rows)}  # one size per pair
    pair = np.array([row[0] for row in rows])
    heights = np.array([first_of_pair[p][1] for p in pair])
    widths = np.array([first_of_pair[p][2] for p in pair])
    true = np.float32([row[3:] for row in rows])
    factors = frame.factors(heights, widths)
    expected, padded = [], []
    for p in pair:
        xs = [x * f for x, f, q in zip(true[:, 0], factors[:, 0], pair, strict=True) if q == p]
        ys = [y * f for y, f, q in zip(true[:, 1], factors[:, 1], pair, strict=True) if q == p]
        expected.append(max(max(xs) - min(xs), max(ys) - min(ys)))
        xs, ys = [*xs, np.float32(-1)], [*ys, np.float32(-1)]
        padded.append(max(max(xs) - min(xs), max(ys) - min(ys)))
    common = {"factors": factors, "heights": heights, "widths": widths, "true": true, "pair": pair}
    bbox = np.full((len(rows), 4), NAN)
    assert lengths_px("kps_extent", bbox=bbox, **common).tolist() == np.float32(expected).tolist()
    ours = lengths_px("kps_extent_padded", bbox=bbox, **common)
    assert ours.tolist() == np.float32(padded).tolist()


# -- protocols ------------------------------------------------------------------------------------


def test_protocols_of_the_design() -> None:
    assert {"canonical@1", "nemf-paper@1", "cats-paper@1", "hpf-paper@1"} <= set(PROTOCOLS)
    assert nemf.available_protocols() == PROTOCOLS
    canonical = get_protocol("canonical")
    assert canonical is get_protocol("canonical@1")
    assert canonical.inclusive
    assert (canonical.averaging, canonical.threshold_side) == ("image", "trg")
    assert canonical.bases == {"spair": "bbox", "pfpascal": "image", "pfwillow": "kps_extent"}
    paper = get_protocol("nemf-paper@1")
    assert (paper.plan.direction, paper.plan.canvas, paper.threshold_side) == (
        *("trg2src", "pair"),
        "src",
    )
    assert paper.plan.for_layout("spair").canvas == "own"
    assert get_protocol("cats-paper").bases["pfwillow"] == "kps_extent_padded"
    assert get_protocol("cats-paper").frame == Frame("squash", 256)
    catspp, catspp_kp = get_protocol("catspp-paper"), get_protocol("catspp-paper-kp")
    assert catspp.plan == catspp_kp.plan == get_protocol("cats-paper").plan
    assert catspp.frame == catspp_kp.frame == Frame("squash", 512)
    assert catspp.bases == get_protocol("cats-paper").bases
    assert catspp_kp.bases == canonical.bases
    assert get_protocol("hpf-paper").frame == Frame("fit", 300)
    assert get_protocol("scot-paper").frame == Frame("scale", 300)
    assert get_protocol("scot-paper").inclusive
    assert get_protocol("geoaware-paper").frame == Frame("scale", 840)
    assert not get_protocol("geoaware-paper").inclusive
    ncnet, chm = get_protocol("ncnet-paper"), get_protocol("chm-paper")
    assert (ncnet.plan.direction, ncnet.threshold_side) == ("trg2src", "src")
    assert (chm.plan.direction, chm.threshold_side) == ("src2trg", "trg")
    assert (ncnet.frame, chm.frame) == (Frame("squash", 224), Frame("squash", 240))
    assert chm.bases["pfwillow"] == "kps_extent_padded_2"
    assert ncnet.inclusive
    assert chm.inclusive
    dhpf, mmnet = get_protocol("dhpf-paper"), get_protocol("mmnet-paper")
    assert (dhpf.plan, mmnet.plan) == (chm.plan, chm.plan)
    assert (dhpf.frame, mmnet.frame) == (Frame("squash", 240), Frame("squash", 320, 224))
    assert dhpf.bases == chm.bases | {"pfwillow": "kps_extent_padded"}
    assert mmnet.bases == canonical.bases
    assert dhpf.inclusive
    assert mmnet.inclusive


def test_frames_in_words() -> None:
    words = {name: str(frame) for name, (frame, _) in FRAMES.items()}
    assert words == {
        "original": "original pixels",
        "squash": "squashed to 100x100",
        "oblong": "squashed to 100 wide, 50 high",
        "fit": "longer side <= 200",
        "scale": "longer side 300",
    }


def test_unknown_protocol_lists_the_known() -> None:
    with pytest.raises(NemfError, match=r"unknown protocol 'pck@0\.1': choose one of canonical@1"):
        get_protocol("pck@0.1")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_descriptions_say_what_matters(name: str) -> None:
    protocol = PROTOCOLS[name]
    for layout in ("spair", "pfpascal", "pfwillow"):
        text = protocol.describe(layout)
        assert text.startswith(f"{name}: {protocol.plan.direction.replace('2', '→')}")
        assert protocol.bases[layout].replace("_", " ") in text
        assert protocol.threshold_side in text
        assert "\n" not in text
        assert ("padded to" in text) == (name == "nemf-paper@1" and layout != "spair")


def test_no_answer_is_wrong_at_any_alpha() -> None:
    assert pck(np.array([np.inf, 1.0]), np.array([10.0, 10.0]), 1e39) == 0.5
