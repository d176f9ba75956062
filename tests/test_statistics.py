"""Intervals and tests over image pairs: hand-computed cases, a brute-force oracle, coverage."""

import math
import time
import tracemalloc
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from nemf.errors import NemfError
from reports.statistics import dyadic_mean, holm, image_bootstrap, paired_difference

T1 = 12.706204736  # t quantile 0.975 with one degree of freedom


def complete(n_images, ordered=False):
    pairs = np.array(list((permutations if ordered else combinations)(range(n_images), 2)))
    return pairs[:, 0], pairs[:, 1]


def disjoint(n_pairs):
    return np.arange(n_pairs), np.arange(n_pairs, 2 * n_pairs)


def brute_force(values, image_a, image_b, weights):
    """(mean, se, df) by O(P^2) matrices and the definitions; se None where E[V] vanishes."""
    v = np.array(values, dtype=float)
    n = len(v)
    p = np.array(weights, dtype=float) / np.sum(weights)
    sets = [{a, b} for a, b in zip(image_a, image_b, strict=True)]
    images = sorted(set().union(*sets))
    z = np.array([[float(g in s) for g in images] for s in sets])
    share = np.array([[float(bool(s & t)) for t in sets] for s in sets])
    same_two = np.array([[float(s == t) for t in sets] for s in sets])
    mean = (p * v).sum()
    projection = np.diag(p) - np.outer(p, p)
    kernel = z.T @ projection @ share @ projection @ z
    model_variance = p @ z @ z.T @ p
    expected = np.trace(kernel)
    df = expected**2 / np.trace(kernel @ kernel) if expected > 1e-5 * model_variance else 0
    if df < 0.999:  # fewer than two independent groups of pairs
        return mean, None, None
    e = p * (v - mean)
    dyadic = sum(share[i, j] * e[i] * e[j] for i in range(n) for j in range(n))
    groups = (e @ same_two @ e) / (1 - p @ same_two @ p)
    rows = (e @ e) / (1 - p @ p)
    variance = max(dyadic * model_variance / expected, groups, rows)
    return mean, math.sqrt(variance), df


@st.composite
def samples(draw, min_pairs=1):
    n = draw(st.integers(min_pairs, 14))
    images = st.lists(st.integers(0, draw(st.integers(1, 9))), min_size=n, max_size=n)
    values = st.lists(st.integers(0, 5).map(lambda k: k / 5), min_size=n, max_size=n)
    weights = st.lists(st.integers(1, 9), min_size=n, max_size=n)
    return draw(values), draw(images), draw(images), draw(weights)


def fields(estimate):
    return [estimate.mean, estimate.low, estimate.high, estimate.se, estimate.df]


def close(one, other, tolerance=1e-8):
    np.testing.assert_allclose(fields(one), fields(other), rtol=tolerance, atol=tolerance)
    assert (one.method, one.n_pairs, one.n_images) == (other.method, other.n_pairs, other.n_images)


# --- dyadic_mean by hand


def test_two_disjoint_pairs():
    # e = -/+ 1/4, V = 1/8, c = 1 / (1 + 1/2 - 1) = 2, se = 1/2, one degree of freedom
    estimate = dyadic_mean([0, 1], *disjoint(2))
    assert estimate.mean == 0.5
    assert estimate.se == pytest.approx(0.5)
    assert estimate.df == pytest.approx(1)
    assert estimate.low == pytest.approx(0.5 - T1 / 2)
    assert estimate.high == pytest.approx(0.5 + T1 / 2)
    assert (estimate.n_pairs, estimate.n_images, estimate.level) == (2, 4, 0.95)
    assert estimate.method == "dyadic t"


def test_three_weighted_disjoint_pairs():
    # p = (1/4, 1/4, 1/2), m = 3/4, e = (1, -3, 2)/16, V = 14/256
    # c = 1 / (1 + sum p^2 - 2 sum p^3 / sum p^2) = 1 / (1 + 3/8 - 5/6) = 24/13
    estimate = dyadic_mean([1, 0, 1], *disjoint(3), weights=[1, 1, 2])
    assert estimate.mean == 0.75
    assert estimate.se == pytest.approx(math.sqrt(14 / 256 * 24 / 13))


def test_chain_of_four_pairs_has_a_negative_variance_and_takes_the_floor():
    # e = (1, -1, 1, -1)/8; V = (4 - 6)/64 < 0; floor (4/64) / (1 - 1/4) = 1/12
    estimate = dyadic_mean([1, 0, 1, 0], list("abcd"), list("bcde"))
    assert estimate.se == pytest.approx(math.sqrt(1 / 12))


def test_four_images_all_pairs():
    # additive effects (1, -1, 0, 0): S = 2 (1, -1, 0, 0) / 6, sum S^2 = 8/36, sum T^2 = 4/36,
    # V = 1/9, c = 4 * 3 / (2 * 1) = 6
    effects = np.array([1, -1, 0, 0])
    a, b = complete(4)
    estimate = dyadic_mean(effects[a] + effects[b], a, b)
    assert estimate.se == pytest.approx(math.sqrt(6 / 9))
    assert estimate.df == pytest.approx(3)


def test_two_directions_of_a_pair_are_one_observation():
    # pairs (a, b), (b, a), (c, d): T = (2/9, -2/9), V = 8/81, c = 1 / (1 + 5/9 - 2 (9/27) / (5/9))
    estimate = dyadic_mean([1, 1, 0], ["a", "b", "c"], ["b", "a", "d"])
    assert estimate.mean == pytest.approx(2 / 3)
    assert estimate.se == pytest.approx(math.sqrt(8 / 81 / (1 + 5 / 9 - 6 / 5)))
    assert estimate.df == pytest.approx(1)


def test_opposite_directions_that_cancel_do_not_shrink_the_interval():
    # T = 0 and S = 0: only the rows' own variance (4/64) / (1 - 1/4) is left
    estimate = dyadic_mean([1, 0, 1, 0], ["a", "b", "c", "d"], ["b", "a", "d", "c"])
    assert estimate.se == pytest.approx(math.sqrt(1 / 12))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("n_images", [4, 5, 10])
def test_additive_effects_on_all_pairs_give_the_interval_of_the_image_means(n_images, ordered):
    effects = np.random.default_rng(n_images).normal(size=n_images)
    a, b = complete(n_images, ordered)
    estimate = dyadic_mean(effects[a] + effects[b], a, b)
    expected = stats.t.interval(
        0.95, n_images - 1, loc=2 * effects.mean(), scale=2 * stats.sem(effects)
    )
    assert (estimate.low, estimate.high) == pytest.approx(expected)


def test_disjoint_pairs_give_the_ordinary_t_interval():
    values = np.random.default_rng(0).random(20)
    estimate = dyadic_mean(values, *disjoint(20), level=0.9)
    expected = stats.t.interval(0.9, 19, loc=values.mean(), scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx(expected)


def test_few_hubs_leave_few_degrees_of_freedom():
    hubs = np.repeat([0, 1], 10)
    estimate = dyadic_mean(np.arange(20) % 3, hubs, np.arange(2, 22))
    assert 1 < estimate.df < 2


@settings(deadline=None)
@given(samples())
def test_matches_brute_force(sample):
    values, a, b, weights = sample
    mean, se, df = brute_force(*sample)
    estimate = dyadic_mean(values, a, b, weights=weights)
    assert estimate.mean == pytest.approx(mean)
    assert estimate.n_images == len({*a, *b})
    if se is None or len(set(values)) == 1:
        assert estimate.method == "undefined"
        assert np.isnan(fields(estimate)[1:]).all()
    else:
        margin = stats.t.ppf(0.975, df) * se
        expected = [mean, mean - margin, mean + margin, se, df]
        np.testing.assert_allclose(fields(estimate), expected, rtol=1e-6, atol=1e-9)


# --- invariances


@settings(deadline=None)
@given(samples(), st.randoms(use_true_random=False), st.sampled_from([None, (0, 1)]))
def test_order_labels_and_sides_do_not_matter(sample, random, bounds):
    values, a, b, weights = sample
    estimate = dyadic_mean(values, a, b, weights=weights, bounds=bounds)
    rows = list(zip(values, a, b, weights, strict=True))
    random.shuffle(rows)
    rows = [(v, b, a, w) if random.random() < 0.5 else (v, a, b, w) for v, a, b, w in rows]
    names = random.sample(range(100), 10)
    values, a, b, weights = zip(*rows, strict=True)
    a, b = [("photo", names[g]) for g in a], [("photo", names[g]) for g in b]
    close(dyadic_mean(values, a, b, weights=weights, bounds=bounds), estimate)


@settings(deadline=None)
@given(samples())
def test_equal_weights_and_their_scale_do_not_matter(sample):
    values, a, b, weights = sample
    close(dyadic_mean(values, a, b, weights=[7] * len(values)), dyadic_mean(values, a, b))
    scaled = 1e300 * np.array(weights, dtype=float)
    close(dyadic_mean(values, a, b, weights=scaled), dyadic_mean(values, a, b, weights=weights))


def test_label_types_agree():
    rng = np.random.default_rng(3)
    values, a, b = rng.random(60), rng.integers(0, 20, 60), rng.integers(0, 20, 60)
    estimate = dyadic_mean(values, a, b)
    for relabel in (str, lambda g: (g, "x"), lambda g: f"{g:064x}".encode(), float):
        close(dyadic_mean(values, [relabel(g) for g in a], [relabel(g) for g in b]), estimate)
    close(dyadic_mean(values, a.astype(str), b.astype(str)), estimate)
    close(dyadic_mean(values, a.astype(np.uint8), b), estimate)


def test_large_integer_labels_of_two_types_stay_apart():
    a = np.array([2**62, 2**62 + 1, 2**62 + 2], dtype=np.int64)
    b = np.array([2**62 + 3, 2**62 + 4, 2**62 + 5], dtype=np.uint64)
    assert dyadic_mean([0, 1, 1], a, b).n_images == 6


def test_inputs_are_left_alone():
    a, b = np.array([0.2, 0.4, 0.9]), np.array([0.2, 0.3, 0.4])
    weights = np.array([1.0, 2.0, 3.0])
    paired_difference(a, b, *disjoint(3), weights=weights)
    assert a.tolist() == [0.2, 0.4, 0.9]
    assert b.tolist() == [0.2, 0.3, 0.4]
    assert weights.tolist() == [1.0, 2.0, 3.0]


# --- no interval, bounds and constants

STAR = ([0, 1, 1, 0], ["hub"] * 4, ["a", "b", "c", "d"])
TRIANGLE = ([0, 1, 1], ["a", "b", "c"], ["b", "c", "a"])
ONE = ([0.5], ["a"], ["b"])
SAME_TWO = ([0, 1, 1], ["a", "b", "a"], ["b", "a", "b"])
CHAIN = ([0, 1, 1], ["a", "b", "c"], ["b", "c", "d"])
ONE_IMAGE = ([0, 1, 1], ["a", "a", "a"], ["a", "a", "a"])


@pytest.mark.parametrize("bounds", [None, (0, 1)])
@pytest.mark.parametrize("sample", [STAR, TRIANGLE, ONE, SAME_TWO, CHAIN, ONE_IMAGE])
def test_pairs_without_two_independent_groups_give_no_interval(sample, bounds):
    for estimate in (
        dyadic_mean(*sample, bounds=bounds),
        image_bootstrap(*sample),
        paired_difference(sample[0], [-0.5] * len(sample[0]), *sample[1:]),
    ):
        assert estimate.method == "undefined"
        assert np.isnan(fields(estimate)[1:]).all()
    assert math.isnan(paired_difference(sample[0], [-0.5] * len(sample[0]), *sample[1:]).p_value)


@pytest.mark.parametrize("leaves", [2, 20, 200, 2000])
def test_a_star_and_a_pair_stay_one_degree_of_freedom_or_none(leaves):
    a, b = [0] * leaves + [-1], [*range(1, leaves + 1), -2]
    estimate = dyadic_mean(np.arange(leaves + 1) % 2, a, b)
    if leaves < 1000:
        assert estimate.df == pytest.approx(1, abs=1e-5)
    else:
        assert estimate.method == "undefined"


def test_a_star_and_one_more_pair_give_a_wide_interval():
    values, a, b = STAR
    estimate = dyadic_mean([*values, 1], [*a, "e"], [*b, "f"])
    assert estimate.high - estimate.low > 1


def test_score_interval_of_disjoint_pairs_is_wilsons():
    # se^2 = m (1 - m) / 9, so n = 9, with the t quantile of 9 degrees of freedom
    estimate = dyadic_mean([1] + [0] * 9, *disjoint(10), bounds=(0, 1))
    q, n, m = stats.t.ppf(0.975, 9), 9, 0.1
    centre = (m + q**2 / (2 * n)) / (1 + q**2 / n)
    half = q / (1 + q**2 / n) * math.sqrt(m * (1 - m) / n + q**2 / (4 * n**2))
    assert (estimate.low, estimate.high) == pytest.approx((centre - half, centre + half))
    assert estimate.method == "dyadic score"


@settings(deadline=None)
@given(samples(), st.sampled_from([(0, 1), (-1, 1), (0, 2)]))
def test_score_interval_stays_inside_and_holds_the_mean(sample, bounds):
    values, a, b, weights = sample
    estimate = dyadic_mean(values, a, b, weights=weights, bounds=bounds)
    if estimate.method != "undefined":
        assert bounds[0] <= estimate.low <= estimate.mean + 1e-12
        assert estimate.mean - 1e-12 <= estimate.high <= bounds[1]
        assert estimate.high > estimate.low


@settings(deadline=None)
@given(samples())
@example(
    ([0] * 9 + [0.2], [0, 0, 0, 1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1, 1, 0, 1, 1], [1] * 10)
)
def test_score_interval_scales_with_the_bounds(sample):
    values, a, b, weights = sample
    unit = dyadic_mean(values, a, b, weights=weights, bounds=(0, 1))
    percent = dyadic_mean(100 - 100 * np.array(values), a, b, weights=weights, bounds=(0, 100))
    np.testing.assert_allclose(
        [percent.low, percent.high], [100 - 100 * unit.high, 100 - 100 * unit.low], atol=1e-7
    )


@pytest.mark.parametrize(("a", "b"), [disjoint(5), complete(10), complete(10, ordered=True)])
def test_all_right_gives_the_exact_bound_of_five_trials(a, b):
    estimate = dyadic_mean(np.ones(len(a)), a, b, bounds=(0, 1))
    assert estimate.mean == estimate.high == 1
    assert estimate.low == pytest.approx(stats.beta.ppf(0.025, 5, 1))  # Clopper-Pearson
    assert math.isnan(estimate.se)
    assert estimate.method == "constant"
    wrong = dyadic_mean(np.zeros(len(a)), a, b, bounds=(0, 1))
    assert wrong.low == 0
    assert wrong.high == pytest.approx(1 - estimate.low)


def test_all_half_reaches_to_both_sides():
    reach = 1 - 0.025 ** (1 / 5)
    estimate = dyadic_mean([0.5] * 5, *disjoint(5), bounds=(0, 1))
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - reach / 2, 0.5 + reach / 2))


def test_bound_for_constants_is_attained():
    # v = x_g x_h, x Bernoulli(q): all pairs of six are right with probability q^6 = (q^2)^3, so at
    # the mean q^2 = low that chance is 2.5 % exactly
    a, b = complete(6)
    low = dyadic_mean(np.ones(15), a, b, bounds=(0, 1)).low
    assert math.sqrt(low) ** 6 == pytest.approx(0.025)


def test_all_equal_without_bounds_has_no_interval():
    for value in (0.0, 0.3, 1.0):
        estimate = dyadic_mean([value] * 8, *disjoint(8), weights=np.arange(1, 9))
        assert estimate.mean == value
        assert np.isnan([estimate.low, estimate.high, estimate.se]).all()


def test_rounding_is_not_variance():
    assert dyadic_mean([0.3, 0.1 + 0.2, 0.3], *disjoint(3)).method == "undefined"


# --- paired_difference


@settings(deadline=None)
@given(samples(), st.data())
def test_paired_difference_is_the_mean_of_the_differences(sample, data):
    a, image_a, image_b, weights = sample
    n = len(a)
    b = data.draw(st.lists(st.integers(0, 5).map(lambda k: k / 5), min_size=n, max_size=n))
    difference = paired_difference(a, b, image_a, image_b, weights=weights)
    fifths = np.round(5 * (np.array(a) - np.array(b)))
    assert (difference.wins, difference.ties, difference.losses) == (
        (fifths > 0).sum(),
        (fifths == 0).sum(),
        (fifths < 0).sum(),
    )
    if not fifths.any():
        assert difference.method == "identical"
        assert difference.p_value == 1
        assert difference.low == difference.high == difference.mean == difference.se == 0
        return
    close(difference, dyadic_mean(fifths / 5, image_a, image_b, weights=weights), 1e-7)
    if difference.method == "dyadic t":
        excludes_zero = not difference.low <= 0 <= difference.high
        assert (difference.p_value < 0.05) == excludes_zero
        mirrored = paired_difference(b, a, image_a, image_b, weights=weights)
        assert mirrored.mean == pytest.approx(-difference.mean)
        assert mirrored.p_value == pytest.approx(difference.p_value)
        assert (mirrored.wins, mirrored.losses) == (difference.losses, difference.wins)


def test_paired_difference_by_hand():
    # differences (0, 1): m = 1/2, se = 1/2, t = 1 with one degree of freedom: p = 1/2
    difference = paired_difference([1, 1], [1, 0], *disjoint(2))
    assert difference.p_value == pytest.approx(0.5)
    assert (difference.wins, difference.ties, difference.losses) == (1, 1, 0)


def test_paired_difference_of_disjoint_pairs_is_the_paired_t_test():
    rng = np.random.default_rng(1)
    a, b = rng.random(25), rng.random(25) + 0.1
    assert paired_difference(a, b, *disjoint(25)).p_value == pytest.approx(
        stats.ttest_rel(a, b).pvalue
    )


def test_constant_nonzero_difference_has_no_test():
    difference = paired_difference([1, 1, 1], [0, 0, 0], *disjoint(3))
    assert difference.mean == 1
    assert np.isnan([difference.low, difference.high, difference.p_value]).all()
    assert difference.wins == 3


# --- holm


def test_holm_by_hand():
    # ascending .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, then the running maximum
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, math.nan, 0.02]), [0.5, math.nan, 0.04])
    np.testing.assert_allclose(holm([0.7, 0.8]), [1, 1])
    assert holm([]).shape == (0,)
    assert np.isnan(holm([math.nan])).all()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40).map(lambda k: k / 40) | st.just(math.nan), max_size=9),
    st.integers(1, 39).map(lambda k: k / 40 + 0.003),
)
def test_holm_rejects_as_its_definition(p, alpha):
    tested = sorted((x, i) for i, x in enumerate(p) if not math.isnan(x))
    rejected = set()
    for k, (x, i) in enumerate(tested):
        if x > alpha / (len(tested) - k):
            break
        rejected.add(i)
    adjusted = holm(p)
    assert {i for i, x in enumerate(adjusted) if x <= alpha} == rejected
    assert [math.isnan(x) for x in adjusted] == [math.isnan(x) for x in p]


# --- image_bootstrap


@settings(max_examples=20, deadline=None)
@given(samples(min_pairs=4))
def test_bootstrap_matches_a_loop_over_draws(sample):
    values, a, b, weights = sample
    a, b = np.array(a), np.array(b)
    estimate = image_bootstrap(values, a, b, weights=weights, draws=150, seed=4)
    if estimate.method == "undefined":
        return
    images = sorted({*a, *b})
    rng = np.random.default_rng(4)
    means = []
    for _ in range(150):
        counts = rng.multinomial(len(images), np.full(len(images), 1 / len(images)))
        count = dict(zip(images, counts, strict=True))
        drawn = [
            w * count[g] * (1 if g == h else count[h])
            for w, g, h in zip(weights, a, b, strict=True)
        ]
        if sum(drawn):
            means.append(np.average(values, weights=drawn))
    expected = [*np.quantile(means, [0.025, 0.975]), np.std(means, ddof=1)]
    np.testing.assert_allclose([estimate.low, estimate.high, estimate.se], expected, atol=1e-9)


def test_bootstrap_agrees_with_the_dyadic_interval():
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 60, (2, 1500))
    effects = rng.normal(size=60)
    values = effects[a] + effects[b] + rng.normal(size=1500)
    boot, dyadic = image_bootstrap(values, a, b), dyadic_mean(values, a, b)
    assert boot.mean == dyadic.mean
    assert boot.se == pytest.approx(dyadic.se, rel=0.15)
    assert boot == image_bootstrap(values, a, b, seed=0) != image_bootstrap(values, a, b, seed=1)


def test_bootstrap_does_not_depend_on_the_chunks(monkeypatch):
    rng = np.random.default_rng(6)
    sample = (rng.random(40), rng.integers(0, 9, 40), rng.integers(0, 9, 40))
    whole = image_bootstrap(*sample, draws=130)
    monkeypatch.setattr("reports.statistics._BOOTSTRAP_CELLS", 9 * 7)
    np.testing.assert_allclose(fields(image_bootstrap(*sample, draws=130)), fields(whole))


# --- coverage


def test_dyadic_interval_covers_and_the_naive_one_does_not():
    rng = np.random.default_rng(7)
    repetitions, n_images, n_pairs = 600, 30, 300
    dyadic = naive = 0
    for _ in range(repetitions):
        a = rng.integers(0, n_images, n_pairs)
        b = (a + rng.integers(1, n_images, n_pairs)) % n_images
        effects = rng.normal(size=n_images)
        values = effects[a] + effects[b] + rng.normal(scale=2, size=n_pairs)
        estimate = dyadic_mean(values, a, b)
        dyadic += estimate.low <= 0 <= estimate.high
        low, high = stats.t.interval(0.95, n_pairs - 1, loc=values.mean(), scale=stats.sem(values))
        naive += low <= 0 <= high
    assert 0.92 <= dyadic / repetitions <= 0.99
    assert naive / repetitions < 0.75


# --- cost


def spair_like():
    rng = np.random.default_rng(8)
    image = 27 * np.repeat(np.arange(18), 680)[:12234]
    a, b = rng.integers(0, 27, (2, 12234))
    return rng.random(12234), image + a, image + b


def test_dyadic_mean_is_fast():
    sample = spair_like()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        dyadic_mean(*sample)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


def test_bootstrap_stays_small():
    sample = spair_like()
    tracemalloc.start()
    image_bootstrap(*sample)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


# --- bad input

GOOD = ([0.0, 1.0, 0.5], ["a", "b", "c"], ["d", "e", "f"])


@pytest.mark.parametrize(
    ("values", "image_a", "image_b", "options", "message"),
    [
        ([], [], [], {}, "no pairs"),
        ([0.0, math.nan, 1.0], *GOOD[1:], {}, "entry 1 is nan"),
        ([0.0, 1.0, math.inf], *GOOD[1:], {}, "entry 2 is inf"),
        ([0.0, 1.0], *GOOD[1:], {}, "image_a has 3 entries for 2 values"),
        (*GOOD[:2], ["d"], {}, "image_b has 1 entries for 3 values"),
        ([[0.0, 1.0]], *GOOD[1:], {}, "one-dimensional"),
        (["x", "y", "z"], *GOOD[1:], {}, "must be numbers"),
        (*GOOD, {"weights": [1, 2]}, "weights has 2 entries"),
        (*GOOD, {"weights": [1, 0, 2]}, "weight 0.0 of pair 1"),
        (*GOOD, {"weights": [1, math.nan, 2]}, "weights: entry 1 is nan"),
        (GOOD[0], ["a", None, "c"], GOOD[2], {}, "image_a of pair 1 is None"),
        (*GOOD[:2], [1.0, 2.0, math.nan], {}, "image_b of pair 2 is nan"),
        (GOOD[0], ["a", ["b"], "c"], GOOD[2], {}, "not hashable"),
        (*GOOD, {"level": 95}, "level is 95"),
    ],
)
def test_bad_pairs_raise(values, image_a, image_b, options, message):
    with pytest.raises(NemfError, match=message):
        dyadic_mean(values, image_a, image_b, **options)
    with pytest.raises(NemfError, match=message):
        image_bootstrap(values, image_a, image_b, **options)
    with pytest.raises(NemfError):
        paired_difference(values, values, image_a, image_b, **options)


def test_bad_options_raise():
    with pytest.raises(NemfError, match=r"value 1\.0 of pair 1 is outside"):
        dyadic_mean(*GOOD, bounds=(0, 0.9))
    with pytest.raises(NemfError, match="lower one first"):
        dyadic_mean(*GOOD, bounds=(1, 0))
    with pytest.raises(NemfError, match="at least 100"):
        image_bootstrap(*GOOD, draws=10)
    with pytest.raises(NemfError, match="3 and 2 values"):
        paired_difference([0, 1, 1], [0, 1], *GOOD[1:])
    with pytest.raises(NemfError, match=r"p-value 1\.5"):
        holm([0.5, 1.5])
    with pytest.raises(NemfError, match="one-dimensional"):
        holm([[0.5]])


def test_missing_pandas_labels_raise():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(NemfError, match="image_a of pair 1"):
        dyadic_mean(GOOD[0], pandas.array(["a", None, "c"], dtype="string"), GOOD[2])
