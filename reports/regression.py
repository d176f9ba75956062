"""Regression verdicts: what a change of the code did to a matcher, from what it answered before and
after. Torch-free.

A cell is (matcher config, dataset, protocol). Four things are watched on it:

* *accuracy*: the paired difference of PCK, both sides scored by the newer code;
* *scoring*: whether the newer code gives the older predictions the numbers that the older code did;
* *exactness*: which predicted points moved, how far, and whether most moved the same way;
* *cost*: seconds per pair and peak memory as ratios of alternating measurements.

Each is worse, improved or same, the cell is the worst of them, or not comparable. All tests of a
comparison are corrected together. docs/regressions.md describes the rules and the JSON.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from nemf.errors import NemfError
from nemf.predictions import Predictions
from nemf.scoring import check_alphas
from reports.records import alpha_name, or_none
from reports.statistics import holm, paired_difference

FORMAT = 1
NEAR_PX = 2.0  # points that moved less may share a displacement; the others were matched anew
_SAME_NUMBER = 1e-9  # two means of the same hits, summed in another order


# -- the policy -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """``matcher`` is the name of a config, ``protocol`` a bare name or an id."""

    matcher: str
    dataset: str
    protocol: str

    def __str__(self) -> str:
        return f"{self.matcher}/{self.dataset}/{self.protocol}"

    @property
    def prediction(self) -> str:
        return f"{self.matcher}/{self.dataset}"


@dataclass(frozen=True)
class Suite:
    """What is run. ``data``: ``{"synthetic": preset}`` or ``{"folder": path}``; ``renamed``: the
    former name of a matcher config by its new one."""

    data: dict[str, str]
    threads: int
    matchers: tuple[str, ...]
    datasets: tuple[str, ...]
    protocols: tuple[str, ...]
    renamed: dict[str, str]


@dataclass(frozen=True)
class AccuracyRule:
    """``level``: chance of any false alarm; the least changes are fractions of a PCK."""

    alphas: tuple[float, ...]
    level: float
    least_change: float
    least_class_change: float


@dataclass(frozen=True)
class ExactnessRule:
    tolerance_px: float
    shift_px: float


@dataclass(frozen=True)
class CostRule:
    """``predictions``: which matcher/dataset are timed; the ratios are limits, above 1."""

    predictions: tuple[str, ...]
    rounds: int
    blocks: int
    pairs: int
    level: float
    seconds_ratio: float
    memory_ratio: float


@dataclass(frozen=True)
class Policy:
    """What is run and watched, and when that is a failure. ``guard``: patterns of cells."""

    suite: Suite
    guard: tuple[str, ...]
    accuracy: AccuracyRule
    exactness: ExactnessRule
    cost: CostRule

    @classmethod
    def load(cls, path: Path) -> Policy:
        """NemfError naming the file and the entry for anything missing, unknown or malformed."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NemfError(f"{path}: no such policy file") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
            reason = " ".join(str(problem).split())
            raise NemfError(f"{path}: cannot be read as YAML ({reason})") from None
        try:
            policy = _build(cls, content, "")
            _check(policy)
        except NemfError as problem:
            raise NemfError(f"{path}: {problem}") from None
        return policy

    def cells(self) -> list[Cell]:
        suite = self.suite
        return [
            Cell(*parts)
            for parts in itertools.product(suite.matchers, suite.datasets, suite.protocols)
        ]

    def guards(self, cell: Cell) -> bool:
        return any(fnmatchcase(str(cell), pattern) for pattern in self.guard)


def _build(kind: type, content: Any, where: str) -> Any:
    """``content`` of a YAML mapping as the dataclass ``kind``."""
    if not isinstance(content, dict):
        raise NemfError(f"{where or 'the file'} must be a mapping, not {content!r}")
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    for problem, keys in (("lacks", names - set(content)), ("has unknown", set(content) - names)):
        if keys:
            raise NemfError(f"{where or 'the file'} {problem} {', '.join(sorted(map(str, keys)))}")
    return kind(**{n: _value(hints[n], content[n], f"{where}.{n}".strip(".")) for n in names})


def _value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, where)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and type(value) is int:
        return value
    if hint is float and number and math.isfinite(value):
        return float(value)
    if hint == tuple[str, ...] and isinstance(value, list):
        if all(isinstance(text, str) and text for text in value):
            return tuple(value)
    elif hint == tuple[float, ...] and isinstance(value, list):
        return check_alphas(value)
    elif (
        hint == dict[str, str]
        and isinstance(value, dict)
        and all(isinstance(text, str) for text in (*value, *value.values()))
    ):
        return value
    names = {int: "a whole number", float: "a number", tuple[str, ...]: "a list of names"}
    names |= {tuple[float, ...]: "a list of numbers", dict[str, str]: "a mapping of texts"}
    raise NemfError(f"{where} must be {names[hint]}, not {value!r}")


def _check(policy: Policy) -> None:
    suite, cost = policy.suite, policy.cost
    if len(suite.data) != 1 or not set(suite.data) <= {"synthetic", "folder"}:
        raise NemfError("suite.data must be {synthetic: PRESET} or {folder: PATH}")
    for name in ("matchers", "datasets", "protocols"):
        values = getattr(suite, name)
        if not values or len(set(values)) < len(values):
            raise NemfError(f"suite.{name} must name at least one, each once")
    for where, number, least in (
        ("suite.threads", suite.threads, 1),
        ("cost.rounds", cost.rounds, 2),
        ("cost.blocks", cost.blocks, 1),
        ("cost.pairs", cost.pairs, 1),
        ("accuracy.least_change", policy.accuracy.least_change, 0),
        ("accuracy.least_class_change", policy.accuracy.least_class_change, 0),
        ("exactness.tolerance_px", policy.exactness.tolerance_px, 0),
        ("exactness.shift_px", policy.exactness.shift_px, 0),
        ("cost.seconds_ratio", cost.seconds_ratio, 1),
        ("cost.memory_ratio", cost.memory_ratio, 1),
    ):
        if number < least:
            raise NemfError(f"{where} must be at least {least}, not {number}")
    for where, level in (("accuracy.level", policy.accuracy.level), ("cost.level", cost.level)):
        if not 0 < level < 1:
            raise NemfError(f"{where} must lie in (0, 1), not {level}")
    if len({*policy.accuracy.alphas}) < len(policy.accuracy.alphas):
        raise NemfError("accuracy.alphas names one twice")
    known = {cell.prediction for cell in policy.cells()}
    if foreign := set(cost.predictions) - known:
        raise NemfError(f"cost.predictions names {', '.join(sorted(foreign))}, which is not run")
    if idle := [p for p in policy.guard if not any(fnmatchcase(str(c), p) for c in policy.cells())]:
        raise NemfError(f"guard pattern {idle[0]!r} fits no cell")


# -- one cell -------------------------------------------------------------------------------------


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
    for name, side in (("base", base), ("head", head)):
        if side.problem is not None:
            return f"{name} has no prediction: {side.problem}"
    before, after = base.predictions.meta, head.predictions.meta
    for key, title in (
        ("dataset", "dataset"),
        ("split", "split"),
        ("synthetic", "kind of data"),
        ("fingerprint", "dataset version"),
        ("n_pairs", "number of pairs"),
    ):
        if before[key] != after[key]:
            return f"{title} differs ({_short(before[key])} and {_short(after[key])})"
    if base.protocol != head.protocol:
        return f"protocol version differs ({base.protocol} and {head.protocol})"
    if before["plan"] != after["plan"]:
        return f"plan of {head.protocol} differs ({before['plan']} and {after['plan']})"
    for column in ("pair", "keypoint", "query_x", "query_y", "true_x", "true_y"):
        mine, other = base.predictions.column(column), head.predictions.column(column)
        if not np.array_equal(mine, other):
            return f"the pairs differ in {column}, though the fingerprint is the same"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def causes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What differs between the makers of two prediction files, from their metadata: entries of
    ``what`` (weights, config, seed, code, libraries, device, threads, chunk, batch), ``base``,
    ``head``. A config appears entry by entry."""
    found = []

    def note(what: str, old: Any, new: Any) -> None:
        if old != new:
            found.append({"what": what, "base": old, "head": new})

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


def _accuracy_tests(
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


def _scoring(item: Observed, rule: AccuracyRule) -> dict[str, Any]:
    """Whether the newer code gives the older predictions the older code's numbers."""
    before = item.base.means
    after = item.head.means if item.rescored is None else _means_of(item.rescored.base)
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


def _cost(cost: Cost, rule: CostRule) -> dict[str, Any]:
    found = {}
    for name, before, after, limit in (
        ("seconds", cost.base_s, cost.head_s, rule.seconds_ratio),
        ("memory", cost.base_mib, cost.head_mib, rule.memory_ratio),
    ):
        entry = cost_ratio(before, after, rule.level)
        verdict = "same"
        if entry["low"] > limit:
            verdict = "worse"
        elif entry["high"] < 1 / limit:
            verdict = "improved"
        found[name] = entry | {"limit": limit, "verdict": verdict}
    return found


# -- all cells ------------------------------------------------------------------------------------


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
        _conclude(item, verdict)
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
    verdict["scoring"] = _scoring(item, policy.accuracy)
    verdict["accuracy"] = {"tests": []}
    if verdict["exactness"]["status"] == "byte-equal":
        verdict["accuracy"]["means"] = [
            {"alpha": alpha, "pck": item.head.means.get(("all", "all", alpha))}
            for alpha in policy.accuracy.alphas
        ]
    elif item.rescored is not None:
        verdict["accuracy"]["tests"] = [
            {"group": group, "value": value, "alpha": alpha, **facts}
            for group, value, alpha, facts in _accuracy_tests(item.rescored, policy.accuracy)
        ]
    if item.cost is not None:
        verdict["cost"] = _cost(item.cost, policy.cost)
    return verdict


def _conclude(item: Observed, verdict: dict[str, Any]) -> None:
    """Fills in the cell's verdict, its reasons and whether it fails."""
    if item.problem is not None:
        verdict["verdict"] = "not comparable"
        verdict["reasons"] = [
            {"watch": "comparability", "verdict": "not comparable", "text": item.problem}
        ]
        # A head that cannot predict is a failure; another dataset or protocol version is not.
        verdict["fails"] = verdict["guarded"] and item.head.problem is not None
        return
    reasons = list(_reasons(verdict))
    verdict["reasons"] = [{k: r[k] for k in ("watch", "verdict", "text")} for r in reasons]
    found = {reason["verdict"] for reason in reasons}
    order = ("worse", "improved", "not comparable")
    verdict["verdict"] = next((v for v in order if v in found), "same")
    verdict["fails"] = verdict["guarded"] and verdict["verdict"] == "worse"


def _reasons(verdict: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Everything that makes a cell other than the same: ``watch``, ``verdict``, ``text``."""
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
    tests = verdict["accuracy"]["tests"]
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
    better = any(test["verdict"] == "improved" for test in overall)
    retrained = any(cause["what"] == "weights" for cause in verdict["causes"])
    # Other weights may well lean to one side, and a shift that helps is a repair.
    if verdict["exactness"]["shift"] is not None and not better and not retrained:
        dx, dy = verdict["exactness"]["shift"]
        yield {
            "watch": "exactness",
            "verdict": "worse",
            "text": f"most points moved the same way, by ({dx:+.2f}, {dy:+.2f}) px",
        }
    for name, title in (("seconds", "s per pair"), ("memory", "MiB at most")):
        entry = (verdict["cost"] or {}).get(name)
        if entry and entry["verdict"] != "same":
            yield {
                "watch": "cost",
                "verdict": entry["verdict"],
                "text": (
                    f"{entry['head']:.3g} instead of {entry['base']:.3g} {title}: ratio "
                    f"{entry['ratio']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
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
