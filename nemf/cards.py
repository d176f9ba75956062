"""Matcher cards: what a method is, as torch-free data, and the list of installed methods.

A matcher's module holds its card as a literal, ``CARD = MatcherCard(name="...", ...)``. Cards are
read from the source by parsing it, so listing methods imports neither torch nor the matcher.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from nemf.errors import NemfError, did_you_mean

GROUP = "nemf.matchers"


@dataclass(frozen=True)
class MatcherCard:
    """A method's card. ``training``: "none" for training-free methods. ``oracle_class``: the method
    uses the true category, which tables mark. ``official_protocol``: the protocol id that the
    method's paper reports. ``published_as``: its name in the published tables, if it is there.
    ``flow_resolution``: as Table 1 prints it, or None. ``weights_at``: where what it runs on is
    published, or why there is nothing."""

    name: str
    title: str
    paper: str
    year: int | None
    arxiv: str | None
    licence_of_original: str
    backbone: str
    input_size: str
    training: str
    official_protocol: str
    description: str
    published_as: str | None = None
    flow_resolution: str | None = None
    oracle_class: bool = False
    weights_at: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def _entry_points() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise NemfError(
                f"two installed packages register a matcher {point.name!r} ({other.value} and "
                f"{point.value}): uninstall one"
            )
    return found


def matcher_entry_point(name: str) -> EntryPoint:
    """The entry point of a registered matcher; NemfError naming the known ones otherwise."""
    points = _entry_points()
    if not points:
        raise NemfError("no matcher is registered: install the project (`make setup`)")
    if name not in points:
        raise NemfError(
            f"unknown matcher {name!r}{did_you_mean(name, points)}: choose one of "
            f"{', '.join(sorted(points))}; a new one needs its line under "
            f'[project.entry-points."{GROUP}"] in '
            "its pyproject.toml and `pip install -e .` once more"
        )
    return points[name]


def available_matchers() -> dict[str, MatcherCard]:
    """Card of every registered matcher by name, sorted; loads no torch.

    Raises NemfError where a registered module is missing or holds no readable card.
    """
    return {name: _card(point) for name, point in sorted(_entry_points().items())}


def _card(point: EntryPoint) -> MatcherCard:
    try:
        spec = importlib.util.find_spec(point.module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise NemfError(
            f"matcher {point.name!r}: module {point.module} cannot be found; reinstall its package"
        )
    return read_card(Path(spec.origin))


def read_card(module_file: Path) -> MatcherCard:
    """The ``CARD`` literal of a matcher's source file, without importing it."""
    tree = ast.parse(module_file.read_text(encoding="utf-8"), filename=str(module_file))
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets)
            and isinstance(node.value, ast.Call)
        ):
            try:
                fields = {k.arg: ast.literal_eval(k.value) for k in node.value.keywords if k.arg}
                return MatcherCard(**fields)
            except (ValueError, TypeError) as problem:
                raise NemfError(
                    f"{module_file}: CARD must be MatcherCard(...) with literal keywords: {problem}"
                ) from None
    raise NemfError(f"{module_file}: holds no CARD = MatcherCard(...)")
