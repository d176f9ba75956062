"""The policy of regression tracking, ``experiments/regress.yaml``: what is run and watched, and
what counts as a change. docs/regressions.md explains every entry.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_type_hints

from nemf.errors import NemfError
from nemf.reading import read_yaml
from nemf.scoring import check_alphas


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
    """What is run. ``data``: ``{"synthetic": preset}`` or ``{"folder": path}``; ``real``: the
    datasets where real ones are given in place of ``data``; ``renamed``: the former name of a
    matcher config by its new one."""

    data: dict[str, str]
    threads: int
    matchers: tuple[str, ...]
    datasets: tuple[str, ...]
    real: tuple[str, ...]
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
    """``unexplained_share``: how many of the points may move though nothing that makes them
    differs, as a fraction: another processor rounds otherwise."""

    tolerance_px: float
    shift_px: float
    unexplained_share: float


@dataclass(frozen=True)
class CostRule:
    """``predictions``: which matcher/dataset are timed; the ratios are limits, above 1; ``level``
    holds for all looks at the growing number of rounds together."""

    predictions: tuple[str, ...]
    rounds: int
    most_rounds: int
    blocks: int
    pairs: int
    level: float
    seconds_ratio: float
    memory_ratio: float

    @property
    def looks(self) -> list[int]:
        """After how many rounds one looks whether they decide: twice as many each time."""
        looks = [self.rounds]
        while looks[-1] < self.most_rounds:
            looks.append(min(2 * looks[-1], self.most_rounds))
        return looks

    @property
    def look_level(self) -> float:
        """Level of the interval at one look (Bonferroni)."""
        return 1 - (1 - self.level) / len(self.looks)


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
        if not path.exists():
            raise NemfError(f"{path}: no such policy file")
        content = read_yaml(path)
        try:
            policy = _build(cls, content, "")
            _check(policy)
        except NemfError as problem:
            raise NemfError(f"{path}: {problem}") from None
        return policy

    def cells(self, real: bool = False) -> list[Cell]:
        """``real``: where real datasets are given. There `copy` is left out: its answers are the
        annotations in other words, and those of others are not published with the accepted ones."""
        suite = self.suite
        datasets = suite.real if real else suite.datasets
        matchers = [name for name in suite.matchers if not (real and name == "copy")]
        return [Cell(*parts) for parts in itertools.product(matchers, datasets, suite.protocols)]

    def guards(self, cell: Cell) -> bool:
        return any(fnmatchcase(str(cell), pattern) for pattern in self.guard)


def _build(kind: type, content: Any, where: str) -> Any:
    """``content`` of a YAML mapping as the dataclass ``kind``."""
    if not isinstance(content, dict):
        raise NemfError(f"{where or 'the file'} must be a mapping, not {content!r}")
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    wrong = [
        f"{problem} {', '.join(sorted(map(str, keys)))}"
        for problem, keys in (
            ("lacks", names - set(content)),
            ("has unknown", set(content) - names),
        )
        if keys
    ]
    if wrong:
        raise NemfError(f"{where or 'the file'} {' and '.join(wrong)}")
    return kind(**{n: _value(hints[n], content[n], f"{where}.{n}".strip(".")) for n in names})


def _value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, where)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and type(value) is int:
        return value
    if hint is float and number and abs(value) < sys.float_info.max:  # nor an endless integer
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
    for name in ("matchers", "datasets", "real", "protocols"):
        values = getattr(suite, name)
        if not values or len(set(values)) < len(values):
            raise NemfError(f"suite.{name} must name at least one, each once")
    for where, number, least in (
        ("suite.threads", suite.threads, 1),
        ("cost.rounds", cost.rounds, 2),
        ("cost.most_rounds", cost.most_rounds, cost.rounds),
        ("cost.blocks", cost.blocks, 1),
        ("cost.pairs", cost.pairs, 1),
        ("accuracy.least_change", policy.accuracy.least_change, 0),
        ("accuracy.least_class_change", policy.accuracy.least_class_change, 0),
        ("exactness.tolerance_px", policy.exactness.tolerance_px, 0),
        ("exactness.shift_px", policy.exactness.shift_px, 0),
        ("exactness.unexplained_share", policy.exactness.unexplained_share, 0),
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
    cells = [*policy.cells(), *policy.cells(real=True)]
    known = {cell.prediction for cell in cells}
    if foreign := set(cost.predictions) - known:
        raise NemfError(f"cost.predictions names {', '.join(sorted(foreign))}, which is not run")
    if idle := [p for p in policy.guard if not any(fnmatchcase(str(c), p) for c in cells)]:
        raise NemfError(f"guard pattern {idle[0]!r} fits no cell")
