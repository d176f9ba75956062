"""Tables from score records: what a specification asks for, ranked, compared and footnoted.

Measured and published figures are never mixed silently: every row says which it is, the two are
ranked apart, measured cells carry their interval, and the footnotes say how each number was
obtained. A table is all real or all synthetic. How to read one: docs/tables.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from nemf.datasets import dataset_class
from nemf.errors import NemfError
from nemf.reading import read_yaml
from nemf.scoring import check_alphas, get_protocol
from reports.published_figures import PublishedMethod, PublishedTable
from reports.ranking import CLASS_MEAN, Contender, ScoresOf, class_mean, places, rank_columns
from reports.records import PairScores
from reports.table_files import Column, Table, value_key
from reports.wording import SAYS_NOTHING, code_text, is_part

KINDS = ("datasets", "classes")
_BASES = {"bbox": "bbox", "image": "img"} | dict.fromkeys(
    ("kps_extent", "kps_extent_padded", "kps_extent_padded_2"), "bbox-kp"
)
_REFERENCES = ("copy", "oracle-grid")  # the floor and the ceilings, no methods
_SHORT = {  # as the paper heads its columns
    "aeroplane": "aero", "bicycle": "bike", "motorbike": "mbike", "pottedplant": "plant",
    "tvmonitor": "tv",
}  # fmt: skip


@dataclass(frozen=True)
class TableSpec:
    """A table's specification file (``experiments/tables/*.yaml``), see the comments there.

    ``kind``: the columns are "datasets" at every alpha, or the "classes" of one dataset at one.
    """

    name: str
    kind: str
    title: str
    split: str
    alphas: tuple[float, ...]
    averaging: str
    columns: tuple[str, ...]
    extra_columns: tuple[str, ...]
    protocols: tuple[str, ...]
    matchers: dict[str, tuple[str, ...]]
    oracle_grids: tuple[int, ...]
    published: str | None

    def rows(self, *, synthetic: bool, full: bool = False) -> tuple[str, ...]:
        """The matcher configs of a real or a synthetic table, with ``full`` all that it knows."""
        more = self.matchers.get("synthetic_full", ()) if synthetic and full else ()
        return (*self.matchers["synthetic" if synthetic else "real"], *more)

    @classmethod
    def load(cls, path: Path) -> TableSpec:
        """NemfError naming the file for anything missing, unknown or malformed."""
        content = read_yaml(path, "a table specification")
        if not isinstance(content, dict):
            raise NemfError(f"{path}: must be a mapping")
        known = {f.name for f in fields(cls)}
        for problem, keys in (("lacks", known - set(content)), ("unknown", set(content) - known)):
            if keys:
                raise NemfError(f"{path}: {problem} {', '.join(sorted(map(str, keys)))}")
        try:
            return cls(**_checked(content))
        except NemfError as problem:
            raise NemfError(f"{path}: {problem}") from None


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """The entries of a specification in the types of :class:`TableSpec`, or NemfError."""
    checked = dict(content)
    for key in ("name", "title", "split"):
        if not isinstance(content[key], str) or not content[key]:
            raise NemfError(f"{key} must be a text, not {content[key]!r}")
    if content["kind"] not in KINDS:
        raise NemfError(f"kind must be datasets or classes, not {content['kind']!r}")
    if content["averaging"] not in ("image", "point"):
        raise NemfError(f"averaging must be image or point, not {content['averaging']!r}")
    for key in ("columns", "extra_columns", "protocols"):
        checked[key] = _texts(key, content[key])
    for dataset in checked["columns"] + checked["extra_columns"]:
        dataset_class(dataset)
    for protocol in checked["protocols"]:
        if protocol != "paper":
            get_protocol(protocol)
    matchers = content["matchers"]
    kinds = set(matchers) if isinstance(matchers, dict) else set()
    if kinds - {"synthetic_full"} != {"real", "synthetic"}:
        raise NemfError(
            "matchers must list those for real and for synthetic, and may list synthetic_full; "
            f"not {matchers!r}"
        )
    checked["matchers"] = {kind: _texts("matchers", names) for kind, names in matchers.items()}
    grids = content["oracle_grids"]
    if not isinstance(grids, list) or not all(type(g) is int and g > 0 for g in grids):
        raise NemfError(f"oracle_grids must be a list of positive integers, not {grids!r}")
    checked["oracle_grids"] = tuple(grids)
    alphas = content["alphas"]
    if not isinstance(alphas, list):
        raise NemfError(f"alphas must be a list of numbers, not {alphas!r}")
    checked["alphas"] = check_alphas(alphas)
    if content["published"] is not None:
        PublishedTable.load(str(content["published"]))
    counts = [len(checked[key]) for key in ("columns", "extra_columns", "alphas")]
    if content["kind"] == "classes" and counts != [1, 0, 1]:
        raise NemfError("a table of classes has one dataset in columns, no other, and one alpha")
    return checked


def _texts(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise NemfError(f"{key} must be a list of names, not {value!r}")
    return tuple(value)


def build_table(
    spec: TableSpec,
    records: Sequence[dict[str, Any]],
    *,
    synthetic: bool,
    missing: Iterable[str] = (),
    scores_of: ScoresOf | None = None,
) -> Table:
    """The table of a specification from score records of one kind (real or synthetic).

    Rows appear in the order of the labels given by the records' position; published rows (real
    tables only) come first, in the paper's order. ``missing``: sentences on what was not measured.
    ``scores_of`` gives a record's per-pair scores, for paired tests against the best and for the
    interval of the class mean; without it the intervals alone decide, and the class mean has none.

    Records under a protocol that the specification does not name are left out, except those of
    predictions made elsewhere, whose protocol the user chose.

    NemfError if no record fits, if two records of a column come from different versions of a
    dataset (their fingerprints differ), if a record lacks an alpha, or if the published figures
    are averaged differently or of another split.
    """
    fitting = [
        r
        for r in records
        if r["predictions"]["synthetic"] == synthetic and r["predictions"]["split"] == spec.split
    ]
    shown = [*spec.columns, *spec.extra_columns]
    fitting = [r for r in fitting if r["predictions"]["dataset"] in shown and _belongs(r, spec)]
    if not fitting:
        kind = "synthetic" if synthetic else "real"
        raise NemfError(
            f"no {kind} score record for {spec.name}: run `nemf predict` and `nemf score`"
        )
    _one_fingerprint_per_dataset(fitting)
    _one_method_per_label(fitting)
    _every_alpha(fitting, spec)
    scores_of = _remembered(scores_of) if scores_of else None
    published = None if synthetic else _load_published(spec)
    measured = {r["predictions"]["dataset"] for r in fitting}
    datasets = [*spec.columns, *(d for d in spec.extra_columns if d in measured)]
    groups = _groups(spec, fitting, published)
    printed = _published_rows(published, datasets, groups, spec) if published else []
    rows, cells = _measured_rows(fitting, groups, spec, scores_of)
    comparisons = rank_columns(
        _rankable(cells), averaging=spec.averaging, level=fitting[0]["level"], scores_of=scores_of
    )
    for cell in cells:
        _compare_with_published(cell, published)
    headings = {d: _heading(d, fitting, synthetic) for d in datasets}
    columns = _columns(spec, datasets, groups, headings, cells)
    return Table(
        name=spec.name,
        title=_title(spec, fitting, synthetic),
        alphas=spec.alphas,
        datasets=datasets,
        headings=headings,
        rows=[*printed, *rows],
        cells=_cell_frame(printed, cells, published, spec),
        footnotes=[
            *_number_notes(fitting, spec),
            *_published_notes(published, printed, spec),
            *_rank_notes(fitting, cells, comparisons, scores_of is not None),
            *_delta_notes(fitting, cells, published),
            *_provenance_notes(fitting, rows, spec),
            *(f"Not measured: {sentence}" for sentence in missing),
        ],
        columns=columns,
        labels={"method": "Method", "origin": "Origin", "protocol": "Protocol"}
        | (
            {"eval_resolution": "Eval. reso.", "flow_resolution": "Flow reso."}
            if spec.kind == "datasets"
            else {}
        ),
    )


def _remembered(scores_of: ScoresOf) -> ScoresOf:
    """``scores_of`` that is asked once for each record."""
    known: dict[int, PairScores] = {}

    def ask(record: dict[str, Any]) -> PairScores:
        if id(record) not in known:
            known[id(record)] = scores_of(record)
        return known[id(record)]

    return ask


# -- which records ---------------------------------------------------------------------------------


def _belongs(record: dict[str, Any], spec: TableSpec) -> bool:
    """Whether the specification asks for the record's protocol."""
    matcher, protocol = record["predictions"]["matcher"], record["protocol"]["id"]
    if matcher.get("external"):
        return True
    official = matcher.get("card", {}).get("official_protocol")
    return protocol in spec.protocols or ("paper" in spec.protocols and protocol == official)


def _every_alpha(records: Sequence[dict[str, Any]], spec: TableSpec) -> None:
    for record in records:
        absent = [f"{alpha:g}" for alpha in spec.alphas if alpha not in record["alphas"]]
        if absent:
            meta = record["predictions"]
            raise NemfError(
                f"{meta['matcher']['label']!r} on {meta['title']} is not scored at alpha "
                f"{', '.join(absent)}: run `nemf score --table` with the table's name"
            )


def _one_fingerprint_per_dataset(records: Sequence[dict[str, Any]]) -> None:
    seen: dict[str, dict[str, Any]] = {}
    for record in records:
        meta = record["predictions"]
        first = seen.setdefault(meta["dataset"], meta)
        if first["fingerprint"] != meta["fingerprint"]:
            raise NemfError(
                f"{meta['title']}: {first['matcher']['label']!r} was predicted on "
                f"{first['fingerprint'][:12]} ({first['n_pairs']} pairs) but "
                f"{meta['matcher']['label']!r} on {meta['fingerprint'][:12]} ({meta['n_pairs']} "
                "pairs): predict both on one version of the dataset, or use another OUT="
            )


def _one_method_per_label(records: Sequence[dict[str, Any]]) -> None:
    """NemfError if a label stands for two methods: ours and one made elsewhere, or two configs."""
    seen: dict[str, dict[str, Any]] = {}
    for record in records:
        meta = record["predictions"]
        first = seen.setdefault(meta["matcher"]["label"], meta)
        for key in ("external", "name", "config"):
            if first["matcher"].get(key) != meta["matcher"].get(key):
                raise NemfError(
                    f"{meta['matcher']['label']!r} stands for two methods ({key} differs between "
                    f"{first['title']} and {meta['title']}): give one another --label or --name"
                )


# -- rows and cells --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Cell:
    """A measured number on its way into a row and the CSV."""

    row: dict[str, Any]
    record: dict[str, Any]
    group: str
    entry: dict[str, Any]

    @property
    def meta(self) -> dict[str, Any]:
        return self.record["predictions"]

    @property
    def column(self) -> tuple[str, str, float]:
        return self.meta["dataset"], self.group, self.entry["alpha"]


def _groups(
    spec: TableSpec, records: Sequence[dict[str, Any]], published: PublishedTable | None
) -> list[str]:
    """What a dataset's figures are over: all pairs, and in a table of classes each class first."""
    if spec.kind == "datasets":
        return ["all"]
    classes = {e["value"] for r in records for e in r["metrics"] if e["group"] == "class"}
    for method in published.methods if published else ():
        classes |= {g for dataset, g, _ in method.figures if dataset in spec.columns and g != "all"}
    return [*sorted(classes), "all", CLASS_MEAN]


def _measured_rows(
    records: Sequence[dict[str, Any]],
    groups: Sequence[str],
    spec: TableSpec,
    scores_of: ScoresOf | None,
) -> tuple[list[dict[str, Any]], list[_Cell]]:
    rows, cells = [], []
    for (label, protocol), group_records in _grouped(records).items():
        matchers = [record["predictions"]["matcher"] for record in group_records]
        marks = []
        if any(m.get("random_weights") for m in matchers):
            marks.append("random weights")
        if any(m.get("card", {}).get("oracle_class") for m in matchers):
            marks.append("oracle class")
        row = {
            "method": label + (f" [{', '.join(marks)}]" if marks else ""),
            "origin": "external" if matchers[0].get("external") else "measured",
            "protocol": protocol,
            "eval_resolution": _eval_resolution(group_records[0]["protocol"]["frame"]),
            "flow_resolution": matchers[0].get("flow_resolution")
            or matchers[0].get("card", {}).get("flow_resolution"),
            "values": {},
        }
        rows.append(row)
        for record in group_records:
            entries = {
                (e["group"], e["value"], e["alpha"]): e
                for e in record["metrics"]
                if e["averaging"] == spec.averaging
            }
            for group in groups:
                for alpha in spec.alphas:
                    if group == CLASS_MEAN:
                        found = _class_mean(record, entries, alpha, spec, scores_of)
                    else:
                        kind = "all" if group == "all" else "class"
                        found = entries.get((kind, group, alpha))
                    if found is None:
                        continue
                    entry = found | {"rank": None, "same": None, "p_best": None, "delta": None}
                    cell = _Cell(row, record, group, entry)
                    row["values"][value_key(*cell.column)] = entry
                    cells.append(cell)
    return rows, cells


def _class_mean(
    record: dict[str, Any],
    entries: dict[tuple[str, str, float], dict[str, Any]],
    alpha: float,
    spec: TableSpec,
    scores_of: ScoresOf | None,
) -> dict[str, Any] | None:
    classes = [e["pck"] for (kind, _, a), e in entries.items() if kind == "class" and a == alpha]
    if not classes:
        return None
    interval = {"low": None, "high": None, "se": None}
    if scores_of:
        estimate = class_mean(
            scores_of(record), alpha, averaging=spec.averaging, level=record["level"]
        )
        found = {bound: getattr(estimate, bound) for bound in interval}
        interval = {bound: None if v != v else v for bound, v in found.items()}  # NaN
    return entries["all", "all", alpha] | {"pck": sum(classes) / len(classes)} | interval


def _grouped(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records by (matcher label, protocol): floors, then matchers, then ceilings; a matcher's own
    paper protocol before the others."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["predictions"]["matcher"]["label"], record["protocol"]["id"])
        groups.setdefault(key, []).append(record)
    order = list(dict.fromkeys(label for label, _ in groups))

    def rank(key: tuple[str, str]) -> tuple[bool, int, bool, str]:
        matcher = groups[key][0]["predictions"]["matcher"]
        own = matcher.get("card", {}).get("official_protocol") == key[1]
        return matcher["name"] == "oracle-grid", order.index(key[0]), not own, key[1]

    return {key: groups[key] for key in sorted(groups, key=rank)}


def _load_published(spec: TableSpec) -> PublishedTable | None:
    if spec.published is None:
        return None
    published = PublishedTable.load(spec.published)
    if published.averaging != spec.averaging:
        raise NemfError(
            f"{spec.published}: its figures are per-{published.averaging} means, {spec.name} "
            f"shows per-{spec.averaging} means: set published: null"
        )
    if published.split != spec.split:
        raise NemfError(
            f"{spec.published}: its figures are of the {published.split} split, {spec.name} shows "
            f"{spec.split}: set published: null"
        )
    return published


def _published_rows(
    published: PublishedTable, datasets: Sequence[str], groups: Sequence[str], spec: TableSpec
) -> list[dict[str, Any]]:
    """Rows of the methods with a figure to show, ranked column by column."""
    rows = []
    for method in published.methods:
        row = {
            "method": f"{method.name} ({method.venue} {method.year})",
            "origin": "published",
            "protocol": "its paper's",
            "eval_resolution": method.eval_resolution,
            "flow_resolution": method.flow_resolution,
            "values": {},
        }
        for dataset in datasets:
            for alpha in spec.alphas:
                for group in groups:
                    value = _published_value(method, dataset, group, alpha)
                    if value is not None:
                        row["values"][value_key(dataset, group, alpha)] = {
                            "pck": value / 100, "published": True, "dataset": dataset,
                            "group": group, "alpha": alpha, "rank": None,
                        }  # fmt: skip
        if row["values"]:
            rows.append(row)
    for key in {key for row in rows for key in row["values"]}:
        column = [row["values"][key] for row in rows if key in row["values"]]
        for entry, place in zip(column, places([e["pck"] for e in column]), strict=True):
            entry["rank"] = place
    return rows


def _published_value(
    method: PublishedMethod, dataset: str, group: str, alpha: float
) -> float | None:
    if group != CLASS_MEAN:
        return method.figures.get((dataset, group, alpha))
    classes = [
        value
        for (where, name, at), value in method.figures.items()
        if (where, at) == (dataset, alpha) and name != "all"
    ]
    return sum(classes) / len(classes) if classes else None


def _rankable(cells: Sequence[_Cell]) -> list[list[Contender]]:
    """The cells that may be compared, by column and protocol."""
    columns: dict[tuple[Any, ...], list[Contender]] = {}
    for cell in cells:
        if not _outside(cell.meta) and not is_part(cell.meta):
            column = columns.setdefault((*cell.column, cell.row["protocol"]), [])
            column.append(Contender(cell.entry, cell.record, cell.group, cell.entry["alpha"]))
    return list(columns.values())


def _outside(meta: dict[str, Any]) -> bool:
    """Whether a row takes no part in the ranking: no method, or not under equal conditions."""
    matcher = meta["matcher"]
    return bool(
        matcher["name"] in _REFERENCES
        or matcher.get("random_weights")
        or matcher.get("card", {}).get("oracle_class")
    )


def _compare_with_published(cell: _Cell, published: PublishedTable | None) -> None:
    method = published.counterpart(cell.record)[0] if published else None
    if method is not None and cell.group != CLASS_MEAN:
        figure = method.figures.get(cell.column)
        if figure is not None:
            cell.entry["published_pck"] = figure / 100
            cell.entry["delta"] = cell.entry["pck"] - figure / 100


def _columns(
    spec: TableSpec,
    datasets: Sequence[str],
    groups: Sequence[str],
    headings: dict[str, str],
    cells: Sequence[_Cell],
) -> list[Column]:
    """A column per number, and one of differences beside each that has any (in a table of classes
    only over all pairs: the CSV holds the others)."""
    compared = {cell.column for cell in cells if cell.entry["delta"] is not None}
    columns = []
    for dataset in datasets:
        for alpha in spec.alphas:
            for group in groups:
                column = Column(
                    dataset,
                    group,
                    alpha,
                    heading=f"{alpha:g}" if spec.kind == "datasets" else _SHORT.get(group, group),
                    over=headings[dataset] if spec.kind == "datasets" else None,
                    interval=group == "all",
                )
                columns.append(column)
                if group == "all" and (dataset, group, alpha) in compared:
                    columns.append(replace(column, heading="Δ published", delta=True))
    return columns


def _cell_frame(
    printed: Sequence[dict[str, Any]],
    cells: Sequence[_Cell],
    published: PublishedTable | None,
    spec: TableSpec,
) -> pd.DataFrame:
    """One row per number with all that is known of it."""
    labels = ("method", "origin", "protocol", "eval_resolution", "flow_resolution")
    lines = []
    for row in printed:
        for entry in row["values"].values():
            computed = ", mean of its printed classes" if entry["group"] == CLASS_MEAN else ""
            lines.append(
                {k: row[k] for k in labels}
                | {k: entry[k] for k in ("dataset", "group", "alpha", "pck", "rank")}
                | {"split": spec.split, "synthetic": False, "averaging": spec.averaging}
                | {"source": published.source + computed}
            )
    for cell in cells:
        row, record, meta, entry = cell.row, cell.record, cell.meta, cell.entry
        matcher, code, scored_by = meta["matcher"], meta.get("code") or {}, record["scored_by"]
        every = cell.group == "all"
        lines.append(
            {k: row[k] for k in labels}
            | {k: meta.get(k) for k in ("dataset", "split", "synthetic", "plan")}
            | {"group": cell.group}
            | {k: entry[k] for k in ("alpha", "averaging", "pck", "low", "high")}
            | {"level": record["level"], "rank": entry["rank"], "same_as_best": entry["same"]}
            | {"p_best": entry["p_best"], "published": entry.get("published_pck")}
            | {"delta_published": entry["delta"]}
            | {k: entry[k] for k in ("n_pairs", "n_keypoints", "n_images")}
            | {"n_unanswered": record["n_unanswered"] if every else None}
            | {k: meta.get(k) for k in ("official_pairs", "fingerprint", "key")}
            | {"seed": (meta.get("facts") or {}).get("seed"), "matcher": matcher["name"]}
            | {"weights_sha256": matcher.get("weights_sha256")}
            | {"random_weights": matcher.get("random_weights")}
            | {"commit": code.get("commit"), "dirty": code.get("dirty")}
            | {"scored_by": scored_by.get("commit"), "scored_dirty": scored_by.get("dirty")}
            | {"predictions_sha256": record["predictions_sha256"], "source": "this run"}
        )
    frame = pd.DataFrame(lines, columns=_CSV)
    counts = [c for c in _CSV if c.startswith("n_")] + ["official_pairs", "seed"]
    return frame.astype(dict.fromkeys(counts, "Int64"))


_CSV = [
    *("method", "origin", "protocol", "eval_resolution", "flow_resolution", "dataset", "split"),
    *("synthetic", "group", "alpha", "averaging", "pck", "low", "high", "level"),
    *("rank", "same_as_best", "p_best", "published", "delta_published"),
    *("n_pairs", "n_keypoints", "n_images", "n_unanswered", "official_pairs", "fingerprint"),
    *("plan", "key", "seed", "matcher", "weights_sha256", "random_weights"),
    *("commit", "dirty", "scored_by", "scored_dirty", "predictions_sha256", "source"),
]


# -- headings and footnotes ------------------------------------------------------------------------


def _title(spec: TableSpec, records: Sequence[dict[str, Any]], synthetic: bool) -> str:
    title = spec.title
    if spec.kind == "classes":
        title += f", alpha {spec.alphas[0]:g}{_measured_part(records[0]['predictions'])}"
    if synthetic:
        title += SAYS_NOTHING
    return title


def _heading(dataset: str, records: Sequence[dict[str, Any]], synthetic: bool) -> str:
    title = dataset_class(dataset).title
    mine = [r for r in records if r["predictions"]["dataset"] == dataset]
    if not mine:
        base = {"spair": "bbox", "pfpascal": "img", "pfwillow": "bbox-kp"}.get(dataset, "")
        return f"{title} ({base}), not measured"
    meta, protocol = mine[0]["predictions"], mine[0]["protocol"]
    text = f"{title} ({_BASES[protocol['bases'][meta['layout']]]})"
    return f"synthetic {text}" if synthetic else text + _measured_part(meta)


def _measured_part(meta: dict[str, Any]) -> str:
    if not is_part(meta):
        return ""
    return f", measured on {meta['n_pairs']} of {meta['official_pairs']} pairs"


def _eval_resolution(frame: dict[str, Any]) -> str:
    side = frame["side"]
    if frame.get("height"):
        return f"{frame['height']}x{side}"
    kinds = {"original": "ori", "squash": f"{side}", "fit": f"max {side}", "scale": f"long {side}"}
    return kinds[frame["kind"]]


def _number_notes(records: Sequence[dict[str, Any]], spec: TableSpec) -> Iterator[str]:
    if spec.kind == "datasets":
        yield f"PCK in percent, per-{spec.averaging} mean, at the given alphas."
    else:
        yield (
            f"PCK in percent, per-{spec.averaging} mean over the pairs of a class; all: over all "
            "pairs, so that a class weighs by its pairs; class mean: over the classes' values, "
            "which weigh alike. The two differ where classes differ in size."
        )
    where = " (in the CSV for classes and their mean)" if spec.kind == "classes" else ""
    yield (
        f"Measured cells: mean and {records[0]['level']:.0%} interval{where}, which counts images, "
        "not pairs, as independent (docs/statistics.md) and is a claim about these weights."
    )


def _published_notes(
    published: PublishedTable | None, printed: Sequence[dict[str, Any]], spec: TableSpec
) -> Iterator[str]:
    if published is None or not printed:
        return
    yield f"Published rows are figures as printed in {published.source}; not measured here."
    if spec.kind == "classes":
        yield "Class means of published rows are computed here from the printed classes."
    if any(entry["rank"] for row in printed for entry in row["values"].values()):
        yield (
            "Published figures are ranked among themselves, as printed: best bold, second "
            "underlined, equal figures alike. Their protocols are their papers' and may differ."
        )
    shown = {row["method"] for row in printed}
    for method in published.methods:
        if method.note and f"{method.name} ({method.venue} {method.year})" in shown:
            yield f"{method.name}: {method.note.strip()}."


def _rank_notes(
    records: Sequence[dict[str, Any]], cells: Sequence[_Cell], comparisons: int, paired: bool
) -> Iterator[str]:
    if any(cell.entry["rank"] for cell in cells):
        yield (
            "Measured rows are ranked within each column and protocol: best bold, second "
            "underlined, equal means alike."
        )
        level = records[0]["level"]
        if comparisons and paired:
            yield (
                f"≈: no difference from the best is shown, p ≥ {1 - level:.2g} in a paired test "
                "that counts images as independent, Holm-adjusted over the table's "
                f"{comparisons} comparisons with a best."
            )
        elif comparisons:
            yield (
                f"≈: no difference from the best is shown, the {level:.0%} intervals overlap (no "
                "paired test: the scores of each pair were not at hand)."
            )
    outside = dict.fromkeys(cell.row["method"] for cell in cells if _outside(cell.meta))
    parts = {
        f"{meta['title']} ({meta['n_pairs']} of {meta['official_pairs']} pairs)": None
        for meta in (record["predictions"] for record in records)
        if is_part(meta)
    }
    reasons = []
    if outside:
        reasons.append(
            f"{', '.join(outside)} (no contenders: floors, ceilings, random weights, rows that "
            "know the true class)"
        )
    if parts:
        reasons.append(f"{', '.join(parts)}, a part of the dataset")
    if any(contender.entry["same"] is None for column in _rankable(cells) for contender in column):
        reasons.append("rows that are alone under their protocol in a column")
    if reasons:
        yield f"Not ranked: {'; '.join(reasons)}."


def _delta_notes(
    records: Sequence[dict[str, Any]], cells: Sequence[_Cell], published: PublishedTable | None
) -> Iterator[str]:
    if published is None:
        return
    unchecked = {}
    for cell in cells:
        if cell.entry["delta"] is not None:
            method = published.counterpart(cell.record)[0]
            if method.measured_as["weights_sha256"] is None:
                unchecked[cell.meta["matcher"]["label"]] = None
    if any(cell.entry["delta"] is not None for cell in cells):
        yield (
            "Δ published: measured minus published, in points, where protocol, threshold, "
            "backbone, layers and weights are the published ones and the dataset is complete."
        )
    if unchecked:
        yield f"{', '.join(unchecked)}: the trunk's weights are taken for the published ones."
    refused: dict[tuple[str, str], dict[str, None]] = {}
    for record in records:
        reason = published.counterpart(record)[1]
        if reason:
            meta = record["predictions"]
            refused.setdefault((meta["matcher"]["label"], reason), {})[meta["title"]] = None
    for (label, reason), titles in refused.items():
        where = ", ".join(titles)
        yield f"{label} is not compared with its published figures on {where}: {reason}."


def _provenance_notes(
    records: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], spec: TableSpec
) -> list[str]:
    protocols: dict[str, set[str]] = {}
    for record in records:
        protocol = record["protocol"]
        text = protocol["description"].replace(
            f"per-{protocol['averaging']} mean", f"per-{spec.averaging} mean"
        )
        protocols.setdefault(text, set()).add(record["predictions"]["title"])
    notes = [f"{text} ({', '.join(sorted(on))})." for text, on in sorted(protocols.items())]
    if any(row["values"] and "oracle-grid" in row["method"] for row in rows):
        notes.append(
            "oracle-grid GxG is no method: the truth snapped to the centres of a GxG grid over the "
            "reference image, the ceiling of predictions of that resolution."
        )
    seen = {}
    for record in records:
        meta = record["predictions"]
        seen[meta["dataset"]] = (
            f"{'synthetic ' if meta['synthetic'] else ''}{meta['title']} {meta['split']}: "
            f"{record['n_pairs']} pairs of {record['n_images']} distinct images, "
            f"{record['n_keypoints']} keypoints, fingerprint {meta['fingerprint'][:12]}."
        )
    notes += list(seen.values())
    weights: dict[str, list[str]] = {}
    unanswered: dict[str, None] = {}
    for record in records:
        matcher = record["predictions"]["matcher"]
        if matcher.get("config", {}).get("backbone"):
            weights.setdefault(matcher["label"], []).append(matcher["weights_sha256"][:12])
        if record["n_unanswered"]:
            where = f"{matcher['label']} on {record['predictions']['title']}"
            count = f"{record['n_unanswered']} of {record['n_keypoints']}"
            unanswered[f"{where}: {count} unanswered (wrong)."] = None
    notes += [f"{m}: weights {', '.join(dict.fromkeys(of))}." for m, of in weights.items()]
    notes += unanswered
    external = {
        f"{m['label']}: predictions made elsewhere, file SHA-256 {m['file_sha256'][:12]}."
        for m in (record["predictions"]["matcher"] for record in records)
        if m.get("external")
    }
    notes += sorted(external)
    predicted = {
        code_text(r["predictions"].get("code"))
        for r in records
        if not r["predictions"]["matcher"].get("external")
    }
    by = {"predictions by": predicted, "scores by": {code_text(r["scored_by"]) for r in records}}
    code = "; ".join(f"{what} {', '.join(sorted(of))}" for what, of in by.items() if of)
    return [*notes, f"Code: {code}."]
