"""A table as one HTML page: sortable figures, bars per class, pairs to look at. Torch-free.

The page is a single file that asks no network. It holds query, prediction and truth of every
keypoint, and of every pair the frame's factors and the length that alpha multiplies under each
protocol of the plan, so its script scores anew in float32 as :mod:`nemf.scoring` does and arrives
at the records' numbers. Intervals come from the records. Equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from nemf.datasets import dataset_class
from nemf.datasets.index import decode_image
from nemf.errors import NemfError
from nemf.files import write_text
from nemf.geometry import snap_to_grid
from nemf.pairs import FLAGS, ImageRecord
from nemf.predictions import FILE_NAME, Predictions
from nemf.scoring import PROTOCOLS, correct
from reports.records import keypoint_errors
from reports.self_contained import render_page
from reports.tables import Table
from reports.wording import code_text, is_part

log = logging.getLogger(__name__)

_COLUMNS = [
    *("pair", "pair_number", "category", "kp_name"),
    *(f"{what}_{axis}" for what in ("query", "pred", "true") for axis in "xy"),
    *(f"{s}_{what}" for s in ("query", "reference") for what in ("image", "hash")),
    *(f"{s}_{what}" for s in ("query", "reference") for what in ("height", "width")),
    *(f"reference_bbox_{v}" for v in ("x1", "y1", "x2", "y2")),
    *FLAGS,
]
_PICTURE_SIDE_PX = 320
_PICTURE_QUALITY = 60
_PICTURE_BYTES = 6 << 20  # of all JPEGs of a page
_PREFERRED_RULE, _PREFERRED_ALPHA = "canonical@1", 0.1
_HEADINGS = {
    True: "Published: figures as printed, not measured here",
    False: "Measured here: mean and interval",
}


def write_page(
    path: Path,
    table: Table,
    records: Sequence[tuple[Path, dict[str, Any]]],
    *,
    data: Path | None = None,
    shown: int = 12,
) -> None:
    """Writes the page of a table, whole or not at all.

    ``records``: the score records the table was made from, each with the file it was read from
    (:func:`reports.records.current_records`); the prediction files lie beside them. Records under
    further protocols add their intervals, those of predictions that the table does not show are
    left out. ``data``: root of the datasets, for pictures: those whose content has the hash that
    the predictions name; points are drawn on a plain ground where there is none. ``shown``: how
    many best, worst or random pairs are shown at a time.

    NemfError if a prediction file of the table is not among the records', if two files disagree on
    the truth of a dataset, if ``data`` is no folder, or if the page cannot be written.
    """
    if shown < 1:
        raise NemfError(f"shown must be at least 1, not {shown}")
    if data is not None and not data.is_dir():
        raise NemfError(f"{data}: no such folder; give the root of the datasets with --data")
    cells = _cells(table, records)
    grounds: dict[tuple[str, str], _Ground] = {}
    for file in sorted({cell.file for cell in cells}):
        predictions = Predictions.read(file, _COLUMNS)
        slot = predictions.meta["dataset"], predictions.meta["plan"]
        if slot not in grounds:
            grounds[slot] = _Ground(file, predictions)
        ground = grounds[slot]
        ground.check(file, predictions)
        for cell in cells:
            if cell.file == file:
                cell.ground = list(grounds).index(slot)
                _read_cell(cell, predictions, ground)
    ordered = list(grounds.values())
    pictures = _pictures(_wanted_images(cells, ordered, shown), ordered, data)
    blocks = {"page": _summary(table, cells, ordered, shown), "pictures": list(pictures.values())}
    blocks |= {f"ground-{i}": ground.block(list(pictures)) for i, ground in enumerate(ordered)}
    blocks |= {f"cell-{i}": {"pred": _packed(cell.pred)} for i, cell in enumerate(cells)}
    write_text(path, _render(table, cells, blocks))


@dataclass(eq=False)
class _Cell:
    """One method on one prediction file (a ceiling is a method of its own on the file it is made
    from), with its records by protocol id. ``pred`` float32 (R, 2) px. Under the rule and at the
    alpha that the page opens with: ``pck``, and ``ranking`` (P,), the pairs from best to worst."""

    file: Path
    method: str
    meta: dict[str, Any]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    ground: int = -1
    pred: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    ranking: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    pck: float = 0.0

    @property
    def is_ceiling(self) -> bool:
        return "grid" in self.meta["matcher"]


def _cells(table: Table, records: Sequence[tuple[Path, dict[str, Any]]]) -> list[_Cell]:
    """The measured cells of the table, by its columns and then its rows."""
    measured = table.cells[table.cells["predictions_sha256"].notna()]
    methods: dict[str, dict[str, None]] = {}
    for digest, method in zip(measured["predictions_sha256"], measured["method"], strict=True):
        methods.setdefault(digest, {})[method] = None
    cells: dict[tuple[str, str], _Cell] = {}
    for path, record in records:
        digest, meta = record["predictions_sha256"], record["predictions"]
        label = meta["matcher"]["label"]
        for method in methods.get(digest, ()):
            if method == label or method.startswith(f"{label} ["):  # with its marks
                new = _Cell(path.parent.parent / FILE_NAME, method, meta)
                cells.setdefault((digest, method), new).records[record["protocol"]["id"]] = record
    absent = {m: None for digest, of in methods.items() for m in of if (digest, m) not in cells}
    if absent:
        raise NemfError(f"{table.name}: no record of {', '.join(absent)} was given for the page")
    rows = list(dict.fromkeys(measured["method"]))

    def position(cell: _Cell) -> tuple[int, int, str]:
        return (
            table.datasets.index(cell.meta["dataset"]),
            rows.index(cell.method),
            cell.meta["plan"],
        )

    return sorted(cells.values(), key=position)


def _read_cell(cell: _Cell, predictions: Predictions, ground: _Ground) -> None:
    """Fills in the predictions, their PCK and the order of the pairs."""
    grid = cell.meta["matcher"].get("grid")
    if grid is None:
        cell.pred = predictions.points("pred")
    else:  # of every image at once: x and y by row, sizes by column
        heights, widths = (predictions.column(f"reference_{s}") for s in ("height", "width"))
        cell.pred = snap_to_grid(predictions.points("true").T, (heights, widths), grid).T
    protocol, alpha = PROTOCOLS[ground.first_rule], ground.first_alpha(cell.records.values())
    error, length = keypoint_errors(predictions, protocol, oracle_grid=grid)
    hits = correct(error, length, alpha, inclusive=protocol.inclusive).astype(float)
    n = np.diff(np.r_[ground.starts, len(error)])
    fraction = np.add.reduceat(hits, ground.starts) / n
    distance = np.add.reduceat(np.minimum(error / length, 1).astype(float), ground.starts) / n
    cell.ranking = np.lexsort((distance, -fraction))
    cell.pck = float(fraction.mean())


class _Ground:
    """What all prediction files of one dataset and plan share: pairs, queries, truth, rules."""

    def __init__(self, file: Path, predictions: Predictions) -> None:
        self.file, self.meta = file, predictions.meta
        self.starts = predictions.pair_starts
        self._digest = _truth_digest(predictions)
        self.rules: dict[str, dict[str, Any]] = {}
        self.unscorable: dict[str, str] = {}
        heights, widths = (predictions.column(f"reference_{s}") for s in ("height", "width"))
        for protocol in PROTOCOLS.values():
            if protocol.plan.for_layout(self.meta["layout"]) != predictions.plan:
                continue
            try:
                _, length = keypoint_errors(predictions, protocol)
            except NemfError as problem:
                self.unscorable[protocol.id] = str(problem)
                continue
            self.rules[protocol.id] = {
                "factors": protocol.frame.factors(heights[self.starts], widths[self.starts]),
                "length": length[self.starts],
                "inclusive": protocol.inclusive,
            }
        if not self.rules:
            raise NemfError(f"{file}: no protocol can score it ({self.unscorable})")
        self.images, self._sides = _images(predictions, self.starts)
        self._pairs = _pair_columns(predictions, self.starts)
        self.order = np.random.default_rng(0).permutation(len(self.starts))  # of random pairs

    @property
    def first_rule(self) -> str:
        """The protocol that the page opens with."""
        return _PREFERRED_RULE if _PREFERRED_RULE in self.rules else next(iter(self.rules))

    def first_alpha(self, records: Iterable[dict[str, Any]]) -> float:
        alphas = {alpha for record in records for alpha in record["alphas"]}
        return _PREFERRED_ALPHA if _PREFERRED_ALPHA in alphas else max(alphas)

    def check(self, file: Path, predictions: Predictions) -> None:
        """NemfError if a file does not answer these very questions."""
        if _truth_digest(predictions) != self._digest:
            raise NemfError(
                f"{file}: holds other pairs or another truth than {self.file}; predict both on "
                "one version of the dataset"
            )

    def hashes(self, pair: int) -> list[str]:
        """Content hashes of a pair's query and reference image."""
        return [self.images[self._sides[side][pair]]["hash"] for side in ("query", "reference")]

    def image_uses(self) -> Counter[str]:
        """How many pairs show each image, by content hash."""
        uses: Counter[str] = Counter()
        for codes in self._sides.values():
            for code, count in enumerate(np.bincount(codes, minlength=len(self.images)).tolist()):
                uses[self.images[code]["hash"]] += count
        return uses

    def block(self, pictures: Sequence[str]) -> dict[str, Any]:
        """The ground as the page's script reads it. ``pictures``: hashes in embedded order."""
        number = {digest: i for i, digest in enumerate(pictures)}
        rules = {
            name: {k: _packed(v) if isinstance(v, np.ndarray) else v for k, v in rule.items()}
            for name, rule in self.rules.items()
        }
        return {
            "images": [
                {k: image[k] for k in ("name", "width", "height")}
                | {"picture": number.get(image["hash"])}
                for image in self.images
            ],
            **{side: _packed(codes) for side, codes in self._sides.items()},
            "order": _packed(self.order.astype(np.uint32)),
            "rules": rules,
            **self._pairs,
        }


def _truth_digest(predictions: Predictions) -> bytes:
    digest = hashlib.sha256()
    digest.update(json.dumps(predictions.column("pair")[predictions.pair_starts].tolist()).encode())
    for values in (predictions.column("pair_number"), *map(predictions.points, ("query", "true"))):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.digest()


def _images(
    predictions: Predictions, starts: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The distinct images and, by side, their numbers uint32 (P,)."""
    images: dict[tuple[str, str], dict[str, Any]] = {}
    sides = {}
    for side in ("query", "reference"):
        columns = [
            predictions.column(f"{side}_{what}")[starts].tolist()
            for what in ("image", "hash", "width", "height")
        ]
        for name, digest, width, height in zip(*columns, strict=True):
            entry = {"name": name, "hash": digest, "width": width, "height": height}
            images.setdefault((name, digest), entry)
        number = {key: i for i, key in enumerate(images)}
        codes = [number[key] for key in zip(*columns[:2], strict=True)]
        sides[side] = np.array(codes, np.uint32)
    return list(images.values()), sides


def _pair_columns(predictions: Predictions, starts: np.ndarray) -> dict[str, Any]:
    """The parts of a ground's block that describe pairs and keypoints."""
    flags = {flag: predictions.column(flag)[starts].astype(np.int8) for flag in FLAGS}
    categories, texts = predictions.codes("category")
    names, name_texts = predictions.codes("kp_name")
    return {
        "ids": _packed(predictions.column("pair")[starts].tolist()),
        "starts": _packed(np.r_[starts, len(predictions)].astype(np.uint32)),
        "categories": texts,
        "category": _packed(categories[starts].astype(np.uint32)),
        "flags": {name: _packed(v) for name, v in flags.items() if (v >= 0).any()},
        "names": name_texts,
        "name": _packed(names.astype(np.uint32)),
        "queries": _packed(predictions.points("query")),
        "truth": _packed(predictions.points("true")),
    }


def _packed(values: np.ndarray | list[str]) -> dict[str, str]:
    """An array (or a list, as JSON), deflated and in base64, with the type to read it by."""
    if isinstance(values, list):
        kind, content = "json", json.dumps(values).encode()
    else:
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        kind, content = f"{little.dtype.kind}{little.dtype.itemsize}", little.tobytes()
    return {"packed": kind, "data": base64.b64encode(zlib.compress(content, 9)).decode()}


# -- pictures -----------------------------------------------------------------------------------


def _wanted_images(
    cells: Sequence[_Cell], grounds: Sequence[_Ground], shown: int
) -> dict[str, None]:
    """Content hashes by how much the page wants their pictures: first the pairs it opens with, one
    of each kind and cell at a time, then those that most pairs show."""
    wanted: dict[str, None] = {}
    for rank in range(shown):
        for cell in cells:
            ground = grounds[cell.ground]
            if rank < len(cell.ranking):
                for pair in (cell.ranking[rank], cell.ranking[-1 - rank], ground.order[rank]):
                    wanted |= dict.fromkeys(ground.hashes(int(pair)))
    uses: Counter[str] = Counter()
    for ground in grounds:
        uses |= ground.image_uses()
    return wanted | dict.fromkeys(sorted(uses, key=lambda digest: (-uses[digest], digest)))


def _pictures(
    wanted: Iterable[str], grounds: Sequence[_Ground], data: Path | None
) -> dict[str, str]:
    """Base64 JPEGs by content hash, as many as the page may hold."""
    pictures: dict[str, str] = {}
    if data is None:
        return pictures
    known = dict(_image_records(grounds, data))
    size = 0
    for digest in wanted:
        if digest not in known:
            continue
        jpeg = _jpeg(decode_image(known[digest].path, known[digest].mirrored))
        size += len(jpeg)
        if size > _PICTURE_BYTES:
            break
        pictures[digest] = base64.b64encode(jpeg).decode()
    return pictures


def _image_records(grounds: Sequence[_Ground], data: Path) -> Iterator[tuple[str, ImageRecord]]:
    """The images below the data root by their content's hash."""
    for name, split in dict.fromkeys((g.meta["dataset"], g.meta["split"]) for g in grounds):
        reader = dataset_class(name)
        if reader.find(data) is None:
            log.warning("%s: no %s, so the page shows none of its pictures", data, reader.title)
            continue
        try:
            images = reader(data, split).images
        except NemfError as problem:
            log.warning("the page shows no picture of %s: %s", reader.title, problem)
            continue
        yield from ((record.hash, record) for record in images)


def _jpeg(pixels: np.ndarray) -> bytes:
    picture = PILImage.fromarray(pixels)
    picture.thumbnail((_PICTURE_SIDE_PX, _PICTURE_SIDE_PX))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_PICTURE_QUALITY, optimize=True)
    return file.getvalue()


# -- what the page says -------------------------------------------------------------------------


def _summary(
    table: Table, cells: Sequence[_Cell], grounds: Sequence[_Ground], shown: int
) -> dict[str, Any]:
    """Everything the script needs before it looks at a keypoint."""
    datasets: dict[str, dict[str, Any]] = {}
    for number, ground in enumerate(grounds):
        meta = ground.meta
        entry = datasets.setdefault(
            meta["dataset"], {"title": _dataset_title(meta), "rules": {}, "unscorable": {}}
        )
        for rule in ground.rules:
            text = PROTOCOLS[rule].describe(meta["layout"]).rpartition("; per-")[0]
            entry["rules"][rule] = {"ground": number, "description": text}
        entry["unscorable"] |= ground.unscorable
    for name, entry in datasets.items():
        records = [r for c in cells if c.meta["dataset"] == name for r in c.records.values()]
        entry["alphas"] = sorted({alpha for record in records for alpha in record["alphas"]})
        rules = entry["rules"]
        entry["first_rule"] = _PREFERRED_RULE if _PREFERRED_RULE in rules else next(iter(rules))
        first = [c for c in cells if c.ground == rules[entry["first_rule"]]["ground"]]
        entry["first_method"] = max(first, key=lambda c: (not c.is_ceiling, c.pck)).method
    return {
        "datasets": {name: datasets[name] for name in table.datasets if name in datasets},
        "averaging": table.cells["averaging"].iloc[0],
        "first_alpha": _PREFERRED_ALPHA,
        "shown": shown,
        "cells": [
            {
                "method": cell.method,
                "dataset": cell.meta["dataset"],
                "ground": cell.ground,
                "scores": {rule: _scores(record) for rule, record in cell.records.items()},
            }
            for cell in cells
        ],
    }


def _scores(record: dict[str, Any]) -> dict[str, Any]:
    """The record's means and intervals: ``[averaging][group]`` holds [pck, low, high] by alpha."""
    scores: dict[str, Any] = {"alphas": record["alphas"], "image": {}, "point": {}}
    for entry in record["metrics"]:
        group = f"{entry['group']} {entry['value']}"
        values = [entry[key] for key in ("pck", "low", "high")]
        rounded = [None if value is None else round(value, 9) for value in values]
        scores[entry["averaging"]].setdefault(group, [None] * len(record["alphas"]))
        scores[entry["averaging"]][group][record["alphas"].index(entry["alpha"])] = rounded
    return scores


def _dataset_title(meta: dict[str, Any]) -> str:
    of = f" of {meta['official_pairs']}" if is_part(meta) else ""
    synthetic = "synthetic " if meta["synthetic"] else ""
    return f"{synthetic}{meta['title']} {meta['split']} ({meta['n_pairs']}{of} pairs)"


def _render(table: Table, cells: Sequence[_Cell], blocks: dict[str, Any]) -> str:
    return render_page(
        "page.html",
        ("sorting.js", "page.js"),
        table=table,
        synthetic=any(cell.meta["synthetic"] for cell in cells),
        overs=[(over, len(list(of))) for over, of in groupby(table.columns, lambda c: c.over)],
        bodies=_bodies(table),
        **_provenance(cells),
        blocks=blocks,
    )


def _bodies(table: Table) -> list[tuple[str, list[dict[str, Any]]]]:
    """Published rows and all others, with a heading each: sorting does not mix them."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in table.rows:
        heading = _HEADINGS[row["origin"] == "published"]
        cells = [(column, row["values"].get(column.key)) for column in table.columns]
        parts.setdefault(heading, []).append(row | {"cells": cells})
    return list(parts.items())


def _provenance(cells: Sequence[_Cell]) -> dict[str, Any]:
    """``origin``: facts of the whole table; ``origins``: what differs, by cell."""
    facts = {_cell_title(cell): _cell_facts(cell) for cell in cells}
    records = [(c.meta, r) for c in cells for r in c.records.values()]
    origin = {f"{_dataset_title(m)}, fingerprint": m["fingerprint"] for m, _ in records}
    for meta, record in records:
        rule, _, text = record["protocol"]["description"].partition(": ")
        origin[f"{rule} on {meta['title']}"] = text
    first, *others = facts.values()
    shared = {k: v for k, v in first.items() if all(o.get(k) == v for o in others)}
    origins = {t: {k: v for k, v in f.items() if k not in shared} for t, f in facts.items()}
    return {"origin": origin | shared, "origins": origins}


def _cell_title(cell: _Cell) -> str:
    return f"{cell.method} on {_dataset_title(cell.meta)}, {cell.meta['plan']}"


def _cell_facts(cell: _Cell) -> dict[str, str]:
    meta, matcher = cell.meta, cell.meta["matcher"]
    facts, records = meta.get("facts") or {}, cell.records.values()
    shown = {
        "Protocols": ", ".join(sorted(cell.records)),
        "Prediction file SHA-256": next(iter(records))["predictions_sha256"],
        "Prediction key": meta["key"],
        "Predicted by": "elsewhere" if matcher.get("external") else code_text(meta["code"], None),
        "Scored by": ", ".join(dict.fromkeys(code_text(r["scored_by"], None) for r in records)),
    }
    if matcher.get("external"):
        shown["File made elsewhere, SHA-256"] = matcher["file_sha256"]
    if "weights_sha256" in matcher:
        random = " (random weights)" if matcher.get("random_weights") else ""
        shown["Weights SHA-256"] = matcher["weights_sha256"] + random
    if facts:
        shown["Seed"] = str(facts["seed"])
        shown["Computed on"] = f"{facts['device']}, {facts['threads']} thread(s)"
        shown["Versions"] = ", ".join(f"{k} {v}" for k, v in sorted(facts["libraries"].items()))
    if matcher.get("config"):
        shown["Configuration"] = json.dumps(matcher["config"], sort_keys=True, default=str)
    return shown
