"""The smallest drop of PCK@0.1 that `nemf regress` calls worse with 80 % chance, by simulation.

Run from the repository root (a few minutes); it writes the table of docs/regressions.md:

    python -m tests.benchmarks.regression_power

Model: a keypoint of pair (g, h) is right before the change with probability
``p = logistic(0.4 + x_g + x_h)``, x ~ N(0, 0.7^2) per image. The change decides a share ``churn``
of the keypoints anew, with the same p, and loses a share of those that are right; where ``uneven``,
that share differs from image to image (log-normal, sd 1). The drop is the expected one of the mean
over pairs. A drop is detected by the policy's rule for all pairs at one alpha: Holm's strictest
step over TESTS overall tests at half of the level, and at least ``least_change``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.special import expit

from reports.regression_policy import AccuracyRule, Policy
from reports.statistics import paired_difference

SEED = 31
TESTS = 8
POWER = 0.8
REPETITIONS = 400
POLICY = Path(__file__).resolve().parents[2] / "experiments" / "regress.yaml"


@dataclass(frozen=True)
class Design:
    """Pairs drawn from all ordered pairs of the images of each class."""

    n_pairs: int
    classes: int
    images: int

    def pairs(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        a, b = np.nonzero(~np.eye(self.images, dtype=bool))
        sizes = np.diff(np.linspace(0, self.n_pairs, self.classes + 1).astype(int))
        kept = [rng.choice(len(a), size, replace=False) for size in sizes]
        first = np.repeat(self.images * np.arange(self.classes), sizes)
        return a[np.concatenate(kept)] + first, b[np.concatenate(kept)] + first


DESIGNS = (Design(1000, 10, 12), Design(12234, 18, 27))
CHANGES = ((0.0, False), (0.0, True), (0.05, False), (0.2, False), (1.0, False))


@dataclass
class Change:
    """A change of one design: ``values(drop, seed)`` are the paired values of one repetition."""

    design: Design
    churn: float
    uneven: bool

    def __post_init__(self) -> None:
        rng = np.random.default_rng(SEED)
        self.a, self.b = self.design.pairs(rng)
        self.n = rng.integers(3, 12, self.design.n_pairs, endpoint=True)
        self.starts = np.r_[0, np.cumsum(self.n)[:-1]]

    def values(self, drop: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([SEED, seed])
        n_images = self.design.classes * self.design.images
        effect, lean = rng.normal(0, 0.7, n_images), rng.normal(0, 1, n_images)
        p = expit(0.4 + effect[self.a] + effect[self.b])
        share = np.exp((lean[self.a] + lean[self.b]) / 2**0.5) if self.uneven else np.ones(len(p))
        share = np.clip(share * drop / np.mean(p * share), 0, 1)
        p, share = np.repeat(p, self.n), np.repeat(share, self.n)
        before = rng.random(len(p)) < p
        after = np.where(rng.random(len(p)) < self.churn, rng.random(len(p)) < p, before)
        after &= rng.random(len(p)) >= share
        counts = (np.add.reduceat(x.astype(np.int64), self.starts) for x in (after, before))
        after_values, before_values = (count / self.n for count in counts)
        return after_values, before_values

    def standard_error(self, drop: float, repetitions: int = 20) -> tuple[float, float]:
        """Median standard error and degrees of freedom of the test at a drop."""
        found = [
            paired_difference(*self.values(drop, seed), self.a, self.b)
            for seed in range(repetitions)
        ]
        return tuple(np.median([[f.se, f.df] for f in found], axis=0))

    def smallest_drop(self, rule: AccuracyRule) -> float:
        drop = 0.01
        for _ in range(4):
            se, df = self.standard_error(drop)
            critical = stats.t.isf(rule.level / 2 / TESTS / 2, df)
            margin = stats.norm.ppf(POWER)
            drop = max((critical + margin) * se, rule.least_change + margin * se)
        return float(drop)

    def power(self, drop: float, rule: AccuracyRule) -> float:
        hits = 0
        for seed in range(1000, 1000 + REPETITIONS):
            test = paired_difference(*self.values(drop, seed), self.a, self.b)
            hits += test.p_value * TESTS < rule.level / 2 and test.mean <= -rule.least_change
        return hits / REPETITIONS


def table() -> Iterator[str]:
    rule = Policy.load(POLICY).accuracy
    yield "| pairs / images | decided anew | losses | smallest drop, points | power there |"
    yield "|---|---|---|---|---|"
    for design in DESIGNS:
        for churn, uneven in CHANGES:
            change = Change(design, churn, uneven)
            drop = change.smallest_drop(rule)
            yield (
                f"| {design.n_pairs:,} / {design.classes * design.images} | {churn:.0%} | "
                f"{'uneven' if uneven else 'even'} | {100 * drop:.2f} | "
                f"{change.power(drop, rule):.2f} |"
            )


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
