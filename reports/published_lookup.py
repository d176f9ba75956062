"""Published figures of any method: what was printed, where, and where sources disagree. Torch-free.

``reports/published/figures.csv`` holds one printed figure a row, ``sources.csv`` where each source
was read. None of them was measured here. Figures that reached us through third parties only are not
in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd

from nemf.datasets import dataset_class
from nemf.errors import NemfError, did_you_mean
from nemf.scoring import Protocol
from reports.published_figures import PUBLISHED

# What papers call the lengths of our protocols.
_HEADINGS = {
    "bbox": "bbox",
    "image": "img",
    "kps_extent": "bbox-kp",
    "kps_extent_padded": "bbox",
    "kps_extent_padded_2": "bbox",
}
_LIKE = ["method", "dataset", "class", "base", "alpha", "averaging"]  # figures to agree
_MADE = ["backbone", "supervision", "training"]  # what may explain that they do not


@cache
def published_figures() -> pd.DataFrame:
    """Every printed figure: ``method``, ``venue``, ``year``, ``arxiv``, ``dataset``, ``class`` (or
    "all"), ``base`` as the source heads it, ``alpha``, ``averaging`` ("not stated" where the source
    does not say), ``pck_percent``, ``backbone``, ``supervision``, ``training``,
    ``eval_resolution``, ``source``, ``read_from`` and ``note``; texts are empty where unknown."""
    figures = pd.read_csv(
        PUBLISHED / "figures.csv",
        dtype={"alpha": float, "pck_percent": float},
        keep_default_na=False,
    ).astype({"year": str})
    sources = pd.read_csv(PUBLISHED / "sources.csv", keep_default_na=False)
    return figures.merge(sources, on="source", how="left", validate="many_to_one")


def look_up(
    methods: Sequence[str] = (),
    *,
    dataset: str | None = None,
    group: str | None = "all",
    alpha: float | None = None,
    protocol: Protocol | None = None,
) -> pd.DataFrame:
    """The printed figures that fit, with ``conflict``: other values printed for the same thing.

    ``methods``: names as the papers print them, upper or lower case; all by default. ``group``: a
    class, "all" for figures over all pairs, None for both. ``protocol`` keeps figures over the
    protocol's threshold length and averaging; direction and frame of a figure are its own code's,
    and sources rarely state them.

    NemfError for a method or dataset that nothing is printed of.
    """
    figures = published_figures()
    names = {name.casefold(): name for name in figures["method"].unique()}
    for method in methods:
        if method.casefold() not in names:
            raise NemfError(
                f"no published figure of {method!r}{did_you_mean(method, names.values())}; there "
                f"are {', '.join(sorted(names.values(), key=str.casefold))}"
            )
    if dataset is not None:
        dataset_class(dataset)
    fits = pd.Series(True, figures.index)
    if methods:
        fits &= figures["method"].isin([names[m.casefold()] for m in methods])
    for column, value in (("dataset", dataset), ("class", group), ("alpha", alpha)):
        if value is not None:
            fits &= figures[column] == value
    if protocol is not None:
        fits &= figures["averaging"] == protocol.averaging
        layouts = {name: dataset_class(name).layout for name in figures["dataset"].unique()}
        bases = {name: _HEADINGS[protocol.bases[layout]] for name, layout in layouts.items()}
        fits &= figures["base"] == figures["dataset"].map(bases)
    found = figures[fits].reset_index(drop=True)
    alike: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for row in figures.to_dict("records"):
        alike.setdefault(_subject(row), []).append(row)
    found["conflict"] = [_conflict(row, alike[_subject(row)]) for row in found.to_dict("records")]
    return found


def _subject(row: dict[str, Any]) -> tuple[object, ...]:
    return tuple(row[column] for column in _LIKE)


def _conflict(row: dict[str, Any], alike: Sequence[dict[str, Any]]) -> str:
    """Other values of the same figure, with their source and what they were made with."""
    told = []
    for other in alike:
        if other["pck_percent"] != row["pck_percent"]:
            made = ", ".join(other[k] for k in _MADE if other[k] and other[k] != row[k])
            made = f" ({made})" if made else ""
            told.append(f"{other['pck_percent']:g} in {other['source']}{made}")
    return "; ".join(dict.fromkeys(told))
