"""Intervals and tests for means over image pairs, where pairs share images (dyadic data).

Two pairs with a photograph in common are not independent: an easy photograph makes all of its pairs
easy. Everything here counts photographs, not pairs, as the independent units. The estimator is the
dyadic cluster-robust variance with three small-sample measures, in the notation used below:

* ``v_i`` the value and ``w_i`` the weight of pair i, ``p_i = w_i / sum(w)``, ``m = sum p_i v_i``
* ``e_i = p_i (v_i - m)`` the linearised residual of the ratio ``sum(w v) / sum(w)``
* ``A_ij = 1`` if pairs i and j have an image in common (so ``A_ii = 1``), otherwise 0

    V = sum_ij A_ij e_i e_j = sum_g S_g^2 - sum_{g<h} T_gh^2

with ``S_g`` the sum of e over the pairs that touch image g and ``T_gh`` over the pairs made of the
two images g and h, in either order; the second sum takes off what the first counts twice.

1. *Bias.* V is too small because m is fitted to the same data. It is multiplied by
   ``c = Var(m) / E[V]``, both under a working model in which every image adds an independent effect
   of one variance. With G images and all pairs among them, c = G (G-1) / ((G-2) (G-3)), and V c is
   unbiased whatever the mix of image effects and pair noise.
2. *Degrees of freedom* of the t quantile: Satterthwaite's ``2 E[V]^2 / Var(V)`` under the same
   model: G - 1 for all pairs among G images, P - 1 for P pairs without a common image, and little
   where a few images carry most pairs.
3. *Floor.* V can be negative. The variance used is ``max(V c, sum T^2 / (1 - sum t^2),
   sum e^2 / (1 - sum p^2))`` (t: the weight share of a two-image group): never below what
   independent image pairs, or independent rows, would give.

Sources: Fafchamps & Gubert 2007 (Journal of Development Economics 83), Aronow, Samii & Assenova
2015 (Political Analysis 23, "Cluster-robust variance estimation for dyadic data") and Tabord-Meehan
2019 (Journal of Business & Economic Statistics 37) for V; Bell & McCaffrey 2002 (Survey
Methodology 28) for correcting bias and degrees of freedom under a working model. The measured
coverage is in docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from nemf.errors import NemfError

# Share of Var(m) that E[V] must exceed; below it, tr(K^2) would be mostly rounding.
_NO_VARIANCE = 1e-5
# Two independent groups of pairs have one degree of freedom (this allows for rounding); fewer arise
# only where the estimator is about as often negative as not, in tangles of a few images.
_LEAST_DF = 0.999
# Values this close, relative to 1 (fractions) or the largest, differ by rounding only.
_ROUNDING = 1e-12
# Bootstrap image weights held at a time (draws x images): 2^20 float64 are 8 MiB.
_BOOTSTRAP_CELLS = 1 << 20


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs with its interval, in the unit of the values (fractions stay fractions).

    ``se``, ``low``, ``high`` and ``df`` are NaN where they are not defined. ``method`` is one of

    * ``"dyadic t"``: mean -/+ t se
    * ``"dyadic score"``: the same variance in the score form, for values with bounds
    * ``"constant"``: all values equal and bounded; a bound without a variance
    * ``"identical"``: a paired difference that is zero on every pair
    * ``"image bootstrap"``: percentiles
    * ``"undefined"``: the pairs do not determine a variance
    """

    mean: float
    low: float
    high: float
    se: float
    level: float
    df: float
    n_pairs: int
    n_images: int
    method: str


@dataclass(frozen=True)
class Difference(Estimate):
    """Mean of a - b over pairs; ``wins`` counts a > b, ``losses`` a < b, ``ties`` the rest."""

    p_value: float
    wins: int
    ties: int
    losses: int


def dyadic_mean(
    values: Sequence[float] | np.ndarray,
    image_a: Sequence[Hashable] | np.ndarray,
    image_b: Sequence[Hashable] | np.ndarray,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    level: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """Mean over pairs with an interval that allows for shared images.

    Without ``bounds`` the interval is ``m -/+ t_df se`` (variance: module docstring). With
    ``bounds = (lo, hi)``, (0, 1) for a PCK, it is the score interval, which stays inside and, near
    a bound, covers better than cutting off the t interval: all mu with
    ``|m - mu| <= t_df se sqrt(f(mu) / f(m))``, ``f(mu) = (mu - lo) (hi - mu)``; that is Wilson's
    1927 interval for the effective sample size ``f(m) / se^2`` of the survey literature (Franco,
    Little, Louis & Slud 2019, Journal of Survey Statistics and Methodology 7).

    If all values are equal to one c there is no variance to estimate. Without bounds the interval
    is undefined. With bounds it reaches from ``c - (c - lo) r`` to ``c + (hi - c) r``,
    ``r = 1 - ((1 - level) / 2)^(1/n)``, ``n = 1 / max_g s_g``, ``s_g`` the weight share of the
    pairs that touch image g: Clopper and Pearson's bound (the "rule of three") for n independent
    trials. It holds for any dependence through images: a mean at distance d above c needs
    ``P(v_i != c) >= d_i / (hi - c)``, and Finner's inequality (1992, Annals of Probability 20)
    with exponents ``p_i n`` bounds the chance of seeing c only by
    ``prod (1 - d_i / (hi - c))^(p_i n) <= (1 - d / (hi - c))^n``. All pairs among G images have
    n = G/2: ten images that are all right show no more than a mean above 0.48.

    Args:
        values: (P,) float, one value a pair; finite.
        image_a, image_b: (P,) labels of the pair's two images: content hashes, or any hashables
            (integer arrays are fastest). Their order does not matter; both may be the same image.
        weights: (P,) float > 0; the estimate is sum(w v) / sum(w). For per-point averaging give
            the fraction correct and the number of keypoints of each pair. None: all equal.
        level: of the interval, in (0, 1).
        bounds: range of the values.

    Returns:
        The estimate. Low, high, se and df are NaN ("undefined") if every pair shares an image with
        every other one (a single pair, one image in all pairs, three images): V is then zero by
        construction. Likewise below one degree of freedom, as for a chain of three pairs.

    Raises:
        NemfError: empty input, different lengths, NaN or infinite values, weights that are not
            positive, a missing label, values outside of the bounds, a level outside of (0, 1).
    """
    sample = _Sample.checked(values, image_a, image_b, weights)
    _check_level(level)
    if bounds is not None:
        _check_bounds(sample.values, bounds)
    return _estimate(sample, level, bounds)


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    image_a: Sequence[Hashable] | np.ndarray,
    image_b: Sequence[Hashable] | np.ndarray,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    level: float = 0.95,
) -> Difference:
    """Mean difference a - b of two methods on the same pairs, with a two-sided test against zero.

    ``dyadic_mean`` of the differences (t interval), and ``p = 2 P(T_df > |m| / se)``, so that
    p < 1 - level exactly if the interval excludes zero. If every difference is zero, the two agree
    on this data: p = 1 and low = high = se = 0 ("identical"), whatever the pairs. If all are equal
    and not zero, or the pairs determine no variance, interval and p are NaN. The claim is about
    the two sets of weights that made the values, not about two training recipes.

    Args:
        a, b: (P,) float, the value of each method on each pair; finite.
        image_a, image_b, weights, level: as for ``dyadic_mean``.

    Raises:
        NemfError: as ``dyadic_mean``, for a and b alike.
    """
    first, second = _finite(a, "values of a"), _finite(b, "values of b")
    if len(first) != len(second):
        raise NemfError(
            f"paired difference of {len(first)} and {len(second)} values: "
            "give both methods' values on the same pairs"
        )
    delta = first - second
    # (0.1 + 0.2) - 0.3 is no win: differences at rounding level are ties.
    scale = np.maximum(1.0, np.maximum(np.abs(first), np.abs(second)))
    delta[np.abs(delta) <= _ROUNDING * scale] = 0.0
    sample = _Sample.checked(delta, image_a, image_b, weights)
    _check_level(level)
    if not delta.any():
        estimate = sample.estimate(level, "identical", low=0.0, high=0.0, se=0.0)
        p_value = 1.0
    else:
        estimate = _estimate(sample, level, None)
        p_value = math.nan
        if estimate.se > 0:  # False for NaN
            p_value = float(2 * stats.t.sf(abs(estimate.mean) / estimate.se, estimate.df))
    return Difference(
        **vars(estimate),
        p_value=p_value,
        wins=int((delta > 0).sum()),
        ties=int((delta == 0).sum()),
        losses=int((delta < 0).sum()),
    )


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment (Holm 1979, Scandinavian Journal of Statistics 6).

    With m p-values in ascending order, ``adjusted_(k) = max_{j<=k} min(1, (m - j + 1) p_(j))``.
    Rejecting where adjusted <= alpha keeps the chance of any false rejection within alpha, under
    any dependence. NaN (no test was possible) stays NaN and is not counted in m.

    Args:
        p_values: (M,) float in [0, 1] or NaN; may be empty.

    Returns:
        (M,) float64 in the order given.

    Raises:
        NemfError: not one-dimensional, or a value outside of [0, 1].
    """
    p = _vector(p_values, "p-values")
    tested = ~np.isnan(p)
    outside = tested & ~((p >= 0) & (p <= 1))
    if outside.any():
        raise NemfError(f"p-value {p[outside][0]} is outside of [0, 1]")
    where = np.flatnonzero(tested)
    where = where[np.argsort(p[where], kind="stable")]
    steps = np.arange(len(where), 0, -1) * p[where]
    adjusted = np.full(len(p), np.nan)
    adjusted[where] = np.maximum.accumulate(np.minimum(steps, 1.0))
    return adjusted


def image_bootstrap(
    values: Sequence[float] | np.ndarray,
    image_a: Sequence[Hashable] | np.ndarray,
    image_b: Sequence[Hashable] | np.ndarray,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile interval from resampling images: a cross-check of ``dyadic_mean``, not its rival.

    Each draw gives the G images multinomial counts c that sum to G (Davezies, D'Haultfoeuille &
    Guyonvarch 2021, Annals of Statistics 49); pair i weighs ``w_i c_a c_b``, a pair of one image
    with itself ``w_i c_a``. ``se`` is the standard deviation of the draws' means; df is NaN. Draws
    in which no pair is left have no mean and are not counted. Where the dyadic interval is
    undefined, or all values are equal, so is this one. It agrees with the dyadic interval where
    image effects dominate and every image is in many pairs; where pairs share few images it is
    wider by up to about sqrt(3), because two counts multiply.

    Args:
        values, image_a, image_b, weights, level: as for ``dyadic_mean``.
        draws: number of resamples, at least 100.
        seed: of ``numpy.random.default_rng``; the same pairs in the same order give the same
            interval.

    Raises:
        NemfError: as ``dyadic_mean``, or fewer than 100 draws.
    """
    sample = _Sample.checked(values, image_a, image_b, weights)
    _check_level(level)
    if draws < 100:
        raise NemfError(f"draws is {draws}: percentiles need at least 100")
    if sample.constant or sample.working_model() is None:
        return sample.estimate(level, "undefined")
    totals = _bootstrap_totals(sample, sample.share, draws, seed)
    sums = _bootstrap_totals(sample, sample.share * sample.values, draws, seed)
    means = sums[totals > 0] / totals[totals > 0]
    if len(means) < 100:
        return sample.estimate(level, "undefined")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return sample.estimate(
        level, "image bootstrap", low=float(low), high=float(high), se=float(means.std(ddof=1))
    )


def _bootstrap_totals(sample: _Sample, x: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws,): sum of x over pairs, each times its images' counts; a seed gives the same counts.

    As a quadratic form ``c' X c`` in the G counts, it never holds draws x pairs numbers.
    """
    n = sample.n_images
    two = sample.two_images
    between = sparse.csr_array(
        (sample.over_groups(x)[two], (sample.group_low[two], sample.group_high[two])), shape=(n, n)
    )
    same = sample.low == sample.high
    within = np.bincount(sample.low[same], x[same], n)
    rng = np.random.default_rng(seed)
    chances = np.full(n, 1 / n)
    totals = np.empty(draws)
    step = max(1, _BOOTSTRAP_CELLS // n)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        counts = rng.multinomial(n, chances, size=size).astype(np.float64)
        crossed = np.einsum("dg,dg->d", counts @ between, counts)
        totals[start : start + size] = crossed + counts @ within
    return totals


def _estimate(sample: _Sample, level: float, bounds: tuple[float, float] | None) -> Estimate:
    model = sample.working_model()
    if model is None:
        return sample.estimate(level, "undefined")
    if sample.constant:
        if bounds is None:
            return sample.estimate(level, "undefined")
        low, high = _constant_interval(sample, level, bounds)
        return sample.estimate(level, "constant", low=low, high=high)
    inflation, df = model
    se = math.sqrt(_variance(sample, inflation))
    margin = float(stats.t.ppf((1 + level) / 2, df)) * se
    if bounds is None:
        low, high, method = sample.mean - margin, sample.mean + margin, "dyadic t"
    else:
        low, high = _score_interval(sample.mean, margin, bounds)
        method = "dyadic score"
    return sample.estimate(level, method, low=low, high=high, se=se, df=df)


def _variance(sample: _Sample, inflation: float) -> float:
    residuals = sample.share * (sample.values - sample.mean)
    by_image = sample.over_images(residuals)
    by_group = sample.over_groups(residuals)
    group_share = sample.over_groups(sample.share)
    crossed = by_group[sample.two_images]
    return max(
        inflation * float(by_image @ by_image - crossed @ crossed),
        float(by_group @ by_group / (1 - group_share @ group_share)),
        float(residuals @ residuals / (1 - sample.share @ sample.share)),
    )


def _score_interval(mean: float, margin: float, bounds: tuple[float, float]) -> tuple[float, float]:
    lo, hi = bounds
    # (mean - mu)^2 f(mean) = margin^2 f(mu), a quadratic in mu, on the scale lo = 0, hi = 1
    u, k = (mean - lo) / (hi - lo), (margin / (hi - lo)) ** 2
    spread = k / (u * (1 - u))
    centre = (u + spread / 2) / (1 + spread)
    half = math.sqrt(k + spread**2 / 4) / (1 + spread)
    return lo + (hi - lo) * max(0.0, centre - half), lo + (hi - lo) * min(1.0, centre + half)


def _constant_interval(
    sample: _Sample, level: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    trials = 1 / float(sample.over_images(sample.share).max())
    reach = 1 - ((1 - level) / 2) ** (1 / trials)
    lo, hi = bounds
    return sample.mean - (sample.mean - lo) * reach, sample.mean + (hi - sample.mean) * reach


@dataclass(frozen=True, eq=False)
class _Sample:
    """Checked input: P pairs over G coded images, and their U groups of two images."""

    values: np.ndarray  # (P,) float64
    share: np.ndarray  # (P,) float64, the weights, summing to one
    low: np.ndarray  # (P,) int64 image codes 0..G-1, low <= high
    high: np.ndarray
    n_images: int
    group: np.ndarray  # (P,) int64, the pair's group of two images
    group_low: np.ndarray  # (U,) int64 image codes
    group_high: np.ndarray

    @classmethod
    def checked(cls, values, image_a, image_b, weights) -> _Sample:
        values = _finite(values, "values")
        if len(values) == 0:
            raise NemfError("no pairs: a mean needs at least one")
        weights = np.ones(len(values)) if weights is None else _finite(weights, "weights")
        for name, given in (("weights", weights), ("image_a", image_a), ("image_b", image_b)):
            if len(given) != len(values):
                raise NemfError(
                    f"{name} has {len(given)} entries for {len(values)} values: give one a pair"
                )
        if (weights <= 0).any():
            at = int(np.argmin(weights))
            raise NemfError(f"weight {weights[at]} of pair {at}: weights must be positive")
        codes, n_images = _image_codes(image_a, image_b)
        first, second = codes[: len(values)], codes[len(values) :]
        low, high = np.minimum(first, second), np.maximum(first, second)
        keys, group = np.unique(low * n_images + high, return_inverse=True)
        share = weights / weights.max()  # two steps, so that no sum of large weights overflows
        share = share / share.sum()
        return cls(values, share, low, high, n_images, group, keys // n_images, keys % n_images)

    @property
    def mean(self) -> float:
        if self.constant:  # exactly the common value: the sum would be off by rounding
            return float(self.values[0])
        return float(self.share @ self.values)

    @property
    def constant(self) -> bool:
        return bool(np.ptp(self.values) <= _ROUNDING * max(1.0, np.abs(self.values).max()))

    @property
    def two_images(self) -> np.ndarray:
        """(U,) bool: the groups whose two images differ."""
        return self.group_low != self.group_high

    def over_images(self, x: np.ndarray) -> np.ndarray:
        """(G,): sum of x over the pairs that touch each image; a same-image pair counts once."""
        two = self.low != self.high
        return np.bincount(self.low, x, self.n_images) + np.bincount(
            self.high[two], x[two], self.n_images
        )

    def over_groups(self, x: np.ndarray) -> np.ndarray:
        """(U,): sum of x over the pairs of each two images."""
        return np.bincount(self.group, x, len(self.group_low))

    def working_model(self) -> tuple[float, float] | None:
        """(c, df) if each image adds an independent effect of one variance.

        None where the pairs determine no variance: E[V] = 0, or less than one degree of freedom.

        Effects b give v = Z b (Z: pair touches image), so V = b' K b with K = Z' L A L Z,
        L = diag(p) - p p', A = Z Z' - Q Q' (Q: pair is of these two different images), and
        Var(m) = s' s, s = Z' p. E[V] = tr K; Satterthwaite's df = (tr K)^2 / tr(K^2). With
        N = Z' diag(p) Z and R = Q' diag(p) Z both sparse,

            K = X - (a s' + s a') + k s s',  X = N N - R' R,  a = N s - R' Q' p,
            k = s' s - |Q' p|^2

        so the traces need no dense matrix.
        """
        n = self.n_images
        two = self.two_images
        t, g, h = self.over_groups(self.share)[two], self.group_low[two], self.group_high[two]
        s = self.over_images(self.share)
        rq = np.bincount(g, t**2, n) + np.bincount(h, t**2, n)
        rows = np.concatenate([g, h, np.arange(n)])
        columns = np.concatenate([h, g, np.arange(n)])

        def symmetric(off: np.ndarray, diagonal: np.ndarray) -> sparse.csr_array:
            entries = np.concatenate([off, off, diagonal])
            return sparse.csr_array((entries, (rows, columns)), shape=(n, n))

        shares = symmetric(t, s)
        x = shares @ shares - symmetric(t**2, rq)
        a = shares @ s - rq
        k = float(s @ s - t @ t)
        xs = x @ s
        ss, sa, aa = float(s @ s), float(s @ a), float(a @ a)
        trace = float(x.trace()) - 2 * sa + k * ss
        if trace <= _NO_VARIANCE * ss:
            return None
        cross = k * float(s @ xs) - 2 * float(a @ xs)
        low_rank = 2 * aa * ss + 2 * sa**2 - 4 * k * sa * ss + k**2 * ss**2
        squared = float(x.data @ x.data) + 2 * cross + low_rank
        df = trace**2 / squared
        return None if df < _LEAST_DF else (ss / trace, df)

    def estimate(
        self,
        level: float,
        method: str,
        *,
        low: float = math.nan,
        high: float = math.nan,
        se: float = math.nan,
        df: float = math.nan,
    ) -> Estimate:
        return Estimate(
            self.mean, low, high, se, level, df, len(self.values), self.n_images, method
        )


def _vector(x: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    try:
        array = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise NemfError(f"{name} must be numbers: {error}") from error
    if array.ndim != 1:
        raise NemfError(f"{name} must be one-dimensional, not of shape {array.shape}")
    return array


def _finite(x: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    array = _vector(x, name)
    bad = ~np.isfinite(array)
    if bad.any():
        at = int(np.argmax(bad))
        raise NemfError(f"{name}: entry {at} is {array[at]}; every pair needs a finite number")
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise NemfError(f"level is {level}: give a fraction in (0, 1), such as 0.95")


def _check_bounds(values: np.ndarray, bounds: tuple[float, float]) -> None:
    lo, hi = bounds
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise NemfError(f"bounds are {bounds}: give two finite numbers, the lower one first")
    outside = (values < lo) | (values > hi)
    if outside.any():
        at = int(np.argmax(outside))
        raise NemfError(f"value {values[at]} of pair {at} is outside of the bounds {bounds}")


def _image_codes(
    image_a: Sequence[Hashable] | np.ndarray, image_b: Sequence[Hashable] | np.ndarray
) -> tuple[np.ndarray, int]:
    """(2 P,) int64 codes 0..G-1, image_a's and then image_b's, and G."""
    both = (image_a, image_b)
    integers = all(isinstance(x, np.ndarray) and x.ndim == 1 and x.dtype.kind in "iu" for x in both)
    if integers and image_a.dtype == image_b.dtype:  # int64 beside uint64 would become float64
        labels, codes = np.unique(np.concatenate(both), return_inverse=True)
        return codes, len(labels)
    table: dict[Hashable, int] = {}
    codes = np.empty(len(image_a) + len(image_b), dtype=np.int64)
    for at, label in enumerate([*image_a, *image_b]):
        if _missing(label):
            side, pair = ("image_a", at) if at < len(image_a) else ("image_b", at - len(image_a))
            raise NemfError(f"{side} of pair {pair} is {label}: every image needs a label")
        try:
            codes[at] = table.setdefault(label, len(table))
        except TypeError as error:
            raise NemfError(f"image label {label!r} is not hashable") from error
    return codes, len(table)


def _missing(label: Hashable) -> bool:
    # NaN and pandas' NA would each count as an image of its own and narrow the interval.
    try:
        return label is None or bool(label != label)
    except (TypeError, ValueError):
        return True
