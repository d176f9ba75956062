"""What regression tracking watches on one cell: comparability, causes, exactness, accuracy,
scoring, cost. Torch-free; :mod:`reports.regression` makes verdicts of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from nemf.errors import NemfError
from nemf.predictions import Predictions
from reports.records import alpha_name, or_none
from reports.regression_policy import AccuracyRule, CostRule, ExactnessRule
from reports.statistics import paired_difference

# What is asked and what is true, in a prediction file.
QUESTIONS = ("pair", "keypoint", "query_x", "query_y", "true_x", "true_y")
NEAR_PX = 2.0  # points that moved less may share a displacement; the others were matched anew
_SAME_NUMBER = 1e-9  # two means of the same hits, summed in another order


@dataclass(eq=False)
class Side:
    """A cell as one commit leaves it. ``problem``: why there is no prediction, one line; then the
    rest is None. ``protocol``: id under that commit's own code; ``means``: PCK per image by (group,
    value, alpha) as that code scores its predictions."""

    predictions: Predictions | None
    protocol: str | None
    means: Mapping[tuple[str, str, float], float]
    problem: str | None = None


@dataclass(eq=False)
class Rescored:
    """Both sides' predictions as the newer code scores them, one row per pair: ``pair``,
    ``category``, ``image_a``, ``image_b``, ``n`` and per alpha the number right."""

    base: pd.DataFrame
    head: pd.DataFrame


@dataclass(frozen=True)
class Cost:
    """One number per round, each side measured in turns within the round: (R,) seconds per pair
    and (R,) peak MiB."""

    base_s: Sequence[float]
    head_s: Sequence[float]
    base_mib: Sequence[float]
    head_mib: Sequence[float]


def not_comparable(base: Side, head: Side) -> str | None:
    """Why the two sides of a cell cannot be compared, or None. Everything but the pairs."""
    problems = [
        f"{name} has no prediction: {side.problem}"
        for name, side in (("base", base), ("head", head))
        if side.problem is not None
    ]
    if problems:
        return "; ".join(problems)
    before, after = base.predictions.meta, head.predictions.meta
    for key, title in (
        ("dataset", "dataset"),
        ("split", "split"),
        ("synthetic", "kind of data"),
        ("fingerprint", "dataset version"),
        ("n_pairs", "number of pairs"),
    ):
        if before[key] != after[key]:
            text = f"{title} differs ({_short(before[key])} and {_short(after[key])})"
            if key == "fingerprint" and after["synthetic"]:
                text += ": the sources that make the stand-ins changed"
            return text
    if base.protocol != head.protocol:
        return f"protocol version differs ({base.protocol} and {head.protocol})"
    if before["plan"] != after["plan"]:
        return f"plan of {head.protocol} differs ({before['plan']} and {after['plan']})"
    for column in QUESTIONS:
        mine, other = base.predictions.column(column), head.predictions.column(column)
        if not np.array_equal(mine, other):
            return f"the pairs differ in {column}, though the fingerprint is the same"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def causes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What differs between the makers of two prediction files, from their metadata: entries of
    ``what`` (pixels, weights, config, seed, code, libraries, device, threads, chunk, batch),
    ``base``, ``head``. A config appears entry by entry; pixels are stand-ins that the same sources
    rendered otherwise on another machine."""
    found = []

    def note(what: str, old: Any, new: Any) -> None:
        if old != new:
            found.append({"what": what, "base": old, "head": new})

    note("pixels", before.get("pixels"), after["fingerprint"] if "pixels" in before else None)
    old, new = before["matcher"], after["matcher"]
    note("weights", old.get("weights_sha256"), new.get("weights_sha256"))
    configs = [dict(m.get("config") or {}) for m in (old, new)]
    for key in sorted({*configs[0], *configs[1]}):
        note(f"config {key}", configs[0].get(key), configs[1].get(key))
    facts = [dict(m.get("facts") or {}) for m in (before, after)]
    for key in ("seed", "code", "libraries", "device", "threads", "chunk", "batch"):
        note(key, facts[0].get(key), facts[1].get(key))
    return found


def points_moved(base: Predictions, head: Predictions, rule: ExactnessRule) -> dict[str, Any]:
    """How the answers of two prediction files of the same questions differ, in px.

    ``status``: "byte-equal", "within tolerance" (``tolerance_px`` per coordinate) or "changed".
    ``shift`` is the mean (dx, dy) head - base over the points that moved by less than NEAR_PX, if

    * at least half of the points answered by both did, and moved by more than the tolerance,
    * the larger mean is at least ``shift_px``, and
    * its paired test is significant at 0.001 (pairs are the units, images the clusters), or every
      pair moved alike;

    else None. Half a pixel hardly moves PCK, and noise does not move most points the same way.
    """
    before, after = base.points("pred"), head.points("pred")
    if before.tobytes() == after.tobytes():
        return {"status": "byte-equal", "n_keypoints": len(before), "n_moved": 0, "shift": None}
    answered = [~np.isnan(points).any(1) for points in (before, after)]
    both = answered[0] & answered[1]
    delta = after.astype(np.float64) - before
    far = np.abs(np.where(both[:, None], delta, 0)).max(1) > rule.tolerance_px
    lost, gained = (int((a & ~b).sum()) for a, b in (answered, answered[::-1]))
    distance = np.hypot(*delta[far].T)
    mean = delta[both].mean(0) if both.any() else np.zeros(2)
    changed = bool(far.any() or lost or gained)
    return {
        "status": "changed" if changed else "within tolerance",
        "n_keypoints": len(before),
        "n_moved": int(far.sum()),
        "n_lost": lost,
        "n_gained": gained,
        "median_px": float(np.median(distance)) if len(distance) else 0.0,
        "largest_px": float(distance.max()) if len(distance) else 0.0,
        "mean_dx_px": float(mean[0]),
        "mean_dy_px": float(mean[1]),
        "shift": _shift(head, delta, both, far, rule),
    }


def _shift(
    run: Predictions, delta: np.ndarray, both: np.ndarray, far: np.ndarray, rule: ExactnessRule
) -> list[float] | None:
    near = both & far & (np.hypot(*np.where(both[:, None], delta, 0).T) < NEAR_PX)
    if not near.any() or near.sum() < both.sum() / 2:
        return None
    mean = delta[near].mean(0)
    axis = int(np.argmax(np.abs(mean)))
    if np.abs(mean[axis]) < rule.shift_px:
        return None
    starts = run.pair_starts
    n = np.add.reduceat(near.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(near, delta[:, axis], 0.0), starts)
    kept = n > 0
    images = [run.column(f"{side}_hash")[starts][kept] for side in ("query", "reference")]
    values = sums[kept] / n[kept]
    test = paired_difference(values, np.zeros_like(values), *images, weights=n[kept])
    alike = np.ptp(values) <= rule.tolerance_px
    return mean.tolist() if alike or test.p_value < 0.001 else None


def accuracy_tests(
    cell: Rescored, rule: AccuracyRule
) -> Iterator[tuple[str, str, float, dict[str, Any]]]:
    """(group, value, alpha, facts) of every paired test of a cell; groups "all" and "class"."""
    frame, other = cell.head, cell.base
    n = frame["n"].to_numpy()
    images = [frame[side].to_numpy() for side in ("image_a", "image_b")]
    category = frame["category"].astype(str).to_numpy()
    groups = [("all", "all", np.ones(len(frame), bool))]
    groups += [("class", name, category == name) for name in sorted(set(category))]
    for group, value, rows in groups:
        for alpha in rule.alphas:
            after, before = (
                f[alpha_name(alpha)].to_numpy()[rows] / n[rows] for f in (frame, other)
            )
            a, b = (codes[rows] for codes in images)
            test = paired_difference(after, before, a, b)
            p = test.p_value
            if math.isnan(p):
                p = _constant_p(after - before, a, b)
            facts = {
                "base": float(before.mean()),
                "head": float(after.mean()),
                "difference": test.mean,
                "low": or_none(test.low),
                "high": or_none(test.high),
                "p": or_none(p),
                "worse_pairs": test.losses,
                "better_pairs": test.wins,
                "n_pairs": test.n_pairs,
                "n_images": test.n_images,
            }
            yield group, value, alpha, facts


def _constant_p(delta: np.ndarray, image_a: np.ndarray, image_b: np.ndarray) -> float:
    """p where every pair changed by the same amount: no variance to estimate, yet no accident.

    The bound of :func:`reports.statistics.dyadic_mean` on equal values with bounds -1 and 1,
    solved for the level at which it reaches zero; NaN if the differences are not all equal.
    """
    c = float(np.abs(delta).min())
    if c == 0 or np.ptp(delta) > 1e-12:
        return math.nan
    touched = [((image_a == image) | (image_b == image)).mean() for image in {*image_a, *image_b}]
    return min(1.0, 2 * (1 / (1 + c)) ** (1 / max(touched)))


def _means_of(frame: pd.DataFrame) -> dict[tuple[str, str, float], float]:
    """PCK per image by (group, value, alpha) of per-pair scores, groups "all" and "class"."""
    means = {}
    for name in (n for n in frame if n.startswith("pck-")):
        fractions, alpha = frame[name] / frame["n"], float(name.removeprefix("pck-"))
        means["all", "all", alpha] = float(fractions.mean())
        for category, part in fractions.groupby(frame["category"].astype(str)):
            means["class", str(category), alpha] = float(part.mean())
    return means


def scoring_changes(
    base: Side, head: Side, rescored: Rescored | None, rule: AccuracyRule
) -> dict[str, Any]:
    """Whether the newer code gives the older predictions the older code's numbers."""
    before = base.means
    after = head.means if rescored is None else _means_of(rescored.base)
    changed = []
    for key, old in sorted(before.items()):
        if key[0] in ("all", "class") and key[2] in rule.alphas:
            new = after.get(key)
            if new is None or not abs(new - old) <= _SAME_NUMBER:
                names = dict(zip(("group", "value", "alpha"), key, strict=True))
                changed.append(names | {"base": old, "head": new})
    checked = all(("all", "all", alpha) in before for alpha in rule.alphas)
    return {"checked": checked, "changed": changed}


def cost_ratio(base: Sequence[float], head: Sequence[float], level: float) -> dict[str, Any]:
    """Geometric mean of head / base over rounds with its t interval on the log scale.

    NemfError unless both have one positive number per round, of at least two rounds.
    """
    first, second = (np.asarray(x, np.float64) for x in (base, head))
    usable = first.shape == second.shape and first.ndim == 1 and len(first) >= 2
    if not usable or not (np.r_[first, second] > 0).all():
        raise NemfError(f"cost needs one positive number per round and side, not {base} and {head}")
    ratios = np.log(second / first)
    margin = stats.t.ppf((1 + level) / 2, len(ratios) - 1) * ratios.std(ddof=1) / len(ratios) ** 0.5
    mean = float(ratios.mean())
    return {
        "base": float(np.median(first)),
        "head": float(np.median(second)),
        "ratio": math.exp(mean),
        "low": math.exp(mean - margin),
        "high": math.exp(mean + margin),
        "rounds": len(ratios),
    }


def cost_ratios(cost: Cost, rule: CostRule) -> dict[str, dict[str, Any]]:
    """For ``seconds`` and ``memory`` the ratio, and what its interval says: "worse" and "improved"
    beyond the limit, "same" within it, "undecided" if it reaches over a limit."""
    found = {}
    for name, before, after, limit in (
        ("seconds", cost.base_s, cost.head_s, rule.seconds_ratio),
        ("memory", cost.base_mib, cost.head_mib, rule.memory_ratio),
    ):
        entry = cost_ratio(before, after, rule.look_level)
        verdict = "undecided"
        if entry["low"] > limit:
            verdict = "worse"
        elif entry["high"] < 1 / limit:
            verdict = "improved"
        elif entry["low"] >= 1 / limit and entry["high"] <= limit:
            verdict = "same"
        found[name] = entry | {"limit": limit, "verdict": verdict}
    return found
