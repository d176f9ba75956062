"""Matching two photographs of one's own: which points, which matchers, with which weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.configurations import fill_weights, load_config
from nemf.errors import NemfError, WeightsNotFound
from nemf.matcher import SLACK_PX, Matcher, build_matcher, match
from nemf.pairs import Matches, Size
from nemf.reading import read_json, read_within

log = logging.getLogger(__name__)

# Tried in this order where no matcher is named: the first whose weights are there. The last one's
# come with the suite.
PREFERRED = ("dinov2_visual_ai", "hpf_resnet101", "hpf_resnet18", "hpf_small")
_SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True, eq=False)
class Chosen:
    """A built matcher: ``name`` of its config, ``label`` of its row, ``weights_file`` (None: it
    needs none, or they are random)."""

    name: str
    label: str
    matcher: Matcher
    weights_file: Path | None

    @property
    def shipped(self) -> bool:
        """Whether it runs on the small CNN that comes with the suite."""
        return self.weights_file is not None and self.weights_file.parent == _SHIPPED.resolve()

    def described(self) -> str:
        """A sentence: what it is and on which weights it runs."""
        if self.matcher.random_weights:
            on = "with RANDOM weights"
        elif self.weights_file is None:
            on = "without weights"
        elif self.shipped:
            on = (
                f"on {self.weights_file.name}, which comes with nemf and knows rendered objects "
                "only: on photographs expect little (--weights FOLDER or --download give better)"
            )
        else:
            on = f"on {self.weights_file}"
        return f"{self.name}: {self.label}, {on}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "matcher": self.name,
            "label": self.label,
            "weights": {
                "file": None if self.weights_file is None else str(self.weights_file),
                "sha256": self.matcher.weights_hash,
                "random": self.matcher.random_weights,
                "shipped": self.shipped,
            },
        }


def chosen_matchers(names: Sequence[str], options: dict[str, Any], out: Path) -> list[Chosen]:
    """The matchers of these configs, or the first of :data:`PREFERRED` whose weights are there.
    ``out``: where trainings leave their weights. NemfError for an unknown config or for options of
    no named matcher, WeightsNotFound (with what to do) for a named one without weights."""
    if names:
        return [_built(name, options, out) for name in dict.fromkeys(names)]
    if options:
        raise NemfError("--cfg-options are a matcher's own: name it with --matcher")
    for name in PREFERRED[:-1]:
        try:
            return [_built(name, options, out)]
        except WeightsNotFound as problem:
            log.debug("%s is not used: %s", name, problem)
    return [_built(PREFERRED[-1], options, out)]


def _built(name: str, options: dict[str, Any], out: Path) -> Chosen:
    config = load_config(f"{name}/folder", options)
    try:
        fill_weights(config, out)
        model = dict(config.model)
        matcher = build_matcher(model.pop("type"), **model)
    except WeightsNotFound as problem:
        raise WeightsNotFound(f"{name}: {problem}") from None
    found = [getattr(module, "weights_file", None) for module in matcher.modules()]
    file = config.model.get("weights") or next(filter(None, found), None)
    return Chosen(name, config.label, matcher, Path(file).resolve() if file else None)


def grid_points(size: Size, n: int) -> np.ndarray:
    """float32 (n * n, 2) px: the middles of n x n equal parts of an image of (height, width)."""
    middles = (np.arange(n) + 0.5) / n
    x, y = np.meshgrid(middles * size[1] - 0.5, middles * size[0] - 0.5)
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)


def read_points(given: Sequence[str]) -> np.ndarray:
    """float32 (N, 2) px: each entry holds points ("120,80 64.5,33") or names a file with them.

    Files: JSON (a list of [x, y], or what ``nemf match --json`` printed) or text (x and y in each
    line, by comma or blank; a header and lines that begin with # are left out). NemfError for
    anything else.
    """
    points: list[list[float]] = []
    for entry in given:
        path = Path(entry)
        points += _file_points(path) if path.is_file() else _typed_points(entry)
    array = np.asarray(points, np.float64)
    if not np.isfinite(array).all():
        k = int(np.argmin(np.isfinite(array).all(1)))
        raise NemfError(f"points must be finite numbers, but point {k + 1} is {points[k]}")
    return array.astype(np.float32)


def _typed_points(text: str) -> list[list[float]]:
    try:
        points = [[float(v) for v in point.split(",")] for point in text.split()]
        if not points or any(len(point) != 2 for point in points):
            raise ValueError
    except ValueError:
        seems = Path(text).suffix.lower() in (".csv", ".json", ".txt")
        absent = "there is no such file; " if seems else ""
        raise NemfError(
            f"--points {text!r}: {absent}expected e.g. '120,80 64.5,33', or a file with points"
        ) from None
    return points


def _file_points(path: Path) -> list[list[float]]:
    if path.suffix.lower() == ".json":
        content = read_json(path)
        points = content.get("points") if isinstance(content, dict) else content
        lines = [(f"entry {k}", point) for k, point in enumerate(points or [], 1)]
    else:
        try:
            text = read_within(path).decode("utf-8")
        except (OSError, ValueError) as problem:
            raise NemfError(f"{path}: cannot be read ({problem})") from None
        lines = [
            (f"line {k}", line.replace(",", " ").split())
            for k, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.startswith("#")
        ]
        if lines and [word.lower() for word in lines[0][1]] == ["x", "y"]:
            del lines[0]
    points = []
    for where, point in lines:
        try:
            x, y = (float(v) for v in point)
        except (TypeError, ValueError):
            raise NemfError(f"{path} {where}: expected x and y, not {point!r}") from None
        points.append([x, y])
    if not points:
        raise NemfError(f"{path}: holds no points")
    return points


def check_inside(points: np.ndarray, size: Size, name: str) -> None:
    """NemfError for a point outside an image of (height, width)."""
    height, width = size
    for k, (x, y) in enumerate(points.tolist(), 1):
        if not (-SLACK_PX <= x <= width - 1 + SLACK_PX and -SLACK_PX <= y <= height - 1 + SLACK_PX):
            raise NemfError(f"point {k} ({x:g}, {y:g}) lies outside {name} ({width}x{height})")


def answers(
    chosen: Chosen, query: np.ndarray, reference: np.ndarray, points: np.ndarray
) -> Matches:
    """That matcher's :func:`nemf.match`, with its name in errors."""
    try:
        return match(chosen.matcher, query, reference, points)
    except NemfError as problem:
        raise NemfError(f"{chosen.name}: {problem}") from None
