"""Published figures: what papers print (``reports/published/*.yaml``), never measured here, and
which measured record one of them may be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemf.errors import NemfError
from nemf.reading import read_yaml

PUBLISHED = Path(__file__).parent / "published"


@dataclass(frozen=True)
class PublishedMethod:
    """One row of a published table. ``figures``: PCK in percent by (dataset, group, alpha), the
    group being "all" (pairs) or a class. ``measured_as``: what a measured row must be made of to be
    compared with it, or None where that is not known: ``protocol``, ``backbone``, ``layers`` by
    dataset, and ``weights_sha256`` by dataset (None: training-free, so not checked)."""

    name: str
    venue: str
    year: int
    eval_resolution: str | None
    flow_resolution: str | None
    figures: dict[tuple[str, str, float], float]
    note: str | None = None
    measured_as: dict[str, Any] | None = None


@dataclass(frozen=True)
class PublishedTable:
    """A published table: where its figures were printed, of which split, how they average, over
    which threshold base they are taken by dataset."""

    source: str
    split: str
    averaging: str
    bases: dict[str, str]
    methods: list[PublishedMethod]

    @classmethod
    def load(cls, name: str) -> PublishedTable:
        """A file of ``reports/published`` by name; NemfError if there is none of that name."""
        files = {file.name: file for file in sorted(PUBLISHED.glob("*.yaml"))}
        if name not in files:
            raise NemfError(f"published must be null or one of {', '.join(files)}, not {name!r}")
        content = read_yaml(files[name])
        methods = [
            PublishedMethod(
                name=method["method"],
                venue=method["venue"],
                year=method["year"],
                eval_resolution=method.get("eval_resolution"),
                flow_resolution=method.get("flow_resolution"),
                figures=_figures(method),
                note=method.get("note"),
                measured_as=method.get("measured_as"),
            )
            for method in content["methods"]
        ]
        return cls(
            content["source"], content["split"], content["averaging"], content["bases"], methods
        )

    def counterpart(self, record: dict[str, Any]) -> tuple[PublishedMethod | None, str | None]:
        """(the method whose figures a score record may be compared with, None), or (None, why
        not); (None, None) where nobody would expect it: a method or dataset that is not published
        here, or a protocol that is not the method's own."""
        meta = record["predictions"]
        dataset, matcher = meta["dataset"], meta["matcher"]
        published_as = matcher.get("card", {}).get("published_as")
        method = next((m for m in self.methods if m.name == published_as), None)
        if method is None or not any(where == dataset for where, _, _ in method.figures):
            return None, None
        made = method.measured_as
        if made is None or made["protocol"] != record["protocol"]["id"]:
            return None, None
        reason = _difference(record, made, self.bases[dataset])
        return (None, reason) if reason else (method, None)


def _figures(method: dict[str, Any]) -> dict[tuple[str, str, float], float]:
    figures = {
        (dataset, "all", alpha): value
        for dataset, by_alpha in method.get("pck", {}).items()
        for alpha, value in by_alpha.items()
    }
    for dataset, by_alpha in method.get("classes", {}).items():
        for alpha, by_class in by_alpha.items():
            figures |= {(dataset, name, alpha): value for name, value in by_class.items()}
    return figures


def _difference(record: dict[str, Any], made: dict[str, Any], base: str) -> str | None:
    """What sets a record apart from what a figure was measured with, or None if nothing does."""
    meta = record["predictions"]
    dataset, matcher = meta["dataset"], meta["matcher"]
    config = matcher.get("config", {})
    if config.get("backbone") != made["backbone"]:
        return f"backbone {config.get('backbone')} instead of {made['backbone']}"
    layers = made.get("layers", {}).get(dataset)
    if layers is not None and list(config.get("layers", ())) != layers:
        return f"layers {_commas(config.get('layers', ()))} instead of {_commas(layers)}"
    if matcher.get("random_weights"):
        return "random weights"
    weights = made["weights_sha256"]
    if weights is not None and matcher.get("weights_sha256") not in weights.get(dataset, ()):
        return "weights not known to be the authors'"
    here = record["protocol"]["bases"][meta["layout"]]
    if here != base:
        return f"threshold over {here} instead of {base}".replace("_", " ")
    if meta["n_pairs"] != meta["official_pairs"]:
        return f"{meta['n_pairs']} of {meta['official_pairs']} pairs"
    return None


def _commas(layers: Any) -> str:
    return ",".join(map(str, layers))
