"""Best and second of a table's column, and which rows are not shown to differ from the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemf.errors import NemfError
from reports.records import PairScores, alpha_name
from reports.statistics import Estimate, dyadic_mean, holm, paired_difference

CLASS_MEAN = "class mean"
_TIE = 1e-9  # means this close differ by the order of summation only

ScoresOf = Callable[[dict[str, Any]], PairScores]


@dataclass(frozen=True, eq=False)
class Contender:
    """A measured cell of a column: its ``entry`` (pck, low, high), the ``record`` it comes from,
    its ``group`` ("all", a class, or the class mean) and ``alpha``."""

    entry: dict[str, Any]
    record: dict[str, Any]
    group: str
    alpha: float


def places(values: Sequence[float]) -> list[str | None]:
    """ "best", "second" or None for each value; equal values share a place, and alone there is
    none."""
    if len(values) < 2:
        return [None] * len(values)
    best = max(values)
    rest = [value for value in values if value < best - _TIE]
    second = max(rest, default=None)
    return [
        "best"
        if value >= best - _TIE
        else "second"
        if second is not None and value >= second - _TIE
        else None
        for value in values
    ]


def rank_columns(
    columns: Sequence[Sequence[Contender]],
    *,
    averaging: str,
    level: float,
    scores_of: ScoresOf | None,
) -> int:
    """Sets ``rank`` ("best", "second", None), ``same`` and ``p_best`` of every contender's entry;
    returns the number of comparisons made. Alone in its column, a cell is not ranked.

    Each column holds cells that may be compared: one dataset, protocol, group and alpha. ``same``
    says that no difference from the column's best is shown. With per-pair scores that is decided by
    the paired test of :func:`reports.statistics.paired_difference` on the column's pairs, Holm-
    adjusted (``p_best``) over all columns given; a difference is shown if p < 1 - level. Without
    (``scores_of=None``) by whether the two intervals overlap, which finds fewer differences, and
    ``p_best`` is None. Where no test or interval exists, no difference is shown.
    """
    compared: list[tuple[Contender, Contender]] = []
    for column in columns:
        ranks = places([contender.entry["pck"] for contender in column])
        for contender, rank in zip(column, ranks, strict=True):
            contender.entry.update(rank=rank, same=False if rank == "best" else None, p_best=None)
        if "best" in ranks:
            best = column[ranks.index("best")]
            compared += [(best, c) for c in column if c.entry["rank"] != "best"]
    if scores_of is None:
        for best, other in compared:
            other.entry["same"] = _overlap(best.entry, other.entry)
        return len(compared)
    p_values = holm([_p_value(best, other, averaging, scores_of) for best, other in compared])
    for (_, other), p_value in zip(compared, p_values, strict=True):
        other.entry["p_best"] = None if np.isnan(p_value) else float(p_value)
        other.entry["same"] = not p_value < 1 - level
    return len(compared)


def class_mean(scores: PairScores, alpha: float, *, averaging: str, level: float) -> Estimate:
    """The mean over classes of their means, every class counting alike, with its interval."""
    values, a, b, weights = _sample(scores, CLASS_MEAN, alpha, averaging)
    return dyadic_mean(values, a, b, weights=weights, level=level, bounds=(0.0, 1.0))


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if None in (one["low"], other["low"]):
        return True
    return one["low"] <= other["high"] and other["low"] <= one["high"]


def _p_value(best: Contender, other: Contender, averaging: str, scores_of: ScoresOf) -> float:
    of_best, of_other = scores_of(best.record), scores_of(other.record)
    if list(of_best.frame["pair"]) != list(of_other.frame["pair"]):
        labels = (c.record["predictions"]["matcher"]["label"] for c in (best, other))
        raise NemfError(f"{' and '.join(map(repr, labels))} were not predicted on the same pairs")
    values, a, b, weights = _sample(of_best, best.group, best.alpha, averaging)
    others = _sample(of_other, best.group, best.alpha, averaging)[0]
    return paired_difference(values, others, a, b, weights=weights).p_value


def _sample(
    scores: PairScores, group: str, alpha: float, averaging: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Fractions correct of a group's pairs, codes of their two images, and the pairs' weights."""
    frame = scores.frame
    if group not in ("all", CLASS_MEAN):
        frame = frame[frame["category"] == group]
    n = frame["n"].to_numpy()
    weights = n.astype(np.float64) if averaging == "point" else np.ones(len(frame))
    if group == CLASS_MEAN:
        codes = frame["category"].cat.codes.to_numpy()
        weights = weights / np.bincount(codes, weights)[codes]
    values = frame[alpha_name(alpha)].to_numpy() / n
    return values, frame["image_a"].to_numpy(), frame["image_b"].to_numpy(), weights
