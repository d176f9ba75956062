"""How often the intervals of reports.statistics cover the truth, by simulation.

Run from the repository root (about three minutes); it writes the table of docs/statistics.md:

    python -m tests.benchmarks.coverage

Model: keypoints of pair i = (g, h) are right with probability
``logistic(eta + class_i + x_g + x_h + z_i)``, with image effects x ~ N(0, image_sd^2), pair noise
z ~ N(0, pair_sd^2), fixed class effects evenly spaced in -class_range..class_range, and a uniform
number of keypoints; a pair's value is the fraction right. Images and keypoints are drawn anew in
each repetition, the pairs are not. A second method has the same law, half the variance of its image
effects is shared with the first, so that the true difference is zero.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import expit

from reports.statistics import dyadic_mean, image_bootstrap, paired_difference

SEED = 20240
REPETITIONS = 2000
BOOTSTRAPPED = 400  # repetitions that are bootstrapped as well
DRAWS = 500
LEVEL = 0.95


@dataclass(frozen=True)
class Pairs:
    image_a: np.ndarray
    image_b: np.ndarray
    category: np.ndarray


@dataclass(frozen=True)
class Scenario:
    design: str
    eta: float = 0.4
    image_sd: float = 0.7
    pair_sd: float = 0.5
    class_range: float = 0.0
    keypoints: tuple[int, int] = (5, 20)
    per_point: bool = False


def _ordered(n_images: int) -> tuple[np.ndarray, np.ndarray]:
    return np.nonzero(~np.eye(n_images, dtype=bool))


def complete(rng: np.random.Generator) -> Pairs:
    a, b = _ordered(10)
    return Pairs(a, b, np.zeros(len(a), dtype=int))


def willow(rng: np.random.Generator) -> Pairs:
    """Ten classes of ten images, all ordered pairs; classes 7 to 9 reuse the photos of 4 to 6."""
    images = np.arange(100).reshape(10, 10)
    images[7:] = images[4:7]
    a, b = _ordered(10)
    return Pairs(images[:, a].ravel(), images[:, b].ravel(), np.repeat(np.arange(10), len(a)))


def spair_class(rng: np.random.Generator) -> Pairs:
    return _spair(rng, 1)


def spair(rng: np.random.Generator) -> Pairs:
    return _spair(rng, 18)


def _spair(rng: np.random.Generator, classes: int) -> Pairs:
    a, b = _ordered(27)
    kept = np.stack([rng.choice(len(a), 680, replace=False) for _ in range(classes)])
    first = 27 * np.arange(classes)[:, None]
    return Pairs(
        (a[kept] + first).ravel(), (b[kept] + first).ravel(), np.repeat(np.arange(classes), 680)
    )


def sparse(rng: np.random.Generator) -> Pairs:
    """Fifty pairs without a common image and fifteen more among the same hundred images."""
    disjoint = rng.permutation(100).reshape(50, 2)
    more = np.stack([rng.choice(100, 2, replace=False) for _ in range(15)])
    a, b = np.concatenate([disjoint, more]).T
    return Pairs(a, b, np.zeros(65, dtype=int))


def hubs(rng: np.random.Generator) -> Pairs:
    a = np.repeat(np.arange(4), 10)
    return Pairs(a, np.arange(4, 44), np.zeros(40, dtype=int))


DESIGNS: dict[str, Callable[[np.random.Generator], Pairs]] = {
    "one PF-WILLOW class": complete,
    "PF-WILLOW": willow,
    "one SPair class": spair_class,
    "SPair": spair,
    "65 pairs, 100 images": sparse,
    "4 hubs x 10": hubs,
}

SCENARIOS = [
    *(Scenario(design, image_sd=image_sd) for design in DESIGNS for image_sd in (1.0, 0.4, 0.0)),
    Scenario("PF-WILLOW", class_range=1.0),
    Scenario("SPair", class_range=1.0),
    *(
        Scenario(design, image_sd=1.0, keypoints=(3, 30), per_point=True)
        for design in ("one PF-WILLOW class", "one SPair class", "65 pairs, 100 images")
    ),
    *(
        Scenario(design, eta=eta, pair_sd=0.3, keypoints=(3, 8))
        for design in (
            "one PF-WILLOW class",
            "PF-WILLOW",
            "one SPair class",
            "65 pairs, 100 images",
        )
        for eta in (-4.5, 4.5)
    ),
]


def true_mean(scenario: Scenario, pairs: Pairs) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    sd = np.hypot(np.sqrt(2) * scenario.image_sd, scenario.pair_sd)
    logits = _class_logits(scenario, pairs)[:, None] + sd * nodes
    by_class = expit(logits) @ weights / weights.sum()
    return float(by_class[pairs.category].mean())


def _class_logits(scenario: Scenario, pairs: Pairs) -> np.ndarray:
    return scenario.eta + scenario.class_range * np.linspace(-1, 1, pairs.category.max() + 1)


def two_methods(
    scenario: Scenario, pairs: Pairs, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (P,) of two methods without a true difference, and the numbers of keypoints (P,)."""
    n_images = max(pairs.image_a.max(), pairs.image_b.max()) + 1
    n_pairs = len(pairs.image_a)
    keypoints = rng.integers(*scenario.keypoints, n_pairs, endpoint=True)
    shared = rng.normal(size=n_images)
    values = []
    for _ in range(2):
        effects = scenario.image_sd * (shared + rng.normal(size=n_images)) / np.sqrt(2)
        logits = (
            _class_logits(scenario, pairs)[pairs.category]
            + effects[pairs.image_a]
            + effects[pairs.image_b]
            + scenario.pair_sd * rng.normal(size=n_pairs)
        )
        values.append(rng.binomial(keypoints, expit(logits)) / keypoints)
    return values[0], values[1], keypoints


def naive(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Mean and standard error as if pairs were independent."""
    share = weights / weights.sum()
    mean = share @ values
    residuals = share * (values - mean)
    return mean, np.sqrt(residuals @ residuals * len(values) / (len(values) - 1))


def row(scenario: Scenario, rng: np.random.Generator) -> str:
    pairs = DESIGNS[scenario.design](rng)
    images = (pairs.image_a, pairs.image_b)
    truth = true_mean(scenario, pairs)
    n = len(pairs.image_a)
    t = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    covered = {name: [] for name in ("naive", "t", "score", "bootstrap")}
    widths = {"naive": [], "score": []}
    false_alarms = {"naive": [], "dyadic": []}
    constant = 0
    for repetition in range(REPETITIONS):
        a, b, keypoints = two_methods(scenario, pairs, rng)
        weights = keypoints if scenario.per_point else np.ones(n)
        mean, se = naive(a, weights)
        covered["naive"].append(abs(mean - truth) <= t * se)
        widths["naive"].append(2 * t * se)
        score = dyadic_mean(a, *images, weights=weights, level=LEVEL, bounds=(0, 1))
        covered["score"].append(score.low <= truth <= score.high)
        widths["score"].append(score.high - score.low)
        constant += score.method == "constant"
        plain = dyadic_mean(a, *images, weights=weights, level=LEVEL)
        if plain.method != "undefined":
            covered["t"].append(plain.low <= truth <= plain.high)
        if repetition < BOOTSTRAPPED and score.method != "constant":
            boot = image_bootstrap(
                a, *images, weights=weights, level=LEVEL, draws=DRAWS, seed=repetition
            )
            covered["bootstrap"].append(boot.low <= truth <= boot.high)
        difference = paired_difference(a, b, *images, weights=weights, level=LEVEL)
        false_alarms["dyadic"].append(difference.p_value < 1 - LEVEL)
        mean, se = naive(a - b, weights)
        false_alarms["naive"].append(abs(mean) > t * se)
    cells = [
        scenario.design + (", per point" if scenario.per_point else ""),
        f"{n} / {score.n_images}",
        f"{scenario.image_sd:g}, {scenario.pair_sd:g}, {scenario.class_range:g}",
        f"{truth:.3f}",
        *(f"{np.mean(covered[name]):.3f}" for name in covered),
        *(f"{np.mean(widths[name]):.3f}" for name in widths),
        *(f"{np.mean(false_alarms[name]):.3f}" for name in false_alarms),
        f"{constant / REPETITIONS:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> Iterator[str]:
    header = [
        "pairs of",
        "pairs / images",
        "sd: image, pair; class range",
        "true mean",
        *("naive", "dyadic t", "dyadic score", "bootstrap"),
        *("width: naive", "score"),
        *("false alarms: naive", "dyadic"),
        "constant",
    ]
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for at, scenario in enumerate(SCENARIOS):
        yield row(scenario, np.random.default_rng([SEED, at]))


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
